"""Validation during meta-distillation: the test-time procedure on unseen domains, divided over the ranks.

For each domain: teacher from ALL experts' tokens of the first batch, one inner step on the student's features without
second-order graph, then predictions for the whole domain (Meta-DMoE, arXiv 2210.03885, section 5 of the procedure).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from workers.batches import ImageReader, chunks
from workers.datasets.base import DomainData
from workers.features import FeatureTable
from workers.metrics import score
from workers.protocols import DomainRows

if TYPE_CHECKING:
    from moe.meta_step import EpisodeModule


class Validation:
    """Scores of the adapted student over some domains.

    Args:
        data: the data set.
        domains: who is adapted and scored on what.
        reader: evaluation images.
        table: tokens of all experts for the rows that are adapted on.
        batch_size: images per forward pass.
        device: of the module.
        rank: this rank.
        world_size: number of ranks; domains are dealt out from the largest to the smallest.
    """

    def __init__(
        self,
        data: DomainData,
        domains: Sequence[DomainRows],
        reader: ImageReader,
        table: FeatureTable,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.data, self.domains, self.reader, self.table = data, list(domains), reader, table
        self.batch_size, self.device, self.world_size = batch_size, device, world_size
        self._rows = np.concatenate([domain.score for domain in self.domains])
        self._groups = np.repeat([d.domain for d in self.domains], [len(d.score) for d in self.domains])
        order = sorted(range(len(self.domains)), key=lambda i: (-len(self.domains[i].score), i))
        self._mine = order[rank::world_size]

    def __call__(self, module: EpisodeModule, step: int) -> dict[str, float]:
        """Scores, equal on all ranks. ``module`` is in evaluation mode and is not changed."""
        from moe.losses import predict

        starts = np.cumsum([0, *(len(domain.score) for domain in self.domains)])
        predictions = torch.zeros(len(self._rows), dtype=torch.float64, device=self.device)
        for number in self._mine:
            found = predict(self.data.info.task, self._adapt_and_predict(module, self.domains[number]))
            predictions[starts[number] : starts[number + 1]] = found.double()
        if self.world_size > 1:
            dist.all_reduce(predictions)
        values = predictions.cpu().numpy()
        data, rows = self.data, self._rows
        typed = values if data.info.task == "regression" else values.astype(np.int64)
        return score(
            data.info, typed, data.labels[rows], data.metadata[rows], data.fields, data.value_names, self._groups
        )

    def _adapt_and_predict(self, module: EpisodeModule, domain: DomainRows) -> torch.Tensor:
        """Outputs ``[N, K]`` for the domain's scored rows."""
        from moe.inner import inner_step, uniform_rates

        student, config = module.student, module.config
        rates = uniform_rates(student, config.inner_lr, config.adapt) if module.rates is None else module.rates()
        with torch.no_grad():
            target = module.aggregator(self.table.tokens(domain.adapt).to(self.device)).feat_BD
        images = self.reader.read(domain.adapt).to(self.device)
        fixed = {name: rate.detach() if isinstance(rate, torch.Tensor) else rate for name, rate in rates.items()}
        adapted = inner_step(student, images, target, fixed, config.inner_steps).adapted
        parts = []
        with torch.no_grad():
            for rows in chunks(domain.score, self.batch_size):
                parts.append(student.run(self.reader.read(rows).to(self.device), adapted).logits_BK)
        return torch.cat(parts)
