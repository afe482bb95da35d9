"""Program of test_parallel_layer: DeepSpeed's expert-parallel layer beside the plain one, on one or two gloo ranks.

Importing deepspeed costs seconds, so all cases share the processes; results go to one JSON file per process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.layers.layer import MoELayer, collect_balance
from moe.layers.router import draw_noise
from moe.router_spec import RouterSpec
from workers.engines.base import OptimizerOptions, ParamGroup, Weighted
from workers.engines.deepspeed import DeepSpeedEngine, DeepSpeedOptions, ParallelMoELayer, start
from workers.engines.torch import TorchEngine
from workers.expert_checkpoint import load_experts, save_experts

D, H, E = 6, 10, 4
SPECS = {
    "linear k1": RouterSpec(top_k=1, balance="gshard"),
    "linear k2": RouterSpec(top_k=2, balance="gshard"),
    "gmoe": RouterSpec(
        gate="cosine", top_k=1, projection=8, capacity_factor=1.5, batch_prioritized=True, noise=1.0,
        balance="load_importance",
    ),
    "capacity k2": RouterSpec(gate="cosine", top_k=2, projection=8, capacity_factor=0.5, noise=1.0),
}  # fmt: skip


def tokens(rank: int) -> Tensor:
    """Each rank has other tokens, and another number of them."""
    return torch.randn(2, 7 + rank, D, generator=torch.Generator().manual_seed(rank))


def layer(spec: RouterSpec) -> MoELayer:
    torch.manual_seed(3)
    return MoELayer(D, H, spec, E)


def steps(module: MoELayer, x: Tensor, noise: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Result, first gradients and gradients of their squared sum: of x, then of the parameters."""
    y, record = module.forward_with_record(x, noise)
    inputs = [x, *module.parameters()]
    loss = y.square().sum() + 0.1 * record.balance
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first[:1]), inputs, materialize_grads=True)
    return y, list(first), list(second)


def compare(spec: RouterSpec, ep: int, rank: int, world: int) -> dict[str, float]:
    """Largest differences from the plain layer; experts' gradients are summed over the ranks that use them."""
    plain = layer(spec)
    parallel = ParallelMoELayer(plain, ep, rank % ep)
    parallel.layer.set_deepspeed_parallelism()
    noises = [draw_noise(spec, torch.zeros(2 * (7 + r), E), True, torch.Generator().manual_seed(9 + r))
              for r in range(world)]  # fmt: skip
    runs = [steps(plain, tokens(r).requires_grad_(), noises[r]) for r in range(world)]
    mine = steps(parallel, tokens(rank).requires_grad_(), noises[rank])
    names = {f"layer.{n}": p for n, p in parallel.names.items()}
    order = [n for n, _ in plain.named_parameters()]
    out = {"y": gap(mine[0], runs[rank][0])}
    for level, label in ((1, "first"), (2, "second")):
        out[f"{label} x"] = gap(mine[level][0], runs[rank][level][0])
        for (name, _), gradient in zip(parallel.named_parameters(), mine[level][1:], strict=True):
            index = 1 + order.index(names[name])
            if ".experts." in name and ep > 1:
                whole = sum(run[level][index] for run in runs)
                expected = whole.chunk(ep)[rank % ep]
            else:
                expected = runs[rank][level][index]
            out[f"{label} {names[name]}"] = gap(gradient, expected)
    parallel(tokens(rank), noises[rank])
    (found,), expected = collect_balance(parallel), plain.forward_with_record(tokens(rank), noises[rank])[1].balance
    return {**out, "balance": gap(found, expected)}


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest entry."""
    return float((a - b).detach().abs().max() / (b.detach().abs().max() + 1e-6))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.moe, self.head = nn.Linear(3, D), layer(SPECS["linear k2"]), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        return self.head(z + self.moe(z))


def train(engine: Any, rank: int, world: int) -> tuple[list[float], dict[str, Tensor]]:
    losses = []
    for number in range(3):
        batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * number + r)) for r in range(2)]
        items = [Weighted(batches[r], 0.5) for r in range(rank, 2, world)]
        losses.append(engine.step(items, lambda m, b: m(b).square().mean())["loss"])
    return losses, engine.gather(engine.module.state_dict())


def engine_case(folder: Path, ep: int, stage: int, rank: int, world: int) -> dict[str, Any]:
    """Three steps of training, from plain weights to plain weights, beside the torch engine on one rank."""
    made = Model()
    group = ParamGroup("all", list(made.parameters()), 1e-2)
    engine = DeepSpeedEngine(made, [group], OptimizerOptions(), DeepSpeedOptions(stage, ep))
    losses, weights = train(engine, rank, world)
    state = engine.state_dict()
    engine.load_state_dict(state)
    again = engine.gather(engine.module.state_dict())
    plain_y = engine.plain()(torch.ones(2, 3))
    parallel_y = engine.module(torch.ones(2, 3))
    place = folder / f"checkpoint-{world}-{ep}-{stage}-{rank}"
    save_experts(place, weights, {"moe.experts.": E})
    share = load_experts(place, rank % ep, ep)
    held = engine.scatter(weights)
    kept = max(gap(share[f"moe.experts.{n}"], held[f"moe.layer.deepspeed_moe.experts.{n}"])
               for n in ("w1", "b1", "w2", "b2"))  # fmt: skip
    engine.destroy()
    return {
        "losses": losses,
        "weights": {n: v.flatten().tolist() for n, v in weights.items()},
        "reload": max(gap(again[n], weights[n]) for n in weights),
        "plain": gap(plain_y, parallel_y),
        "moments": sorted({tuple(v["exp_avg"].shape) for n, v in state.optimizer.items() if "experts.w" in n}),
        "share": kept,
    }


def reference() -> dict[str, Any]:
    made = Model()
    engine = TorchEngine(made, [ParamGroup("all", list(made.parameters()), 1e-2)], OptimizerOptions())
    losses, weights = train(engine, 0, 1)
    return {"losses": losses, "weights": {n: v.flatten().tolist() for n, v in weights.items()}}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    results: dict[str, Any] = {"torch": reference()} if world == 1 else {}
    start(torch.device("cpu"))
    for ep in (1, 2)[:world]:
        results |= {f"{name}, ep {ep}": compare(spec, ep, rank, world) for name, spec in SPECS.items()}
        results |= {f"engine, ep {ep}, zero {z}": engine_case(folder, ep, z, rank, world) for z in (0, 2)}
    dist.barrier()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
