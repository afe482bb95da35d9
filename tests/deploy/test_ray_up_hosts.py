"""A real `ray up` of deploy/on_prem.yaml on hosts made of namespaces, and what happens to a run when they die.

A laptop and three hosts (:mod:`tests.support.hosts`), the wheel of this tree on each, real digits. The tests follow one
another on one cluster: up, a worker loses power, a worker's cable is pulled, the head loses power, down. Many minutes:
`pytest -m slow -s tests/deploy/test_ray_up_hosts.py` prints what was measured.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.hosts import SHARED, UID, Hosts, give, lacking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
HEAD, WORKERS, LAPTOP = "10.0.0.10", ("10.0.0.11", "10.0.0.12"), "10.0.0.2"
YAML = "deploy/on_prem.yaml"
STORE = f"{SHARED}/moepipe"
PIPELINE = """
apiVersion: moepipe/v1
name: hosts
description: Eight small experts on real digits; each may lose its host.
seeds: [0, 1]
tracking: {enabled: false}
stages:
  data:
    kind: prepare
    config: {dataset: digits5, options: {per_domain: 300}}
  split:
    kind: split
    inputs: {data: "${stages.data}"}
    config: {groups: 4}
  experts:
    kind: train
    inputs: {data: "${stages.data}", groups: "${stages.split}"}
    config:
      backbone: {name: tiny_cnn}
      groups: 4
      training: {batch_size: 64, steps: 200, lr: 0.003, cadence: steps, evaluate_every: 100, checkpoint_every: 10}
  features:
    kind: features
    inputs: {data: "${stages.data}", model: "${stages.experts}"}
    config: {groups: 4, splits: [val]}
"""


class Site:
    """The hosts, and the laptop's checkout on which everything is typed."""

    def __init__(self, base):
        self.hosts = Hosts(base)
        self.base = base
        self.figures = {}

    def __enter__(self):
        self.hosts.__enter__()
        try:
            self._furnish()
        except BaseException:
            self.hosts.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.hosts.__exit__()

    def _furnish(self):
        """As docs/cluster.md begins: a checkout, a key, the wheel; and a host with sshd and Python."""
        base, hosts = self.base, self.hosts
        self.laptop = hosts.add("laptop", LAPTOP)
        self.head = hosts.add("head", HEAD)
        self.workers = [hosts.add(f"worker-{i}", ip) for i, ip in enumerate(WORKERS, start=1)]
        hosts.make_python(base / "venv")
        for host in (self.laptop, self.head, *self.workers):
            give(host, base / "venv", "moepipe/venv")
        checkout = base / "checkout"
        shutil.copytree(ROOT / "deploy", checkout / "deploy")
        shutil.copy(ROOT / "constraints.txt", checkout)
        (checkout / "pipeline.yaml").write_text(PIPELINE)
        self._edit(checkout)
        build_wheel(base / "source", checkout / "dist")
        give(self.laptop, checkout, "checkout")
        give(self.laptop, base / "etc/key", ".ssh/moepipe_cluster")
        self.laptop.run(
            "chmod 600 ~/.ssh/moepipe_cluster && ~/moepipe/venv/bin/pip install -q --no-deps checkout/dist/*.whl"
        )

    @staticmethod
    def _edit(checkout):
        """What a user edits in the shipped files, and nothing else: the store, and how large a host counts."""
        path = checkout / YAML
        text = path.read_text()
        assert yaml.safe_load(text)["provider"] == {"type": "local", "head_ip": HEAD, "worker_ips": list(WORKERS)}
        text, count = re.subn(r"--object-store-memory=\d+", "--num-cpus=1 --object-store-memory=150000000", text)
        assert count == 2
        path.write_text(text)
        path = checkout / "deploy/env.sh"
        text = path.read_text()
        assert text.count("s3://my-bucket/moepipe") == 1
        path.write_text(text.replace("s3://my-bucket/moepipe", STORE))

    # ---- the laptop ------------------------------------------------------------------------------------------------

    def line(self, *words):
        """The shell line of a command of moepipe on the laptop, which has a store of its own."""
        return (
            "cd checkout && export PATH=$HOME/moepipe/venv/bin:$PATH MOEPIPE_STORE=$HOME/own-store COLUMNS=200 "
            f"OMP_NUM_THREADS=1 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 && moepipe {' '.join(map(str, words))}"
        )

    def moepipe(self, *words, code=0, timeout=600):
        """Run it to its end."""
        done = self.laptop.run(self.line(*words), timeout=timeout, check=False)
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, name, *words):
        """Submit in the background, following."""
        line = self.line("submit", "pipeline.yaml", "--cluster", YAML, "--run", name, *words)
        log = (self.base / f"{name}.log").open("a+b")
        return subprocess.Popen(self.laptop.command(line), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def said(self, name):
        """What a follower has printed."""
        return (self.base / f"{name}.log").read_text()

    # ---- the cluster -----------------------------------------------------------------------------------------------

    @property
    def store(self):
        return self.hosts.shared / "moepipe"

    def run(self, name):
        """The record of a run, read from the shared folder."""
        if not (self.store / "runs" / name / "run.json").exists():
            return None
        return RunStore(Store.open(self.store)).open(name)

    def events(self, name):
        run = self.run(name)
        return list(run.events()) if run else []

    def running(self, name):
        """node -> (host, steps done) of members that are at work."""
        found = {}
        for event in self.events(name):
            if event.kind == "member-started":
                found[event.node] = (event.data["host"], 0)
            elif event.kind == "member-progress" and event.node in found:
                found[event.node] = (found[event.node][0], event.data["done"])
            elif event.kind in ("member-finished", "member-failed"):
                found.pop(event.node, None)
        return found

    def finished(self, name):
        return [event.node for event in self.events(name) if event.kind == "member-finished"]

    def victim(self, name, hosts):
        """(host, node, step) once a member of the fan-out on one of ``hosts`` is in the middle, others being done."""

        def look():
            for node, (host, done) in self.running(name).items():
                if node.startswith("experts/") and host in hosts and 20 <= done <= 150:
                    return host, node, done
            return None

        return wait_for(look, 240)

    def live(self):
        """Addresses of the live nodes, asked on the head."""
        script = (
            ". ~/moepipe/env.sh && python -c \"import ray, json; ray.init(address='auto', logging_level='ERROR', "
            "log_to_driver=False); print(json.dumps([n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']]))\""
        )
        done = self.head.run(script, check=False)
        return sorted(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else []

    def note(self, **figures):
        self.figures.update(figures)
        print(json.dumps(figures), flush=True)


def build_wheel(source, target):
    """`pip wheel --no-deps -w dist .` on a copy, so that nothing is left in this tree."""
    source.mkdir()
    for name in ("moe", "workers", "orchestrator", "serve"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source]
    subprocess.run(command, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    assert len(list(target.glob("moepipe-*.whl"))) == 1


def wait_for(question, seconds, every=0.3):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(every)
    raise AssertionError("it did not happen in time")


# ---- the tests, in this order ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site():
    reason = lacking()
    if reason:
        pytest.skip(reason)
    base = Path(tempfile.mkdtemp(prefix="mp-hosts-", dir="/tmp"))
    try:
        with Site(base) as made:
            yield made
            print(json.dumps(made.figures, indent=1))
    finally:
        shutil.rmtree(base, ignore_errors=True)


SEEDS = {"power": (1, 2), "cable": (3, 4), "head": (5, 6)}


def start(site, name, *words):
    """Submit a run of its own seeds."""
    return site.submit(name, "--set", f"'seeds={list(SEEDS[name])}'", *words)


def calm(site, name):
    """Digests of the undisturbed run, in one process on the laptop."""
    line = ["submit", "pipeline.yaml", "--on", "inline", "--run", name, "--set", f"'seeds={list(SEEDS[name])}'"]
    site.moepipe(*line, timeout=900)
    run = RunStore(Store.open(site.laptop.home / "own-store")).open(name)
    assert run.status == "finished"
    return run.artifacts()


def same_digests(site, name):
    """The run has finished, every member once, with the bytes of the undisturbed run."""
    run = site.run(name)
    assert run.status == "finished"
    found = run.artifacts()
    assert len(found) == 1 + 9 * len(SEEDS[name]) and found == calm(site, name)
    done = site.finished(name)
    assert len(done) == len(set(done)), "a member was counted twice"
    scratch = site.store / "scratch"
    assert not scratch.exists() or not list(scratch.iterdir()), "scratch folders are left behind"


def resumed_at(site, name, node):
    """Step at which a member went on after its last loss."""
    text = site.run(name).log_path(node).read_text()
    return int((re.findall(r"Resumed at step (\d+)", text) or ["0"])[-1])


def failures(site, name, since):
    """(seconds after ``since``, node, cause) of the failures told after it."""
    return [
        (round(event.time - since, 1), event.node, event.data["cause"])
        for event in site.events(name)
        if event.kind == "member-failed" and event.time > since
    ]


def working(host):
    """Ray's processes that do work or hold it. Its log monitor and two agents may outlive a raylet; they end when Ray
    starts there again, or with `moepipe cluster down`."""
    return [line for line in host.rays() if not any(name in line for name in ("log_monitor", "Agent"))]


def all_back(site, seconds=300):
    """Seconds until all three hosts are in the cluster again."""
    started = time.time()
    wait_for(lambda: len(site.live()) == 3, seconds, every=2)
    return round(time.time() - started, 1)


def test_up(site):
    assert "made" in site.moepipe("cluster", "token").stdout
    started = time.time()
    done = site.moepipe("cluster", "up", YAML)
    site.note(up_s=round(time.time() - started, 1))
    assert done.stdout.rstrip().endswith(f"{YAML} is up: {HEAD}, {', '.join(WORKERS)}")
    assert "3 of 3 nodes are up" in done.stderr
    for host in (site.head, *site.workers):
        token = host.home / "moepipe/ray_token"
        assert token.stat().st_mode & 0o777 == 0o600 and token.stat().st_uid == UID
        assert {path.name for path in (host.home / "moepipe").iterdir()} >= {"dist", "env.sh", "venv"}
    # Nobody without the token, from a host of the same network.
    stranger = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=" + "b" * 64
    script = f"{stranger} RAY_ADDRESS={HEAD}:6379 timeout 60 ~/moepipe/venv/bin/ray status"
    refused = site.workers[0].run(script, check=False)
    assert refused.returncode != 0 and "ctive" not in refused.stdout, refused.stdout
    # The dashboard listens on the head's loopback alone.
    assert site.workers[0].run(f"timeout 5 bash -c '< /dev/tcp/{HEAD}/8265'", check=False).returncode != 0


def test_every_host_is_fit(site):
    report = json.loads(site.moepipe("doctor", "--cluster", YAML, "--json", code=None).stdout)
    assert [node["node"] for node in report["nodes"] if node["head"]] == [HEAD]
    for node in report["nodes"]:
        checks = {check["name"]: check["status"] for check in node["checks"]}
        assert checks["same code"] == checks["shared store"] == checks["same Python"] == "ok", node
        assert node["resources"]["CPU"] == 1.0


def test_a_worker_loses_power(site):
    """All its processes at once and its link, in the middle of a member; it stays off until the run is finished."""
    follower = start(site, "power")
    name, node, step = site.victim("power", {host.name for host in site.workers})
    lost = time.time()
    site.hosts.all[name].kill()
    assert follower.wait(timeout=600) == 0, site.said("power")
    said = [failure for failure in failures(site, "power", lost) if failure[1] == node]
    assert said and said[0][2] == "infrastructure"
    same_digests(site, "power")
    at = resumed_at(site, "power", node)
    assert step - 20 <= at  # at most one checkpoint interval besides what came after the last look
    site.note(
        power={"noticed_s": said[0][0], "at_step": step, "resumed_at": at, "failures": failures(site, "power", lost)}
    )
    # The record tells it, from the shared folder, whatever became of the host.
    logs = site.moepipe("logs", "power", "--store", STORE).stdout
    assert node in logs and "infrastructure" in logs
    site.hosts.all[name].boot()
    site.note(power_back_s=all_back(site))


def test_a_cable_is_pulled_and_plugged_in_again(site):
    follower = start(site, "cable")
    name, node, step = site.victim("cable", {host.name for host in site.workers})
    host = site.hosts.all[name]
    cut = time.time()
    host.cut()
    noticed = wait_for(lambda: failures(site, "cable", cut), 180)[0][0]
    alone = wait_for(lambda: not working(host) and round(time.time() - cut, 1), 400)
    host.heal()
    assert follower.wait(timeout=600) == 0, site.said("cable")
    same_digests(site, "cable")
    site.note(
        cable={"noticed_s": noticed, "orphans_gone_s": alone, "at_step": step, "failures": failures(site, "cable", cut)}
    )
    text = site.run("cable").log_path(node).read_text()
    # The cut host still sees the folder: either it finished its member and the successor took that, or it was ended.
    site.note(cable_resumed_at=resumed_at(site, "cable", node), cable_trained=text.count("training tiny_cnn"))
    site.note(cable_back_s=all_back(site))
    lines = host.rays()
    assert [sum(name in line for line in lines) for name in ("raylet/raylet", "log_monitor")] == [1, 1], lines


def test_the_head_loses_power_and_the_name_is_submitted_again(site):
    follower = start(site, "head")
    wait_for(lambda: site.running("head"), 240)
    refused = site.moepipe("cluster", "down", YAML, code=7)
    assert "head" in refused.stderr and "--force" in refused.stderr
    _, node, step = site.victim("head", {host.name for host in (site.head, *site.workers)})
    before = set(site.finished("head"))
    lost = time.time()
    site.head.kill()
    assert follower.wait(timeout=300) == 5, site.said("head")
    assert "submit the same pipeline with the same --run" in site.said("head")
    site.note(head_told_s=round(time.time() - lost, 1))
    gone = wait_for(lambda: not any(working(host) for host in site.workers) and round(time.time() - lost, 1), 400)
    site.head.boot()
    up = time.time()
    site.moepipe("cluster", "up", YAML)
    site.note(head={"orphans_gone_s": gone, "up_again_s": round(time.time() - up, 1)})
    assert start(site, "head").wait(timeout=600) == 0, site.said("head")
    same_digests(site, "head")
    again = [event.node for event in site.events("head") if event.kind == "member-finished"]
    assert not before - set(again) and len(again) == len(set(again))
    kinds = [event.kind for event in site.events("head")]
    assert kinds.count("run-started") == 2  # one run record, continued under its own id
    site.note(head_run={"finished_before": len(before), "at_step": step, "resumed_at": resumed_at(site, "head", node)})


def test_down_leaves_nothing(site):
    hosts = (site.head, *site.workers)
    started = time.time()
    done = site.moepipe("cluster", "down", YAML)
    site.note(down_s=round(time.time() - started, 1))
    assert f"{YAML} is down" in done.stdout
    assert [host.rays() for host in hosts] == [[], [], []]
    assert [[process.cmdline() for process in host.processes()] for host in hosts] == [[], [], []]
    for host in hosts:
        seen = {path.name for path in host.home.iterdir()} - {".cache", ".config", ".bash_history"}
        assert seen <= {"moepipe", "ray_bootstrap_config.yaml", "ray_bootstrap_key.pem", ".ssh"}, seen
        assert host.run("ls /dev/shm").stdout == ""
    assert {path.name for path in site.store.iterdir()} <= {
        "artifacts",
        "keys",
        "runs",
        "locks",
        "scratch",
        "staging",
        "data",
    }
    assert "is down" in site.moepipe("cluster", "down", YAML).stdout  # again: nothing to do, and no error
    # The results are there without the cluster.
    assert "finished" in site.moepipe("status", "power", "--store", STORE).stdout
