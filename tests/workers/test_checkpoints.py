"""Checkpoints survive kills and damage; model files name what is wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from moe.backbones import build_classifier, build_student
from moe.errors import CheckpointError, NotFoundError
from moe.specs import BackboneSpec, StudentMoESpec
from workers.checkpoints import Checkpoint, CheckpointDir
from workers.engines.base import EngineState
from workers.engines.torch import load_strict
from workers.modelfile import (
    MODEL_FILE,
    load_classifier,
    load_student,
    load_tensors,
    model_meta,
    save_tensors,
)


def checkpoint(step: int) -> Checkpoint:
    state = EngineState(
        module={"layer.weight": torch.full((2, 3), float(step)), "bn.num_batches_tracked": torch.tensor(step)},
        optimizer={"layer.weight": {"exp_avg": torch.ones(2, 3) * step, "step": torch.tensor(float(step))}},
    )
    return Checkpoint(step, state, {"layer.weight": torch.zeros(2, 3)}, {"best": 0.5, "list": [1, 2]})


def test_what_is_saved_comes_back(tmp_path):
    folder = CheckpointDir(tmp_path)
    folder.save(checkpoint(3))
    back = folder.latest()
    assert back is not None and back.step == 3 and back.counters == {"best": 0.5, "list": [1, 2]}
    assert torch.equal(back.engine.module["layer.weight"], torch.full((2, 3), 3.0))
    assert back.engine.module["bn.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(back.engine.optimizer["layer.weight"]["exp_avg"], torch.full((2, 3), 3.0))
    assert torch.equal(back.ema["layer.weight"], torch.zeros(2, 3))


def test_only_the_newest_two_stay(tmp_path):
    folder = CheckpointDir(tmp_path)
    for step in (1, 2, 3, 10):
        folder.save(checkpoint(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "gone"])
def test_a_damaged_newest_falls_back_with_a_line(tmp_path, damage):
    lines: list[str] = []
    folder = CheckpointDir(tmp_path, log=lines.append)
    folder.save(checkpoint(1))
    newest = folder.save(checkpoint(2))
    tensors = newest / "state.safetensors"
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "json":
        (newest / "state.json").write_text("{")
    else:
        (newest / "state.json").unlink()
    back = folder.latest()
    assert back is not None and back.step == 1
    assert len(lines) == 1 and "step-00000002" in lines[0]


def test_no_checkpoint_is_none_and_leftovers_are_ignored(tmp_path):
    (tmp_path / ".writing-00000005-1").mkdir()
    assert CheckpointDir(tmp_path).latest() is None
    assert CheckpointDir(tmp_path / "nowhere").latest() is None


def test_the_same_step_may_be_saved_again(tmp_path):
    folder = CheckpointDir(tmp_path)
    folder.save(checkpoint(2))
    folder.save(checkpoint(2))
    assert folder.latest() is not None


def test_equal_tensors_give_equal_bytes(tmp_path):
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(7)
    save_tensors(tmp_path / "1.safetensors", {"a": a, "b": b})
    save_tensors(tmp_path / "2.safetensors", {"b": b, "a": a})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_tied_and_transposed_tensors_can_be_saved(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "x.safetensors", {"a": shared, "b": shared, "c": shared.t()})
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["c"], shared.t())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_truncated_and_missing_files_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated .*50 bytes"):
        load_tensors(path)
    with pytest.raises(NotFoundError, match=r"nothing\.safetensors"):
        load_tensors(tmp_path / "nothing.safetensors")


def test_a_file_of_another_model_names_its_tensors():
    net = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"missing: bias; unexpected: scale; wrong shape: weight \(3, 5\)"):
        load_strict(net, {"weight": torch.zeros(3, 5), "scale": torch.zeros(1)})


SPEC = BackboneSpec(name="tiny_cnn", channels=1, width=2)


def artifact(folder, form="classifier", moe=None):
    torch.manual_seed(1)
    module = build_classifier(SPEC, 3) if form == "classifier" else build_student(SPEC, 3, moe)
    save_tensors(folder / MODEL_FILE, module.state_dict())
    return module.eval(), model_meta(form, SPEC, 3, 32, "toy", moe)


def test_a_model_artifact_gives_the_same_outputs_in_every_form(tmp_path):
    x = torch.randn(4, 1, 12, 12)
    classifier, meta = artifact(tmp_path / "c")
    assert json.loads(json.dumps(meta)) == meta
    assert torch.equal(load_classifier(tmp_path / "c", meta)(x), classifier(x))
    assert torch.equal(load_student(tmp_path / "c", meta)(x), classifier(x))
    # A fresh MoE block starts as the identity.
    torch.testing.assert_close(load_student(tmp_path / "c", meta, StudentMoESpec(num_experts=2))(x), classifier(x))
    student, meta = artifact(tmp_path / "s", "student", StudentMoESpec(num_experts=2))
    assert torch.equal(load_student(tmp_path / "s", meta)(x), student(x))
    with pytest.raises(CheckpointError, match="a plain classifier cannot hold"):
        load_classifier(tmp_path / "s", meta)
    student, meta = artifact(tmp_path / "dense", "student")
    assert torch.equal(load_classifier(tmp_path / "dense", meta)(x), student(x))


def test_a_model_artifact_with_the_wrong_tensors_names_them(tmp_path):
    _, meta = artifact(tmp_path)
    with pytest.raises(CheckpointError, match=r"wrong shape: fc\.weight \(3, 32\) instead of \(5, 32\)"):
        load_classifier(tmp_path, {**meta, "num_outputs": 5})
    with pytest.raises(CheckpointError, match=r"missing: features.*unexpected: block1"):
        load_student(tmp_path, {**meta, "form": "student"})


def test_counters_are_plain_json(tmp_path):
    path = CheckpointDir(tmp_path).save(checkpoint(4))
    assert json.loads((path / "state.json").read_text())["step"] == 4
