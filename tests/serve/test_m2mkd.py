"""A V-MoE that m2mKD tuned end to end, served as it is: from the run, with the scores and numbers of the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe.errors import CheckpointError
from serve.loading import locate
from serve.model import ServedModel
from tests.support.pipelines import go, pipeline
from tests.workers import toy
from tests.workers.test_m2mkd_pipeline import CIRCUIT, METHOD
from workers.context import Input
from workers.m2mkd_files import read_network
from workers.modelfile import MODEL_FILE, load_student


def stages(method):
    return {
        "data": {"kind": "prepare", "config": {"dataset": "toy"}},
        "tuned": {
            "kind": "m2mkd_train",
            "inputs": {"data": "${stages.data}"},
            "config": {"method": method, "phase": "e2e", "label": "m2mKD"},
        },
    }


@pytest.fixture
def run(store):
    toy.register()
    outcome, _ = go(pipeline(stages(METHOD)), store)
    assert outcome.status == "finished"
    return outcome


@pytest.mark.parametrize("method", [METHOD, CIRCUIT])
def test_one_file_goes_from_data_to_a_served_network(method, store):
    toy.register()
    deploy = {"kind": "deploy", "inputs": {"model": "${stages.tuned}"}, "config": {"name": "toys"}}
    outcome, found = go(pipeline({**stages(method), "deploy": deploy}), store)
    assert outcome.status == "finished"
    for source in (found.id, outcome.artifacts["deploy/seed=0"]):  # the run, and the deployment itself
        parts = locate(source, store.url)
        assert (parts.name, parts.version) == ("toys", outcome.artifacts["tuned/seed=0"])
    manifest = store.artifact(outcome.artifacts["deploy/seed=0"]).meta
    assert manifest["backbone"] == ("circuit" if method is CIRCUIT else "vmoe") and manifest["outputs"] == 3
    assert ServedModel.load(found.id, store_url=store.url).predict(torch.rand(2, 1, 12, 12)).shape == (2, 3)


def test_the_tuned_model_is_served_and_answers_as_in_the_pipeline(run, store):
    model = ServedModel.load(run.artifacts["tuned/seed=0"], store_url=store.url)
    artifact = store.artifact(run.artifacts["tuned/seed=0"])
    info = model.info
    assert (info.outputs, info.channels, info.image_size, info.task) == (3, 1, (12, 12), "multiclass")
    assert info.methods["tent"] is None and "no aggregator" in str(info.methods["distill"])
    data = toy.toy_data()
    rows = data.splits["val"]
    images = model.preprocess([np.asarray(data.images[int(row)]) for row in rows])
    logits = model.predict(images)
    own = read_network(Input("m", "", store.local_path(artifact), artifact.meta))
    with torch.no_grad():
        torch.testing.assert_close(logits, own(images), atol=1e-5, rtol=1e-4)
    accuracy = float((logits.argmax(1).numpy() == data.labels[rows]).mean())
    assert accuracy == pytest.approx(artifact.meta["scores"]["accuracy"], abs=1e-6)
    # A row does not depend on its neighbours, although rows share experts; and colour becomes grey.
    torch.testing.assert_close(model.predict(images[3:4]), logits[3:4], atol=1e-5, rtol=1e-4)
    grey = np.asarray(data.images[int(rows[0])])
    torch.testing.assert_close(model.preprocess([np.repeat(grey, 3, axis=2)]), images[:1], atol=0.02, rtol=0)
    assert locate(run.artifacts["tuned/seed=0"], store.url).student.meta["form"] == "vmoe"


def test_a_truncated_model_is_refused(store, run, tmp_path):
    artifact = store.artifact(run.artifacts["tuned/seed=0"])
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / MODEL_FILE).write_bytes((store.local_path(artifact) / MODEL_FILE).read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="truncated"):
        load_student(cut, artifact.meta)


def test_a_circuit_is_served_without_noise(store):
    toy.register()
    outcome, _ = go(pipeline(stages(CIRCUIT)), store)
    model = ServedModel.load(outcome.artifacts["tuned/seed=0"], store_url=store.url)
    artifact = store.artifact(outcome.artifacts["tuned/seed=0"])
    images = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    quiet = read_network(Input("m", "", store.local_path(artifact), artifact.meta), quiet=True)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(images), quiet(images), atol=1e-5, rtol=1e-4)
    assert torch.equal(model.predict(images), model.predict(images))


def test_a_record_without_a_backbone_is_named(tmp_path):
    for form in ("vit", "jetvit"):  # a module alone, or an artifact of an earlier version
        with pytest.raises(CheckpointError, match=f"'{form}' says no backbone"):
            load_student(tmp_path, {"form": form, "num_outputs": 3})
