"""How a plan is shown."""

from __future__ import annotations

from itertools import groupby

from orchestrator import console
from orchestrator.capacity import Capacity, machine_capacity
from orchestrator.plan import Plan, PlanEntry
from orchestrator.store import Store

_CHAIN = 12


def capacity_of(on: str, store: Store) -> Capacity | None:
    """What ``--on`` has, without starting anything: this machine, or what a cluster says."""
    if on == "inline":
        return None
    if on == "ray":
        return machine_capacity()
    from orchestrator.submit import make_executor

    executor = make_executor(on, store)
    try:
        return executor.capacity()
    finally:
        executor.close()


def show(plan: Plan) -> None:
    """One row per member (alike neighbours share a row), then the sums."""
    rows = []
    for _, group in groupby(plan.entries.values(), key=_alike):
        entries = list(group)
        first, count = entries[0], len(entries)
        name = first.node if count == 1 else f"{first.node} ... {entries[-1].node} ({count})"
        estimate = first.estimate_s if first.state != "hit" else None
        rows.append((name, first.kind, first.state, _resources(first), console.seconds(estimate), first.reason))
    console.show_table(("member", "kind", "", "resources", "estimate>", "why"), rows)
    hits, todo = plan.count("hit"), len(plan.entries) - plan.count("hit")
    lines = [f"{len(plan.entries)} members: {hits} hits, {todo} to run"]
    if todo:
        known = "" if not plan.unknown else f" ({plan.unknown} of them never ran before: no estimate)"
        work, chain = console.seconds(plan.total_s), console.seconds(plan.critical_s)
        lines.append(f"work {work}, longest chain {chain}{known}; writes about {console.size(plan.new_bytes)}")
        more = [f"... {len(plan.critical_path) - _CHAIN} more"] if len(plan.critical_path) > _CHAIN else []
        lines.append("longest chain: " + " > ".join([*plan.critical_path[:_CHAIN], *more]))
    lines += [f"problem: {problem}" for problem in plan.problems]
    console.say(*lines)


def _alike(entry: PlanEntry) -> tuple[object, ...]:
    """Members of a stage that would be the same row but for their name; reasons that name a parent count as one."""
    reason = "waits" if entry.state == "blocked" and entry.reason.startswith("waits for") else entry.reason
    return entry.stage, entry.state, reason, _resources(entry)


def _resources(entry: PlanEntry) -> str:
    amounts = dict(entry.resources)
    ranks = amounts.pop("workers", 1.0)
    text = ", ".join(f"{amount:g} {name}" for name, amount in amounts.items()) or "-"
    return f"{ranks:g} x ({text})" if ranks > 1 else text
