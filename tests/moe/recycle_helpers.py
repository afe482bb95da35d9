"""Small predecessors, successors and statistics for the tests of checkpoint recycling."""

from functools import cache

import timm
import torch
from hypothesis import settings

from moe.conversion.recycle.layout import BLOCK_AXES
from moe.conversion.recycle.record import StatisticsRecord

few = settings(max_examples=25, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vit(dim=16, depth=3, heads=2, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", embed_dim=dim, depth=depth, num_heads=heads, img_size=32, num_classes=5, **options
    )


@cache
def shapes(dim, depth):
    return {name: tuple(value.shape) for name, value in vit(dim, depth).state_dict().items()}


def dense_state(dim=16, depth=3, seed=0):
    """A predecessor whose vectors are not trivial."""
    names = shapes(dim, depth)
    return {n: torch.randn(shape, generator=seeded(seed + i)) for i, (n, shape) in enumerate(names.items())}


def successor_state(dim=8, depth=3, core=2, universal=3, hidden=None, blocks=(1, 2), factor=0.25):
    """Tensors of a SpheroMoE vision transformer with average pooling."""
    hidden = hidden or 4 * dim
    state = {}
    for name, value in dense_state(dim, depth, seed=9).items():
        if not any(name.startswith(f"blocks.{block}.mlp") for block in blocks):
            state[name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name] = value
    for block in blocks:
        mlp = f"blocks.{block}.mlp"
        state |= {f"{mlp}.phi": torch.randn(core + universal, 1, dim), f"{mlp}.scales.0": torch.tensor(0.5)}
        state |= {f"{mlp}.slot_norm.weight": torch.ones(dim), f"{mlp}.slot_norm.bias": torch.zeros(dim)}
        for family, count, size in (("core", core, hidden), ("univ", universal, int(hidden * factor))):
            experts = f"{mlp}.{family}_experts"
            state[f"{experts}.vit_fc1.weight"] = torch.zeros(count, size, dim)
            state[f"{experts}.vit_fc1.bias"] = torch.zeros(count, size)
            state[f"{experts}.vit_fc2.weight"] = torch.zeros(count, dim, size)
            state[f"{experts}.vit_fc2.bias"] = torch.zeros(count, dim)
    return state


def record(dim=16, depth=3, hidden=None, seed=0):
    """Random statistics of all places and metrics."""
    values = {}
    for place, width in (("norm2", dim), ("attn_proj", dim), ("mlp_act", hidden or 4 * dim)):
        for i, metric in enumerate(("L1", "L2", "act_patrn")):
            draws = torch.rand(depth, width, generator=seeded(seed + i)) + 0.1
            values[place, metric] = dict(enumerate(draws))
        fires = (torch.rand(depth, 60, width, generator=seeded(seed)) > 0.5).float()
        values[place, "co_act"] = dict(enumerate((fires.transpose(1, 2) @ fires).float()))
    return StatisticsRecord(values)


def successor_state_of_width(dim, hidden):
    """A successor of any width, without timm's demands on heads."""
    state = {}
    for block in range(3):
        for name, axes in BLOCK_AXES.items():
            plain = name in BLOCK_AXES and not any(
                part in name for part in ("_proj", "attn.norm", "ls", "fc1_", "mlp.norm")
            )
            if plain and not (block and name.startswith("mlp")):
                sizes = {"c": dim, "a": dim, "q": 3 * dim, "m": hidden}
                state[f"blocks.{block}.{name}"] = torch.zeros(*(sizes[axis] for axis in axes))
        if block:
            for family, count in (("core", 2), ("univ", 3)):
                prefix = f"blocks.{block}.mlp.{family}_experts.vit_"
                state |= {
                    f"{prefix}fc1.weight": torch.zeros(count, hidden, dim),
                    f"{prefix}fc1.bias": torch.zeros(count, hidden),
                }
                state |= {
                    f"{prefix}fc2.weight": torch.zeros(count, dim, hidden),
                    f"{prefix}fc2.bias": torch.zeros(count, dim),
                }
    return state


def ffn(x, w1, b1, w2, b2):
    return torch.nn.functional.gelu(x @ w1.T + b1) @ w2.T + b2
