"""From what stages wrote to observations: which kind of stage is read by what, and the reader of ``evaluate``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from orchestrator.compare_base import EVALUATION, Source, cost_of, data_of
from orchestrator.compare_cost import training_hours
from orchestrator.compare_others import jetpack, m2mkd, sweep, text_evaluate
from orchestrator.compare_read import Made, RunFacts
from orchestrator.compare_result import Observation, Setting
from orchestrator.tracking_state import parse_node

# Networks of the `evaluate` stage and the ports that they come from.
_PORTS: Mapping[str, tuple[str, ...]] = {
    "erm": ("erm",),
    "student": ("student",),
    "aggregator": ("aggregator", "features", "experts"),
    "oracle": ("oracle",),
}


class Reader(Source):
    """Observations of runs of one store."""

    def observations(self, run: RunFacts) -> Iterator[Observation]:
        """Everything in a run that can be compared.

        Raises:
            DataError: a result's file is damaged.
        """
        stages = [(name, _READERS[stage.kind]) for name, stage in run.stages.items() if stage.kind in _READERS]
        found = {name: list(read(self, run, name)) for name, read in stages}
        owners: dict[str, set[str]] = {}
        for name, own in found.items():
            for item in own:
                owners.setdefault(item.name, set()).add(name)
        for name, own in found.items():
            for item in own:
                yield item if len(owners[item.name]) == 1 else _of_stage(item, name)


def _evaluate(reader: Source, run: RunFacts, name: str) -> Iterator[Observation]:
    stage = run.stages[name]
    data_stage = next(iter(stage.inputs.get("data", ())), "")
    called = {slug(label): network for network, label in (stage.config.get("labels") or {}).items()}
    data, options = data_of(run, data_stage)
    for node, made in run.of_stage(name, None):
        record = reader.json(made.digest, EVALUATION)
        adapts = f"{record['protocol']} protocol, {record['support_size']} unlabelled images"
        setting = Setting(record["dataset"], options, adapts, record["split"], _domain_metric(record["task"]))
        for method in record["methods"]:
            base = method["reference"] or method["name"]
            network = called.get(base, base)
            sources = tuple(source for port in _PORTS.get(network, (network,)) for source in stage.inputs.get(port, ()))
            settings, identity = reader.settings(run, sources)
            adaptation = method["name"].removeprefix(base).removeprefix("_")
            if adaptation:
                owner = (stage.config.get("adaptations") or {}).get(network) or {}
                settings = {**settings, name: {adaptation: owner.get(adaptation, {})}}
                identity += json.dumps(settings[name], sort_keys=True)
            yield Observation(
                run=run.id,
                node=node,
                digest=made.digest,
                method=base,
                adaptation=adaptation,
                label=method["label"],
                selection="validation",
                seed=int(record["seed"]),
                setting=setting,
                data=data,
                config=settings,
                identity=identity,
                domains=dict(zip(record["domains"], method["domain_scores"], strict=True)),
                percent=record["task"] != "regression",
                scores=method["scores"],
                cost=cost_of(method.get("cost") or {}, reader.metrics(made).get(f"latency_ms/{base}")),
                hours=training_hours(run, sources, parse_node(node)[1], reader.clock),
                steps=record.get("settings", {}).get(f"{network}_steps"),
                examples=_examples(reader, run, data_stage, made, method["name"], record["task"]),
                counts=tuple(record["counts"]),
                scale=run.scale,
            )


def _examples(
    reader: Source, run: RunFacts, data_stage: str, made: Made, method: str, task: str
) -> tuple[Path, str, Path] | None:
    data = next((entry.digest for _, entry in run.of_stage(data_stage, None)), "")
    if not data or task == "regression" or not reader.store.is_local:
        return None
    return reader.folder(made.digest), method, reader.folder(data)


def _domain_metric(task: str) -> str:
    return "pearson_r" if task == "regression" else "accuracy"


def _of_stage(item: Observation, stage: str) -> Observation:
    """The observation with its stage in its name, where several stages of a run name their methods alike."""
    short = stage.removeprefix("evaluation").removeprefix("evaluate").strip("_-")
    return replace(item, method=f"{short}_{item.method}", label=f"{short}: {item.label}") if short else item


def slug(label: str) -> str:
    """The name that ``evaluate`` makes of a label, as ``workers.evaluation_methods.slug``, which needs torch."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


_READERS: Mapping[str, Callable[[Source, RunFacts, str], Iterator[Observation]]] = {
    "evaluate": _evaluate,
    "sweep": sweep,
    "jetpack_train": jetpack,
    "m2mkd_evaluate": m2mkd,
    "text_evaluate": text_evaluate,
}
KINDS = tuple(_READERS)
