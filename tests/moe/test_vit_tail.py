import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from moe.backbones import build_classifier
from moe.errors import SpecError
from moe.models.vit_tail import VitTail, front_tokens, tail_state
from moe.specs import BackboneSpec


def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=12, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=5).eval()


def test_front_and_tail_are_the_whole():
    model, images = vit(), torch.randn(2, 3, 12, 12)
    whole = model(images)
    tokens = front_tokens(model, 2, images)
    assert tokens.shape == (2, 8, 10, 1) and not tokens.requires_grad
    tail = VitTail(model, 2)
    torch.testing.assert_close(tail(tokens), whole)
    other = VitTail(vit(), 2)
    torch.manual_seed(1)
    torch.nn.init.normal_(other.head.weight)
    other.load_state_dict(tail_state(vit().state_dict(), 2))
    torch.testing.assert_close(other(tokens), whole)


@pytest.mark.parametrize("first", [0, 3, 9])
def test_blocks_that_are_not_there(first):
    with pytest.raises(SpecError, match=f"first_block={first} with 3 blocks"):
        VitTail(vit(), first)


def test_only_transformers_have_a_tail():
    with pytest.raises(SpecError, match="class token"):
        VitTail(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="first_block has no meaning for 'tiny_cnn'"):
        BackboneSpec(name="tiny_cnn", first_block=1)
    tail = build_classifier(BackboneSpec(name="timm:vit_tiny_patch16_224", first_block=11), 4)
    assert isinstance(tail, VitTail) and len(tail.blocks) == 1 and tail.head.out_features == 4
