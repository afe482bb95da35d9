import sys
import time

import pytest

from moe.errors import NotFoundError
from orchestrator import codedigest
from orchestrator.codedigest import code_digests

STAGE = '''
"""A stage."""
import json
from typing import TYPE_CHECKING
from . import helper
if TYPE_CHECKING:
    from otherpack import typed

def run():
    """Say it."""
    import {name}.late
    return 1  # one
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    name = f"pack{time.monotonic_ns()}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "stage.py").write_text(STAGE.format(name=name))
    (folder / "helper.py").write_text("X = 1\n")
    (folder / "late.py").write_text("raise SystemExit('importing this would end the process')\n")
    (folder / "unused.py").write_text("Y = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(codedigest, "_parsed", {})
    codedigest._package_path.cache_clear()
    codedigest.source_file.cache_clear()
    return folder


def test_the_closure_follows_imports_without_importing(package):
    found = code_digests([f"{package.name}.stage"])
    assert sorted(found) == sorted(
        f"{package.name}/{file}" for file in ("__init__.py", "stage.py", "helper.py", "late.py")
    )
    assert package.name not in sys.modules


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("return 1  # one", "return 1  # the number one", False),
        ('"""Say it."""', '"""Say something else."""', False),
        ('"""A stage."""', '"""Another docstring."""\n\n\n', False),
        ("return 1  # one", "return 2", True),
        ("import json", "import json, math", True),
    ],
)
def test_only_code_counts(package, old, new, changes):
    before = code_digests([f"{package.name}.stage"])
    path = package / "stage.py"
    path.write_text(path.read_text().replace(old, new))
    assert (code_digests([f"{package.name}.stage"]) != before) is changes


def test_a_change_deep_in_the_closure_counts_and_one_outside_does_not(package):
    before = code_digests([f"{package.name}.stage"])
    (package / "unused.py").write_text("Y = 2\n")
    assert code_digests([f"{package.name}.stage"]) == before
    (package / "helper.py").write_text("X = 22\n")
    after = code_digests([f"{package.name}.stage"])
    assert {name for name in after if after[name] != before[name]} == {f"{package.name}/helper.py"}


def test_plumbing_does_not_count():
    found = code_digests(["tests.support.toy_stages.sum"])
    assert "tests/support/toy_stages/_files.py" in found
    assert not any(
        name.startswith(("orchestrator/", "moe/errors", "moe/registry", "workers/context")) for name in found
    )


def test_a_module_that_is_not_there():
    with pytest.raises(NotFoundError, match=r"moe\.nothing"):
        code_digests(["moe.nothing"])


def test_all_stages_within_the_budget():
    from orchestrator.stages.base import STAGES

    modules = [STAGES.module_name(name) for name in STAGES.names()] + ["workers.datasets.base"]
    code_digests(modules)
    times = []
    for _ in range(5):
        start = time.thread_time()  # the machine may be busy with other things
        code_digests(modules)
        times.append(time.thread_time() - start)
    assert min(times) < 0.15


def test_digests_are_remembered_and_a_spoilt_memory_costs_nothing_but_time(package, tmp_path, monkeypatch):
    first = code_digests([f"{package.name}.stage"])
    (memory,) = (tmp_path / "cache" / "moepipe").glob("code-*.json")
    monkeypatch.setattr(codedigest, "_parsed", {})
    monkeypatch.setattr(codedigest.ast, "parse", lambda source: pytest.fail("was parsed again"))
    assert code_digests([f"{package.name}.stage"]) == first
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(codedigest, "_parsed", {})
    memory.write_text("[1, 2")
    assert code_digests([f"{package.name}.stage"]) == first
