import pickle

import pytest
import torch

from moe.errors import CheckpointError, SpecError
from serve.delta import Delta


def test_bytes_round_trip_bit_for_bit_and_do_not_depend_on_order():
    a, b = torch.randn(3, 4), torch.randn(5, dtype=torch.float64)
    one, two = Delta({"x": a, "y": b}), Delta({"y": b.clone(), "x": a.clone()})
    assert one.to_bytes() == two.to_bytes() and one.digest == two.digest and one == two
    back = Delta.from_bytes(one.to_bytes("a note"))
    assert back == one and all(torch.equal(back.tensors[n], one.tensors[n]) for n in ("x", "y"))
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.nbytes == 3 * 4 * 4 + 5 * 8


def test_empty_delta_is_a_delta():
    empty = Delta({})
    assert len(empty) == 0 and empty.nbytes == 0 and Delta.from_bytes(empty.to_bytes()) == empty


def test_a_delta_owns_its_tensors():
    value = torch.ones(4, requires_grad=True)
    delta = Delta({"x": value})
    with torch.no_grad():
        value.add_(1)
    assert torch.equal(delta.tensors["x"], torch.ones(4)) and not delta.tensors["x"].requires_grad
    with pytest.raises(TypeError):
        delta.tensors["x"] = value


def test_only_changed_tensors_are_kept():
    base = {"a": torch.zeros(3), "b": torch.ones(2), "c": torch.ones(1)}
    delta = Delta.changed(base, {"a": torch.zeros(3), "b": torch.tensor([1.0, 1.0 + 1e-7])})
    assert list(delta.tensors) == ["b"]


def test_a_step_of_distillation_leaves_out_what_did_not_move(served_model, domain_images):
    from moe.adaptation.base import make

    images = served_model.preprocess(domain_images(75, 32)[0])
    result = make("bn").adapt(served_model.private_base(), images)
    delta = Delta.changed(served_model.state_dict(), result.delta)
    assert {name.rpartition(".")[2] for name in delta.tensors} == {"running_mean", "running_var"}
    delta.check_fits(served_model)
    assert 0 < delta.nbytes < 2_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_the_name(value):
    with pytest.raises(CheckpointError, match=r"features\.bad"):
        Delta({"features.bad": torch.tensor([1.0, value])})


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 600])
def test_names_that_are_none(name):
    with pytest.raises(SpecError, match="not the name of a tensor"):
        Delta({name: torch.ones(1)})


def test_truncated_and_foreign_bytes():
    data = Delta({"x": torch.randn(100)}).to_bytes()
    for wrong in (data[:-5], b"", b"not a file at all", data[:4]):
        with pytest.raises(CheckpointError, match="truncated"):
            Delta.from_bytes(wrong)


def test_what_does_not_fit_is_named(served_model):
    own = served_model.state_dict()
    name = next(n for n in own if n.endswith("running_var"))
    cases = {
        "not in the model": {"features.nothing": torch.ones(1)},
        "instead of": {name: torch.ones(1)},
        "float64": {name: own[name].double()},
        "negative": {name: -own[name]},
    }
    for words, tensors in cases.items():
        with pytest.raises(CheckpointError, match=words):
            Delta(tensors).check_fits(served_model)
        with pytest.raises(CheckpointError, match=words):
            Delta(tensors).check_fits(served_model.base)
