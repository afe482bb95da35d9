"""Which papers a run stands on: ``moepipe cite RUN``.

Algorithms, adaptation methods and data sets name their papers in their own files (the paragraph ``Paper:`` of the
docstring, the ``citation`` of a data set's record); their arXiv numbers are looked up in
:mod:`orchestrator.bibliography`. So a method that is added as one file is cited without being listed here.
Nothing is imported but the records of data sets: docstrings are read from the sources.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe.errors import MoepipeError
from moe.registry import Registry
from orchestrator.bibliography import BY_ARXIV, BY_KEY, Paper
from orchestrator.compare_read import RunFacts, read_run
from orchestrator.runs import Run

_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
_PAPER = re.compile(
    r"(?:Paper|Papers|Reference|References): (.*?)(?=Public code|Official repository|Equation|\n\n|\Z)", re.S
)
# Kinds of stages whose algorithm is not in their config.
_KINDS: Mapping[str, str] = {
    "split": "meta_dmoe",
    "features": "meta_dmoe",
    "aggregate": "meta_dmoe",
    "distill": "meta_dmoe",
    "jetpack_": "jetpack",
    "m2mkd_": "m2mkd",
    "text_split": "emoe",
    "text_search": "emoe",
    "text_merge": "emoe",
}
_PROTOCOLS = {"sweep": "gulrajani2021domainbed"}
# Beginning of a backbone's name, without the package before the colon -> key.
_BACKBONES = (
    ("vit_small_focus", ("dosovitskiy2021vit", "oquab2024dinov2")),
    ("deit", ("touvron2021deit",)),
    ("vmoe", ("riquelme2021vmoe",)),
    ("jetvit", ("dosovitskiy2021vit",)),
    ("vit", ("dosovitskiy2021vit",)),
    ("resnet", ("he2016resnet",)),
    ("resnext", ("he2016resnet",)),
    ("wide_resnet", ("he2016resnet",)),
    ("densenet", ("huang2017densenet",)),
    ("convnext", ("liu2022convnext",)),
    ("mobilenet_v2", ("sandler2018mobilenetv2",)),
    ("bert", ("devlin2019bert",)),
    ("llama", ("touvron2023llama",)),
)
# Parts of a backbone that are a method of their own.
_PARTS = {"gmoe": "li2023gmoe", "emoe": "qiu2024emoe", "vmoe": "riquelme2021vmoe", "jetvit": "zhu2024jetpack"}
# Words of a data set's citation -> key.
_DATA = (
    ("LeCun et al. 1998", "lecun1998mnist"),
    ("Alpaydin", "alpaydin1998optdigits"),
    ("Duin 1998", "duin1998mfeat"),
    ("Ganin et al. 2016", "ganin2016dann"),
    ("WILDS", "koh2021wilds"),
    ("Adaptive Risk Minimization", "zhang2021arm"),
    ("NeurIPS 2021", "zhang2021arm"),
    ("Xiao et al. 2017", "xiao2017fashion"),
    ("DomainBed", "gulrajani2021domainbed"),
    ("Arjovsky et al. 2019", "arjovsky2019irm"),
    ("Krizhevsky 2009", "krizhevsky2009cifar"),
)


@dataclass
class Citation:
    """A paper and what in the run it stands for."""

    paper: Paper
    used: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self.paper), "for": list(self.used), "bibtex": self.paper.bibtex()}


def citations(run: RunFacts) -> list[Citation]:
    """The papers of a run, methods first, each once."""
    found: dict[str, Citation] = {}
    for what, paper in _every(run):
        entry = found.setdefault(paper.key, Citation(paper))
        if what not in entry.used:
            entry.used.append(what)
    return list(found.values())


def complete(run: Run) -> RunFacts:
    """The facts of a run with all defaults of its stages' settings; as they were written where this version cannot."""
    from orchestrator.graph import build_graph

    facts = read_run(run)
    with suppress(MoepipeError):
        views = build_graph(run.spec()).stages
        stages = {
            name: replace(stage, config=views[name].config.model_dump(mode="json")) if name in views else stage
            for name, stage in facts.stages.items()
        }
        return replace(facts, stages=stages)
    return facts


def _every(run: RunFacts) -> Iterator[tuple[str, Paper]]:
    algorithms = dict.fromkeys(name for kind, config in _stages(run) for name in _algorithms(kind, config))
    for name in algorithms:
        yield from _of_module("algorithm", name, "moe.algorithms", "moepipe.algorithms")
    adaptations = dict.fromkeys(name for _, config in _stages(run) for name in _adaptations(config))
    for name in adaptations:
        yield from _of_module("adaptation", name, "moe.adaptation", "moepipe.adaptation")
    for kind, _ in _stages(run):
        if kind in _PROTOCOLS:
            yield "protocol DomainBed", BY_KEY[_PROTOCOLS[kind]]
    for _, config in _stages(run):
        for spec in _backbones(config):
            yield from _of_backbone(spec)
    datasets = dict.fromkeys(name for kind, config in _stages(run) for name in _datasets(kind, config))
    for name in datasets:
        yield from _of_dataset(name)


def _stages(run: RunFacts) -> list[tuple[str, Mapping[str, Any]]]:
    return [(stage.kind, stage.config) for stage in run.stages.values()]


def _algorithms(kind: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Names of algorithms' files."""
    from workers.domainbed.algorithms import OFFICIAL

    for prefix, name in _KINDS.items():
        if kind == prefix or (prefix.endswith("_") and kind.startswith(prefix)):
            yield name
    named = config.get("algorithm")
    if isinstance(named, Mapping):
        named = named.get("name") or named.get("algorithm")
    if kind == "train":
        yield str(named or "erm")
    elif isinstance(named, str):
        yield named
    preset = config.get("preset")
    if isinstance(preset, str):
        yield preset.partition("/")[0]
    own = config.get("methods") or {}
    for name in config.get("algorithms") or ():
        spec = own.get(name) or {}
        yield str(spec.get("algorithm") or OFFICIAL.get(name, name.lower()))


def _adaptations(config: Mapping[str, Any]) -> Iterator[str]:
    for kinds in (config.get("adaptations") or {}).values():
        yield from kinds


def _backbones(config: Any) -> Iterator[Mapping[str, Any]]:
    """Everything called ``backbone`` in a config, at any depth; text models are named by ``model``."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "backbone" and isinstance(value, Mapping):
                yield value
            elif key in ("backbone", "model") and isinstance(value, str):
                yield {"name": value}
            else:
                yield from _backbones(value)


def _datasets(kind: str, config: Mapping[str, Any]) -> Iterator[str]:
    from workers.domainbed.environments import REGISTRY_NAMES

    if kind in ("prepare", "text_prepare") and config.get("dataset"):
        yield str(config["dataset"])
    if kind == "sweep":
        yield from (str(REGISTRY_NAMES.get(name, name)) for name in config.get("datasets") or ())
    for options in (config.get("options"), config.get("dataset_options")):
        if isinstance(options, Mapping) and isinstance(options.get("source"), str):
            yield options["source"]


def _of_module(noun: str, name: str, package: str, group: str) -> Iterator[tuple[str, Paper]]:
    if name == "erm":
        yield "algorithm erm", BY_KEY["vapnik1998"]
        return
    text = _docstring(Registry(package, noun=noun, entry_point=group), name)
    for part in _PAPER.findall(text):
        for number in dict.fromkeys(_ARXIV.findall(part)):
            yield f"{noun} {name}", BY_ARXIV.get(number) or _unknown(number, f"Paper of {noun} {name}")


def _docstring(registry: Registry, name: str) -> str:
    """Of the module that implements ``name``; empty when there is none."""
    try:
        spec = importlib.util.find_spec(registry.module_name(name))
    except (MoepipeError, ImportError):
        return ""
    if spec is None or spec.origin is None:
        return ""
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def _unknown(number: str, title: str) -> Paper:
    return Paper(f"arxiv{number.replace('.', '')}", "", title, 2000 + int(number[:2]), "", number, "misc")


def _of_backbone(spec: Mapping[str, Any]) -> Iterator[tuple[str, Paper]]:
    name = str(spec.get("name") or "")
    short = name.rpartition(":")[2].lower()
    for start, keys in _BACKBONES:
        if short.startswith(start):
            for key in keys:
                yield f"backbone {name}", BY_KEY[key]
            break
    for part, key in _PARTS.items():
        if spec.get(part):
            yield f"backbone part {part}", BY_KEY[key]


def _of_dataset(name: str) -> Iterator[tuple[str, Paper]]:
    from workers.datasets.base import DATASETS
    from workers.texts.base import TEXTS

    registry = DATASETS if name in DATASETS.names() else TEXTS if name in TEXTS.names() else None
    if registry is None:
        return
    text = str(getattr(getattr(registry.load(name), "INFO", None), "citation", ""))
    known = list(dict.fromkeys(key for words, key in _DATA if words in text))
    numbers = _ARXIV.findall(text + _docstring(registry, name))
    known += [BY_ARXIV[number].key for number in numbers if number in BY_ARXIV]
    for key in dict.fromkeys(known):
        yield f"data set {name}", BY_KEY[key]
    if not known and text and not text.startswith("ours"):
        year = re.search(r"\b(19|20)\d\d\b", text)
        key = re.sub(r"[^a-z0-9]", "", name.lower())
        yield f"data set {name}", Paper(f"data{key}", "", text, int(year.group()) if year else 0, kind="misc")
