"""The cases of ``test_engines.py``, run by one process or by a pair: ``python -m tests.workers.engine_cases FOLDER``.

Importing deepspeed and starting a process group cost seconds, so all cases share them; results go to one JSON file per
rank and the tests look at those.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe.aggregator import Aggregator
from moe.backbones import build_student
from moe.meta_step import Episode, EpisodeModule
from moe.specs import BackboneSpec, MetaStepSpec, StudentMoESpec
from workers.checkpoints import Checkpoint, CheckpointDir
from workers.engines.base import Engine, EngineState, OptimizerOptions, ParamGroup, Weighted
from workers.engines.deepspeed import DeepSpeedEngine, DeepSpeedOptions, start
from workers.engines.torch import TorchEngine

TASKS, STEPS = 3, 3
SPEC = BackboneSpec(name="tiny_cnn", channels=1, width=2)


def module(top_k: int = 2, order: str = "second", precision: str = "fp32", moe: bool = True) -> EpisodeModule:
    torch.manual_seed(0)
    block = StudentMoESpec(num_experts=4, top_k=top_k, balance_weight=0.1) if moe else None
    student = build_student(SPEC, 3, block)
    if student.moe is not None:
        with torch.no_grad():  # zero outputs would hide the experts
            for name, parameter in student.moe.named_parameters():
                if "w2" in name:
                    parameter.normal_(0, 0.2)
    aggregator = Aggregator(student.feature_dim, 3, heads=4)
    aggregator.mlp.requires_grad_(False)
    return EpisodeModule(student, aggregator, MetaStepSpec(inner_lr=0.05, order=order, precision=precision))


def episode(number: int) -> Episode:
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, 3, (5,), generator=generator)
    owners = torch.full((6,), number % 3)
    return Episode(normal(6, 1, 12, 12), normal(5, 1, 12, 12), labels, normal(6, 3, 32), owners)


def tasks(step: int, rank: int, world_size: int, count: int = TASKS) -> list[Weighted]:
    """Episodes of a step on this rank, padded to the same number on all ranks."""
    mine = [Weighted(episode(step * count + t), 1 / count) for t in range(rank, count, world_size)]
    if len(mine) < -(-count // world_size):
        mine.append(Weighted(episode(step * count), 0.0))
    return mine


def groups(made: EpisodeModule) -> list[ParamGroup]:
    aggregator = [p for p in made.aggregator.parameters() if p.requires_grad]
    return [ParamGroup("student", list(made.student.parameters()), 3e-3), ParamGroup("aggregator", aggregator, 1e-3)]


def torch_engine(options: OptimizerOptions | None = None, **kind: Any) -> TorchEngine:
    made = module(**kind)
    return TorchEngine(made, groups(made), options or OptimizerOptions())


def parallel(stage: int = 1, ep: int = 1, options: OptimizerOptions | None = None, **kind: Any) -> DeepSpeedEngine:
    made = module(**kind)
    return DeepSpeedEngine(made, groups(made), options or OptimizerOptions(), DeepSpeedOptions(stage, ep))  # type: ignore[arg-type]


def run(
    engine: Engine, first: int = 0, last: int = STEPS, reset_at: int | None = None, count: int = TASKS
) -> tuple[list[float], EngineState]:
    losses = []
    for step in range(first, last):
        if step == reset_at:
            engine.reset_optimizer()
        engine.set_rates({"student": 0.9**step})
        engine.module.train()
        values = engine.step(tasks(step, engine.rank, engine.world_size, count), lambda made, batch: made(batch))
        losses.append(values["loss"])
    state = engine.state_dict()
    engine.destroy()
    return losses, state


def difference(a: EngineState, b: EngineState) -> dict[str, float]:
    """Largest absolute difference of the weights, largest relative one of the moments; names must agree."""
    if set(a.module) != set(b.module) or set(a.optimizer) != set(b.optimizer):
        return {"names": 1.0}
    weights = max(float((a.module[name].double() - b.module[name].double()).abs().max()) for name in a.module)
    moments = 0.0
    for name, slots in b.optimizer.items():
        for slot, value in slots.items():
            scale = float(value.abs().max()) + 1e-12
            moments = max(moments, float((a.optimizer[name][slot] - value).abs().max()) / scale)
    return {"weights": weights, "moments": moments}


def cases(folder: Path, world_size: int) -> dict[str, Callable[[], Any]]:
    """Case name -> function; a result is JSON."""
    reference: dict[str, tuple[list[float], EngineState]] = {}

    def compare(key: str, build: Callable[[], Engine], count: int = TASKS, **kind: Any) -> dict[str, Any]:
        if key not in reference:
            reference[key] = stored(key, lambda: run(torch_engine(**kind), count=count))
        losses, state = run(build(), count=count)
        return {"losses": losses, "expected": reference[key][0], **difference(state, reference[key][1])}

    def stored(key: str, make: Callable[[], tuple[list[float], EngineState]]) -> tuple[list[float], EngineState]:
        """The plain torch engine's result on ONE rank: made by the single process, read by the pair."""
        place = CheckpointDir(folder / f"reference-{key}")
        if world_size == 1:
            losses, state = make()
            place.save(Checkpoint(STEPS, state, counters={"losses": losses}))
            return losses, state
        found = place.latest()
        assert found is not None
        return found.counters["losses"], found.engine

    def resume(write: Callable[[], Engine] | None, read: Callable[[], Engine] | None) -> dict[str, Any]:
        """Two steps under one engine (here or earlier by the other number of ranks), the rest under another."""
        place = CheckpointDir(folder / "handover")
        if write is not None:
            engine = write()
            losses, state = run(engine, 0, 2)
            if engine.rank == 0:
                place.save(Checkpoint(2, state, counters={"losses": losses}))
            engine.barrier()
        if read is None:
            return {}
        found = place.latest()
        assert found is not None
        engine = read()
        engine.load_state_dict(found.engine)
        losses, state = run(engine, 2)
        expected = stored("k2", lambda: run(torch_engine()))
        return {
            "losses": found.counters["losses"] + losses,
            "expected": expected[0],
            **difference(state, expected[1]),
        }

    def export() -> dict[str, Any]:
        engine = parallel(1, world_size)
        run_only = [engine.step(tasks(0, engine.rank, engine.world_size), lambda made, batch: made(batch))]
        whole = engine.gather(engine.module.state_dict())
        plain = module()
        plain.load_state_dict(whole)
        batch = episode(99)
        plain.eval()
        engine.module.eval()
        ours = plain.student(batch.query)
        theirs = engine.module.student(batch.query)
        evaluated = engine.plain().eval().student(batch.query)
        engine.destroy()
        return {
            "difference": float((ours - theirs).abs().max()),
            "plain": float((ours - evaluated).abs().max()),
            "finite": run_only[0]["loss"],
        }

    common: dict[str, Callable[[], Any]] = {
        "torch": lambda: compare("k2", torch_engine),
        **{f"zero{stage}": (lambda stage=stage: compare("k2", lambda: parallel(stage))) for stage in (0, 1, 2)},
        "k1": lambda: compare("k1", lambda: parallel(1, world_size, top_k=1), top_k=1),
        "dense": lambda: compare("dense", lambda: parallel(1, moe=False), moe=False),
        "exact_aggregator": lambda: compare(
            "exact", lambda: parallel(1, world_size, order="exact_aggregator"), 4, order="exact_aggregator"
        ),
        "clip": lambda: compare(
            "clip", lambda: parallel(1, options=OptimizerOptions(clip=0.3)), options=OptimizerOptions(clip=0.3)
        ),
        "sgd": lambda: compare(
            "sgd",
            lambda: parallel(2, options=OptimizerOptions("sgd", momentum=0.9)),
            options=OptimizerOptions("sgd", momentum=0.9),
        ),
        "bf16": lambda: {"losses": run(parallel(1, world_size, precision="bf16"))[0]},
        "reset": lambda: {
            "losses": run(parallel(1), reset_at=2)[0],
            "expected": run(torch_engine(), reset_at=2)[0],
        },
        "export": export,
    }
    if world_size == 1:
        return {
            **common,
            "write": lambda: resume(lambda: parallel(1), None),
            "from_two_ranks": lambda: resume(None, lambda: parallel(2)),
        }
    return {
        "from_one_rank": lambda: resume(None, lambda: parallel(1, 2)),
        **common,
        **{f"ep_zero{stage}": (lambda stage=stage: compare("k2", lambda: parallel(stage, 2))) for stage in (0, 1, 2)},
        "torch_to_parallel": lambda: resume(torch_engine, lambda: parallel(2, 2)),
        "parallel_to_torch": lambda: resume(lambda: parallel(2, 2), torch_engine),
        "zero0_to_zero1": lambda: resume(lambda: parallel(0, 2), lambda: parallel(1, 1)),
        "write": lambda: resume(lambda: parallel(1, 2), None),
    }


def main(folder: Path) -> None:
    """One process makes the references; the pair waits for them; then the first reads what the pair wrote."""
    torch.set_num_threads(1)
    start(torch.device("cpu"))
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    if world_size > 1:
        wait_for(folder / "references-ready")
    todo = cases(folder, world_size)
    last = {name: todo.pop(name) for name in ("from_two_ranks",) if name in todo}
    results = {name: case() for name, case in todo.items()}
    if world_size == 1:
        (folder / "references-ready").touch()
        wait_for(folder / "pair-0.json")
    results |= {name: case() for name, case in last.items()}
    aside = folder / f"{world_size}-{rank}.writing"
    aside.write_text(json.dumps(results))
    os.replace(aside, folder / f"{'pair' if world_size > 1 else 'single'}-{rank}.json")


def wait_for(path: Path, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
