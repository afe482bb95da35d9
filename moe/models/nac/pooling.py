"""Output pooling: a confidence-weighted sum of output states becomes the logits.

The weights are a Gumbel softmax over the output latents, whose noise the official code draws in evaluation too.

Shapes: B batch, U output latents, S state width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.draws import Draws, draws_or_default
from moe.models.nac.specs import PoolingSpec


class OutputLatentPooling(nn.Module):
    """Pool output states into logits.

    Args:
        state_dim: width S.
        output_dim: classes K.
        spec: kind of softmax, temperature.
        eval_noise: whether Gumbel noise stays on in evaluation (``Parity:`` yes).
    """

    def __init__(self, state_dim: int, output_dim: int, spec: PoolingSpec, eval_noise: bool = True) -> None:
        super().__init__()
        self.spec, self.eval_noise = spec, eval_noise
        self.confidence_scorer = nn.Linear(state_dim, 1)
        self.to_logits = nn.Linear(state_dim, output_dim)

    def weights(self, states_BUS: Tensor, draws: Draws | None = None) -> Tensor:
        """Weights of the latents, ``[B, U]``, in float32 or wider. Draw: ``exponential`` ``[B, U]`` (Gumbel kinds)."""
        c_BU: Tensor = self.confidence_scorer(states_BUS)[..., 0]
        c_BU = c_BU.to(torch.promote_types(c_BU.dtype, torch.float32))
        if self.spec.softmax_type == "vanilla":
            return (c_BU / self.spec.temperature).softmax(dim=-1)
        if self.training or self.eval_noise:
            e_BU = draws_or_default(draws).exponential("exponential", tuple(c_BU.shape), c_BU)
            c_BU = c_BU - e_BU.log()
        soft_BU = (c_BU / self.spec.temperature).softmax(dim=-1)
        if self.spec.softmax_type == "gumbel":
            return soft_BU
        hard_BU = torch.zeros_like(soft_BU).scatter(-1, soft_BU.argmax(dim=-1, keepdim=True), 1.0)
        return hard_BU + (soft_BU - soft_BU.detach())

    def forward(self, states_BUS: Tensor, draws: Draws | None = None) -> Tensor:
        """Logits ``[B, K]``."""
        weights_BU = self.weights(states_BUS, draws).to(states_BUS.dtype)
        return self.to_logits((weights_BU.unsqueeze(1) @ states_BUS)[:, 0])  # type: ignore[no-any-return]


class FirstSlotAsLogits(nn.Module):
    """The first output state is the logits (the read-out's head has already mapped it to the classes)."""

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim

    def forward(self, states_BUK: Tensor, draws: Draws | None = None) -> Tensor:
        """``[B, U, K] -> [B, K]``. No draw.

        Raises:
            SpecError: states of another width than the classes.
        """
        if states_BUK.shape[-1] != self.output_dim:
            raise SpecError(f"The first slot holds {states_BUK.shape[-1]} values for {self.output_dim} classes.")
        return states_BUK[:, 0]
