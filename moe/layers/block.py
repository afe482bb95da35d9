"""The MoE block of a student: ``z + MoE(LayerNorm(z))`` on pooled features.

Router, dispatch and experts in one drop-in module; double-differentiable, clean under ``torch.func.functional_call``
(no state is kept between calls) and, because nothing is dropped at inference, independent of the batch's other rows.

How the numbers correspond to ``deepspeed.moe.layer.MoE`` (with ``drop_tokens=False, use_rts=False,
top2_2nd_expert_sampling=False, use_residual=False`` and the LayerNorm and residual of this block around it):

- ``k=1``: ``y = p_top * expert(x)`` with the plain softmax probability; ``k>=2``: probabilities renormalised over the
  chosen experts. Gate in float32. Balance losses are equal for every k (``moe.layers.balance.balance_loss``).
- ``gate.weight`` is DeepSpeed's ``deepspeed_moe.gate.wg.weight``; expert e here is ``deepspeed_moe.experts.
  deepspeed_experts.<e - first>`` on the rank whose experts begin at ``first``: :func:`deepspeed_names`.

Sources: GShard (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961).

Shapes: N tokens (here: images of a batch), D width, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moe.errors import SpecError
from moe.layers.dispatch import combine, dispatch
from moe.layers.experts import Kernel, LocalExperts
from moe.layers.gates import LinearGate
from moe.layers.router import route
from moe.layers.seating import capacity
from moe.specs import StudentMoESpec


class MoEOutput(NamedTuple):
    """Result of an MoE block.

    Attributes:
        features_ND: refined features, same shape as the input.
        balance: scalar balance loss (1 when uniform), not yet weighted.
        counts_E: int64, tokens by expert.
    """

    features_ND: Tensor
    balance: Tensor
    counts_E: Tensor


class MoEBlock(nn.Module):
    """Residual MoE on feature vectors.

    State-dict names: ``norm.{weight,bias}``, ``gate.weight``, ``experts.<e>.w1.{weight,bias}``,
    ``experts.<e>.w2.{weight,bias}`` with e the global expert number.

    Args:
        dim: feature width D.
        spec: experts, choices, capacity.
        experts: executor (``moe.layers.experts``); all experts local when left out.
        kernel: kernel of the local executor.
    """

    def __init__(
        self, dim: int, spec: StudentMoESpec, experts: nn.Module | None = None, kernel: Kernel = "loop"
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.LayerNorm(dim)
        self.gate = LinearGate(dim, spec.num_experts)
        self.experts = experts or LocalExperts(dim, hidden_width(dim, spec), spec.num_experts, kernel)

    def forward(self, z_ND: Tensor) -> MoEOutput:
        """Refine features ``[N, D]``. Capacity applies in training mode only, and only when not dropless."""
        x_ND = self.norm(z_ND)
        slots = None
        if self.training and not self.spec.dropless:
            slots = capacity(z_ND.shape[0], self.spec.num_experts, self.spec.top_k, self.spec.capacity_factor)
        routing = route(self.gate(x_ND), self.spec.top_k, slots)
        sent = dispatch(x_ND, routing)
        y_MD = self.experts(sent.tokens_MD, sent.counts)
        return MoEOutput(z_ND + combine(y_MD, sent, routing.weights_NK), routing.balance, routing.counts_E)


def hidden_width(dim: int, spec: StudentMoESpec) -> int:
    """Hidden width of an expert for features of width ``dim``."""
    return max(1, round(dim * spec.hidden_ratio))


def deepspeed_names(num_experts: int, ep_rank: int, ep_size: int) -> dict[str, str]:
    """Parameter names inside DeepSpeed's MoE on one rank -> names inside :class:`MoEBlock`.

    Args:
        num_experts: E over all ranks.
        ep_rank: rank within the expert-parallel group.
        ep_size: its size; must divide E.

    Raises:
        SpecError: E is not a multiple of ``ep_size``.
    """
    if num_experts % ep_size:
        raise SpecError(f"{num_experts} experts cannot be shared equally by {ep_size} ranks.")
    local = num_experts // ep_size
    names = {"deepspeed_moe.gate.wg.weight": "gate.weight"}
    for e in range(local):
        for tensor in ("w1.weight", "w1.bias", "w2.weight", "w2.bias"):
            names[f"deepspeed_moe.experts.deepspeed_experts.{e}.{tensor}"] = f"experts.{ep_rank * local + e}.{tensor}"
    return names
