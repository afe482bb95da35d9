"""The set behind a frozen front; needs the real weights below MOEPIPE_DATA, like tests of other packaged weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.backbones import build_classifier
from moe.errors import SpecError
from moe.specs import BackboneSpec
from workers.data import load_data, parse_options
from workers.packaged_weights import find
from workers.transforms import Transform, TransformSpec
from workers.weights import load_pretrained

ROOT = Path(os.environ.get("MOEPIPE_DATA", ".moepipe/data"))


def test_options_are_checked():
    with pytest.raises(SpecError, match="not itself"):
        parse_options("frozen_vit", {"source": "frozen_vit"})
    with pytest.raises(SpecError, match="multiple of 14"):
        parse_options("frozen_vit", {"image_size": 40})


@pytest.mark.slow
@pytest.mark.skipif(find("vit_small_focus", ROOT) is None, reason="the weights of vit_small_focus are not there")
def test_tail_on_token_maps_is_the_whole_network(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "packages").symlink_to(ROOT.absolute() / "packages")
    source = {"target": "mfeat"}
    options = {"source": "digits5", "source_options": source, "image_size": 14, "first_block": 11}
    data = load_data("frozen_vit", options, tmp_path)
    plain = load_data("digits5", source, tmp_path)
    assert data.info.image_size == (2, 1) and len(data.images) == len(plain.images) and data.digest != plain.digest
    tail_spec = BackboneSpec(name="vit_small_focus", pretrained=True, image_size=14, first_block=11)
    whole_spec = tail_spec.model_copy(update={"first_block": None})
    tail, whole = build_classifier(tail_spec, 10).eval(), build_classifier(whole_spec, 10).eval()
    load_pretrained(tail_spec, tail, tmp_path)
    load_pretrained(whole_spec, whole, tmp_path)
    whole.head.load_state_dict(tail.head.state_dict())
    transform = Transform(TransformSpec(normalisation="imagenet", size=(14, 14), channels=3))
    with torch.no_grad():
        theirs = whole(transform.batch([np.asarray(plain.images[row]) for row in range(4)]))
        ours = tail(torch.from_numpy(np.stack([data.images[row] for row in range(4)])))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # token maps are float16
    assert load_data("frozen_vit", options, tmp_path).digest == data.digest
