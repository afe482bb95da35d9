"""A commented pipeline to start from: ``moepipe init meta_dmoe --dataset camelyon17``.

A method's recipe names its stages, their connections and the few values that make the method; fields, types, bounds,
defaults and presets come from the stages' own declarations, so the text cannot go stale. Fields that have a default are
written as comments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from moe.errors import SpecError, nearest
from orchestrator.explain import inner_model
from orchestrator.field_docs import FieldDoc, model_fields, yaml_words
from orchestrator.schema import MODELINE
from orchestrator.spec import API_VERSION, PipelineSpec, Resources
from orchestrator.wiring import stage_for

# Config fields that mean a top-level one.
_REFERENCES = {"dataset": "${dataset}", "options": "${dataset_options}"}


@dataclass(frozen=True)
class Step:
    """One stage of a recipe.

    Attributes:
        name: stage name in the YAML.
        kind: stage kind.
        inputs: port -> stage names.
        config: values that differ from the defaults.
        comment: why it is there; the kind's own line when empty.
        note: a caution below it.
    """

    name: str
    kind: str
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    comment: str = ""
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """The stages of a method, in order, and a sentence about it."""

    description: str
    steps: tuple[Step, ...]


def methods() -> list[str]:
    """Names that :func:`scaffold` accepts."""
    from orchestrator.recipes import RECIPES

    return sorted(RECIPES)


def scaffold(method: str, dataset: str) -> str:
    """YAML text of a pipeline that applies ``method`` to ``dataset``, with every field explained.

    Raises:
        SpecError: unknown method or dataset.
    """
    from orchestrator.recipes import RECIPES

    if method not in RECIPES:
        raise SpecError(f"There is no recipe for {method!r}.", nearest(method, RECIPES))
    return render(method, RECIPES[method], dataset)


def render(method: str, recipe: Recipe, dataset: str) -> str:
    """Like :func:`scaffold`, for any recipe."""
    from workers.datasets.base import DATASETS

    module = DATASETS.load(dataset)
    recipe = _with_presets(recipe, dataset)
    lines = [
        MODELINE.format(path="pipeline.schema.json"),
        "# `moepipe schema > pipeline.schema.json` gives your editor completion and hover texts for this file.",
        "# Lines that begin with `# name:` show a default; remove the `# ` to change it.",
        f"# `moepipe explain stages.{recipe.steps[0].kind}` says more; `moepipe plan FILE` says what would run.",
        f"apiVersion: {API_VERSION}",
        f"name: {method}-{dataset}",
        f"description: {yaml_words(recipe.description)}",
        "",
        *_about(module.INFO.title),
        f"dataset: {dataset}",
        *_options(module.Options),
        *(line for name in ("scale", "seeds") for line in _top(name)),
        "",
        "stages:",
    ]
    for step in recipe.steps:
        lines += [*_indent(_step(step, dataset)), ""]
    lines += _profiles(recipe)
    return "\n".join(lines) + "\n"


def _with_presets(recipe: Recipe, dataset: str) -> Recipe:
    """Where an algorithm has no preset for the dataset, that of the most similar one."""
    steps: list[Step] = []
    for step in recipe.steps:
        text = str(step.config.get("preset", ""))
        table = _presets(text)
        if table and dataset not in table:
            similar = _similar(dataset, table)
            config = {**step.config, "preset": text.replace("${dataset}", similar)}
            note = f"There are no tested settings for {dataset}; these are those of {similar}."
            steps.append(replace(step, config=config, note=note))
        else:
            steps.append(step)
    return replace(recipe, steps=tuple(steps))


def _presets(text: str) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Dataset -> part -> fields, of the algorithm that ``algorithm/dataset/part`` names."""
    from moe.algorithms.base import ALGORITHMS

    return ALGORITHMS.load(text.split("/")[0]).STAGE_PRESETS if text else {}


def _preset_values(step: Step, dataset: str) -> Mapping[str, Any]:
    """What the step's preset fills in."""
    text = str(step.config.get("preset", ""))
    if not text:
        return {}
    _, name, part = text.replace("${dataset}", dataset).split("/")
    return _presets(text)[name][part]


def _similar(dataset: str, table: Iterable[str]) -> str:
    """The dataset of a table whose task, channels, image size and outputs are nearest."""
    from workers.datasets.base import DATASETS

    info = DATASETS.load(dataset).INFO

    def distance(name: str) -> tuple[bool, bool, int, int]:
        other = DATASETS.load(name).INFO
        size = abs(other.image_size[0] - info.image_size[0])
        return other.task != info.task, other.channels != info.channels, size, abs(other.num_outputs - info.num_outputs)

    return min(sorted(set(table) & set(DATASETS.names())), key=distance)


def _about(text: str) -> list[str]:
    return [f"# {line}" for line in text.splitlines() if line.strip()]


def _indent(lines: list[str], by: int = 2) -> list[str]:
    return [" " * by + line if line else line for line in lines]


def _commented(lines: list[str]) -> list[str]:
    return [f"# {line}" for line in lines]


def _top(name: str) -> list[str]:
    (doc,) = [item for item in model_fields(PipelineSpec) if item.name == name]
    return [*_about(doc.doc), f"{name}: {doc.default.removeprefix('default ')}"]


def _options(model: type[BaseModel]) -> list[str]:
    """The dataset's options, all with defaults, as comments."""
    fields = [line for doc in model_fields(model) for line in (*_describe(doc), f"# {doc.name}: {_value(doc)}")]
    return ["# dataset_options:", *(line.replace("# ", "#   ", 1) for line in fields)] if fields else []


def _describe(doc: FieldDoc) -> list[str]:
    """The comment line above a field."""
    facts = ", ".join(part for part in (doc.type, doc.bounds) if part)
    presets = "; ".join(f"{name} {yaml_words(value)}" for name, value in doc.presets.items())
    text = doc.doc.rstrip(".") or doc.name.replace("_", " ")
    text = text[0].upper() + text[1:] if text.split()[0].isalpha() else text
    return [f"# {text} ({facts}).{f' Presets: {presets}.' if presets else ''}"]


def _value(doc: FieldDoc) -> str:
    return doc.default.removeprefix("default ")


def _step(step: Step, dataset: str) -> list[str]:
    """One stage as YAML lines."""
    stage = stage_for(step.kind)
    doc = (type(stage).__doc__ or "").strip().splitlines()[0]
    about = [*_about(step.comment or doc), *_about(step.note)]
    lines = [f"{step.name}:", *_indent([*about, f"kind: {step.kind}"])]
    if step.inputs:
        lines.append("  inputs:")
        for port, names in step.inputs.items():
            described = stage.inputs[port].doc
            lines += _indent(_about(described), 4)
            texts = [f'"${{stages.{name}}}"' for name in names]
            lines.append(f"    {port}: {texts[0] if len(texts) == 1 else '[' + ', '.join(texts) + ']'}")
    body = list(_config(stage.Config, step.config, dataset, _preset_values(step, dataset)))
    if body:
        active = any(not line.lstrip().startswith("#") for line in body)
        lines += [f"  {'config:' if active else '# config:'}", *_indent(body, 4)]
    workers = "workers: 2, " if stage.gang else ""
    lines.append(f"  # resources: {{{workers}cpus: {Resources().cpus:g}, gpus: {Resources().gpus:g}}}")
    return lines


def _config(
    model: type[BaseModel], values: Mapping[str, Any], dataset: str, preset: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """The fields of a config: what the recipe sets or must be set, then preset values and defaults as comments."""
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        raise SpecError(f"The recipe sets {unknown[0]!r}.", nearest(unknown[0], model.model_fields))
    for doc in model_fields(model):
        name = doc.name
        inner = inner_model(model.model_fields[name].annotation)
        yield from _describe(doc)
        if name in values:
            yield f"{name}: {yaml_words(values[name])}"
        elif name in _REFERENCES:
            yield f"{name}: {_REFERENCES[name]}"
        elif preset is not None and name in preset:
            if inner and isinstance(preset[name], Mapping):
                yield from _commented([f"{name}:", *_indent(list(_config(inner, preset[name], dataset)))])
            else:
                yield f"# {name}: {yaml_words(preset[name])}"
        elif doc.default == "required" and inner:
            yield f"{name}:"
            yield from _indent(list(_config(inner, {}, dataset)))
        elif doc.default == "required":
            yield f"{name}: {yaml_words(doc.presets.get(dataset))}"
        else:
            yield f"# {name}: {_value(doc)}"


def _profiles(recipe: Recipe) -> list[str]:
    gangs = [step.name for step in recipe.steps if stage_for(step.kind).gang]
    lines = ["# Overlays, chosen with `--profile laptop`: maps merge, everything else replaces.", "profiles:"]
    lines += [
        "  laptop:",
        "    scale: smoke",
        "    seeds: [0]",
        "  cluster:",
        "    scale: paper",
        "    seeds: [0, 1, 2]",
    ]
    for name in gangs:
        lines += ["    stages:", f"      {name}:", "        resources: {workers: 4, gpus: 1}"]
    return lines
