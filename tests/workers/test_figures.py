"""Figures, tables and the page, from made-up results (what they show is given, not computed)."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moe.errors import CheckpointError, DataError, NotFoundError
from workers import figures
from workers.evaluation_result import Attention, Bounds, Curve, EvaluationResult, MethodResult, StreamResult
from workers.report_page import Figure, ReportPage, render
from workers.results_table import combine

DOMAINS = ["mnist", "font <b>Gothic</b>", "camera 17"]


def method(name, label, domains, reference="", gain=0.0):
    mean = float(np.mean(domains))
    around = Bounds(mean, mean - 0.02, mean + 0.02)
    return MethodResult(
        name,
        label,
        {"accuracy": mean, "macro_f1": mean - 0.1},
        list(domains),
        mean,
        min(domains),
        {"accuracy": around, "domain_mean": around, "domain_worst": around},
        reference,
        {"accuracy": Bounds(gain, gain - 0.01, gain + 0.01)} if reference else {},
        [(0.5, 0.25)] * len(domains) if reference else [],
    )


def result(seed=0, domains=DOMAINS, task="multiclass"):
    shift = 0.01 * seed
    before = np.linspace(0.3, 0.8, len(domains)) + shift
    after = before + np.linspace(-0.05, 0.1, len(domains))
    return EvaluationResult(
        dataset="digits5",
        title="Five digit sources",
        task=task,
        metric="accuracy",
        protocol="split",
        split="test",
        seed=seed,
        support_size=64,
        domains=list(domains),
        counts=[10] * len(domains),
        support_counts=[64] * len(domains),
        methods=[
            method("erm", "ERM", before + 0.05),
            method("student", "student", before),
            method("student_distill", "student + distillation", after, "student", float(np.mean(after - before))),
        ],
        attention=Attention(["0", "1"], list(domains), [[0.25, 0.75]] * len(domains)),
        curves=[
            Curve(
                "student_distill", "student + distillation", [0, 1, 64], [0.5, 0.52, 0.55 + shift], [0.5] * 3, [0.3] * 3
            )
        ],
        streams=[StreamResult("mixed_domains", "student_distill", "student + distillation", 0.5 + shift, 0.5, 0.3)],
        settings={"backbone": "tiny_cnn"},
        rows=np.arange(30),
        logits={"erm": np.ones((30, 2), dtype=np.float32)},
    )


RESULTS = [result(seed) for seed in range(3)]


def size(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn
    return image.size


DRAWINGS = {
    "bars": lambda: figures.domain_bars(RESULTS, "student", "student_distill"),
    "methods": lambda: figures.method_bars(RESULTS),
    "attention": lambda: figures.attention_map(RESULTS[:1]),
    "curve": lambda: figures.adaptation_curve(RESULTS),
    "training": lambda: figures.training_curves(
        {"expert 0": [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}]}, "loss", "Loss"
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_png_bytes_repeat_and_carry_no_date_or_version(name):
    png = DRAWINGS[name]()
    assert png == DRAWINGS[name]() and png.startswith(b"\x89PNG")
    assert not {b"tEXt", b"iTXt", b"tIME"} & set(re.findall(rb"tEXt|iTXt|tIME", png))
    width, height = size(png)
    assert width > 500 and height > 200


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    DRAWINGS["bars"]()
    assert dict(mpl.rcParams) == before


def test_more_domains_make_taller_bars_up_to_a_limit():
    heights = [
        size(figures.domain_bars([result(domains=[f"d{i}" for i in range(n)])], "student", "student_distill"))[1]
        for n in (1, 20, 60, 90)
    ]
    assert heights[0] < heights[1] < heights[2]
    assert heights[3] == pytest.approx(heights[2], rel=0.03)


def test_regression_and_single_seed_are_drawn():
    assert size(figures.domain_bars([result(task="regression")], "student", "student_distill"))
    assert size(figures.adaptation_curve([result()]))


def test_figures_refuse_what_they_cannot_draw():
    with pytest.raises(DataError):
        figures.domain_bars([result(), result(domains=["other"])], "student", "student_distill")
    with pytest.raises(NotFoundError, match="student_tent"):
        figures.domain_bars([result()], "student", "student_tent")
    with pytest.raises(DataError):
        figures.method_bars([])
    with pytest.raises(DataError):
        figures.attention_map([replace(result(), attention=None)])
    with pytest.raises(DataError):
        figures.adaptation_curve([replace(result(), curves=[])])
    with pytest.raises(DataError):
        figures.training_curves({"a": [{"step": 0}]}, "loss", "")


def test_table_averages_over_seeds():
    table = combine(RESULTS)
    cell = table.cell("student", "accuracy")
    assert cell.mean == pytest.approx(0.56) and cell.std == pytest.approx(0.01) and cell.seeds == 3
    assert table.cell("student_distill", "gain").mean == pytest.approx(0.025)
    assert table.cell("student_distill", "gain").std == pytest.approx(0, abs=1e-12)
    assert table.cell("erm", "gain") is None
    text = table.text()
    assert "56.0 ± 1.0" in text and "+2.5 ± 0.0" in text and "Seeds 0, 1, 2" in text
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    json.dumps(table.to_json())


def test_losses_are_printed_with_their_sign():
    worse = replace(RESULTS[0], methods=[method("a", "A", [0.5]), method("b", "B", [0.4], "a", -0.1)])
    assert "-10.0" in combine([worse]).text()


def test_single_seed_has_no_spread():
    assert "±" not in combine([result()]).text().split("Seeds")[0]
    assert combine([result()]).cell("student", "accuracy").std is None


def test_only_like_results_are_combined():
    with pytest.raises(DataError):
        combine([result(), replace(result(), protocol="official")])
    with pytest.raises(DataError):
        combine([])


def test_a_method_that_some_seeds_lack_counts_its_own_seeds():
    short = replace(result(1), methods=result(1).methods[:2])
    assert combine([result(0), short]).cell("student_distill", "accuracy").seeds == 1


def test_result_survives_the_disk(tmp_path):
    one = result()
    one.save(tmp_path / "a")
    result().save(tmp_path / "b")
    back = EvaluationResult.load(tmp_path / "a")
    assert back.to_json() == one.to_json() and back.methods == one.methods and back.attention == one.attention
    assert np.array_equal(back.logits["erm"], one.logits["erm"]) and np.array_equal(back.rows, one.rows)
    for name in ("evaluation.json", "logits.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(NotFoundError):
        EvaluationResult.load(tmp_path)
    (tmp_path / "a" / "evaluation.json").write_text('{"format": 0}')
    with pytest.raises(CheckpointError, match="format"):
        EvaluationResult.load(tmp_path / "a")
    (tmp_path / "b" / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        EvaluationResult.load(tmp_path / "b")


def page(**more):
    values = {
        "title": "Meta-DMoE on digits5",
        "summary": "A & B",
        "table": combine(RESULTS),
        "results": RESULTS,
        "figures": [Figure("By domain", "Gains at the right.", DRAWINGS["bars"]())],
        "settings": {"step_budgets": {"experts": 200}, "seeds": [0, 1]},
        "command": "moepipe submit demo.yaml",
        "spec": {"name": "x</pre><script>"},
    }
    return ReportPage(**{**values, **more})


def test_page_is_one_file_without_scripts_or_links():
    html = render(page())
    assert html == render(page())
    assert not re.search(r"<script|<link|src=\"(?!data:)|https?://|url\(", html)
    assert "font &lt;b&gt;Gothic&lt;/b&gt;" in html and "A &amp; B" in html
    for text in ("+2.5", "experts 200", "moepipe submit demo.yaml", "mixed domains", "Seed 2", "prefers-color-scheme"):
        assert text in html
    assert html.count("data:image/png;base64,") == 1


def test_rows_of_several_networks_say_whose_they_are():
    other = [replace(r, methods=[replace(r.methods[0], name="gmoe", label="GMoE")]) for r in RESULTS]
    html = render(page(results=[*RESULTS, *other]))
    assert "ERM, seed 2: scores" in html and "GMoE, seed 0: scores" in html and "Seed 2" not in html
    taller = size(figures.method_bars([*RESULTS, *other]))[1]
    assert taller > size(DRAWINGS["methods"]())[1]


def test_page_without_optional_parts():
    bare = [replace(r, streams=[], curves=[]) for r in RESULTS[:1]]
    html = render(page(results=bare, figures=(), settings={}, command="", spec={}))
    assert "Online adaptation" not in html and "How it was made" not in html and "Do it again" not in html
    with pytest.raises(DataError):
        render(page(results=[]))
