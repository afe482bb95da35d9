"""The store in a real S3-compatible server on loopback: runs inline and on Ray, two writers, lost machines, outages."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from moe.errors import BusyError, EnvironmentProblem
from orchestrator import cluster_claims, gc
from orchestrator.cluster_claims import Claims
from orchestrator.executors.inline import InlineExecutor
from orchestrator.runs import RunStore
from orchestrator.store import Key, Store
from tests.support.pipelines import DIAMOND, go, pipeline

KEY = Key("ab" * 32, {"kind": "number"})


@pytest.fixture(scope="module")
def server():
    """moto's server, with an empty bucket; the variables that boto reads point at it."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    given = {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "tester",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        # S3 writes "only if it is not there" in one step, moto looks and then writes: no other upload in between.
        one, upload = threading.Lock(), S3Response.put_object

        def put_object(self):
            with one:
                return upload(self)

        patch.setattr(S3Response, "put_object", put_object)
        for name, value in given.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket="results")
        yield started
    started.stop()


@pytest.fixture
def url(server, tmp_path):
    """A new place in the bucket."""
    return f"s3://results/{tmp_path.name}"


@pytest.fixture
def machine(url, tmp_path):
    """Opens the store as a machine with a disk of its own would."""
    opened = []

    def open_store(name):
        opened.append(Store.open(url, tmp_path / name))
        return opened[-1]

    yield open_store
    for store in opened:
        store.claims()._held.clear()  # or a thread would beat, and try again and again, when the server is gone


def fill(store, **files):
    folder = store.staging()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_two_machines_see_each_others_results(machine):
    here, there = machine("a"), machine("b")
    made = here.commit(fill(here, x="one", y="two"), "number", {"n": 1}, KEY)
    assert there.lookup(KEY) == made and there.digests() == [made.digest]
    assert (there.local_path(made) / "y").read_text() == "two" and there.verify(made) == []
    other = there.commit(fill(there, x="three"), "number", {}, Key("cd" * 32))
    assert here.digests() == sorted([made.digest, other.digest])  # listings are not remembered
    there.remove(made.digest)
    assert here.lookup(KEY) is None and "is gone" in here.examine(KEY).reason


def test_a_missing_bucket_is_not_made_and_is_an_error_for_people(server, tmp_path):
    import boto3

    store = Store.open("s3://nobody/x", tmp_path)
    assert store.lookup(KEY) is None
    with pytest.raises(EnvironmentProblem, match="s3://nobody/x cannot be written"):
        store.commit(fill(store, a="1"), "number", {}, KEY)
    assert [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]] == ["results"]


def test_a_pipeline_runs_resumes_and_hits(machine, tmp_path):
    calm, _ = go(pipeline(DIAMOND, seeds=(0, 1)), Store.open(tmp_path / "local"))
    here, there = machine("a"), machine("b")
    first, run = go(pipeline(DIAMOND, seeds=(0, 1)), here)
    assert first.status == "finished" and first.artifacts == calm.artifacts
    second, _ = go(pipeline(DIAMOND, seeds=(0, 1)), there)
    assert second.hits == len(second.artifacts) and second.artifacts == first.artifacts
    seen = RunStore(there).open(run.id)
    assert seen.status == "finished" and seen.artifacts() == first.artifacts
    assert [e.kind for e in seen.events()] == [e.kind for e in run.events()]
    node = "squares/seed=0/item=0"
    assert node in first.artifacts
    assert seen.log_path(node).read_bytes() == run.log_path(node).read_bytes()


ON_RAY = """
import json, sys
from pathlib import Path
from orchestrator.executors.ray import RayExecutor
from orchestrator.store import Store
from tests.support.pipelines import DIAMOND, go, pipeline
url, *caches = sys.argv[1:]
outcomes = [go(pipeline(DIAMOND), Store.open(url, Path(cache)), RayExecutor())[0] for cache in caches]
print(json.dumps([[outcome.artifacts, outcome.hits] for outcome in outcomes]))
"""


@pytest.mark.slow
def test_on_ray(url, tmp_path):
    """In a process of its own: Ray's workers have the environment that Ray was started in."""
    calm, _ = go(pipeline(DIAMOND), Store.open(tmp_path / "local"))
    command = [sys.executable, "-c", ON_RAY, url, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    (made, hits), (again, all_hits) = json.loads(done.stdout.splitlines()[-1])
    assert made == calm.artifacts == again and (hits, all_hits) == (0, len(made))


class TestClaims:
    def test_one_of_many_gets_it(self, machine):
        stores = [machine(str(number)) for number in range(6)]
        got, barrier = [], threading.Barrier(6)

        def want(store):
            barrier.wait()
            if store.try_lock(KEY) is not None:
                got.append(store)

        threads = [threading.Thread(target=want, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1

    def test_it_is_given_back(self, machine):
        here, there = machine("a"), machine("b")
        lock = here.try_lock(KEY)
        assert there.try_lock(KEY) is None and here.try_lock(KEY) is None
        lock.release()
        assert there.try_lock(KEY) is not None

    def test_that_of_a_killed_process_of_this_machine_is_void_at_once(self, machine):
        script = "import sys; from orchestrator.store import Store; from pathlib import Path; "
        script += "print(Store.open(sys.argv[1], Path(sys.argv[2])).claims().take('x'))"
        store = machine("a")
        command = [sys.executable, "-c", script, store.url, str(store.folder.parent)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"
        assert store.claims().holder_of("x") and store.claims().take("x")

    def test_that_of_a_silent_holder_is_void_and_goes_to_one(self, machine, monkeypatch):
        dead = Claims(machine("a").blobs, beat_s=60.0)
        assert dead.take("x")
        blobs = machine("b").blobs
        modified = blobs.modified
        heirs = [Claims(blobs) for _ in range(4)]
        assert not heirs[0].take("x")
        late = 10 * cluster_claims.SILENT_S  # its last beat was so long ago
        monkeypatch.setattr(blobs, "modified", lambda path: modified(path) - late * (dead.holder in path))
        monkeypatch.setattr(cluster_claims, "_SETTLE_S", 5.0)  # for an heir that stands still for some seconds
        results = []
        threads = [threading.Thread(target=lambda heir=heir: results.append(heir.take("x"))) for heir in heirs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count(True) == 1
        dead.release("x")  # it comes back and must not take what is no longer its own
        assert dead.holder_of("x") in {heir.holder for heir in heirs}
        for heir in heirs:
            heir.release("x")


def test_a_second_run_on_another_machine_waits_and_hits(machine):
    stages = {"s": {"kind": "sleepy", "config": {"steps": 30, "step_s": 0.05, "checkpoint_every": 5}}}
    results = []

    def work(name):
        store = machine(name)
        results.append((go(pipeline(stages), store)[0], store))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
        time.sleep(0.4)
    for thread in threads:
        thread.join()
    (one, _), (two, _) = results
    assert one.artifacts == two.artifacts and sorted([one.hits, two.hits]) == [0, 1]


DRIVER = """
import sys
from pathlib import Path
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline
url, cache = sys.argv[1:]
stages = {"s": {"kind": "sleepy", "config": {"steps": 800, "step_s": 0.02, "checkpoint_every": 10}}}
spec, store = pipeline(stages), Store.open(url, Path(cache))
go(spec, store, run=RunStore(store).create(spec, name="the-run"))
"""


@pytest.mark.slow
def test_a_lost_machine_costs_what_came_after_the_last_copied_checkpoint(machine, url, tmp_path, monkeypatch):
    """Its disk goes with it: run record, checkpoints and log come back from the store."""
    stages = {"s": {"kind": "sleepy", "config": {"steps": 800, "step_s": 0.02, "checkpoint_every": 10}}}
    monkeypatch.setattr(cluster_claims, "SILENT_S", 2.0)
    monkeypatch.setattr(Claims.__init__, "__defaults__", (0.5, 2.0))
    calm, _ = go(pipeline(stages), Store.open(tmp_path / "local"))
    environment = {**os.environ, "MOEPIPE_SYNC_S": "0.3"}
    lost = subprocess.Popen([sys.executable, "-c", DRIVER, url, str(tmp_path / "lost")], env=environment)
    there = machine("there")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = [name for name in there.blobs.sizes("scratch") if not name.endswith(".stop")]
        if done and json.loads(there.blobs.read(f"scratch/{done[-1]}") or b"{}").get("step", 0) >= 100:
            break
        time.sleep(0.1)
    time.sleep(5.5)  # one round of the record
    lost.kill()
    lost.wait()
    (last,) = (tmp_path / "lost").glob("*/scratch/*/checkpoint.json")
    reached = json.loads(last.read_text())["step"]
    run = RunStore(there).open("the-run")
    time.sleep(2.5)
    outcome, again = go(pipeline(stages), there, run=run)
    assert outcome.status == "finished" and outcome.artifacts == calm.artifacts
    log = again.log_path("s/seed=0").read_text()
    resumed = int(log.split("continues at step ")[1].split()[0])
    # A copy every 0.3 s is every 15 steps; a busy machine is late.
    assert 100 <= resumed <= reached and reached - resumed <= 100
    print(f"killed after the checkpoint of step {reached}, continued at {resumed}")
    kinds = [event.kind for event in again.events()]
    assert kinds.count("run-started") == 2 and kinds[-1] == "run-finished"
    assert there.blobs.names("scratch") == []


def test_a_live_run_cannot_be_driven_twice_and_can_be_followed_and_cancelled(machine):
    stages = {"s": {"kind": "sleepy", "config": {"steps": 10_000, "step_s": 0.02, "checkpoint_every": 5}}}
    here, there = machine("a"), machine("b")
    spec = pipeline(stages)
    run = RunStore(here).create(spec)
    stop = threading.Event()
    work = threading.Thread(target=lambda: go(spec, here, InlineExecutor(), run=run, stop=stop))
    work.start()
    try:
        deadline = time.monotonic() + 120
        while not there.blobs.sizes(f"runs/{run.id}") and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = RunStore(there).open(run.id)
        with pytest.raises(BusyError, match=run.id), seen.lock():
            pass
        while not any(event.kind == "member-progress" for event, _ in seen.follow()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert any(event.kind == "member-progress" for event in seen.events()) and seen.status == "running"
        seen.request_stop()
        while not (run.path / "cancel").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (run.path / "cancel").exists()
    finally:
        stop.set()
        work.join()
    assert RunStore(there).open(run.id).status == "interrupted"


def test_a_driver_that_was_taken_over_stops_and_leaves_the_record_alone(machine, monkeypatch):
    """It was cut off for a minute, another machine continued its run, and now it is back."""
    from orchestrator import cluster_record

    monkeypatch.setattr(cluster_record, "PUSH_S", 0.3)
    stages = {"s": {"kind": "sleepy", "config": {"steps": 10_000, "step_s": 0.02, "checkpoint_every": 5}}}
    here, there = machine("a"), machine("b")
    spec, stop = pipeline(stages), threading.Event()
    run = RunStore(here).create(spec)
    work = threading.Thread(target=lambda: go(spec, here, InlineExecutor(), run=run, stop=stop))
    work.start()
    try:
        deadline = time.monotonic() + 120
        while not there.blobs.sizes(f"runs/{run.id}") and time.monotonic() < deadline:
            time.sleep(0.1)
        there.blobs.write(f"claims/run-{run.id}.json", b'{"holder":"other-12345678-1-aa"}')
        there.blobs.write(f"runs/{run.id}/events.jsonl", b"{}\n")
        while not (run.path / "cancel").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (run.path / "cancel").exists()  # what the driver looks at
    finally:
        stop.set()
        work.join()
    assert there.blobs.read(f"claims/run-{run.id}.json") == b'{"holder":"other-12345678-1-aa"}'


def test_gc_frees_what_no_run_uses(machine):
    here, there = machine("a"), machine("b")
    first, run = go(pipeline({"n": {"kind": "numbers", "config": {"count": 4}}}), here)
    second, kept = go(pipeline({"n": {"kind": "numbers", "config": {"count": 2}}}), here)
    there.blobs.write("scratch/" + "ee" * 32 + "/left", b"x")
    garbage = gc.survey(there, keep_last=1)
    assert garbage.runs == [run.id] and set(garbage.artifacts) == (
        set(first.artifacts.values()) - set(second.artifacts.values())
    )
    gc.collect(there, garbage)
    assert there.digests() == sorted(set(second.artifacts.values())) and there.blobs.names("scratch") == []
    there.claims().take("y")
    there.claims().sweep()  # those of the living stay
    assert not machine("d").claims().take("y")
    assert [item.id for item in RunStore(machine("c")).list()] == [kept.id]


def test_an_outage_is_waited_for_and_then_told(server, url, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPIPE_STORE_PATIENCE_S", "60")
    store = Store.open(url, tmp_path / "x")
    made = store.commit(fill(store, a="1"), "number", {}, KEY)
    real, calls = store.blobs.fs.cat_file, []

    def away(*args, **options):
        calls.append(args)
        if len(calls) < 4:
            raise ConnectionResetError("away")
        return real(*args, **options)

    monkeypatch.setattr(store.blobs.fs, "cat_file", away)
    assert store.artifact(made.digest) == made and len(calls) >= 4
    monkeypatch.setenv("MOEPIPE_STORE_PATIENCE_S", "0.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    import s3fs

    gone = Store.open(url, tmp_path / "y")
    gone.blobs.fs = s3fs.S3FileSystem(
        skip_instance_cache=True, endpoint_url="http://127.0.0.1:9", use_listings_cache=False
    )
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        gone.lookup(KEY)
