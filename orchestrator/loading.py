"""YAML file -> PipelineSpec, in this order: ``extends``, the file itself, ``--profile``, ``--set``, references, checks.

Maps merge, everything else replaces. All problems of a phase are reported together, each with file, line, column, field
path, what was expected, what was found and the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from moe.errors import MoepipeError, NotFoundError, nearest
from orchestrator.graph import Graph, assemble
from orchestrator.lint import lint
from orchestrator.overrides import apply_overrides
from orchestrator.positions import Place, Problem, SpecErrors, Tree, found
from orchestrator.references import idle_settings, resolve
from orchestrator.spec import PipelineSpec
from orchestrator.stages.base import StageBase
from orchestrator.validation import validate
from orchestrator.wiring import Draft, bound, stage_for, wiring_problems
from orchestrator.yaml_reader import read_file

MAX_EXTENDS = 50
_TOP_MAPS = ("params", "dataset_options", "tracking")
_STAGE_MAPS = ("inputs", "config", "resources", "retry")


@dataclass(frozen=True)
class Loaded:
    """A pipeline that passed all checks.

    Attributes:
        spec: the specification.
        graph: its expansion.
        files: every file that was read, the pipeline's own first.
        warnings: what lint found that is not an error.
        profiles: names that ``--profile`` accepts.
    """

    spec: PipelineSpec
    graph: Graph
    files: tuple[Path, ...]
    warnings: tuple[Problem, ...]
    profiles: tuple[str, ...]


def load_pipeline(path: str | Path, profile: str | None = None, overrides: Sequence[str] = ()) -> PipelineSpec:
    """Read and check a pipeline.

    Args:
        path: YAML file.
        profile: overlay of the file's ``profiles:`` to merge in.
        overrides: ``path=value`` texts of ``--set``.

    Raises:
        NotFoundError: the file does not exist.
        SpecErrors: everything wrong with it.
    """
    return load(path, profile, overrides).spec


def load(path: str | Path, profile: str | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """Like :func:`load_pipeline`, but also gives the graph and the warnings."""
    reader = _Files()
    tree = reader.read(Path(path))
    if reader.problems:
        raise SpecErrors(str(path), reader.problems)
    problems: list[Problem] = []
    overlays = _take_profiles(tree, problems)
    if profile is not None:
        _apply_profile(tree, overlays, profile, problems)
    problems += apply_overrides(tree, overrides)
    _fill_empty_maps(tree)
    used: set[str] = set()
    defaults = {"scale": PipelineSpec.model_fields["scale"].default, "dataset": None, "dataset_options": {}}
    problems += resolve(tree, defaults, used=used)
    spec, graph = _check(tree, problems)
    if graph is not None:
        found_by_lint = [problem.at(tree) for problem in lint(graph)]
        problems += [problem for problem in found_by_lint if problem.severity == "error"]
        warnings = tuple(problem for problem in found_by_lint if problem.severity != "error")
        warnings += tuple(idle_settings(tree, used))
    if problems or spec is None or graph is None:
        raise SpecErrors(str(path), problems)
    return Loaded(spec, graph, tuple(reader.files), warnings, tuple(sorted(overlays)))


class _Files:
    """Reads a file and what it extends."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.files: list[Path] = []
        self.open: list[Path] = []

    def read(self, path: Path) -> Tree:
        """The file's tree merged over the trees of the files that it extends."""
        self.files.append(path)
        tree = read_file(path)
        entry = tree.value.pop("extends", None)
        if entry is None or entry.value is None:
            return tree
        self.open.append(path.resolve())
        entries = entry.value if isinstance(entry.value, list) else [entry]
        merged = Tree({}, tree.place, tree.key)
        for item in entries:
            base = self._base(item, path)
            if base is not None:
                merge(merged, base)
        self.open.pop()
        merge(merged, tree)
        return merged

    def _base(self, item: Tree, path: Path) -> Tree | None:
        if not isinstance(item.value, str) or not item.value:
            self._fail(item, f"expected the path of a YAML file, found {found(item.value)}.")
            return None
        target = path.parent / item.value
        if target.resolve() in self.open:
            circle = [*self.open[self.open.index(target.resolve()) :], target.resolve()]
            self._fail(item, f"the files extend each other in a circle: {' -> '.join(file.name for file in circle)}.")
            return None
        if len(self.files) >= MAX_EXTENDS:
            self._fail(item, f"more than {MAX_EXTENDS} files extend each other.")
            return None
        try:
            return self.read(target)
        except NotFoundError:
            siblings = [file.name for file in target.parent.glob("*.y*ml")] if target.parent.is_dir() else []
            self._fail(item, f"there is no file {str(target)!r}.", nearest(target.name, siblings))
        except SpecErrors as error:
            self.problems += error.problems
        return None

    def _fail(self, item: Tree, message: str, hint: str = "") -> None:
        self.problems.append(Problem(item.place, "extends", message, hint))


def merge(base: Tree, over: Tree) -> None:
    """Merge ``over`` into ``base`` in place: maps merge key by key, everything else replaces."""
    for name, child in over.value.items():
        old = base.value.get(name)
        if old is not None and isinstance(old.value, dict) and isinstance(child.value, dict):
            merge(old, child)
        else:
            base.value[name] = _copy(child)


def _copy(tree: Tree) -> Tree:
    value = tree.value
    if isinstance(value, dict):
        value = {name: _copy(child) for name, child in value.items()}
    elif isinstance(value, list):
        value = [_copy(child) for child in value]
    return Tree(value, tree.place, tree.key)


def _take_profiles(tree: Tree, problems: list[Problem]) -> dict[str, Tree]:
    """Take ``profiles:`` out of the tree."""
    block = tree.value.pop("profiles", None)
    if block is None or block.value is None:
        return {}
    if not isinstance(block.value, dict):
        problems.append(Problem(block.place, "profiles", f"expected a map of overlays, found {found(block.value)}."))
        return {}
    out: dict[str, Tree] = {}
    for name, overlay in block.value.items():
        path = f"profiles.{name}"
        if overlay.value is None:
            overlay.value = {}
        if not isinstance(overlay.value, dict):
            problems.append(Problem(overlay.place, path, f"expected a map, found {found(overlay.value)}."))
            continue
        out[name] = overlay
        for key in ("extends", "profiles"):
            if key in overlay.value:
                problems.append(Problem(overlay.value.pop(key).key, f"{path}.{key}", "a profile cannot have this key."))
    return out


def _apply_profile(tree: Tree, overlays: Mapping[str, Tree], profile: str, problems: list[Problem]) -> None:
    overlay = overlays.get(profile)
    if overlay is None:
        hint = nearest(profile, overlays) if overlays else "The pipeline has no profiles."
        problems.append(Problem(Place("--profile"), "", f"there is no profile {profile!r}.", hint))
        return
    stages, changed = tree.child("stages"), overlay.child("stages")
    if (
        stages is not None
        and changed is not None
        and isinstance(stages.value, dict)
        and isinstance(changed.value, dict)
    ):
        for name in [name for name in changed.value if name not in stages.value]:
            if changed.value[name].child("kind") is None:
                place, path = changed.value.pop(name).key, f"profiles.{profile}.stages.{name}"
                text = f"the pipeline has no stage {name!r} to change, and there is no kind to make one."
                problems.append(Problem(place, path, text, nearest(name, stages.value)))
    merge(tree, overlay)


def _fill_empty_maps(tree: Tree) -> None:
    """``config:`` with nothing (or only comments) below it is an empty map."""
    stages = tree.child("stages")
    blocks = list(stages.value.values()) if stages is not None and isinstance(stages.value, dict) else []
    for block, names in [(tree, _TOP_MAPS), *((block, _STAGE_MAPS) for block in blocks)]:
        for name in names:
            child = block.child(name)
            if child is not None and child.value is None and not child.broken:
                child.value = {}


def _check(tree: Tree, problems: list[Problem]) -> tuple[PipelineSpec | None, Graph | None]:
    """All checks of the final tree; the problems are added to the list."""
    drafts: dict[str, Draft] = {}
    _check_dataset(tree, problems)
    stages = tree.child("stages")
    if stages is not None and isinstance(stages.value, dict):
        for name, block in stages.value.items():
            drafts[name] = _draft(name, block, problems)
    spec, details = validate(PipelineSpec, tree)
    problems += details
    if spec is None or problems:
        problems += [problem.at(tree) for problem in wiring_problems(drafts)]
        return spec, None
    graph, graph_problems = assemble(spec)
    problems += [problem.at(tree) for problem in graph_problems]
    return spec, graph


def _draft(name: str, block: Tree, problems: list[Problem]) -> Draft:
    """Look a stage's kind up and check its config; lenient about the rest, which PipelineSpec reports."""
    kind = block.child("kind")
    if kind is None or not isinstance(kind.value, str) or kind.broken:
        return Draft(name, None, {})
    try:
        stage = stage_for(kind.value)
    except MoepipeError as error:
        problems.append(Problem(kind.place, f"stages.{name}.kind", error.message, error.hint))
        return Draft(name, None, _written_inputs(block))
    config = block.child("config") or Tree({}, block.place, block.key)
    known: StageBase[Any] | None = None if stage.open_ports else stage
    if isinstance(config.value, dict):
        parsed, details = validate(stage.Config, config, ("stages", name, "config"))
        problems += details
        if parsed is not None:
            known, findings = bound(name, stage, parsed)
            here = Tree({"stages": Tree({name: block}, block.place, block.key)}, block.place, block.key)
            problems += [finding.at(here) for finding in findings]
    return Draft(name, known, _written_inputs(block))


def _written_inputs(block: Tree) -> dict[str, list[str | None]]:
    """The inputs' texts; None for what is no text or was reported as broken."""
    inputs = block.child("inputs")
    written = inputs.value if inputs is not None and isinstance(inputs.value, dict) else {}
    return {port: [_text(item) for item in _items(tree)] for port, tree in written.items()}


def _items(tree: Tree) -> list[Tree]:
    return tree.value if isinstance(tree.value, list) else [tree]


def _text(tree: Tree) -> str | None:
    return tree.value if isinstance(tree.value, str) and not tree.broken else None


def _check_dataset(tree: Tree, problems: list[Problem]) -> None:
    """The dataset exists and takes the options."""
    name, options = tree.child("dataset"), tree.child("dataset_options")
    given = options is not None and isinstance(options.value, dict) and bool(options.value)
    if name is None or not isinstance(name.value, str) or name.broken:
        if given and options is not None and (name is None or name.value is None):
            problems.append(Problem(options.key, "dataset_options", "there are options, but no dataset."))
        return
    from workers.datasets.base import DATASETS

    try:
        module = DATASETS.load(name.value)
    except MoepipeError as error:
        problems.append(Problem(name.place, "dataset", error.message, error.hint))
        _silence(tree, "${dataset")
        return
    model: type[BaseModel] = module.Options
    if options is not None and isinstance(options.value, dict):
        details = validate(model, options, ("dataset_options",))[1]
        problems += details
        if details:
            _silence(tree, "${dataset_options")


def _silence(tree: Tree, reference: str) -> None:
    """Mark what stands where a wrong dataset or its options are referred to as told already."""
    if tree.via.startswith(reference):
        tree.broken = True
    if isinstance(tree.value, dict | list):
        for child in tree.value.values() if isinstance(tree.value, dict) else tree.value:
            _silence(child, reference)
