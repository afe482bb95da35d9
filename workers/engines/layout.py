"""Parameter names across expert-parallel ranks: this rank's part of the experts <-> the whole model by plain name.

In the parallel layout expert tensors are numbered locally and every rank of an expert group holds other experts; the
plain layout numbers them globally (``moe.layers.block``), or stacks them, and then a rank holds a part along the first
axis (``moe.layers.layer``). Everything else has the same name and value on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.layers.block import deepspeed_names


class Layout:
    """Translation for one module on one rank.

    Args:
        module: in the parallel layout.
        order: names of the plain module's state dict, in its order.
        experts: name of each parallel MoE layer -> (name of its plain block, number of experts).
        ep_size: ranks that share the experts.
        ep_rank: this rank's place among them.
        stacked: name of each parallel layer with stacked experts -> (name of its plain layer, names inside the one ->
            names inside the other).

    Attributes:
        plain_names: parallel name on this rank -> plain name.
        group: process group of the ranks that share the experts; set once it exists.
    """

    def __init__(
        self,
        module: nn.Module,
        order: Sequence[str],
        experts: Mapping[str, tuple[str, int]],
        ep_size: int,
        ep_rank: int,
        stacked: Mapping[str, tuple[str, Mapping[str, str]]] | None = None,
    ) -> None:
        self.experts, self.stacked, self._ep_rank = dict(experts), dict(stacked or {}), ep_rank
        self._local, self._order, self._ep_size = list(module.state_dict()), list(order), ep_size
        self._by_rank: list[dict[str, str]] = [self._names(rank) for rank in range(ep_size)]
        self.plain_names = self._by_rank[ep_rank]
        self.group: Any = None

    def _names(self, ep_rank: int) -> dict[str, str]:
        renamed: dict[str, str] = {}
        for layer, (block, num_experts) in self.experts.items():
            names = deepspeed_names(num_experts, ep_rank, self._ep_size)
            renamed |= {f"{layer}.{mine}": f"{block}.{theirs}" for mine, theirs in names.items()}
        for layer, (plain, inside) in self.stacked.items():
            renamed |= {f"{layer}.{mine}": f"{plain}.{theirs}" for mine, theirs in inside.items()}
        return {name: renamed.get(name, name) for name in self._local}

    @property
    def parallel(self) -> bool:
        """Whether any layer's experts are shared by ranks."""
        return bool(self.experts or self.stacked)

    def _is_stacked(self, name: str) -> bool:
        return any(name.startswith(f"{layer}.deepspeed_moe.experts.") for layer in self.stacked)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parallel name -> tensor of this rank, to plain name -> tensor of the whole model, CPU copies. Collective."""
        whole = {self.plain_names[name]: value.detach().cpu().clone() for name, value in tensors.items()}
        if self._ep_size > 1:
            shared = [name for name in tensors if ".deepspeed_experts." in name or self._is_stacked(name)]
            for name in shared:
                pieces = [torch.empty_like(tensors[name]) for _ in range(self._ep_size)]
                dist.all_gather(pieces, tensors[name].detach().contiguous(), group=self.group)
                if self._is_stacked(name):
                    whole[self.plain_names[name]] = torch.cat(pieces).cpu()
                    continue
                for rank, piece in enumerate(pieces):
                    whole[self._by_rank[rank][name]] = piece.cpu()
        return {name: whole[name] for name in self._order if name in whole}

    def scatter(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Inverse of :meth:`gather` for this rank."""
        present = {mine: plain for mine, plain in self.plain_names.items() if plain in tensors}
        return {mine: self.part(mine, tensors[plain]).to(device) for mine, plain in present.items()}

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of stacked experts by its name here; anything else, and scalars, as they are."""
        return whole.chunk(self._ep_size)[self._ep_rank] if self._is_stacked(name) and whole.ndim else whole
