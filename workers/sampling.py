"""Which rows go where: the split of domains over experts, training batches, episodes and evaluation batches.

Everything is a function of its arguments: a sampler asked for step ``n`` gives the same rows whether or not it was
asked for the steps before, so a resumed run continues exactly. Source: Meta-DMoE (arXiv 2210.03885), section 4 and the
public code, whose random draws ``domain_groups`` and ``group_batches`` reproduce to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError, SpecError, nearest

IntArray = NDArray[np.int64]
Parity = Literal["official", "disjoint"]


@dataclass(frozen=True)
class DomainSplit:
    """Training domains by expert.

    Attributes:
        groups: per expert its domain ids, in the shuffled order; empty for experts beyond the number of domains.
        owner: domain id -> index of its expert.
    """

    groups: list[list[int]]
    owner: dict[int, int]


def domain_groups(
    domain_column: NDArray[Any], num_experts: int, seed: int, strategy: Literal["random", "ordered"] = "random"
) -> DomainSplit:
    """Cut the distinct domains into ``num_experts`` nearly equal random groups.

    Parity: the domains start in the iteration order of a CPython set, are shuffled by Python's ``random`` seeded with
    ``seed``, and domain ``i`` of ``n`` goes to expert ``i // (n / E)`` with the float division of the public code (for
    n=10, E=6 this differs from ``i * E // n``).

    Args:
        domain_column: ``[N]`` domain id of every training row.
        num_experts: number of groups E, at least 1. With more experts than domains some groups stay empty.
        seed: the run's seed.
        strategy: ``random`` as published; ``ordered`` keeps ascending ids together. Differs: not in the paper.

    Raises:
        SpecError: ``num_experts`` below 1.
        DataError: no rows.
    """
    if num_experts < 1:
        raise SpecError(f"num_experts is {num_experts}.", "Use at least one expert.")
    domains = list(set(np.asarray(domain_column).astype(np.int64).tolist()))
    if not domains:
        raise DataError("The training split has no rows, so there are no domains to divide.", "Check the split.")
    if strategy == "ordered":
        domains.sort()
    else:
        random.Random(seed).shuffle(domains)
    width = len(domains) / num_experts
    owner = {domain: int(position // width) for position, domain in enumerate(domains)}
    groups: list[list[int]] = [[] for _ in range(num_experts)]
    for domain in domains:
        groups[owner[domain]].append(domain)
    return DomainSplit(groups, owner)


def group_index(
    metadata: NDArray[Any],
    fields: Sequence[str],
    groupby: Sequence[str],
    cardinality: Mapping[str, int] | None = None,
) -> tuple[IntArray, int]:
    """Number the combinations of some metadata columns, as WILDS' combinatorial grouper does.

    The columns are taken in their own order, whatever the order of ``groupby``; the first varies fastest.

    Args:
        metadata: ``[N, C]`` non-negative values.
        fields: names of the C columns.
        groupby: names of the columns to combine.
        cardinality: number of values per field; by default the largest value present plus one.

    Returns:
        Group id per row, int64 ``[N]``, and the number of possible groups.

    Raises:
        SpecError: a name in ``groupby`` is not a column.
        DataError: negative values, or a value beyond the given cardinality.
    """
    for name in groupby:
        if name not in fields:
            raise SpecError(f"There is no metadata column named {name!r}.", nearest(name, fields))
    group = np.zeros(len(metadata), dtype=np.int64)
    stride = 1
    for index in [i for i, name in enumerate(fields) if name in groupby]:
        column = np.asarray(metadata)[:, index].astype(np.int64)
        highest = int(column.max(initial=-1))
        size = highest + 1 if cardinality is None else cardinality[fields[index]]
        if column.min(initial=0) < 0 or highest >= size:
            raise DataError(
                f"Metadata column {fields[index]!r} has values from {column.min()} to {highest}.",
                f"Values to group by must be between 0 and {size - 1}.",
            )
        group += column * stride
        stride *= size
    return group, stride


def group_batches(
    group: NDArray[Any],
    batch_size: int,
    seed: int,
    groups_per_batch: int = 1,
    uniform: bool = True,
    distinct: bool = True,
    epochs: int = 1,
) -> IntArray:
    """Training batches with a fixed number of domains each, drawn as the public code's loader draws them.

    Parity: one legacy NumPy generator (``RandomState``) for all epochs; rows of a domain come without replacement only
    if the domain has more rows than are wanted. Use :class:`EpisodeSampler` for training: it can resume.

    Args:
        group: ``[N]`` domain id per row.
        batch_size: rows per batch, a multiple of ``groups_per_batch``.
        seed: of the generator.
        groups_per_batch: domains per batch.
        uniform: draw domains with equal probability, otherwise in proportion to their rows.
        distinct: domains of one batch differ.
        epochs: passes of ``N // batch_size`` batches.

    Returns:
        Row indices, int64 ``[epochs * (N // batch_size), batch_size]``.

    Raises:
        SpecError: ``batch_size`` is no multiple of ``groups_per_batch``.
        DataError: fewer domains than a batch of distinct ones needs.
    """
    if groups_per_batch < 1 or batch_size % groups_per_batch:
        raise SpecError(
            f"A batch of {batch_size} cannot hold {groups_per_batch} domains of equal size.",
            "Make batch_size a multiple of groups_per_batch.",
        )
    rows_by_group = _rows_by_group(np.asarray(group))
    if distinct and groups_per_batch > len(rows_by_group):
        raise DataError(
            f"A batch wants {groups_per_batch} different domains and there are {len(rows_by_group)}.",
            "Lower groups_per_batch.",
        )
    generator = np.random.RandomState(seed)
    shares = None if uniform else np.array([len(rows) for rows in rows_by_group]) / len(group)
    wanted = batch_size // groups_per_batch
    batches = np.empty((epochs * (len(group) // batch_size), batch_size), dtype=np.int64)
    for batch in batches:
        chosen = generator.choice(len(rows_by_group), size=groups_per_batch, replace=not distinct, p=shares)
        parts = [
            generator.choice(rows_by_group[index], size=wanted, replace=len(rows_by_group[index]) <= wanted)
            for index in chosen
        ]
        batch[:] = np.concatenate(parts)
    return batches


class EpisodeSampler:
    """Batches of one domain each for meta-training; the first ``support`` rows adapt, the others are the query.

    A domain is drawn with equal probability whatever its size, then its rows without replacement.
    ``parity="official"``: a domain with at most ``batch_size`` rows is sampled with replacement, so that support and
    query may share images, as in the public code. ``parity="disjoint"`` (Differs: no leak from support to query): such
    a domain is divided between support and query in their proportion, and each side is filled by repetition; domains
    of one row are left out.

    Args:
        group: ``[N]`` domain id per row.
        batch_size: rows per episode.
        seed: seed of this sampler; the episode of a step depends on nothing but (seed, step).
        parity: see above.
        support: rows of the support set, needed for ``disjoint``.
    """

    def __init__(
        self, group: NDArray[Any], batch_size: int, seed: int, parity: Parity = "official", support: int | None = None
    ) -> None:
        if parity not in ("official", "disjoint"):
            raise SpecError(f"parity is {parity!r}.", nearest(str(parity), ("official", "disjoint")))
        if batch_size < 1:
            raise SpecError(f"batch_size is {batch_size}.", "An episode needs at least one row.")
        if parity == "disjoint" and not (support and 0 < support < batch_size):
            raise SpecError(
                f"parity 'disjoint' has {support} support rows of {batch_size}.",
                "Give a support size between 1 and batch_size - 1.",
            )
        self.batch_size, self.seed, self.parity, self.support = batch_size, seed, parity, support or 0
        self.domains, self._rows = _split_groups(np.asarray(group), smallest=2 if parity == "disjoint" else 1)
        if not self._rows:
            raise DataError("There is no domain to draw episodes from.", "Check the split and the domain columns.")
        self.steps_per_epoch = max(1, len(group) // batch_size)

    def domain(self, step: int) -> int:
        """Domain id of the episode of ``step``."""
        return self.domains[int(self._generator(step).integers(len(self._rows)))]

    def batch(self, step: int) -> IntArray:
        """Row indices of the episode of ``step``, int64 ``[batch_size]``, support rows first."""
        generator = self._generator(step)
        rows = self._rows[int(generator.integers(len(self._rows)))]
        if len(rows) > self.batch_size:
            return generator.choice(rows, size=self.batch_size, replace=False)
        if self.parity == "official":
            return generator.choice(rows, size=self.batch_size, replace=True)
        shuffled = generator.permutation(rows)
        share = round(len(rows) * self.support / self.batch_size)
        cut = min(max(share, 1), len(rows) - 1)
        query = self.batch_size - self.support
        return np.concatenate([np.resize(shuffled[:cut], self.support), np.resize(shuffled[cut:], query)])

    def _generator(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))


class EpochSampler:
    """Shuffled passes over ``rows``; every row once per epoch, the last batch of an epoch may be short.

    Args:
        rows: row indices.
        batch_size: rows per batch.
        seed: seed of this sampler; the batch of a step depends on nothing but (seed, step).
        drop_last: leave the short last batch out (kept when it is the only one).
    """

    def __init__(self, rows: IntArray, batch_size: int, seed: int, drop_last: bool = False) -> None:
        if batch_size < 1:
            raise SpecError(f"batch_size is {batch_size}.", "A batch needs at least one row.")
        if not len(rows):
            raise DataError("There are no rows to train on.", "Check the split and the domain group.")
        self.rows, self.batch_size, self.seed = np.asarray(rows, dtype=np.int64), batch_size, seed
        full, rest = divmod(len(rows), batch_size)
        self.steps_per_epoch = max(1, full) if drop_last else full + (rest > 0)
        self._order: tuple[int, IntArray] | None = None

    def batch(self, step: int) -> IntArray:
        """Row indices of ``step`` (counted over all epochs), int64 ``[<= batch_size]``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows))
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]


class DomainSampler:
    """Batches in which every domain is equally likely, whatever its size; rows within a domain too, with replacement.

    Args:
        rows: row indices.
        group: ``[len(rows)]`` domain id of each of them.
        batch_size: rows per batch.
        seed: seed of this sampler; the batch of a step depends on nothing but (seed, step).
    """

    def __init__(self, rows: IntArray, group: NDArray[Any], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise SpecError(f"batch_size is {batch_size}.", "A batch needs at least one row.")
        if not len(rows):
            raise DataError("There are no rows to train on.", "Check the split and the domain group.")
        self.batch_size, self.seed = batch_size, seed
        self._rows = [np.asarray(rows, dtype=np.int64)[part] for part in _rows_by_group(np.asarray(group))]
        self._sizes = np.array([len(part) for part in self._rows])
        self.steps_per_epoch = -(-len(rows) // batch_size)

    def batch(self, step: int) -> IntArray:
        """Row indices of ``step``, int64 ``[batch_size]``."""
        generator = np.random.default_rng((self.seed, step))
        domains = generator.integers(len(self._rows), size=self.batch_size)
        places = generator.integers(self._sizes[domains])
        return np.array([self._rows[d][p] for d, p in zip(domains, places, strict=True)], dtype=np.int64)


def domain_batches(group: NDArray[Any], batch_size: int) -> list[tuple[int, list[IntArray]]]:
    """Evaluation batches: the rows of each domain, ascending, cut into consecutive batches.

    Parity: domains in the iteration order of a CPython set of their ids. Scores do not depend on the order.

    Args:
        group: ``[N]`` domain id per row.
        batch_size: rows per batch; the last one of a domain may be short, even 1.

    Returns:
        (domain id, its batches of positions in ``group``) for every domain present.
    """
    if batch_size < 1:
        raise SpecError(f"batch_size is {batch_size}.", "A batch needs at least one row.")
    domains, rows = _split_groups(np.asarray(group))
    by_domain = dict(zip(domains, rows, strict=True))
    order = set(np.asarray(group).astype(np.int64).tolist())
    return [
        (domain, [by_domain[domain][i : i + batch_size] for i in range(0, len(by_domain[domain]), batch_size)])
        for domain in order
    ]


def _rows_by_group(group: NDArray[Any]) -> list[IntArray]:
    """Ascending rows of each distinct group, groups ascending."""
    return _split_groups(group)[1]


def _split_groups(group: NDArray[Any], smallest: int = 1) -> tuple[list[int], list[IntArray]]:
    values, counts = np.unique(group, return_counts=True)
    order = np.argsort(group, kind="stable").astype(np.int64)
    rows = np.split(order, np.cumsum(counts)[:-1]) if len(values) else []
    kept = [(int(value), part) for value, part in zip(values, rows, strict=True) if len(part) >= smallest]
    return [value for value, _ in kept], [part for _, part in kept]
