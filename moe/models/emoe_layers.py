"""Which layers of a network EMoE converts: its rules for vision transformers, language encoders and LLaMA.

Source: public code of EMoE (arXiv 2310.10908). Converting every layer hurts; every second one of the upper half is
about neutral, and the paper's runs convert one or two. Layers are counted from 0.
"""

from __future__ import annotations

from moe.errors import SpecError


def vision_layers(num_layers: int, num_inter: int = 2, every_other: bool = True, skip_last: int = 0) -> list[int]:
    """Converted blocks of a DeiT or ViT.

    With ``every_other`` the pattern ends in ``num_inter`` pairs of a converted and a dense block, then ``skip_last``
    dense ones (12 blocks, 2 pairs: blocks 8 and 10); otherwise in ``num_inter`` converted blocks, then ``skip_last``
    dense ones.

    Raises:
        SpecError: the pattern is longer than the network.
    """
    tail = ["S", "F"] * num_inter if every_other else ["S"] * num_inter
    head = num_layers - len(tail) - skip_last
    if num_inter < 0 or skip_last < 0 or head < 0:
        raise SpecError(
            f"num_inter={num_inter}, skip_last={skip_last} need {len(tail) + skip_last} layers; there are {num_layers}."
        )
    pattern = ["F"] * head + tail + ["F"] * skip_last
    return [layer for layer, kind in enumerate(pattern) if kind == "S"]


def large_vit_layers(num_layers: int, num_inter: int, every_other: bool = True) -> list[int]:
    """Converted layers of Hugging Face's ViT-large: every second from the end, or the last ``num_inter``."""
    first = num_layers - (2 if every_other else 1) * num_inter
    if num_inter < 0 or first < 0:
        raise SpecError(f"num_inter={num_inter} is too many for {num_layers} layers.")
    return list(range(first, num_layers, 2 if every_other else 1))


def llama_layers(num_layers: int, start: int = 16, every: int = 2) -> list[int]:
    """Layers ``l >= start`` with ``l - start`` divisible by ``every``.

    Raises:
        SpecError: a negative start, or ``every`` below 1.
    """
    if start < 0 or every < 1:
        raise SpecError(f"start={start} must be at least 0 and every={every} at least 1.")
    return list(range(start, num_layers, every))


def last_even_layers(num_layers: int, count: int = 1) -> list[int]:
    """The last ``count`` layers of even number, the paper's choice for BERT and GPT-2 (BERT-base, 1: layer 10)."""
    even = list(range(0, num_layers, 2))
    if not 0 <= count <= len(even):
        raise SpecError(f"{count} of {len(even)} even layers were asked for.")
    return even[len(even) - count :]
