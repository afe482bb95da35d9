"""The loop: exact resume, cadences, selection, averaging, early stop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe.errors import CheckpointError, Interrupted, RunFailed, SpecError
from workers.checkpoints import CheckpointDir
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine
from workers.loop import LoopSpec, epoch_halves, every, fit, mix, official_halves


class Recorder:
    """A reporter that remembers, and asks for a stop at a given checkpoint."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.progressed: list[tuple[int, dict[str, float]]] = []
        self.logs: list[str] = []
        self.checks = 0
        self.stop_after = stop_after

    def progress(self, done: int, total: int, **values: float) -> None:
        self.progressed.append((done, values))

    def log(self, message: str) -> None:
        self.logs.append(message)

    def check(self) -> None:
        self.checks += 1
        if self.stop_after is not None and self.checks >= self.stop_after:
            raise Interrupted("stop")

    def losses(self) -> list[float]:
        return [values["loss"] for _, values in self.progressed if "loss" in values]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.bn(self.conv(x))).mean((2, 3))))


def make_engine(options: OptimizerOptions | None = None, lr: float = 1e-2) -> TorchEngine:
    torch.manual_seed(0)
    net = Net()
    groups = [
        ParamGroup("body", [*net.conv.parameters(), *net.bn.parameters()], lr),
        ParamGroup("head", list(net.head.parameters()), lr, weight_decay=0.01),
    ]
    return TorchEngine(net, groups, options or OptimizerOptions())


def batches(step: int, size: int = 12):
    generator = torch.Generator().manual_seed(mix(7, step))
    x = torch.randn(size, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long()
    return [(x, y)]


def loss_fn(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def evaluate(module, step):
    assert not module.training
    x, y = batches(10_000)[0]
    with torch.no_grad():
        return {"acc": (module(x).argmax(1) == y).float().mean(), "neg_loss": -F.cross_entropy(module(x), y)}


def run(folder, spec, options=None, reporter=None, **extra):
    engine = make_engine(options)
    reporter = reporter or Recorder()
    checkpoints = CheckpointDir(folder, log=reporter.log)
    arguments = {"evaluate": evaluate, "loss_fn": loss_fn, **extra}
    result = fit(engine, arguments.pop("batches", batches), spec, reporter, checkpoints, **arguments)
    return result, engine, reporter


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), [n for n in a if not torch.equal(a[n], b[n])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(tmp_path, optimizer, precision):
    spec = LoopSpec(
        steps=17,
        seed=3,
        schedules={"body": lambda i: 0.9**i, "head": lambda i: 1 / (1 + i)},
        reset_optimizer_every=9,
        ema_decay=0.9,
        checkpoint_every=4,
        evaluate_after=every(3),
        metric="neg_loss",
    )
    options = OptimizerOptions(name=optimizer, momentum=0.9, clip=0.5, precision=precision)
    whole, engine, _ = run(tmp_path / "whole", spec, options)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", spec, options, Recorder(stop_after=3))
    resumed, engine2, reporter = run(tmp_path / "cut", spec, options)
    assert reporter.logs == ["Resumed at step 12 of 17."]
    assert resumed.evaluations == whole.evaluations and resumed.best_step == whole.best_step
    same(resumed.last, whole.last)
    same(resumed.best, whole.best)
    same(engine.state_dict().module, engine2.state_dict().module)
    for name, slots in engine.state_dict().optimizer.items():
        same(slots, engine2.state_dict().optimizer[name])


def test_a_finished_run_started_again_returns_the_same_without_training(tmp_path):
    spec = LoopSpec(steps=5, checkpoint_every=2, evaluate_after=every(2))
    first, *_ = run(tmp_path, spec)
    again, _, reporter = run(tmp_path, spec)
    same(first.last, again.last)
    assert reporter.losses() == [] and again.evaluations == first.evaluations


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    def net_and_batches(split):
        def cut(step):
            x, y = batches(step)[0]
            return list(zip(x.chunk(split), y.chunk(split), strict=True))

        return cut

    spec = LoopSpec(steps=4, checkpoint_every=10, evaluation_mode=True, evaluate_last=False)
    whole, *_ = run(tmp_path / "a", spec, batches=net_and_batches(1))
    parts, *_ = run(tmp_path / "b", spec, batches=net_and_batches(3))
    for name in whole.last:
        torch.testing.assert_close(whole.last[name], parts.last[name], rtol=1e-4, atol=1e-5)


def test_evaluation_mode_freezes_the_statistics(tmp_path):
    result, *_ = run(tmp_path, LoopSpec(steps=3, evaluation_mode=True))
    assert torch.equal(result.last["bn.running_mean"], torch.zeros(4))


def test_official_cadences():
    after = official_halves(7)
    assert [i for i in range(21) if after(i)] == [3, 6, 9, 12, 15, 18]
    assert [i for i in range(4) if official_halves(1)(i)] == [1, 2, 3]
    assert [i for i in range(10) if epoch_halves(5)(i)] == [2, 4, 7, 9]
    assert [i for i in range(7) if every(3)(i)] == [2, 5]


def scripted(scores):
    left = list(scores)
    return lambda module, step: {"acc": left.pop(0)}


def test_selection_is_by_strict_improvement(tmp_path):
    scores = [0.0, 0.5, 0.5, 0.4, 0.6]
    spec = LoopSpec(steps=5, evaluate_after=every(1))
    ours, *_ = run(tmp_path / "ours", spec, evaluate=scripted(scores))
    assert [e.selected for e in ours.evaluations] == [True, True, False, False, True]
    official, *_ = run(
        tmp_path / "official", LoopSpec(steps=5, evaluate_after=every(1), best_from=0.0), evaluate=scripted(scores)
    )
    assert [e.selected for e in official.evaluations] == [False, True, False, False, True]


def test_when_nothing_is_selected_the_last_state_goes_on(tmp_path):
    spec = LoopSpec(steps=2, evaluate_after=every(1), best_from=0.0)
    result, *_ = run(tmp_path, spec, evaluate=scripted([0.0, 0.0]))
    assert result.best is None and result.best_step is None
    same(result.selected, result.last)


def test_early_stop(tmp_path):
    spec = LoopSpec(steps=50, evaluate_after=every(1), patience=2)
    result, *_ = run(tmp_path, spec, evaluate=scripted([0.3, 0.4, 0.4, 0.2]))
    assert result.steps == 4 and result.best_step == 1


def test_the_average_is_evaluated_selected_and_the_weights_put_back(tmp_path):
    spec = LoopSpec(steps=6, ema_decay=0.5, evaluate_after=every(2), metric="neg_loss", evaluation_mode=True)
    result, engine, _ = run(tmp_path, spec)
    torch.manual_seed(0)
    expected = {name: p.detach().clone() for name, p in Net().named_parameters()}
    plain = make_engine()
    plain.module.eval()
    for step in range(6):
        plain.step(batches(step), loss_fn)
        for name, p in plain.module.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * p.detach()
    for name, value in expected.items():
        torch.testing.assert_close(result.last[name], value)
        assert torch.equal(engine.module.state_dict()[name], plain.module.state_dict()[name])


def test_rates_follow_the_schedule_of_their_group(tmp_path):
    spec = LoopSpec(steps=3, schedules={"head": lambda i: 0.5**i, "*": lambda i: 2.0}, evaluate_last=False)
    _, _, reporter = run(tmp_path, spec)
    assert [v["lr/head"] for _, v in reporter.progressed] == [1e-2, 5e-3, 2.5e-3]
    assert [v["lr/body"] for _, v in reporter.progressed] == [2e-2] * 3


def test_resetting_forgets_the_moments(tmp_path):
    engine = make_engine()
    engine.step(batches(0), loss_fn)
    fresh = make_engine()
    fresh.load_state_dict(type(engine.state_dict())(module=engine.state_dict().module))
    engine.reset_optimizer()
    for e in (engine, fresh):
        torch.manual_seed(0)
        e.step(batches(1), loss_fn)
    same(engine.state_dict().module, fresh.state_dict().module)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    seen = []

    def watch(module, batch):
        logits = module(batch[0])
        seen.append(logits.dtype)
        return F.cross_entropy(logits, batch[1])

    _, engine, _ = run(tmp_path, LoopSpec(steps=1), OptimizerOptions(precision="bf16"), loss_fn=watch)
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RunFailed, match="not finite"):
        run(tmp_path, LoopSpec(steps=2), loss_fn=lambda m, b: loss_fn(m, b) * math.nan)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(SpecError, match="at least 1"):
        LoopSpec(steps=0)
    with pytest.raises(SpecError, match="ema_decay"):
        LoopSpec(steps=1, ema_decay=1.0)
    with pytest.raises(SpecError, match="'f1' is not among"):
        run(tmp_path, LoopSpec(steps=1, metric="f1"))


def test_a_checkpoint_beyond_the_asked_steps_is_refused(tmp_path):
    run(tmp_path, LoopSpec(steps=4))
    with pytest.raises(CheckpointError, match="at step 4"):
        run(tmp_path, LoopSpec(steps=3))


def test_seeds_do_not_collide():
    seeds = {mix(a, b, c) for a in range(10) for b in range(50) for c in range(4)}
    assert len(seeds) == 2000
    assert copy.copy(mix(1, 2)) == mix(1, 2) and all(0 <= s < 2**63 for s in seeds)
