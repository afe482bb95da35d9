"""The distillation job: learns, resumes, gives the same on one rank and on two, and leaves plain files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.adaptation.distill import Config, Method
from moe.errors import CheckpointError, DataError, Interrupted, NotFoundError, SpecError
from moe.specs import StudentMoESpec
from tests.support.ranks import pair_environments, run_together
from tests.workers.test_loop import Recorder
from tests.workers.toy import distill_job, toy_data
from workers.batches import ImageReader
from workers.distill_job import RESULT_FILE, DistillJob, _check_tasks, build_module, distill, distilled_meta
from workers.distill_settings import DistillSettings
from workers.distill_validation import Validation
from workers.engines import deepspeed as parallel
from workers.features import FeatureTable
from workers.modelfile import load_aggregator, load_student, load_tensors
from workers.protocols import domain_rows
from workers.transforms import Transform, TransformSpec, transform_for

MOE = {"num_experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distill")


def go(config, reporter=None) -> Recorder:
    reporter = reporter or Recorder()
    distill({**config, "reporter": reporter})
    return reporter


def files(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}


def close(folder: Path, a: str, b: str, tolerance: float) -> None:
    """Equal but for the order of additions (which Adam amplifies where a gradient is zero by identity)."""
    for file in ("model.safetensors", "aggregator.safetensors"):
        first, second = load_tensors(folder / a / file), load_tensors(folder / b / file)
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert float((value.double() - second[name].double()).abs().max()) < tolerance, name


def test_it_learns_and_its_files_load_without_the_job(folder):
    config = distill_job(folder, "learn", steps=40, query=16, cadence="steps", evaluate_every=10)
    reporter = go(config)
    losses = reporter.losses()
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    meta = distilled_meta(DistillJob(**config))
    record = json.loads((folder / "learn" / RESULT_FILE).read_text())
    assert meta["scores"] == record["scores"] and len(record["evaluations"]) == 4
    assert record["scores"]["accuracy"] == max(e["accuracy"] for e in record["evaluations"])
    assert meta["form"] == "student" and meta["adaptation"]["inner_lr"] == 0.05
    data = toy_data(size=12)
    # The score written is that of the written files under the project's own adaptation.
    assert record["scores"]["accuracy"] == pytest.approx(accuracy(config, transform_for(data.info, None, train=False)))


def accuracy(config, transform) -> float:
    """Of the written student, adapted by the project's own method, on the validation domain."""
    job, data = DistillJob(**config), toy_data(size=12)
    meta = distilled_meta(job)
    student, aggregator = load_student(Path(job.output), meta), load_aggregator(Path(job.output), meta)
    table = FeatureTable([Path(path) for path in job.features])
    reader = ImageReader(data.images, transform)
    (domain,) = domain_rows(data, "val", "official", 8)
    result = Method(Config(inner_lr=0.05)).adapt(
        student, reader.read(domain.adapt), table.tokens(domain.adapt), aggregator
    )
    with torch.no_grad():
        predictions = result.model(reader.read(domain.score)).argmax(1).numpy()
    return float(np.mean(predictions == data.labels[domain.score]))


def test_a_student_is_distilled_behind_the_preprocessing_of_its_record(folder):
    config = distill_job(folder, "behind", steps=6, cadence="steps", evaluate_every=6)
    own = Transform(TransformSpec(normalisation="instance"))
    config["student"]["meta"]["transform"] = own.spec.model_dump(mode="json")
    go(config)
    found = json.loads((folder / "behind" / RESULT_FILE).read_text())["scores"]["accuracy"]
    assert found == pytest.approx(accuracy(config, own))
    assert found != pytest.approx(accuracy(config, transform_for(toy_data(size=12).info, None, train=False)))


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_job_gives_the_same_bytes(folder, stop):
    extras = {"moe": MOE, "ema_decay": 0.8, "meta": {"inner_lr": 0.05, "learn_rates": True}}
    go(distill_job(folder, "whole", **extras))
    config = distill_job(folder, f"cut{stop}", **extras)
    with pytest.raises(Interrupted):
        go(config, Recorder(stop_after=stop))
    reporter = go(config)
    assert any(f"Resumed at step {2 * stop}" in line for line in reporter.logs)
    assert files(folder, f"cut{stop}") == files(folder, "whole")
    assert "rates" in json.loads((folder / "whole" / RESULT_FILE).read_text())


@pytest.mark.timeout(900)
def test_two_ranks_give_the_numbers_of_one_and_state_moves_between_engines(folder):
    jobs = [
        distill_job(folder, "torch2", tasks_per_step=3),
        distill_job(folder, "parallel2", engine="deepspeed", ep_size=2, moe=MOE),
        {**distill_job(folder, "handover", engine="deepspeed", ep_size=2, zero_stage=2, moe=MOE), "stop_after": 1},
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_together("tests.workers.distill_pair", folder / "jobs.json", pair_environments(), timeout=800)
    pair = json.loads((folder / "pair.json").read_text())
    alone = go(distill_job(folder, "torch1", tasks_per_step=3))
    assert pair[0]["losses"] == pytest.approx(alone.losses(), rel=1e-5)
    close(folder, "torch1", "torch2", 1e-3)
    alone = go(distill_job(folder, "dense1", moe=MOE))
    assert pair[1]["losses"] == pytest.approx(alone.losses(), rel=1e-5)
    close(folder, "dense1", "parallel2", 1e-3)
    # Two DeepSpeed ranks stopped at step 2; plain torch finishes alone.
    assert pair[2] == "interrupted"
    reporter = go(distill_job(folder, "handover", engine="torch", moe=MOE))
    assert any("Resumed at step 2" in line for line in reporter.logs)
    close(folder, "dense1", "handover", 1e-3)


def test_validation_does_not_depend_on_the_division_over_ranks(folder, monkeypatch):
    config = DistillJob(**distill_job(folder, "division"))
    data = toy_data(size=12)
    module = build_module(config, data)
    table = FeatureTable([Path(path) for path in config.features])
    reader = ImageReader(data.images, transform_for(data.info, None, train=False))
    domains = domain_rows(data, "train", "official", 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    whole = Validation(data, domains, reader, table, 7, torch.device("cpu"))(module, 0)
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: parts.append(tensor.clone()))
    for rank in (0, 1):
        Validation(data, domains, reader, table, 7, torch.device("cpu"), rank, 2)(module, 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(parts[0] + parts[1]))
    assert Validation(data, domains, reader, table, 7, torch.device("cpu"), 0, 2)(module, 0) == whole
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_does_not_fit_together_is_refused(folder):
    config = distill_job(folder, "bad")
    with pytest.raises(CheckpointError, match="1 training domains have no expert"):
        go({**config, "groups": [[0, 1], [2], []]})
    with pytest.raises(CheckpointError, match="owners reach to 3 of 3 experts"):
        go({**config, "groups": [[0, 1], [2], [], [3]]})
    with pytest.raises(NotFoundError, match="no finished features"):
        go({**config, "features": [str(folder)]})
    with pytest.raises(DataError, match="cached features do not hold"):
        go({**config, "settings": {**config["settings"], "validate_on": "test"}})
    with pytest.raises(SpecError, match="torch engine keeps all experts"):
        go(distill_job(folder, "bad", ep_size=2))
    student = config["student"]
    with pytest.raises(SpecError, match="already"):
        own = {**student, "meta": {**student["meta"], "moe": StudentMoESpec(num_experts=2).model_dump(mode="json")}}
        go({**distill_job(folder, "bad", moe=MOE), "student": own})
    with pytest.raises(SpecError, match="says no backbone"):
        go({**config, "student": {**student, "meta": {"form": "circuit"}}})
    with pytest.raises(ValueError, match="epochs or steps"):
        DistillSettings(**{**config["settings"], "steps": None})
    with pytest.raises(ValueError, match="patience=3 has no effect without validate_on"):
        DistillSettings(**{**config["settings"], "validate_on": None, "patience": 3})
    with pytest.raises(ValueError, match=r"rates_lr=0\.1 has no effect"):
        DistillSettings(**{**config["settings"], "rates_lr": 0.1})
    with pytest.raises(ValueError, match=r"capacity_factor=2\.0 has no effect"):
        DistillSettings(**{**config["settings"], "moe": {"num_experts": 2, "capacity_factor": 2.0}})
    with pytest.raises(ValueError, match="not a multiple of ep_size"):
        DistillSettings(**{**config["settings"], "moe": {"num_experts": 3}, "ep_size": 2})


def test_stored_gradients_need_equal_work_on_all_ranks_that_share_experts(folder):
    job = distill_job(folder, "bad", ep_size=2, moe=MOE, meta={"inner_lr": 0.05, "order": "exact_aggregator"})
    settings = DistillSettings(**{**job["settings"], "tasks_per_step": 3})
    with pytest.raises(SpecError, match="3 tasks per step for 2 ranks"):
        _check_tasks(settings, 2)
    _check_tasks(settings, 3)
    _check_tasks(DistillSettings(**job["settings"]), 2)


def test_auto_says_so_when_deepspeed_is_missing(folder, monkeypatch):
    monkeypatch.setattr(parallel, "available", lambda: "ImportError: none")
    reporter = go(distill_job(folder, "auto", engine="auto", steps=1))
    assert "DeepSpeed is not available (ImportError: none); the torch engine is used instead." in reporter.logs


def test_bf16_and_channels_last_train(folder):
    meta = {"inner_lr": 0.05, "precision": "bf16"}
    reporter = go(distill_job(folder, "bf16", meta=meta, channels_last=True))
    assert len(reporter.losses()) == 6 and all(np.isfinite(reporter.losses()))
