import dataclasses

import pytest
from pydantic import BaseModel, Field

from orchestrator.cache import cache_key, explain_miss, keyed_config
from orchestrator.graph import build_graph
from orchestrator.plan import make_plan
from orchestrator.store import KeyRecord
from tests.support.pipelines import DIAMOND, go, pipeline


class Inner(BaseModel):
    lr: float = 0.1
    log_every: int = Field(10, json_schema_extra={"cache": False})


class Config(BaseModel):
    inner: Inner = Inner()
    many: list[Inner] = []
    named: dict[str, Inner] = {}
    workers: int = Field(2, json_schema_extra={"cache": False})
    size: int = 3


def node(stages, name, seeds=(0,)):
    return build_graph(pipeline(stages, seeds)).nodes[name]


def test_fields_that_do_not_matter_are_left_out_at_any_depth():
    one = keyed_config(Config(many=[Inner()], named={"a": Inner()}))
    assert one == {"inner": {"lr": 0.1}, "many": [{"lr": 0.1}], "named": {"a": {"lr": 0.1}}, "size": 3}
    other = Config(inner=Inner(log_every=5), many=[Inner(log_every=7)], named={"a": Inner()}, workers=9)
    assert keyed_config(other) == one


def test_what_enters_the_key():
    stages = {"a": {"kind": "numbers", "config": {"count": 2}}}
    base = node(stages, "a/seed=0/item=0")
    key = cache_key(base, {})
    assert cache_key(base, {}) == key
    assert {"format", "kind", "version", "seed", "threads", "config.count", "member.item"} <= set(key.parts)
    assert "code.tests/support/toy_stages/numbers.py" in key.parts
    others = [
        node(stages, "a/seed=0/item=1"),
        node(stages, "a/seed=1/item=0", seeds=(1,)),
        node({"a": {"kind": "numbers", "config": {"count": 2, "value": 5}}}, "a/seed=0/item=0"),
        node({"a": {"kind": "numbers", "config": {"count": 2}, "resources": {"threads": 2}}}, "a/seed=0/item=0"),
    ]
    digests = {cache_key(other, {}).digest for other in others}
    digests |= {cache_key(base, {}, {"data": "x"}).digest, cache_key(base, {"p": [("m", "0")]}).digest, key.digest}
    assert len(digests) == 7


def test_members_that_failed_enter_the_key_of_what_does_without_them():
    base = node({"a": {"kind": "numbers"}}, "a/seed=0")
    key = cache_key(base, {}, left_out={"p": ["m", "n"]})
    assert key.parts["left_out.p"] == "m n" and key != cache_key(base, {}) == cache_key(base, {}, left_out={})


def test_what_a_member_does_not_read_of_its_config_does_not_enter_its_key():
    from orchestrator.stages.jetpack_train import JetpackTrainConfig
    from orchestrator.stages.jetpack_train import Stage as JetpackTrain
    from orchestrator.stages.text_search import Stage as TextSearch
    from orchestrator.stages.text_search import TextSearchConfig

    recipe, wider = (JetpackTrainConfig(batch_size=4, epochs=1, starts=names) for names in (("a",), ("b", "a")))
    (member,) = JetpackTrain().members(recipe)
    assert recipe == JetpackTrain().narrow(wider, member).model_copy(update={"save_model": True})
    kept = wider.model_copy(update={"save_model": ("b",)})
    assert JetpackTrain().narrow(kept, member).save_model is False

    text = {"model": {"weights": "minilm"}, "num_experts": [4, 8], "top_k": [2]}
    small = TextSearchConfig(**text, methods=["emoe"])
    large = TextSearchConfig(**{**text, "num_experts": [4, 8, 16]}, methods=["dense", "emoe"], tunings=["lora", "full"])
    own, all_ = ({m.name: m for m in TextSearch().members(config)} for config in (small, large))
    assert len(own) == 6 and set(own) < set(all_)
    stage, made = TextSearch(), set()
    for name, member in own.items():
        narrow = stage.narrow(small, member)
        assert narrow == stage.narrow(large, all_[name]) and narrow.settings().jobs()[0].name == name
        made.add(narrow.model_dump_json())
    assert len(made) == 6
    dense, more = (TextSearchConfig(**{**text, "num_experts": sizes}, methods=["dense"]) for sizes in ([4], [4, 8]))
    (first, *_), (second, *_) = (TextSearch().members(config) for config in (dense, more))
    assert first == second and stage.narrow(dense, first) == stage.narrow(more, second)


def test_what_does_not_enter_the_key():
    stages = {"a": {"kind": "numbers"}}
    same = {
        "a": {"kind": "numbers", "description": "x", "resources": {"cpus": 2}, "retry": {"user": 2}, "timeout_s": 9}
    }
    assert cache_key(node(stages, "a/seed=0"), {}) == cache_key(node(same, "a/seed=0"), {})


def change(key, **parts):
    renamed = {name.replace("__", "."): value for name, value in parts.items()}
    return dataclasses.replace(key, digest="f" * 64, parts={**key.parts, **renamed})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"config__value": "7"}, "config.value changed from 1 to 7"),
        ({"input__experts": "m@1"}, "input experts is new"),
        ({"version": "2"}, "the stage's version changed from 1 to 2"),
        ({"format": "2"}, "the cache format changed from 1 to 2"),
        ({"external__digits/train.npz": "9"}, "digits/train.npz is new"),
        ({"code__moe/meta_step.py": "9"}, "source file moe/meta_step.py is new"),
        ({"threads": "4"}, "threads changed from 1 to 4"),
        (
            {"config__value": "7", "config__count": "3", "config__sleep_s": "1.0", "version": "2", "threads": "2"},
            "the stage's version changed from 1 to 2; config.count changed from 1 to 3; "
            "config.sleep_s changed from 0.0 to 1.0; and 2 more",
        ),
    ],
)
def test_a_miss_is_explained_against_the_nearest_earlier_result(parts, words):
    key = cache_key(node({"a": {"kind": "numbers"}}, "a/seed=0"), {})
    earlier = [
        KeyRecord(key.digest, "0" * 64, key.parts, "a/seed=0"),
        KeyRecord("e" * 64, "0" * 64, {**key.parts, "config.value": "100", "config.size_kb": "3"}, "a/seed=0"),
        KeyRecord("d" * 64, "0" * 64, {**key.parts, "kind": "other"}, "a/seed=0"),
    ]
    assert explain_miss(change(key, **parts), earlier, "a/seed=0") == words


def test_the_first_time_and_a_new_sibling_have_nothing_to_compare_with():
    stages = {"a": {"kind": "numbers", "config": {"count": 2}}}
    first, second = (cache_key(node(stages, f"a/seed=0/item={i}"), {}) for i in range(2))
    assert explain_miss(first, [], "a/seed=0/item=0") == "first time"
    record = KeyRecord(first.digest, "0" * 64, first.parts, "a/seed=0/item=0")
    assert explain_miss(second, [record], "a/seed=0/item=1") == "first time"


def test_second_run_hits_and_a_changed_config_reruns_only_what_depends_on_it(store):
    first, _ = go(pipeline(DIAMOND, seeds=(0, 1)), store)
    assert first.status == "finished" and first.hits == 0
    again, _ = go(pipeline(DIAMOND, seeds=(0, 1)), store)
    assert again.hits == len(again.artifacts) == 15 and again.artifacts == first.artifacts
    changed = {**DIAMOND, "total": {**DIAMOND["total"], "config": {"factor": 2}}}
    third, run = go(pipeline(changed, seeds=(0, 1)), store)
    started = [event.node for event in run.events() if event.kind == "member-started"]
    assert sorted(started) == ["all", "total/seed=0", "total/seed=1"] and third.hits == 12


def test_a_damaged_artifact_is_rebuilt_and_nothing_after_it(store):
    first, _ = go(pipeline(DIAMOND), store)
    victim = store.local_path(store.artifact(first.artifacts["squares/seed=0/item=1"])) / "value.json"
    victim.write_text("{")
    entry = make_plan(build_graph(pipeline(DIAMOND)), store).entries["squares/seed=0/item=1"]
    assert (entry.state, entry.reason) == ("miss", "its result is damaged: file value.json is 11 bytes short")
    again, run = go(pipeline(DIAMOND), store)
    started = [event.node for event in run.events() if event.kind == "member-started"]
    # Members 1 and 2 share nothing with it, but one that made equal bytes would share the artifact.
    assert started == ["squares/seed=0/item=1"] and again.artifacts == first.artifacts
