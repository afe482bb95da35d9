"""Weights files of sparse vision transformers: dense ones are upcycled, official and own ones are read as they are."""

import pytest
import torch
from safetensors.torch import save_file

from moe.backbones import build_classifier
from moe.errors import CheckpointError
from moe.keymaps.gmoe import to_official
from moe.specs import BackboneSpec
from workers.weights import load_pretrained

DENSE = BackboneSpec(name="timm:vit_tiny_patch16_224", image_size=32)
SPARSE = BackboneSpec(name=DENSE.name, image_size=48, gmoe={"num_experts": 2, "projection": 8})


def network(spec, seed=0):
    torch.manual_seed(seed)
    return build_classifier(spec, 3)


def test_a_dense_file_is_upcycled_and_positions_are_resized(tmp_path):
    dense = network(DENSE)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    spec = SPARSE.model_copy(update={"pretrained": str(tmp_path / "dense.safetensors")})
    module = network(spec, 1)
    load_pretrained(spec, module)
    for expert in module.blocks[8].mlp.experts.w1:
        assert torch.equal(expert, dense.blocks[8].mlp.fc1.weight)
    assert torch.equal(module.pos_embed[:, 0], dense.pos_embed[:, 0]) and module.pos_embed.shape[1] == 10


@pytest.mark.parametrize("official", [True, False])
def test_sparse_files_are_read_as_they_are(tmp_path, official):
    source = network(SPARSE)
    state = to_official(source.state_dict()) if official else source.state_dict()
    # The official file holds more than the tensors.
    torch.save({"model_dict": state, "args": {"steps": 1}, "model_num_classes": 3}, tmp_path / "model.pth")
    spec = SPARSE.model_copy(update={"pretrained": str(tmp_path / "model.pth")})
    module = network(spec, 1)
    load_pretrained(spec, module)
    torch.testing.assert_close(module.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("victim", ["blocks.8.mlp.fc1.weight", "norm.bias"])
def test_what_is_missing_is_named_with_the_file(tmp_path, victim):
    state = network(DENSE).state_dict()
    del state[victim]
    save_file(state, tmp_path / "cut.safetensors")
    spec = SPARSE.model_copy(update={"pretrained": str(tmp_path / "cut.safetensors")})
    with pytest.raises(CheckpointError, match=rf"cut\.safetensors.*{victim}"):
        load_pretrained(spec, network(spec))
