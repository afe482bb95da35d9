"""Progress display: what is said when, on a terminal and piped."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchestrator.events import Event
from orchestrator.live import Lines, Live, Silent, make_display, numbers
from orchestrator.runview import RunView

NODES = ("experts/seed=0/group=0", "experts/seed=0/group=1", "distill/seed=0")


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines():
    clock, sink = Clock(), io.StringIO()
    display = Lines(NODES, clock, Console(file=sink, width=200))
    return display, clock, sink


def progress(display, clock, node, done, **values):
    display(Event(clock.now, "member-progress", node, {"done": done, "total": 100, "values": values}))


def test_lines_says_each_change_of_state_once(lines):
    display, clock, sink = lines
    display(Event(clock.now, "run-started"))
    display(Event(clock.now, "member-started", NODES[0], {"attempt": 1}))
    display(Event(clock.now, "member-finished", NODES[0], {"digest": "ab", "seconds": 3.0}))
    said = sink.getvalue().splitlines()
    assert said == [f"{NODES[0]}: started", f"{NODES[0]}: finished in 3.0 s  [1/3]"]


def test_lines_says_progress_at_most_every_ten_seconds_per_member(lines):
    display, clock, sink = lines
    for node in NODES[:2]:
        display(Event(clock.now, "member-started", node, {"attempt": 1}))
    sink.truncate(0)
    sink.seek(0)
    for second in range(35):
        clock.now = 100.0 + second
        for node in NODES[:2]:
            progress(display, clock, node, 2 * second, loss=0.5)
    said = sink.getvalue().splitlines()
    assert [sum(line.startswith(node) for line in said) for node in NODES[:2]] == [3, 3]
    assert "20/100" in said[0] and "loss 0.5" in said[0] and "left" in said[0]


def test_lines_counts_hits_instead_of_listing_them(lines):
    display, clock, sink = lines
    for node in NODES:
        display(Event(clock.now, "member-hit", node, {"digest": "ab", "key": "cd"}))
    display(Event(clock.now, "run-finished", data={"status": "finished"}))
    assert sink.getvalue().splitlines() == ["3 of 3 members are hits: done earlier, taken from the store"]


def test_lines_tells_failures_with_what_happens_next(lines):
    display, clock, sink = lines
    display(Event(clock.now, "member-started", NODES[0], {"attempt": 1}))
    display(Event(clock.now, "member-failed", NODES[0], {"decision": "retry", "error": "worker died"}))
    display(Event(clock.now, "member-started", NODES[0], {"attempt": 2}))
    display(Event(clock.now, "member-failed", NODES[0], {"decision": "fail", "error": "boom"}))
    display(Event(clock.now, "member-failed", NODES[2], {"decision": "skip", "error": "upstream"}))
    said = sink.getvalue().splitlines()
    assert "will be tried again: worker died" in said[1]
    assert "started (attempt 2)" in said[2]
    assert "failed: boom" in said[3]
    assert "skipped: upstream" in said[4]


def test_live_draws_stages_members_and_numbers():
    sink = io.StringIO()
    console = Console(file=sink, width=100, force_terminal=True, color_system=None)
    display = Live(NODES, console)
    with display:
        display(Event(1.0, "run-started"))
        display(Event(1.0, "member-hit", NODES[0], {"digest": "ab", "key": "cd"}))
        display(Event(1.0, "member-started", NODES[1], {"attempt": 1}))
        display(Event(3.0, "member-progress", NODES[1], {"done": 25, "total": 100, "values": {"loss": 0.125}}))
        display.note("a note")
        with console.capture() as captured:
            console.print(display.render())
    text = captured.get()
    assert "experts" in text and "distill" in text and "1/2 (1 hit)" in text
    assert NODES[1] in text and "25/100" in text and "loss 0.125" in text
    assert "a note" in sink.getvalue()


def test_quiet_display_says_nothing(capsys):
    display = make_display(NODES, quiet=True)
    assert type(display) is Silent
    with display:
        display(Event(1.0, "member-started", NODES[0], {"attempt": 1}))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert display.view.nodes[NODES[0]].state == "running"


def test_piped_display_is_lines():
    assert type(make_display(NODES)) is Lines  # pytest's stderr is no terminal


def test_view_folds_a_whole_life():
    view = RunView(NODES)
    view.add(Event(10.0, "run-started"))
    view.add(Event(10.0, "member-hit", NODES[0], {"digest": "aa", "key": "k"}))
    view.add(Event(11.0, "member-started", NODES[1], {"attempt": 1}))
    view.add(Event(13.0, "member-progress", NODES[1], {"done": 1, "total": 4, "values": {"loss": 2.0}}))
    view.add(Event(13.0, "member-metrics", NODES[1], {"values": {"val/acc": 0.5}, "step": 1}))
    member = view.nodes[NODES[1]]
    assert member.eta(13.0) == pytest.approx(6.0)
    experts = view.stages[0]
    assert (experts.state, experts.fraction) == ("running", pytest.approx(0.625))
    view.add(Event(19.0, "member-finished", NODES[1], {"digest": "bb", "seconds": 8.0}))
    assert experts.state == "finished" and member.metrics == {"val/acc": 0.5} and member.seconds(99.0) == 8.0
    view.add(Event(20.0, "member-started", NODES[2], {"attempt": 1}))
    view.add(Event(21.0, "run-finished", data={"status": "interrupted"}))
    assert view.nodes[NODES[2]].state == "stopped" and view.status == "interrupted"


def test_time_left_after_a_resume_counts_only_what_this_session_did():
    view = RunView(NODES)
    member = view.nodes[NODES[1]]

    def report(time, done, total=5000):
        view.add(Event(time, "member-progress", NODES[1], {"done": done, "total": total, "values": {}}))

    view.add(Event(100.0, "member-started", NODES[1], {"attempt": 1}))
    report(110.0, 2700)  # of them 2,699 before the resume: nothing is known yet
    assert member.eta(110.0) is None and view.stages[0].eta(110.0) is None
    report(120.0, 2720)
    assert member.eta(120.0) == pytest.approx(2280 / 2)
    assert member.eta(130.0) == pytest.approx(2280 / 2 - 10)
    # Of two members one waits: 1 + 0.456 of a member left, 0.004 done in 20 s.
    assert view.stages[0].eta(120.0) == pytest.approx(20 * 1.456 / 0.004)
    for second in range(400):  # then ten times as fast: the last minutes count
        report(121.0 + second, 2720 + 5 * second)
    assert member.eta(520.0) == pytest.approx((5000 - 4715) / 5, rel=0.01)
    view.add(Event(600.0, "member-started", NODES[1], {"attempt": 2}))
    assert member.eta(600.0) is None
    report(601.0, 1)  # from the start again
    assert member.eta(601.0) == pytest.approx(4999)
    report(602.0, 1, total=10)  # it counts something else
    report(604.0, 3, total=10)
    assert member.eta(604.0) == pytest.approx(7)


def test_numbers_are_short():
    assert numbers({"loss": 0.123456789, "acc": 1.0, "a": 2.0, "b": 3.0}) == "loss 0.1235  acc 1  a 2"
