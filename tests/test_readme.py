"""Texts do not lie: every command, option, make target and link in README.md, CONTRIBUTING.md and docs/ exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from orchestrator.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
COMMAND = typer.main.get_command(app)
# A command ends with the line, a closing back-quote, a comment or another command.
MENTION = re.compile(r"(?:^|[`$(>|;&]\s*|\bthen )moepipe ((?:'[^']*'|\"[^\"]*\"|\\\n|[^`\n#|;&)])*)", re.MULTILINE)


def mentions(page):
    """Every ``moepipe ...`` in back-quotes or at the beginning of a line of a code block."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```(?:sh|bash|console|shell|)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    inline = re.findall(r"`(moepipe [^`]+)`", text)
    for source in (blocks.replace("$ ", ""), *inline):
        for match in MENTION.finditer(source):
            yield match[1].replace("\\\n", " ").strip().rstrip(".,:")


def problem(words):
    """What is wrong with a command line, or None."""
    command, rest = COMMAND, list(words)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name == "COMMAND":
            return None
        if name not in command.commands:
            return f"no command {name!r}"
        command = command.commands[name]
    options = {name for item in command.params for name in (*item.opts, *item.secondary_opts)} | {"--help"}
    unknown = [word for word in rest if word.startswith("-") and word.split("=")[0] not in options and word != "-"]
    return f"no option {unknown[0]!r}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist(page):
    wrong = []
    for line in mentions(page):
        try:
            words = shlex.split(line)
        except ValueError as error:
            wrong.append(f"moepipe {line}: {error}")
            continue
        found = problem(words)
        if found:
            wrong.append(f"moepipe {line}: {found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        lost = anchor and target.is_file() and target.suffix == ".md" and anchor not in anchors(target)
        if not target.exists() or lost:
            broken.append(link)
    assert not broken


def anchors(page):
    """Anchors of a page's headings, as code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def test_every_command_is_on_the_page():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    told = {line.split()[0] for line in mentions(ROOT / "docs" / "cli.md") if line and not line.startswith("-")}
    assert set(COMMAND.commands) <= told
    assert all(f"`{name}`" in text for name in ("MOEPIPE_STORE", "MOEPIPE_DATA", "MOEPIPE_PROFILE"))


def test_the_check_finds_mistakes():
    assert problem(["submit", "p.yaml", "--set", "a=1", "--json"]) is None
    assert problem(["submti"]) == "no command 'submti'"
    assert problem(["track", "sync", "RUN", "--urii", "x"]) == "no option '--urii'"


def test_every_page_is_reachable_from_the_index():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {page for page in pages if f"({page})" not in text} == set()
