"""A real, tiny Meta-DMoE model made in seconds: digits of scikit-learn, one domain an angle.

Three experts (0, 30 and 60 degrees), an aggregator, a student trained on all three, whose head the
aggregator shares so that their features mean the same; written as a bundle. Held-out domains are other angles.
Meta-distillation itself is left out: it needs minutes, and serving does not care.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from moe.aggregator import Aggregator
from moe.backbones import build_classifier, build_student, classifier_to_student
from moe.specs import BackboneSpec
from serve.loading import Network, Parts, write_bundle
from workers.modelfile import MODEL_FILE, model_meta, save_aggregator, save_tensors
from workers.transforms import Transform, TransformSpec

ANGLES = (0, 30, 60)
BACKBONE = BackboneSpec(name="tiny_cnn", channels=1, width=4)
DATASET = "rotated14"
AGGREGATOR = {"dim": 64, "num_outputs": 10, "heads": 4, "dropout": 0.0, "plain_head": True}
ADAPTATION = {"inner_lr": 2e-3, "inner_steps": 3, "adapt": "all", "support": 64}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TRANSFORM = Transform(TransformSpec(normalisation="unit", size=(28, 28), channels=1))


@cache
def domain(angle: int) -> tuple[np.ndarray, np.ndarray]:
    """All 1797 digits turned by ``angle`` degrees: uint8 ``[N, 28, 28, 1]`` and int64 ``[N]``."""
    digits = load_digits()
    raw = np.round(digits.images * (255 / 16)).astype(np.uint8)
    turned = [np.asarray(Image.fromarray(i).resize((28, 28), 2).rotate(angle, 2)) for i in raw]
    return np.stack(turned)[..., None], digits.target.astype(np.int64)


def held_out(angle: int, count: int = 64, offset: int = 1400) -> tuple[list[np.ndarray], np.ndarray]:
    """Images ``[28, 28, 1]`` and labels that no network was trained on."""
    images, labels = domain(angle)
    return list(images[offset : offset + count]), labels[offset : offset + count]


def make_bundle(folder: Path, seed: int = 0) -> Path:
    """Train everything and write the bundle to ``folder``; a few seconds on one core."""
    torch.manual_seed(seed)
    sets = [
        (_TRANSFORM.batch(images[:1200]), torch.from_numpy(labels[:1200])) for images, labels in map(domain, ANGLES)
    ]
    experts = [_classifier([data], 60) for data in sets]
    frozen = [_view(expert) for expert in experts]
    student = _view(_classifier(sets, 120))
    with torch.no_grad():
        tokens = [torch.stack([expert.extract(x) for expert in frozen], 1) for x, _ in sets]
    aggregator = Aggregator(**AGGREGATOR)
    aggregator.mlp[1].load_state_dict(student.classifier[0].state_dict())  # its features mean what the student's mean
    optimiser = torch.optim.Adam(aggregator.transformer.parameters(), 4e-3)
    for _ in range(150):
        number = int(torch.randint(len(sets), ()))
        rows = torch.randint(1200, (64,))
        loss = F.cross_entropy(aggregator(tokens[number][rows]).logits_BK, sets[number][1][rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return _write(folder, student, aggregator.eval(), experts)


def _classifier(sets, steps):
    model = build_classifier(BACKBONE, 10).train()
    optimiser = torch.optim.Adam(model.parameters(), 4e-3)
    for step in range(steps):
        x, y = sets[step % len(sets)]
        rows = torch.randint(len(y), (64,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for layer in layers:  # statistics of the finished weights, not of the way there
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad():
        for x, _ in sets:
            model(x[:400])
    return model.eval()


def _view(classifier):
    student = build_student(BACKBONE, 10)
    student.load_state_dict(classifier_to_student(BACKBONE, classifier.state_dict()))
    return student.eval()


def _write(folder: Path, student, aggregator, experts) -> Path:
    work = folder.parent / f".{folder.name}-parts"
    save_tensors(work / "student" / MODEL_FILE, student.state_dict())
    save_aggregator(work / "student", aggregator)
    networks = []
    for number, expert in enumerate(experts):
        save_tensors(work / str(number) / MODEL_FILE, expert.state_dict())
        networks.append(Network(work / str(number), model_meta("classifier", BACKBONE, 10, 64, DATASET)))
    meta = {
        **model_meta("student", BACKBONE, 10, 64, DATASET),
        "image_size": 28,
        "aggregator": AGGREGATOR,
        "adaptation": dict(ADAPTATION),
    }
    write_bundle(Parts("digits", "", Network(work / "student", meta), networks, class_names=NAMES), folder)
    return folder
