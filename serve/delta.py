"""A domain's state as a delta: only those tensors of the base model that adaptation changed, by name.

A delta is immutable, knows its size in bytes and has a digest over its canonical bytes (safetensors), so that equal
deltas have equal digests on every machine. Norm parameters and statistics of a ResNet-18 are some 80 kB, those of a
ViT-tiny 40 kB; a delta of a full Meta-DMoE step is as large as the features.

The idea is that of adapters served on one base model (LoRAX, S-LoRA arXiv 2311.03285).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from serve.model import ServedModel

_MAX_NAME = 512
_SHOWN = 4


class Delta:
    """Tensors that replace the base model's.

    Args:
        tensors: student name (``features.0.weight``, ``classifier.0.bias``, ...) -> tensor. Contiguous copies on the
            CPU are kept, without gradients; what happens to the caller's tensors later does not reach the delta.

    Raises:
        CheckpointError: a tensor holds NaN or infinite values.
        SpecError: a name is empty, longer than 512 characters or not printable.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            if not name or len(name) > _MAX_NAME or not name.isprintable():
                raise SpecError(f"{name[:40]!r} is not the name of a tensor.", "Use names of the student.")
        kept = {name: _own(tensors[name]) for name in sorted(tensors)}
        broken = [name for name, value in kept.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"The state holds NaN or infinite values in {_some(broken)}.",
                "Adapt again with fewer or smaller steps.",
            )
        self.tensors: Mapping[str, Tensor] = MappingProxyType(kept)

    @classmethod
    def changed(cls, base: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> Delta:
        """A delta of those ``adapted`` tensors that differ from ``base`` (the student's state dict) in any bit."""
        return cls({name: new for name, new in adapted.items() if name not in base or not _same(new, base[name])})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of :meth:`to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self, note: str | None = None) -> bytes:
        """As a safetensors file. The bytes depend on names and values only (and on ``note``, kept as metadata)."""
        from safetensors.torch import save

        return bytes(save(dict(self.tensors), None if note is None else {"moepipe": note}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Delta:
        """Read :meth:`to_bytes` back, bit for bit.

        Raises:
            CheckpointError: truncated, not safetensors, or with NaN or infinite values.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The state is truncated or not a safetensors file ({len(data)} bytes: {error}).", "Adapt again."
            ) from None
        return cls(tensors)

    @classmethod
    def verified(cls, data: bytes, digest: str) -> Delta:
        """Read a file that must be the one of this digest; its content was checked when it was made.

        Raises:
            CheckpointError: another digest, truncated, or not safetensors.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"A state's file is damaged: {len(data)} bytes of another digest.", "Adapt again.")
        from safetensors.torch import load

        found = cls({})
        found.tensors = MappingProxyType(dict(sorted(load(data).items())))
        found.__dict__["digest"] = digest
        return found

    def check_fits(self, model: ServedModel | nn.Module) -> None:
        """Compare names, shapes and types with the base model's, and look at variances.

        Raises:
            CheckpointError: the first few tensors that do not fit, by name.
        """
        module = model if isinstance(model, nn.Module) else model.base
        own = module.state_dict(keep_vars=True)
        problems: list[str] = []
        for name, value in self.tensors.items():
            if name not in own:
                problems.append(f"{name} is not in the model")
            elif value.shape != own[name].shape:
                problems.append(f"{name} has shape {tuple(value.shape)} instead of {tuple(own[name].shape)}")
            elif value.dtype != own[name].dtype:
                problems.append(f"{name} is {value.dtype} instead of {own[name].dtype}")
            elif name.endswith("running_var") and bool((value < 0).any()):
                problems.append(f"{name} has negative variances")
        if problems:
            raise CheckpointError(
                f"The state does not fit the model: {_some(problems)}.", "It belongs to another model."
            )

    def __len__(self) -> int:
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Delta) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return Delta.from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        return f"Delta({len(self)} tensors, {self.nbytes} bytes)"


def _own(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _same(new: Tensor, old: Tensor) -> bool:
    return (
        new.shape == old.shape and new.dtype == old.dtype and bool(torch.equal(new.detach().cpu(), old.detach().cpu()))
    )


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + (f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")
