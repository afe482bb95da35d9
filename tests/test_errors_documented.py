"""Every error code has its section in docs/errors.md, with the exit code that the class has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([a-z-]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


def error_classes():
    """(code, exit code or None when inherited, file) of every class with a ``code``, read from the sources."""
    for package in ("moe", "workers", "orchestrator", "serve"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    fields = dict(class_constants(node))
                    if isinstance(fields.get("code"), str):
                        yield fields["code"], fields.get("exit_code"), path.relative_to(ROOT).as_posix()


def class_constants(node):
    """Names and values of constants in a class body."""
    for item in node.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
        value = getattr(item, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            yield target.id, value.value


FOUND = sorted({code: (code, exit_code, path) for code, exit_code, path in error_classes()}.values(), key=str)


def test_there_are_errors_to_document():
    assert {"spec", "busy", "data"} <= {code for code, _, _ in FOUND}


@pytest.mark.parametrize(("code", "exit_code", "path"), FOUND, ids=[code for code, _, _ in FOUND])
def test_code_has_a_section_with_its_exit_code(code, exit_code, path):
    assert code in SECTIONS, f"{path} has the code {code!r}; docs/errors.md has no section '## {code}'"
    if exit_code is not None:
        assert f"Exit code {exit_code}." in SECTIONS[code]


def test_no_section_is_left_over():
    assert set(SECTIONS) == {code for code, _, _ in FOUND}
