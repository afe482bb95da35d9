"""What a field, stage kind, dataset or algorithm is, from the descriptions in the code: ``moepipe explain PATH``.

The models are the only source: type, bounds, default and text of a field stand in its pydantic declaration, presets in
a ``PRESETS`` table of the module that declares the config.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from pydantic import BaseModel

from moe.errors import SpecError, nearest
from moe.registry import Registry
from orchestrator.field_docs import FieldDoc, Presets, inside, model_fields, presets_of
from orchestrator.spec import PipelineSpec, PromotionSpec, Resources, Retry, StageSpec, TrackingSpec
from orchestrator.stages.base import STAGES, StageBase
from orchestrator.wiring import stage_for

_BLOCKS: Mapping[str, type[BaseModel]] = {
    "resources": Resources,
    "retry": Retry,
    "tracking": TrackingSpec,
    "promotion": PromotionSpec,
}
_CATALOGUES = {
    "datasets": Registry("workers.datasets", noun="dataset", entry_point="moepipe.datasets"),
    "algorithms": Registry("moe.algorithms", noun="algorithm", entry_point="moepipe.algorithms"),
    "adaptation": Registry("moe.adaptation", noun="adaptation", entry_point="moepipe.adaptation"),
}
_FILE_KEYS = {
    "extends": "YAML file or files, relative to this one, that it is merged over (maps merge, the rest replaces).",
    "profiles": "Overlays by name, chosen with --profile NAME: maps merge, the rest replaces.",
}


@dataclass(frozen=True)
class Explanation:
    """The answer to one path.

    Attributes:
        path: what was asked.
        doc: a few sentences.
        fields: what is below it, or the field itself.
        more: paths that say more.
    """

    path: str
    doc: str
    fields: tuple[FieldDoc, ...] = ()
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.path or "pipeline", self.doc, *(str(item) for item in self.fields)]
        more = [f"More: {', '.join(self.more)}"] if self.more else []
        return "\n\n".join(part for part in [*parts, *more] if part) + "\n"

    def to_json(self) -> dict[str, Any]:
        """JSON form for ``--json``."""
        return asdict(self)


def explain(path: str = "") -> Explanation:
    """Explain ``stages.distill``, ``stages.distill.config.inner_lr``, ``resources``, ``datasets.camelyon17``, ...

    Raises:
        SpecError: nothing has that path; the nearest name is suggested.
    """
    parts = [part for part in path.strip().strip(".").split(".") if part]
    if not parts or parts == ["pipeline"]:
        return _pipeline()
    first, rest = parts[0], parts[1:]
    if first == "stages":
        return _stages(path, rest)
    if first in _BLOCKS:
        return _model(path, _BLOCKS[first], rest)
    if first in _CATALOGUES:
        return _catalogue(path, first, rest)
    if first in _FILE_KEYS and not rest:
        return Explanation(path, _FILE_KEYS[first])
    if first in PipelineSpec.model_fields:
        more = ("datasets",) if first in ("dataset", "dataset_options") else ()
        found = _model(path, PipelineSpec, parts)
        return Explanation(path, found.doc, found.fields, more)
    raise _unknown(path, first, _roots())


def paths() -> list[str]:
    """Paths that :func:`explain` knows, for completion; no stage module is imported."""
    catalogues = [f"{name}.{item}" for name, registry in _CATALOGUES.items() for item in registry.names()]
    return [*_roots(), *(f"stages.{kind}" for kind in STAGES.names()), *catalogues]


def _roots() -> list[str]:
    return list(dict.fromkeys([*PipelineSpec.model_fields, *_FILE_KEYS, *_BLOCKS, *_CATALOGUES]))


def _unknown(path: str, part: str, allowed: Sequence[str]) -> SpecError:
    return SpecError(f"There is nothing to explain at {path!r}: no {part!r}.", nearest(part, allowed))


def _pipeline() -> Explanation:
    fields = (
        *model_fields(PipelineSpec),
        *(FieldDoc(k, "file only", "optional", "", v) for k, v in _FILE_KEYS.items()),
    )
    return Explanation("", "The top of a pipeline file.", fields, ("stages", *_BLOCKS, *_CATALOGUES))


def _stages(path: str, rest: list[str]) -> Explanation:
    kinds = STAGES.names()
    if not rest:
        doc = f"The stages by name. Kinds: {', '.join(kinds)}."
        return Explanation(path, doc, tuple(model_fields(StageSpec)), tuple(f"stages.{kind}" for kind in kinds))
    kind, below = rest[0], rest[1:]
    if kind not in kinds:
        raise _unknown(path, kind, kinds)
    stage = stage_for(kind)
    if not below:
        return _stage(path, kind, stage)
    if below[0] == "config":
        return _model(path, stage.Config, below[1:])
    if below[0] == "inputs":
        ports = {item.name: item for item in _ports(stage)}
        if len(below) == 1:
            return Explanation(path, f"Inputs of {kind}.", tuple(ports.values()))
        if below[1] not in ports:
            raise _unknown(path, below[1], list(ports))
        return Explanation(path, "", (ports[below[1]],))
    if below[0] in _BLOCKS:
        return _model(path, _BLOCKS[below[0]], below[1:])
    return _model(path, StageSpec, below)


def _stage(path: str, kind: str, stage: StageBase[Any]) -> Explanation:
    doc = _clean(sys.modules[type(stage).__module__].__doc__ or type(stage).__doc__)
    runs = "once for every seed" if stage.per_seed else "once over all seeds"
    gang = " Runs as a gang of resources.workers ranks." if stage.gang else ""
    change = f" Fields that may change in training: {', '.join(stage.changeable)}." if stage.changeable else ""
    made = f"Makes an artifact of kind {stage.output!r}, {runs}.{gang}{change}"
    ports = tuple(FieldDoc(f"inputs.{p.name}", p.type, p.default, p.bounds, p.doc) for p in _ports(stage))
    config = tuple(
        FieldDoc(f"config.{f.name}", f.type, f.default, f.bounds, f.doc, f.presets) for f in model_fields(stage.Config)
    )
    return Explanation(path, f"{doc}\n{made}", (*ports, *config), (f"{path}.config", "resources", "retry"))


def _ports(stage: StageBase[Any]) -> Iterator[FieldDoc]:
    for name, port in stage.inputs.items():
        amount = "one or more artifacts" if port.many else "one artifact"
        need = "optional" if port.optional else "required"
        yield FieldDoc(name, f"{amount} of kind {' or '.join((port.kind, *port.also))}", need, "", port.doc)


def _catalogue(path: str, name: str, rest: list[str]) -> Explanation:
    registry = _CATALOGUES[name]
    if not rest:
        names = registry.names()
        doc = f"Known: {', '.join(names) or 'none'}."
        return Explanation(path, doc, (), tuple(f"{name}.{item}" for item in names))
    if rest[0] not in registry.names():
        raise _unknown(path, rest[0], registry.names())
    module = registry.load(rest[0])
    doc = _clean(module.__doc__)
    if name == "datasets":
        info = module.INFO
        facts = f"Task: {info.task}, {info.num_outputs} outputs, domains by {info.domain_field}, metrics: "
        doc += f"\n{facts}{', '.join(info.metrics)}. Licence: {info.licence}. Options:"
        model = module.Options
    else:
        model = _nested_config(module)
    if model is None:
        return Explanation(path, doc)
    found = _model(path, model, rest[1:])
    return found if rest[1:] else Explanation(path, doc, found.fields, found.more)


def _nested_config(module: types.ModuleType) -> type[BaseModel] | None:
    for name in ("Config", "Method", "Adaptation"):
        found = getattr(module, name, None)
        found = getattr(found, "Config", found)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return None


def _model(path: str, model: type[BaseModel], below: list[str], presets: Presets | None = None) -> Explanation:
    """A model, or a field inside it."""
    presets = presets_of(model) if presets is None else presets
    if not below:
        fields = tuple(model_fields(model, presets))
        more = tuple(f"{path}.{name}" for name, info in model.model_fields.items() if inner_models(info.annotation))
        return Explanation(path, _clean(model.__doc__), fields, more)
    names = {item.name: item for item in model_fields(model, presets)}
    if below[0] not in names:
        raise _unknown(path, below[0], list(names))
    inner = inner_models(model.model_fields[below[0]].annotation)
    if len(below) == 1:
        listed = {f.name: f for kind in reversed(inner) for f in model_fields(kind, inside(presets, below[0]))}
        return Explanation(path, "", (names[below[0]], *listed.values()))
    if not inner:
        raise _unknown(path, below[1], [])
    chosen = next((kind for kind in inner if below[1] in kind.model_fields), inner[0])
    return _model(path, chosen, below[1:], inside(presets, below[0]))


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside a type, if there is exactly one."""
    found = inner_models(annotation)
    return found[0] if len(found) == 1 else None


def inner_models(annotation: Any) -> list[type[BaseModel]]:
    """The models inside a type; several where a field takes one of several forms."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in inner_models(part)]


def _clean(text: str | None) -> str:
    """A docstring for people: without the marks of reStructuredText."""
    lines = [line.strip() for line in (text or "").strip().splitlines()]
    return "\n".join(lines).replace("``", "`").replace(":class:", "").replace(":func:", "").replace(":mod:", "")
