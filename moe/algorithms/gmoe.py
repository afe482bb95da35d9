"""GMoE: sparse mixture-of-experts transformers for domain generalisation, trained by plain ERM.

Paper: Li et al., ICLR 2023 (arXiv 2206.04046). Public code: Luodian/Generalizable-Mixture-of-Experts, commit 0689d557.
Equation: mean cross-entropy over the joined minibatches of all source domains, plus for every sparse block
0.01 * (variation of importance + variation of load) / 2. The domain label is never used.

- Parity: Adam with L2 decay on everything, constant rate (``no_decay`` and ``optimizer: adamw`` are options).
- Parity: truncated normal of 0.02 for the head, whose bias starts at 0.
- Differs: in evaluation nothing is dropped, so predictions are independent of the batch; ``gmoe.eval_capacity`` of the
  backbone brings the official behaviour back.
- Differs: batch size, rate and decay are those that the public code registers for GMoE; ``resnet_dropout``, which it
  registers as well and never uses, does not act here either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from moe.algorithms._domains import domains_of, forward, joined, losses
from moe.algorithms._gmoe_presets import GMOE_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor, nn

    from moe.losses import Losses
    from moe.models.vit import BlockDraws


class Config(SupervisedConfig):
    """Settings of GMoE."""

    @model_validator(mode="after")
    def _sparse(self) -> Config:
        if self.backbone.gmoe is None and self.moe is None:
            raise ValueError(f"{self.backbone.name!r} has no experts: give `gmoe` to the backbone, or use erm.")
        return self


class Method(Supervised[Config]):
    """A vision transformer with sparse blocks, in student form."""

    Config = Config
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = GMOE_PRESETS

    def build(self, num_outputs: int) -> nn.Module:
        """See the base class."""
        from moe.models.surgery import init_linear

        student = super().build(num_outputs)
        init_linear(student.get_submodule("classifier.0"))
        return student

    def loss(self, module: nn.Module, batch: Any, draws: Mapping[int, BlockDraws] | None = None) -> Losses:
        """Losses of a batch (see ``_domains``); parts ``task`` and ``aux`` (weighted sum over the sparse blocks).

        Args:
            module: what :meth:`build` gave, or a bare vision transformer.
            batch: rows by domain; their order decides how tokens are routed when slots run out.
            draws: injected noise and masks by block number, for a bare transformer.
        """
        from timm.models.vision_transformer import VisionTransformer

        from moe.losses import task_loss

        rows = joined(domains_of(batch))
        if isinstance(module, VisionTransformer):
            return self._bare(module, rows.images, rows.labels, draws)
        out = forward(module, rows.images)
        return losses(task_loss(self.task, out.logits_BK, rows.labels), {}, [out])

    def _bare(
        self, vit: VisionTransformer, images: Tensor, labels: Tensor, draws: Mapping[int, BlockDraws] | None
    ) -> Losses:
        """A distilled transformer trains both heads on the labels, equally."""
        import torch

        from moe.losses import Losses, task_loss
        from moe.models.vit import run_vit

        out = run_vit(vit, images, draws)
        task = task_loss(self.task, out.logits_BK, labels)
        if out.logits_dist_BK is not None:
            task = (task + task_loss(self.task, out.logits_dist_BK, labels)) / 2
        aux = torch.stack(list(out.aux.values())).sum() if out.aux else task.new_zeros(())
        return Losses(task + aux, {"task": task.detach(), "aux": aux.detach()})
