"""Random numbers of a layer, injected: noise and keep masks, so that a pass can be repeated exactly.

A layer draws from torch's generator what it is not given. :func:`injected` hands draws to a whole network, by module
name and in the order of execution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from moe.errors import SpecError


@dataclass(frozen=True)
class Draws:
    """Random numbers of one call of a layer.

    Attributes:
        noise: standard normal numbers of the routing scores' shape; None: drawn where needed.
        masks: by name (``expert_drop``, ``core_experts.drop_1``, ...): 1 keeps and 0 drops; ``logit_drop``: 1 masks.
    """

    noise: Tensor | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def below(self, name: str) -> Draws:
        """The masks of the child ``name``, without its name."""
        prefix = f"{name}."
        return Draws(None, {k.removeprefix(prefix): v for k, v in self.masks.items() if k.startswith(prefix)})


NO_DRAWS = Draws()
"""Nothing injected."""


def dropout(x: Tensor, rate: float, training: bool, mask: Tensor | None = None) -> Tensor:
    """Dropout with an optional keep mask that broadcasts to ``x``."""
    if not training or rate == 0:
        return x
    if mask is not None:
        return x * (mask / (1 - rate)).to(x.dtype)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate, True)
    keep, kept_rate = _keep_mask(x, rate)
    return x * keep.to(x.dtype).mul_(1 / kept_rate)


def _keep_mask(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """A random boolean mask of the shape of ``x``, and the exact chance of True.

    Four 16-bit numbers are cut out of each 64-bit draw: several times faster on a CPU than a Bernoulli draw per entry.
    The chance is a multiple of 2^-16, at least one of them; results are scaled by the chance itself.
    """
    threshold = max(1, round((1 - rate) * 65536))
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) < threshold - 32768
    return keep, threshold / 65536


def drop_samples(x: Tensor, rate: float, training: bool, mask_B: Tensor | None = None) -> Tensor:
    """Drop whole samples (stochastic depth) and divide the others by the keep rate.

    Args:
        x: ``[B, ...]``.
        rate: chance to drop a sample.
        training: nothing happens otherwise.
        mask_B: keep mask; drawn when None.
    """
    if not training or rate == 0:
        return x
    if mask_B is None:
        mask_B = torch.empty(x.shape[0], device=x.device).bernoulli_(1 - rate)
    return x * (mask_B / (1 - rate)).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


@contextmanager
def injected(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    noise: Sequence[Tensor] = (),
    masks: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Within this context, ``model`` uses these random numbers instead of drawing.

    Args:
        model: the network.
        layers: its layers that take a keyword ``draws``, by name (``slot_layers(model)``); one that several blocks
            share is listed under each name, in order of execution.
        noise: one tensor per executed layer, in order; empty: drawn.
        masks: by full name: of a layer's draws (``blocks.6.mlp.core_experts.drop_1``) or of a stochastic-depth module
            (``blocks.6.drop_path1``, shape [B]).

    Raises:
        SpecError: a mask fits nothing, or there are fewer noise tensors than executed layers.
    """
    masks = dict(masks or {})
    queue = iter(noise) if len(noise) else None
    handles = []
    calls: dict[int, tuple[nn.Module, list[dict[str, Tensor]]]] = {}
    for name, layer in layers.items():
        own = {key.removeprefix(f"{name}."): masks.pop(key) for key in list(masks) if key.startswith(f"{name}.")}
        calls.setdefault(id(layer), (layer, []))[1].append(own)
    for layer, own_masks in calls.values():
        hook = partial(_give, queue=queue, masks=cycle(own_masks))
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    for name, module in model.named_modules():
        if isinstance(module, DropPath) and name in masks:
            handles.append(module.register_forward_hook(partial(_redo, mask_B=masks.pop(name))))
    try:
        if masks:
            raise SpecError(f"No module takes the masks {', '.join(sorted(masks))}.", "Check the names.")
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give(
    module: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    queue: Iterator[Tensor] | None,
    masks: Iterator[Mapping[str, Tensor]],
) -> tuple[Any, dict[str, Any]]:
    noise = None
    if queue is not None:
        noise = next(queue, None)
        if noise is None:
            raise SpecError("There are fewer noise tensors than executed layers.", "Give one per layer, in order.")
    return args, {**kwargs, "draws": Draws(noise, next(masks))}


def _redo(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, mask_B: Tensor) -> Tensor:
    rate = float(getattr(module, "drop_prob", None) or 0.0)
    return drop_samples(args[0], rate, module.training, mask_B)
