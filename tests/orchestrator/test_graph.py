import pickle
from hashlib import sha256

import pytest

from orchestrator.graph import build_graph, derive_seed
from orchestrator.loading import load, load_pipeline
from orchestrator.positions import SpecErrors
from orchestrator.spec import PipelineSpec
from tests.support.yaml_files import write


def pipeline(tmp_path, text, **kwargs):
    return load(write(tmp_path, text), **kwargs).graph


def spec(stages, seeds=(0,)):
    return PipelineSpec(apiVersion="moepipe/v1", name="x", seeds=list(seeds), stages=stages)


def test_fan_out_is_seed_times_member_in_topological_order(tmp_path):
    graph = build_graph(load_pipeline(write(tmp_path)))
    assert list(graph.stages) == ["source", "squares", "total", "end"]
    assert graph.stages["source"].nodes == tuple(f"source/seed={s}/item={i}" for s in (0, 1) for i in range(3))
    assert graph.stages["total"].nodes == ("total/seed=0", "total/seed=1")
    assert graph.stages["end"].nodes == ("end",)
    seen = set()
    for node in graph.nodes.values():
        assert set(node.parents) <= seen
        seen.add(node.id)


def test_member_wise_inputs(tmp_path):
    nodes = build_graph(load_pipeline(write(tmp_path))).nodes
    assert nodes["squares/seed=1/item=2"].inputs == {"number": ("source/seed=1/item=2",)}
    assert nodes["total/seed=1"].inputs["numbers"] == (
        *(f"source/seed=1/item={i}" for i in range(3)),
        *(f"squares/seed=1/item={i}" for i in range(3)),
    )
    assert nodes["end"].inputs == {"numbers": ("total/seed=0", "total/seed=1")}


def test_a_single_artifact_is_shared_by_a_fan_out(tmp_path):
    graph = pipeline(
        tmp_path,
        """
        stages:
          one: {kind: numbers}
          many: {kind: square, inputs: {number: "${stages.one}"}, config: {count: 3}}
          end: {kind: gather, inputs: {numbers: "${stages.many}"}}
        """,
    )
    assert {node.inputs["number"] for node in graph.nodes.values() if node.stage == "many"} == {("one/seed=0",)}


def test_a_stage_that_gathers_seeds_takes_all_members_of_all_seeds(tmp_path):
    graph = pipeline(
        tmp_path,
        """
        seeds: [3, 1]
        stages:
          source: {kind: numbers, config: {count: 2}}
          end: {kind: gather, inputs: {numbers: "${stages.source}"}}
        """,
    )
    assert graph.nodes["end"].inputs["numbers"] == tuple(f"source/seed={s}/item={i}" for s in (3, 1) for i in (0, 1))
    assert graph.nodes["end"].seed is None


def test_seeds_derive_from_names_alone(tmp_path):
    graph = pipeline(tmp_path, "seeds: [5]\nstages: {source: {kind: numbers, config: {count: 2}}}\n")
    node = graph.nodes["source/seed=5/item=1"]
    assert node.seed == derive_seed(5, "source", "item=1")
    assert node.seed == int.from_bytes(sha256(b"5/source/item=1").digest()[:4], "big")
    assert node.seed_index == 5
    assert node.name == "seed=5/item=1"
    other = pipeline(tmp_path, "seeds: [1, 5]\nstages: {source: {kind: numbers, config: {count: 9}}}\n")
    assert other.nodes["source/seed=5/item=1"].seed == node.seed


def test_mirrored_fan_outs_of_different_size_are_told_apart(tmp_path):
    path = write(tmp_path)
    with pytest.raises(SpecErrors) as caught:
        load(path, overrides=["stages.squares.config.count=4"])
    (problem,) = caught.value.problems
    assert problem.path == "stages.squares.inputs.number"
    assert "'item=3' finds no member of the same name in source, which has 'item=0', 'item=1', 'item=2'" in str(problem)
    assert (problem.place.source, problem.place.line > 2) == (str(path), True)


def test_members_that_a_mirrored_stage_leaves_unread_are_told(tmp_path):
    path = write(tmp_path)
    with pytest.raises(SpecErrors) as caught:
        load(path, overrides=["stages.squares.config.count=2"])
    (problem,) = caught.value.problems
    assert problem.path == "stages.squares.inputs.number"
    assert "leaves 'item=2' of source unread; its own members are 'item=0', 'item=1'." in problem.message


def test_a_named_member_does_not_take_another_members_artifact(tmp_path):
    """A fan-out of one named member is not a shared artifact for ``item=1``."""
    with pytest.raises(SpecErrors, match="takes one artifact, but source has 2 members"):
        pipeline(
            tmp_path,
            """
            stages:
              source: {kind: numbers, config: {count: 2}}
              square: {kind: square, inputs: {number: "${stages.source}"}}
            """,
        )


def test_build_graph_of_a_wrong_spec_names_everything():
    wrong = spec(
        {
            "a": {"kind": "numbers", "config": {"cout": 1}},
            "b": {"kind": "nmbers"},
            "c": {"kind": "sum", "inputs": {"numbers": "${stages.z}"}},
        }
    )
    with pytest.raises(SpecErrors) as caught:
        build_graph(wrong)
    text = str(caught.value)
    assert {p.path for p in caught.value.problems} == {
        "stages.a.config.cout",
        "stages.b.kind",
        "stages.c.inputs.numbers",
    }
    assert "Did you mean 'count'?" in text and "Did you mean 'numbers'?" in text


def test_cycles_are_shown():
    with pytest.raises(SpecErrors, match=r"circle: a -> b -> a|circle: b -> a -> b"):
        build_graph(
            spec(
                {
                    "a": {"kind": "sum", "inputs": {"numbers": "${stages.b}"}},
                    "b": {"kind": "sum", "inputs": {"numbers": "${stages.a}"}},
                }
            )
        )
    with pytest.raises(SpecErrors, match="reads from itself"):
        build_graph(spec({"a": {"kind": "sum", "inputs": {"numbers": "${stages.a}"}}}))


def test_empty_fan_out_is_an_error():
    with pytest.raises(SpecErrors, match="fan-out without members"):
        build_graph(spec({"a": {"kind": "numbers", "config": {"count": 0}}}))


def test_yaml_order_is_kept_where_the_edges_allow(tmp_path):
    graph = pipeline(
        tmp_path,
        """
        stages:
          end: {kind: gather, inputs: {numbers: ["${stages.z}", "${stages.a}"]}}
          z: {kind: numbers}
          a: {kind: numbers}
        """,
    )
    assert list(graph.stages) == ["z", "a", "end"]
    assert graph.children["z/seed=0"] == ("end",)
    assert graph.stage_children("a") == ("end",)


def test_nodes_travel_to_other_processes(tmp_path):
    graph = build_graph(load_pipeline(write(tmp_path)))
    for node in graph.nodes.values():
        assert pickle.loads(pickle.dumps(node)) == node


def test_a_spec_gives_the_same_graph_again(tmp_path):
    one, two = (build_graph(load_pipeline(write(tmp_path))) for _ in range(2))
    assert one.nodes == two.nodes and list(one.nodes) == list(two.nodes)
