"""One forward pass for rows of many domains: the trunk is shared, norm layers and head take each row's own tensors.

A *twin* of the student shares its tensors but has its own module objects. In a twin, normalisation layers and the head
can be given tensors per row; everything else runs once on the whole batch. Whether that gives the numbers of separate
passes for this architecture (the batch must be the first axis wherever a norm layer sees it) is measured when the twin
is made, and the caller falls back to one pass per domain if not.

Normalisation per row: BatchNorm in evaluation mode sees ``[1, B*C, ...]`` and runs torch's own kernel, so that a row
has the same bits as alone; the others normalise without affine part and apply each row's own afterwards.

The idea is the gather of LoRAX and S-LoRA (arXiv 2311.03285) on norm layers instead of low-rank adapters.

Shapes: B rows, G distinct states in the batch, C channels, K outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moe.student import Student

HEAD = "classifier.0"
_TOLERANCE = 1e-4
_PROBE_ROWS = 3


class NotByRow(Exception):
    """A layer does not have the batch as its first axis; never seen by users."""


@dataclass(frozen=True)
class RowTensors:
    """The tensors of one layer for the rows of a batch.

    Attributes:
        stacked: own name (``weight``, ``running_mean``, ...) -> ``[G, ...]``.
        state_B: int64, state of each row, in 0..G-1.
        rows_G: rows of each state.
    """

    stacked: Mapping[str, Tensor]
    state_B: Tensor
    rows_G: Sequence[Tensor]

    def of_rows(self, name: str) -> Tensor | None:
        """``[B, ...]``, or None when the layer has no such tensor."""
        found = self.stacked.get(name)
        return None if found is None else found.index_select(0, self.state_B)

    @property
    def size(self) -> int:
        """B."""
        return self.state_B.shape[0]


def twin_of(student: Student) -> Student:
    """A student with its own module objects and the very same tensors; made in milliseconds, costs no memory.

    ``functional_call`` exchanges a module's tensors while it runs, so two threads must not use one module with it.
    """
    shared = {id(tensor): tensor for tensor in (*student.parameters(), *student.buffers())}
    return copy.deepcopy(student, shared)


class MixedTwin:
    """A twin of ``student`` that can run a batch of mixed domains. For one thread at a time.

    Args:
        student: in evaluation mode; not changed.

    Attributes:
        by_row: names of the tensors that may differ between rows.
    """

    def __init__(self, student: Student) -> None:
        self.student = twin_of(student)
        self._layers: dict[str, nn.Module] = {}
        for name, module in self.student.named_modules():
            if name == HEAD or _normaliser(module) is not None:
                self._layers[name] = module
        self._own = self.student.state_dict(keep_vars=True)
        own = self._own
        self.by_row = frozenset(n for n in own if n.rpartition(".")[0] in self._layers)
        self._rows: dict[str, RowTensors] = {}
        for name, module in self._layers.items():
            module.forward = self._forward(name, module)  # type: ignore[method-assign]

    def one(self, images: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, K]`` of rows that share one state; any of the student's tensors may be replaced."""
        if not tensors:
            out: Tensor = self.student(images)
            return out
        placed = {name: value.to(images.device) for name, value in tensors.items()}
        found: Tensor = functional_call(self.student, placed, (images,))
        return found

    def mixed(self, images: Tensor, states: Sequence[Mapping[str, Tensor]], state_B: Tensor) -> Tensor:
        """Logits ``[B, K]`` of rows with different states in one pass.

        Args:
            images: ``[B, C, H, W]``.
            states: G mappings whose names are all in :attr:`by_row`.
            state_B: int64 on the images' device, in 0..G-1.

        Raises:
            NotByRow: a layer does not have the rows as its first axis.
        """
        touched: dict[str, list[str]] = {}
        for name in sorted({name for state in states for name in state}):
            layer, _, own = name.rpartition(".")
            if own != "num_batches_tracked":  # counts; no prediction reads it
                touched.setdefault(layer, []).append(own)
        rows_G = [torch.nonzero(state_B == g).flatten() for g in range(len(states))]
        try:
            for layer in touched:
                stacked = {
                    own: torch.stack([_tensor(state, f"{layer}.{own}", base) for state in states]).to(images.device)
                    for own, base in self._tensors(layer)
                }
                self._rows[layer] = RowTensors(stacked, state_B, rows_G)
            out: Tensor = self.student(images)
            return out
        finally:
            self._rows.clear()

    def agrees(self, images: Tensor) -> bool:
        """Whether a mixed pass gives what separate passes give, on these images with states that touch every layer."""
        generator = torch.Generator().manual_seed(0)
        states: list[dict[str, Tensor]] = [{}, self._shaken(generator), self._shaken(generator)]
        try:
            together = self.mixed(images[:_PROBE_ROWS], states, torch.arange(_PROBE_ROWS, device=images.device))
        except NotByRow:
            return False
        apart = torch.cat([self.one(images[g : g + 1], state) for g, state in enumerate(states)])
        scale = max(float(apart.abs().max()), 1e-6)
        return bool((together - apart).abs().max() <= _TOLERANCE * scale)

    def _shaken(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The by-row tensors, each a tenth off."""
        own = self._own
        found: dict[str, Tensor] = {}
        for name in sorted(self.by_row):
            if own[name].is_floating_point():
                noise = torch.rand(own[name].shape, generator=generator).to(own[name])
                found[name] = own[name].detach() * (0.95 + 0.1 * noise)
        return found

    def _tensors(self, layer: str) -> Iterable[tuple[str, Tensor]]:
        for own in ("weight", "bias", "running_mean", "running_var"):
            if (found := self._own.get(f"{layer}.{own}")) is not None:
                yield own, found.detach()

    def _forward(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        plain, by_row = module.forward, _head if name == HEAD else _normaliser(module)
        assert by_row is not None

        def forward(x: Tensor) -> Tensor:
            rows = self._rows.get(name)
            if rows is None:
                out: Tensor = plain(x)
                return out
            if x.shape[0] != rows.size:
                raise NotByRow(name)
            return by_row(module, x, rows)

        return forward


def _tensor(state: Mapping[str, Tensor], name: str, base: Tensor) -> Tensor:
    return state[name].to(base.device) if name in state else base


# ---- layers ----------------------------------------------------------------------------------------------------------

ByRow = Callable[[nn.Module, Tensor, RowTensors], Tensor]


def _normaliser(module: nn.Module) -> ByRow | None:
    """How to run this layer with tensors per row; None for layers that are not known to be normalisation."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        return None  # normalises by its own batch
    return _BY_ROW.get((type(module).__module__.partition(".")[0], type(module).__name__))


def _batch_norm(module: nn.Module, x: Tensor, rows: RowTensors) -> Tensor:
    flat = {name: rows.of_rows(name) for name in ("running_mean", "running_var", "weight", "bias")}
    mean, var, weight, bias = (None if value is None else value.reshape(-1) for value in flat.values())
    wide = x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])
    eps: float = module.eps  # type: ignore[assignment]
    return F.batch_norm(wide, mean, var, weight, bias, False, 0.0, eps).view(x.shape)


def _batch_norm_act(module: nn.Module, x: Tensor, rows: RowTensors) -> Tensor:
    out: Tensor = module.act(module.drop(_batch_norm(module, x, rows)))  # type: ignore[operator]
    return out


def _layer_norm(module: nn.Module, x: Tensor, rows: RowTensors) -> Tensor:
    if x.ndim <= len(module.normalized_shape):  # type: ignore[arg-type]
        raise NotByRow("no batch axis")
    shape: tuple[int, ...] = tuple(module.normalized_shape)  # type: ignore[arg-type]
    eps: float = module.eps  # type: ignore[assignment]
    plain = F.layer_norm(x, shape, None, None, eps)
    return _affine(plain, rows, lambda value: value.view(rows.size, *(1,) * (x.ndim - 1 - len(shape)), *shape))


def _layer_norm_2d(module: nn.Module, x: Tensor, rows: RowTensors) -> Tensor:
    shape: tuple[int, ...] = tuple(module.normalized_shape)  # type: ignore[arg-type]
    eps: float = module.eps  # type: ignore[assignment]
    plain = F.layer_norm(x.permute(0, 2, 3, 1), shape, None, None, eps).permute(0, 3, 1, 2)
    return _affine(plain, rows, lambda value: value.view(rows.size, -1, 1, 1))


def _group_norm(module: nn.Module, x: Tensor, rows: RowTensors) -> Tensor:
    eps: float = module.eps  # type: ignore[assignment]
    plain = F.group_norm(x, module.num_groups, None, None, eps)  # type: ignore[arg-type]
    return _affine(plain, rows, lambda value: value.view(rows.size, -1, *(1,) * (x.ndim - 2)))


def _affine(plain: Tensor, rows: RowTensors, spread: Callable[[Tensor], Tensor]) -> Tensor:
    weight, bias = rows.of_rows("weight"), rows.of_rows("bias")
    if weight is None:
        return plain
    if bias is None:
        return plain * spread(weight)
    return torch.addcmul(spread(bias), plain, spread(weight))


def _head(module: nn.Module, x: Tensor, rows: RowTensors) -> Tensor:
    weight, bias = rows.stacked["weight"], rows.stacked.get("bias")
    out = x.new_empty(x.shape[0], weight.shape[1])
    for g, where in enumerate(rows.rows_G):
        if where.numel():
            out[where] = F.linear(x[where], weight[g], None if bias is None else bias[g])
    return out


_BY_ROW: Mapping[tuple[str, str], ByRow] = {
    ("torch", "BatchNorm1d"): _batch_norm,
    ("torch", "BatchNorm2d"): _batch_norm,
    ("timm", "BatchNormAct2d"): _batch_norm_act,
    ("torch", "LayerNorm"): _layer_norm,
    ("timm", "LayerNorm"): _layer_norm,
    ("timm", "LayerNorm2d"): _layer_norm_2d,
    ("torch", "GroupNorm"): _group_norm,
    ("timm", "GroupNorm"): _group_norm,
}
