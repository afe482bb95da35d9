"""From what stages wrote to observations: one reader for each kind of stage whose results can stand in a table.

Only JSON is read here; stored predictions are named and read when the bootstrap needs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.errors import DataError
from orchestrator.artifacts import MANIFEST
from orchestrator.compare_cost import Clock, members_hours, training_hours
from orchestrator.compare_read import Made, RunFacts
from orchestrator.compare_result import Hours, ModelCost, Observation, Setting
from orchestrator.store import Store
from orchestrator.tracking_state import parse_node

EVALUATION = "evaluation.json"
# Choices of a data set that say which domain is held out: other domains are other columns, not other data.
HELD_OUT = ("target", "holdout", "held_out", "test", "fold")
# Networks of the `evaluate` stage and the ports that they come from.
_PORTS: Mapping[str, tuple[str, ...]] = {
    "erm": ("erm",),
    "student": ("student",),
    "aggregator": ("aggregator", "features", "experts"),
    "oracle": ("oracle",),
}
# Settings that say what is run and reported, and not how a model is made.
_NOT_HOW = {
    "sweep": ("datasets", "algorithms", "n_trials", "test_envs", "extends", "routing", "merge", "save_model"),
    "evaluate": ("curve", "streams", "replicates", "batch_size"),
}


class Reader:
    """Observations of runs of one store.

    Args:
        store: where the artifacts are.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.clock = Clock(store)
        self._settings: dict[tuple[str, str], tuple[Mapping[str, Any], str]] = {}

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

    def settings(self, run: RunFacts, stages: Sequence[str]) -> tuple[dict[str, Mapping[str, Any]], str]:
        """Settings of stages and of all that they are made from, and the same as one text to compare by.

        Without the data and without what only decides what is reported.
        """
        found, texts = {}, []
        for name in run.closure(stages):
            stage = run.stages[name]
            if stage.kind in ("prepare", "text_prepare"):
                continue
            if (run.id, name) not in self._settings:
                hidden = _NOT_HOW.get(stage.kind, ())
                kept = {key: value for key, value in stage.config.items() if key not in hidden}
                self._settings[run.id, name] = kept, f"{name}:{stage.kind}:{json.dumps(kept, sort_keys=True)}"
            found[name], text = self._settings[run.id, name]
            texts.append(text)
        return found, "\n".join(texts)

    def folder(self, digest: str) -> Path:
        """Where an artifact's files are; a remote one is fetched."""
        if self.store.is_local:
            return self.store.folder / "artifacts" / digest
        return self.store.local_path(self.store.artifact(digest))

    def json(self, digest: str, name: str) -> dict[str, Any]:
        """A JSON file of an artifact (DataError when it is not there any more, or damaged)."""
        try:
            text = (self.folder(digest) / name).read_bytes()
            found: dict[str, Any] = json.loads(_without_rows(text))
            return found
        except (OSError, ValueError) as error:
            raise DataError(
                f"{name} of artifact {digest[:12]} cannot be read: {error}.",
                "moepipe show RUN --verify says more; submit again to make it anew.",
            ) from None

    def meta(self, digest: str) -> dict[str, Any]:
        """The record of an artifact."""
        found: dict[str, Any] = self.json(digest, MANIFEST)["meta"]
        return found


def _evaluate(reader: Reader, run: RunFacts, name: str) -> Iterator[Observation]:
    stage = run.stages[name]
    data_stage = next(iter(stage.inputs.get("data", ())), "")
    called = {slug(label): network for network, label in (stage.config.get("labels") or {}).items()}
    data, options = _data(run, data_stage)
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
                cost=_cost(method.get("cost") or {}, made.metrics.get(f"latency_ms/{base}")),
                hours=training_hours(run, sources, parse_node(node)[1], reader.clock),
                steps=record.get("settings", {}).get(f"{network}_steps"),
                examples=_examples(reader, run, data_stage, made, method["name"], record["task"]),
                counts=tuple(record["counts"]),
                scale=run.scale,
            )


def _examples(
    reader: Reader, run: RunFacts, data_stage: str, made: Made, method: str, task: str
) -> tuple[Path, str, Path] | None:
    data = next((entry.digest for _, entry in run.of_stage(data_stage, None)), "")
    if not data or task == "regression" or not reader.store.is_local:
        return None
    return reader.folder(made.digest), method, reader.folder(data)


def _sweep(reader: Reader, run: RunFacts, name: str) -> Iterator[Observation]:
    from workers.domainbed.records import read_run as read_records
    from workers.domainbed.selection import METHODS, ranking, run_choices

    groups: dict[tuple[str, str, int], list[tuple[str, dict[str, Any]]]] = {}
    for node, made in run.of_stage(name, None):
        meta = reader.meta(made.digest)
        args = meta["args"]
        groups.setdefault((args["dataset"], args["algorithm"], int(args["trial_seed"])), []).append((node, meta))
    for (dataset, algorithm, trial), members in groups.items():
        records = [
            record for node, _ in members for record in read_records(reader.folder(run.made[node].digest)).records
        ]
        metas = [meta for _, meta in members]
        labels: list[str] = next((meta["labels"] for meta in metas if "labels" in meta), [])
        protocol = next((str(meta["protocol"]) for meta in metas if meta.get("protocol")), "taken over")
        hours = members_hours(run, name, [node for node, _ in members], reader.clock)
        for rule in METHODS:
            domains: dict[str, float] = {}
            for domain in sorted({number for record in records for number in record.test_envs}):
                own = [record for record in records if domain in record.test_envs]
                ranked = ranking(run_choices(own, rule))
                if ranked:
                    domains[labels[domain] if labels else f"env{domain}"] = ranked[0][1].test
            if domains:
                who = (dataset, algorithm, trial, rule, protocol)
                yield _sweep_row(run, name, members[0][0], who, domains, metas, hours)


def _sweep_row(
    run: RunFacts,
    stage: str,
    node: str,
    who: tuple[str, str, int, str, str],
    domains: Mapping[str, float],
    metas: list[dict[str, Any]],
    hours: Hours | None,
) -> Observation:
    dataset, algorithm, trial, rule, protocol = who
    config = run.stages[stage].config
    options = {key: value for key, value in (config.get("dataset_options") or {}).items() if key not in HELD_OUT}
    methods = config.get("methods") or {}
    how = {key: value for key, value in config.items() if key not in (*_NOT_HOW["sweep"], "methods", "dataset_options")}
    how["method"] = methods.get(algorithm, algorithm)
    return Observation(
        run=run.id,
        node=node,
        digest=run.made[node].digest,
        method=algorithm,
        adaptation="",
        label=algorithm,
        selection=rule,
        seed=trial,
        setting=Setting(dataset, _text(options), protocol, "in", "accuracy"),
        data=str(metas[0].get("data", "")),
        config={stage: how},
        identity=json.dumps(how, sort_keys=True),
        domains=domains,
        cost=_cost(metas[0].get("cost") or {}, None),
        hours=hours,
        steps=next((int(meta["steps"]) for meta in metas if meta.get("steps")), None),
        scale=run.scale,
    )


def _jetpack(reader: Reader, run: RunFacts, name: str) -> Iterator[Observation]:
    for node, made in run.of_stage(name, None):
        meta = reader.meta(made.digest)
        tests = {split: float(scores[meta["metric"]]) for split, scores in meta["tests"].items()}
        _, options = _data(run, next(iter(run.stages[name].inputs.get("data", ())), ""))
        if tests:
            yield Observation(
                run=run.id,
                node=node,
                digest=made.digest,
                method=str(meta["start"]),
                adaptation="",
                label=f"start: {meta['start']}",
                selection="last",
                seed=int(meta["seed"]),
                setting=Setting(meta["dataset"], options, "fine-tuning", "+".join(tests), meta["metric"]),
                data="",
                config=reader.settings(run, [name])[0],
                identity=reader.settings(run, [name])[1],
                domains=tests,
                cost=ModelCost(parameters=float(meta["parameters"])),
                hours=training_hours(run, [name], parse_node(node)[1], reader.clock),
                steps=meta.get("steps"),
                scale=run.scale,
            )


def _m2mkd(reader: Reader, run: RunFacts, name: str) -> Iterator[Observation]:
    for node, made in run.of_stage(name, None):
        record = reader.json(made.digest, EVALUATION)
        splits = [split for split in record["splits"] if split != "train"]
        _, options = _data(run, next(iter(run.stages[name].inputs.get("data", ())), ""))
        for model in record["models"]:
            sources = [
                stage
                for stage in run.stages[name].inputs.get("models", ())
                if run.stages[stage].config.get("label", stage) == model["label"]
            ]
            yield Observation(
                run=run.id,
                node=node,
                digest=made.digest,
                method=str(model["label"]).replace(" ", "_"),
                adaptation="",
                label=str(model["label"]),
                selection="last",
                seed=int(record["seed"]),
                setting=Setting(record["dataset"], options, "transfer", "+".join(splits), record["metric"]),
                data="",
                config=reader.settings(run, [*sources, name])[0],
                identity=reader.settings(run, [*sources, name])[1],
                domains={split: float(model["scores"][split][record["metric"]]) for split in splits},
                cost=ModelCost(parameters=float(model["parameters"])),
                hours=training_hours(run, sources, parse_node(node)[1], reader.clock) if sources else None,
                scale=run.scale,
                miniature=bool(record.get("miniature")),
            )


def _text_evaluate(reader: Reader, run: RunFacts, name: str) -> Iterator[Observation]:
    for node, made in run.of_stage(name, None):
        record = reader.json(made.digest, EVALUATION)
        for form, seeds in record["results"].items():
            for seed, sets in seeds.items():
                yield Observation(
                    run=run.id,
                    node=node,
                    digest=made.digest,
                    method="_".join((record["method"], record["tuning"], *(() if form == "tuned" else (form,)))),
                    adaptation="",
                    label=f"{record['label']} ({record['tuning']}, {form})",
                    selection=str(record["selection"]),
                    seed=int(seed),
                    setting=Setting(record["dataset"], "", "GLUE", "+".join(sets), "average"),
                    data="",
                    config=reader.settings(run, [name])[0],
                    identity=reader.settings(run, [name])[1],
                    domains={key: float(scores["average"]) for key, scores in sets.items()},
                    steps=record["steps"].get(seed),
                    scale=run.scale,
                    miniature=bool(record.get("miniature")),
                )


_READERS: Mapping[str, Callable[[Reader, RunFacts, str], Iterator[Observation]]] = {
    "evaluate": _evaluate,
    "sweep": _sweep,
    "jetpack_train": _jetpack,
    "m2mkd_evaluate": _m2mkd,
    "text_evaluate": _text_evaluate,
}
KINDS = tuple(_READERS)


def _without_rows(text: bytes) -> bytes:
    """An evaluation without the list of its rows, most of the file, which a table does not need."""
    begin = text.find(b'\n "rows": [')
    end = text.find(b"]", begin)
    return text[:begin] + b'\n "rows": []' + text[end + 1 :] if 0 <= begin < end else text


def _data(run: RunFacts, stage: str) -> tuple[str, str]:
    """Identity of the rows (digest of the prepared data) and the options but for what is held out, as one text."""
    if stage not in run.stages:
        return "", ""
    options = run.stages[stage].config.get("options") or {}
    digest = next((made.digest for _, made in run.of_stage(stage, None)), "")
    return digest, _text({key: value for key, value in options.items() if key not in HELD_OUT})


def _cost(record: Mapping[str, Any], latency: float | None) -> ModelCost:
    return ModelCost(record.get("parameters"), record.get("active_parameters"), record.get("flops"), latency)


def _domain_metric(task: str) -> str:
    return "pearson_r" if task == "regression" else "accuracy"


def _text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(options.items()))


def _of_stage(item: Observation, stage: str) -> Observation:
    """The observation with its stage in its name, where several stages of a run name their methods alike."""
    short = stage.removeprefix("evaluation").removeprefix("evaluate").strip("_-")
    return replace(item, method=f"{short}_{item.method}", label=f"{short}: {item.label}") if short else item


def slug(label: str) -> str:
    """The name that ``evaluate`` makes of a label, as ``workers.evaluation_methods.slug``, which needs torch."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
