"""The training loop: everything that is a function of the step.

One step = micro-batches -> engine -> rates; evaluation, selection, averaging and checkpoints hang on the step number.
Batches, rates and random numbers depend on (seed, step) alone, never on what happened before, so a run that resumes
from a checkpoint is bit-equal to one that was never disturbed, on one rank or on many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from moe.algorithms.base import Algorithm
from moe.errors import CheckpointError, SpecError
from workers.checkpoints import Checkpoint, CheckpointDir
from workers.context import Reporter
from workers.engines.base import Engine, LossFunction, require_finite

OBSERVED = "loss"
"""Score that a weight average observes: the validation loss."""
AVERAGE, TENSOR = "average:", "__tensor__"
Schedule = Callable[[int], float]
"""Update number from 0 -> multiplier of the base rate (``workers.schedules``)."""
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
"""``(module, step) -> scores``; called on every rank, must return the same numbers on all of them."""


@dataclass(frozen=True)
class LoopSpec:
    """What the loop does when.

    Attributes:
        steps: updates in total, >= 1.
        seed: source of dropout noise and the like; the generator is re-seeded from (seed, step) before every update.
        schedules: parameter group -> multiplier of its rate; ``"*"`` is for groups not named; constant when absent.
        reset_optimizer_every: forget the moments every so many updates (official meta-training: every epoch).
        ema_decay: keep an exponential average of the weights and evaluate and select that; None is off.
        checkpoint_every: updates between checkpoints, >= 1.
        evaluate_after: update number -> evaluate after it? (:func:`every`, :func:`official_halves`,
            :func:`epoch_halves`).
        evaluate_last: evaluate after the last update as well.
            Differs: the official stages may end with updates that were never scored.
        metric: score that selects, higher is better; the last one returned when None.
        best_from: value that the first score must exceed. ``-inf``: the first evaluation is always selected.
            Parity: 0 in the official code, where nothing is selected while the score is 0.
        patience: stop after so many evaluations without a strict improvement; None never stops early.
        evaluation_mode: train with frozen BatchNorm statistics and without dropout (meta-training).
        pause: stop after so many updates with a checkpoint, as if the run had been cut off there; None never does.
    """

    steps: int
    seed: int = 0
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    reset_optimizer_every: int | None = None
    ema_decay: float | None = None
    checkpoint_every: int = 100
    evaluate_after: Callable[[int], bool] | None = None
    evaluate_last: bool = True
    metric: str | None = None
    best_from: float = float("-inf")
    patience: int | None = None
    evaluation_mode: bool = False
    pause: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1:
            raise SpecError(f"steps={self.steps} and checkpoint_every={self.checkpoint_every} must both be at least 1.")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise SpecError(f"ema_decay={self.ema_decay} must lie strictly between 0 and 1.")


@dataclass(frozen=True)
class Evaluation:
    """Scores after an update (0-based), and whether they were the best so far.

    ``means`` are the losses and parts, averaged over the updates since the evaluation before.
    """

    step: int
    scores: dict[str, float]
    selected: bool
    means: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FitResult:
    """What a finished loop hands back.

    Attributes:
        steps: updates done; fewer than asked for after an early stop.
        evaluations: all of them, in order, also those before a resume.
        best_step: update after which the selected state was saved, or None when no score exceeded ``best_from``.
        best_score: its score.
        best: its weights and buffers by name (whole model); None when nothing was selected.
        last: weights and buffers after the last update (the averaged ones when averaging is on).
        left: updates that a pause left undone; 0 when training has come to its end.
        paused: scores of the state at the pause, whether or not an evaluation was due (then nobody else sees them).
    """

    steps: int
    evaluations: list[Evaluation]
    best_step: int | None
    best_score: float | None
    best: dict[str, torch.Tensor] | None
    last: dict[str, torch.Tensor]
    left: int = 0
    paused: dict[str, float] = field(default_factory=dict)

    @property
    def selected(self) -> dict[str, torch.Tensor]:
        """The best state, or the last one when nothing was selected, so that there is always a state to go on with."""
        return self.last if self.best is None else self.best


def every(interval: int) -> Callable[[int], bool]:
    """Evaluate after every ``interval`` updates."""
    return lambda step: (step + 1) % max(1, interval) == 0


def official_halves(batches_per_epoch: int) -> Callable[[int], bool]:
    """Official cadence of the supervised stages: after update ``i`` with ``i != 0`` and ``i mod (n//2) == 0``.

    Differs: an epoch of fewer than two batches counts as two (the official code divides by zero).
    """
    half = max(1, batches_per_epoch // 2)
    return lambda step: step != 0 and step % half == 0


def epoch_halves(batches_per_epoch: int) -> Callable[[int], bool]:
    """Official cadence of meta-training: after iteration ``n//2`` of each epoch and after each epoch."""
    middle = batches_per_epoch // 2
    return lambda step: step % batches_per_epoch in (middle, batches_per_epoch - 1)


def fit(
    engine: Engine,
    batches: Callable[[int], Sequence[Any]],
    spec: LoopSpec,
    reporter: Reporter,
    checkpoints: CheckpointDir,
    evaluate: Evaluate | None = None,
    loss_fn: LossFunction | None = None,
    algorithm: Algorithm[Any] | None = None,
    restored: Callable[[Sequence[Evaluation]], None] | None = None,
) -> FitResult:
    """Train to the end, resuming from the newest usable checkpoint.

    Args:
        engine: module, optimiser and ranks.
        batches: update number -> this rank's micro-batches (plain, or ``engines.base.Weighted``).
        spec: what happens when.
        reporter: progress every step; asked whether to stop after each checkpoint.
        checkpoints: where the state lives; a folder that every rank can read.
        evaluate: scores the current state (the averaged weights when averaging is on); module in evaluation mode.
        loss_fn: ``(module, batch) -> Losses``; by default the algorithm's loss, or what the module returns.
        algorithm: makes an update out of engine steps, may drop the optimiser's moments and average the weights; the
            update then has one batch, not micro-batches.
        restored: told the evaluations so far before the first update, for an ``evaluate`` that depends on them.

    Raises:
        RunFailed: the loss stopped being finite.
        Interrupted: a stop was asked for; the last checkpoint is kept.
        CheckpointError: the checkpoint belongs to another model or to longer training than ``spec.steps``.
    """
    loop = _Loop(engine, spec, reporter, checkpoints, evaluate, algorithm)
    loop.resume()
    if restored is not None:
        restored(loop.evaluations)
    end = spec.steps if spec.pause is None else min(spec.pause, spec.steps)
    while loop.step < end and not loop.exhausted:
        loop.update(batches, loss_fn)
    return loop.result()


class _Loop:
    """State of one :func:`fit`: the counters that a checkpoint must hold, and nothing else."""

    def __init__(
        self,
        engine: Engine,
        spec: LoopSpec,
        reporter: Reporter,
        checkpoints: CheckpointDir,
        evaluate: Evaluate | None,
        algorithm: Algorithm[Any] | None,
    ) -> None:
        self.engine, self.spec, self.reporter, self.checkpoints, self.evaluate = (
            engine,
            spec,
            reporter,
            checkpoints,
            evaluate,
        )
        self.algorithm = algorithm
        self.average = algorithm.averaging() if algorithm is not None else None
        if self.average is not None and spec.ema_decay is not None:
            raise SpecError("The algorithm averages weights itself.", "Leave ema_decay out.")
        self.settled = False
        self.step = 0
        self.sums: dict[str, float] = {}
        self.updates = 0
        self.evaluations: list[Evaluation] = []
        self.best_step: int | None = None
        self.best_score: float | None = None
        self.stale = 0
        self.ema: dict[str, torch.Tensor] = {}
        if spec.ema_decay is not None:
            self.ema = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}

    @property
    def exhausted(self) -> bool:
        return self.settled or (self.spec.patience is not None and self.stale >= self.spec.patience)

    def update(self, batches: Callable[[int], Sequence[Any]], loss: LossFunction | None) -> None:
        """One optimiser step with everything that follows from its number."""
        spec, engine, step = self.spec, self.engine, self.step
        if self._forgets(step):
            engine.reset_optimizer()
        rates = engine.set_rates({name: schedule(step) for name, schedule in spec.schedules.items()})
        engine.module.train(not spec.evaluation_mode)
        torch.manual_seed(mix(spec.seed, step, engine.rank))
        values = self._values(batches(step), loss)
        require_finite(values)
        self._average()
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.updates += 1
        self.step = step + 1
        if engine.rank == 0:
            rate_values = {"lr" if len(rates) == 1 else f"lr/{name}": rate for name, rate in rates.items()}
            self.reporter.progress(self.step, spec.steps, **values, **rate_values)
        last = self.step == spec.steps
        due = spec.evaluate_after is not None and spec.evaluate_after(step)
        if self.evaluate is not None and (due or (last and spec.evaluate_last)):
            self._score(step)
        if self.step % spec.checkpoint_every == 0 or last or self.exhausted or self.step == spec.pause:
            self.save()

    def _forgets(self, step: int) -> bool:
        """Whether the optimiser's moments go before this update."""
        interval = self.spec.reset_optimizer_every
        periodic = bool(interval and step and step % interval == 0)
        return periodic or (self.algorithm is not None and self.algorithm.restarts_optimizer(step))

    def _values(self, batch: Sequence[Any], loss: LossFunction | None) -> dict[str, float]:
        """Make the update and return the loss and its parts."""
        engine, algorithm, step = self.engine, self.algorithm, self.step
        if algorithm is None:
            return engine.step(batch, loss or (lambda module, piece: module(piece)))
        of = loss or (lambda module, piece: algorithm.loss_at(module, piece, step))
        return algorithm.update(engine.module, batch, lambda part: engine.step([part], of))

    def _average(self) -> None:
        if self.average is not None:
            self.average.update(self.engine.module.state_dict(), self.step)
        decay = self.spec.ema_decay
        if decay is None:
            return
        with torch.no_grad():
            for name, parameter in self.engine.module.named_parameters():
                self.ema[name].lerp_(parameter.detach().float(), 1.0 - decay)

    def _score(self, step: int) -> None:
        engine, evaluate = self.engine, self.evaluate
        if evaluate is None:
            return
        engine.module.eval()
        if self.average is not None and self.average.observes:
            loss = evaluate(engine.plain().eval(), step).get(OBSERVED)
            if loss is None:
                raise SpecError(f"The algorithm's weight average needs the score {OBSERVED!r} of every evaluation.")
            self.settled = self.average.observe(float(loss))
        scores = self._scores(evaluate, step)
        metric = self.spec.metric or list(scores)[-1]
        if metric not in scores:
            raise SpecError(f"The selection metric {metric!r} is not among the scores: {', '.join(scores)}.")
        threshold = self.spec.best_from if self.best_score is None else self.best_score
        selected = scores[metric] > threshold
        means = {name: value / self.updates for name, value in self.sums.items()} if self.updates else {}
        self.evaluations.append(Evaluation(step, scores, selected, means))
        self.sums, self.updates = {}, 0
        self.stale = 0 if selected else self.stale + 1
        if selected:
            self.best_step, self.best_score = step, scores[metric]
            weights = self.weights()
            if engine.rank == 0:
                self.checkpoints.save_best(weights)
        if engine.rank == 0:
            shown = {f"val/{name}": value for name, value in scores.items()}
            self.reporter.progress(self.step, self.spec.steps, **shown)

    def _scores(self, evaluate: Evaluate, step: int) -> dict[str, float]:
        """Scores of the current state, of the averaged weights when averaging is on. Collective."""
        with _Swapped(self.engine.module, self._averaged()):
            return {name: float(value) for name, value in evaluate(self.engine.plain().eval(), step).items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole-model weights and buffers, the averaged weights when averaging is on. Collective."""
        return self.engine.gather({**self.engine.module.state_dict(), **self._averaged()})

    def _averaged(self) -> dict[str, torch.Tensor]:
        return self.ema if self.average is None else self.average.average()

    def save(self) -> None:
        """Write a checkpoint (collective), then give a pending stop request its chance."""
        state = self.engine.state_dict()
        ema = self.engine.gather(self.ema) if self.ema else {}
        counters = {
            "best_step": self.best_step,
            "best_score": self.best_score,
            "stale": self.stale,
            "settled": self.settled,
            "sums": self.sums,
            "updates": self.updates,
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
        }
        if self.average is not None:
            tensors, counters["average"] = split_state(self.average.state_dict())
            ema = {f"{AVERAGE}{name}": value for name, value in self.engine.gather(tensors).items()}
        if self.engine.rank == 0:
            self.checkpoints.save(Checkpoint(self.step, state, ema, counters))
        self.engine.barrier()
        self.reporter.check()

    def resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if there is one."""
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return
        if checkpoint.step > self.spec.steps:
            raise CheckpointError(
                f"The checkpoint in {self.checkpoints.folder} is at step {checkpoint.step}, beyond the "
                f"{self.spec.steps} steps asked for.",
                "Delete that folder to start afresh.",
            )
        self.engine.load_state_dict(checkpoint.engine)
        if self.spec.ema_decay is not None:
            self.ema = self.engine.scatter(checkpoint.ema)
        counters = checkpoint.counters
        if self.average is not None:
            tensors = {name.removeprefix(AVERAGE): value for name, value in checkpoint.ema.items()}
            self.average.load_state_dict(join_state(self.engine.scatter(tensors), counters["average"]))
        self.step, self.stale, self.settled = checkpoint.step, counters["stale"], counters["settled"]
        self.sums, self.updates = counters["sums"], counters["updates"]
        self.best_step, self.best_score = counters["best_step"], counters["best_score"]
        self.evaluations = [Evaluation(**record) for record in counters["evaluations"]]
        self.reporter.log(f"Resumed at step {self.step} of {self.spec.steps}.")

    def result(self) -> FitResult:
        best = None if self.best_step is None else self.checkpoints.best()
        left = 0 if self.exhausted else self.spec.steps - self.step
        paused: dict[str, float] = {}
        if left and self.evaluate is not None:
            due = self.evaluations and self.evaluations[-1].step == self.step - 1
            self.engine.module.eval()
            paused = self.evaluations[-1].scores if due else self._scores(self.evaluate, self.step - 1)
        weights = self.weights()
        return FitResult(self.step, self.evaluations, self.best_step, self.best_score, best, weights, left, paused)


class _Swapped:
    """Put other weights and buffers into a module for the time of a ``with`` block."""

    def __init__(self, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        self._parameters = {name: p for name, p in module.state_dict().items() if name in weights}
        self._weights = weights
        self._kept: dict[str, torch.Tensor] = {}

    def __enter__(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._kept[name] = parameter.detach().clone()
                parameter.copy_(self._weights[name])

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._kept[name])


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """A nested state -> its tensors by number, and the rest as JSON with the numbers in their places."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value
            return {TENSOR: name}
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list | tuple) else value

    return tensors, walk(state)


def join_state(tensors: Mapping[str, torch.Tensor], rest: Any) -> Any:
    """Inverse of :func:`split_state`."""
    if isinstance(rest, Mapping):
        if rest.keys() == {TENSOR}:
            return tensors[rest[TENSOR]]
        return {key: join_state(tensors, item) for key, item in rest.items()}
    return [join_state(tensors, item) for item in rest] if isinstance(rest, list) else rest


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several integers, stable across machines and Python versions (SplitMix64 steps)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
