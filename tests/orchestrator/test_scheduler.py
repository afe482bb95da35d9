import json
import subprocess
import sys
import threading
import time

import pytest

from moe.errors import InfeasibleError, RunFailed
from orchestrator.capacity import Capacity
from orchestrator.executors.base import Signal
from orchestrator.executors.inline import InlineExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import DIAMOND, go, pipeline


class FakeExecutor:
    """Finishes or fails tasks by a script, with real commits, so that the loop can be driven without processes."""

    def __init__(self, capacity=None, script=None, order="first"):
        self._capacity = capacity
        self.script = script or {}
        self.running = []
        self.log = []
        self.peak = 0
        self.order = order
        self.killed = []
        self.closed = False
        self.expected = []

    def attach(self, stop):
        self.stop = stop

    def capacity(self):
        return self._capacity

    def expect(self, resources, modules):
        self.expected.append(resources.workers)

    def slots(self):
        return None

    def start(self, task):
        self.running.append(task)
        self.log.append(task.node)
        self.peak = max(self.peak, len(self.running))

    def poll(self, timeout, deliver):
        if not self.running:
            time.sleep(min(timeout, 0.01))
            return
        task = self.running[0]
        deliver(Signal(task.node, "started", {"attempt": task.attempt}))
        steps = self.script.get(task.node, [])
        step = steps.pop(0) if steps else "finish"
        if step == "wait":
            time.sleep(0.02)
            return
        self.running.pop(0)
        if step == "finish":
            inner = InlineExecutor()
            inner.attach(threading.Event())
            inner.start(task)
            inner.poll(0, deliver)
        else:
            deliver(Signal(task.node, "failed", {}, step, RunFailed(f"{task.node} failed by script.")))

    def cancel(self, node, kill=False):
        self.killed.append((node, kill))
        self.script[node] = ["infrastructure"]

    def close(self):
        self.closed = True


def failures(run):
    return [(e.node, e.data["decision"], e.data["cause"]) for e in run.events() if e.kind == "member-failed"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("orchestrator.scheduler.backoff_s", lambda count: 0.0)


def test_longest_first(store):
    executor = FakeExecutor()
    go(
        pipeline(
            {
                "a": {"kind": "numbers", "config": {"count": 4}},
                "z": {"kind": "sum", "inputs": {"numbers": "${stages.a}"}},
            }
        ),
        store,
        executor,
    )
    assert executor.log == [f"a/seed=0/item={i}" for i in (3, 2, 1, 0)] + ["z/seed=0"]
    assert executor.closed


def test_the_ledger_limits_what_runs_at_once(store):
    executor = FakeExecutor(Capacity(({"cpus": 2.0},)))
    stages = {"a": {"kind": "numbers", "config": {"count": 6}, "resources": {"cpus": 0.5}}}
    go(pipeline(stages), store, executor)
    assert executor.peak == 4


def test_what_can_never_fit_ends_the_run_before_anything_starts(store):
    executor = FakeExecutor(Capacity(({"cpus": 2.0},)))
    stages = {
        "a": {"kind": "numbers"},
        "b": {"kind": "sum", "inputs": {"numbers": "${stages.a}"}, "resources": {"cpus": 5}},
    }
    runs = RunStore(store)
    run = runs.create(pipeline(stages))
    with pytest.raises(InfeasibleError, match="b/seed=0 asks for 5 cpus"):
        go(pipeline(stages), store, executor, run=run)
    assert executor.log == [] and run.status == "failed" and executor.closed


def test_hits_need_no_capacity(store):
    stages = {"a": {"kind": "numbers", "resources": {"cpus": 5}}}
    go(pipeline(stages), store)
    outcome, _ = go(pipeline(stages), store, FakeExecutor(Capacity(({"cpus": 1.0},))))
    assert outcome.status == "finished" and outcome.hits == 1


@pytest.mark.parametrize(
    ("cause", "attempts", "status"),
    [
        ("user", 1, "failed"),
        ("out_of_memory", 2, "failed"),
        ("infrastructure", 4, "failed"),
        ("preemption", 9, "finished"),
    ],
)
def test_retry_budgets(store, cause, attempts, status):
    executor = FakeExecutor(script={"a/seed=0": [cause] * 8})
    outcome, run = go(pipeline({"a": {"kind": "numbers"}}), store, executor)
    assert len(executor.log) == attempts and outcome.status == status
    told = failures(run)
    assert [what for _, what, _ in told[:-1]] == ["retry"] * (len(told) - 1)
    assert {charged for _, _, charged in told} == {cause}


def test_a_failure_stops_only_what_depends_on_it(store):
    stages = {
        "bad": {"kind": "numbers", "config": {"fail_times": 9}},
        "after": {"kind": "sum", "inputs": {"numbers": "${stages.bad}"}},
        "good": {"kind": "numbers", "config": {"count": 2}},
        "then": {"kind": "sum", "inputs": {"numbers": "${stages.good}"}},
    }
    outcome, run = go(pipeline(stages), store)
    assert outcome.status == run.status == "failed"
    assert set(outcome.artifacts) == {"good/seed=0/item=0", "good/seed=0/item=1", "then/seed=0"}
    assert failures(run) == [("bad/seed=0", "fail", "user"), ("after/seed=0", "skip", "upstream")]
    assert "RuntimeError: item 0 fails on purpose" in outcome.error.message and outcome.error.exit_code == 1
    assert "Traceback" not in str(outcome.error) and "Traceback" in run.log_path("bad/seed=0").read_text()


@pytest.mark.parametrize(("least", "status"), [(0.6, "finished"), (0.7, "failed")])
def test_min_success_leaves_failed_members_out_and_says_so(store, least, status):
    stages = {
        "a": {"kind": "numbers", "config": {"count": 3, "fail_times": 9, "fail_member": 1}, "min_success": least},
        "b": {"kind": "sum", "inputs": {"numbers": "${stages.a}"}},
    }
    outcome, _ = go(pipeline(stages), store)
    assert outcome.status == status
    if status == "finished":
        meta = store.artifact(outcome.artifacts["b/seed=0"]).meta
        assert meta == {"value": 1 + 3, "left_out": {"numbers": ["seed=0/item=1"]}}
    else:
        assert outcome.failures["b/seed=0"].cause == "upstream"


def test_a_port_that_takes_one_artifact_cannot_do_without_it(store):
    stages = {
        "a": {"kind": "numbers", "config": {"count": 2, "fail_times": 9, "fail_member": 1}, "min_success": 0.5},
        "b": {"kind": "square", "inputs": {"number": "${stages.a}"}, "config": {"count": 2}, "min_success": 0.5},
    }
    outcome, _ = go(pipeline(stages), store)
    assert outcome.status == "finished" and set(outcome.failures) == {"a/seed=0/item=1", "b/seed=0/item=1"}


def test_a_timeout_kills_and_is_not_retried(store):
    executor = FakeExecutor(script={"a/seed=0": ["wait"] * 100})
    outcome, _run = go(pipeline({"a": {"kind": "numbers", "timeout_s": 0.1}}), store, executor)
    assert executor.killed == [("a/seed=0", True)] and len(executor.log) == 1
    assert outcome.failures["a/seed=0"].cause == "timeout" and "timeout_s of 0.1 s" in outcome.error.message


def test_a_graceful_stop_keeps_checkpoints_and_a_resume_gives_the_same_bytes(store, tmp_path):
    stages = {
        "s": {"kind": "sleepy", "config": {"steps": 40, "checkpoint_every": 5}},
        "t": {"kind": "sum", "inputs": {"numbers": "${stages.s}"}},
    }
    undisturbed, _ = go(pipeline(stages), Store.open(tmp_path / "other"))
    stop = threading.Event()

    def listen(event):
        if event.kind == "member-progress" and event.data["done"] >= 1:
            stop.set()

    outcome, run = go(pipeline(stages), store, listeners=[listen], stop=stop)
    assert outcome.status == run.status == "interrupted" and outcome.artifacts == {} and outcome.failures == {}
    assert failures(run) == [("s/seed=0", "stop", "interrupted")]
    again = RunStore(store).resume(run.id)
    finished, _ = go(pipeline(stages), store, run=again)
    assert again.origin == run.id and finished.artifacts == undisturbed.artifacts
    assert "continues at step 5" in again.log_path("s/seed=0").read_text()
    assert not any((store.folder / "scratch").iterdir()) and not any((store.folder / "staging").iterdir())


def test_kill_ends_at_once(store):
    kill = threading.Event()
    executor = FakeExecutor(script={"a/seed=0": ["wait"] * 10_000})
    threading.Timer(0.2, kill.set).start()
    start = time.monotonic()
    outcome, _run = go(pipeline({"a": {"kind": "numbers"}}), store, executor, kill=kill)
    # By itself it goes on for 200 s.
    assert outcome.status == "interrupted" and time.monotonic() - start < 60 and executor.closed


def test_an_error_of_the_user_is_not_hidden_by_a_stop(store):
    executor = FakeExecutor(script={"a/seed=0": ["user"]})
    outcome, _ = go(pipeline({"a": {"kind": "numbers"}}), store, executor)
    assert outcome.status == "failed"


def test_listeners_hear_everything_and_one_that_raises_is_dropped(store, caplog):
    heard = []

    def broken(event):
        raise ConnectionError("the tracking server is down")

    outcome, run = go(pipeline(DIAMOND), store, listeners=[broken, heard.append])
    assert outcome.status == "finished" and heard == list(run.events())
    assert caplog.text.count("gets no more events") == 1


def test_equal_work_within_a_run_is_done_once(store):
    twin = {"kind": "sum", "inputs": {"numbers": "${stages.a}"}}
    stages = {"a": {"kind": "numbers"}, "all": {"kind": "gather", "inputs": {"numbers": ["${stages.a}"]}}, "b": twin}
    outcome, _run = go(pipeline(stages), store, FakeExecutor())
    assert outcome.status == "finished"


# Who makes the artifact is not done before the other one says that it waits.
SECOND = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline
from tests.support.toy_stages import numbers
store = Store.open(sys.argv[1])
waits = Path(store.folder, "waits")
def sleep(seconds):
    end = time.monotonic() + 60
    while not waits.exists() and time.monotonic() < end:
        time.sleep(seconds)
def listen(event):
    if event.kind == "member-log":
        waits.touch()
numbers.time = SimpleNamespace(sleep=sleep)
stages = {"a": {"kind": "numbers", "config": {"sleep_s": 0.1}}}
print("ready", flush=True)
sys.stdin.readline()
outcome, run = go(pipeline(stages), store, listeners=[listen])
events = list(run.events())
print(json.dumps([outcome.status, outcome.hits, [e.data.get("message") for e in events if e.kind == "member-log"]]))
"""


def test_two_runs_make_one_artifact_once(store):
    """The second run waits for the first one's flight lock, then hits."""
    two = [
        subprocess.Popen(
            [sys.executable, "-c", SECOND, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in two:
        assert process.stdout.readline() == "ready\n"
    for process in two:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = sorted(json.loads(process.communicate(timeout=60)[0]) for process in two)
    assert [answer[:2] for answer in answers] == [["finished", 0], ["finished", 1]]
    assert answers[1][2] == ["waits for another run that is making the same artifact"]


def test_a_fan_out_of_500_empty_members_inline_is_quick_and_flat(store):
    import resource

    stages = {
        "a": {"kind": "numbers", "config": {"count": 500}},
        "b": {"kind": "sum", "inputs": {"numbers": "${stages.a}"}},
    }
    graph = build_graph(pipeline(stages))
    assert len(graph.nodes) == 501
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()  # the machine, and other threads here, may be busy with other things
    outcome, _ = go(pipeline(stages), store)
    assert outcome.status == "finished" and time.thread_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024


def test_a_gang_is_announced_when_what_it_waits_for_is_ready_and_when_it_starts(store):
    stages = {
        "numbers": {"kind": "numbers", "config": {"count": 2}},
        "g": {"kind": "gang", "resources": {"workers": 2}, "inputs": {"start": "${stages.numbers}"}},
    }
    executor = FakeExecutor()
    outcome, _ = go(pipeline(stages), store, executor)
    # When the last number is ready, and when each of them starts.
    assert outcome.status == "finished" and executor.expected == [2, 2, 2]
