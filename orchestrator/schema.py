"""JSON Schema of the pipeline YAML for editors: completion, hover texts and red lines while typing.

The ``kind`` of a stage decides what its ``config`` and ``inputs`` may hold. Every value may also be a ``${...}``
reference. A file that ``extends`` another one, and a profile, may leave out what they do not change.
Source: JSON Schema draft 2020-12.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestrator.spec import NAME_PATTERN, PipelineSpec, Resources, Retry, StageSpec, TrackingSpec
from orchestrator.stages.base import STAGES, Port, StageBase
from orchestrator.wiring import stage_for

Json = dict[str, Any]
MODELINE = "# yaml-language-server: $schema={path}"
_REFERENCE: Json = {"$ref": "#/$defs/reference"}
_KEEP = ("description", "default", "deprecated", "examples")


def shipped_kinds() -> list[str]:
    """The stage kinds of this project, without plug-ins."""
    return [name for name in STAGES.names() if STAGES.module_name(name).startswith("orchestrator.stages.")]


def pipeline_schema(kinds: Iterable[str] | None = None) -> Json:
    """The JSON Schema of a pipeline file.

    Args:
        kinds: stage kinds to describe; all known ones by default.

    Raises:
        SpecError: a kind is unknown or cannot be loaded.
    """
    names = sorted(STAGES.names() if kinds is None else kinds)
    defs: Json = {
        "reference": {
            "type": "string",
            "pattern": r"\$\{[^{}]+\}",
            "description": "${params.NAME}, ${dataset}, ${dataset_options}, ${scale}, ${env:NAME[:-default]}",
        },
        "stageReference": {
            "type": "string",
            "pattern": r"^\$\{stages\.[A-Za-z][A-Za-z0-9_-]*\}$",
            "description": "${stages.NAME}",
        },
    }
    for name, model in (("resources", Resources), ("retry", Retry), ("tracking", TrackingSpec)):
        defs[name] = _model(model, name, defs)
    defs["stage"] = _stage(names, defs)
    full = _top(defs)
    patch = {**full, "properties": {k: v for k, v in full["properties"].items() if k not in ("extends", "profiles")}}
    patch.pop("required")
    defs["profile"] = patch
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moepipe pipeline",
        "description": PipelineSpec.__doc__,
        "type": "object",
        "properties": full["properties"],
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "else": {
            "required": full["required"],
            "properties": {"stages": {"additionalProperties": {"required": ["kind"]}}},
        },
        "allOf": _dataset_rules(defs),
        "$defs": defs,
    }


def schema_text(kinds: Iterable[str] | None = None) -> str:
    """:func:`pipeline_schema` as the text of a file."""
    return json.dumps(pipeline_schema(kinds), indent=2, ensure_ascii=False) + "\n"


def write_schema() -> None:
    """Refresh ``pipelines/pipeline.schema.json`` (``python -m orchestrator.schema``, from a checkout).

    Shipped kinds only, so that the file does not depend on plug-ins.
    """
    path = Path(__file__).parents[1] / "pipelines" / "pipeline.schema.json"
    temporary = path.with_suffix(".part")
    temporary.write_text(schema_text(shipped_kinds()), encoding="utf-8")
    os.replace(temporary, path)


def _top(defs: Json) -> Json:
    """The top-level map, with what only files have."""
    schema = _model(PipelineSpec, "pipeline", defs)
    properties = schema["properties"]
    properties["stages"] = {
        "type": "object",
        "description": PipelineSpec.model_fields["stages"].description,
        "minProperties": 1,
        "propertyNames": {"pattern": NAME_PATTERN},
        "additionalProperties": {"$ref": "#/$defs/stage"},
    }
    properties["tracking"] = _block("tracking", TrackingSpec)
    properties["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "YAML file or files, relative to this one, that this one is merged over.",
    }
    properties["profiles"] = {
        "type": ["object", "null"],
        "description": "Overlays by name, merged in with --profile NAME: maps merge, everything else replaces.",
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/profile"}, {"type": "null"}]},
    }
    for name in ("pipeline.StageSpec", "pipeline.Resources", "pipeline.Retry", "pipeline.TrackingSpec"):
        defs.pop(name, None)
    return schema


def _stage(kinds: list[str], defs: Json) -> Json:
    """A stage: the common fields, and for each kind what config and inputs hold."""
    schema = _model(StageSpec, "stage", defs)
    for name in ("stage.Resources", "stage.Retry"):
        defs.pop(name, None)
    properties = schema["properties"]
    properties["resources"] = _block("resources", Resources)
    properties["retry"] = _block("retry", Retry)
    stages = {kind: stage_for(kind) for kind in kinds}
    properties["kind"] = {"enum": kinds, "description": StageSpec.model_fields["kind"].description}
    properties["config"] = {"type": ["object", "null"], "description": StageSpec.model_fields["config"].description}
    properties["inputs"] = {"type": ["object", "null"], "description": StageSpec.model_fields["inputs"].description}
    schema.pop("required", None)
    schema["allOf"] = [_kind_rule(kind, stage, defs) for kind, stage in stages.items()]
    return schema


def _kind_rule(kind: str, stage: StageBase[Any], defs: Json) -> Json:
    defs[f"{kind}.config"] = _model(stage.Config, kind, defs)
    if "preset" in stage.Config.model_fields:  # a preset fills in what is not written
        for name in [name for name in defs if name.startswith(f"{kind}.")]:
            defs[name].pop("required", None)
    doc = (stage.__class__.__doc__ or "").strip().splitlines()[0]
    then = {
        "properties": {
            "kind": {"description": f"{kind}: {doc} Makes: {stage.output}."},
            "config": _or_null({"$ref": f"#/$defs/{kind}.config"}),
            "inputs": {
                "type": ["object", "null"],
                "properties": {name: _port(port) for name, port in stage.inputs.items()},
                "additionalProperties": _port(Port("any", many=True)) if stage.open_ports else False,
            },
        }
    }
    return {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": then}


def _port(port: Port) -> Json:
    many = {"type": "array", "items": {"$ref": "#/$defs/stageReference"}, "minItems": 1}
    if not port.many:
        many["maxItems"] = 1
    flags = f"{'one or more artifacts' if port.many else 'one artifact'} of kind {' or '.join((port.kind, *port.also))}"
    text = f"{port.doc} ({flags}{', optional' if port.optional else ''})".strip()
    return {"anyOf": [{"$ref": "#/$defs/stageReference"}, _REFERENCE, many], "description": text}


def _dataset_rules(defs: Json) -> list[Json]:
    """For each dataset, what ``dataset_options`` may hold."""
    from workers.datasets.base import DATASETS

    rules = []
    for name in DATASETS.names():
        if DATASETS.module_name(name).startswith("workers.datasets."):
            defs[f"{name}.options"] = _model(DATASETS.load(name).Options, name, defs)
            then = {"properties": {"dataset_options": _or_null({"$ref": f"#/$defs/{name}.options"})}}
            rules.append({"if": {"properties": {"dataset": {"const": name}}, "required": ["dataset"]}, "then": then})
    return rules


def _block(name: str, model: type[BaseModel]) -> Json:
    return {**_or_null({"$ref": f"#/$defs/{name}"}), "description": (model.__doc__ or "").strip()}


def _or_null(schema: Json) -> Json:
    """A map, a reference to one, or nothing."""
    return {"anyOf": [schema, _REFERENCE, {"type": "null"}]}


def _model(model: type[BaseModel], prefix: str, defs: Json) -> Json:
    """Schema of one model; the models inside it are put into ``defs`` as ``prefix.Name``."""
    schema = model.model_json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
    for name, inner in schema.pop("$defs", {}).items():
        defs[f"{prefix}.{name}"] = _object(inner)
    return _object(schema)


def _object(schema: Json) -> Json:
    """A model's schema without titles, whose values may also be references."""
    out: Json = _untitled(schema)
    if "properties" in out:
        out["properties"] = {name: _referable(value) for name, value in out["properties"].items()}
    return out


def _untitled(value: Any) -> Any:
    """Without pydantic's titles, which repeat the field's name; a field that is called title stays."""
    if isinstance(value, list):
        return [_untitled(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: child for key, child in value.items() if not (key == "title" and isinstance(child, str))}
    return {
        key: {name: _untitled(item) for name, item in child.items()} if key == "properties" else _untitled(child)
        for key, child in kept.items()
    }


def _referable(schema: Json) -> Json:
    """Allow a reference instead of the value, and inside lists and free maps."""
    body = {key: value for key, value in schema.items() if key not in _KEEP}
    about = {key: schema[key] for key in _KEEP if key in schema}
    for key in ("items", "additionalProperties"):
        if isinstance(body.get(key), dict):
            body[key] = _referable(body[key])
    if "anyOf" in body:
        body = {**body, "anyOf": [{**branch, **_inside(branch)} for branch in body["anyOf"]]}
    plain_text = body == {"type": "string"} or not body
    if plain_text:
        return {**body, **about}
    branches = [*body["anyOf"], _REFERENCE] if set(body) == {"anyOf"} else [body, _REFERENCE]
    return {"anyOf": branches, **about}


def _inside(schema: Json) -> Json:
    return {
        key: _referable(schema[key]) for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)
    }


if __name__ == "__main__":
    write_schema()
