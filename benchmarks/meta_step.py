"""One meta step, optimiser included: the official procedure against cached expert features, in fp32 and bf16.

Official-like: every expert runs on the support batch in every step (its owner too), and a log-only query pass precedes
the adaptation. Ours reads the features from the cache and leaves the pass out. Both are this project's ``meta_losses``.
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


def run(sizes: Sizes) -> list[Row]:
    """Two rows: fp32 and bf16 with channels-last images."""
    setting = make(sizes)
    episode = setting.episode(1)
    expected, cached = (gradients(setting, config(False), e) for e in (uncached(setting, episode), episode))
    bf16_episode = channels_last(episode)
    rounded = gradients(setting, config(False, "bf16"), bf16_episode)
    official = stepper(setting, config(True), lambda: uncached(setting, episode))
    ours = stepper(setting, config(False), lambda: episode)
    faster = stepper(setting, config(False, "bf16"), lambda: bf16_episode, last=True)
    base, fp32, bf16 = alternate([official, ours, faster], sizes.repetitions)
    what = f"meta step, {sizes.backbone}, {sizes.pixels} px, {EXPERTS} experts, {SUPPORT}+{QUERY} images"
    return [
        Row(
            f"{what}: cached, fp32", base, fp32, 1.4, f"gradients differ by {distance(cached, expected):.1e} (relative)"
        ),
        Row(
            f"{what}: cached, bf16",
            base,
            bf16,
            2.0,
            f"gradients differ by {distance(rounded, expected):.1e} (relative)",
        ),
    ]


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
