"""The student phase of m2mKD at ten positions: pairs one after the other, or on what frozen networks said once.

Baseline: every pair runs its own prefix (``0 + 1 + .. + 9`` meta blocks) and its teacher's hybrid in every step, as ten
separate jobs do. Ours: one pass of the prefix for all; or, as the ``m2mkd_cache`` stage does, tokens and logits of the
frozen networks are computed in the first epoch and read afterwards. All compute the same losses; a note holds the
largest difference of a gradient. Networks are of ViT-S width with V-MoE students, teacher depths as those of the
released ViT-H; ratios depend on depths, not on widths.

The last row trains modules as members of a pipeline, side by side on all cores against one after the other (wall time);
beside it stands what plain processes reach on the machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.expert_stage import plain_processes
from benchmarks.measure import Row, alternate
from benchmarks.setting import Sizes
from moe.conversion.modules import stage_module
from moe.conversion.teaching import TeachingPair, TeachingPairs, prefixes
from moe.models.vit_specs import ViTSpec, VMoESpec, student_specs
from moe.models.vit_stages import ViTStages
from moe.models.vmoe import VMoE
from orchestrator.events import Event
from orchestrator.executors.inline import InlineExecutor
from orchestrator.executors.ray import RayExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec
from orchestrator.store import Store

DEPTHS = (4, 3, 3, 3, 3, 3, 3, 3, 3, 4)
CLASSES, BATCH, EPOCHS = 100, 4, 10
PLAIN = {"randaugment": None, "erasing": 0.0, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0, "repeats": 1}


def run(sizes: Sizes) -> list[Row]:
    """Prefixes alone, the whole step, the step with the teacher's logits known, all the work, members side by side."""
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
    return [*rows, whole_work(what, pairs, images, target, sizes.repetitions), side_by_side(quick)]


def whole_work(what: str, pairs: TeachingPairs, images: Tensor, target: Tensor, repetitions: int) -> Row:
    """Ten separate jobs of some epochs, against filling the cache once and ten jobs that read it."""

    def fill() -> tuple[dict[int, Tensor | None], dict[int, Tensor]]:
        outputs = pairs(images)
        return {p: o.hidden_BTD for p, o in outputs.items()}, {p: o.teacher_BK for p, o in outputs.items()}

    with torch.no_grad():
        hidden, logits = fill()

    def cached() -> None:
        for position, pair in pairs.members().items():
            pair.zero_grad()
            tokens = hidden[position]
            output = pair(images if tokens is None else tokens, tokens, logits[position])
            pair.losses(output, target).total.backward()

    def filling() -> None:
        with torch.no_grad():
            fill()

    apart, first, later = alternate([lambda: separate(pairs, images, target), filling, cached], repetitions)
    base, ours = EPOCHS * apart, first + EPOCHS * later
    note = f"{ours / base:.2f} of the work of separate jobs; a step {later:.2f} s, filling {first:.2f} s"
    return Row(f"{what}: {EPOCHS} epochs, frozen networks run once", base, ours, 1 / 0.6, note)


def side_by_side(quick: bool) -> Row:
    """Modules as members on Ray, one core each, against the same members one after the other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    epochs, modules = (1, 2) if quick else (80, 2 * cores)
    with tempfile.TemporaryDirectory() as folder:
        store, root = Store.open(str(Path(folder) / "store")), Path(folder) / "data"
        base = _pipeline(modules, epochs, seed=0)
        parallel = _seconds(base, store, RayExecutor(num_cpus=cores), root)
        serial = _seconds(_pipeline(modules, epochs, seed=1), store, InlineExecutor(), root)
    alone, together = (plain_processes(n, 5 if quick else 400) for n in (1, cores))
    note = f"efficiency {serial / parallel / cores:.2f}, asked for 0.90; plain processes {alone / together:.2f}"
    what = f"m2mKD, {modules} modules as members on {cores} cores (wall time)"
    return Row(what, serial, parallel, 0.9 * cores, note)


def _pipeline(modules: int, epochs: int, seed: int) -> PipelineSpec:
    vit = {"image_size": 28, "patch_size": 7, "channels": 1, "dim": 64, "heads": 4, "num_classes": 10}
    phase = {"batch_size": 64, "epochs": 1, "lr": 1e-3, "lr_batch": None, "amp": False}
    names = ("pt", "mt", "ft", "student", "e2e")
    method = {
        "teacher": {**vit, "depths": [1] * modules},
        "meta": {**vit, "depths": [1] * modules},
        "vmoe": {**vit, "depths": [1] * modules, "moe_blocks": list(range(modules)), "num_experts": 4},
        **dict.fromkeys(names, phase),
        "augment": {"image_size": 28, **PLAIN},
    }
    config = {"method": method}
    wire = {"data": "${stages.data}"}
    both = {**wire, "meta": "${stages.meta}", "teacher": "${stages.teacher}"}
    stages: dict[str, Any] = {
        "data": {"kind": "prepare", "config": {"dataset": "rotated_digits", "options": {"train_per_angle": 40}}},
        "meta": {"kind": "m2mkd_train", "inputs": wire, "config": {**config, "phase": "pt"}},
        "teacher": {"kind": "m2mkd_train", "inputs": wire, "config": {**config, "phase": "ft"}},
        "frozen": {"kind": "m2mkd_cache", "inputs": both, "config": config},
        "students": {
            "kind": "m2mkd_teach",
            "inputs": {**both, "cache": "${stages.frozen}"},
            "config": {**config, "epochs": epochs},
        },
    }
    return PipelineSpec(apiVersion="moepipe/v1", name="teaching-pairs", seeds=[seed], stages=stages)


def _seconds(spec: PipelineSpec, store: Store, executor: InlineExecutor | RayExecutor, data_root: Path) -> float:
    """Wall time of the modules, from the moment when the cache was there to the end of the last one."""
    record, done, end = RunStore(store).create(spec), 0.0, 0.0

    def listen(event: Event) -> None:
        nonlocal done, end
        if event.kind == "member-finished":
            end = time.perf_counter()
            if event.node and event.node.startswith("frozen"):
                done = end

    outcome = execute(build_graph(spec), store, record, executor, listeners=[listen], data_root=data_root)
    if outcome.status != "finished":
        raise SystemExit(f"The benchmark's run ended as {outcome.status}: {outcome.error}")
    return end - done


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
