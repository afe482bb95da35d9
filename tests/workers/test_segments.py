"""A run in segments is the run in one piece; a segment goes on with all of the state that it is given."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.errors import CheckpointError, Interrupted, SpecError
from moe.specs import BackboneSpec
from tests.support.ranks import pair_environments, run_together
from tests.workers.test_algorithm_training import DATA, SPARSE, context
from tests.workers.test_algorithm_training import SETTINGS as SHORT
from tests.workers.test_loop import Recorder
from tests.workers.test_train_model import SETTINGS, changed, train
from tests.workers.toy import distill_job
from workers.context import Input
from workers.distill_job import DistillJob, distill, distilled_meta
from workers.modelfile import load_tensors, save_tensors
from workers.segments import FROM, STATE, UNTIL, Segment, segment_of
from workers.settings import AlgorithmBlock
from workers.supervised import train_member

TINY = BackboneSpec(name="tiny_cnn", channels=1, width=2)


def chain(folder: Path, interval: int, settings=SETTINGS, start: Path | None = None, begin: int = 0, **extra):
    """Train from ``begin`` to the end in segments; the last result, and how many there were."""
    done = None
    for number in range(100):
        segment = Segment(begin + (number + 1) * interval, start)
        done = train(folder, settings, name=f"part{number}", segment=segment, **extra)
        start = folder / f"part{number}" / STATE
        if not done.fit.left:
            return done, number + 1
    raise AssertionError("it does not end")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "ema_decay": 0.9, "schedule": "onecycle"},
        {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 1, "select": "last", "weight_decay": 0.1},
    ],
)
@pytest.mark.parametrize("interval", [6, 7])
def test_segments_without_a_change_are_the_undivided_run(tmp_path, settings, interval):
    settings = changed(**settings)
    whole = train(tmp_path, settings, name="whole")
    parted, count = chain(tmp_path, interval, settings)
    assert count > 2 and parted.fit.evaluations == whole.fit.evaluations
    assert (parted.scores, parted.step) == (whole.scores, whole.step)
    assert weights(tmp_path / f"part{count - 1}") == weights(tmp_path / "whole")
    assert not (tmp_path / f"part{count - 1}" / STATE).exists()


def test_a_segment_is_a_network_with_its_own_score(tmp_path):
    done = train(tmp_path, segment=Segment(7), name="part")
    assert done.fit.left and done.step == 6 and 0 <= done.scores["accuracy"] <= 1
    assert all(e.step != 6 for e in done.fit.evaluations)  # scored for the choice between members, not recorded
    state = load_tensors(tmp_path / "part" / STATE / "state.safetensors")
    assert torch.equal(state["model/5.weight"], load_tensors(tmp_path / "part" / "model.safetensors")["5.weight"])
    assert any(name.startswith("optimizer/") for name in state)


def test_the_state_of_the_optimizer_is_taken_over(tmp_path):
    train(tmp_path, segment=Segment(6), name="first")
    given = tmp_path / "first" / STATE
    good, _ = chain(tmp_path / "good", 100, changed(lr=1e-3), given)
    bare = tmp_path / "bare-state"
    shutil.copytree(given, bare)
    tensors = load_tensors(bare / "state.safetensors")
    save_tensors(bare / "state.safetensors", {n: t for n, t in tensors.items() if not n.startswith("optimizer/")})
    with pytest.raises(CheckpointError, match="does not match its digest"):
        chain(tmp_path / "bare", 100, changed(lr=1e-3), bare)
    record = json.loads((bare / "state.json").read_text())
    record["sha256"] = hashlib.sha256((bare / "state.safetensors").read_bytes()).hexdigest()
    (bare / "state.json").write_text(json.dumps(record))
    other, _ = chain(tmp_path / "bare", 100, changed(lr=1e-3), bare)
    assert not torch.equal(good.fit.last["5.weight"], other.fit.last["5.weight"])


def test_a_changed_rate_holds_from_the_segment_on(tmp_path):
    def rates(reporter):
        return [values["lr"] for _, values in reporter.progressed if "lr" in values]

    constant = changed(schedule="constant")
    first, second = Recorder(), Recorder()
    train(tmp_path, constant, first, name="first", segment=Segment(6))
    slower = changed(schedule="constant", lr=1e-3)
    train(tmp_path, slower, second, name="second", segment=Segment(12, tmp_path / "first" / STATE))
    assert rates(first) == [2e-2] * 6 and rates(second) == [1e-3] * 6
    assert second.progressed[0][0] == 7


def test_a_change_between_segments_is_a_change_in_one_run(tmp_path, monkeypatch):
    """Half the rate from update 6 on, as a schedule of an undivided run: nothing but the rate may differ."""
    rates = {"schedule": "constant", "weight_decay": 0.0}
    monkeypatch.setattr("workers.train_model.constant", lambda: lambda step: 1.0 if step < 6 else 0.5)
    train(tmp_path, changed(**rates), name="whole")
    monkeypatch.setattr("workers.train_model.constant", lambda: lambda step: 1.0)
    train(tmp_path, changed(**rates), name="first", segment=Segment(6))
    train(tmp_path, changed(**rates, lr=1e-2), name="rest", segment=Segment(99, tmp_path / "first" / STATE))
    assert weights(tmp_path / "rest") == weights(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 2])
def test_a_segment_that_was_cut_off_ends_with_the_same_bytes(tmp_path, stop):
    often = changed(checkpoint_every=2)
    train(tmp_path, often, name="first", segment=Segment(6))
    second = Segment(12, tmp_path / "first" / STATE)
    train(tmp_path, often, name="whole", segment=second)
    with pytest.raises(Interrupted):
        train(tmp_path, often, Recorder(stop_after=stop), name="cut", segment=second)
    again = Recorder()
    train(tmp_path, often, again, name="cut", segment=second)
    assert again.logs == [f"Resumed at step {6 + 2 * stop} of 30."]
    for name in ("model.safetensors", f"{STATE}/state.safetensors", f"{STATE}/state.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_meta_distillation_in_segments_is_the_undivided_job(tmp_path):
    extras = {"ema_decay": 0.8, "meta": {"inner_lr": 0.05, "learn_rates": True}, "reset_optimizer": False}
    distill(distill_job(tmp_path, "whole", **extras))
    start, end = None, 0
    for until in (2, 5, 9):  # of six updates
        config = {**distill_job(tmp_path, f"to{until}", **extras), "until": until, "start": start}
        distill(config)
        meta, start = distilled_meta(DistillJob(**config)), str(tmp_path / f"to{until}" / STATE)
        assert meta.get("segment") == ({"updates": until, "left": 6 - until} if until < 6 else None)
        assert 0 <= meta["scores"]["accuracy"] <= 1
        end = until
    for name in ("model.safetensors", "aggregator.safetensors", "distill.json"):
        assert (tmp_path / f"to{end}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / f"to{end}" / STATE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"engine": "torch"}, {"engine": "deepspeed", "ep_size": 2, "zero_stage": 2}])
def test_segments_on_two_ranks(tmp_path, engine):
    extras = {**engine, "moe": {"num_experts": 4, "top_k": 2}, "ema_decay": 0.8, "reset_optimizer": False}
    jobs = [distill_job(tmp_path, name, **extras) for name in ("whole", "first", "rest")]
    jobs[1]["until"] = 4
    jobs[2] |= {"until": 8, "start": str(tmp_path / "first" / STATE)}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_together("tests.workers.distill_pair", tmp_path / "jobs.json", pair_environments(), timeout=400)
    for name in ("model.safetensors", "aggregator.safetensors", "distill.json"):
        assert (tmp_path / "rest" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "backbone", "options"),
    [
        ("sma", TINY, {"start": 3}),
        ("swad", TINY, {"converge": 2, "tolerance": 3}),
        ("irm", TINY, {"penalty_anneal_iters": 4}),
        ("gmoe", SPARSE, {}),
    ],
)
def test_algorithms_in_segments_are_the_undivided_run(tmp_path, name, backbone, options):
    def part(folder: Path, segment: Segment | None) -> dict[str, Any]:
        settings = SHORT.model_copy(update={"steps": 9, "evaluate_every": 2, "image_size": backbone.image_size})
        return train_member(
            DATA, backbone, settings, context(folder), splits=("train",), val_split="val", domains=None, init=None,
            algorithm=AlgorithmBlock(name=name, options=options), segment=segment,
        )  # fmt: skip

    whole = part(tmp_path / "whole", None)
    start = None
    for until in (4, 7, 10):
        meta = part(tmp_path / str(until), Segment(until, start))
        if "segment" not in meta:
            break
        start = tmp_path / str(until) / "out" / STATE
    assert meta == whole and until > 4
    assert weights(tmp_path / str(until) / "out") == weights(tmp_path / "whole" / "out")


def test_what_a_member_is(tmp_path):
    (tmp_path / STATE).mkdir()
    before = Input("state", "a" * 64, tmp_path, {})
    assert segment_of({"group": 2}, {}) is None
    assert segment_of({UNTIL: 5}, {}) == Segment(5)
    assert segment_of({UNTIL: 9}, {FROM: [before]}) == Segment(9, tmp_path / STATE)
    (tmp_path / STATE).rmdir()
    with pytest.raises(SpecError, match="holds no training state"):
        segment_of({UNTIL: 9}, {FROM: [before]})
