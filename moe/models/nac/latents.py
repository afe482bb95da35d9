"""Latents: who they are (signature), what they compute (code), where they start (seeded or learned state).

Shapes: B batch, U latents, Z signature, C code, S state, L propagators.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.draws import Draws, code_noise, draws_or_default
from moe.models.nac.graph_specs import LatentSpec, SeederSpec
from moe.models.nac.modfc import EPS


class Latents(nn.Module):
    """One group of latents.

    Tensors: ``signatures_`` [U, Z], ``codes_`` [U, C] (``[L, U, C]`` with codes per propagator) and, without a seeder,
    ``initial_states_`` [U, S]. All start standard normal.

    Args:
        count: latents U.
        signature_dim: width Z.
        code_dim: width C.
        spec: what is trained; the graph prior is applied from outside (``moe.models.nac.circuit.build_circuit``).
        iterations: number L of code sets; None for one that all propagators share.
        state_dim: width S of learned initial states; None where a seeder makes them.
    """

    signatures_: Tensor
    codes_: Tensor

    def __init__(
        self,
        count: int,
        signature_dim: int,
        code_dim: int,
        spec: LatentSpec,
        iterations: int | None = None,
        state_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self._put("signatures_", torch.randn(count, signature_dim), spec.learnable_signatures)
        sets = () if iterations is None else (max(1, iterations),)
        self._put("codes_", torch.randn(*sets, count, code_dim), spec.learnable_codes)
        self.initial_states_ = None if state_dim is None else nn.Parameter(torch.randn(count, state_dim))

    def _put(self, name: str, value: Tensor, learnable: bool) -> None:
        if learnable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def count(self) -> int:
        """Latents U."""
        return self.signatures_.shape[0]

    def codes(self, iteration: int = 0) -> Tensor:
        """Codes ``[U, C]`` of a propagator; -1 is the last. Read-in and seeder use those of the first."""
        return self.codes_ if self.codes_.ndim == 2 else self.codes_[iteration]

    def set_signatures(self, signatures_UZ: Tensor) -> None:
        """Replace the signatures, e.g. by those fitted to a graph.

        Raises:
            SpecError: another shape.
        """
        if signatures_UZ.shape != self.signatures_.shape:
            raise SpecError(
                f"Signatures {tuple(signatures_UZ.shape)} do not fit latents of {tuple(self.signatures_.shape)}."
            )
        with torch.no_grad():
            self.signatures_.copy_(signatures_UZ)


class LatentSeeder(nn.Module):
    """Initial states from codes: ``mu(LN(code)) + noise * exp(logvar(LN(code)) / 2)``, one map for all latents.

    ``Parity:`` the noise stays on in evaluation; ``eval_noise=False`` turns it off there.

    Args:
        code_dim: width C.
        state_dim: width S.
        code_noise_scale: relative noise on the codes, in training.
        spec: whether states are noisy, whether the code is the mean.
        eval_noise: whether state noise stays on in evaluation.
    """

    def __init__(
        self,
        code_dim: int,
        state_dim: int,
        code_noise_scale: float = 0.0,
        spec: SeederSpec | None = None,
        eval_noise: bool = True,
    ) -> None:
        super().__init__()
        options = SeederSpec() if spec is None else spec
        self.code_noise_scale, self.eval_noise, self.state_dim = code_noise_scale, eval_noise, state_dim
        self.layernorm = nn.LayerNorm(code_dim, eps=EPS)
        self.code_to_state_mu = None if options.use_code_as_mean_state else nn.Linear(code_dim, state_dim)
        self.code_to_state_logvar = nn.Linear(code_dim, state_dim) if options.use_state_noise else None
        if self.code_to_state_logvar is not None:
            nn.init.constant_(self.code_to_state_logvar.bias, -5.0)

    def forward(self, codes_UC: Tensor, batch: int, draws: Draws | None = None) -> Tensor:
        """States ``[B, U, S]``.

        Draws, in this order: ``code`` (uniform, ``[U, C]``) in training with code noise; ``state`` (normal,
        ``[B, U, S]``).
        """
        source = draws_or_default(draws)
        if self.training:
            codes_UC = code_noise(codes_UC, self.code_noise_scale, "code", source)
        normal = self.layernorm(codes_UC)
        mean_US: Tensor = codes_UC if self.code_to_state_mu is None else self.code_to_state_mu(normal)
        if self.code_to_state_logvar is None or not (self.training or self.eval_noise):
            return mean_US.expand(batch, -1, -1)
        std_US = (self.code_to_state_logvar(normal) / 2).exp()
        noise = source.normal("state", (batch, codes_UC.shape[0], self.state_dim), codes_UC)
        states_BUS: Tensor = mean_US + noise.to(std_US.dtype) * std_US
        return states_BUS
