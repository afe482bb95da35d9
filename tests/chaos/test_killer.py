"""The killer hits what it aims at, and nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from tests.chaos.killer import Family, Victim, kind_of

# A driver with a raylet below it that has two workers, named as Ray names them.
TREE = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
names = ["ray::MemberRunner.run", "ray::IDLE", "ray::_RayTrainWorker__execute.get_next"]
child = "import subprocess, sys, time\\n"
child += "".join(f"subprocess.Popen(['bash', '-c', 'exec -a {name} sleep 300'])\\n" for name in names)
child += "time.sleep(300)"
subprocess.Popen(["/some/where/raylet", "-c", child], executable=sys.executable)
time.sleep(300)
"""


@pytest.fixture
def driver():
    process = subprocess.Popen([sys.executable, "-c", TREE])
    family = Family()
    try:
        end = time.monotonic() + 60
        while not all(any(v.kind == kind for v in family.look(process.pid)) for kind in ("raylet", "member", "train")):
            assert time.monotonic() < end, family.known
            time.sleep(0.05)
        yield process, family
    finally:
        process.kill()
        process.wait()
        family.clear()
        assert not family.orphans(60)


def test_names():
    assert kind_of(["/usr/lib/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=x"]) == "raylet"
    assert kind_of(["ray::MemberRunner.run"]) == "member"
    assert kind_of(["ray::RayTrainWorker"]) == "train"
    assert kind_of(["ray::TrainController.run"]) == "other"
    assert kind_of(["ray::IDLE"]) == "other"
    assert kind_of(["ray::Sink"]) == "other"
    assert kind_of(["python", "ray::x"]) == "other"
    assert kind_of([]) == "other"


def test_each_kind_is_found_and_killed(driver):
    process, family = driver
    rng = random.Random(0)
    for kind in ("member", "train", "raylet"):
        victim = family.pick(process.pid, kind, rng)
        assert victim is not None and victim.kind == kind and victim.kill()
        end = time.monotonic() + 60
        while victim.alive and time.monotonic() < end:
            time.sleep(0.02)
        assert not victim.alive and not victim.kill()
        assert process.poll() is None
    assert family.pick(process.pid, "raylet", rng) is None
    assert family.pick(process.pid, "driver", rng).pid == process.pid
    # What the dead raylet left behind is remembered although the tree no longer leads there.
    assert any("sleep" in victim.title or "ray::" in victim.title for victim in family.orphans(0))


def test_a_reused_number_is_left_alone():
    stranger = Victim("member", os.getpid(), 0.0, "not me")
    assert not stranger.alive and not stranger.kill()


def test_a_dead_driver_has_no_tree():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert Family().look(process.pid) == []
