"""The mixture-of-experts layer: gate -> router -> dispatch -> experts -> combine.

A drop-in for the feed-forward network of a transformer block. Everything that may differ between methods is in the
:class:`moe.router_spec.RouterSpec` and in the expert weights; GMoE, EMoE and V-MoE are settings of this one class.

The balance loss is returned unweighted in the :class:`LayerRecord`. :meth:`MoELayer.forward_with_record` is the pure
form; :meth:`MoELayer.forward` also leaves the record in ``last`` (never part of the state, of pickles or of copies),
from where a model collects the losses of one pass: :func:`collect_balance`.

Known differences: in evaluation nothing is dropped, so a token's result does not depend on its neighbours; the official
behaviour is ``eval_capacity=True`` in the spec.

Shapes: N tokens, D width, E experts, K choices per token, H hidden width, M kept choices, C seats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from moe.errors import RunFailed, SpecError
from moe.layers.dispatch import combine, dispatch, read_counts
from moe.layers.experts import Experts
from moe.layers.gates import Gate, LinearGate, NoisyGate, build_gate, updated_gate
from moe.layers.router import Routing, draw_noise, route_tokens
from moe.layers.seating import seats
from moe.router_spec import RouterSpec

F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """Keep ``torch.compile`` out of a function."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class LayerRecord(NamedTuple):
    """What happened inside one pass of a layer.

    Attributes:
        routing: the decision, with the balance loss.
        scores_NE: probabilities of all experts that the choice was made on.
    """

    routing: Routing
    scores_NE: Tensor

    @property
    def balance(self) -> Tensor:
        """Unweighted balance loss of the pass."""
        return self.routing.balance


class MoELayer(nn.Module):
    """Sparse mixture of equal experts.

    State-dict names: ``gate.*`` (see ``moe.layers.gates``), ``experts.{w1,b1,w2,b2}``.

    Args:
        dim: width D.
        hidden: hidden width H of one expert.
        spec: routing rule.
        num_experts: E.
        activation: ``gelu`` (exact), ``gelu_tanh`` (also ``gelu_new``), ``relu`` or ``silu``.
        dropout: rate of the hidden units in training mode.
        kernel: how the experts are computed (``moe.layers.kernels``).
        dropout_first: drop hidden units before the activation instead of after it (EMoE's language models).
        check_finite: refuse activations that are not finite. On a GPU this is the layer's only wait for the device,
            where the kernel is ``grouped``.

    Raises:
        SpecError: more choices than experts, or a size below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        spec: RouterSpec,
        num_experts: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        kernel: str = "auto",
        *,
        dropout_first: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        if spec.top_k > num_experts:
            raise SpecError(
                f"top_k={spec.top_k} is more than num_experts={num_experts}.",
                "A token cannot use more experts than there are.",
            )
        self.dim, self.num_experts, self.spec, self.check_finite = dim, num_experts, spec, check_finite
        self.gate: Gate = build_gate(spec, dim, num_experts)
        self.experts = Experts(
            num_experts, dim, hidden, activation=activation, dropout=dropout, kernel=kernel, dropout_first=dropout_first
        )
        self.last: LayerRecord | None = None

    def forward(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        dropout_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``[..., D]`` to ``[..., D]``; the record goes to ``last``. See :meth:`forward_with_record`."""
        y, self.last = self.forward_with_record(x, noise, dropout_mask, generator)
        return y

    def forward_with_record(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        dropout_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, LayerRecord]:
        """Route all tokens of ``x`` together and return the mixture and what happened.

        Args:
            x: ``[..., D]``; leading axes are flattened to N tokens.
            noise: raw draws of the gate (``moe.layers.router.draw_noise``); drawn here when left out.
            dropout_mask: 0/1 ``[E, C, H]`` by expert, seat and hidden unit, in place of the experts' own draws.
            generator: source of all draws; torch's default generator when left out.

        Raises:
            SpecError: the last axis is not D, or a mask with too few seats.
            RunFailed: activations or gate weights are not finite.
        """
        if x.shape[-1] != self.dim:
            raise SpecError(f"The layer expects tokens of width {self.dim}; got shape {tuple(x.shape)}.")
        x_ND = x.reshape(-1, self.dim)
        logits_NE = self.gate(x_ND)
        if noise is None:
            noise = draw_noise(self.spec, logits_NE, self.training, generator)
        deviation_NE = self.gate.deviation(x_ND) if self.training and isinstance(self.gate, NoisyGate) else None
        routing, scores_NE = route_tokens(
            logits_NE, self.spec, training=self.training, noise=noise, deviation_NE=deviation_NE
        )
        mask_NKH = self._dropout(x_ND, routing, dropout_mask, generator)
        y_ND = self._mix(x_ND, logits_NE, routing, mask_NKH)
        return y_ND.to(x.dtype).reshape(x.shape), LayerRecord(routing, scores_NE)

    def _mix(self, x_ND: Tensor, logits_NE: Tensor, routing: Routing, mask_NKH: Tensor | None) -> Tensor:
        """The weighted results of the chosen experts, by whichever way the experts prefer."""
        masked = self.experts.wants_masked(x_ND, routing.experts_NK.shape[1])
        if masked and not self.spec.pre_score and x_ND.shape[0]:
            if self.check_finite:
                self._require_finite(x_ND, logits_NE)
            return self.experts.masked(x_ND, routing.experts_NK, routing.weights_NK, mask_NKH)
        if self.check_finite or x_ND.device.type == "cpu":
            return self._mix_on_host(x_ND, logits_NE, routing, mask_NKH)
        return self._mix_rows(x_ND, routing, routing.counts_E, mask_NKH)

    # Group sizes differ from batch to batch: compiled code would be specialised on them and made anew each time.
    @_eager
    def _mix_on_host(self, x_ND: Tensor, logits_NE: Tensor, routing: Routing, mask_NKH: Tensor | None) -> Tensor:
        counts, (finite,) = read_counts(routing.counts_E, torch.isfinite(logits_NE.detach()).all())
        if self.check_finite and not finite:
            raise RunFailed(*_not_finite(x_ND, logits_NE))
        return self._mix_rows(x_ND, routing, counts, mask_NKH)

    def _mix_rows(self, x_ND: Tensor, routing: Routing, counts: list[int] | Tensor, mask_NKH: Tensor | None) -> Tensor:
        sent = dispatch(x_ND, routing, counts, routing.weights_NK if self.spec.pre_score else None)
        weights_NK = None if self.spec.pre_score or self.spec.one_score else routing.weights_NK
        mask_MH = None if mask_NKH is None else mask_NKH.flatten(0, 1).index_select(0, sent.choice_M)
        return combine(self.experts(sent.tokens_MD, sent.counts, mask_MH), sent, weights_NK)

    @_eager
    def _require_finite(self, x_ND: Tensor, logits_NE: Tensor) -> None:
        if not bool(torch.isfinite(logits_NE.detach()).all()):
            raise RunFailed(*_not_finite(x_ND, logits_NE))

    def _dropout(
        self, x_ND: Tensor, routing: Routing, mask_ECH: Tensor | None, generator: torch.Generator | None
    ) -> Tensor | None:
        """Factors ``[N, K, H]`` of the hidden units: drawn in token order, or those of the official table of seats."""
        tokens, top_k = routing.experts_NK.shape
        if mask_ECH is None:
            drawn = self.experts.draw_mask(tokens * top_k, x_ND, generator)
            return None if drawn is None else drawn.view(tokens, top_k, -1)
        hidden, found = self.experts.hidden, tuple(mask_ECH.shape)
        if len(found) != 3 or (found[0], found[2]) != (self.num_experts, hidden):
            raise SpecError(f"dropout_mask is {list(found)}.", f"Expected [E = {self.num_experts}, C, H = {hidden}].")
        seats_NK = routing.seats_NK
        if seats_NK is None:
            seats_NK = seats(routing.experts_NK, self.num_experts)
        taken = int(seats_NK.masked_fill(~routing.kept_NK, -1).max()) + 1 if tokens else 0
        if taken > found[1]:
            raise SpecError(f"dropout_mask has {found[1]} seats per expert, but {taken} are taken.")
        # A dropped choice reads some row or other: its result is multiplied by 0.
        row_NK = routing.experts_NK * found[1] + seats_NK.clamp(max=max(found[1] - 1, 0))
        mask_NKH = mask_ECH.flatten(0, 1)[row_NK] if found[1] else mask_ECH.new_zeros(tokens, top_k, hidden)
        return mask_NKH / (1.0 - self.experts.dropout)

    @torch.no_grad()
    def update_gate(self, momentum: float = 0.0, normalize: bool = False, value_norm_weighted: bool = False) -> None:
        """Move an avg-k gate to the mean keys of the experts, as EMoE does after every optimiser step.

        Args:
            momentum: share of the old gate.
            normalize: unit rows, for gates with normalised input.
            value_norm_weighted: count each key in proportion to the norm of its value.

        Raises:
            SpecError: the gate is not ``avg_k``.
        """
        if self.spec.gate != "avg_k" or not isinstance(self.gate, LinearGate):
            raise SpecError(f"A {self.spec.gate} gate does not follow the experts' keys.", "Use gate: avg_k.")
        weight = self.gate.weight
        values = self.experts.w2 if value_norm_weighted else None
        weight.copy_(updated_gate(weight, self.experts.w1, values, momentum=momentum, normalize=normalize))

    def __getstate__(self) -> dict[str, Any]:
        """Without the record: it hangs on the graph of one pass, which can be neither pickled nor copied."""
        return {**self.__dict__, "last": None}


def collect_records(module: nn.Module) -> dict[str, LayerRecord]:
    """Records of the last pass of every layer inside ``module`` by name, in the order of the modules."""
    layers = {name: child for name, child in module.named_modules() if isinstance(child, MoELayer)}
    return {name: layer.last for name, layer in layers.items() if layer.last is not None}


def collect_balance(module: nn.Module) -> list[Tensor]:
    """Unweighted balance losses of the last pass of every layer inside ``module``, in the order of the modules."""
    return [record.balance for record in collect_records(module).values()]


def _not_finite(x_ND: Tensor, logits_NE: Tensor) -> tuple[str, str]:
    """Message and hint that say where the bad numbers come from."""
    bad = (~torch.isfinite(x_ND)).any(dim=-1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        text = f"{int(bad.sum())} of {len(x_ND)} tokens that reach an MoE layer are not finite, first token {first}"
        return f"{text} (input {tuple(x_ND.shape)}, {x_ND.dtype}).", "Look at the layers before it; try fp32 or clip."
    text = f"The gate's logits {tuple(logits_NE.shape)} are not finite although its input {tuple(x_ND.shape)} is."
    return text, "The gate's weights are broken or too large: lower the learning rate, or set a clip."
