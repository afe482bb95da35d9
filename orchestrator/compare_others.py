"""Readers of results other than ``evaluate``'s: DomainBed sweeps, MoE Jetpack, m2mKD, texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.compare_base import EVALUATION, HELD_OUT, NOT_HOW, Source, cost_of, data_of, text_of
from orchestrator.compare_cost import members_hours, training_hours
from orchestrator.compare_read import RunFacts
from orchestrator.compare_result import Hours, ModelCost, Observation, Setting
from orchestrator.tracking_state import parse_node


def sweep(reader: Source, run: RunFacts, name: str) -> Iterator[Observation]:
    """A DomainBed sweep: one observation for each algorithm, trial and selection rule."""
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
    how = {key: value for key, value in config.items() if key not in (*NOT_HOW["sweep"], "methods", "dataset_options")}
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
        setting=Setting(dataset, text_of(options), protocol, "in", "accuracy"),
        data=str(metas[0].get("data", "")),
        config={stage: how},
        identity=json.dumps(how, sort_keys=True),
        domains=domains,
        cost=cost_of(metas[0].get("cost") or {}, None),
        hours=hours,
        steps=next((int(meta["steps"]) for meta in metas if meta.get("steps")), None),
        scale=run.scale,
    )


def jetpack(reader: Source, run: RunFacts, name: str) -> Iterator[Observation]:
    """Fine-tuning from several starts."""
    for node, made in run.of_stage(name, None):
        meta = reader.meta(made.digest)
        # Without test splits there is the validation score; the setting says which of the two it is.
        scored = meta["tests"] or {"validation": meta.get("val") or {}}
        tests = {split: float(found[meta["metric"]]) for split, found in scored.items() if meta["metric"] in found}
        _, options = data_of(run, next(iter(run.stages[name].inputs.get("data", ())), ""))
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


def m2mkd(reader: Source, run: RunFacts, name: str) -> Iterator[Observation]:
    """Networks taught module by module."""
    for node, made in run.of_stage(name, None):
        record = reader.json(made.digest, EVALUATION)
        splits = [split for split in record["splits"] if split.startswith("test")] or record["splits"]
        _, options = data_of(run, next(iter(run.stages[name].inputs.get("data", ())), ""))
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


def text_evaluate(reader: Source, run: RunFacts, name: str) -> Iterator[Observation]:
    """GLUE-like sets; out-of-domain sets where there are some."""
    for node, made in run.of_stage(name, None):
        record = reader.json(made.digest, EVALUATION)
        for form, seeds in record["results"].items():
            for seed, every in seeds.items():
                sets = {key: scores for key, scores in every.items() if key.startswith("ood:")} or every
                yield Observation(
                    run=run.id,
                    node=node,
                    digest=made.digest,
                    method="_".join((record["method"], record["tuning"], *(() if form == "trained" else (form,)))),
                    adaptation="",
                    label=f"{record['label']} ({record['tuning']}, {form})",
                    selection=str(record["selection"]),
                    seed=int(seed),
                    setting=Setting(record["dataset"], "", "GLUE", "+".join(sets), "average"),
                    data="",
                    config=reader.settings(run, [name])[0],
                    identity=reader.settings(run, [name])[1],
                    domains={key: float(scores["average"]) for key, scores in sets.items()},
                    scores={key: float(scores["average"]) for key, scores in every.items()},
                    steps=record["steps"].get(seed),
                    scale=run.scale,
                    miniature=bool(record.get("miniature")),
                )
