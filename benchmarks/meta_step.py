"""One meta step, optimiser included: the official procedure against cached expert features, in fp32 and bf16.

Official-like: every expert runs on the support batch in every step (its owner too), and a log-only query pass precedes
the adaptation. Ours reads the features from the cache, leaves the pass out and uses ``workers.second_order``. Both are
this project's ``meta_losses``. Errors of the gradients are relative to the same step in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import Row, alternate
from benchmarks.setting import EXPERTS, QUERY, SUPPORT, Setting, Sizes, make
from moe.meta_step import Episode, EpisodeModule
from moe.specs import MetaStepSpec
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine
from workers.second_order import prepare

_EPISODES = (1, 2, 3)


def run(sizes: Sizes) -> list[Row]:
    """Two rows: fp32 and bf16 with channels-last images."""
    setting = make(sizes)
    fast = replace(setting, student=copy.deepcopy(setting.student))
    prepare(fast.student.features, setting.images(2, 3))
    episode = setting.episode(1)
    low = channels_last(episode)
    official_error, fp32_error, bf16_error = _errors(setting, fast)
    official = stepper(setting, config(True), lambda: uncached(setting, episode))
    ours = stepper(fast, config(False), lambda: episode)
    faster = stepper(fast, config(False, "bf16"), lambda: low, last=True)
    base, fp32, bf16 = alternate([official, ours, faster], sizes.repetitions)
    what = f"meta step, {sizes.backbone}, {sizes.pixels} px, {EXPERTS} experts, {SUPPORT}+{QUERY} images"
    return [
        Row(f"{what}: fp32", base, fp32, 1.4, f"gradient error {fp32_error}, official {official_error}"),
        Row(f"{what}: bf16", base, bf16, 2.0, f"gradient error {bf16_error}"),
    ]


def _errors(setting: Setting, fast: Setting) -> list[str]:
    """Relative errors of the gradients of official fp32, ours in fp32 and ours in bf16, over a few episodes.

    One episode says little: a ReLU whose input rounds to the other side of zero moves the error tenfold either way.
    """
    columns = zip(*(_episode_errors(setting, fast, setting.episode(seed)) for seed in _EPISODES), strict=True)
    return [" ".join(f"{error:.0e}" for error in column) for column in columns]


def _episode_errors(setting: Setting, fast: Setting, episode: Episode) -> list[float]:
    wide = replace(setting, student=copy.deepcopy(setting.student).double())
    wide = replace(wide, aggregator=copy.deepcopy(setting.aggregator).double())
    doubles = {name: getattr(episode, name).double() for name in ("support", "query", "tokens_SED")}
    exact = gradients(wide, config(False), replace(episode, **doubles))
    sides = (
        (setting, config(True), uncached(setting, episode)),
        (fast, config(False), episode),
        (fast, config(False, "bf16"), channels_last(episode)),
    )
    return [distance(gradients(*side), exact) for side in sides]


def config(log_pass: bool, precision: str = "fp32") -> MetaStepSpec:
    """The meta step of the public code's FMoW settings."""
    return MetaStepSpec(inner_lr=1e-4, loss_before=log_pass, precision=precision)  # type: ignore[arg-type]


def uncached(setting: Setting, episode: Episode) -> Episode:
    """The same episode with its tokens computed anew."""
    return replace(episode, tokens_SED=setting.tokens(episode.support))


def channels_last(episode: Episode) -> Episode:
    """Images in the memory layout that bf16 convolutions like."""
    support, query = (x.contiguous(memory_format=torch.channels_last) for x in (episode.support, episode.query))
    return replace(episode, support=support, query=query)


def stepper(
    setting: Setting, spec: MetaStepSpec, episode: Callable[[], Episode], last: bool = False
) -> Callable[[], object]:
    """A function that makes one whole update on a private copy of the models."""
    module = EpisodeModule(copy.deepcopy(setting.student), copy.deepcopy(setting.aggregator), spec)
    if last:
        module.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [
        ParamGroup("student", list(module.student.parameters()), 1e-5),
        ParamGroup("aggregator", list(module.aggregator.parameters()), 1e-6),
    ]
    engine = TorchEngine(module, groups, OptimizerOptions())
    return lambda: engine.step([episode()], lambda made, batch: made(batch))


def gradients(setting: Setting, spec: MetaStepSpec, episode: Episode) -> dict[str, Tensor]:
    """Gradients of one episode by parameter name, float64."""
    module = EpisodeModule(copy.deepcopy(setting.student), copy.deepcopy(setting.aggregator), spec)
    module(episode).total.backward()
    return {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """``|a - b| / |b|`` over all parameters together."""
    top = sum(float((a[name] - b[name]).square().sum()) for name in b)
    bottom = sum(float(value.square().sum()) for value in b.values())
    return float((top / bottom) ** 0.5)
