"""An algorithm inside a supervised stage: the network it starts from, its updates, and what is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moe.backbones import build_student
from moe.errors import Interrupted, SpecError
from moe.models.emoe_blocks import converted_layers
from moe.models.surgery import moe_layers
from moe.specs import BackboneSpec
from orchestrator.stages.train import TrainConfig
from tests.workers.test_loop import Recorder
from tests.workers.toy import toy_data
from workers.algorithm_options import make_algorithm
from workers.batches import DomainSampler
from workers.context import Input
from workers.expert_features import expert_features
from workers.features import FEATURES
from workers.modelfile import MODEL_FILE, load_student, load_tensors, model_meta, save_tensors
from workers.networks import build_network
from workers.settings import AlgorithmBlock, TrainSettings
from workers.supervised import train_member
from workers.train_model import by_domain
from workers.transforms import Transform, TransformSpec, transform_for

DATA = toy_data()
DENSE = BackboneSpec(name="timm:test_vit", channels=1, image_size=32)
SPARSE = BackboneSpec(**{**DENSE.model_dump(), "gmoe": {"pattern": "every_two", "num_experts": 2, "projection": 8}})
EMOE = {"emoe": {"num_experts": 4, "top_k": 4, "restarts": 1, "gate_noise": 0.0}, "layers": [1], "drop_path": 0.0}
SETTINGS = TrainSettings(
    batch_size=12,
    steps=6,
    lr=1e-3,
    schedule="constant",
    cadence="steps",
    evaluate_every=3,
    sampling="balanced",
    checkpoint_every=2,
    image_size=32,
)


def method(name: str, backbone: BackboneSpec, **options: Any) -> Any:
    return make_algorithm(AlgorithmBlock(name=name, options=options), backbone, SETTINGS)


def dense_artifact(folder: Path) -> Any:
    torch.manual_seed(3)
    student = build_student(DENSE, 3)
    save_tensors(folder / MODEL_FILE, student.state_dict())
    return SimpleNamespace(
        path=folder, meta=model_meta("student", DENSE, 3, student.feature_dim, "toy")
    ), student.eval()


def context(folder: Path, reporter: Any = None) -> Any:
    found = reporter or Recorder()
    found.scratch, found.output, found.seed, found.threads = folder / "scratch", folder / "out", 7, 1
    found.data_root, found.metrics = folder, lambda values, step=None: None
    found.output.mkdir(parents=True, exist_ok=True)
    return found


def run(
    folder: Path, block: AlgorithmBlock | None, backbone: BackboneSpec, init: Any = None, reporter: Any = None
) -> Any:
    member = context(folder, reporter)
    return train_member(
        DATA, backbone, SETTINGS, member, splits=("train",), val_split="val", domains=None, init=init, algorithm=block
    )


def test_gmoe_starts_as_copies_of_the_dense_network_that_it_is_given(tmp_path):
    init, dense = dense_artifact(tmp_path)
    sparse = build_network(method("gmoe", SPARSE), 3, tmp_path, init)
    layers = moe_layers(sparse)
    assert layers
    for name, layer in layers.items():
        weight = dense.get_submodule(f"{name}.fc1").weight
        assert all(torch.equal(expert, weight) for expert in layer.experts.w1)
    assert torch.equal(sparse.classifier[0].weight, dense.classifier[0].weight)


def test_emoe_with_every_expert_is_the_dense_network_that_it_is_given(tmp_path):
    init, dense = dense_artifact(tmp_path)
    converted = build_network(method("emoe", DENSE, **EMOE), 3, tmp_path, init).eval()
    assert len(converted_layers(converted)) == 1
    x = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(converted(x), dense(x), rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path):
    init, _ = dense_artifact(tmp_path)
    other = DENSE.model_copy(update={"image_size": 48})
    with pytest.raises(SpecError, match="The network to start from"):
        build_network(method("erm", other), 3, tmp_path, init)


@pytest.mark.parametrize(("name", "backbone", "options"), [("gmoe", SPARSE, {}), ("emoe", DENSE, EMOE)])
def test_what_is_written_is_rebuilt_from_its_own_record(tmp_path, name, backbone, options):
    meta = run(tmp_path / "a", AlgorithmBlock(name=name, options=options), backbone)
    assert meta["form"] == "student"
    stored = load_student(tmp_path / "a/out", meta)
    assert moe_layers(stored) or converted_layers(stored)
    stopped = Recorder(stop_after=3)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", AlgorithmBlock(name=name, options=options), backbone, reporter=stopped)
    run(tmp_path / "b", AlgorithmBlock(name=name, options=options), backbone)
    assert (tmp_path / "a/out" / MODEL_FILE).read_bytes() == (tmp_path / "b/out" / MODEL_FILE).read_bytes()


def test_a_domain_algorithm_sees_its_batch_domain_by_domain(tmp_path):
    images, labels = torch.arange(5.0).reshape(5, 1, 1, 1), torch.arange(5)
    parts = by_domain(images, labels, np.array([2, 0, 2, 0, 1]))
    assert [part[1].tolist() for part in parts] == [[1, 3], [4], [0, 2]]
    run(tmp_path / "erm", AlgorithmBlock(name="erm"), DENSE)
    run(tmp_path / "coral", AlgorithmBlock(name="coral", options={"gamma": 10.0}), DENSE)
    one, two = (load_tensors(tmp_path / kind / "out" / MODEL_FILE) for kind in ("erm", "coral"))
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_plain_training_says_that_it_leaves_the_experts_balance_out(tmp_path):
    for name, block, told in (("plain", None, 1), ("gmoe", AlgorithmBlock(name="gmoe"), 0)):
        reporter = Recorder()
        run(tmp_path / name, block, SPARSE, reporter=reporter)
        assert sum("gmoe.aux_weight=0.01" in line for line in reporter.logs) == told


def test_balanced_batches_have_as_many_rows_of_every_domain():
    rows, domains = np.arange(40), np.repeat([0, 1, 2, 3], [20, 10, 5, 5])
    sampler = DomainSampler(rows, domains, 12, 0, balanced=True)
    for step in range(5):
        assert np.bincount(domains[sampler.batch(step)]).tolist() == [3, 3, 3, 3]
    with pytest.raises(SpecError, match="cannot be shared equally by 4"):
        DomainSampler(rows, domains, 10, 0, balanced=True)


def test_impossible_settings_are_refused_before_anything_runs():
    training = SETTINGS.model_dump()
    for block, changes, match in (
        ({"name": "meta_dmoe"}, {}, "not an algorithm that one supervised stage can run"),
        ({"name": "gmoe", "options": {"experts": 3}}, {}, "options of gmoe do not fit"),
        ({"name": "erm"}, {"micro_batch": 4}, "micro_batch cannot be combined"),
        ({"name": "erm"}, {"head_lr": 0.1}, "head_lr cannot be combined"),
        ({"name": "sma"}, {"ema_decay": 0.9}, "sma, which averages the weights"),
        ({"name": "swad"}, {"ema_decay": 0.9}, "swad, which averages the weights"),
        ({"name": "erm", "options": {"train": {"lr": 1.0}}}, {}, "stage's `training`"),
        ({"name": "erm", "options": {"backbone": {"name": "tiny_cnn"}}}, {}, "stage's `backbone`"),
        ({"name": "erm"}, {"drop_last": True}, "no meaning for sampling=balanced"),
    ):
        with pytest.raises(ValidationError, match=match):
            TrainConfig(backbone=SPARSE, training={**training, **changes}, algorithm=block)


def test_work_on_a_stored_network_goes_on_behind_the_preprocessing_of_its_record(tmp_path):
    init, _ = dense_artifact(tmp_path)
    options = {"splits": ("val",), "image_size": 32, "batch_size": 8, "dtype": "float32", "precision": "fp32"}

    def weights_and_features(name: str, own: Transform | None) -> tuple[bytes, bytes]:
        record = {} if own is None else {"transform": own.spec.model_dump(mode="json")}
        start = Input("", "", init.path, {**init.meta, **record})
        meta = run(tmp_path / name, None, DENSE, start)
        assert ("transform" in meta) == (own is not None) and {**meta, **record} == meta
        frozen = context(tmp_path / name / "frozen")
        expert_features(DATA, start, frozen, **options)
        return (tmp_path / name / "out" / MODEL_FILE).read_bytes(), (frozen.output / FEATURES).read_bytes()

    official = weights_and_features("none", None)
    assert weights_and_features("same", transform_for(DATA.info, 32, train=False)) == official
    other = weights_and_features("other", Transform(TransformSpec(normalisation="instance", size=(32, 32))))
    assert all(mine != theirs for mine, theirs in zip(other, official, strict=True))
