"""What the routers of a trained network do with the images of each domain and class, and where it looks.

GMoE (arXiv 2206.04046, section 5 and appendix) and EMoE (arXiv 2310.10908, section 5) ask whether experts specialise in
domains or classes. Here the answer is a table per sparse layer, with the mutual information between group and expert;
and, for transformers, the attention of the class token in the last block (mean over heads) on one image per domain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.domainbed.environments import EnvironmentSet, IntArray

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUTING, ATTENTION = "routing.json", "attention.png"
_BATCH = 32


def routing_tables(module: nn.Module, data: EnvironmentSet, rows: Sequence[IntArray]) -> dict[str, Any]:
    """Layer -> record of its routing (:class:`moe.routing_stats.RoutingReport` as plain values).

    Args:
        module: the network, in evaluation mode; empty result for one without experts.
        data: the environments.
        rows: of each environment that are looked at.
    """
    from moe.models.surgery import moe_layers
    from moe.routing_stats import RoutingStats

    layers = moe_layers(module)
    classes = [str(number) for number in range(data.classes)]
    stats = {name: RoutingStats(layer.num_experts, data.labels, classes) for name, layer in layers.items()}
    random = np.random.default_rng(0)
    device = next(module.parameters()).device
    with torch.inference_mode():
        for number, (environment, chosen) in enumerate(zip(data.environments, rows, strict=True)):
            for begin in range(0, len(chosen) if layers else 0, _BATCH):
                part = chosen[begin : begin + _BATCH]
                module(environment.batch(part, False, random).to(device))
                label = torch.from_numpy(environment.labels[part])
                for name, layer in layers.items():
                    if layer.last is not None:
                        domain = torch.full_like(label, number)
                        stats[name].add(layer.last.routing, layer.last.scores_NE, domain, label)
    return {name: json.loads(value.report().to_json()) for name, value in stats.items()}


def class_attention(module: nn.Module, images: Tensor) -> NDArray[np.float64] | None:
    """Attention of the class token to the patches in the last block, mean over heads ``[B, h, w]``, if any."""
    from timm.models.vision_transformer import VisionTransformer

    from moe.models.vit import run_vit

    vit = next((part for part in module.modules() if isinstance(part, VisionTransformer)), None)
    if vit is None or not vit.num_prefix_tokens:
        return None
    last = len(vit.blocks) - 1
    with torch.inference_mode():
        maps = run_vit(vit, images, attention_maps=[last]).maps[last]
    to_patches = maps.mean(1)[:, 0, vit.num_prefix_tokens :]
    height, width = vit.patch_embed.grid_size
    return np.asarray(to_patches.reshape(-1, height, width).double().cpu().numpy())


def write_routing(module: nn.Module, data: EnvironmentSet, rows: Sequence[IntArray], folder: Path) -> bool:
    """Write ``routing.json`` (when there are experts) and ``attention.png`` (when there is a class token).

    Returns:
        Whether there was any of the two.
    """
    from workers.domainbed.figures import attention_grid

    tables = routing_tables(module, data, rows)
    if tables:
        (folder / ROUTING).write_text(json.dumps({"domains": list(data.labels), "layers": tables}, sort_keys=True))
    random = np.random.default_rng(0)
    firsts = [e.batch(chosen[:1], False, random) for e, chosen in zip(data.environments, rows, strict=True)]
    images = torch.cat(firsts).to(next(module.parameters()).device)
    maps = class_attention(module, images)
    if maps is not None:
        (folder / ATTENTION).write_bytes(attention_grid(images.cpu().numpy(), maps, data.labels))
    return bool(tables) or maps is not None
