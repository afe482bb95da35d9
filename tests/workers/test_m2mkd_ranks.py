"""m2mKD's end-to-end phase over ranks and engines: the numbers of one process, exact resume, state that moves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moe.algorithms.m2mkd import Augmentation, Phase
from moe.errors import Interrupted, SpecError
from orchestrator.stages.m2mkd_train import M2mkdTrainConfig
from tests.support.ranks import pair_environments, run_together
from tests.workers.test_loop import Recorder
from tests.workers.test_m2mkd_pipeline import METHOD, PHASE, config, photos
from workers.data import load_data, write_index
from workers.m2mkd_images import TrainImages, mirrored_share
from workers.m2mkd_job import RECORD, train_rank
from workers.m2mkd_run import RunSettings, make_engine
from workers.m2mkd_settings import phase_method
from workers.modelfile import MODEL_FILE, load_tensors

E2E = {**PHASE, "epochs": 2, "clip": 1.0}
VMOE = {**METHOD["vmoe"], "num_experts": 4}


def job(folder: Path, name: str, e2e: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Config of a rank: a V-MoE from random weights on the toy set."""
    own = config(vmoe=VMOE, e2e={**E2E, **(e2e or {})})
    run = RunSettings(checkpoint_every=3, **settings)
    data = {"member": "data", "digest": "d", "path": str(folder), "meta": _data(folder)}
    for part in ("out", "scratch"):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
    return {
        "method": own.model_dump(mode="json"),
        "phase": "e2e",
        "position": None,
        "settings": asdict(run),
        "take": [],
        "label": name,
        "run": "r",
        "member": "seed=0/m",
        "seed": 7,
        "threads": 1,
        "inputs": {"data": [data]},
        "output": str(folder / name / "out"),
        "scratch": str(folder / name / "scratch"),
        "data_root": str(folder),
    }


def _data(folder: Path) -> dict[str, Any]:
    return write_index(load_data("toy", {}, folder), {}, folder)


def alone(folder: Path, name: str, **settings: Any) -> list[float]:
    reporter = Recorder()
    train_rank({**job(folder, name, **settings), "reporter": reporter})
    return reporter.losses()


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_tensors(folder / name / "out" / MODEL_FILE)


def close(folder: Path, one: str, other: str, tolerance: float = 1e-3) -> None:
    first, second = state(folder, one), state(folder, other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if "qkv.bias" not in name:  # a key's bias has no gradient but rounding, which Adam blows up
            assert float((value - second[name]).abs().max()) < tolerance, name


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_give_the_numbers_of_one_under_either_engine(tmp_path):
    jobs = [
        job(tmp_path, "torch"),
        job(tmp_path, "torch accumulated", e2e={"accumulate": 2}),
        job(tmp_path, "zero", engine="deepspeed", zero_stage=2),
        job(tmp_path, "experts", e2e={"clip": None}, engine="deepspeed", ep_size=2),
        {**job(tmp_path, "cut"), "stop_after": 2},
        job(tmp_path, "cut"),
        {**job(tmp_path, "moved", engine="deepspeed"), "stop_after": 2},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_together("tests.workers.m2mkd_pair", tmp_path / "jobs.json", pair_environments(), timeout=240)
    pair = json.loads((tmp_path / "pair.json").read_text())
    losses = alone(tmp_path, "one")
    for number, name in enumerate(("torch", "torch accumulated", "zero")):
        assert pair[number]["losses"] == pytest.approx(losses, rel=1e-4), name
        close(tmp_path, "one", name)
    assert pair[3]["losses"] == pytest.approx(alone(tmp_path, "free", e2e={"clip": None}), rel=1e-4)
    close(tmp_path, "free", "experts")
    # A group that was stopped goes on bit-equal; one process takes over from two DeepSpeed ranks.
    assert pair[4] == {"interrupted": True} and any("Resumed at step 6 of 12" in line for line in pair[5]["logs"])
    assert (tmp_path / "cut/out" / MODEL_FILE).read_bytes() == (tmp_path / "torch/out" / MODEL_FILE).read_bytes()
    assert pair[6] == {"interrupted": True}
    alone(tmp_path, "moved")
    close(tmp_path, "one", "moved")
    records = [json.loads((tmp_path / name / "scratch" / RECORD).read_text()) for name in ("one", "torch", "zero")]
    for record in records[1:]:
        assert record["scores"]["accuracy"] == pytest.approx(records[0]["scores"]["accuracy"], abs=0.05)
        assert {**record, "label": "", "scores": 0, "history": 0} == {
            **records[0], "label": "", "scores": 0, "history": 0
        }  # fmt: skip


def test_a_stopped_job_of_one_process_ends_with_the_same_bytes(tmp_path):
    whole = job(tmp_path, "whole", e2e={"drop_path": 0.2})
    train_rank({**whole, "reporter": Recorder()})
    cut = job(tmp_path, "cut", e2e={"drop_path": 0.2})
    with pytest.raises(Interrupted):
        train_rank({**cut, "reporter": Recorder(stop_after=1)})
    train_rank({**cut, "reporter": Recorder()})
    assert (tmp_path / "cut/out" / MODEL_FILE).read_bytes() == (tmp_path / "whole/out" / MODEL_FILE).read_bytes()


@pytest.mark.parametrize(("count", "world_size"), [(16, 2), (7, 2), (5, 3), (1, 2), (9, 4)])
def test_the_ranks_share_a_piece_and_keep_mirror_images_together(count, world_size):
    shares = [mirrored_share(count, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    assert all(set(share) == {count - 1 - place for place in share} for share in shares)


def test_mixed_and_augmented_images_are_those_of_one_process():
    augment, rows = Augmentation(image_size=16), np.arange(96)
    phase = Phase(**{**PHASE, "accumulate": 2})
    (one, other) = (TrainImages(photos(), rows, 16, phase, augment, 3, 0, rank, 2) for rank in (0, 1))
    for whole, *parts in zip(TrainImages(photos(), rows, 16, phase, augment, 3, 0)(4), one(4), other(4), strict=True):
        assert sum(part.weight for part in parts) == pytest.approx(whole.weight)
        for rank, part in enumerate(parts):
            places = mirrored_share(8, rank, 2)
            for mine, all_of_them in zip(part.batch, whole.batch, strict=True):
                torch.testing.assert_close(mine, all_of_them[places])


def test_experts_over_ranks_need_deepspeed():
    with pytest.raises(ValidationError, match="ep_size=2 needs engine: deepspeed"):
        M2mkdTrainConfig(method=METHOD, phase="e2e", ep_size=2)
    with pytest.raises(ValidationError, match="ep_size=2 does not divide 3 experts"):
        M2mkdTrainConfig(method=METHOD, phase="e2e", ep_size=2, engine="deepspeed")
    method = phase_method(config(), "e2e", 0, None, 3)
    with pytest.raises(SpecError, match="keeps all experts on every rank"):
        make_engine(method, method.build(3), RunSettings(ep_size=2), torch.device("cpu"))
