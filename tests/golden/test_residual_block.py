"""``expert_train`` with ``toy_res_block``, of which no case is stored: torchvision's own block is the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock

from tests.golden.registry import ADAPTERS, load_adapters
from tests.golden.toys import toy_classifier, toy_student

STEM, DIM, CLASSES, PER_EPOCH, EPOCHS = 4, 8, 3, 4, 2
load_adapters()


class Reference(nn.Module):
    """conv1, bn1, one torchvision stage, fc, under torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        shortcut = nn.Sequential(nn.Conv2d(STEM, DIM, 1, stride=2, bias=False), nn.BatchNorm2d(DIM))
        self.layer1 = nn.Sequential(BasicBlock(STEM, DIM, stride=2, downsample=shortcut))
        self.fc = nn.Linear(DIM, CLASSES)

    def forward(self, x):
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).mean(dim=(2, 3)))


@pytest.fixture
def reference():
    torch.manual_seed(3)
    return Reference()


def test_names_are_torchvisions(reference):
    own = toy_classifier("toy_res_block", STEM, DIM, CLASSES).state_dict()
    theirs = reference.state_dict()
    assert list(own) == list(theirs) and "layer1.0.downsample.0.weight" in own
    student = toy_student("toy_res_block", STEM, DIM, CLASSES).state_dict()
    assert "features.3.0.conv2.weight" in student


def test_expert_train(reference):
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(6, 3, 16, 16, generator=generator) for _ in range(PER_EPOCH)]
    labels = [torch.randint(CLASSES, (6,), generator=generator) for _ in range(PER_EPOCH)]
    tensors = {f"in.x.{i}": x for i, x in enumerate(images)} | {f"in.y.{i}": y for i, y in enumerate(labels)}
    tensors |= {"in.val_x.0": images[0], "in.val_y.0": labels[0]}
    tensors["in.val_metadata.0"] = torch.zeros(6, 9, dtype=torch.int64)
    tensors |= {f"w.model.{name}": value.clone() for name, value in reference.state_dict().items()}
    params = {
        "backbone": "toy_res_block",
        "batch_size": 6,
        "batches_per_epoch": PER_EPOCH,
        "dataset": "iwildcam",
        "decay_rate": 0.9,
        "dim": DIM,
        "lr": 0.002,
        "metric_names": ["accuracy", "macro_f1"],
        "num_classes": CLASSES,
        "num_epochs": EPOCHS,
        "schedule": "exponential_per_epoch",
    }
    outputs = ADAPTERS["meta_dmoe.expert_train"]({"params": params}, tensors)

    optimizer = torch.optim.Adam(reference.parameters(), lr=0.002)
    losses = []
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = 0.002 * 0.9**epoch
        for x, y in zip(images, labels, strict=True):
            loss = cross_entropy(reference.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(outputs["out.loss"], torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(outputs[f"out.final.{name}"], value, rtol=1e-4, atol=1e-5)
