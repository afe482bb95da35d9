"""Which parameters of a (converted, adapted) language model train, and at which rate.

Source: public code of EMoE (arXiv 2310.10908), whose flags the rules are; parameters are told by the public names
(``moe.keymaps.emoe.official_name``).

Parity: the rules as they are, quirks included: once a freezing flag is given every parameter is decided anew, so the
pooler and the final norm train in those runs only, and a learned gate gets a tenth of the learning rate.
Differs: with ``fair``, an avg-k gate never trains (its update after each step would overwrite that), learned gates take
the full rate, and the pooler and final norm train in every low-rank run, so that baselines differ in the method alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from moe.keymaps.emoe import official_name
from moe.models.text_spec import TuningRules

__all__ = [
    "RateGroup",
    "TuningRules",
    "add_noise",
    "full_tuning_groups",
    "rate_groups",
    "set_trainable",
    "trains",
]

EMBEDDINGS = ("wte", "wpe", "embeddings", "embed_tokens", "patch_embed")
_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|blocks)\.(\d+)(?:\.|$)")
_NORM = re.compile(r"(?:^|\.)(?:LayerNorm|ln_\w+|layernorm_\w+|norm\d)(?:\.|$)")
_FINAL = re.compile(r"(?:^|\.)(?:pooler|ln_f)\.")


class RateGroup(NamedTuple):
    """Parameters with one rate and decay.

    Attributes:
        lr_factor: of the learning rate.
        decay: whether weight decay applies.
        names: official names.
    """

    lr_factor: float
    decay: bool
    names: list[str]


def trains(name: str, rules: TuningRules) -> bool:
    """Whether the parameter with this official name trains."""
    if rules.fair and rules.one_score and _is_gate(name):
        return False
    if rules.decides_anew:
        return _decided(name, rules)
    if rules.one_score and _is_gate(name):
        return False
    if not rules.lora:
        return True
    if rules.fair and _FINAL.search(name):
        return True
    return "lora_" in name or "modules_to_save" in name or ".mlp.experts.batched" in name or ".mlp.gates." in name


def set_trainable(model: nn.Module, rules: TuningRules) -> list[str]:
    """Set ``requires_grad`` of every parameter by the rules; the official names of those that train, sorted.

    The untrained copy of the head that peft keeps (``original_module``) never trains.
    """
    chosen = []
    for name, parameter in model.named_parameters():
        official = official_name(name)
        parameter.requires_grad_(".original_module." not in name and trains(official, rules))
        if parameter.requires_grad:
            chosen.append(official)
    return sorted(chosen)


@torch.no_grad()
def add_noise(model: nn.Module, generator: torch.Generator, strength: float = 0.15) -> None:
    """The noisy-tuning baseline: every parameter but the head's moves by ``strength * std * U(-0.5, 0.5)`` once.

    Source: Wu et al. (arXiv 2202.12024), as in the public code of EMoE; std is the unbiased one of each tensor, and a
    tensor of one number stays.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and not any(part in name.split(".") for part in ("classifier", "score", "head")):
            uniform = torch.rand(parameter.shape, generator=generator).to(parameter) - 0.5
            parameter.add_(uniform, alpha=strength * float(parameter.std()))


def rate_groups(names: Iterable[str], rules: TuningRules | None = None) -> list[RateGroup]:
    """The public optimiser groups in their order: (decay, fast), (decay, slow), (no decay, fast), (no decay, slow).

    No decay: the name contains ``bias`` or ``LayerNorm.weight``. Fast: it contains ``lora``, ``score`` or
    ``classifier``; everything else learns at a tenth (with ``rules.fair``, gates learn fast, too).
    """
    fair = rules is not None and rules.fair
    groups = [RateGroup(factor, decay, []) for decay in (True, False) for factor in (1.0, 0.1)]
    for name in names:
        decay = not any(part in name for part in ("bias", "LayerNorm.weight"))
        fast = any(part in name for part in ("lora", "score", "classifier")) or (fair and _is_gate(name))
        groups[(0 if decay else 2) + (0 if fast else 1)].names.append(name)
    return groups


def full_tuning_groups(names: Iterable[str], no_decay: Iterable[str] = ("bias", "LayerNorm.weight")) -> list[RateGroup]:
    """Groups of a full run: one rate, no decay for names that contain one of ``no_decay``."""
    spared = tuple(no_decay)
    groups = [RateGroup(1.0, True, []), RateGroup(1.0, False, [])]
    for name in names:
        groups[1 if any(part in name for part in spared) else 0].names.append(name)
    return groups


def _decided(name: str, rules: TuningRules) -> bool:
    if "lora" in name or (rules.tune_gates_only and not rules.one_score and _is_gate(name)):
        return True
    found = _LAYER.search(name)
    layer = int(found[1]) if found else None
    only = rules.tune_moe_layers_only
    within = layer is not None and layer in rules.moe_layers
    spared = rules.tune_layernorm and _NORM.search(name) is not None
    return not (
        any(part in rules.freeze for part in name.split("."))
        or (layer is not None and layer in rules.freeze_layer)
        or (only and layer is not None and not within)
        or (only and rules.tune_gates_only and within and not spared)
        or (only and any(part in EMBEDDINGS for part in name.split(".")))
    )


def _is_gate(name: str) -> bool:
    # SwiGLU layers have a "gate_proj" that is no gate; the public rule is for models without one.
    return "gate" in name and "gate_proj" not in name
