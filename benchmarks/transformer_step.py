"""A training step of the whole transformer: GMoE-S/16 and EMoE against timm's dense ViT-S, same batch, one thread.

Forward, loss, backward and Adam at 224 pixels. GMoE's limit is the dense step plus the router's own share of the
floating-point operations; EMoE's is 1.05 of the dense step.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from benchmarks.measure import Row, alternate
from benchmarks.setting import Sizes
from moe.algorithms.base import algorithm
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine

NETWORK = "deit_small_patch16_224"
CLASSES = 7
BACKBONE = {"name": f"timm:{NETWORK}"}
TRAIN = {"batch_size": 8, "steps": 1, "lr": 3e-5}
WIDTH, PROJECTION, EXPERTS, SPARSE, BLOCKS, HIDDEN, TOKENS = 384, 256, 6, 2, 12, 1536, 197


def run(sizes: Sizes) -> list[Row]:
    """Two rows; CPU time."""
    quick = sizes == Sizes.quick()
    batch, repetitions = (1, 1) if quick else (8, 3)
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, CLASSES, (batch,))
    sides = [_dense(images, labels)]
    choices: tuple[tuple[str, dict[str, object]], ...] = (("gmoe", {"gmoe": {}}), ("emoe", {}))
    for name, extra in choices:
        sides.append(_ours(name, extra, images, labels))
    dense, gmoe, emoe = alternate(sides, repetitions)
    share = router_share()
    note = f"batch {batch}; router {share:.2%} of the dense step's operations"
    return [
        Row("GMoE-S/16 training step against timm's ViT-S", dense, gmoe, 1 / (1 + share), note),
        Row("EMoE (E 24, K 4, blocks 8 and 10) step against timm's ViT-S", dense, emoe, 1 / 1.05, f"batch {batch}"),
    ]


def router_share() -> float:
    """Multiply-adds of GMoE's two cosine gates divided by those of the dense network, per token."""
    gates = SPARSE * (WIDTH * PROJECTION + PROJECTION * EXPERTS)
    dense = BLOCKS * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN + 2 * TOKENS * WIDTH)
    return gates / dense


def _dense(images: Tensor, labels: Tensor) -> Callable[[], object]:
    """Plain timm with torch's Adam, as a user would write it."""
    network = timm.create_model(NETWORK, num_classes=CLASSES, drop_path_rate=0.1).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ours(name: str, extra: dict[str, object], images: Tensor, labels: Tensor) -> Callable[[], object]:
    """The algorithm as the loop drives it: its loss, its update, our engine."""
    kind = algorithm(name)
    fields: dict[str, object] = {"backbone": {**BACKBONE, **extra}, "train": TRAIN}
    if name == "emoe":
        fields |= {"emoe": {"num_experts": 24, "top_k": 4, "split": "contiguous"}, "num_inter": 2}
    method = kind(kind.Config(**fields))
    network = method.build(CLASSES).train()
    groups = [ParamGroup(g.name, g.parameters, g.lr, g.weight_decay) for g in method.param_groups(network)]
    engine = TorchEngine(network, groups, OptimizerOptions("adam"), torch.device("cpu"))
    batch = [(images, labels)]
    return lambda: method.update(network, batch, lambda part: engine.step([part], method.loss))
