"""The catalogue of domain states: on disk for all processes and restarts, in memory as far as the bytes allow.

Registered is not resident. Every state is on disk when it is published (:mod:`serve.state_files`), so evicting it from
memory costs nothing, and reading it again gives the same bits: the digest is checked.

A state of kind ``features`` is kept as the tensors it was computed from (a fraction of a full delta) and computed again
when it is needed. It is only kept so if that gives the same bits; otherwise the delta itself is stored.
"""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moe.errors import CheckpointError, NotFoundError
from serve.delta import Delta
from serve.errors import StaleState
from serve.records import Facts, StateRecord, check_state_name, no_such_state
from serve.resident import Resident, ResidentStats
from serve.state_files import Head, StateFiles

__all__ = ["Catalogue", "CatalogueStats", "Facts", "Recompute", "StateRecord"]

Recompute = Callable[[StateRecord, Mapping[str, Tensor]], Delta]
"""From a record and the support tensors that were published with it, the delta again."""


@dataclass(frozen=True)
class CatalogueStats:
    """Counters of this process, and what is registered.

    Attributes:
        registered: states of all tenants.
        resident: the cache, see :class:`serve.resident.ResidentStats`.
        recomputed: deltas that were computed again from their support.
    """

    registered: int
    resident: ResidentStats
    recomputed: int


class Catalogue:
    """States by tenant and name. Safe for many threads, and for many processes on one folder.

    Args:
        folder: made when it does not exist; shared by all replicas.
        resident_bytes: bytes of deltas that this process may keep in memory.
        model_version: the base model that is served; states of another one are listed but not handed out. None: any.
        recompute: how states of kind ``features`` come back; may be set later.
        keep_versions: versions of a state that are kept; older ones go unless they are pinned or current.
        states_per_tenant: how many names a tenant may have.

    Raises:
        EnvironmentProblem: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        resident_bytes: int = 1 << 28,
        model_version: str | None = None,
        recompute: Recompute | None = None,
        keep_versions: int = 8,
        states_per_tenant: int = 10_000,
    ) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.model_version, self.recompute = model_version, recompute
        self.keep_versions, self.states_per_tenant = max(1, keep_versions), states_per_tenant
        self._files = StateFiles(self.folder)
        self._resident = Resident(resident_bytes)
        self._pins: dict[str, StateRecord] = {}
        self._recomputed = 0

    # ---- reading ---------------------------------------------------------------------------------------------------

    def get(self, tenant: str, name: str, version: int | None = None) -> StateRecord:
        """The record of a state; its current version when none is given.

        Raises:
            SpecError: a name that is not allowed.
            NotFoundError: this tenant has no such state or version.
        """
        place = self._files.place(tenant, name)
        head = self._files.head(place)
        if head is None or head.current is None:
            raise no_such_state(name, version)
        return self._files.record(place, head, head.current if version is None else version)

    def list(self, tenant: str) -> list[StateRecord]:
        """Current versions of all states of a tenant, by name."""
        found = []
        for place in self._files.places(check_state_name(tenant, "tenant")):
            with suppress(NotFoundError):  # deleted in this moment, or before
                found.append(self.get(tenant, place.name))
        return found

    def versions(self, tenant: str, name: str) -> builtins.list[StateRecord]:
        """All kept versions, newest first. Raises as :meth:`get`."""
        current = self.get(tenant, name)
        found = []
        for number in sorted(self._files.versions(self._files.place(tenant, name)), reverse=True):
            with suppress(NotFoundError):
                found.append(self.get(tenant, name, number))
        return found or [current]

    def resident(self, tenant: str, name: str, version: int | None = None) -> Delta:
        """The delta itself, from memory or read (or recomputed) and kept there. The same bits every time.

        Raises:
            NotFoundError: as :meth:`get`.
            StaleState: the state belongs to another base model, or does not come out the same when recomputed.
            CheckpointError: its file is damaged.
        """
        return self.load(self.get(tenant, name, version))

    def load(self, record: StateRecord) -> Delta:
        """The delta of a record from :meth:`get`; raises as :meth:`resident`."""
        if self.model_version is not None and record.model_version != self.model_version:
            raise StaleState(
                f"State {record.name!r} was adapted from model {record.model_version[:12]}; "
                f"{self.model_version[:12]} is served.",
                "Adapt again to the same images.",
            )
        if record.pinned:
            self._pins[record.digest] = record
        return self._resident.get(record.digest, lambda: self._read(record), record.pinned)

    def export(self, tenant: str, name: str, version: int | None = None) -> bytes:
        """The delta as a safetensors file with the record as its metadata; raises as :meth:`resident`."""
        record = self.get(tenant, name, version)
        note = {key: value for key, value in record.to_json().items() if key not in ("tenant", "pinned", "current")}
        return self.load(record).to_bytes(json.dumps(note, sort_keys=True))

    def stats(self) -> CatalogueStats:
        """Counters of this process; counting the registered states lists the folder."""
        places = (place for tenant in self._files.tenants() for place in self._files.places(tenant))
        count = sum(1 for place in places if self._files.live(place))
        return CatalogueStats(count, self._resident.stats(), self._recomputed)

    def resident_stats(self) -> ResidentStats:
        """The cache's counters alone, without looking at the disk."""
        return self._resident.stats()

    def evict(self) -> None:
        """Drop everything that is not pinned from memory."""
        self._resident.evict_all()

    # ---- writing ---------------------------------------------------------------------------------------------------

    def publish(
        self, tenant: str, name: str, delta: Delta, facts: Facts, support: Mapping[str, Tensor] | None = None
    ) -> StateRecord:
        """Make a new version and let it be the current one, atomically.

        Args:
            tenant: owner.
            name: of the domain.
            delta: the state.
            facts: how it came about.
            support: tensors from which :attr:`recompute` can make the delta again; the state is kept as these when they
                are smaller and give the same bits.

        Raises:
            SpecError: a name that is not allowed.
            NoRoom: the tenant has as many states as it may.
            BusyError: another process holds the state for longer than ten seconds.
            EnvironmentProblem: the disk is full; nothing is changed.
        """
        place = self._files.place(tenant, name)
        record = StateRecord(
            tenant=tenant,
            name=name,
            version=0,
            model_version=facts.model_version,
            method=facts.method,
            created=round(time.time(), 3),
            support=facts.support,
            loss_before=facts.loss_before,
            loss_after=facts.loss_after,
            expert_weights=tuple(facts.expert_weights),
            collapse=dict(facts.collapse),
            seconds=facts.seconds,
            bytes=delta.nbytes,
            digest=delta.digest,
            kind="features",
            options=dict(facts.options),
        )
        tensors = support
        if tensors is None or not self._reproduces(delta, record, tensors):
            record, tensors = replace(record, kind="delta"), delta.tensors
        self._files.make_room(place, self.states_per_tenant)
        with self._files.lock(place):
            record = self._files.add(record, tensors)
            self._prune(place)
        self._resident.put(record.digest, delta)
        return record

    def pin(self, tenant: str, name: str, version: int | None = None) -> StateRecord:
        """Keep a version in memory, and on disk whatever comes after it.

        Raises:
            NotFoundError: as :meth:`get`.
            NoRoom: the pinned states would exceed the resident bytes.
            BusyError: as :meth:`publish`.
        """
        record = self.get(tenant, name, version)
        self._review_pins()
        self._resident.require_room(record.bytes, record.digest)
        self._change_pins(record, add=True)
        pinned = self.get(tenant, name, record.version)
        self.load(pinned)
        return pinned

    def unpin(self, tenant: str, name: str, version: int | None = None) -> StateRecord:
        """Undo :meth:`pin`; not an error when it was not pinned. Raises as :meth:`get` and BusyError."""
        record = self.get(tenant, name, version)
        self._change_pins(record, add=False)
        self._pins.pop(record.digest, None)
        self._resident.release(record.digest)
        return self.get(tenant, name, record.version)

    def rollback(self, tenant: str, name: str, to: int | None = None) -> StateRecord:
        """Let an earlier version be the current one; the one before the current one when ``to`` is left out.

        Raises:
            NotFoundError: there is no such version, or none before the current one.
            BusyError: as :meth:`publish`.
        """
        place = self._files.place(tenant, name)
        self.get(tenant, name)
        with self._files.lock(place):
            head, kept = self._files.head(place), self._files.versions(place)
            if head is None or head.current is None:
                raise no_such_state(name)
            chosen = to if to is not None else max((n for n in kept if n < (head.current or 0)), default=0)
            if chosen not in kept:
                hint = f"Its versions are {', '.join(map(str, sorted(kept)))}; {head.current} is current."
                raise no_such_state(name, chosen, hint)
            self._files.write_head(place, replace(head, current=chosen))
        return self.get(tenant, name)

    def delete(self, tenant: str, name: str) -> None:
        """Remove a state with all versions. Requests that use it now finish with it.

        Raises:
            NotFoundError: as :meth:`get`.
            BusyError: as :meth:`publish`.
        """
        place = self._files.place(tenant, name)
        self.get(tenant, name)
        with self._files.lock(place):
            records = self.versions(tenant, name)
            head = self._files.head(place)
            self._files.write_head(place, Head(None, head.next if head else 1))
            for number in self._files.versions(place):
                self._files.discard(place, number)
        for record in records:
            self._pins.pop(record.digest, None)
            self._resident.drop(record.digest)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _read(self, record: StateRecord) -> Delta:
        self._review_pins()
        if record.kind == "delta":
            try:
                return Delta.verified(self._files.content(record), record.digest)
            except CheckpointError as error:
                where = f"The file of state {record.name}.{record.version} is damaged or truncated."
                raise CheckpointError(where, "Adapt again.") from error
        tensors = self._files.tensors(record)
        if self.recompute is None:
            raise StaleState(f"State {record.name!r} has to be recomputed, and nobody here can.", "Adapt again.")
        delta = self.recompute(record, tensors)
        self._recomputed += 1
        if delta.digest != record.digest:
            raise StaleState(
                f"State {record.name}.{record.version} does not come out the same on this machine.",
                "Adapt again, or keep states as deltas.",
            )
        return delta

    def _reproduces(self, delta: Delta, record: StateRecord, support: Mapping[str, Tensor]) -> bool:
        """Whether the state can be kept as ``support``: smaller, and the same bits come out again."""
        size = sum(value.numel() * value.element_size() for value in support.values())
        if self.recompute is None or size >= delta.nbytes:
            return False
        return self.recompute(record, support).digest == delta.digest

    def _change_pins(self, record: StateRecord, add: bool) -> None:
        place = self._files.place(record.tenant, record.name)
        with self._files.lock(place):
            head = self._files.head(place)
            if head is None or record.version not in self._files.versions(place):
                raise no_such_state(record.name, record.version)
            pinned = set(head.pinned) - {record.version} | ({record.version} if add else set())
            self._files.write_head(place, replace(head, pinned=tuple(sorted(pinned))))

    def _review_pins(self) -> None:
        """Let go of what another process has unpinned or deleted."""
        for digest, record in list(self._pins.items()):
            head = self._files.head(self._files.place(record.tenant, record.name))
            if head is None or record.version not in head.pinned:
                self._pins.pop(digest, None)
                self._resident.release(digest)

    def _prune(self, place: Path) -> None:
        head = self._files.head(place)
        for number in sorted(self._files.versions(place), reverse=True)[self.keep_versions :]:
            if head is not None and number != head.current and number not in head.pinned:
                self._files.discard(place, number)
