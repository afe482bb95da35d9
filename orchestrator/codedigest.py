"""Digest of the code that decides a stage's result, found by reading imports and without importing anything.

Starting from the stage's module (and the modules its config chooses), the static import closure within our packages is
walked. Each file counts with its syntax tree without docstrings, so that editing a comment, a docstring or the layout
does not throw results away. Plumbing that cannot change a number (errors, contracts, registry, the orchestrator itself)
does not count.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moe.errors import EnvironmentProblem, NotFoundError
from orchestrator.blobs import write_atomic

_PACKAGES = ("moe", "workers", "orchestrator.stages")
_PLUMBING = frozenset({"moe.errors", "moe.registry", "workers.context", "orchestrator.stages.base"})


@dataclass(frozen=True)
class _File:
    """A parsed source file: digest of its tree, and the dotted names it may import."""

    digest: str
    imports: tuple[str, ...]


_FORMAT = f"2-{sys.version_info.major}.{sys.version_info.minor}"
_parsed: dict[str, tuple[tuple[int, int, int], _File]] = {}


def _memory() -> Path:
    """Where the digests of earlier processes are kept; parsing all sources takes some 0.2 s."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "moepipe" / f"code-{_FORMAT}.json"


def _recall() -> None:
    try:
        for path, (mark, digest, imports) in json.loads(_memory().read_bytes()).items():
            _parsed[path] = ((mark[0], mark[1], mark[2]), _File(digest, tuple(imports)))
    except (OSError, ValueError, TypeError):
        _parsed.clear()  # none, or not ours: everything is parsed again


def _remember() -> None:
    kept = {path: (mark, file.digest, file.imports) for path, (mark, file) in _parsed.items() if os.path.exists(path)}
    with suppress(OSError, EnvironmentProblem):  # a home that cannot be written costs time, nothing else
        write_atomic(_memory(), json.dumps(kept).encode())


@cache
def _package_path(top: str) -> tuple[str, ...]:
    spec = importlib.util.find_spec(top)  # of a top-level name: imports nothing
    if spec is None:
        return ()
    if spec.submodule_search_locations is not None:
        return tuple(spec.submodule_search_locations)
    return (os.path.dirname(spec.origin),) if spec.origin else ()


@cache
def source_file(module: str) -> Path | None:
    """The ``.py`` file of a dotted module name, or None when there is none (a built-in, a name that is no module)."""
    top, *rest = module.split(".")
    for base in _package_path(top):
        here = Path(base, *rest)
        for candidate in (here.with_suffix(".py") if rest else Path(base, f"{top}.py"), here / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists of a statement (or of its ``except`` and ``case`` parts); expressions are not entered."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield block
    for name in ("handlers", "cases"):
        for part in getattr(node, name, ()):
            yield part.body


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that the code imports anywhere, also inside functions, except for type checkers."""
    for block in _blocks(node):
        for statement in block:
            if isinstance(statement, ast.Import):
                yield from (alias.name for alias in statement.names)
            elif isinstance(statement, ast.ImportFrom):
                base = statement.module or ""
                if statement.level:
                    parent = package.split(".")
                    parent = parent[: len(parent) - statement.level + 1]
                    base = ".".join([*parent, base] if base else parent)
                yield base
                yield from (f"{base}.{alias.name}" for alias in statement.names)
            elif not _typing_only(statement):
                yield from _imports(statement, package)


def _strip_docstrings(node: ast.AST) -> None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:]
    for block in _blocks(node):
        for statement in block:
            _strip_docstrings(statement)


def _parse(module: str, path: Path) -> _File:
    status = path.stat()
    mark = (status.st_mtime_ns, status.st_ctime_ns, status.st_size)  # ctime: an installer may set the mtime
    known = _parsed.get(str(path))
    if known is not None and known[0] == mark:
        return known[1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = tuple(dict.fromkeys(_imports(tree, package)))
    _strip_docstrings(tree)
    file = _File(hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], names)
    _parsed[str(path)] = (mark, file)
    return file


def _counts(module: str, roots: Iterable[str]) -> bool:
    if module in _PLUMBING:
        return False
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def code_digests(modules: Iterable[str]) -> dict[str, str]:
    """Source path relative to its package's parent (``moe/meta_step.py``) -> digest, over the import closure.

    Args:
        modules: dotted names to start from. The top-level package of a module that is not ours counts as well, so that
            the helpers of a third party's stage are seen.

    Raises:
        NotFoundError: one of ``modules`` has no source file.
    """
    if not _parsed:
        _recall()
    before = dict(_parsed)
    start = list(modules)
    ours = {package.partition(".")[0] for package in _PACKAGES}
    roots = {*_PACKAGES, *(top for name in start if (top := name.partition(".")[0]) not in ours)}
    found: dict[str, str] = {}
    seen: set[str] = set()
    todo = list(start)
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        if not (module in start or _counts(module, roots)):
            continue
        path = source_file(module)
        if path is None:
            if module in start:
                raise NotFoundError(f"The source of module {module} was not found.", "Is its package installed?")
            continue
        record = _parse(module, path)
        parts = module.split(".")
        name = "/".join(parts) + ("/__init__.py" if path.name == "__init__.py" else ".py")
        found[name] = record.digest
        todo.extend(record.imports)
        todo.extend(".".join(parts[:depth]) for depth in range(1, len(parts)))
    if _parsed != before:
        _remember()
    return dict(sorted(found.items()))
