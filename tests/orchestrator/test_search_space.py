"""Spaces: values inside their bounds, conditions, stable draws, and what counts as a point."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moe.errors import SpecError
from workers.search_propose import Tpe, random_points, shown
from workers.search_space import Dimension, Space, identity, point_id, with_values

TREE = {
    "kind": {"choice": ["a", "b"]},
    "lr": {"loguniform": [1e-4, 1e-1]},
    "warmup": {"int": [0, 10], "step": 5, "when": {"kind": "a"}},
    "shape": {"choice": ["x", "y"]},
    "slope": {"uniform": [0, 1], "step": 0.25, "when": {"shape": "x", "kind": ["b"]}},
}


def space(**dimensions):
    return Space({name.replace("__", "."): Dimension(**value) for name, value in dimensions.items()})


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_draws_are_points_of_the_space(seed, number):
    tree = space(**TREE)
    values = tree.draw(seed, number)
    assert tree.contains(values)
    assert ("warmup" in values) == (values["kind"] == "a")
    assert ("slope" in values) == (values["kind"] == "b" and values["shape"] == "x")
    assert values == tree.draw(seed, number)


def test_another_dimension_leaves_the_draws_of_the_others():
    small = space(lr={"loguniform": [1e-4, 1e-1]})
    large = space(lr={"loguniform": [1e-4, 1e-1]}, wd={"uniform": [0, 1]})
    assert [small.draw(3, i)["lr"] for i in range(5)] == [large.draw(3, i)["lr"] for i in range(5)]


def test_ranges_are_drawn_evenly_on_their_scale():
    log = space(x={"loguniform": [1e-4, 1.0]})
    below = sum(log.draw(0, i)["x"] < 1e-2 for i in range(400))
    assert 160 < below < 240
    whole = space(x={"logint": [1, 64]})
    values = [whole.draw(0, i)["x"] for i in range(400)]
    assert set(values) <= set(range(1, 65)) and min(values) == 1 and all(isinstance(v, int) for v in values)
    assert 100 < sum(v <= 7 for v in values) < 300


def test_grid_lists_every_point_once():
    tree = space(**{name: value for name, value in TREE.items() if name != "lr"})
    points = list(tree.grid())
    # a: 3 warmups x 2 shapes; b: shape x has 5 slopes, shape y none
    assert len(points) == 6 + 6 == tree.size()
    assert len({point_id(values) for values in points}) == len(points)
    assert all(tree.contains(values) for values in points)


def test_a_grid_over_a_range_is_refused():
    with pytest.raises(SpecError, match="'lr' is a range"):
        list(space(**TREE).grid())
    assert space(**TREE).size() == math.inf


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({}, "exactly one of"),
        ({"choice": [1], "uniform": [0, 1]}, "exactly one of"),
        ({"uniform": [1, 0]}, "first end must be below"),
        ({"loguniform": [0, 1]}, "positive ends"),
        ({"choice": [1, 1.0]}, "twice"),
        ({"loguniform": [1, 2], "step": 1}, "step belongs"),
        ({"int": [1, 9], "step": 0.5}, "whole number"),
        ({"choice": []}, "at least 1"),
        ({"int": [0.5, 2]}, "integer"),
    ],
)
def test_mistakes_in_a_dimension(written, words):
    with pytest.raises(ValidationError, match=words):
        Dimension.model_validate(written)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"choice": [1]}, "b": {"choice": [1], "when": {"c": 1}}}, "no other dimension 'c'"),
        ({"a": {"int": [0, 1]}, "b": {"choice": [1], "when": {"a": 1}}}, "is a range"),
        ({"a": {"choice": [1, 2]}, "b": {"choice": [1], "when": {"a": [2, 3]}}}, "never takes 3"),
        (
            {"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1], "when": {"a": 1}}},
            "wait for each other in a circle",
        ),
        ({"a": {"choice": [{"x": 1}]}, "a__x": {"choice": [1]}}, "searched as a whole"),
    ],
)
def test_flaws_of_conditions(tree, words):
    flaws = space(**tree).flaws()
    assert len(flaws) == 1 and words in flaws[0].message


def test_every_value_is_probed_in_a_point_that_has_it():
    tree = space(**TREE)
    probes = list(tree.probes())
    assert {(name, identity(value)) for name, value, _ in probes} >= {
        ("kind", '"a"'), ("kind", '"b"'), ("warmup", "10"), ("slope", "0"), ("slope", "1"), ("lr", "0.1"),
    }  # fmt: skip
    assert all(point[name] == value for name, value, point in probes)
    assert all(tree.contains(point) for _, _, point in probes)


def test_values_go_into_a_copy():
    config = {"training": {"lr": 1, "list": [1, 2]}, "empty": None}
    new = with_values(config, {"training.lr": 2, "training.list.1": 5, "empty.new": True, "more.deep": "x"})
    assert new == {"training": {"lr": 2, "list": [1, 5]}, "empty": {"new": True}, "more": {"deep": "x"}}
    assert config["training"]["lr"] == 1
    with pytest.raises(SpecError, match="single value"):
        with_values(config, {"training.lr.x": 1})


def test_project_finds_the_point_of_a_config():
    tree = space(**TREE)
    config = {"kind": "a", "lr": 0.01, "warmup": 5, "slope": 7, "shape": "y", "other": 1}
    assert tree.project(config) == {"kind": "a", "lr": 0.01, "warmup": 5, "shape": "y"}
    assert tree.project({**config, "warmup": 4}) is None
    assert tree.project({"kind": "a"}) is None


def test_random_points_are_never_repeated_and_end_when_the_space_does():
    tree = space(a={"choice": [1, 2]}, b={"choice": [1, 2, 3]})
    points = list(random_points(tree, 0, [{"a": 2, "b": 3}], [{"a": 1, "b": 1}]))
    assert points[0] == {"a": 2, "b": 3} and {"a": 1, "b": 1} not in points
    assert len(points) == len({point_id(values) for values in points}) == 5


def bowl(values):
    return [-((math.log10(values["lr"]) + 2) ** 2) - (values["kind"] == "b")]


def ask_all(proposer, count, order):
    """Run a search to its end, telling the results of each batch in an order of our own."""
    points, open_ = [], []
    while len(points) < count:
        answer = proposer.ask()
        if answer == "wait":
            for number in order(open_):
                proposer.tell(number, bowl(points[number]))
            open_ = []
        else:
            open_.append(len(points))
            points.append(answer)
    return points


def make_tpe(known=(), first=()):
    return Tpe(space(**TREE), ["max"], seed=1, batch=3, startup=6, first=list(first), known=list(known))


def test_tpe_does_not_depend_on_the_order_of_the_results_and_finds_the_bowl():
    one = ask_all(make_tpe(), 30, list)
    other = ask_all(make_tpe(), 30, lambda numbers: list(reversed(numbers)))
    assert one == other
    tree = space(**TREE)
    assert all(tree.contains(values) for values in one)
    late, early = ([bowl(values)[0] for values in part] for part in (one[18:], one[:6]))
    assert sum(late) / len(late) > sum(early) / len(early)


def test_tpe_begins_with_what_it_is_given_and_takes_failures():
    first = {"kind": "a", "lr": 0.05, "warmup": 10, "shape": "y"}
    known = [({"kind": "b", "lr": 0.01, "shape": "y"}, [0.5])]
    tpe = make_tpe(known, [first])
    assert tpe.ask() == first
    tpe.ask()
    tpe.ask()
    assert tpe.ask() == "wait"
    for number in range(3):
        tpe.tell(number, None)
    assert tpe.ask() not in ("wait", "done")


def test_points_are_shown_short_but_unambiguous():
    assert shown({"training.lr": 0.001, "model.name": "x"}) == "lr=0.001 name=x"
    assert shown({"a.lr": 1, "b.lr": 2}) == "a.lr=1 b.lr=2"
