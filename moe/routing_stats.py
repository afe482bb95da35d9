"""Routing statistics: who serves what, as plain records that a pipeline logs and plots.

:class:`RoutingStats` adds up what a layer's router decided over batches and gives a :class:`RoutingReport`: load of the
experts, entropy of gate and load, share of dropped choices, and tables domain x expert and class x expert with the
mutual information between group and expert. The tables answer the question of GMoE (arXiv 2206.04046, section 5) and
EMoE (arXiv 2310.10908, section 5): do experts specialise in domains, attributes, classes?

Entropies and mutual information are in nats. Counts are exact (int64), sums are taken in float64.

Shapes: N tokens, E experts, K choices per token, G groups (domains or classes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from moe.errors import SpecError
from moe.layers.router import Routing


@dataclass(frozen=True)
class GroupTable:
    """How often the tokens of each group went to each expert.

    Attributes:
        names: groups in the order of the rows.
        counts: choices by group and expert, ``[G][E]``, dropped ones included (what the router wanted).
        shares: the same divided by the sum of each row; zeros for a group without choices.
        mutual_information: between group and expert, in nats; 0 when they are independent.
        normalised_information: the same divided by the smaller of both entropies: 1 when the one decides the other,
            0 when either of them is constant.
    """

    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    mutual_information: float
    normalised_information: float


@dataclass(frozen=True)
class RoutingReport:
    """What the router of one layer did, over all batches that were added.

    Attributes:
        tokens: N over all batches.
        top_k: choices per token.
        chosen: choices by expert, dropped ones included.
        kept: choices by expert that were computed.
        load: share of each expert in the kept choices; zeros when there are none.
        max_load: largest load divided by the load of an even share, 1 to E; 0 when there are no choices.
        load_entropy: entropy of the load, in nats.
        load_balance: the same divided by ln E, 0 to 1; 1 for a single expert.
        gate_entropy: mean entropy of the gate's probabilities by token, in nats; None when none were given.
        drop_rate: share of the choices that found no room.
        lost_tokens: share of the tokens whose choices were all dropped.
        mean_weight: mean factor of each expert's kept choices; 0 for an expert without any.
        balance: mean unweighted balance loss over batches.
        unused: numbers of the experts that nobody chose.
        by_domain: table domain x expert, or None.
        by_class: table class x expert, or None.
    """

    tokens: int
    top_k: int
    chosen: tuple[int, ...]
    kept: tuple[int, ...]
    load: tuple[float, ...]
    max_load: float
    load_entropy: float
    load_balance: float
    gate_entropy: float | None
    drop_rate: float
    lost_tokens: float
    mean_weight: tuple[float, ...]
    balance: float
    unused: tuple[int, ...]
    by_domain: GroupTable | None = None
    by_class: GroupTable | None = None

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(asdict(self), allow_nan=False)

    def scalars(self) -> dict[str, float]:
        """The figures that a tracker logs, by name."""
        names = ("max_load", "load_entropy", "load_balance", "drop_rate", "lost_tokens", "balance")
        values: dict[str, float] = {name: getattr(self, name) for name in names}
        if self.gate_entropy is not None:
            values["gate_entropy"] = self.gate_entropy
        for name, table in (("domain", self.by_domain), ("class", self.by_class)):
            if table is not None:
                values[f"{name}_information"] = table.mutual_information
        return values


class RoutingStats:
    """Adds up the decisions of one layer.

    Args:
        num_experts: E.
        domains: names of the domains, when ``domain`` numbers are going to be given.
        classes: names of the classes, when class numbers are going to be given.

    Raises:
        SpecError: no experts.
    """

    def __init__(self, num_experts: int, domains: Sequence[str] = (), classes: Sequence[str] = ()) -> None:
        if num_experts < 1:
            raise SpecError(f"num_experts is {num_experts}.", "There must be at least one.")
        self.num_experts, self.domains, self.classes = num_experts, tuple(domains), tuple(classes)
        self.top_k = self.tokens = self.batches = self.lost = self.scored = 0
        self.chosen_E = torch.zeros(num_experts, dtype=torch.int64)
        self.kept_E = torch.zeros(num_experts, dtype=torch.int64)
        self.weight_E = torch.zeros(num_experts, dtype=torch.float64)
        self.entropy = self.balance = 0.0
        self.domain_GE = torch.zeros(len(self.domains), num_experts, dtype=torch.int64)
        self.class_GE = torch.zeros(len(self.classes), num_experts, dtype=torch.int64)

    @torch.no_grad()
    def add(
        self,
        routing: Routing,
        scores_NE: Tensor | None = None,
        domain: Tensor | None = None,
        label: Tensor | None = None,
    ) -> None:
        """Take one batch.

        Args:
            routing: the decision for N tokens.
            scores_NE: the gate's probabilities, for the entropy.
            domain: int64 domain number of each token ``[N]``, or of each image when N is a multiple of the images (the
                tokens of an image follow one another, as a vision transformer lays them out).
            label: the same for classes.

        Raises:
            SpecError: sizes that do not fit, or a number outside the named groups.
        """
        experts_NK, kept_NK = routing.experts_NK.cpu(), routing.kept_NK.cpu()
        tokens, top_k = experts_NK.shape
        if self.batches and top_k != self.top_k:
            raise SpecError(f"A batch has {top_k} choices per token, the ones before {self.top_k}.", "One layer each.")
        if tokens and int(experts_NK.max()) >= self.num_experts:
            raise SpecError(f"Expert {int(experts_NK.max())} was chosen among {self.num_experts}.", "Wrong layer?")
        rows = [_by_token(name, value, tokens, groups) for name, value, groups in (
            ("domain", domain, self.domains), ("label", label, self.classes))]  # fmt: skip
        chosen, kept = experts_NK.reshape(-1), kept_NK.reshape(-1)
        self.top_k, self.tokens, self.batches = top_k, self.tokens + tokens, self.batches + 1
        self.lost += int((~kept_NK).all(dim=1).sum())
        self.chosen_E += torch.bincount(chosen, minlength=self.num_experts)
        self.kept_E += torch.bincount(chosen[kept], minlength=self.num_experts)
        self.weight_E.index_add_(0, chosen[kept], routing.weights_NK.detach().cpu().double().reshape(-1)[kept])
        self.balance += float(routing.balance)
        if scores_NE is not None:
            self.entropy += float(torch.special.entr(scores_NE.detach().double()).sum())
            self.scored += tokens
        for table_GE, group_N in zip((self.domain_GE, self.class_GE), rows, strict=True):
            if group_N is not None:
                cell = group_N.repeat_interleave(top_k) * self.num_experts + chosen
                table_GE += torch.bincount(cell, minlength=table_GE.numel()).view_as(table_GE)

    def merge(self, other: RoutingStats) -> None:
        """Take what another process counted for the same layer.

        Raises:
            SpecError: other experts, groups or choices per token.
        """
        mine, theirs = ((s.num_experts, s.domains, s.classes) for s in (self, other))
        if mine != theirs or (self.batches and other.batches and self.top_k != other.top_k):
            raise SpecError("Statistics of different layers cannot be added.", "Merge those of one layer at a time.")
        self.top_k = self.top_k or other.top_k
        for name in ("tokens", "batches", "lost", "scored", "entropy", "balance"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("chosen_E", "kept_E", "weight_E", "domain_GE", "class_GE"):
            getattr(self, name).add_(getattr(other, name))

    def report(self) -> RoutingReport:
        """The record of everything that was added so far."""
        choices, kept = int(self.chosen_E.sum()), int(self.kept_E.sum())
        load_E = self.kept_E.double() / max(kept, 1)
        entropy = float(torch.special.entr(load_E).sum())
        return RoutingReport(
            tokens=self.tokens,
            top_k=self.top_k,
            chosen=tuple(self.chosen_E.tolist()),
            kept=tuple(self.kept_E.tolist()),
            load=tuple(load_E.tolist()),
            max_load=float(load_E.max()) * self.num_experts,
            load_entropy=entropy,
            load_balance=entropy / math.log(self.num_experts) if self.num_experts > 1 else 1.0,
            gate_entropy=self.entropy / self.scored if self.scored else None,
            drop_rate=(choices - kept) / max(choices, 1),
            lost_tokens=self.lost / max(self.tokens, 1),
            mean_weight=tuple((self.weight_E / self.kept_E.clamp_min(1)).tolist()),
            balance=self.balance / max(self.batches, 1),
            unused=tuple(e for e, n in enumerate(self.chosen_E.tolist()) if not n),
            by_domain=group_table(self.domain_GE, self.domains) if self.domains else None,
            by_class=group_table(self.class_GE, self.classes) if self.classes else None,
        )


def group_table(counts_GE: Tensor, names: Sequence[str]) -> GroupTable:
    """Shares and mutual information of a table of counts.

    Args:
        counts_GE: int64 choices by group and expert.
        names: one per row.

    Raises:
        SpecError: another number of names than rows.
    """
    if len(names) != counts_GE.shape[0]:
        raise SpecError(f"{len(names)} names for {counts_GE.shape[0]} groups.", "Give one name per group.")
    shares_GE = counts_GE.double() / counts_GE.sum(dim=1, keepdim=True).clamp_min(1)
    joint_GE = counts_GE.double() / counts_GE.sum().clamp_min(1)
    group, expert = (float(torch.special.entr(joint_GE.sum(dim=d)).sum()) for d in (1, 0))
    # Rounding may leave a tiny negative number where the two are independent.
    shared = max(0.0, group + expert - float(torch.special.entr(joint_GE).sum()))
    least = min(group, expert)
    return GroupTable(
        names=tuple(names),
        counts=tuple(tuple(row) for row in counts_GE.tolist()),
        shares=tuple(tuple(row) for row in shares_GE.tolist()),
        mutual_information=shared,
        normalised_information=min(1.0, shared / least) if least > 1e-12 else 0.0,
    )


def _by_token(name: str, value: Tensor | None, tokens: int, groups: tuple[str, ...]) -> Tensor | None:
    """The group number of each token, checked."""
    if value is None:
        return None
    if not groups:
        raise SpecError(f"{name} numbers were given, but no names.", "Name the groups when making RoutingStats.")
    rows = value.reshape(-1).cpu()
    if (rows.numel() == 0) != (tokens == 0) or (rows.numel() and tokens % rows.numel()):
        raise SpecError(f"{rows.numel()} {name} numbers for {tokens} tokens.", "Give one per token or one per image.")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(groups):
        raise SpecError(
            f"{name} numbers run from {int(rows.min())} to {int(rows.max())}.", f"Expected 0..{len(groups) - 1}."
        )
    return rows.repeat_interleave(tokens // rows.numel()) if rows.numel() else rows
