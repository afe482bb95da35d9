"""Python in the texts runs: every ```python block of the docs and of the pages at the top is executed as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    """(page, line, code) of every block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            yield pytest.param(page, line, match[1], id=f"{page.relative_to(ROOT).as_posix()}:{line}")


@pytest.mark.parametrize(("page", "line", "code"), blocks())
def test_the_block_runs(page, line, code, monkeypatch, tmp_path):
    """From the top of the repository, as a reader would; what it writes goes to a folder of its own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    # Line numbers in a traceback are those of the page.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__docs__"})


def test_the_pages_that_teach_python_have_blocks():
    taught = {param.values[0].relative_to(ROOT).as_posix() for param in blocks()}
    assert {"docs/meta_dmoe.md", "docs/pipelines.md"} <= taught
