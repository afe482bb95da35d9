"""A replaced weights file is a miss, wherever the file comes from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from moe.backbones import build_classifier
from moe.errors import EnvironmentProblem, NotFoundError
from moe.specs import BackboneSpec
from orchestrator.graph import build_graph
from orchestrator.plan import make_plan
from orchestrator.stages.train import Stage
from tests.support.pipelines import go, pipeline
from tests.workers.toy import register
from workers.packaged_weights import _PACKAGED, require

SPEC = BackboneSpec(name="tiny_cnn", channels=1, width=2)


def write(path, seed):
    torch.manual_seed(seed)
    save_file(build_classifier(SPEC, 3).state_dict(), path)


def stages(backbone):
    register()
    return {
        "data": {"kind": "prepare", "config": {"dataset": "toy", "options": {"size": 8}}},
        "erm": {
            "kind": "train",
            "inputs": {"data": "${stages.data}"},
            "config": {"backbone": backbone, "training": {"batch_size": 16, "steps": 1, "lr": 0.01}},
        },
    }


def entry(spec, store):
    return make_plan(build_graph(spec), store, None, store.folder / "data").entries["erm/seed=0"]


def test_a_replaced_file_is_a_miss_that_names_the_weights(store, tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, 0)
    spec = pipeline(stages({**SPEC.model_dump(), "pretrained": str(path)}))
    first, _ = go(spec, store)
    assert entry(spec, store).state == "hit"
    write(path, 1)
    after = entry(spec, store)
    assert after.state == "miss" and after.reason == "weights changed"
    second, _ = go(spec, store)
    assert first.artifacts["erm/seed=0"] != second.artifacts["erm/seed=0"]
    write(path, 0)
    assert entry(spec, store).artifact == first.artifacts["erm/seed=0"]


def test_a_missing_file_blocks_the_plan_in_words(store, tmp_path):
    spec = pipeline(stages({**SPEC.model_dump(), "pretrained": str(tmp_path / "none.pth")}))
    go(pipeline({"data": stages({})["data"]}), store)
    told = entry(spec, store)
    assert told.state == "blocked" and "none.pth" in told.reason


def test_missing_files_of_later_stages_are_told_before_any_stage_works(store, tmp_path):
    spec = pipeline(stages({**SPEC.model_dump(), "pretrained": str(tmp_path / "none.pth")}))
    plan = make_plan(build_graph(spec), store, None, store.folder / "data")
    assert plan.entries["erm/seed=0"].reason.startswith("waits for data")
    with pytest.raises(NotFoundError, match=r"Nothing was started.*none.pth"):
        plan.require_sources()
    assert "none.pth" in plan.to_json()["problems"][0] and "missing" not in plan.to_json()


def test_weights_that_cannot_be_read_here_are_an_error_of_the_environment(tmp_path, monkeypatch):
    _, package, _, file = _PACKAGED["vit_small_focus"]
    path = tmp_path / "packages" / package / file
    path.parent.mkdir(parents=True)
    (tmp_path / "packages" / package / "__init__.py").touch()
    path.touch()
    monkeypatch.setattr("workers.packaged_weights.find_spec", lambda package: None)
    with pytest.raises(EnvironmentProblem, match="onnx"):
        require("vit_small_focus", tmp_path)


@pytest.mark.parametrize("name", sorted(_PACKAGED))
def test_packaged_weights_below_the_data_root_are_digested(name, tmp_path, monkeypatch):
    monkeypatch.delenv("MOEPIPE_DATA", raising=False)
    monkeypatch.setattr("workers.packaged_weights.find_spec", lambda package: package)
    _, package, _, file = _PACKAGED[name]
    path = tmp_path / "packages" / package / file
    path.parent.mkdir(parents=True)
    (tmp_path / "packages" / package / "__init__.py").touch()
    config = Stage.Config(
        backbone={"name": name, "pretrained": True}, training={"batch_size": 1, "steps": 1, "lr": 0.1}
    )
    digests = set()
    for content in (b"one", b"two"):
        path.write_bytes(content)
        digests.add(Stage().external(config, str(tmp_path))["weights"])
    assert len(digests) == 2


def test_fresh_networks_read_nothing_and_published_editions_are_named(tmp_path):
    training = {"batch_size": 1, "steps": 1, "lr": 0.1}
    fresh = Stage.Config(backbone={"name": "torchvision:resnet50"}, training=training)
    assert Stage().external(fresh, str(tmp_path)) == {}
    published = Stage.Config(backbone={"name": "torchvision:resnet50", "pretrained": True}, training=training)
    assert Stage().external(published, str(tmp_path)) == {"weights": "published:torchvision:resnet50"}
