"""Expert-wise checkpoints: any number of ranks, digests, interrupted saves, and every way a file can be wrong."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from moe.errors import CheckpointError, NotFoundError, SpecError
from moe.layers.experts import Experts, LocalExperts, numbered_state
from workers import expert_checkpoint
from workers.expert_checkpoint import commit, digest, load_experts, load_into, read_manifest, save_experts, save_share

LAYERS = {"a.experts.": 4, "b.experts.": 2}


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Module(), nn.Module()
        self.a.experts, self.a.gate = Experts(4, 3, 5), nn.Linear(3, 4, bias=False)
        self.b.experts = LocalExperts(3, 5, 2)
        self.head = nn.Linear(3, 2).bfloat16()


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def share(state, rank, world):
    """What a rank of an expert-parallel model holds."""
    out = {}
    for name, value in numbered_state(state, "a.experts.").items():
        layer = next((p for p in LAYERS if name.startswith(p)), None)
        if layer is None:
            out[name] = value
        else:
            e, local = int(name.removeprefix(layer).split(".")[0]), LAYERS[layer] // world
            if e // local == rank:
                out[name] = value
    return out


def test_round_trip_keeps_names_types_and_bits(tmp_path):
    state = Model().state_dict()
    manifest = save_experts(tmp_path, state, LAYERS)
    assert equal(load_experts(tmp_path), state)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + 4 + 2
    assert manifest == read_manifest(tmp_path) and manifest.layers["a.experts."].form == "stacked"
    numbered = load_experts(tmp_path, form="numbered")
    assert torch.equal(numbered["a.experts.3.w2.weight"], state["a.experts.w2"][3])
    assert torch.equal(load_experts(tmp_path, form="stacked")["b.experts.b1"][1], state["b.experts.1.w1.bias"])
    other = Model(seed=1)
    load_into(other, load_experts(tmp_path), "checkpoint")
    assert equal(other.state_dict(), state)


@pytest.mark.parametrize("saved", [1, 2])
@pytest.mark.parametrize("loaded", [1, 2])
def test_any_number_of_ranks_saves_and_loads(tmp_path, saved, loaded):
    state = Model().state_dict()
    shares = [save_share(tmp_path, share(state, r, saved), LAYERS, r, saved) for r in range(saved)]
    travelled = [type(s).model_validate_json(s.model_dump_json()) for s in shares]
    commit(tmp_path, reversed(travelled))
    for rank in range(loaded):
        assert equal(load_experts(tmp_path, rank, loaded), share(state, rank, loaded))
        stacked = load_experts(tmp_path, rank, loaded, form="stacked")["a.experts.w1"]
        part = slice(rank * 4 // loaded, (rank + 1) * 4 // loaded)
        assert torch.equal(stacked, state["a.experts.w1"][part])


def test_stacked_shares_keep_their_global_numbers(tmp_path):
    module = Experts(4, 3, 5)
    halves = [{f"e.{n}": v.detach()[2 * r : 2 * r + 2] for n, v in module.state_dict().items()} for r in (0, 1)]
    commit(tmp_path, [save_share(tmp_path, halves[r], {"e.": 4}, r, 2) for r in (0, 1)])
    assert equal(load_experts(tmp_path), {f"e.{n}": v for n, v in module.state_dict().items()})
    one = load_experts(tmp_path, rank=3, world_size=4, form="numbered")
    assert list(one) == [f"e.3.{w}.{t}" for w in ("w1", "w2") for t in ("bias", "weight")]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_property_round_trip(tmp_path_factory, experts, bias, dtype):
    folder = tmp_path_factory.mktemp("c")
    state = Experts(experts, 2, 3, bias=(bias, bias)).to(dtype).state_dict()
    save_experts(folder, {f"m.{n}": v for n, v in state.items()}, {"m.": experts})
    assert equal(load_experts(folder), {f"m.{n}": v for n, v in state.items()})


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = Model(0).state_dict(), Model(1).state_dict()
    save_experts(tmp_path, old, LAYERS)
    written = []

    def fails(path, tensors):
        written.append(path)
        if len(written) == 4:
            raise OSError("killed")
        return real(path, tensors)

    real = expert_checkpoint.save_tensors
    monkeypatch.setattr(expert_checkpoint, "save_tensors", fails)
    with pytest.raises(OSError, match="killed"):
        save_experts(tmp_path, new, LAYERS)
    monkeypatch.undo()
    assert equal(load_experts(tmp_path), old)
    save_experts(tmp_path, new, LAYERS)
    assert equal(load_experts(tmp_path), new)
    assert len(list(tmp_path.glob("*.safetensors"))) == 7 and not list(tmp_path.glob(".*"))


def test_a_file_that_reads_back_otherwise_is_noticed(tmp_path, monkeypatch):
    def damages(path, tensors):
        real(path, {n: v + 1 for n, v in tensors.items()})

    real = expert_checkpoint.save_tensors
    monkeypatch.setattr(expert_checkpoint, "save_tensors", damages)
    with pytest.raises(CheckpointError, match="reads back"):
        save_experts(tmp_path, Model().state_dict(), LAYERS)
    assert not (tmp_path / "manifest.json").exists()


def expert_file(folder, layer="a.experts.", e=1):
    return folder / read_manifest(folder).layers[layer].experts[e].file


def test_damaged_files_are_named(tmp_path):
    save_experts(tmp_path, Model().state_dict(), LAYERS)
    path = expert_file(tmp_path)
    good = path.read_bytes()

    def fails(match):
        with pytest.raises(CheckpointError, match=match):
            load_experts(tmp_path)
        path.write_bytes(good)

    path.write_bytes(good[:-7])
    fails("truncated")
    path.unlink()
    fails(r"expert 1 of 'a\.experts\.' is missing")
    path.write_bytes(expert_file(tmp_path, e=2).read_bytes())
    fails(r"expert 1 of 'a\.experts\.' has digest")
    tensors = load_file(path)
    save_file({**tensors, "w1.weight": tensors["w1.weight"].t().contiguous()}, path)
    fails(r"'w1\.weight' is \[3, 5\], the manifest says \[5, 3\]")
    save_file({n: v for n, v in tensors.items() if n != "w2.bias"}, path)
    fails(r"'w2\.bias' is missing, the manifest says \[3\]")
    save_file({**tensors, "more": torch.zeros(2)}, path)
    fails(r"'more' is \[2\], the manifest says nothing")
    assert equal(load_experts(tmp_path), Model().state_dict())


def test_damaged_manifests_and_names_that_leave_the_folder(tmp_path):
    with pytest.raises(NotFoundError, match=r"manifest\.json"):
        load_experts(tmp_path)
    save_experts(tmp_path, Model().state_dict(), LAYERS)
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    for change, match in (
        ({"format": "other/9"}, "format"),
        ({"more": 1}, "more"),
        ({"shared": {**good["shared"], "file": "../secret.safetensors"}}, "plain file name"),
        ({"shared": {**good["shared"], "digest": "0"}}, "digest"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=match):
            load_experts(tmp_path)
    path.write_text(json.dumps(good)[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        load_experts(tmp_path)


def test_what_does_not_fit_is_said_with_shapes(tmp_path):
    model = Model()
    state = model.state_dict()
    save_experts(tmp_path, state, LAYERS)
    with pytest.raises(SpecError, match=r"4 experts of 'a\.experts\.' cannot be shared by 3 ranks"):
        load_experts(tmp_path, 0, 3)
    turned = state | {"a.experts.w1": state["a.experts.w1"].transpose(1, 2)}
    for wrong, match in (
        ({n: v for n, v in state.items() if n != "a.gate.weight"}, r"'a\.gate\.weight' \[4, 3\] is missing"),
        (turned, r"'a\.experts\.w1' is \[4, 3, 5\], expected \[4, 5, 3\]\. It is transposed"),
        (state | {"head.bias": torch.zeros(3)}, r"'head\.bias' is \[3\], expected \[2\]\. Other sizes"),
        (state | {"extra": torch.zeros(1)}, r"'extra' \[1\] is not part of the model"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_into(model, wrong, "checkpoint")
    for layers, wrong, match in (
        ({"b.experts.": 3}, state, r"'b\.experts\.2\.w1\.bias' is missing"),
        ({"b.experts.": 1}, state, r"'b\.experts\.1\.w1\.weight' belongs to no expert"),
        ({"a.experts.": 2}, state, r"'a\.experts\.w1' is \[4, 5, 3\]"),
        ({"c.experts.": 2}, state, r"'c\.experts\.0\.w1\.weight' is missing"),
        (LAYERS, {n: v for n, v in state.items() if n != "b.experts.1.w2.bias"}, r"'b\.experts\.1\.w2\.bias'"),
    ):
        with pytest.raises(CheckpointError, match=match):
            save_experts(tmp_path / "other", wrong, layers)


def test_ranks_that_forget_or_repeat_experts(tmp_path):
    state = Model().state_dict()
    shares = [save_share(tmp_path, share(state, r, 2), LAYERS, r, 2) for r in (0, 1)]
    with pytest.raises(CheckpointError, match="shared tensors"):
        commit(tmp_path, shares[1:])
    with pytest.raises(CheckpointError, match=r"Expert 0 of 'a\.experts\.' was written twice"):
        commit(tmp_path, [shares[0], shares[0]])
    with pytest.raises(CheckpointError, match=r"Expert 2 of 'a\.experts\.' was written by nobody"):
        commit(tmp_path, [shares[0]])


def test_digest_sees_names_types_shapes_and_values():
    base = {"a": torch.arange(6.0)}
    others = ({"b": base["a"]}, {"a": base["a"].double()}, {"a": base["a"].view(2, 3)}, {"a": base["a"].flip(0)}, {})
    assert len({digest(t) for t in (base, *others)}) == 6
    assert digest({"a": torch.arange(12.0).view(6, 2)[:, 0]}) == digest({"a": torch.arange(12.0)[::2]})
    assert digest({"x": torch.zeros(0), "y": torch.tensor(1)}) == digest({"y": torch.tensor(1), "x": torch.zeros(0)})
