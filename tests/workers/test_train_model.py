"""Supervised training: learns, resumes exactly, selects, writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moe.aggregator import Aggregator
from moe.backbones import build_student
from moe.errors import Interrupted
from moe.specs import BackboneSpec, StudentMoESpec
from tests.workers.test_loop import Recorder
from tests.workers.toy import distill_job, toy_data
from workers.aggregate import train_aggregator
from workers.batches import DomainSampler, ImageReader
from workers.features import FeatureTable
from workers.modelfile import load_aggregator, load_tensors
from workers.settings import TrainSettings
from workers.train_model import evaluate_rows, supervised_loss, train_model
from workers.transforms import transform_for

DATA = toy_data()


def changed(**values) -> TrainSettings:
    return TrainSettings(**{**SETTINGS.model_dump(), **values})


SETTINGS = TrainSettings(batch_size=16, epochs=5, lr=2e-2, checkpoint_every=4, cadence="halves")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 16, 3),
    )


def train(tmp_path, settings=SETTINGS, reporter=None, data=DATA, name="a", **extra):
    both = tuple(transform_for(data.info, settings.image_size, train=train) for train in (True, False))
    return train_model(
        settings,
        data,
        data.splits["train"],
        data.splits["val"],
        network(),
        reporter or Recorder(),
        tmp_path / f"scratch-{name}",
        tmp_path / name,
        seed=5,
        transforms=both,
        **extra,
    )


def score_file(path, data=DATA):
    net = network()
    net.load_state_dict(load_tensors(path))
    net.eval()
    reader = ImageReader(data.images, transform_for(data.info, None, train=False))
    return evaluate_rows(net, data, data.splits["val"], reader, 64, torch.device("cpu"))


def test_it_learns_and_writes_the_state_that_scored_best(tmp_path):
    result = train(tmp_path)
    assert result.scores["accuracy"] > 0.8
    assert result.scores["accuracy"] == max(e.scores["accuracy"] for e in result.fit.evaluations)
    assert score_file(tmp_path / "a" / "model.safetensors") == result.scores


def test_an_interrupted_run_writes_the_same_bytes(tmp_path):
    train(tmp_path, name="whole")
    for stop in (1, 3):
        with pytest.raises(Interrupted):
            train(tmp_path, name="cut", reporter=Recorder(stop_after=stop))
    train(tmp_path, name="cut")
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut


def test_the_last_state_can_be_chosen(tmp_path):
    result = train(tmp_path, changed(select="last"))
    assert result.step == result.fit.steps - 1
    assert score_file(tmp_path / "a" / "model.safetensors") == result.scores


def test_micro_batches_and_loader_threads_keep_the_order_of_batches(tmp_path):
    class OnDisk:
        def __len__(self):
            return len(DATA.images)

        def __getitem__(self, row):
            return DATA.images[row]

    decoded = dataclasses.replace(DATA, images=OnDisk())
    train(tmp_path, name="memory")
    train(tmp_path, changed(loader_threads=2), data=decoded, name="threads")
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == (
        tmp_path / "threads" / "model.safetensors"
    ).read_bytes()
    pieces = train(tmp_path, changed(micro_batch=5), name="pieces")
    assert pieces.scores["accuracy"] > 0.6


def test_official_selection_writes_the_last_state_when_no_score_exceeds_zero(tmp_path):
    labels = np.full_like(DATA.labels, 2)
    labels[DATA.splits["val"]] = 0
    hopeless = dataclasses.replace(DATA, labels=labels)
    settings = changed(parity="official", epochs=2)
    result = train(tmp_path, settings, data=hopeless)
    assert result.fit.best is None and result.scores["accuracy"] == 0.0
    assert (tmp_path / "a" / "model.safetensors").exists()


@pytest.mark.parametrize("schedule", ["cosine", "constant", "exponential"])
def test_schedules(tmp_path, schedule):
    reporter = Recorder()
    train(tmp_path, changed(schedule=schedule, warmup_epochs=1, epochs=2), reporter)
    rates = [values["lr"] for _, values in reporter.progressed if "lr" in values]
    expected = {
        "cosine": [0.0, 2e-2 / 6, 4e-2 / 6],
        "constant": [2e-2] * 3,
        "exponential": [2e-2] * 3,
    }
    assert rates[:3] == pytest.approx(expected[schedule])
    assert rates[6] == pytest.approx({"cosine": 2e-2, "constant": 2e-2, "exponential": 2e-2 * 0.96}[schedule])


def test_the_head_may_have_its_own_rate(tmp_path):
    reporter = Recorder()
    train(tmp_path, changed(head_lr=0.5, epochs=1), reporter)
    assert reporter.progressed[0][1]["lr/head"] == 0.5 and reporter.progressed[0][1]["lr/body"] == 2e-2


def test_steps_bound_the_epochs(tmp_path):
    assert train(tmp_path, changed(steps=7)).fit.steps == 7
    assert train(tmp_path, changed(epochs=None, steps=9), name="b").fit.steps == 9


def test_domains_can_be_drawn_equally_often():
    rows, domains = np.arange(100), np.repeat([0, 1], [95, 5])
    sampler = DomainSampler(rows, domains, 50, seed=1)
    drawn = np.concatenate([sampler.batch(step) for step in range(20)])
    assert abs(np.mean(drawn >= 95) - 0.5) < 0.05
    assert np.array_equal(sampler.batch(3), DomainSampler(rows, domains, 50, seed=1).batch(3))
    assert sampler.steps_per_epoch == 2


def aggregate(tmp_path, name="aggregator", reporter=None, **values):
    job = distill_job(tmp_path)
    data = toy_data(size=12)
    torch.manual_seed(3)
    settings = TrainSettings(batch_size=16, epochs=8, lr=3e-3, cadence="epoch", checkpoint_every=4, **values)
    return train_aggregator(
        settings,
        data,
        data.splits["train"],
        data.splits["val"],
        Aggregator(32, 3, heads=4),
        FeatureTable([Path(path) for path in job["features"]]),
        reporter or Recorder(),
        tmp_path / f"{name}-scratch",
        tmp_path / name,
        seed=2,
    )


def test_the_aggregator_learns_from_cached_features_alone(tmp_path):
    result = aggregate(tmp_path)
    first, last = result.fit.evaluations[0].scores["accuracy"], result.scores["accuracy"]
    assert last > 0.7 and last >= first
    loaded = load_aggregator(tmp_path / "aggregator", {"aggregator": {"dim": 32, "num_outputs": 3, "heads": 4}})
    assert not loaded.training


def test_interrupted_aggregator_training_writes_the_same_bytes(tmp_path):
    aggregate(tmp_path, "whole")
    with pytest.raises(Interrupted):
        aggregate(tmp_path, "cut", Recorder(stop_after=2))
    aggregate(tmp_path, "cut")
    whole, cut = ((tmp_path / n / "aggregator.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut


def test_an_moe_student_learns_its_balance_loss(tmp_path):
    student = build_student(BackboneSpec(name="tiny_cnn", channels=1, width=2), 3, StudentMoESpec(num_experts=2))
    images, labels = torch.rand(6, 1, 12, 12), torch.arange(6) % 3
    losses = supervised_loss("multiclass")(student, (images, labels))
    assert losses.total.item() == pytest.approx((losses.parts["task"] + 0.01 * losses.parts["balance"]).item())
    losses.total.backward()
    assert student.moe.gate.weight.grad.abs().max() > 0
