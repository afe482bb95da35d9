"""Checkpoint recycling of ViT-S into ViT-T: graphs, gathers, statistics, and the memory of a statistics pass.

Baselines are what the public tool's form does: a networkx graph built edge by edge with adjacency lists for METIS and
part weights by a double loop; universal experts gathered at full size and thinned afterwards; one pass over the images
per place with every batch's d x d co-activation. Peak memory is the resident set of a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.jetpack_whole import peak_gb, recycling_rows
from benchmarks.measure import Row, alternate
from benchmarks.setting import Sizes
from moe.conversion.recycle.graph import part_probabilities, partition
from moe.conversion.recycle.indices import uniform_list
from moe.conversion.recycle.options import GraphOptions, StatisticsOptions
from moe.conversion.recycle.probe import PLACES, collect_statistics, probing
from moe.conversion.recycle.weights import gather_stack

PARTS, CORE, UNIVERSAL = 32, 98, 196
LIMIT_GB = 2.0
EVERY = ("L1", "L2", "act_patrn", "co_act")


def run(sizes: Sizes) -> list[Row]:
    """Graph rows, a gather row, a statistics row, a memory row, and the whole."""
    quick = sizes == Sizes.quick()
    return [
        metis_row(96 if quick else 1536),
        louvain_row(64 if quick else 384),
        gather_row(quick, sizes.repetitions),
        statistics_row(quick),
        memory_row(quick),
        *recycling_rows(quick),
    ]


def co_activation(neurons: int) -> Tensor:
    """Counts with some structure: neurons of 20 groups fire together a little more often."""
    random = np.random.RandomState(0)
    groups, topics = random.randint(0, 20, neurons), random.randint(0, 20, 3000)
    fires = random.randn(3000, neurons) + 1.5 * (groups[None] == topics[:, None]) > 0.5
    flags = torch.from_numpy(fires.astype(np.float32))
    return (flags.t() @ flags).fill_diagonal_(0)


def once(side: Callable[[], object]) -> float:
    """CPU seconds of a single run, for baselines that take a minute."""
    begin = time.process_time()
    side()
    return time.process_time() - begin


def networkx_graph(weights_nn: Tensor) -> object:
    """The graph edge by edge."""
    import networkx

    graph = networkx.Graph()
    rows = weights_nn.tolist()
    graph.add_nodes_from(range(len(rows)))
    for i, row in enumerate(rows):
        for j in range(i + 1, len(rows)):
            if row[j] > 0:
                graph.add_edge(i, j, weight=row[j])
    return graph


def dense_form(weights_nn: Tensor) -> tuple[list[int], list[float]]:
    """Graph, adjacency lists, METIS, part weights by a double loop."""
    import pymetis

    graph = networkx_graph(weights_nn)
    adjacency = [sorted(graph.neighbors(node)) for node in graph.nodes]
    labels = pymetis.part_graph(PARTS, adjacency=adjacency)[1]
    rows, inner = weights_nn.tolist(), [0.0] * PARTS
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if i != j and labels[i] == labels[j]:
                inner[labels[i]] += value
    return labels, inner


def metis_row(neurons: int) -> Row:
    """Graph, partition and part probabilities of one layer."""
    weights_nn = co_activation(neurons)
    found: dict[str, object] = {}

    def ours() -> None:
        labels_n = partition(weights_nn, GraphOptions(parts=PARTS))
        found["ours"], found["prob"] = labels_n, part_probabilities(weights_nn, labels_n)[2]

    def baseline() -> None:
        found["base"], found["inner"] = dense_form(weights_nn)

    base = once(baseline)
    own = float(np.median([once(ours) for _ in range(3)]))
    pairs = np.unique(np.stack([np.asarray(found["base"]), np.asarray(found["ours"])]), axis=1).shape[1]
    same = pairs == len(set(found["base"])) == len(np.unique(found["ours"]))
    what = f"METIS into {PARTS} parts, {neurons} neurons: graph, partition, part weights"
    return Row(what, base, own, 8.0, f"same parts: {same}; baseline networkx, one run")


def louvain_row(neurons: int) -> Row:
    """Louvain communities of one layer."""
    import networkx

    weights_nn = co_activation(neurons)
    base = once(lambda: networkx.community.louvain_communities(networkx_graph(weights_nn), resolution=1.05, seed=42))
    own = once(lambda: partition(weights_nn, GraphOptions(method="louvain")))
    return Row(f"Louvain, {neurons} neurons", base, own, None, "baseline networkx, one run each")


def gather_row(quick: bool, repetitions: int) -> Row:
    """Core and universal experts of one block."""
    core, universal = (4, 8) if quick else (CORE, UNIVERSAL)
    source_d, source_h, dim, hidden = (16, 64, 8, 32) if quick else (384, 1536, 192, 768)
    generator = torch.Generator().manual_seed(0)

    def lists(total: int, keep: int) -> Tensor:
        draws = [torch.randperm(total, generator=generator)[:keep].sort().values for _ in range(core + universal)]
        return torch.stack(draws)

    neuron, channel = lists(source_h, hidden), lists(source_d, dim)
    thin = uniform_list(hidden, hidden // 4)
    fc1, fc2 = torch.randn(source_h, source_d), torch.randn(source_d, source_h)

    def full_then_thin() -> list[Tensor]:
        first = torch.stack([fc1[m][:, c] for m, c in zip(neuron, channel, strict=True)])
        second = torch.stack([fc2[c][:, m] for m, c in zip(neuron, channel, strict=True)])
        return [first[:core].clone(), second[:core].clone(), first[core:][:, thin], second[core:][:, :, thin]]

    def direct() -> list[Tensor]:
        m, c = neuron[:core], channel[:core]
        few, cu = neuron[core:][:, thin], channel[core:]
        return [
            gather_stack(fc1, [m, c]),
            gather_stack(fc2, [c, m]),
            *(gather_stack(fc1, [few, cu]), gather_stack(fc2, [cu, few])),
        ]

    same = all(torch.equal(a, b) for a, b in zip(full_then_thin(), direct(), strict=True))
    base, own = alternate([full_then_thin, direct], repetitions)
    what = f"gather {core} core and {universal} universal experts of a block"
    return Row(what, base, own, None, f"equal bit for bit: {same}; baseline full size, then thinned")


def predecessor(quick: bool) -> torch.nn.Module:
    """A randomly initialised ViT-S (a ViT of three blocks of width 48 in quick mode)."""
    import timm

    torch.manual_seed(0)
    if quick:
        return timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=3, num_heads=3, img_size=32, num_classes=0)
    return timm.create_model("vit_small_patch16_224", num_classes=0)


def statistics_row(quick: bool) -> Row:
    """Every place and metric of one batch."""
    model, batch = predecessor(quick).eval(), 2 if quick else 4
    images = torch.randn(batch, 3, 32 if quick else 224, 32 if quick else 224)

    def keep(seen: list[Tensor]) -> Callable[[str, int, Tensor], None]:
        return lambda _, __, activation: seen.append(activation)

    def three_passes() -> None:
        for name, place in PLACES.items():
            seen: list[Tensor] = []
            with torch.no_grad(), probing(model, keep(seen), {name: place}):
                model.forward_features(images)
            for values in seen:
                values.abs().sum(dim=(0, 1)), values.square().sum(dim=(0, 1)).sqrt()
                flags = (values > 0).float()
                flags.sum(dim=(0, 1)), torch.bmm(flags.transpose(1, 2), flags).sum(dim=0)

    options = StatisticsOptions(metrics=EVERY)
    base, own = alternate([three_passes, lambda: collect_statistics(model, [images], options)], 1 if quick else 3)
    what = f"statistics of a batch of {batch}: all places, all four metrics"
    return Row(what, base, own, None, "baseline a pass per place, float32; ours sums in float64")


def memory_row(quick: bool) -> Row:
    """Peak resident memory of a short and of a three times longer pass."""
    code = "from benchmarks.recycle import report_peak; report_peak({}, {})"
    peaks = []
    for batches in (3, 9):
        command = [sys.executable, "-c", code.format(quick, batches)]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
        peaks.append(float(json.loads(done.stdout)))
    note = f"GB, not seconds: limit against peak of 9 batches of 16; 3 batches: {peaks[0]:.2f} GB"
    return Row("memory of a statistics pass, all places and metrics", LIMIT_GB, peaks[1], 1.0, note)


def report_peak(quick: bool, batches: int) -> None:
    """Print the peak resident memory in GB of a pass that spans several groups of batches."""
    torch.set_num_threads(1)
    model, side = predecessor(quick), 32 if quick else 224
    options = StatisticsOptions(metrics=EVERY, group=2)
    images = (torch.randn(2 if quick else 16, 3, side, side) for _ in range(batches))
    collect_statistics(model, images, options).finalise()
    print(json.dumps(peak_gb()))
