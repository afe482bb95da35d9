"""Few-shot episodes, out-of-distribution class subsets, and the sampler of repeated augmentation.

Sources: m2mKD (arXiv 2402.16918, public code: ``datasets.py``, ``cifar_fs.py``, ``imagenet_r.py``, ``samplers.py``),
neural attentive circuits (2210.08031), repeated augmentation (Hoffer et al., 1901.09335; DeiT, 2012.12877).

- Differs: few-shot training and validation rows are disjoint by default. ``protocol="official"`` repeats the public
  split, in which every training row is also a validation row.
- Differs: seed 0 is a seed like any other (the public code takes it for "unseeded", and then draws different classes
  for training and validation).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from moe.errors import DataError, SpecError, nearest
from workers.datasets._class_lists import class_lists

IntArray = NDArray[np.int64]
Protocol = Literal["disjoint", "official"]

BASES = ("imagenet-1k", "tiny-imagenet-200")
"""Label sets whose columns can be restricted; column c is the c-th WordNet id in sorted order."""


@dataclass(frozen=True)
class Episode:
    """One few-shot task.

    Attributes:
        classes: chosen classes in the order they were drawn.
        train_index: rows to learn from, int64.
        train_label: their labels, the rank of the class among the sorted chosen ones.
        val_index: rows to test on, int64.
        val_label: their labels.
    """

    classes: tuple[int, ...]
    train_index: IntArray
    train_label: IntArray
    val_index: IntArray
    val_label: IntArray

    @property
    def overlap(self) -> int:
        """Rows that are in both parts."""
        return len(np.intersect1d(self.train_index, self.val_index))


def fewshot_split(
    targets: Sequence[int] | NDArray[Any],
    k_way: int,
    n_shot: int,
    val_sample: int,
    seed: int,
    protocol: Protocol = "disjoint",
    num_classes: int = 100,
) -> Episode:
    """Draw a k-way n-shot task.

    Args:
        targets: class of every row, 0 to ``num_classes - 1``.
        k_way: classes.
        n_shot: training rows per class.
        val_sample: validation rows per class.
        seed: of both generators.
        protocol: ``disjoint`` takes training and validation rows from one shuffle per class; ``official`` shuffles
            twice with the same seed, and takes fewer rows where a class has too few.
        num_classes: classes to choose from.

    Raises:
        SpecError: counts below 1, more ways than classes, or an unknown protocol.
        DataError: ``disjoint`` and a chosen class has too few rows.
    """
    if min(k_way, n_shot, val_sample) < 1 or k_way > num_classes:
        raise SpecError(
            f"k_way={k_way}, n_shot={n_shot}, val_sample={val_sample} of {num_classes} classes.",
            "All are at least 1, and there are at most as many ways as classes.",
        )
    if protocol not in ("disjoint", "official"):
        raise SpecError(f"protocol is {protocol!r}.", nearest(str(protocol), ("disjoint", "official")))
    classes = tuple(random.Random(seed).sample(range(num_classes), k_way))
    rows = [np.flatnonzero(np.asarray(targets) == c).astype(np.int64) for c in classes]
    if protocol == "official":
        train, val = (_official_rows(rows, count, seed) for count in (n_shot, val_sample))
    else:
        train, val = _disjoint_rows(classes, rows, n_shot, val_sample, seed)
    rank = np.zeros(num_classes, dtype=np.int64)
    rank[sorted(classes)] = np.arange(k_way)
    labels = np.asarray(targets, dtype=np.int64)
    return Episode(classes, train, rank[labels[train]], val, rank[labels[val]])


def _official_rows(rows: Sequence[IntArray], count: int, seed: int) -> IntArray:
    # Parity: the legacy generator is seeded anew for each part, so that both parts begin with the same rows.
    generator = np.random.RandomState(seed)
    chosen = np.concatenate([generator.permutation(part)[:count] for part in rows])
    return generator.permutation(chosen)


def _disjoint_rows(
    classes: Sequence[int], rows: Sequence[IntArray], n_shot: int, val_sample: int, seed: int
) -> tuple[IntArray, IntArray]:
    for number, part in zip(classes, rows, strict=True):
        if len(part) < n_shot + val_sample:
            raise DataError(
                f"Class {number} has {len(part)} rows; {n_shot} to learn from and {val_sample} to test on are wanted.",
                "Lower n_shot or val_sample, or use more data.",
            )
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(part) for part in rows]
    train = generator.permutation(np.concatenate([part[:n_shot] for part in shuffled]))
    val = generator.permutation(np.concatenate([part[n_shot : n_shot + val_sample] for part in shuffled]))
    return train, val


def class_names(name: str) -> list[str]:
    """Sorted WordNet ids of ``imagenet-1k``, ``tiny-imagenet-200``, ``tiny-imagenet-r`` or ``imagenet-r``.

    Raises:
        SpecError: another name.
    """
    if name == "imagenet-1k":
        from timm.data import ImageNetInfo

        return sorted(ImageNetInfo("imagenet-1k").label_names())
    lists = class_lists()
    if name not in lists:
        raise SpecError(f"There is no class list named {name!r}.", nearest(name, ["imagenet-1k", *lists]))
    return list(lists[name])


def class_subset(base: str, names: Sequence[str]) -> IntArray:
    """Columns of a base set's logits that belong to some of its classes, ascending, int64.

    Column ``result[l]`` answers label l of the subset, since labels there are ranks in its own sorted ids.

    Args:
        base: one of :data:`BASES`.
        names: WordNet ids of the subset, e.g. ``class_names("imagenet-r")``.

    Raises:
        SpecError: unknown base.
        DataError: ids that the base set does not have, or an id twice.
    """
    if base not in BASES:
        raise SpecError(f"There is no base label set named {base!r}.", nearest(base, BASES))
    column = {name: index for index, name in enumerate(class_names(base))}
    unknown = sorted(set(names) - column.keys())
    if unknown or len(set(names)) != len(names):
        raise DataError(
            f"{len(unknown)} of {len(names)} class names are not in {base} ({', '.join(unknown[:3])}) or are double.",
            "Check which data set the ids are from.",
        )
    return np.array(sorted(column[name] for name in names), dtype=np.int64)


class RepeatedAugmentationSampler(Sampler[int]):
    """Every image ``repeats`` times in a row of a shuffled epoch, dealt out to the ranks, cut to one epoch's length.

    Copies of an image land on different ranks (or positions) with different augmentations. Rank r of W takes places
    ``r, r + W, ...`` of the padded list and keeps the first ``floor(n // round_to * round_to / W)``.

    Args:
        length: rows n of the data set.
        world_size: ranks W.
        rank: this rank.
        repeats: copies per image.
        round_to: an epoch is cut to a multiple of this many rows. Parity: 256; smaller sets need a smaller number.

    Raises:
        SpecError: sizes below 1, or a rank outside of the world.
        DataError: an epoch would be empty.
    """

    def __init__(self, length: int, world_size: int = 1, rank: int = 0, repeats: int = 3, round_to: int = 256) -> None:
        self.length, self.world_size, self.rank = length, world_size, rank
        self.repeats, self.round_to, self.epoch = repeats, round_to, 0
        if selected_rows(length, world_size, round_to) < 1:
            raise DataError(
                f"{length} rows give {world_size} ranks no row each when an epoch is a multiple of {round_to}.",
                f"Set round_to to at most {max(1, length)}.",
            )
        repeated_indices(0, world_size, rank, 0, repeats, round_to)

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; without it every epoch is alike."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        indices = repeated_indices(self.length, self.world_size, self.rank, self.epoch, self.repeats, self.round_to)
        return iter(indices.tolist())

    def __len__(self) -> int:
        return selected_rows(self.length, self.world_size, self.round_to)


def selected_rows(length: int, world_size: int, round_to: int = 256) -> int:
    """Rows that each rank sees in an epoch."""
    if min(world_size, round_to) < 1 or length < 0:
        raise SpecError(f"length={length}, world_size={world_size}, round_to={round_to}.", "Sizes are at least 1.")
    return (length // round_to * round_to) // world_size


def repeated_indices(
    length: int, world_size: int, rank: int, epoch: int, repeats: int = 3, round_to: int = 256
) -> IntArray:
    """Rows of one rank in one epoch, int64; arguments as :class:`RepeatedAugmentationSampler`. May be empty.

    Raises:
        SpecError: sizes below 1, or a rank outside of the world.
    """
    count = selected_rows(length, world_size, round_to)
    if not 0 <= rank < world_size or repeats < 1:
        raise SpecError(f"rank={rank} of world_size={world_size}, repeats={repeats}.", "Ranks count from 0.")
    order = torch.randperm(length, generator=torch.Generator().manual_seed(epoch)).numpy()
    copies = np.repeat(order, repeats)
    total = -(-len(copies) // world_size) * world_size
    padded = np.concatenate([copies, copies[: total - len(copies)]])
    return padded[rank::world_size][:count].astype(np.int64)
