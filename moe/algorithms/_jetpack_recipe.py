"""MoE Jetpack's fine-tuning recipe: rates and decay per parameter, schedule, accumulation. Torch-free to import.

Source: public code of MoE Jetpack at its last commit (the optimiser constructors of its host framework, and its own).

- Parity: a custom key matches as a substring, longest first, and one without ``decay_mult`` takes full decay: so
  ``slot_norm`` and ``phi`` decay although LayerNorms do not.
- Differs unless ``parity: official``: a block's ``norm2`` counts as part of its slots when the block carries slots (the
  released list is blocks 6 to 11, whatever the model); ``lr_mult`` acts together with layer decay (ignored there, and
  the constructor that honours it gives every parameter scale 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from moe.algorithms.base import Group, Settings

if TYPE_CHECKING:
    from torch import nn

PREFIX = "model."
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ROUTED = ("phi", "scale", "slot", "experts")
_RELEASED_NORMS = tuple(f"{i}.norm2.{part}" for i in range(6, 12) for part in ("weight", "bias"))


class KeyRule(Settings):
    """What happens to parameters whose name contains a key."""

    lr_mult: float = Field(default=1.0, ge=0, description="Factor of the rate.")
    decay_mult: float = Field(default=1.0, ge=0, description="Factor of the weight decay.")


class RateSpec(Settings):
    """Rates and decay of all parameters."""

    rule: Literal["default", "layer_decay", "custom_layer_decay"] = Field(
        default="layer_decay",
        description="default: one rate. layer_decay: rates fall towards the input, slots are at the top. "
        "custom_layer_decay: the released variant that honours lr_mult.",
    )
    lr: float = Field(default=4e-3, gt=0, description="Base rate.")
    weight_decay: float = Field(default=0.05, ge=0, description="Decoupled weight decay.")
    layer_decay: float = Field(default=0.6, gt=0, le=1, description="Factor per layer towards the input.")
    norm_decay_mult: float | None = Field(default=0.0, ge=0, description="Factor of the decay of LayerNorms.")
    bias_decay_mult: float | None = Field(default=0.0, ge=0, description="Factor of the decay of other biases.")
    flat_decay_mult: float | None = Field(default=None, ge=0, description="Factor of the decay of other 1-d tensors.")
    custom_keys: dict[str, KeyRule] = Field(
        default={".pos_embed": KeyRule(decay_mult=0.0), ".scales.": KeyRule(decay_mult=0.0), ".slot_norm": KeyRule()},
        description="Part of a name (of model.NAME) -> rule; the longest that matches counts alone.",
    )
    parity: Literal["official", "fixed"] = Field(default="fixed", description="See the module's text.")


class ParameterRule(NamedTuple):
    """What applies to one parameter; ``lr`` includes ``lr_scale``. ``layer_id`` is -1 without layer decay."""

    name: str
    lr: float
    weight_decay: float
    lr_scale: float
    layer_id: int


def parameter_rules(module: nn.Module, spec: RateSpec) -> list[ParameterRule]:
    """The rule of every parameter that is trained, in the module's order.

    Args:
        module: a network whose blocks are named ``blocks.<i>.``.
        spec: the recipe.
    """
    from torch import nn

    norms = {
        f"{name}.{part}" for name, child in module.named_modules() if isinstance(child, nn.LayerNorm)
        for part, _ in child.named_parameters(recurse=False)
    }  # fmt: skip
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depth = 1 + max((int(i) for name, _ in named for i in _BLOCK.findall(name)), default=-1)
    special = _RELEASED_NORMS if spec.parity == "official" else tuple(_norms_of_slots(module))
    out = []
    for name, parameter in named:
        lr_mult, decay = _decay(name, parameter.ndim, name in norms, spec)
        layer, scale = -1, 1.0
        if spec.rule != "default":
            layer, layers = _layer(name, depth, special, spec)
            scale = spec.layer_decay ** (layers - 1 - layer)
            if spec.rule == "layer_decay" and spec.parity == "official":
                lr_mult = 1.0
        out.append(ParameterRule(name, spec.lr * scale * lr_mult, decay, scale, layer))
    return out


def rate_groups(module: nn.Module, spec: RateSpec) -> list[Group]:
    """The trained parameters by rate and decay, in order of first appearance."""
    parameters = dict(module.named_parameters())
    groups: dict[tuple[float, float], Group] = {}
    for rule in parameter_rules(module, spec):
        key = (rule.lr, rule.weight_decay)
        if key not in groups:
            label = f"layer{rule.layer_id}" if rule.layer_id >= 0 else "model"
            groups[key] = Group(f"{label}/{len(groups)}", [], *key)
        groups[key].parameters.append(parameters[rule.name])
    return list(groups.values())


def _decay(name: str, ndim: int, norm: bool, spec: RateSpec) -> tuple[float, float]:
    """Factor of the rate, and weight decay."""
    full = f"{PREFIX}{name}"
    for key in sorted(sorted(spec.custom_keys), key=len, reverse=True):
        if key in full:
            rule = spec.custom_keys[key]
            return rule.lr_mult, spec.weight_decay * rule.decay_mult
    mult = 1.0
    if norm and spec.norm_decay_mult is not None:
        mult = spec.norm_decay_mult
    elif name.rsplit(".", 1)[-1] == "bias" and spec.bias_decay_mult is not None:
        mult = spec.bias_decay_mult
    elif ndim == 1 and spec.flat_decay_mult is not None:
        mult = spec.flat_decay_mult
    return 1.0, spec.weight_decay * mult


def _layer(name: str, depth: int, special_norms: Collection[str], spec: RateSpec) -> tuple[int, int]:
    """Layer of a parameter, and the number of layers."""
    if spec.rule == "custom_layer_decay" and spec.parity == "official":
        # Parity: the prefix is not removed there, so no name is recognised; and 14 is a constant.
        return 13, 14
    layers = depth + 2
    if any(part in name for part in _ROUTED) or any(norm in name for norm in special_norms):
        return layers - 1, layers
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0, layers
    block = _BLOCK.match(name)
    return (int(block[1]) + 1 if block else layers - 1), layers


def _norms_of_slots(module: nn.Module) -> Iterator[str]:
    from moe.layers.slots import SlotLayer

    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, SlotLayer) and name.endswith(".mlp"):
            yield f"{name.removesuffix('mlp')}norm2."


class ScheduleSpec(Settings):
    """Linear warm-up per iteration, then a cosine."""

    warmup_epochs: int = Field(default=20, ge=0, description="Epochs of warm-up.")
    cosine_epochs: int = Field(default=280, ge=1, description="Epochs from the top to the end of the cosine.")
    start_factor: float = Field(default=1e-3, ge=0, le=1, description="First factor of the warm-up.")
    eta_min_ratio: float = Field(default=1e-2, ge=0, le=1, description="Last factor of the cosine.")
    step: Literal["iteration", "epoch"] = Field(
        default="epoch", description="The cosine falls every epoch (released) or every iteration."
    )
    hold: bool = Field(default=False, description="Stay at the minimum after the cosine; released: it rises again.")

    def factor(self, iteration: int, iterations_per_epoch: int) -> float:
        """What the base rates are multiplied by.

        Args:
            iteration: from 0; micro-batches that only accumulate count too.
            iterations_per_epoch: of the loader.
        """
        warm = self.warmup_epochs * iterations_per_epoch
        if iteration < warm - 1:
            return self.start_factor + (1 - self.start_factor) * iteration / (warm - 1)
        if iteration < warm:
            return 1.0
        epoch = iteration / iterations_per_epoch
        passed = (math.floor(epoch) if self.step == "epoch" else epoch) - self.warmup_epochs
        progress = passed / self.cosine_epochs
        if self.hold:
            progress = min(1.0, progress)
        return self.eta_min_ratio + (1 - self.eta_min_ratio) * (1 + math.cos(math.pi * progress)) / 2


def accumulation(steps: int, size: int) -> list[tuple[float, bool]]:
    """Weight of each micro-batch's loss, and whether an update follows it.

    Groups of ``size`` micro-batches make an update; the last group may be smaller and is averaged over its own number.

    Args:
        steps: micro-batches.
        size: of a group, at least 1.
    """
    rest = steps % size
    whole = steps - rest
    return [
        (1 / (size if i < whole else rest), (i + 1) % size == 0 or i + 1 == steps) for i in range(steps)
    ]  # fmt: skip
