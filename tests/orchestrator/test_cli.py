"""The command line, through typer's runner: running things, exit codes, texts."""

# ruff: noqa: F811 - fixtures are imported and then named as parameters

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from moe.errors import NotFoundError
from orchestrator.cli import app
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.orchestrator.cli_support import INLINE, PIPELINE, call, document, done, folder  # noqa: F401
from tests.workers.toy import register


def names(command=app, prefix=()):
    """All commands, as tuples of words."""
    commands = command.registered_commands
    found = [(*prefix, item.name or item.callback.__name__.replace("_", "-")) for item in commands]
    for group in command.registered_groups:
        found += names(group.typer_instance, (*prefix, group.name))
    return found


def test_every_command_of_the_house_exists():
    wanted = "submit validate plan resume status logs cancel runs show ls explain schema doctor ui gc version init"
    tops = {words[0] for words in names()}
    assert (
        set(wanted.split())
        | {"data", "track", "checkpoint", "domainbed", "cluster"}
        | {*("serve", "adapt", "predict", "compare", "cite", "promote")}
        == tops
    )
    assert {("data", word) for word in ("ls", "verify", "import", "miniature")} | {("track", "sync")} <= set(names())


@pytest.mark.parametrize("words", names(), ids=" ".join)
def test_help_of_every_command(words):
    text = call(*words, "--help").stdout
    assert "Usage: moepipe" in text and len(text.splitlines()) > 5


# ---- submit, plan, validate --------------------------------------------------------------------------------------


def test_submit_ends_with_result_and_next_commands(folder):
    result = call("submit", "toy.yaml", *INLINE)
    lines = result.stdout.splitlines()
    assert "finished. 0 hits, 7 made now." in result.stdout
    assert lines[-4] == "next:" and all(line.startswith("  moepipe ") for line in lines[-3:])
    report = Path(next(line for line in lines if line.startswith("report:")).split()[1])
    assert (report / "table.json").exists()
    assert "slow/seed=1: started" in result.stderr and "started" not in result.stdout


def test_submit_again_is_all_hits(done):
    again = document("submit", "toy.yaml", *INLINE)
    assert done["hits"] == 0 and again["hits"] == again["members"] == 7
    assert again["artifacts"] == done["artifacts"]
    assert "7 of 7 members are hits" in call("submit", "toy.yaml", *INLINE).stderr


def test_submit_shows_the_reports_table(folder, monkeypatch):
    from orchestrator import result

    call("submit", "toy.yaml", *INLINE)
    monkeypatch.setattr(result, "TABLES", ("table.json",))  # toy reports have no table.txt; any file will do
    monkeypatch.setattr(result, "PAGE", "value.json")
    text = call("submit", "toy.yaml", *INLINE).stdout
    assert '{"seed=0":' in text
    assert "/value.json\n" in text


def test_seeds_and_overrides_change_the_pipeline(folder):
    made = document("submit", "toy.yaml", *INLINE, "--quiet", "--seeds", "5", "--set", "stages.numbers.config.count=1")
    assert set(made["artifacts"]) == {"numbers/seed=5", "slow/seed=5", "report"}


def test_a_timeout_that_nobody_keeps_is_told(folder):
    timed = call("submit", "toy.yaml", *INLINE, "--quiet", "--set", "stages.slow.timeout_s=60").stderr
    assert "warning: timeout_s of slow has no effect inline" in timed
    assert "timeout_s" not in call("submit", "toy.yaml", *INLINE, "--quiet").stderr


def test_dry_run_is_the_plan_and_makes_nothing(folder):
    assert document("submit", "toy.yaml", *INLINE, "--dry-run")["counts"] == {"hit": 0, "miss": 4, "blocked": 3}
    assert document("runs") == {"runs": []}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--on", "inline"), "--on inline and --cluster there.yaml are given"),
        (("--dry-run",), "--dry-run plans for this machine"),
        (("--store", "here"), "--store here is a folder"),
        (("--detach",), "There is no file there.yaml"),
    ],
)
def test_options_that_a_cluster_would_not_see_are_refused(folder, options, words):
    code = 4 if "no file" in words else 2
    assert words in call("submit", "toy.yaml", "--cluster", "there.yaml", *options, code=code).stderr


def test_what_belongs_to_a_cluster_is_refused_without_one(folder):
    assert "are for --cluster" in call("submit", "toy.yaml", "--dry-run", "--detach", code=2).stderr


def test_doctor_asks_a_cluster_about_the_store_that_is_named(folder, monkeypatch):
    from orchestrator import cluster_jobs

    asked = []

    class Jobs:
        def __init__(self, address):
            pass

        def run_command(self, name, words):
            asked.append(words)
            raise NotFoundError("enough")

    monkeypatch.setattr(cluster_jobs, "Jobs", Jobs)
    options = ("--store", "s3://bucket/moepipe", "--data", "/data")
    call("doctor", "--cluster", "http://127.0.0.1:1", *options, code=4)
    assert asked == [["doctor", "--cluster", "auto", "--json", *options]]
    assert "--store here is a folder" in call("doctor", "--cluster", "http://x:1", "--store", "here", code=2).stderr


def test_quiet_travels_to_the_cluster(folder):
    from orchestrator.cli_cluster import Submission
    from orchestrator.loading import load

    loaded = load(folder / "toy.yaml")
    given = Submission(loaded.spec, loaded.graph, None, {}, "./.moepipe", None, True, False, quiet=True)
    assert given.document("x")["quiet"] is True


def test_plan_tells_hits_misses_and_reasons(done):
    plan = document("plan", "toy.yaml", *INLINE, "--set", "stages.slow.config.steps=5")
    by_node = {entry["node"]: entry for entry in plan["entries"]}
    assert plan["counts"] == {"hit": 4, "miss": 2, "blocked": 1}
    assert by_node["slow/seed=0"]["reason"] == "config.steps changed from 4 to 5"
    text = call("plan", "toy.yaml", *INLINE, "--set", "stages.slow.config.steps=5").stdout
    assert "config.steps changed from 4 to 5" in text and "4 hits, 3 to run" in text and "longest chain" in text


def test_infeasible_plan_is_3(folder):
    result = call("plan", "toy.yaml", "--set", "stages.slow.resources.cpus=9000", code=3)
    assert "asks for 9000 cpus" in result.stderr


def test_validate_reports_every_error_with_its_place(folder):
    (folder / "bad.yaml").write_text(PIPELINE.replace("steps", "stepz").replace("kind: gather", "kind: gahter"))
    result = call("validate", "bad.yaml", code=2)
    assert "bad.yaml:12:" in result.stderr and "'steps'" in result.stderr
    assert "bad.yaml:14:" in result.stderr and "'gather'" in result.stderr
    error = document("validate", "bad.yaml", code=2)["error"]
    assert {problem["line"] for problem in error["problems"]} == {12, 14} and error["code"] == "spec"


def test_validate_counts_members(folder):
    found = document("validate", "toy.yaml")
    assert found["valid"] and found["stages"] == {"numbers": 4, "slow": 2, "report": 1}


def test_profile_from_the_environment(folder, monkeypatch):
    (folder / "toy.yaml").write_text(PIPELINE + "profiles:\n  small:\n    seeds: [7]\n")
    monkeypatch.setenv("MOEPIPE_PROFILE", "small")
    assert document("validate", "toy.yaml")["members"] == 4
    assert "there is no profile 'smal'" in call("validate", "toy.yaml", "--profile", "smal", code=2).stderr


# ---- failures --------------------------------------------------------------------------------------------------------


def test_missing_weights_are_told_before_anything_starts(folder):
    register()
    (folder / "p.yaml").write_text(
        """apiVersion: moepipe/v1
name: early
stages:
  data: {kind: prepare, config: {dataset: toy, options: {size: 8}}}
  erm:
    kind: train
    inputs: {data: "${stages.data}"}
    config: {backbone: {name: tiny_cnn, pretrained: none.pth}, training: {batch_size: 8, steps: 1, lr: 0.1}}
"""
    )
    told = call("submit", "p.yaml", *INLINE, code=4)
    assert "Nothing was started. There is no weights file none.pth." in told.stderr
    (run,) = RunStore(Store.open(".moepipe")).list()
    assert run.status == "failed" and run.artifacts() == {}
    assert not any(event.kind == "member-started" for event in run.events())


def test_failed_run_is_1_and_says_where_to_look(folder):
    result = call("submit", "toy.yaml", *INLINE, "--set", "stages.numbers.config.fail_times=1", code=1)
    assert "error [run-failed]" in result.stderr and "moepipe logs toy-" in result.stderr
    assert "4 of 7 members" in result.stderr and "3 skipped" in result.stderr
    text = call("logs", "latest", "numbers/seed=0/item=1").stdout
    assert "RuntimeError: item 1 fails on purpose" in text


def test_resume_of_a_failed_run_finishes_it(folder):
    call("submit", "toy.yaml", *INLINE, "--set", "stages.slow.config.crash_at=2", code=1)
    failed = document("runs")["runs"][0]
    assert failed["status"] == "failed"
    resumed = document("resume", failed["run"], *INLINE)
    assert resumed["status"] == "finished" and resumed["hits"] == 4
    assert document("show", resumed["run"])["origin"] == failed["run"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("submit",), 2),
        (("submit", "toy.yaml", "--bogus"), 2),
        (("submit", "toy.yaml", "--set", "nonsense"), 2),
        (("explain", "stages.nope"), 2),
        (("ls", "nope"), 2),
        (("logs", "latest", "--grep", "("), 4),
        (("submit", "nope.yaml"), 4),
        (("show", "nope"), 4),
        (("resume", "nope"), 4),
        (("data", "verify", "nope"), 2),
        (("data", "verify", "camelyon17"), 4),
        (("init", "nope"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_exit_codes(arguments, code):
    call(*arguments, code=code)


def test_truncated_archive_is_6_and_leaves_nothing(folder):
    source = folder / "camelyon17_v1.0"
    source.mkdir()
    (source / "metadata.csv").write_text("a,b\n" * 10_000)
    with tarfile.open(folder / "whole.tar.gz", "w:gz") as archive:
        archive.add(source, "camelyon17_v1.0")
    (folder / "half.tar.gz").write_bytes((folder / "whole.tar.gz").read_bytes()[:60])
    call("data", "import", "camelyon17", "half.tar.gz", "--data", "sets", code=6)
    assert not any((folder / "sets").iterdir())


def test_run_of_another_process_is_busy(folder, done):
    run = RunStore(Store.open(".moepipe")).create(RunStore(Store.open(".moepipe")).open(done["run"]).spec())
    with run.lock():
        result = call("resume", run.id, *INLINE, code=7)
        assert "being worked on by process" in result.stderr
        assert document("resume", run.id, *INLINE, code=7)["error"]["code"] == "busy"
        assert "is running in this store" in call("gc", "--keep-last", "0", code=7).stderr
    assert document("status", run.id)["status"] == "lost"
    assert document("resume", run.id, *INLINE)["run"] == run.id  # a lost run goes on under its own name


def test_a_bug_is_one_line_and_a_crash_log(folder, monkeypatch):
    from orchestrator import doctor

    def broken():
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(doctor, "versions", broken)
    result = call("version", code=1)
    assert "error [internal]: ZeroDivisionError: nobody foresaw this" in result.stderr
    log = Path(result.stderr.split("details: ")[1].strip())
    assert "in broken" in log.read_text()
    log.unlink()


def test_cancel_of_a_run_that_is_over_is_refused(done):
    assert "is not running: it is finished" in call("cancel", done["run"], code=2).stderr
