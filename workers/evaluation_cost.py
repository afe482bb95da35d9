"""What a model costs to use: parameters, those that one image really uses, operations, and the time of one image.

Counted on a few images that are scored anyway, one at a time, so that routing is as it is in use. Operations come from
torch's own counter (a multiplication with an addition counts two) while experts are computed one after the other, so
that padding of a kernel is not counted and the number does not depend on which kernel a machine prefers. Everything but
the time is a function of model and images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

IMAGES = 8
_ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """Of one model.

    Attributes:
        parameters: all of them.
        active_parameters: mean over the images of those that are not in an expert that the image does not use.
        flops: floating point operations of one image, mean over the images.
    """

    parameters: int
    active_parameters: float
    flops: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def model_cost(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> Cost:
    """Count a model.

    Args:
        model: whose parameters are counted.
        forwards: one forward pass for each image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from moe.layers.gemm import onednn_available
    from moe.layers.kernel_choice import use_kernel

    total = sum(value.numel() for value in model.parameters())
    active, flops = [], []
    known = {torch.ops.mkldnn._linear_pointwise: _product} if onednn_available() else {}
    with torch.no_grad(), use_kernel("loop"):
        for forward in forwards:
            counter = FlopCounterMode(display=False, custom_mapping=known)
            with _frozen(model), _unused(model) as unused, counter:
                forward()
            active.append(total - sum(unused))
            flops.append(counter.get_total_flops())
    return Cost(total, sum(active) / len(active), sum(flops) / len(flops))


def _product(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of oneDNN's ``x [..., K] @ w[N, K]^T``, which torch's counter does not know."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * x_shape[-1] * weight_shape[0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: the counter would ask one that enters a layer directly for its graph."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _unused(model: nn.Module) -> Iterator[list[int]]:
    """Parameters of experts without a row, one entry for each layer of experts that a forward pass goes through."""
    from moe.layers.executors import LocalExperts
    from moe.layers.experts import Experts

    unused: list[int] = []

    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        counts = arguments[1]
        rows = counts.tolist() if isinstance(counts, torch.Tensor) else list(counts)
        size = sum(value.numel() for value in module.parameters())
        unused.append(size * sum(row == 0 for row in rows) // len(rows))

    layers = [module for module in model.modules() if isinstance(module, Experts | LocalExperts)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        yield unused
    finally:
        for handle in handles:
            handle.remove()


def latency_ms(forwards: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median milliseconds of a pass of one image, after one round to warm up. Depends on the machine."""
    taken = []
    with torch.inference_mode():
        for round_ in range(1 + _ROUNDS):
            for forward in forwards:
                begin = time.perf_counter()
                forward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if round_:
                    taken.append(time.perf_counter() - begin)
    return 1000 * statistics.median(taken)
