"""A dense feed-forward layer in the form of emergent experts, and back.

:class:`ConvertedFFN` takes the place of a two-layer network (timm's ``Mlp``, Hugging Face's of ViT and GPT-2, BERT's
``intermediate``): the same neurons, cut into experts, behind an avg-k or a learned gate. Source: EMoE (arXiv
2310.10908).

Parity: weights, gate, routing, capacity and the gate's update after every step are the public code's.
Differs: the dense weights are dropped on conversion (the public code keeps BERT's and ViT's, unused); the avg-k gate is
set at conversion everywhere (the public code starts DeiT's at random until the first step); tokens of padding can be
left out (:func:`token_mask`).

Shapes: N tokens, D width, F neurons, E experts, s neurons of an expert, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.conversion.merge import Merged, bias_remainder, merge_experts
from moe.conversion.split import DenseFFN, ExpertTensors, check_labels, gather_experts
from moe.errors import SpecError
from moe.layers.gates import LinearGate, updated_gate
from moe.layers.layer import MoELayer
from moe.models.emoe_spec import EMoESpec


class ConvertedFFN(nn.Module):
    """Emergent experts in place of a dense feed-forward layer.

    State-dict names: ``moe.gate.*``, ``moe.experts.{w1,b1,w2,b2}``, ``labels_F`` (int64, expert of each original
    neuron) and ``bias_rest_D`` (what dividing the output bias lost to rounding), so that :meth:`merge` can undo the
    split.

    Args:
        dense: weights; copied.
        labels_F: expert of each neuron (ignored with ``split="copy"``).
        spec: experts, gate, rules.
        activation: by name.
        dropout: of the dense layer, behind its activation; ``spec.dropout`` replaces it.
        output_dropout: of the dense layer, behind its output; kept unless the spec says otherwise.

    Raises:
        SpecError: labels that are not an equal split into ``spec.num_experts``.
    """

    def __init__(
        self,
        dense: DenseFFN,
        labels_F: Tensor,
        spec: EMoESpec,
        activation: str = "gelu",
        dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        neurons, width = dense.keys_FD.shape
        self.spec = spec
        experts, copied = spec.num_experts, spec.split == "copy"
        if not copied:
            check_labels(labels_F, neurons, experts)
        hidden = neurons if copied else neurons // experts * spec.expert_repeat
        inner = dropout if spec.dropout is None else spec.dropout
        self.moe = MoELayer(width, hidden, spec.router(), experts, activation, inner, spec.kernel)
        self.moe.experts.dropout_first = spec.dropout_first
        self.moe.to(dense.keys_FD.device, dense.keys_FD.dtype)
        if spec.gate == "avg_k_bias":
            gate = LinearGate(width, experts, bias=True).to(dense.keys_FD.device, dense.keys_FD.dtype)
            self.moe.gate = gate.requires_grad_(False)
        self.output_dropout = nn.Dropout(output_dropout if spec.output_dropout else 0.0)
        labels = torch.zeros(neurons, dtype=torch.int64) if copied else labels_F.detach().clone().to(torch.int64)
        self.register_buffer("labels_F", labels.to(dense.keys_FD.device))
        rest_D = (
            torch.zeros_like(dense.bias_D) if copied else bias_remainder(dense.bias_D, spec.chosen).to(dense.bias_D)
        )
        self.register_buffer("bias_rest_D", rest_D)
        self._mask_N: Tensor | None = None
        self._load(gather_experts(dense, labels_F, experts, spec.chosen, spec.expert_repeat, copy=copied))

    labels_F: Tensor
    bias_rest_D: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``; the record of the pass is in ``moe.last``."""
        if self._mask_N is None:
            out: Tensor = self.output_dropout(self.moe(x))
            return out
        x_ND = x.reshape(-1, x.shape[-1])
        if self._mask_N.shape[0] != x_ND.shape[0]:
            raise SpecError(f"The token mask has {self._mask_N.shape[0]} entries, the input {x_ND.shape[0]} tokens.")
        row_M = self._mask_N.nonzero().squeeze(1)
        y_ND = torch.zeros_like(x_ND).index_copy(0, row_M, self.moe(x_ND.index_select(0, row_M)).to(x_ND.dtype))
        masked: Tensor = self.output_dropout(y_ND.view(x.shape))
        return masked

    @torch.no_grad()
    def update_gate(self) -> None:
        """Move an avg-k gate to its experts' mean keys: once after every optimiser step. Learned gates stay."""
        if self.spec.is_avg_k:
            self._follow_keys(self.spec.gate_momentum)

    @torch.no_grad()
    def reset_gate(self) -> None:
        """Set an avg-k or linear gate to the mean keys at once, without momentum; a cosine gate keeps its draws."""
        if self.spec.gate != "cosine":
            self._follow_keys(momentum=0.0)

    def _follow_keys(self, momentum: float) -> None:
        spec, gate, experts = self.spec, self._linear_gate(), self.moe.experts
        sign = 1.0 if spec.choice == "top" else -1.0  # the worst experts are the best of the negated gate
        values = experts.w2 if spec.value_norm_weighted else None
        old = sign * gate.weight
        gate.weight.copy_(
            sign * updated_gate(old, experts.w1, values, momentum=momentum, normalize=spec.normalize_gate)
        )
        if spec.gate == "avg_k_bias":
            mean_E = self.expert_tensors().bias_Es.mean(dim=1)
            gate.bias.copy_(momentum * gate.bias + (1 - momentum) * sign * mean_E)

    def _linear_gate(self) -> LinearGate:
        gate = self.moe.gate
        if not isinstance(gate, LinearGate):
            raise SpecError(f"A {type(gate).__name__} does not follow keys.")
        return gate

    def expert_tensors(self) -> ExpertTensors:
        """The experts in the layout of the public checkpoints; views where possible."""
        experts = self.moe.experts
        if experts.b1 is None or experts.b2 is None:
            raise SpecError("The experts have no biases, so they were not cut out of a dense layer.")
        return ExpertTensors(experts.w1, experts.b1, experts.w2.transpose(1, 2), experts.b2)

    def merge(self, counts_E: Tensor | None = None, average_replicas: bool = False) -> Merged:
        """The dense layer of all neurons; bit-equal to the original while nothing was trained.

        Args:
            counts_E: choices of each expert, to weight their shares of the output bias; uniform when left out.
            average_replicas: see :func:`moe.conversion.merge.merge_experts`.

        Raises:
            SpecError: copies of the whole layer, which have no common dense form.
        """
        if self.spec.split == "copy":
            raise SpecError("Copies of a whole layer cannot be merged into one dense layer.", "Keep the experts.")
        return merge_experts(
            self.expert_tensors(), self.labels_F, self.spec.chosen, self.spec.expert_repeat,
            remainder_D=self.bias_rest_D, counts_E=counts_E, average_replicas=average_replicas,
        )  # fmt: skip

    @torch.no_grad()
    def _load(self, tensors: ExpertTensors) -> None:
        for own, value in zip(self.expert_tensors(), tensors, strict=True):
            own.copy_(value)  # the second layer is a transposed view: written through
        self.reset_gate()

    def __getstate__(self) -> dict[str, Any]:
        """Without the mask of a pass."""
        return {**self.__dict__, "_mask_N": None}


@contextmanager
def token_mask(module: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """While open, converted layers inside ``module`` leave out tokens where ``mask`` (bool or 0/1, ``[B, S]``) is 0.

    Padding then takes no seat, is not counted and does not enter the balance loss; its output is zero.
    """
    layers = converted_layers(module)
    flat = None if mask is None else mask.reshape(-1).bool()
    for layer in layers:
        layer._mask_N = flat
    try:
        yield
    finally:
        for layer in layers:
            layer._mask_N = None


def converted_layers(module: nn.Module) -> list[ConvertedFFN]:
    """All converted layers inside ``module``, in order."""
    return [child for child in module.modules() if isinstance(child, ConvertedFFN)]


def update_gates(module: nn.Module) -> None:
    """Move every avg-k gate inside ``module`` after an optimiser step (:meth:`ConvertedFFN.update_gate`)."""
    for layer in converted_layers(module):
        layer.update_gate()
