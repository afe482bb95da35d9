"""What the pipeline's MLflow run says at its end, the saved views, the samples of the process, the model package."""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections import deque

import numpy as np
import pytest

from orchestrator.compare_read import choose
from orchestrator.model_package import Predictor, write_package
from orchestrator.reporting import TaskReporter
from orchestrator.system_metrics import VARIABLE, SystemMetrics
from orchestrator.tracking_state import MAX_METRIC_KEYS
from orchestrator.tracking_summary import description, summarise
from orchestrator.ui_views import encode, view_link, view_state
from tests.orchestrator.compare_store import Runs

GOOD = {"erm": (60, 50), "student": (70, 40), "student_distill": (80, 70)}


def test_a_run_is_summarised_under_stable_names(store):
    Runs(store).run(GOOD, cost={"parameters": 10, "flops": 100.0})
    (run,) = choose(store, (), None, None)
    found = summarise(run, store)
    assert found.metrics["test/avg/student_distill"] == pytest.approx(0.75)
    assert found.metrics["test/worst_domain/student"] == pytest.approx(0.4)
    assert found.metrics["test/left/erm"] == pytest.approx(0.6)
    assert found.metrics["test/gain/student"] == pytest.approx(0.0)
    assert found.metrics["cost/flops/student"] == 100.0 and "cost/flops/student_distill" not in found.metrics
    assert found.tags == {"moepipe.selection": "validation", "moepipe.held_out": "left,right"}
    text = description(found, run.id, "abc", ["report/report.html"], "What it is.")
    assert text.startswith("What it is.") and "| student + distill | 75.0 ± 0.0 |" in text
    assert "get-artifact?path=report/report.html&run_uuid=abc" in text and f"moepipe compare {run.id}" in text


def test_names_are_capped_and_the_telling_ones_stay(store):
    Runs(store).run({f"m{number}": (number, 50) for number in range(40)})
    (run,) = choose(store, (), None, None)
    found = summarise(run, store)
    assert len(found.metrics) == MAX_METRIC_KEYS and {f"test/avg/m{number}" for number in range(40)} <= set(
        found.metrics
    )
    assert len(description(found, run.id, "abc", [], "")) < 5000


def test_a_run_without_results_has_no_summary(store):
    Runs(store).run(None)
    (run,) = choose(store, (), None, None)
    assert summarise(run, store).metrics == {} and description(summarise(run, store), "r", "m", [], "").strip()


def test_a_view_shows_what_differs():
    runs = [
        ({"test/avg/erm": 0.5, "test/avg/b": 0.1 * n, "cost/device_hours/b": 1.0}, {"lr": str(n), "same": "1"})
        for n in (1, 2)
    ]
    state = view_state(runs)
    assert state["selectedColumns"][:3] == ["params.`lr`", "metrics.`test/avg/b`", "metrics.`test/avg/erm`"]
    charts = {chart["type"]: chart for chart in state["compareRunCharts"]}
    assert charts["PARALLEL"]["selectedParams"] == ["lr"]
    assert charts["SCATTER"]["xaxis"]["key"] == "cost/device_hours/b"
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} <= sections
    key, text = encode(state)
    assert json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;")))) == json.loads(json.dumps(state))
    assert key == encode(view_state(runs))[0] and len(key) == 32
    assert view_link("http://h", "3", key, charts=True).startswith(
        f"http://h/#/experiments/3/runs?viewStateShareKey={key}"
    )


def test_samples_travel_with_the_reporter(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    sent = []
    reporter = TaskReporter("a/seed=0", sent.append, tmp_path / "stop", tmp_path / "log")
    with SystemMetrics(reporter.samples, interval=0.01):
        deadline = time.monotonic() + 60
        while len(reporter.samples) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sent == []  # the thread itself says nothing
    reporter.flush()
    first, second, *_ = [signal.data for signal in sent]
    assert (first["step"], second["step"]) == (0, 1) and first["values"]["system/process_memory_megabytes"] > 10
    assert not reporter.samples


def test_sampling_can_be_turned_off(monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    samples: deque = deque()
    with SystemMetrics(samples, interval=0.001):
        time.sleep(0.02)
    assert not samples


def test_a_model_package_is_rebuilt_from_its_own_files(tmp_path):
    import torch

    from moe.backbones import build_student
    from moe.specs import BackboneSpec
    from workers.modelfile import MODEL_FILE, model_meta, save_tensors

    spec = BackboneSpec(name="tiny_cnn")
    student = build_student(spec, 10).eval()
    artifact = tmp_path / "artifact"
    save_tensors(artifact / MODEL_FILE, student.state_dict())
    meta = model_meta("student", spec, 10, student.feature_dim, "digits5")
    folder = tmp_path / "package"
    folder.mkdir()
    package = write_package(artifact, meta, "d" * 64, 1000, folder)
    assert package is not None and package.inputs == (-1, 3, 32, 32) and package.outputs == (-1, 10)
    example = np.array(json.loads((folder / "input_example.json").read_text())["inputs"], dtype=np.float32)
    with torch.inference_mode():
        expected = student(torch.from_numpy(example)).numpy()
    np.testing.assert_array_equal(Predictor(folder / "data").predict(example), expected)
    assert any(line.startswith("torch==") for line in (folder / "requirements.txt").read_text().splitlines())
    other = tmp_path / "other"
    other.mkdir()
    assert write_package(artifact, {"form": "circuit"}, "d" * 64, 1000, other) is None
    assert write_package(artifact, meta, "d" * 64, 10**12, other) is None
