"""The command line as a process: signals, pipes, imports, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The toy stages are registered by hand, so the entry point is called instead of the script.
ENTRY = "import tests.support.toy_stages; from orchestrator.cli import main; main()"
# More than three minutes: it goes on until it is stopped, or until the file `hurry` is there.
LOOP = """\
apiVersion: moepipe/v1
name: loop
tracking: {enabled: false}
stages:
  slow:
    kind: sleepy
    config: {steps: 4000, step_s: 0.05, checkpoint_every: 2, hurry: hurry}
"""
QUICK = """\
apiVersion: moepipe/v1
name: quick
tracking: {enabled: false}
stages:
  numbers:
    kind: numbers
  report:
    kind: gather
    inputs: {numbers: "${stages.numbers}"}
"""
HEAVY = ("torch", "ray", "mlflow", "deepspeed", "timm", "pandas", "sklearn", "matplotlib", "wilds", "numpy")


@pytest.fixture
def folder(tmp_path):
    """A working directory with two pipelines."""
    (tmp_path / "loop.yaml").write_text(LOOP)
    (tmp_path / "quick.yaml").write_text(QUICK)
    return tmp_path


def environment(**more):
    """The environment of a user who set nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOEPIPE_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(folder, *arguments, **options):
    """Start a command."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return subprocess.Popen([sys.executable, "-c", ENTRY, *arguments], cwd=folder, text=True, **options)


def finish(process, timeout=60):
    """Wait; returns (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_until(process, condition):
    """Until something has happened while the process goes on."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.05)


def wait_for_steps(folder, process, runs=1):
    """Until the loops of so many runs have made a step."""

    def made():
        records = [path.read_bytes() for path in folder.glob(".moepipe/runs/*/events.jsonl")]
        return sum(b"member-progress" in record for record in records) >= runs

    wait_until(process, made)


def status(folder):
    """Status of the latest run."""
    return json.loads(finish(start(folder, "status", "--json"))[1])


def test_first_ctrl_c_stops_at_a_checkpoint_and_resume_goes_on(folder):
    process = start(folder, "submit", "loop.yaml", "--on", "inline")
    wait_for_steps(folder, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and out == ""
    assert "members stop at their next checkpoint" in err and "error [interrupted]" in err and "Traceback" not in err
    before = status(folder)
    assert before["status"] == "interrupted"
    process = start(folder, "resume", before["run"], "--on", "inline")
    wait_for_steps(folder, process, runs=2)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130
    text = finish(start(folder, "logs", "latest", "slow/seed=0"))[1]
    assert "continues at step" in text


def test_second_ctrl_c_ends_at_once(folder):
    (folder / "loop.yaml").write_text(LOOP.replace("checkpoint_every: 2", "checkpoint_every: 4000"))
    said = folder / "said"
    with said.open("w") as stream:
        process = start(folder, "submit", "loop.yaml", "--on", "inline", stderr=stream)
    wait_for_steps(folder, process)
    process.send_signal(signal.SIGINT)
    wait_until(process, lambda: "members stop at their next checkpoint" in said.read_text())
    time.sleep(1.0)
    assert process.poll() is None  # no checkpoint is near: it goes on
    process.send_signal(signal.SIGINT)
    code, _, _ = finish(process)  # within a minute
    assert code == 130 and "Traceback" not in said.read_text()


def test_cancel_from_another_process(folder):
    process = start(folder, "submit", "loop.yaml", "--on", "inline")
    wait_for_steps(folder, process)
    code, out, _ = finish(start(folder, "cancel", "--json"))
    assert code == 0 and json.loads(out)["status"] == "interrupted"
    code, _, err = finish(process)
    assert code == 130 and "Cancelled" in err


def test_a_killed_driver_leaves_a_run_that_resumes(folder):
    process = start(folder, "submit", "loop.yaml", "--on", "inline")
    wait_for_steps(folder, process)
    process.kill()
    finish(process)
    (folder / "hurry").touch()
    lost = status(folder)
    assert lost["status"] == "lost"
    code, out, _ = finish(start(folder, "resume", "--on", "inline", "--json"))
    assert code == 0 and json.loads(out)["run"] == lost["run"] and json.loads(out)["status"] == "finished"


def test_piped_output_is_plain(folder):
    code, out, err = finish(start(folder, "submit", "quick.yaml", "--on", "inline", env=environment(FORCE_COLOR="")))
    assert code == 0 and "\x1b" not in out + err and "━" not in out + err
    assert err.splitlines()[1:] == [
        "numbers/seed=0: started",
        *[line for line in err.splitlines() if line.startswith("numbers/seed=0: finished in ")],
        "report: started",
        *[line for line in err.splitlines() if line.startswith("report: finished in ")],
    ]
    code, out, err = finish(start(folder, "submit", "quick.yaml", "--on", "inline", "--quiet"))
    assert (code, err) == (0, "") and "2 hits" in out


def test_terminal_shows_a_table_that_redraws(folder):
    leader, follower = pty.openpty()
    process = start(folder, "submit", "quick.yaml", "--on", "inline", stderr=follower, env=environment(TERM="xterm"))
    os.close(follower)
    pieces = []

    def read():
        with suppress(OSError):  # the end of a pseudo terminal
            while piece := os.read(leader, 65536):
                pieces.append(piece)

    reader = threading.Thread(target=read)  # meanwhile: a full terminal would hold up who writes to it
    reader.start()
    out, _ = process.communicate(timeout=60)
    reader.join()
    os.close(leader)
    text = b"".join(pieces).decode()
    assert process.returncode == 0 and "\x1b[" in text and "finished. 0 hits, 2 made now." in out
    assert re.search(r"✓ \x1b?.*numbers|✓ numbers", text)


def test_printing_members_do_not_disturb_the_document(folder):
    code, out, err = finish(start(folder, "submit", "quick.yaml", "--on", "inline", "--json"))
    assert code == 0 and json.loads(out)["status"] == "finished" and "report: started" in err


def test_a_closed_pipe_is_no_error(folder):
    finish(start(folder, "submit", "quick.yaml", "--on", "inline"))
    command = f"'{sys.executable}' -c '{ENTRY}' schema | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "{\n" and done.stderr == ""


@pytest.mark.parametrize("arguments", [("--help",), ("submit", "--help"), ("validate", "quick.yaml"), ("runs",)])
def test_light_commands_import_nothing_heavy(folder, arguments):
    probe = (
        "import sys, atexit, tests.support.toy_stages\n"
        f"atexit.register(lambda: print('HEAVY', [name for name in {HEAVY[:-1]!r} if name in sys.modules]))\n"
        "from orchestrator.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def complete(folder, line):
    """What bash would offer for a line."""
    words = line.split(" ")
    code = "import tests.support.toy_stages; from orchestrator.cli import main; main()"
    more = {"_MOEPIPE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=60
    )
    return done.stdout.split()


def test_completion(folder):
    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "demo.yaml").write_text(QUICK)
    made = json.loads(finish(start(folder, "submit", "quick.yaml", "--on", "inline", "--json"))[1])
    assert complete(folder, "moepipe val") == ["validate"]
    assert complete(folder, "moepipe submit pipe") == ["pipelines/demo.yaml"]
    assert complete(folder, "moepipe show qui") == [made["run"]]
    assert "stages.sleepy" in complete(folder, "moepipe explain stages.s")
    assert complete(folder, "moepipe data verify camel") == ["camelyon17"]
