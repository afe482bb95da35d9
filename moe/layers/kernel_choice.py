"""Which kernel computes the experts: a rule of device, type, sizes and share of chosen experts, or what was forced.

The rule is fixed, not measured while running, so that equal seeds give equal bits on equal machines; ``python -m
benchmarks moe_layer`` measures whether it still holds. Figures behind it: ``docs/kernels.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from moe.errors import SpecError, nearest
from moe.layers.gemm import onednn_available
from moe.layers.kernel_grouped import DTYPES, grouped_available

RowKernel = Literal["grouped", "loop", "padded", "baddbmm"]
Kernel = Literal["auto", "grouped", "loop", "padded", "baddbmm", "masked_dense"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)

# Measured on one core of a recent x86 server (docs/kernels.md).
LOOP_WORK = 2_500_000  # rows x D x H of one expert, from where its products outweigh the calls of the loop
LOOP_WORK_16 = 20_000_000  # the same for 16-bit types
PADDING = 1.5  # most that padding to the largest group may multiply the work
ROW_UNITS = 80  # hidden units that cost as much as moving one row to its expert and back
EXPERT_UNITS = 4_500_000  # hidden units x rows x D that cost as much as calling one more expert
FEW_TOKENS = 16  # up to here a product takes as long as reading its weights
FRESH_PAGES = 32 * 2**20  # bytes

_FORCED: ContextVar[Kernel] = ContextVar("moe_kernel", default="auto")


@dataclass(frozen=True)
class Choice:
    """A kernel and the reason in words."""

    kernel: RowKernel
    reason: str


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Force a kernel for every layer inside the block whose own setting is ``auto``.

    ``masked_dense`` applies to layers that route tokens; where rows are already grouped it is ignored.

    Raises:
        SpecError: unknown name.
    """
    token = _FORCED.set(check_kernel(kernel))
    try:
        yield
    finally:
        _FORCED.reset(token)


def check_kernel(kernel: str) -> Kernel:
    """The name itself. Raises SpecError when there is no such kernel."""
    for known in KERNELS:
        if kernel == known:
            return known
    raise SpecError(f"There is no kernel {kernel!r}.", nearest(kernel, KERNELS))


def choose_rows(
    device: str, dtype: torch.dtype, experts: int, rows: int, width: int, hidden: int, largest: int | None = None
) -> Choice:
    """The kernel for rows that are grouped by expert.

    Args:
        device: ``cpu``, ``cuda``, ...
        dtype: of rows and weights (autocast's type under autocast).
        experts: E.
        rows: M over all experts.
        width: D.
        hidden: H of one expert.
        largest: rows of the largest group; an even share when left out.
    """
    forced = _FORCED.get()
    grouped = grouped_available() and dtype in DTYPES
    if forced not in ("auto", "masked_dense") and (forced != "grouped" or grouped):
        return Choice(cast(RowKernel, forced), "forced by use_kernel")
    if device != "cpu":
        if grouped:
            return Choice("grouped", "one launch for all experts, counts stay on the device")
        return Choice("padded", f"grouped products do not know {dtype}")
    enough = LOOP_WORK_16 if dtype.itemsize < 4 else LOOP_WORK
    if rows * width * hidden >= experts * enough:
        return Choice("loop", "enough work for each expert: forward and backward fused")
    if grouped and largest is not None and largest * experts > PADDING * rows:
        return Choice("grouped", "many small experts of uneven load: one call without padding")
    return Choice("padded", "many small experts: one batched product")


def prefers_masked(
    device: str, dtype: torch.dtype, experts: int, top_k: int, tokens: int, width: int, hidden: int
) -> bool:
    """Whether all experts as one masked dense network are faster than grouping tokens by expert.

    Args:
        device: ``cpu``, ``cuda``, ...
        dtype: of rows and weights (autocast's type under autocast).
        experts: E.
        top_k: choices per token.
        tokens: T before dispatch.
        width: D.
        hidden: H of one expert.
    """
    forced = _FORCED.get()
    if forced != "auto":
        return forced == "masked_dense"
    if device != "cpu":
        return 2 * top_k > experts
    # Both sides in hidden units per token. Above 32 MiB the C library takes each buffer anew from the system, page by
    # page, which a CPU feels.
    size = tokens * dtype.itemsize
    moved = ROW_UNITS * (4 if size * top_k * width > FRESH_PAGES else 1)
    masked = experts * hidden * (1.5 if size * experts * hidden > FRESH_PAGES else 1.0)
    tokens = max(tokens, 1)
    # A handful of tokens costs as much as FEW_TOKENS: reading the weights, here of all experts, takes the time.
    masked *= max(1.0, FEW_TOKENS / tokens)
    called = min(experts, tokens * top_k) * EXPERT_UNITS / (tokens * width)
    return top_k * (hidden + moved) + called > masked


def describe_choice(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Lines for people: what is available and what would be chosen for typical layers."""
    have = {"grouped_mm": grouped_available(), "oneDNN products": onednn_available()}
    lines = [
        ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in have.items()) + f", forced: {_FORCED.get()}"
    ]
    for name, experts, top_k, tokens, width, hidden in (
        ("GMoE-S", 6, 1, 1576, 384, 1536),
        ("EMoE ViT-S 24/4", 24, 4, 1576, 384, 64),
        ("EMoE BERT 64/32", 64, 32, 1024, 768, 48),
        ("196 small experts", 196, 1, 1576, 192, 192),
    ):
        if prefers_masked(device, dtype, experts, top_k, tokens, width, hidden):
            text = "masked_dense: a large share of the experts is chosen"
        else:
            choice = choose_rows(device, dtype, experts, tokens * top_k, width, hidden)
            text = f"{choice.kernel}: {choice.reason}"
        lines.append(f"{name} (E {experts}, K {top_k}, {device}, {str(dtype).removeprefix('torch.')}): {text}")
    return lines
