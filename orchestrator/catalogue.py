"""What there is to build pipelines from, with one line each. Nothing is imported: titles are first docstring lines."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

from moe.registry import Registry

KINDS = ("pipelines", "stages", "algorithms", "adaptation", "datasets")


def registries() -> dict[str, Registry]:
    """Kind -> registry."""
    from orchestrator.stages.base import STAGES
    from workers.datasets.base import DATASETS

    algorithms = Registry("moe.algorithms", noun="algorithm", entry_point="moepipe.algorithms")
    adaptation = Registry("moe.adaptation", noun="adaptation", entry_point="moepipe.adaptation")
    return {"stages": STAGES, "algorithms": algorithms, "adaptation": adaptation, "datasets": DATASETS}


def entries(kind: str) -> list[dict[str, Any]]:
    """Names and titles of one of :data:`KINDS`, sorted by name."""
    if kind == "pipelines":
        return [_pipeline(path) for path in sorted(Path("pipelines").glob("**/*.yaml"))]
    registry = registries()[kind]
    return [{"name": name, "title": _title(registry.module_name(name))} for name in registry.names()]


def _title(module: str) -> str:
    """First line of a module's docstring, read from its source; without the leading ``name:``."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    first = text.splitlines()[0] if text else ""
    head, separator, rest = first.partition(": ")
    return rest if separator and head.strip("`") == module.rpartition(".")[2] else first


def _pipeline(path: Path) -> dict[str, Any]:
    """A pipeline's path and the first comment or its ``description``."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("description:"):
            return {"name": str(path), "title": line.partition(":")[2].strip().strip("\"'")}
    return {"name": str(path), "title": ""}
