"""Aggregator and token mask."""

import pytest
import torch

from moe.aggregator import Aggregator, mask_tokens
from moe.errors import SpecError


def aggregator(**options):
    torch.manual_seed(0)
    return Aggregator(12, 5, **{"heads": 3, **options})


def test_tokens_are_dropped_or_zeroed_per_sample():
    tokens = torch.arange(24.0).view(2, 3, 4)
    owners = torch.tensor([1, 0])
    assert torch.equal(mask_tokens(tokens, owners, "drop"), torch.stack([tokens[0, [0, 2]], tokens[1, [1, 2]]]))
    zeroed = mask_tokens(tokens, owners, "zero")
    assert zeroed[0, 1].abs().sum() == 0 and zeroed[1, 0].abs().sum() == 0
    assert torch.equal(zeroed[0, [0, 2]], tokens[0, [0, 2]]) and torch.equal(zeroed[1, 1:], tokens[1, 1:])
    assert mask_tokens(tokens, None, "none") is tokens
    assert mask_tokens(tokens[:, :1], torch.tensor([0, 0]), "drop").shape == (2, 0, 4)
    assert mask_tokens(tokens[:0], owners[:0], "drop").shape == (0, 2, 4)


@pytest.mark.parametrize(
    "owners, mode, message",
    [
        (torch.tensor([0, 3]), "drop", "3 experts"),
        (torch.tensor([-1, 0]), "zero", "from -1"),
        (None, "drop", "one owner per sample"),
        (torch.tensor([0]), "drop", "one owner per sample"),
        (torch.tensor([0, 1]), "dropp", "Did you mean 'drop'"),
    ],
)
def test_wrong_owners_are_refused(owners, mode, message):
    with pytest.raises(SpecError, match=message):
        mask_tokens(torch.zeros(2, 3, 4), owners, mode)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_order_of_experts_does_not_matter(pool, depth):
    model = aggregator(pool=pool, depth=depth).eval()
    tokens = torch.randn(4, 6, 12)
    a, b = model(tokens), model(tokens[:, torch.randperm(6)])
    torch.testing.assert_close(a.feat_BD, b.feat_BD)
    torch.testing.assert_close(a.logits_BK, b.logits_BK)


def test_layers_equal_torchs_own_attention():
    model = aggregator(depth=1).eval()
    x = torch.randn(3, 5, 12)
    state = model.state_dict()
    reference = torch.nn.TransformerEncoderLayer(
        12, 3, dim_feedforward=24, activation=torch.nn.functional.gelu, batch_first=True, norm_first=True
    ).eval()
    layer = "transformer.layers.0."
    names = {
        "self_attn.in_proj_weight": "0.fn.attend.in_proj_weight",
        "self_attn.in_proj_bias": "0.fn.attend.in_proj_bias",
        "self_attn.out_proj.weight": "0.fn.attend.out_proj.weight",
        "self_attn.out_proj.bias": "0.fn.attend.out_proj.bias",
        "norm1.weight": "0.norm.weight",
        "norm1.bias": "0.norm.bias",
        "norm2.weight": "1.norm.weight",
        "norm2.bias": "1.norm.bias",
        "linear1.weight": "1.fn.net.0.weight",
        "linear1.bias": "1.fn.net.0.bias",
        "linear2.weight": "1.fn.net.3.weight",
        "linear2.bias": "1.fn.net.3.bias",
    }
    reference.load_state_dict({ours: state[layer + theirs] for ours, theirs in names.items()})
    torch.testing.assert_close(model(x).feat_BD, reference(x).mean(1))


def test_attention_maps_on_request():
    model = aggregator(depth=2).eval()
    out = model(torch.randn(4, 5, 12), need_attention=True)
    assert out.attention_LBHEE.shape == (2, 4, 3, 5, 5)
    torch.testing.assert_close(out.attention_LBHEE.sum(-1), torch.ones(2, 4, 3, 5))
    assert model(torch.randn(4, 5, 12)).attention_LBHEE is None


def test_dropout_acts_in_training_only():
    model, x = aggregator(dropout=0.5), torch.randn(2, 4, 12)
    assert not torch.equal(model.train()(x).feat_BD, model(x).feat_BD)
    assert torch.equal(model.eval()(x).feat_BD, model(x).feat_BD)


def test_wrong_shapes_are_refused():
    with pytest.raises(SpecError, match=r"heads=5 does not divide.*\[1, 2, 3, 4, 6, 12\]"):
        aggregator(heads=5)
    with pytest.raises(SpecError, match="pooling 'median'"):
        aggregator(pool="median")
    with pytest.raises(SpecError, match="no expert to look at"):
        aggregator()(torch.zeros(2, 0, 12))
