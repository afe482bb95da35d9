"""The curl transcript of README.md, run as it stands there against a real server (another port is put in)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve.demo import FOLDER, MODEL
from serve.examples import DOMAINS, REQUEST, UNSEEN, write_examples
from tests.serve import making
from workers.datasets import rotated14
from workers.datasets._arrays import domain_data
from workers.protocols import DomainRows

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/serving.md")
ANGLES = (45, 105)


def transcript(page):
    """The commands between the marks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- transcript:start -->\n```sh\n(.*?)```\n<!-- transcript:end -->", text, re.DOTALL)
    return block


@pytest.fixture(scope="module")
def turned():
    """Digits at two angles that no network saw, as a data set, with rows to adapt on and to ask about."""
    pairs = [making.held_out(angle, 112) for angle in ANGLES]
    images = np.concatenate([np.stack(found) for found, _ in pairs])
    labels = np.concatenate([own for _, own in pairs])
    metadata = np.stack([np.repeat(np.arange(2), 112), labels], axis=1)
    names = {"domain": tuple(f"{angle} degrees" for angle in ANGLES), "y": making.NAMES}
    data = domain_data(
        rotated14.INFO, images, labels, metadata, ("domain", "y"), {"test": np.arange(len(labels))}, names
    )
    starts = (0, 112)
    rows = [
        DomainRows(n, names["domain"][n], np.arange(start, start + 100), np.arange(start + 100, start + 112))
        for n, start in enumerate(starts)
    ]
    return data, rows


def test_pictures_lie_where_they_are_looked_for(turned, tmp_path):
    data, rows = turned
    for _ in range(2):  # what is there is replaced
        write_examples(tmp_path, data, rows)
    assert [path.name for path in sorted((tmp_path / DOMAINS).iterdir())] == ["105-degrees", "45-degrees"]
    assert len(list((tmp_path / DOMAINS / "45-degrees").iterdir())) == 100
    unseen = sorted(path.name for path in (tmp_path / UNSEEN / "45-degrees").iterdir())
    labels = [making.NAMES[int(data.labels[row])] for row in rows[0].score[:10]]
    assert unseen == [f"{number:02d}-is-{label}.png" for number, label in enumerate(labels)]
    assert json.loads((tmp_path / REQUEST).read_text())["inputs"][0]["shape"] == [2, 28, 28, 1]


def test_both_pages_say_the_same():
    assert transcript(PAGES[0]) == transcript(PAGES[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_transcript_works_as_pasted(turned, served_folder, tmp_path):
    home = tmp_path / ".moepipe" / FOLDER
    shutil.copytree(served_folder, home / MODEL)
    write_examples(home, *turned)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = transcript("README.md")
    assert commands.count("8000") == 1 and commands.count("> serve.log") == 1
    commands = commands.replace("8000", port).replace("> serve.log", f"--port {port} > serve.log")
    # The command of this environment, whatever lies on the path.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "moepipe").write_text(f'#!/bin/sh\nexec {sys.executable} -m orchestrator.cli "$@"\n')
    (tmp_path / "bin" / "moepipe").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("MOEPIPE_STORE", "MOEPIPE_DATA", "MOEPIPE_TOKEN")}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        ["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        told, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, (tmp_path / "serve.log").read_text()
    ready, base, report, both, states, model, inferred = map(json.loads, told.splitlines())
    assert ready == {"ready": True}
    assert [row["after"] for row in base["predictions"]] == [None] * 10
    assert report["support"] == 100 and report["kept"] and sum(report["expert_weights"]) == pytest.approx(1, abs=1e-3)
    assert both["state"] == "turned.1" and all(row["after"]["label"] in making.NAMES for row in both["predictions"])
    assert [state["name"] for state in states["states"]] == ["turned"]
    assert model["name"] == "digits" and inferred["model_version"] == "turned.1"
    label, best = inferred["outputs"]
    assert label["data"] == [row["after"]["label"] for row in both["predictions"][:2]] and best["shape"] == [2, 3]
