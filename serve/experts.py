"""All frozen experts on one batch: one stacked forward where that pays, else one expert after the other.

Experts of one architecture differ in their tensors only, so E forwards are one forward with a leading expert axis
(``torch.func.stack_module_state`` and ``vmap``). On a GPU that fills the device with small batches; on a CPU one after
the other is faster and is what happens there. The experts' own tensors become views of the stacked ones, so stacking
costs no memory.

Shapes: B rows, E experts, D feature width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from moe.student import FEATURES, Student
from serve.mixed import twin_of


class ExpertBank:
    """Callable from images to the tokens of all experts; safe for many threads.

    Args:
        experts: at least one, in evaluation mode, on one device.
        stacked: True or False decides; None stacks on a GPU when all experts have one architecture.
    """

    def __init__(self, experts: Sequence[Student], stacked: bool | None = None) -> None:
        self.experts = list(experts)
        self._lock = threading.Lock()
        wanted = next(experts[0].parameters()).is_cuda if stacked is None else stacked
        self.stacked = wanted and len(experts) > 1 and stackable(experts)
        if self.stacked:
            parameters, buffers = stack_module_state(self.experts)  # type: ignore[arg-type]
            tensors = {name: value.detach() for name, value in {**parameters, **buffers}.items()}
            for number, expert in enumerate(self.experts):
                for name, value in (*expert.named_parameters(), *expert.named_buffers()):
                    value.data = tensors[name][number]
            own = {n: value for n, value in tensors.items() if n.startswith(FEATURES)}
            self._own = {name.removeprefix(FEATURES): value for name, value in own.items()}
            self._shape = twin_of(self.experts[0]).features

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to tokens ``[B, E, D]``, without a graph."""
        with torch.no_grad():
            if not self.stacked:
                return torch.stack([expert.extract(images) for expert in self.experts], dim=1)

            def one(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
                features: Tensor = functional_call(self._shape, tensors, (x,))
                return features

            with self._lock:  # functional_call exchanges the tensors of one module
                tokens_EBD: Tensor = vmap(one, in_dims=(0, None))(self._own, images).flatten(2)
            return tokens_EBD.transpose(0, 1)


def stackable(experts: Sequence[Student]) -> bool:
    """Whether all have the same tensors by name, shape and type, and no experts inside (routing is not batched)."""
    shapes = [{name: (v.shape, v.dtype) for name, v in expert.state_dict().items()} for expert in experts]
    inner = any(hasattr(module, "gate") or hasattr(module, "experts") for e in experts for module in e.modules())
    return all(found == shapes[0] for found in shapes) and not inner
