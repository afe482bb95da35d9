"""Random draws of the circuit, injectable by name.

Everything random in a forward pass (code noise, sampled edges, path drop, seeded states, Gumbel noise) is asked for by
name from a :class:`Draws`. Without one, or where it holds nothing, values come from its generator or from torch's
default one, as with ``torch.nn.Dropout``. A run can so be repeated with the very draws of another implementation.

Families: ``uniform`` on [0, 1), ``normal`` with unit variance, ``exponential`` with rate 1 (Gumbel noise is
``-log e``). Draws are made in float32 or wider, whatever the precision of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moe.errors import SpecError, nearest
from moe.models.nac.products import worth_it


class Draws:
    """Where random numbers come from.

    Args:
        given: draws by name, in the distribution that the user of each name states. With a mapping, every name asked
            for must be in it; None draws everything.
        generator: source of what is drawn here; None is torch's default generator.
        names: how names are translated before they are looked up (see :meth:`at`).
    """

    def __init__(
        self,
        given: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.given = given
        self.generator = generator
        self.names = dict(names or {})

    def at(self, **names: str) -> Draws:
        """The same source under other names: ``at(kernel="prop0.kernel")`` answers ``kernel`` with ``prop0.kernel``."""
        return Draws(self.given, self.generator, names)

    def name(self, name: str) -> str:
        """What ``name`` is translated to."""
        return self.names.get(name, name)

    def uniform(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Numbers in [0, 1) of ``shape`` on the device of ``like``, float32 or wider."""
        found = self._find(name, shape, like)
        if found is not None:
            return found
        return torch.rand(shape, generator=self.generator, device=like.device, dtype=_wide(like))

    def normal(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normal numbers, as :meth:`uniform`."""
        found = self._find(name, shape, like)
        if found is not None:
            return found
        return torch.randn(shape, generator=self.generator, device=like.device, dtype=_wide(like))

    def exponential(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Exponential numbers with rate 1, as :meth:`uniform`."""
        found = self._find(name, shape, like)
        if found is not None:
            return found
        u = torch.rand(shape, generator=self.generator, device=like.device, dtype=_wide(like))
        tiny = torch.finfo(u.dtype).tiny
        return -torch.log1p(-u).clamp(max=-tiny)

    def _find(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        if self.given is None:
            return None
        key = self.name(name)
        if key not in self.given:
            raise SpecError(f"The injected draws lack {key!r}.", nearest(key, self.given))
        value = self.given[key]
        if tuple(value.shape) != tuple(shape):
            raise SpecError(f"The injected draw {key!r} has shape {tuple(value.shape)}, needed is {tuple(shape)}.")
        return value.to(device=like.device, dtype=_wide(like))


def draws_or_default(draws: Draws | None) -> Draws:
    """``draws``, or a source on torch's default generator."""
    return Draws() if draws is None else draws


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def code_noise(codes: Tensor, scale: float, name: str, draws: Draws) -> Tensor:
    """Relative uniform noise on codes: ``code + scale * |code| * (2u - 1)``; the noise is constant for autograd.

    A code of exactly 0 stays 0 (the official code raises there: its distribution has no width).

    Args:
        codes: ``[..., C]``.
        scale: relative width, 0 makes no draw and returns ``codes``.
        name: of the uniform draw, of ``codes``' shape.
        draws: their source.
    """
    if scale == 0:
        return codes
    u = draws.uniform(name, tuple(codes.shape), codes)
    return codes + (scale * codes.detach().abs() * (2 * u - 1)).to(codes.dtype)


def path_drop(old_BUS: Tensor, residual_BUS: Tensor, rate: float, training: bool, name: str, draws: Draws) -> Tensor:
    """``old + residual``, where training drops the residual of a whole sample with probability ``rate``.

    Kept residuals are divided by ``1 - rate``. One uniform draw of shape ``[B, 1, 1]``, but in
    evaluation and at rate 0.
    """
    if rate == 0 or not training:
        return old_BUS + residual_BUS
    u = draws.uniform(name, (old_BUS.shape[0], 1, 1), old_BUS)
    keep = torch.floor((1 - rate) + u) / (1 - rate)
    return old_BUS + residual_BUS * keep.to(residual_BUS.dtype)


class Branch(NamedTuple):
    """A residual branch of a batch under path drop.

    Attributes:
        rows: samples that keep it, int64; None for all.
        factor: of what it adds.
    """

    rows: Tensor | None
    factor: float

    def of(self, x_BUS: Tensor) -> Tensor:
        """The samples of ``x`` for which the branch has to be computed."""
        return x_BUS if self.rows is None else x_BUS[self.rows]

    def add(self, old_BUS: Tensor, residual: Tensor) -> Tensor:
        """What :func:`path_drop` returns, from the residual of those samples alone."""
        if self.rows is None:
            return torch.add(old_BUS, residual, alpha=self.factor)
        return old_BUS.index_add(0, self.rows, residual, alpha=self.factor)


def branch(old_BUS: Tensor, rate: float, name: str, draws: Draws) -> Branch:
    """The branch that :func:`path_drop` would add to ``old`` in training, by the same draw, made before it is computed.

    Where every sample drops it, it is computed for all and counts nothing, so that its weights get gradients of zero.
    """
    u = draws.uniform(name, (old_BUS.shape[0], 1, 1), old_BUS)
    rows = torch.floor((1 - rate) + u).flatten().nonzero().flatten()
    if not len(rows):
        return Branch(None, 0.0)
    return Branch(None if len(rows) == len(old_BUS) else rows, 1 / (1 - rate))


def add_residual(
    old_BUS: Tensor,
    residual: Callable[[Branch], Tensor],
    width: int,
    rate: float,
    training: bool,
    name: str,
    draws: Draws,
) -> Tensor:
    """:func:`path_drop` of a residual that is computed here; of a large one, for those samples only that keep it.

    Args:
        old_BUS: what is added to.
        residual: computes what is added, for the samples of the branch that it is given.
        width: of the first product of the residual, for :func:`~moe.models.nac.products.worth_it`.
        rate: probability with which a sample drops it.
        training: path drop happens in training only.
        name: of the draw.
        draws: their source.
    """
    if training and rate and worth_it(old_BUS, old_BUS.numel() * width):
        kept = branch(old_BUS, rate, name, draws)
        return kept.add(old_BUS, residual(kept))
    return path_drop(old_BUS, residual(Branch(None, 1.0)), rate, training, name, draws)
