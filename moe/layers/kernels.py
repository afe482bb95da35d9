"""The kernel seam: a two-layer network per expert, one function, five ways to compute it.

``y = act(x w1[e]^T + b1[e]) w2[e]^T + b2[e]`` for the rows of each expert e. All kernels give the same numbers up to
rounding; which is fastest depends on device, type, number of experts and share of chosen experts
(``moe.layers.kernel_choice``):

- ``loop`` one expert after the other, forward and backward fused (``moe.layers.kernel_loop``);
- ``grouped`` all experts in one grouped product (``moe.layers.kernel_grouped``), counts may stay on the device;
- ``padded`` groups padded to the largest, batched products;
- ``baddbmm`` the same with hidden units as rows (``w1 x^T``), so that weights are read in the order they lie in;
- ``masked_dense`` all experts as one dense network whose hidden units are masked (:func:`masked_ffn`); it works on
  tokens before dispatch, and wins when a large share of the experts is chosen.

Sources: MegaBlocks (arXiv 2211.15841) for grouped products, EMoE (arXiv 2310.10908, section 3) for the mask.

Shapes: M rows grouped by expert, T tokens, K choices per token, D width in, H hidden, O width out, E experts, C rows of
the largest group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import SpecError
from moe.layers.activation import Hidden, Weights, check_activation
from moe.layers.gemm import linear, matmul
from moe.layers.kernel_choice import Kernel, RowKernel, check_kernel, choose_rows
from moe.layers.kernel_grouped import DTYPES, grouped_available, grouped_ffn
from moe.layers.kernel_loop import loop_ffn

Counts = Sequence[int] | Tensor


def expert_ffn(
    x_MD: Tensor,
    counts: Counts,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EOH: Tensor,
    b2_EO: Tensor | None,
    activation: str = "gelu",
    *,
    kernel: Kernel = "auto",
    dropout_mask: Tensor | None = None,
    dropout_first: bool = False,
) -> Tensor:
    """Apply expert e to its rows.

    Differentiable any number of times. Under autocast everything is computed in autocast's type.

    Args:
        x_MD: rows grouped by expert, ascending; rows behind the last group give zeros.
        counts: rows of each expert, E integers or an int64 tensor ``[E]``; their sum is at most M. Only ``grouped``
            can leave a tensor on the device, the others wait for it.
        w1_EHD: first layers, ``[E, H, D]``.
        b1_EH: their biases, or None.
        w2_EOH: second layers, ``[E, O, H]``; O is D in a transformer.
        b2_EO: their biases, or None.
        activation: ``gelu`` (exact), ``gelu_tanh``, ``relu`` or ``silu``.
        kernel: one of the module's list but ``masked_dense``, or ``auto``.
        dropout_mask: factors ``[M, H]`` of the hidden units (0, or 1 / (1 - p)).
        dropout_first: multiply by them before the activation.

    Returns:
        ``[M, O]`` in the order of ``x_MD``. An expert without rows gets gradients of zeros.

    Raises:
        SpecError: shapes that do not fit, an unknown kernel or activation, a kernel that cannot do this type.
    """
    weights, hidden = Weights(w1_EHD, b1_EH, w2_EOH, b2_EO), Hidden(check_activation(activation), dropout_first)
    check_shapes(x_MD, weights)
    _check_rows(x_MD, counts, w1_EHD, dropout_mask)
    kind = x_MD.device.type
    if not torch.is_autocast_enabled(kind):
        return _rows(x_MD, counts, weights, dropout_mask, hidden, kernel)
    x_MD, dropout_mask, weights = _cast(torch.get_autocast_dtype(kind), x_MD, dropout_mask, weights)
    with torch.autocast(kind, enabled=False):
        return _rows(x_MD, counts, weights, dropout_mask, hidden, kernel)


def _cast(
    dtype: torch.dtype, x: Tensor, mask: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor | None, Weights]:
    cast = [None if t is None else t.to(dtype) for t in weights]
    return x.to(dtype), None if mask is None else mask.to(dtype), Weights(*cast)  # type: ignore[arg-type]


def _rows(
    x_MD: Tensor, counts: Counts, weights: Weights, mask_MH: Tensor | None, hidden: Hidden, kernel: Kernel
) -> Tensor:
    chosen = _row_kernel(kernel, x_MD, weights.w1, counts)
    if chosen == "grouped":
        ends_E = torch.as_tensor(counts, device=x_MD.device).cumsum(0).to(torch.int32)
        return grouped_ffn(x_MD, ends_E, weights, mask_MH, hidden)
    rows: list[int] = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    total, behind = sum(rows), x_MD.shape[0] - sum(rows)
    if behind:
        _check_total(total, x_MD.shape[0])
        x_MD, mask_MH = x_MD[:total], None if mask_MH is None else mask_MH[:total]
    if chosen == "loop":
        y_MO = loop_ffn(x_MD, rows, weights, mask_MH, hidden)
    else:
        source_EC, valid_EC = _slots(rows, x_MD.device)
        mask_ECH = None if mask_MH is None else _gather(mask_MH, source_EC)
        run = _padded if chosen == "padded" else _baddbmm
        y_MO = run(_gather(x_MD, source_EC), weights, mask_ECH, hidden)[valid_EC]
    return F.pad(y_MO, (0, 0, 0, behind)) if behind else y_MO


def _row_kernel(kernel: Kernel, x_MD: Tensor, w1_EHD: Tensor, counts: Counts) -> RowKernel:
    experts, hidden, width = w1_EHD.shape
    chosen = check_kernel(kernel)
    if chosen == "masked_dense":
        raise SpecError(
            "Kernel 'masked_dense' works on tokens, not on rows that are grouped by expert.",
            "Call masked_ffn (or Experts.masked) with the chosen experts, or leave kernel: auto.",
        )
    if chosen == "auto":
        largest = None if isinstance(counts, Tensor) else max(counts)
        return choose_rows(x_MD.device.type, x_MD.dtype, experts, x_MD.shape[0], width, hidden, largest).kernel
    if chosen == "grouped" and not (grouped_available() and x_MD.dtype in DTYPES):
        raise SpecError(
            f"Kernel 'grouped' cannot compute {x_MD.dtype} with PyTorch {torch.__version__}.",
            "It needs float32, bfloat16 or float16 and PyTorch 2.9; use kernel: auto or loop.",
        )
    return chosen


def _slots(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row that each slot of the padded batch reads (M for none) and whether it has one: ``[E, C]`` both."""
    counts_E = torch.tensor(counts, device=device)
    rows_C = torch.arange(max(counts, default=0), device=device)
    valid_EC = rows_C < counts_E.unsqueeze(1)
    first_E1 = (counts_E.cumsum(0) - counts_E).unsqueeze(1)
    return torch.where(valid_EC, first_E1 + rows_C, sum(counts)), valid_EC


def _gather(x_MD: Tensor, source_EC: Tensor) -> Tensor:
    padded = torch.cat([x_MD, x_MD.new_zeros(1, x_MD.shape[1])])
    return padded.index_select(0, source_EC.reshape(-1)).view(*source_EC.shape, x_MD.shape[1])


def _padded(x_ECD: Tensor, weights: Weights, mask_ECH: Tensor | None, hidden: Hidden) -> Tensor:
    b1_E1H, b2_E1O = (None if b is None else b.unsqueeze(1) for b in (weights.b1, weights.b2))
    a_ECH = hidden(_batched(x_ECD, weights.w1.transpose(1, 2), b1_E1H), mask_ECH)
    return _batched(a_ECH, weights.w2.transpose(1, 2), b2_E1O)


def _baddbmm(x_ECD: Tensor, weights: Weights, mask_ECH: Tensor | None, hidden: Hidden) -> Tensor:
    b1_EH1, b2_EO1 = (None if b is None else b.unsqueeze(2) for b in (weights.b1, weights.b2))
    mask_EHC = None if mask_ECH is None else mask_ECH.transpose(1, 2)
    a_EHC = hidden(_batched(weights.w1, x_ECD.transpose(1, 2), b1_EH1), mask_EHC)
    return _batched(weights.w2, a_EHC, b2_EO1).transpose(1, 2)


def _batched(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)


def masked_ffn(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EOH: Tensor,
    b2_EO: Tensor | None,
    activation: str = "gelu",
    *,
    dropout_mask: Tensor | None = None,
    dropout_first: bool = False,
) -> Tensor:
    """Kernel ``masked_dense``: ``y[t] = sum_j weights[t, j] * expert(experts[t, j])(x[t])`` as one dense network.

    Costs a dense layer of E * H hidden units whatever is chosen, and neither sorts nor copies tokens.

    Args:
        x_TD: tokens.
        experts_TK: int64, chosen experts of each token, all different within a token.
        weights_TK: their factors, 0 for a dropped choice.
        w1_EHD: see :func:`expert_ffn`, like the other weights.
        b1_EH: biases or None.
        w2_EOH: second layers.
        b2_EO: biases or None.
        activation: by name.
        dropout_mask: factors ``[T, K, H]`` of the chosen experts' hidden units.
        dropout_first: multiply by them before the activation.

    Returns:
        ``[T, O]``. A token whose choices are all dropped gets zeros.

    Raises:
        SpecError: shapes that do not fit or an unknown activation.
    """
    weights, hidden = Weights(w1_EHD, b1_EH, w2_EOH, b2_EO), Hidden(check_activation(activation), dropout_first)
    check_shapes(x_TD, weights)
    kind = x_TD.device.type
    if not torch.is_autocast_enabled(kind):
        return _masked(x_TD, experts_TK, weights_TK, weights, dropout_mask, hidden)
    x_TD, dropout_mask, weights = _cast(torch.get_autocast_dtype(kind), x_TD, dropout_mask, weights)
    with torch.autocast(kind, enabled=False):
        return _masked(x_TD, experts_TK, weights_TK, weights, dropout_mask, hidden)


def _masked(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, weights: Weights, mask_TKH: Tensor | None, hidden: Hidden
) -> Tensor:
    experts, units, width = weights.w1.shape
    tokens = x_TD.shape[0]
    factor_TE = weights_TK.new_zeros(tokens, experts).scatter(1, experts_TK, weights_TK).to(x_TD.dtype)
    b1_F = None if weights.b1 is None else weights.b1.reshape(-1)
    h_TEH = linear(x_TD, weights.w1.reshape(-1, width), b1_F).view(tokens, experts, units)
    # Zero before the activation, so that an overflow in an expert that was not chosen is never seen.
    chosen_TE = torch.zeros_like(factor_TE, dtype=torch.bool).scatter(1, experts_TK, True)
    h_TEH = h_TEH.masked_fill(~chosen_TE.unsqueeze(-1), 0)
    mask_TEH = None
    if mask_TKH is not None:
        index_TKH = experts_TK.unsqueeze(-1).expand(-1, -1, units)
        mask_TEH = mask_TKH.new_zeros(tokens, experts, units).scatter(1, index_TKH, mask_TKH)
    a_TEH = hidden(h_TEH, mask_TEH) * factor_TE.unsqueeze(-1)
    w2_FO = weights.w2.transpose(1, 2).reshape(experts * units, -1)
    y_TO = matmul(a_TEH.view(tokens, -1), w2_FO)
    return y_TO if weights.b2 is None else y_TO + matmul(factor_TE, weights.b2)


def check_shapes(x_MD: Tensor, weights: Weights) -> None:
    """Raise SpecError that names the tensor unless the experts' tensors and the rows fit together."""
    w1_EHD, b1_EH, w2_EOH, b2_EO = weights
    if w1_EHD.ndim != 3 or w2_EOH.ndim != 3:
        raise SpecError(f"w1 is {list(w1_EHD.shape)}, w2 {list(w2_EOH.shape)}.", "Expected [E, H, D] and [E, O, H].")
    experts, hidden, width = w1_EHD.shape
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("w2", w2_EOH, (experts, w2_EOH.shape[1], hidden)),
        ("b1", b1_EH, (experts, hidden)),
        ("b2", b2_EO, (experts, w2_EOH.shape[1])),
        ("x", x_MD, (x_MD.shape[0], width)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise SpecError(
                f"{name} is {list(tensor.shape)}, expected {list(shape)} beside w1 {list(w1_EHD.shape)}.",
                "Expert weights are stacked as w1 [E, H, D] and w2 [E, O, H].",
            )


def _check_rows(x_MD: Tensor, counts: Counts, w1_EHD: Tensor, mask_MH: Tensor | None) -> None:
    if len(counts) != w1_EHD.shape[0]:
        raise SpecError(f"There are {len(counts)} counts for {w1_EHD.shape[0]} experts.", "Give one count per expert.")
    if not isinstance(counts, Tensor):
        _check_total(sum(counts), x_MD.shape[0])
        if min(counts, default=0) < 0:
            raise SpecError(f"counts are {list(counts)}.", "A count is at least 0.")
    if mask_MH is not None and tuple(mask_MH.shape) != (x_MD.shape[0], w1_EHD.shape[1]):
        raise SpecError(
            f"dropout_mask is {list(mask_MH.shape)}, expected {[x_MD.shape[0], w1_EHD.shape[1]]}.",
            "It holds one factor for each row and hidden unit.",
        )


def _check_total(total: int, rows: int) -> None:
    if total > rows:
        raise SpecError(f"The counts sum to {total}, but there are {rows} rows.", "Rows must be grouped by expert.")
