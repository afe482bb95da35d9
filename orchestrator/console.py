"""What the command line says, and where: results on stdout, everything else on stderr, errors in one place.

One document per ``--json`` command goes to stdout; progress, notes and error panels go to stderr. Rich is used on a
terminal; piped output is plain lines. ``NO_COLOR`` and ``--no-color`` are respected.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moe.errors import MoepipeError

if TYPE_CHECKING:
    from rich.console import Console

_PIPED_WIDTH = 160


def make_console(stderr: bool = False, file: IO[str] | None = None) -> Console:
    """A console for stdout or stderr; wide and without wrapping tricks when it is not a terminal."""
    from rich.console import Console

    stream = file or (sys.stderr if stderr else sys.stdout)
    piped = not stream.isatty()
    width = _PIPED_WIDTH if piped and "COLUMNS" not in os.environ else None
    return Console(file=stream, width=width, highlight=False, soft_wrap=False, emoji=False)


def out() -> Console:
    """Console of the results (stdout). Made anew each time: tests and pagers swap the streams."""
    return make_console()


def err() -> Console:
    """Console of notes, progress and errors (stderr)."""
    return make_console(stderr=True)


def note(message: str, style: str = "") -> None:
    """One line on stderr, as it is (no markup)."""
    err().print(message, style=style or None, markup=False)


def say(*lines: str) -> None:
    """Lines of a result, to stdout, as they are."""
    console = out()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def emit_json(document: Any) -> None:
    """Write one JSON document to stdout. Paths and dataclasses become strings and maps."""
    json.dump(document, sys.stdout, indent=2, default=_jsonable, allow_nan=False)
    sys.stdout.write("\n")


def _jsonable(value: Any) -> Any:
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None, all the way down: JSON has no such numbers."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table to stdout. Columns whose name ends with ``>`` are right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = out()
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell), style=_STATE_STYLES.get(str(cell), "")) for cell in row))
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    sys.stdout.write("\n".join(line for line in lines if line) + "\n")


_STATE_STYLES = {
    "hit": "green",
    "finished": "green",
    "succeeded": "green",
    "ok": "green",
    "miss": "yellow",
    "running": "cyan",
    "warning": "yellow",
    "failed": "bold red",
    "blocked": "red",
}


def show_error(error: MoepipeError, as_json: bool = False) -> int:
    """Tell a person (and, with ``as_json``, a program) what is wrong; return the exit code.

    The panel goes to stderr: message, what to do, and the code whose section in ``docs/errors.md`` says more.
    """
    if as_json:
        emit_json({"error": describe_error(error)})
    console = err()
    if not console.is_terminal:
        lines = [f"error [{error.code}]: {error.message}"]
        if error.hint:
            lines.append(f"  fix: {error.hint}")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
        return error.exit_code
    from rich.panel import Panel
    from rich.text import Text

    body = Text(error.message)
    if error.hint:
        body.append("\n\n")
        body.append(error.hint, style="cyan")
    console.print(Panel(body, title=f"error: {error.code}", title_align="left", border_style="red"))
    return error.exit_code


def describe_error(error: MoepipeError) -> dict[str, Any]:
    """The JSON form of an error; ``problems`` lists those of a pipeline one by one, with their places."""
    told: dict[str, Any] = {"code": error.code, "message": error.message, "hint": error.hint}
    problems = getattr(error, "problems", None)
    if problems:
        told["problems"] = [problem.to_json() for problem in problems]
    return {**told, "exit_code": error.exit_code}


def show_crash(error: BaseException) -> int:
    """One line and the path of a crash log for an exception that nobody foresaw; returns exit code 1."""
    lines = [
        f"time: {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        f"command: {' '.join(sys.argv)}",
        f"python: {sys.version.split()[0]}",
        "",
        *traceback.format_exception(error),
    ]
    with tempfile.NamedTemporaryFile("w", prefix="moepipe-crash-", suffix=".log", delete=False) as file:
        file.write("\n".join(lines))
    note(
        f"error [internal]: {type(error).__name__}: {error}. This is a bug in moepipe; details: {file.name}", "bold red"
    )
    return 1


def interactive() -> bool:
    """Progress may redraw: stderr is a terminal that is not a dumb one."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def seconds(value: float | None) -> str:
    """A duration for people: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``; ``-`` when unknown."""
    if value is None:
        return "-"
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 59.5:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes for people: ``17 B``, ``3.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def short_path(path: Path) -> str:
    """``path`` relative to the working directory when it is below it, else as it is."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
