"""Episodes for meta-training: one domain, support and query images, cached expert tokens; a function of (seed, number).

A step has ``tasks_per_step`` episodes. Rank r of W takes numbers r, r + W, ... of them, so the episodes of a step (and,
up to the order of additions, its gradient) do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe.errors import CheckpointError
from workers.batches import ImageReader
from workers.datasets.base import DomainData, IntArray
from workers.distill_settings import DistillSettings
from workers.engines.base import Weighted
from workers.features import FeatureTable
from workers.loop import mix
from workers.sampling import EpisodeSampler, group_index

if TYPE_CHECKING:
    from moe.meta_step import Episode


class Episodes:
    """Makes the micro-batches of a rank.

    Args:
        data: the data set.
        rows: training rows.
        reader: training images.
        table: tokens of all experts for ``rows``.
        owner: domain id (``info.domain_field``) -> expert that was trained on it.
        settings: sizes.
        seed: of domains, rows and transform variants.
        device: where the episodes go.

    Raises:
        CheckpointError: a training domain has no owner, or an owner is no expert of ``table``.
    """

    def __init__(
        self,
        data: DomainData,
        rows: IntArray,
        reader: ImageReader,
        table: FeatureTable,
        owner: Mapping[int, int],
        settings: DistillSettings,
        seed: int,
        device: torch.device,
    ) -> None:
        self.data, self.rows, self.reader, self.table, self.settings = data, rows, reader, table, settings
        self.seed, self.device = seed, device
        self._owners = _owners(data, rows, owner, table.num_experts, settings)
        self._labels = torch.from_numpy(np.ascontiguousarray(data.labels))
        group, _ = group_index(data.metadata[rows], data.fields, data.info.group_fields)
        size = settings.support + settings.query
        self._sampler = EpisodeSampler(group, size, mix(seed, 1), settings.episodes, settings.support)
        self.steps_per_epoch = max(1, self._sampler.steps_per_epoch // settings.tasks_per_step)

    def of_step(self, step: int, rank: int, world_size: int, pad: bool) -> list[Weighted]:
        """This rank's episodes of a step, each with its share 1 / tasks_per_step of the loss.

        Args:
            step: update number from 0.
            rank: this rank.
            world_size: number of ranks.
            pad: repeat an episode with weight 0 where this rank has fewer than others, so that collective calls inside
                the forward pass match.
        """
        tasks = self.settings.tasks_per_step
        mine = list(range(rank, tasks, world_size))
        items = [Weighted(self.episode(step * tasks + task), 1.0 / tasks) for task in mine]
        if not mine or (pad and len(mine) < -(-tasks // world_size)):
            items.append(Weighted(self.episode(step * tasks + rank % tasks), 0.0))
        return items

    def episode(self, number: int) -> Episode:
        """Episode ``number`` of the run, support rows first."""
        from moe.meta_step import Episode

        places = self._sampler.batch(number)
        rows, size = self.rows[places], self.settings.support
        variants = self.reader.draw(len(rows), np.random.default_rng((mix(self.seed, 2), number)))
        images = self.reader.read(rows, variants)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        tokens = self.table.tokens(rows[:size], None if variants is None else variants[:size])
        made = Episode(
            support=images[:size],
            query=images[size:],
            query_labels=self._labels[torch.from_numpy(rows[size:])],
            tokens_SED=tokens,
            owners_S=torch.from_numpy(self._owners[places[:size]]),
        )
        return made.to(self.device)


def _owners(
    data: DomainData, rows: IntArray, owner: Mapping[int, int], num_experts: int, settings: DistillSettings
) -> IntArray:
    """Expert that owns each of ``rows``; zeros where nothing is excluded."""
    if settings.meta.exclusion == "none":
        return np.zeros(len(rows), dtype=np.int64)
    domains = data.column(data.info.domain_field, rows)
    strangers = sorted(set(domains.tolist()) - set(owner))
    if strangers or max(owner.values(), default=-1) >= num_experts:
        raise CheckpointError(
            f"The domain split does not fit: {len(strangers)} training domains have no expert, as {strangers[:3]}, "
            f"and owners reach to {max(owner.values(), default=-1)} of {num_experts} experts.",
            "Experts, features and distillation must come from the same split: submit the pipeline again.",
        )
    return np.array([owner[int(domain)] for domain in domains], dtype=np.int64)
