"""From a finished ``deploy`` stage to ``moepipe serve models:/NAME@ALIAS``, over a real MLflow registry."""

from __future__ import annotations

import shutil

import pytest
import torch

from moe.errors import NotFoundError
from orchestrator.mirror import sync
from orchestrator.stages.base import STAGES
from orchestrator.store import Store
from orchestrator.tracking import connect
from orchestrator.tracking_state import state_path, tracking_uri
from serve.loading import locate
from serve.model import ServedModel
from tests.support.pipelines import go, pipeline

STAGES.add("toystudent", "tests.serve.toy_student")


@pytest.fixture(scope="module")
def migrated(tmp_path_factory):
    """An empty MLflow database; making one takes seconds, so it is made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(tmp_path, migrated, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store.open(tmp_path / "store")
    shutil.copy(migrated, store.folder / "mlflow.db")
    return store


@pytest.fixture
def deployed(store, served_folder):
    """``deployed(note, seeds)``: a finished run whose model is registered as ``digits``."""

    def submit(note="", seeds=(0,), **deploy):
        stages = {
            "distill": {"kind": "toystudent", "config": {"bundle": str(served_folder), "note": note}},
            "deploy": {
                "kind": "deploy",
                "inputs": {"student": "${stages.distill}"},
                "config": {"register_as": "digits", **deploy},
            },
        }
        spec = pipeline(stages, seeds)
        outcome, run = go(spec, store)
        assert outcome.status == "finished"
        assert sync(run, store, tracking_uri(spec, store)).complete
        return run

    return submit


def student(run, seed=0):
    return run.artifacts()[f"distill/seed={seed}"]


def test_an_alias_is_served(deployed, store, served_model):
    run = deployed(seeds=(3, 4), alias="best")
    for source in ("models:/digits@best", "models:/digits/1"):
        assert locate(source, store.url).version in {student(run, 3), student(run, 4)}
    model = ServedModel.load("models:/digits@best", store.url)
    assert model.info.name == "digits" and model.info.version == student(run, 3)  # the first seed's
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.predict(images), served_model.predict(images))
    for source in ("models:/digits@worst", "models:/letters@best", "models:/digits/9"):
        with pytest.raises(NotFoundError, match="not in the registry"):
            locate(source, store.url)


def test_the_alias_follows_the_last_deployment_and_nothing_is_registered_twice(deployed, store):
    first, second = deployed("one"), deployed("two")
    client = connect(tracking_uri(None, store))

    def picture():
        found = client.search_model_versions("name = 'digits'")
        return {version.tags["moepipe.artifact"]: version.version for version in found}

    versions = picture()
    assert set(versions) == {student(first), student(second)}
    assert locate("models:/digits@candidate", store.url).version == student(second)
    state_path(store, first.id).unlink()
    sync(first, store, tracking_uri(None, store))  # an old run is written once more: it does not take the alias back
    assert locate("models:/digits@candidate", store.url).version == student(second) and picture() == versions
    again = deployed("one")  # all hits, but deployed now
    assert student(again) == student(first)
    assert locate("models:/digits@candidate", store.url).version == student(first) and picture() == versions


def test_mlflow_itself_can_load_what_is_registered(deployed, store, served_model):
    import mlflow

    deployed()
    mlflow.set_tracking_uri(tracking_uri(None, store))
    model = mlflow.pyfunc.load_model("models:/digits@candidate")
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 1, 28, 28)
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.from_numpy(model.predict(images.numpy())), served_model.predict(images))


def test_without_a_name_nothing_is_registered(deployed, store):
    deployed(register_as=None)
    assert connect(tracking_uri(None, store)).search_registered_models() == []
