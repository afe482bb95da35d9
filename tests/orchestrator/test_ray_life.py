"""Silence, notices and slow members: who counts as lost, who is asked to leave, and what is said."""

import io

import pytest
from rich.console import Console

from orchestrator.events import Event
from orchestrator.executors.base import Signal
from orchestrator.executors.pool import Pool, Runner
from orchestrator.executors.ray_life import BEAT_S, Lives
from orchestrator.live import Lines
from orchestrator.stragglers import Stragglers


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def beat(node, who="its process", host="n1", **more):
    return Signal(node, "beat", {"who": who, "attempt": 1, "host": host, **more})


@pytest.fixture
def lives():
    clock = Clock()
    return Lives(30.0, clock), clock


def listen(lives, clock, until, *speakers):
    while clock.now < until:
        clock.now += 2.0
        for node, who in speakers:
            lives.take(beat(node, who))
        lives.listen()


def test_the_silent_one_of_a_gang_counts(lives):
    lives, clock = lives
    for who in ("its process", "rank 0", "rank 1"):
        lives.take(beat("g", who))
    lives.take(beat("a"))
    listen(lives, clock, 30.0, ("g", "its process"), ("g", "rank 0"), ("a", "its process"))
    assert lives.silent() == {}
    listen(lives, clock, 34.0, ("g", "its process"), ("g", "rank 0"), ("a", "its process"))
    assert lives.silent() == {"g": "rank 1 gave no sign of life for 34 s"}
    lives.forget("g")
    assert lives.silent() == {} and lives.hosts("g") == set() and lives.hosts("a") == {"n1"}


def test_who_said_goodbye_may_be_silent(lives):
    lives, clock = lives
    lives.take(beat("g"))
    lives.take(beat("g", "rank 1", "n2"))
    lives.take(beat("g", "rank 1", "n2", ended=True))
    listen(lives, clock, 100.0, ("g", "its process"))
    assert lives.silent() == {} and lives.hosts("g") == {"n1", "n2"}


def test_a_deaf_driver_blames_nobody(lives):
    lives, clock = lives
    lives.take(beat("a"))
    clock.now = 500.0  # the laptop slept
    assert lives.silent() == {}
    lives.listen()
    assert lives.silent() == {}
    listen(lives, clock, 529.0)
    assert lives.silent() == {}
    listen(lives, clock, 533.0)
    assert list(lives.silent()) == ["a"]
    clock.now += BEAT_S + 1
    assert lives.silent() == {}


def test_zero_is_never():
    clock = Clock()
    lives = Lives(0.0, clock)
    lives.take(beat("a"))
    listen(lives, clock, 10_000.0)
    assert lives.silent() == {}


def test_idle_actors_on_a_leaving_node_end():
    ended = []
    pool = Pool(lambda runner: ended.append(runner.actor))
    for name in "abc":
        pool.give(Runner(name, {}))
    pool.end_where(lambda runner: runner.actor in "ac")
    assert ended == ["a", "c"] and pool.take({}).actor == "b"


def test_a_member_slower_than_its_siblings_is_told_once():
    clock = Clock()
    watch = Stragglers(clock)
    for seconds in (20.0, 22.0, 30.0):
        watch.finished("experts", 1.0, seconds)
    assert not watch.due()
    clock.now = 65.0
    assert watch.due() and not watch.due()
    running = [("experts/3", "experts", 1.0, 0.0), ("experts/4", "experts", 4.0, 0.0), ("other", "other", 1.0, 0.0)]
    assert watch.slow(running) == {}
    clock.now = 67.0
    (words,) = watch.slow(running).values()
    assert words.startswith("runs for 67 s; its 3 finished siblings took 22 s (median).")
    assert watch.slow(running) == {}
    clock.now = 300.0
    assert list(watch.slow(running)) == ["experts/4"]  # four times the work of a sibling


def test_the_warning_is_shown():
    sink = io.StringIO()
    display = Lines(["a/seed=0"], Clock(), Console(file=sink, width=200))
    display(Event(1.0, "member-log", "a/seed=0", {"message": "says something"}))
    display(Event(1.0, "member-log", "a/seed=0", {"message": "runs for 67 s.", "warning": True}))
    assert sink.getvalue().splitlines() == ["a/seed=0: warning: it runs for 67 s."]


@pytest.mark.slow
def test_a_process_that_stands_still_is_replaced(ray_local, store, monkeypatch):
    from orchestrator.executors.ray import RayExecutor
    from tests.support.pipelines import go, pipeline

    stages = {"s": {"kind": "sleepy", "config": {"steps": 20, "crash_at": 12, "crash_how": "freeze"}}}
    monkeypatch.setenv("MOEPIPE_STALL_S", "8")
    outcome, run = go(pipeline(stages), store, RayExecutor())
    assert outcome.status == "finished"
    (failed,) = [event.data for event in run.events() if event.kind == "member-failed"]
    assert failed["cause"] == "infrastructure" and "gave no sign of life for" in failed["error"]
    assert "continues at step 10" in run.log_path("s/seed=0").read_text()
