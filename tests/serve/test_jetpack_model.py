"""A fine-tuned SpheroMoE network behind the endpoint computes what was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe.adaptation.base import make
from moe.errors import NotFoundError, SpecError
from orchestrator.artifacts import MANIFEST, describe_folder
from serve.delta import Delta
from serve.model import ServedModel
from tests.workers.test_jetpack_pipeline import data, recycle, statistics, train  # noqa: F401  (two are fixtures)
from workers.context import Input
from workers.data import open_data
from workers.jetpack_recycle import open_network


def with_manifest(artifact: Input, kind: str = "jetpack_run") -> str:
    """The artifact's folder as the store keeps it."""
    manifest = describe_folder(artifact.path, kind, artifact.meta).manifest()
    (artifact.path / MANIFEST).write_bytes(manifest)
    return str(artifact.path)


@pytest.fixture(scope="module")
def tuned(data, statistics, tmp_path_factory) -> Input:  # noqa: F811
    start = recycle(tmp_path_factory.mktemp("start"), data, {"recycle": {}}, statistics)
    return train(tmp_path_factory.mktemp("run"), data, start, normalisation="imagenet")


@pytest.fixture(scope="module")
def served(tuned) -> ServedModel:
    return ServedModel.load(with_manifest(tuned))


def test_predictions_are_those_of_the_trained_network(served, tuned, data):  # noqa: F811
    pictures = open_data(data, data.path).images
    raw = [np.asarray(pictures[row]) for row in range(12)]
    images = served.preprocess(raw)
    expected = open_network(tuned)(images)
    assert torch.equal(served.predict(images), expected)
    assert torch.allclose(served.predict(images[:1]), expected[:1], atol=1e-6)  # no row depends on another
    assert served.info.channels == 3 and served.info.image_size == (32, 32)
    assert served.info.transform["normalisation"] == "imagenet"
    assert len(served.info.class_names) == served.info.outputs == 3


def test_a_state_is_a_delta_of_its_norms(served):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adapted = make("tent", {}).adapt(served.private_base(), images)
    delta = Delta.changed(served.state_dict(), adapted.delta)
    assert len(delta) and all("norm" in name for name in delta.tensors)
    mixed = served.predict(images[:2], [None, delta])
    assert torch.allclose(mixed[0], served.predict(images[:1])[0], atol=1e-5)
    assert torch.allclose(mixed[1], served.predict(images[1:2], delta)[0], atol=1e-5)
    assert not torch.allclose(mixed[1], served.predict(images[1:2])[0], atol=1e-6)


def test_noise_of_official_parity_is_not_served(data, tmp_path):  # noqa: F811
    start = recycle(tmp_path / "start", data, {}, parity="official")
    made = train(tmp_path / "run", data, start, parity="official")
    assert made.meta["spec"]["moe"]["noise_in_eval"]
    served = ServedModel.load(with_manifest(made))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(served.predict(images), served.predict(images))
    network = open_network(made)
    assert not torch.equal(network(images), network(images))


def test_what_cannot_be_served_is_named(data, tmp_path):  # noqa: F811
    start = recycle(tmp_path / "start", data, {})
    with pytest.raises(SpecError, match="'jetpack_start', which cannot be served"):
        ServedModel.load(with_manifest(start, "jetpack_start"))
    bare = train(tmp_path / "run", data, start, save_model=False)
    with pytest.raises(NotFoundError, match="keeps no weights") as caught:
        ServedModel.load(with_manifest(bare))
    assert "save_model: true" in caught.value.hint
