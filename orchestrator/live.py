"""Progress on stderr: a table that redraws on a terminal, plain lines when piped.

Piped, one line for each change of state and at most one line per running member every ten seconds: enough for a log,
little enough for continuous integration. ``--quiet`` uses neither.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from orchestrator.console import err, interactive, seconds
from orchestrator.events import Event
from orchestrator.runview import DONE, NodeView, RunView, StageSummary

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.progress_bar import ProgressBar
    from rich.table import Table

LINE_EVERY_S = 10.0
_MEMBERS_SHOWN = 8
_BAR = 24
_MARKS = {
    "waiting": ("·", "dim"),
    "running": ("▶", "cyan"),
    "hit": ("✓", "green"),
    "finished": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "stopped": ("■", "yellow"),
    "skipped": ("-", "dim"),
}


class Display(Protocol):
    """What shows progress: a context manager that is called with every event."""

    view: RunView

    def __enter__(self) -> Display:
        """Begin."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Leave the terminal as it should be."""
        ...

    def __call__(self, event: Event) -> None:
        """Take one event in; cheap."""
        ...

    def note(self, message: str) -> None:
        """Say one line beside the progress."""
        ...


def make_display(nodes: Iterable[str], quiet: bool = False) -> Display:
    """The display that fits where stderr goes."""
    if quiet:
        return Silent(nodes)
    return Live(nodes) if interactive() else Lines(nodes)


def numbers(values: dict[str, float], limit: int = 3) -> str:
    """``loss 0.4312  acc 0.912``: the first few numbers of a member."""
    return "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:limit])


class Silent:
    """Counts, says nothing but notes."""

    def __init__(self, nodes: Iterable[str]) -> None:
        self.view = RunView(nodes)
        self._lock = threading.Lock()

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def __call__(self, event: Event) -> None:
        """See :class:`Display`."""
        with self._lock:
            self.view.add(event)

    def note(self, message: str) -> None:
        """See :class:`Display`."""
        err().print(message, markup=False, soft_wrap=True)


class Lines(Silent):
    """Plain lines for logs.

    Args:
        nodes: ids of all nodes.
        clock: seconds, monotonic (tests pass their own).
        console: where to; stderr by default.
    """

    def __init__(
        self, nodes: Iterable[str], clock: Callable[[], float] = time.monotonic, console: Console | None = None
    ) -> None:
        super().__init__(nodes)
        self._clock = clock
        self._console = console or err()
        self._told: dict[str, float] = {}
        self._hits = 0

    def note(self, message: str) -> None:
        """See :class:`Display`."""
        self._console.print(message, markup=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        """See :class:`Display`."""
        with self._lock:
            view = self.view.add(event)
            self._say(event, view)

    def _say(self, event: Event, view: NodeView | None) -> None:
        if view is None:
            self._tell_hits()
            return
        if event.kind == "member-hit":
            self._hits += 1
            return
        self._tell_hits()
        if event.kind == "member-started":
            again = f" (attempt {view.attempts})" if view.attempts > 1 else ""
            self._line(view, f"started{again}")
        elif event.kind == "member-progress":
            if self._clock() - self._told.get(view.node, 0.0) >= LINE_EVERY_S:
                left = view.eta(event.time)
                more = f", {seconds(left)} left" if left is not None else ""
                self._line(view, f"{view.done}/{view.total}{more}  {numbers(view.values)}".rstrip())
        elif event.kind == "member-finished":
            spent = event.data.get("seconds")
            done, everything = self.view.count(*DONE), len(self.view.nodes)
            self._line(view, f"finished in {seconds(spent)}  [{done}/{everything}]")
        elif event.kind == "member-log" and event.data.get("warning"):
            self._line(view, f"warning: it {event.data['message']}")
        elif event.kind == "member-failed":
            what = "will be tried again" if view.state == "waiting" else view.state
            self._line(view, f"{what}: {view.error}")

    def _line(self, view: NodeView, text: str) -> None:
        self._told[view.node] = self._clock()
        self.note(f"{view.node}: {text}")

    def _tell_hits(self) -> None:
        if self._hits:
            self.note(f"{self._hits} of {len(self.view.nodes)} members are hits: done earlier, taken from the store")
            self._hits = 0


class Live(Silent):
    """A table of stages with the running members below, redrawn four times a second."""

    def __init__(self, nodes: Iterable[str], console: Console | None = None) -> None:
        super().__init__(nodes)
        from rich.live import Live as RichLive

        self._console = console or err()
        self._live = RichLive(
            get_renderable=self.render, console=self._console, refresh_per_second=4, transient=False, auto_refresh=True
        )

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.refresh()
        self._live.stop()

    def note(self, message: str) -> None:
        """See :class:`Display`."""
        self._live.console.print(message, markup=False)

    def __call__(self, event: Event) -> None:
        """See :class:`Display`."""
        super().__call__(event)
        if event.kind == "member-log" and event.data.get("warning"):
            self.note(f"{event.node}: warning: it {event.data['message']}")

    def render(self) -> Group:
        """The whole display, as it is now."""
        from rich.console import Group

        with self._lock:
            now = time.time()
            parts: list[RenderableType] = [self._stages(now)]
            running = sorted(self.view.running(), key=lambda view: view.fraction)
            if running:
                parts.append(self._members(running, now))
            return Group(*parts)

    def _stages(self, now: float) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("stage", "", "members", "time", "left", "last"):
            table.add_column(name, justify="right" if name in ("members", "time", "left") else "left", no_wrap=True)
        for stage in self.view.stages:
            mark, style = _MARKS[stage.state]
            table.add_row(
                Text(f"{mark} {stage.name}", style=style),
                _bar(stage.fraction, stage.state),
                _members_cell(stage),
                seconds(stage.seconds(now)),
                seconds(stage.eta(now)) if stage.state == "running" else "",
                numbers(stage.values),
            )
        return table

    def _members(self, running: list[NodeView], now: float) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for view in running[:_MEMBERS_SHOWN]:
            count = f"{view.done}/{view.total}" if view.total else ""
            left = seconds(view.eta(now)) if view.total else ""
            words = numbers(view.values) or view.log
            table.add_row(f"  {view.node}", _bar(view.fraction, "running"), count, left, words[:60])
        if len(running) > _MEMBERS_SHOWN:
            table.add_row(f"  and {len(running) - _MEMBERS_SHOWN} more")
        return table


def _bar(fraction: float, state: str) -> ProgressBar:
    from rich.progress_bar import ProgressBar

    return ProgressBar(
        total=1.0,
        completed=fraction,
        width=_BAR,
        complete_style="red" if state == "failed" else "cyan",
        finished_style="green",
    )


def _members_cell(stage: StageSummary) -> str:
    """``3/6``, with hits and failures named."""
    extra = [f"{stage.count('hit')} hit"] if stage.count("hit") else []
    if stage.count("failed"):
        extra.append(f"{stage.count('failed')} failed")
    return f"{stage.count(*DONE)}/{len(stage.members)}" + (f" ({', '.join(extra)})" if extra else "")
