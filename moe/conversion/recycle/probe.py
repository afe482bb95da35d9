"""Hooks that feed the activations of a vision transformer into the statistics, in one pass over the images.

A place is a module path inside a block and whether its input or its output is looked at, so any timm vision transformer
(and most others with a list of blocks) can be measured. Every activation is condensed the moment it exists: memory does
not grow with the number of images, layers or places.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2; places as in its public tool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe.conversion.recycle.options import StatisticsOptions
from moe.conversion.recycle.statistics import StatisticsAccumulator
from moe.errors import CheckpointError, DataError, nearest


@dataclass(frozen=True)
class Place:
    """Where activations are read: the input or the output of module ``path`` of every block."""

    path: str
    side: Literal["input", "output"]


PLACES: Mapping[str, Place] = {
    "mlp_act": Place("mlp.act", "output"),
    "attn_proj": Place("attn.proj", "input"),
    "norm2": Place("norm2", "output"),
}
"""The three places of the released tool: hidden neurons, attention rows, channels."""

GATED_PLACES: Mapping[str, Place] = {**PLACES, "mlp_act": Place("mlp.fc2", "input")}
"""For gated feed-forward layers (SwiGLU, as in EVA-02), whose hidden vector is a product: it is what enters ``fc2``."""


@contextmanager
def probing(
    model: nn.Module,
    receive: Callable[[str, int, Tensor], None],
    places: Mapping[str, Place] = PLACES,
    blocks: str = "blocks",
) -> Iterator[None]:
    """Within the context every forward hands each activation to ``receive(place, layer, activation)``.

    Args:
        model: the network.
        receive: called during the forward, once per place and layer.
        places: name -> place.
        blocks: path of the list of blocks; ``stages.*.blocks`` joins the lists of all stages.

    Raises:
        CheckpointError: the model has no such list, or a block no such module.
    """
    handles = []
    try:
        for layer, block in enumerate(_blocks(model, blocks)):
            for name, place in places.items():
                module = _module(block, place.path, f"{blocks}.{layer}")
                handles.append(_hook(module, place.side, name, layer, receive))
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    options: StatisticsOptions | None = None,
    *,
    places: Mapping[str, Place] = PLACES,
    blocks: str = "blocks",
    numbers: Iterable[int] | None = None,
) -> StatisticsAccumulator:
    """Run ``model`` in evaluation mode over ``batches`` and accumulate its statistics.

    Args:
        model: the predecessor; its training mode is restored afterwards, its weights are not touched.
        batches: images ``[B, C, H, W]``, already transformed and on the model's device.
        options: which statistics, and how they are averaged.
        places: name -> place; :data:`GATED_PLACES` for gated feed-forward layers.
        blocks: path of the list of blocks.
        numbers: global numbers of the batches when this is one shard of a pass; None counts from 0.

    Returns:
        The accumulator: ``merge`` it with other shards, then ``finalise``.

    Raises:
        CheckpointError: the model has no such modules.
        DataError: no batch, non-finite activations, or a number missing for a batch.
    """
    accumulator = StatisticsAccumulator(options)
    count = 0
    given = None if numbers is None else iter(numbers)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images in batches:
            number = count if given is None else next(given, None)
            if number is None:
                raise DataError(f"There are only {count} numbers, but more batches.", "Give one number per batch.")
            _run(model, images, accumulator, number, places, blocks)
            count += 1
    finally:
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise DataError("No images were given for the statistics.", "Give at least one batch.")
    return accumulator


def _run(
    model: nn.Module,
    images: Tensor,
    accumulator: StatisticsAccumulator,
    number: int,
    places: Mapping[str, Place],
    blocks: str,
) -> None:
    def receive(place: str, layer: int, activation: Tensor) -> None:
        accumulator.add(place, layer, activation, number)

    with torch.no_grad(), probing(model, receive, places, blocks):
        features = getattr(model, "forward_features", model)
        features(images)


def _hook(
    module: nn.Module, side: str, name: str, layer: int, receive: Callable[[str, int, Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    if side == "input":

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            receive(name, layer, inputs[0])

        return module.register_forward_pre_hook(before)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        receive(name, layer, output)

    return module.register_forward_hook(after)


def _blocks(model: nn.Module, path: str) -> list[nn.Module]:
    before, star, after = path.partition(".*.")
    if star:  # the lists of all children, one after the other
        return [block for child in _blocks(model, before) for block in _blocks(child, after)]
    children = {
        name: child for name, child in model.named_modules() if isinstance(child, (nn.ModuleList, nn.Sequential))
    }
    found = children.get(path)
    if found is None or len(found) == 0:
        raise CheckpointError(
            f"{type(model).__name__} has no list of blocks {path!r}.",
            "Statistics are for vision transformers of timm's form. " + nearest(path, children),
        )
    return list(found.children())


def _module(block: nn.Module, path: str, where: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(block.named_modules())
    if path not in modules:
        raise CheckpointError(f"{where} has no module {path!r}.", nearest(path, (name for name in modules if name)))
    return modules[path]
