"""The student phase of m2mKD at ten positions: pairs one after the other, or with one shared prefix of the meta model.

Baseline: every pair runs its own prefix (``0 + 1 + .. + 9`` meta blocks), as ten separate jobs do. Ours: one pass, 9
blocks. Both compute the same losses; the note holds the largest difference of a gradient. Networks are of ViT-S
width with V-MoE students, teacher depths as those of the released ViT-H; ratios depend on depths, not on widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, alternate
from benchmarks.setting import Sizes
from moe.conversion.modules import stage_module
from moe.conversion.teaching import TeachingPair, TeachingPairs, prefixes
from moe.models.vit_specs import ViTSpec, VMoESpec, student_specs
from moe.models.vit_stages import ViTStages
from moe.models.vmoe import VMoE

DEPTHS = (4, 3, 3, 3, 3, 3, 3, 3, 3, 4)
CLASSES, BATCH = 100, 4


def run(sizes: Sizes) -> list[Row]:
    """Three rows: the prefixes alone, the whole step, and the step with the teacher's logits known."""
    quick = sizes.backbone == "tiny_cnn"
    dim, heads, pixels = (32, 2, 32) if quick else (384, 6, 112)
    torch.manual_seed(0)
    pairs = make(dim, heads, pixels)
    members = pairs.members()
    images = torch.randn(BATCH, 3, pixels, pixels)
    target = torch.randint(0, CLASSES, (BATCH,))
    meta = members[0].meta
    known = {p: output.teacher_BK for p, output in pairs(images).items()}
    what = f"m2mKD, {len(DEPTHS)} pairs, width {dim}, {pixels} px, batch {BATCH}"
    sides: dict[str, tuple[Callable[[], object], Callable[[], object], float | None]] = {
        "prefixes": (
            lambda: [pair.prefix(images) for pair in members.values()],
            lambda: prefixes(meta, images, [*members]),
            4.0,
        ),
        "step": (lambda: separate(pairs, images, target), lambda: together(pairs, images, target), 1.1),
        "step, teacher's logits cached": (
            lambda: separate(pairs, images, target),
            lambda: together(pairs, images, target, known),
            1.5,
        ),
    }
    note = f"largest relative gradient difference {difference(pairs, images, target):.1e}"
    rows = []
    for name, (baseline, ours, goal) in sides.items():
        base, own = alternate([baseline, ours], sizes.repetitions)
        rows.append(Row(f"{what}: {name}", base, own, goal, note if name == "step" else ""))
    return rows


def make(dim: int, heads: int, pixels: int) -> TeachingPairs:
    """A teacher, a meta model and ten V-MoE students of half the width."""
    shape = {"image_size": pixels, "dim": dim, "heads": heads, "num_classes": CLASSES}
    meta = ViTStages(ViTSpec(depths=(1,) * len(DEPTHS), **shape))
    teacher = ViTStages(ViTSpec(depths=DEPTHS, **shape))
    small = {**shape, "dim": dim // 2, "moe_blocks": tuple(range(len(DEPTHS))), "num_experts": 4}
    final = VMoESpec(depths=(1,) * len(DEPTHS), **small)
    students = [VMoE(spec) for spec in student_specs(final, dim)]
    return TeachingPairs([TeachingPair(meta, stage_module(teacher, i), s, i) for i, s in enumerate(students)])


def separate(pairs: TeachingPairs, images: Tensor, target: Tensor) -> None:
    """One step's gradients, pair by pair."""
    for pair in pairs.members().values():
        pair.zero_grad()
        pair.losses(pair(images), target).total.backward()


def together(pairs: TeachingPairs, images: Tensor, target: Tensor, known: dict[int, Tensor] | None = None) -> None:
    """One step's gradients of all pairs."""
    pairs.zero_grad()
    pairs.losses(pairs(images, known), target).total.backward()


def difference(pairs: TeachingPairs, images: Tensor, target: Tensor) -> float:
    """Largest relative difference of a tensor's gradient between the two ways."""
    separate(pairs, images, target)
    one = gradients(pairs)
    together(pairs, images, target)
    two = gradients(pairs)
    return max(float((two[n] - g).norm() / g.norm().clamp_min(1e-12)) for n, g in one.items())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
