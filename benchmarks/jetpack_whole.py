"""MoE Jetpack as a whole: statistics and recycling of ViT-S into V-JetMoE-T, and a training step of V-JetMoE-T.

Each side runs in a process of its own, which reports CPU seconds and its peak resident memory; the two take turns. The
official form is built here as its description goes. Statistics: a pass over the images per place, with a (batch, d, d)
co-activation of which every batch's d x d sum is kept, whatever the statistic; recycling: every expert at full size,
universal ones thinned afterwards. Training: einsum experts, entmax by sorting, AdamW without fusion.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Row
from moe.conversion.recycle.indices import uniform_list
from moe.conversion.recycle.lists import Wanted, Widths, recycling_lists
from moe.conversion.recycle.options import RecycleOptions, StatisticsOptions
from moe.conversion.recycle.probe import PLACES, collect_statistics, probing
from moe.conversion.recycle.record import StatisticsRecord
from moe.conversion.recycle.recycle import recycle
from moe.jetpack_specs import JetViTSpec, SpheroSpec, v_jetmoe
from moe.models.sphero_vit import build_sphero_vit
from workers.device import setup

BATCH, BATCHES = 8, (4, 8)
RELEASED_BATCHES = 150
"""Batches of the released statistics (of 256 images each)."""


def recycling_rows(quick: bool) -> list[Row]:
    """Time, and memory; the official form keeps a matrix per batch, so its memory is also told for its own number."""
    counts = (1, 2) if quick else BATCHES
    base = [_process("report_recycling", "official", quick, count) for count in counts]
    ours = [_process("report_recycling", "ours", quick, count) for count in counts]
    what = f"statistics of {BATCH * counts[1]} images and recycling, ViT-S into V-JetMoE-T by L2"
    per_batch = (base[1]["statistics_gb"] - base[0]["statistics_gb"]) / (counts[1] - counts[0])
    released = base[1]["statistics_gb"] + per_batch * (RELEASED_BATCHES - counts[1])
    note = (
        f"GB, not seconds, peak of {counts[1]} batches of {BATCH}; the baseline's statistics grow by "
        f"{per_batch:.2f} GB a batch (to {released:.0f} GB in the released {RELEASED_BATCHES}), ours by "
        f"{(ours[1]['statistics_gb'] - ours[0]['statistics_gb']) / (counts[1] - counts[0]):.2f}"
    )
    peak = "memory of the statistics"
    whole = "memory of statistics and recycling, at the released number of batches"
    return [
        Row(what, base[1]["seconds"], ours[1]["seconds"], 4.0, "each in a process of its own"),
        Row(peak, base[1]["statistics_gb"], ours[1]["statistics_gb"], None, note),
        Row(whole, max(base[1]["peak_gb"], released), ours[1]["peak_gb"], 4.0, "GB; baseline extrapolated from that"),
    ]


def step_row(quick: bool) -> Row:
    """Forward, backward, clipping and optimiser of the whole network."""
    base, ours = (_process("report_step", form, quick, 1 if quick else 3) for form in ("official", "ours"))
    what = "training step of V-JetMoE-T, batch 8, with AdamW"
    parts = f"optimiser {base['optimiser']:.2f} s and {ours['optimiser']:.2f} s of it"
    return Row(what, base["seconds"], ours["seconds"], 2.0, f"float32; {parts}; each in a process of its own")


def _process(function: str, form: str, quick: bool, count: int) -> dict[str, float]:
    code = f"from benchmarks.jetpack_whole import {function}; {function}({form!r}, {quick}, {count})"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _sizes(quick: bool) -> tuple[JetViTSpec, JetViTSpec]:
    """Predecessor and successor."""
    if quick:
        small = {"image_size": 32, "patch_size": 16, "depth": 2, "num_heads": 2}
        moe = SpheroSpec(core_experts=2, univ_experts=4, slot_layernorm=True)
        return JetViTSpec(dim=32, **small), JetViTSpec(dim=16, **small, moe=moe, moe_layers=(1,))
    return JetViTSpec(dim=384, num_heads=6, global_pool="token"), v_jetmoe("tiny")


def report_recycling(form: str, quick: bool, batches: int) -> None:
    """Print seconds and peaks of one side."""
    _prepare(form)
    dense, sparse = _sizes(quick)
    teacher, successor = build_sphero_vit(dense, 10).eval(), build_sphero_vit(sparse, 10).state_dict()
    images = [torch.randn(2 if quick else BATCH, 3, dense.image_size, dense.image_size) for _ in range(batches)]
    generator = torch.Generator().manual_seed(0)
    options = RecycleOptions()
    start = time.process_time()
    if form == "ours":
        record = collect_statistics(teacher, images, StatisticsOptions(metrics=("L2",))).finalise()
        middle = peak_gb()
        recycle(teacher.state_dict(), successor, options, generator=generator, statistics=record)
    else:
        record = official_statistics(teacher, images)
        middle = peak_gb()
        official_experts(teacher, sparse, record, options, generator)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "statistics_gb": middle, "peak_gb": peak_gb()}))


def official_statistics(model: nn.Module, images: list[Tensor]) -> StatisticsRecord:
    """A pass per place; norms, counts and co-activations of every batch are kept, and averaged in the end."""
    values = {}
    for name, place in PLACES.items():
        kept: dict[int, list[tuple[Tensor, ...]]] = {}

        def receive(_: str, layer: int, x: Tensor, kept: dict[int, list[tuple[Tensor, ...]]] = kept) -> None:
            flags = (x > 0).float()
            pairs = torch.bmm(flags.transpose(1, 2), flags)
            found = (x.abs().sum((0, 1)), x.square().sum((0, 1)).sqrt(), flags.sum((0, 1)), pairs.sum(0))
            kept.setdefault(layer, []).append(found)

        with torch.no_grad(), probing(model, receive, {name: place}):
            for batch in images:
                model.forward_features(batch)  # type: ignore[operator]
        values[name, "L2"] = {layer: torch.stack([one[1] for one in own]).mean(0) for layer, own in kept.items()}
        values[name, "co_act"] = {layer: torch.stack([one[3] for one in own]).mean(0) for layer, own in kept.items()}
    return StatisticsRecord(values)


def official_experts(
    teacher: nn.Module,
    sparse: JetViTSpec,
    record: StatisticsRecord,
    options: RecycleOptions,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All experts of all blocks at full size, then the split, with every fourth neuron of the universal ones."""
    state, moe = teacher.state_dict(), sparse.moe
    if not isinstance(moe, SpheroSpec):
        raise TypeError("The successor has no SpheroMoE.")
    width, hidden = state["blocks.0.norm1.weight"].shape[0], state["blocks.0.mlp.fc1.bias"].shape[0]
    channel, keep = Widths(width, sparse.dim), 4 * sparse.dim
    wanted = Wanted(channel, channel, Widths(hidden, keep), sparse.depth, sparse.moe_layers, moe.num_experts)
    lists, _ = recycling_lists(wanted, options, record, generator, dense=True)
    full: dict[str, Tensor] = {}
    for block in sparse.moe_layers:
        for name, axes in (("fc1.weight", "mc"), ("fc1.bias", "m"), ("fc2.weight", "cm"), ("fc2.bias", "c")):
            dense = state[f"blocks.{block}.mlp.{name}"]
            units = {"m": lists.neuron[block], "c": lists.channel[block]}
            experts = []
            for expert in range(moe.num_experts):
                cut = dense[units[axes[0]][expert]]
                experts.append(cut if len(axes) == 1 else cut[:, units[axes[1]][expert]])
            full[f"{block}.{name}"] = torch.stack(experts)
    thin = uniform_list(keep, keep // 4)
    out: dict[str, Tensor] = {}
    for key, value in full.items():
        out[f"{key}.core"] = value[: moe.core_experts].clone()
        univ = value[moe.core_experts :]
        axis = {"fc1.weight": 1, "fc1.bias": 1, "fc2.weight": 2}.get(key.split(".", 1)[1])
        out[f"{key}.univ"] = univ.clone() if axis is None else univ.index_select(axis, thin)
    return out


def report_step(form: str, quick: bool, repetitions: int) -> None:
    """Print the CPU seconds of a step, and of its optimiser, of one side."""
    from benchmarks.sphero import Official

    _prepare(form)
    spec = _sizes(quick)[1]
    model = build_sphero_vit(spec, 100).train()
    if form == "official":
        for block in spec.moe_layers:
            model.blocks[block].mlp = Official(model.blocks[block].mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=form == "ours")
    x, y = torch.randn(8, 3, spec.image_size, spec.image_size), torch.arange(8)
    taken: list[tuple[float, float]] = []
    for _ in range(repetitions + 1):
        times = [_timed(lambda: _gradients(model, x, y)), _timed(optimizer.step)]
        optimizer.zero_grad()
        taken.append((sum(times), times[1]))
    steps = sorted(taken[1:])  # the first one allocates
    seconds, optimiser = steps[len(steps) // 2]
    print(json.dumps({"seconds": seconds, "optimiser": optimiser}))


def _prepare(form: str) -> None:
    """One thread; our side is set up as every training function of ours is, memory included."""
    torch.set_num_threads(1)
    if form == "ours":
        setup(1, "cpu")
    torch.manual_seed(0)


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_gb() -> float:
    """Peak resident memory of this process so far; ``ru_maxrss`` would count that of the process that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/self/status has no VmHWM.")
