"""Experts of an MoE layer: the weights of all of them in stacked tensors.

What a vision or text layer uses. Executors with one module per expert, also over several ranks, are in
``moe.layers.executors`` and can be imported from here as well; :func:`stacked_state` and :func:`numbered_state` turn
one naming into the other.

Shapes: M tokens grouped by expert, T tokens, K choices, D width, H hidden, O width out, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe.errors import CheckpointError, SpecError
from moe.layers.activation import check_activation
from moe.layers.executors import (
    Expert,
    ExpertExecutor,
    ExpertParallel,
    LocalExperts,
    TokenExchange,
    run_experts,
)
from moe.layers.kernel_choice import Kernel, check_kernel, prefers_masked
from moe.layers.kernels import Counts, expert_ffn, masked_ffn

__all__ = [
    "STACKED_NAMES",
    "Expert",
    "ExpertExecutor",
    "ExpertParallel",
    "Experts",
    "Kernel",
    "LocalExperts",
    "TokenExchange",
    "numbered_state",
    "run_experts",
    "stacked_state",
]


class Experts(nn.Module):
    """E two-layer networks in stacked tensors: ``act(x w1[e]^T + b1[e]) w2[e]^T + b2[e]``.

    State-dict names: ``w1`` ``[E, H, D]``, ``b1`` ``[E, H]``, ``w2`` ``[E, O, H]``, ``b2`` ``[E, O]`` (no names for
    biases that are left out). They start as ``nn.Linear`` layers do, each expert with draws of its own.

    A layer calls :meth:`forward` with rows grouped by expert. When :meth:`wants_masked` says so it calls :meth:`masked`
    with the tokens instead, and needs no dispatch. For dropout it draws :meth:`draw_mask` in token order and hands each
    way its part, so that the result does not depend on the way.

    Args:
        num_experts: E.
        dim: width in D.
        hidden: hidden width H of one expert.
        activation: ``gelu`` (exact), ``gelu_tanh`` (also ``gelu_new``), ``relu`` or ``silu``.
        dropout: rate of the hidden units in training mode, 0 to below 1.
        kernel: see ``moe.layers.kernels``.
        out_dim: width out O; D when left out.
        bias: biases of the first and of the second layer.
        dropout_first: drop before the activation (EMoE's language models) instead of after it.

    Raises:
        SpecError: a size below 1, a rate outside 0..1, an unknown activation or kernel.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        kernel: str = "auto",
        out_dim: int | None = None,
        bias: tuple[bool, bool] = (True, True),
        dropout_first: bool = False,
    ) -> None:
        super().__init__()
        out = dim if out_dim is None else out_dim
        if min(num_experts, dim, hidden, out) < 1:
            raise SpecError(f"{num_experts} experts of widths {dim}, {hidden}, {out}.", "All must be at least 1.")
        if not 0 <= dropout < 1:
            raise SpecError(f"dropout is {dropout}.", "Use a rate from 0 to below 1.")
        self.num_experts, self.dim, self.hidden, self.out_dim = num_experts, dim, hidden, out
        self.activation, self.kernel = check_activation(activation), check_kernel(kernel)
        self.dropout, self.dropout_first = dropout, dropout_first
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden)) if bias[0] else None
        self.w2 = nn.Parameter(torch.empty(num_experts, out, hidden))
        self.b2 = nn.Parameter(torch.empty(num_experts, out)) if bias[1] else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, uniformly within one over the square root of the width that a layer reads."""
        for tensor, width in ((self.w1, self.dim), (self.b1, self.dim), (self.w2, self.hidden), (self.b2, self.hidden)):
            if tensor is not None:
                nn.init.uniform_(tensor, -(width**-0.5), width**-0.5)

    def forward(
        self,
        x_MD: Tensor,
        counts: Counts,
        dropout_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Rows grouped by expert to results ``[M, O]`` in the same order.

        Args:
            x_MD: rows, ascending by expert; rows behind the last group give zeros.
            counts: rows of each expert.
            dropout_mask: factors ``[M, H]`` of the hidden units; drawn here when left out, in training mode.
            generator: source of those draws.
        """
        if dropout_mask is None:
            dropout_mask = self.draw_mask(x_MD.shape[0], x_MD, generator)
        return expert_ffn(
            x_MD, counts, self.w1, self.b1, self.w2, self.b2, self.activation, kernel=self.row_kernel,
            dropout_mask=dropout_mask, dropout_first=self.dropout_first,
        )  # fmt: skip

    def masked(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, dropout_mask: Tensor | None = None
    ) -> Tensor:
        """Tokens to weighted sums over their chosen experts ``[T, O]``, without dispatch.

        Args:
            x_TD: tokens.
            experts_TK: chosen experts.
            weights_TK: factors of their results, 0 for a dropped choice.
            dropout_mask: factors ``[T, K, H]``; none are drawn here.
        """
        return masked_ffn(
            x_TD, experts_TK, weights_TK, self.w1, self.b1, self.w2, self.b2, self.activation,
            dropout_mask=dropout_mask, dropout_first=self.dropout_first,
        )  # fmt: skip

    def wants_masked(self, x_TD: Tensor, top_k: int) -> bool:
        """Whether :meth:`masked` is the way to compute these tokens, by this module's kernel setting."""
        if self.kernel != "auto":
            return self.kernel == "masked_dense"
        kind = x_TD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
        return prefers_masked(kind, dtype, self.num_experts, top_k, x_TD.shape[0], self.dim, self.hidden)

    @property
    def row_kernel(self) -> Kernel:
        """The kernel for rows that are grouped already; ``auto`` when the setting is for tokens."""
        return "auto" if self.kernel == "masked_dense" else self.kernel

    def draw_mask(self, rows: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Dropout factors ``[rows, H]`` (0, or 1 / (1 - rate)); None in evaluation mode and at rate 0."""
        if not self.training or self.dropout == 0:
            return None
        keep = 1 - self.dropout
        return like.new_empty(rows, self.hidden).bernoulli_(keep, generator=generator).div_(keep)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return (
            f"{self.num_experts} x ({self.dim} -> {self.hidden} -> {self.out_dim}), {self.activation}, "
            f"dropout={self.dropout}, kernel={self.kernel}"
        )


STACKED_NAMES = {"w1": "w1.weight", "b1": "w1.bias", "w2": "w2.weight", "b2": "w2.bias"}
"""Stacked tensor -> the same tensor of one expert, as the executors name it."""


def numbered_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Stacked tensors of :class:`Experts` -> tensors by expert number, as :class:`LocalExperts` names them.

    Args:
        state: holds ``<prefix>w1`` and so on; other names pass unchanged.
        prefix: of the experts' names, for example ``experts.``.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and short in STACKED_NAMES:
            out |= {f"{prefix}{e}.{STACKED_NAMES[short]}": part for e, part in enumerate(value.unbind())}
        else:
            out[name] = value
    return out


def stacked_state(state: Mapping[str, Tensor], num_experts: int, prefix: str = "") -> dict[str, Tensor]:
    """The inverse of :func:`numbered_state`.

    Raises:
        CheckpointError: an expert lacks a tensor that others have, or has another shape.
    """
    out = dict(state)
    for short, long in STACKED_NAMES.items():
        names = [f"{prefix}{e}.{long}" for e in range(num_experts)]
        present = [name for name in names if name in out]
        if not present:
            continue
        if len(present) < num_experts:
            missing = next(name for name in names if name not in out)
            raise CheckpointError(
                f"Tensor {missing!r} is missing.", f"{len(present)} of {num_experts} experts have it."
            )
        parts = [out.pop(name) for name in names]
        odd = next((i for i, part in enumerate(parts) if part.shape != parts[0].shape), None)
        if odd is not None:
            raise CheckpointError(
                f"Tensor {names[odd]!r} is {list(parts[odd].shape)}, but {names[0]!r} is {list(parts[0].shape)}.",
                "Experts of one layer have equal sizes.",
            )
        out[f"{prefix}{short}"] = torch.stack(parts)
    return out
