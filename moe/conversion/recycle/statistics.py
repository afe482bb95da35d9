"""Activation statistics in one streamed pass: an accumulator that updates, merges and finalises.

Which channels and neurons matter is judged by their activations over many images: sums of magnitudes (``L1``), root
sums of squares (``L2``), how often they are active (``act_patrn``) and how often two of them are active together
(``co_act``). The accumulator's size does not depend on the number of images, a shard of the images per worker merges
to the same numbers, and its state is a dictionary of tensors.

Source: MoE Jetpack (arXiv 2406.04801), section 3.2. Both generations of its public tool are reproduced by
:class:`~moe.conversion.recycle.options.StatisticsOptions`.

Differs: sums are kept in float64 and one pass serves all places and metrics; the public tool passes over the images
once per place, keeps every batch's d x d matrix and sums in float32.

Shapes: M positions (samples x tokens) of a batch, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe.conversion.recycle.options import StatisticsOptions
from moe.conversion.recycle.record import StatisticsRecord
from moe.errors import DataError, SpecError

CHUNK_VALUES = 1 << 22
"""Activations that are widened to float64 at a time: bounds the scratch memory of an update to some 100 MB."""

OPTIONS_KEY = "options"

Site = tuple[str, int]
"""A place (``mlp_act``, ``attn_proj``, ``norm2``, ...) and a layer."""


@dataclass
class _Sums:
    """Sums of one site. ``last`` belongs to the highest group of batches seen, ``lower`` to all groups before it."""

    lower: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    lower_batches: int = 0
    last_batches: int = 0
    group: int = 0
    positions: int = 0

    def enter(self, group: int) -> bool:
        """Move on to ``group`` if it is higher; whether sums of ``group`` belong to ``last`` now."""
        if group > self.group:
            _add(self.lower, self.last)
            self.last = {}
            self.lower_batches += self.last_batches
            self.last_batches, self.group = 0, group
        return group == self.group

    def add(self, sums: Mapping[str, Tensor], batches: int, group: int) -> None:
        """Add sums over ``batches`` batches of one group."""
        if self.enter(group):
            _add(self.last, sums)
            self.last_batches += batches
        else:
            _add(self.lower, sums)
            self.lower_batches += batches


class StatisticsAccumulator:
    """Streams activations into statistics.

    Every batch of the whole pass has a number, 0, 1, 2, ... A single process need not give it; workers that share a
    pass give the global number of each of their batches (any assignment works) and merge at the end. Groups of batches
    are only averaged at the end, so any order of updates and merges gives the same result up to float64 rounding
    (counts: exactly).
    """

    def __init__(self, options: StatisticsOptions | None = None) -> None:
        self.options = options or StatisticsOptions()
        self._sites: dict[Site, _Sums] = {}
        self._next: dict[Site, int] = {}

    def update(self, activations: Mapping[Site, Tensor], batch: int | None = None) -> None:
        """Add one batch of several sites; see :meth:`add`."""
        for (place, layer), activation in activations.items():
            self.add(place, layer, activation, batch)

    @torch.no_grad()
    def add(self, place: str, layer: int, activation: Tensor, batch: int | None = None) -> None:
        """Add one batch of one site.

        Args:
            place: name of the place, without a dot.
            layer: number of the layer.
            activation: ``[..., d]``, any float type; all axes but the last are positions.
            batch: global number of the batch; None counts the calls for this site.

        Raises:
            DataError: non-finite values, no positions, or another width than before.
        """
        site = (place, layer)
        number = self._next.get(site, 0) if batch is None else batch
        if number < 0 or not place or "." in place:
            raise SpecError(f"Statistics of place {place!r}, batch {number}: a place has no dot, a batch is 0 or more.")
        if activation.ndim == 0 or activation.numel() == 0:
            raise DataError(f"{place}, layer {layer}: activations of shape {tuple(activation.shape)} hold no values.")
        x_Md = activation.detach().reshape(-1, activation.shape[-1])
        sums = self._reduce(x_Md, f"{place}, layer {layer}, batch {number}")
        own = self._sites.setdefault(site, _Sums())
        _same_width(own, sums, f"{place}, layer {layer}")
        group = number // self.options.group if self.options.averaging == "groups" else 0
        own.add(sums, 1, group)
        own.positions += x_Md.shape[0]
        self._next[site] = number + 1

    def merge(self, other: StatisticsAccumulator) -> None:
        """Add everything that ``other`` (another shard of the same pass) has seen.

        Raises:
            SpecError: its options differ.
            DataError: its widths differ.
        """
        if other.options != self.options:
            raise SpecError(f"Statistics with options {other.options} cannot be merged into ones with {self.options}.")
        for site, theirs in other._sites.items():
            own = self._sites.setdefault(site, _Sums())
            _same_width(own, theirs.last, f"{site[0]}, layer {site[1]}")
            own.enter(theirs.group)
            own.add(theirs.last, theirs.last_batches, theirs.group)
            _add(own.lower, theirs.lower)
            own.lower_batches += theirs.lower_batches
            own.positions += theirs.positions
            self._next[site] = max(self._next.get(site, 0), other._next[site])

    def finalise(self, dtype: torch.dtype = torch.float32) -> StatisticsRecord:
        """The statistics so far; the accumulator can go on.

        Raises:
            DataError: batches are missing (a shard was not merged, or merged twice).
        """
        values: dict[tuple[str, str], dict[int, Tensor]] = {}
        for (place, layer), sums in sorted(self._sites.items()):
            self._check_complete(sums, f"{place}, layer {layer}")
            for metric in self.options.metrics:
                value = self._average(sums, metric).to(dtype)
                values.setdefault((place, metric), {})[layer] = value
        return StatisticsRecord(values)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, options included: what a worker sends or a checkpoint keeps."""
        text = self.options.model_dump_json().encode()
        state = {OPTIONS_KEY: torch.tensor(list(text), dtype=torch.uint8)}
        for (place, layer), sums in self._sites.items():
            name = f"{place}.{layer}"
            counts = (sums.lower_batches, sums.last_batches, sums.group, sums.positions, self._next[place, layer])
            state[f"{name}.counts"] = torch.tensor(counts, dtype=torch.int64)
            state |= {f"{name}.lower.{metric}": value.clone() for metric, value in sums.lower.items()}
            state |= {f"{name}.last.{metric}": value.clone() for metric, value in sums.last.items()}
        return state

    @staticmethod
    def from_state(state: Mapping[str, Tensor]) -> StatisticsAccumulator:
        """Inverse of :meth:`state_dict`.

        Raises:
            DataError: it is not such a state.
        """
        if OPTIONS_KEY not in state:
            raise DataError(f"This is no state of activation statistics: it has no tensor {OPTIONS_KEY!r}.")
        options = StatisticsOptions.model_validate_json(bytes(state[OPTIONS_KEY].tolist()))
        made = StatisticsAccumulator(options)
        for name in state:
            if not name.endswith(".counts"):
                continue
            place, layer = name.split(".")[:2]
            counts = [int(number) for number in state[name]]
            prefixes = [f"{place}.{layer}.{part}." for part in ("lower", "last")]
            lower, last = (
                {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}
                for prefix in prefixes
            )
            site = (place, int(layer))
            made._sites[site] = _Sums(lower, last, *counts[:4])
            made._next[site] = counts[4]
        return made

    def _reduce(self, x_Md: Tensor, what: str) -> dict[str, Tensor]:
        """Sums of one batch in float64."""
        metrics, options = self.options.metrics, self.options
        width = x_Md.shape[1]
        sums: dict[str, Tensor] = {
            m: x_Md.new_zeros((width, width) if m == "co_act" else (width,), dtype=torch.float64) for m in metrics
        }
        magnitude = x_Md.new_zeros(width, dtype=torch.float64)
        threshold = _threshold(x_Md, options) if {"act_patrn", "co_act"} & set(metrics) else 0.0
        for chunk_Md in torch.split(x_Md, max(1, CHUNK_VALUES // width)):
            wide_Md = chunk_Md.to(torch.float64)
            magnitude += wide_Md.abs().sum(dim=0)
            if "L2" in sums:
                sums["L2"] += wide_Md.square().sum(dim=0)
            active_Md = chunk_Md > threshold
            if "act_patrn" in sums:
                sums["act_patrn"] += active_Md.sum(dim=0)
            if "co_act" in sums:
                flags_Md = active_Md.to(torch.float32)  # counts of a chunk stay far below 2^24: exact
                sums["co_act"] += flags_Md.t() @ flags_Md
        bad = ~magnitude.isfinite()
        if bad.any():
            raise DataError(
                f"{what}: {int(bad.sum())} of {width} channels hold non-finite activations, first channel "
                f"{int(bad.nonzero()[0])}.",
                "Check the weights and the images, or run the predecessor in float32.",
            )
        if "L1" in sums:
            sums["L1"] = magnitude
        if options.averaging != "positions" and "L2" in sums:
            sums["L2"] = sums["L2"].sqrt()
        if options.averaging == "batch_sum":
            sums = {metric: value / x_Md.shape[0] for metric, value in sums.items()}
        return sums

    def _average(self, sums: _Sums, metric: str) -> Tensor:
        """The finished metric in float64."""
        total = sums.last[metric]
        if self.options.averaging == "groups":
            mean = total / sums.last_batches
            if sums.lower:
                mean = (mean + sums.lower[metric] / self.options.group) / (sums.group + 1)
            return mean
        if self.options.averaging == "positions":
            mean = total / sums.positions
            return mean.sqrt() if metric == "L2" else mean
        return total.clone().fill_diagonal_(0) if metric == "co_act" else total.clone()

    def _check_complete(self, sums: _Sums, what: str) -> None:
        expected = sums.group * self.options.group
        if self.options.averaging == "groups" and sums.lower_batches != expected:
            raise DataError(
                f"{what}: {sums.lower_batches} batches before the last group of {self.options.group} instead of "
                f"{expected}.",
                "Merge every shard exactly once, and number the batches of the whole pass 0, 1, 2, ...",
            )


def merge_all(parts: Iterable[StatisticsAccumulator]) -> StatisticsAccumulator:
    """One accumulator of several shards.

    Raises:
        SpecError: there is no shard, or their options differ.
    """
    shards = list(parts)
    if not shards:
        raise SpecError("There are no statistics to merge.", "Give at least one shard.")
    merged = StatisticsAccumulator(shards[0].options)
    for shard in shards:
        merged.merge(shard)
    return merged


def _threshold(x_Md: Tensor, options: StatisticsOptions) -> float:
    """What an activation must exceed to count as active."""
    if options.threshold == "fixed":
        return options.value
    values = x_Md.to(torch.float32 if x_Md.dtype in (torch.float16, torch.bfloat16) else x_Md.dtype).cpu().numpy()
    if options.threshold == "percentile":
        return float(np.percentile(values, options.percentile))
    return float(values.mean(dtype=np.float64) + values.std(dtype=np.float64))


def _add(into: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for metric, value in sums.items():
        into[metric] = into[metric].add_(value) if metric in into else value.clone()


def _same_width(own: _Sums, sums: Mapping[str, Tensor], what: str) -> None:
    for metric, value in sums.items():
        before = own.last.get(metric, own.lower.get(metric))
        if before is not None and before.shape != value.shape:
            raise DataError(
                f"{what}: {metric} has shape {tuple(value.shape)}, but {tuple(before.shape)} before.",
                "Do not mix statistics of different models.",
            )
