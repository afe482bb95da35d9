"""The comparison: what becomes a row, what may stand side by side, how sure it is, and every form it is printed in."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest

from moe.errors import NotFoundError, SpecError
from orchestrator.compare import Options, compare, read_all
from orchestrator.compare_read import choose, read_run
from orchestrator.compare_sources import Reader
from orchestrator.compare_stats import by_domains, by_examples, by_seeds, holm, mean_error
from orchestrator.runs import RunStore
from tests.orchestrator.cli_support import call, document, folder  # noqa: F401
from tests.orchestrator.compare_store import STAGES, Runs, put
from tests.support.browser import Browser, find_browser

GOOD = {"erm": (60, 50), "student": (70, 40), "student_distill": (80, 70)}


@pytest.fixture
def runs(store):
    return Runs(store)


def compared(store, *names, **options):
    facts = [read_run(run) for run in choose(store, names, None, None)]
    return compare(read_all(Reader(store), facts)[0], Options(**options))


def rows(found):
    return {row.id: row for row in found.rows}


# ---- rows and cells ----


def test_cells_are_means_over_seeds_with_standard_errors(runs, store):
    runs.run(lambda seed: {"erm": (60 + 2 * seed, 50)})
    row = rows(compared(store))["erm"]
    assert row.domain("left").mean == pytest.approx(0.62) and row.domain("left").seeds == 3
    assert row.domain("left").error == pytest.approx(np.std([0.6, 0.62, 0.64], ddof=1) / np.sqrt(3))
    assert row.domain("right").error == 0
    assert row.cell("avg").mean == pytest.approx(0.56)
    assert row.cell("worst").mean == pytest.approx(0.5) and row.worst_name == "right"
    assert row.cell("macro_f1").mean == pytest.approx(0.46)


def test_the_worst_domain_is_each_seeds_own(runs, store):
    runs.run(lambda seed: {"erm": ((40, 80), (80, 40), (60, 60))[seed]})
    row = rows(compared(store))["erm"]
    assert row.cell("worst").mean == pytest.approx((0.4 + 0.4 + 0.6) / 3)


def test_a_single_seed_has_no_error(runs, store):
    runs.run(GOOD, seeds=(4,))
    assert rows(compared(store))["erm"].cell("avg").error is None


def test_adaptations_are_rows_of_their_own(runs, store):
    runs.run(GOOD)
    found = rows(compared(store))
    assert (found["student_distill"].method, found["student_distill"].adaptation) == ("student", "distill")
    assert (found["student"].method, found["student"].adaptation) == ("student", "")


def test_seeds_of_equal_runs_are_one_row(runs, store):
    runs.run(GOOD, seeds=(0, 1))
    runs.run(GOOD, seeds=(2, 3))
    found = compared(store, "toy*")
    assert [row.id for row in found.rows] == ["erm", "student", "student_distill"]
    assert rows(found)["erm"].seeds == [0, 1, 2, 3] and len(found.runs) == 2


def test_other_settings_make_another_row_that_says_what_differs(runs, store):
    other = json.loads(json.dumps(STAGES))
    other["distill"]["config"]["training"]["lr"] = 0.5
    runs.run(GOOD)
    runs.run(GOOD, stages=other)
    found = rows(compared(store, "toy*"))
    assert set(found) == {"erm", *(f"{name}@lr={lr}" for name in ("student", "student_distill") for lr in (0.1, 0.5))}
    assert "lr=0.5" in found["student@lr=0.5"].label


def test_contradicting_results_of_equal_settings_are_kept_apart_by_run(runs, store):
    first = runs.run({"erm": (60, 50)})
    second = runs.run({"erm": (61, 50)})
    found = rows(compared(store, "toy*"))
    assert set(found) == {f"erm@{run.rsplit('-', 1)[1]}" for run in (first, second)}


def test_a_hit_in_another_run_counts_once(runs, store):
    runs.run(GOOD)
    runs.run(GOOD)
    assert rows(compared(store, "toy*"))["erm"].cell("avg").seeds == 3


def test_held_out_domains_of_several_runs_make_one_table(runs, store):
    left = json.loads(json.dumps(STAGES))
    left["data"]["config"]["options"]["target"] = "left"
    runs.run({"erm": (60, 50)})
    observations, _ = read_all(Reader(store), [read_run(run) for run in choose(store, (), None, None)])
    from dataclasses import replace

    split = [
        replace(item, domains={name: item.domains[name]}, data=name) for item in observations for name in item.domains
    ]
    row = compare(split, Options()).rows[0]
    assert row.domains == ["left", "right"] and row.cell("avg").mean == pytest.approx(0.55)


# ---- costs ----


def test_costs_come_from_record_and_event_log(runs, store):
    cost = {"parameters": 1000, "active_parameters": 400.0, "flops": 2e6}
    runs.run(GOOD, cost=cost)
    found = rows(compared(store))
    assert found["student"].cost.parameters == 1000 and found["student"].cost.flops == 2e6
    assert found["student"].cost.latency_ms == 2.5 and found["erm"].cost.latency_ms is None
    assert found["erm"].hours.hours == pytest.approx(1.0)
    # An hour of ERM on one device, and one of distillation on two.
    assert found["student_distill"].hours.hours == pytest.approx(3.0) and found["student"].steps == [20]


def test_runs_of_a_sweep_tell_what_their_network_costs(runs, store):
    cost = {"parameters": 1000, "active_parameters": 600.0, "flops": 5000.0}
    artifacts = {}
    for held_out in (0, 1):
        args = {"dataset": "toy", "algorithm": "GMOE", "test_envs": [held_out], "hparams_seed": 0, "trial_seed": 0}
        args |= {"seed": held_out}
        scores = {f"env{number}_{part}_acc": 0.5 for number in (0, 1) for part in ("in", "out")}
        line = json.dumps({**scores, "step": 0, "epoch": 0.0, "loss": 1.0, "hparams": {}, "args": args})
        meta = {"args": args, "labels": ["left", "right"], "protocol": "gmoe_fork", "steps": 5, "cost": cost}
        files = {"results.jsonl": (line + "\n").encode(), "done": b"done"}
        artifacts[f"sweep/toy,GMOE,test={held_out},hparams=0,trial=0"] = put(store, "run", meta, files)
    sweep = {"kind": "sweep", "config": {"datasets": ["toy"], "algorithms": ["GMOE"]}}
    runs.run(stages={"data": STAGES["data"], "sweep": sweep}, seeds=(), artifacts=artifacts)
    found = compared(store, selection="iid")
    (row,) = [row for row in found.rows if row.method == "GMOE"]
    assert row.domain("left").mean == 0.5
    assert (row.cost.parameters, row.cost.active_parameters, row.cost.flops) == (1000, 600.0, 5000.0)


def test_time_of_a_hit_is_that_of_its_first_making(runs, store):
    name = runs.run(GOOD, seeds=(0,))
    events = store.folder / "runs" / name / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    for line in lines:
        if line["node"] == "erm/seed=0" and line["kind"] == "member-finished":
            line["kind"] = "member-hit"
            key = line["data"]["key"]
            line["data"] = {"key": key, "digest": line["data"]["digest"]}
    events.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    assert rows(compared(store))["erm"].hours.missing == 1
    record = {"format": 1, "artifact": "a", "parts": {}, "node": "", "seconds": 7200.0, "bytes": 0}
    (store.folder / "keys").mkdir(exist_ok=True)
    (store.folder / "keys" / f"{key}.json").write_text(json.dumps(record))
    assert rows(compared(store))["erm"].hours.hours == pytest.approx(2.0)


def test_latency_of_a_hit_is_that_of_the_run_that_measured_it(runs, store):
    name = runs.run(GOOD, seeds=(0,))
    again = store.folder / "runs" / f"{name}-again"
    shutil.copytree(store.folder / "runs" / name, again)
    (again / "run.json").write_text(json.dumps({"id": again.name, "created": 1e9}))
    lines = [json.loads(line) for line in (again / "events.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] != "member-metrics"]
    for line in lines:
        line["kind"] = "member-hit" if line["kind"] == "member-finished" else line["kind"]
    (again / "events.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    assert rows(compared(store, again.name))["student"].cost.latency_ms == 2.5


def test_networks_that_have_labels_keep_their_wiring_and_namesakes_their_stage(runs, store):
    stages = json.loads(json.dumps(STAGES))
    stages["evaluate"]["config"]["labels"] = {"student": "GMoE!"}
    right = {"erm": (60, 50), "gmoe": (70, 60)}
    other = {**stages["evaluate"], "config": {"protocol": "split"}}
    stages["evaluate_more"] = other
    more = {f"evaluate_more/seed={seed}": runs.evaluation(seed, {"erm": (50, 50)}) for seed in range(3)}
    runs.run(right, stages=stages, artifacts=more)
    found = rows(compared(store))
    assert set(found) == {"erm", "more_erm", "gmoe"}
    assert found["gmoe"].hours.hours == pytest.approx(3.0)  # of the stage at the port `student`
    assert found["gmoe"].steps == [20] and found["more_erm"].label == "more: erm"


def test_failed_attempts_count_as_cost(runs, store):
    name = runs.run(GOOD, seeds=(0,), hours=10.0)
    events = store.folder / "runs" / name / "events.jsonl"
    failed = {"time": 3601.0, "kind": "member-failed", "node": "erm/seed=0", "data": {"decision": "retry"}}
    started = {"time": 1.0, "kind": "member-started", "node": "erm/seed=0", "data": {}}
    lines = [json.dumps(line, separators=(",", ":")) for line in (started, failed)]
    events.write_text("\n".join(lines) + "\n" + events.read_text())
    assert rows(compared(store))["erm"].hours.hours == pytest.approx(3610 / 3600)


# ---- significance ----


def test_a_large_difference_is_significant_and_none_is_not(runs, store):
    runs.run({"erm": (60, 50), "student": (60, 50), "student_distill": (90, 80)})
    found = rows(compared(store))
    assert found["erm"].baseline and found["erm"].difference is None
    large = found["student_distill"].difference
    assert large.level == "examples" and large.mark == "**" and large.low > 0.2 < large.high
    same = found["student"].difference
    assert same.mean == 0 and same.mark == "" and same.p == 1.0


def test_without_predictions_domains_are_resampled(runs, store):
    runs.run(GOOD, predictions=False)
    assert rows(compared(store))["student"].difference.level == "domains"
    assert rows(compared(store, level="seeds"))["student"].difference.level == "none"


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.random((1, 400)) < 0.5
    gain = (rng.random((3, 400)) < 0.1) & ~hard
    paired = by_examples({"one": gain.astype(int)}, 1000, 0)
    unpaired = by_examples({"one": (hard | gain).astype(int) - rng.permuted(hard, axis=1).astype(int)}, 1000, 0)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low) and paired.p < 0.01


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        values = (rng.random((1, 300)) < 0.3).astype(int)
        found = by_examples({"one": values}, 500, trial)
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 199


def test_domains_are_resampled_alike_alone_and_together():
    rng = np.random.default_rng(0)
    several = [rng.normal(size=(3, 4)) for _ in range(5)]
    together = by_domains(several, 500, 0)
    alone = [by_domains([one], 500, 0)[0] for one in several]
    assert [(one.low, one.high, one.p) for one in together] == [pytest.approx((a.low, a.high, a.p)) for a in alone]
    assert together[0].mean == pytest.approx(several[0].mean())
    assert by_domains([np.ones((3, 1))], 500, 0)[0].level == "none"


def test_few_seeds_alone_say_nothing():
    assert by_seeds(np.ones(3), 500, 0).p is None
    assert by_seeds(np.ones(6), 500, 0).p < 0.01


def test_holm_corrects_step_by_step():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([]) == []


def test_mean_error():
    assert mean_error([1.0]) == (1.0, None)
    assert mean_error([1.0, 3.0]) == (2.0, 1.0)


def test_a_run_as_baseline_compares_each_method_with_itself(runs, store):
    first = runs.run({"erm": (60, 50), "student": (70, 60)})
    runs.run({"erm": (62, 52), "student": (70, 60)})
    found = compared(store, "toy*", baseline=first)
    differences = {row.method: row.difference.mean for row in found.rows if row.difference}
    assert differences == pytest.approx({"erm": 0.02})
    assert {row.method for row in found.rows if row.baseline} == {"student", "erm"}


# ---- what may not be compared ----


def test_other_protocols_are_refused_or_marked(runs, store):
    runs.run(GOOD)
    runs.run(GOOD, protocol="official")
    with pytest.raises(SpecError, match=r"differ in: protocol: .*--allow-different"):
        compared(store, "toy*")
    found = compared(store, "toy*", allow_different=True)
    assert {row.id for row in found.rows} >= {"erm@a", "erm@b"} and "different: protocol" in found.notes[0]
    assert all(row.difference.mean < 0.21 for row in found.rows if row.difference)  # each to its own setting's ERM


def test_other_options_of_the_data_are_refused_but_not_another_target(runs, store):
    stages = json.loads(json.dumps(STAGES))
    stages["data"]["config"]["options"] = {"target": "mfeat", "per_domain": 5}
    runs.run(GOOD)
    runs.run(GOOD, stages=stages)
    with pytest.raises(SpecError, match="options of the data set"):
        compared(store, "toy*")


def test_the_same_domain_with_other_training_data_is_refused(runs, store):
    stages = json.loads(json.dumps(STAGES))
    stages["data"]["config"]["options"] = {"target": "synth"}
    runs.run(GOOD)
    runs.run(GOOD, stages=stages)
    with pytest.raises(SpecError, match="what is held out"):
        compared(store, "toy*")


def test_other_selection_rules_are_refused(runs, store):
    from dataclasses import replace

    runs.run(GOOD)
    found, _ = read_all(Reader(store), [read_run(RunStore(store).open("latest"))])
    others = [replace(item, run="other", selection="iid") for item in found]
    with pytest.raises(SpecError, match="selection rule: iid and validation"):
        compare([*found, *others], Options())
    assert len(compare([*found, *others], Options(selection="iid")).rows) == 3
    with pytest.raises(NotFoundError, match="No result was selected"):
        compare(found, Options(selection="loo"))


@pytest.mark.parametrize(
    ("options", "message"), [({"metric": "f1"}, "No result has the score"), ({"baseline": "ghost"}, "no row or run")]
)
def test_unknown_names_are_told(runs, store, options, message):
    runs.run(GOOD)
    with pytest.raises(NotFoundError, match=message):
        compared(store, **options)


# ---- choosing runs ----


def test_runs_are_chosen_by_name_pattern_number_and_pipeline(runs, store):
    old, new = runs.run(GOOD, name="alpha"), runs.run(GOOD, name="beta-x")

    def ids(*names, **more):
        return [run.id for run in choose(store, names, more.get("last"), more.get("pipeline"))]

    assert ids() == ids("last") == ids("latest") == [new]
    assert ids("alpha*") == ids("alpha") == ids(old) == ids(pipeline="alpha") == [old]
    assert ids(last=5) == ids("*") == ids(old, new) == [new, old]
    assert ids(pipeline="beta-x") == [new]
    named = (store.folder / "runs" / old).rename(store.folder / "runs" / "first").name  # submit --run first
    assert ids(pipeline="alpha") == [named]
    with pytest.raises(NotFoundError, match="no run 'gamma'"):
        ids("gamma")
    with pytest.raises(NotFoundError, match="No run is of pipeline"):
        ids(pipeline="bet")
    with pytest.raises(SpecError):
        ids("alpha", last=2)


# ---- the command ----


@pytest.fixture
def place(runs, store, monkeypatch):
    monkeypatch.setenv("MOEPIPE_STORE", str(store.folder))
    runs.run(GOOD, cost={"parameters": 1000, "active_parameters": 400.0, "flops": 2e6})
    return store


def test_the_table_in_a_terminal(place):
    text = call("compare", "--watts", "100").stdout
    assert "80.0 ± 0.0" in text and "baseline" in text and "1 CPU-h" in text and "≈ 100 Wh" in text
    assert re.search(r"\+20\.0\*\* \[\+1", text) and "Scale: smoke." in text


def test_every_form_has_every_row(place, tmp_path):
    markdown = call("compare", "-f", "md").stdout
    assert markdown.count("| student + distill |") == 2 and "|---|" in markdown
    latex = call("compare", "-f", "latex").stdout
    assert latex.count(r"\begin{tabular}") == 2 and r"$\pm$" in latex and r"\textbf{80.0" in latex
    table = list(csv.DictReader(io.StringIO(call("compare", "-f", "csv").stdout)))
    assert [row["id"] for row in table] == ["erm", "student", "student_distill"]
    assert float(table[2]["left mean"]) == pytest.approx(0.8) and table[0]["difference mean"] == ""
    call("compare", "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 and "http://" not in page and "<script" not in page
    assert json.loads(call("compare", "-f", "json").stdout) == document("compare")


def test_the_summary_has_no_columns_of_domains_in_any_form(place):
    for form, cell in (("md", "| left |"), ("latex", "& left"), ("html", "<th>left</th>")):
        assert cell in call("compare", "-f", form).stdout
        assert cell not in call("compare", "-f", form, "--by", "summary").stdout
    assert "has no effect on csv" in call("compare", "-f", "csv", "--by", "summary", code=2).stderr


def test_csv_has_the_score_that_was_asked_for(place):
    table = list(csv.DictReader(io.StringIO(call("compare", "-f", "csv", "--metric", "macro_f1").stdout)))
    assert float(table[2]["macro_f1 mean"]) == pytest.approx(0.65)


def test_the_page_says_how_sure_only_of_the_score_it_tells(runs, place):
    runs.run(GOOD, seeds=(0, 1, 2, 3, 4), name="many")
    lead = "the difference to the baseline is"
    assert lead in call("compare", "many", "-f", "html").stdout
    assert lead not in call("compare", "many", "-f", "html", "--metric", "worst").stdout


def test_the_page_names_the_command_that_makes_it_again(place):
    options = ("--by", "summary", "--bootstrap", "domains", "--replicates", "300", "--watts", "65")
    assert f"moepipe compare {' '.join(options)}" in call("compare", "-f", "html", *options).stdout


def test_the_json_document(place):
    found = document("compare", "--metric", "macro_f1")
    assert set(found) == {"metric", "baseline", "runs", "domains", "settings", "rows", "notes"}
    last = found["rows"][-1]
    assert last["scores"]["avg"] == {"mean": 0.75, "error": 0.0, "seeds": 3}
    assert last["scores"]["macro_f1"]["mean"] == pytest.approx(0.65)
    assert last["cost"]["flops"] == 2e6 and last["cost"]["device"] == "CPU" and last["cost"]["energy_wh"] is None
    assert last["difference"]["level"] == "none" and last["updates"] == [20]


def test_mistakes_have_their_exit_codes(place, runs):
    assert document("compare", "ghost", code=4)["error"]["code"] == "not-found"
    assert "Did you mean 'latex'" in call("compare", "-f", "latx", code=2).stderr
    assert "--bootstrap" in call("compare", "--bootstrap", "rows", code=2).stderr
    call("compare", "--json", "-f", "csv", code=2)
    empty = runs.run(None)
    assert "has no results" in call("compare", empty, code=4).stderr
    assert f"Left out, without results: {empty}" in call("compare", "*").stderr
    damaged = next(place.folder.glob("artifacts/*/evaluation.json"))
    damaged.write_text("{")
    assert call("compare", "toy*", code=6).stderr


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine (chromium, google-chrome)")
def test_the_page_in_a_browser(place, tmp_path):
    call("compare", "-o", tmp_path / "page.html")
    browser = Browser(find_browser())
    try:
        page = browser.page(900, 700)
        page.open((tmp_path / "page.html").as_uri())
        assert page.text("h1").startswith("Comparison of toy-")
        assert page.run("[...document.images].every(image => image.naturalWidth > 300)")
        assert page.run("document.querySelectorAll('tr.mark').length") == 2
        assert page.run("document.documentElement.scrollWidth <= innerWidth")  # tables scroll, the page does not
        assert page.errors == [] and not [url for url in page.addresses if url.startswith("http")]
    finally:
        browser.close()


def test_a_run_that_goes_on_is_told(place):
    (events,) = place.folder.glob("runs/*/events.jsonl")
    assert call("compare").stderr == ""
    events.write_text("\n".join(events.read_text().splitlines()[:-1]) + "\n")
    assert "Not ended yet" in call("compare").stderr


def test_a_table_of_texts_cannot_break_the_page(runs, store, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEPIPE_STORE", str(store.folder))
    runs.run({"erm": (50, 50), "<b>x|y": (60, 60)})
    call("compare", "-o", tmp_path / "page.html")
    assert "<b>x" not in (tmp_path / "page.html").read_text()
    assert "x\\|y" in call("compare", "-f", "md").stdout
