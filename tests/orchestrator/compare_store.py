"""Stores with finished runs whose results are written by hand, for tests of comparison, promotion and citation."""

from __future__ import annotations

import json

import numpy as np

from orchestrator.artifacts import digest_of, manifest_bytes
from orchestrator.store import Store

DOMAINS = ("left", "right")
STAGES = {
    "data": {"kind": "prepare", "config": {"dataset": "digits5", "options": {"target": "mfeat"}}},
    "erm": {"kind": "train", "inputs": {"data": "${stages.data}"}, "config": {"backbone": {"name": "tiny_cnn"}}},
    "distill": {
        "kind": "distill",
        "inputs": {"data": "${stages.data}", "student": "${stages.erm}"},
        "config": {"training": {"steps": 20, "lr": 0.1}},
        "resources": {"cpus": 1, "workers": 2},
    },
    "evaluate": {
        "kind": "evaluate",
        "inputs": {"data": "${stages.data}", "erm": "${stages.erm}", "student": "${stages.distill}"},
        "config": {"protocol": "split"},
    },
}


def put(store: Store, kind: str, meta: dict, files: dict[str, bytes]) -> str:
    """An artifact, without the checks of a commit; returns its digest."""
    manifest = manifest_bytes(kind, meta, {})
    place = store.folder / "artifacts" / digest_of(manifest)
    place.mkdir(parents=True, exist_ok=True)
    (place / "manifest.json").write_bytes(manifest)
    for name, data in files.items():
        (place / name).write_bytes(data)
    return place.name


class Runs:
    """Makes runs in a store. ``labels`` are those of the 2 x 100 test images, all 1."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.made = 0

    def data(self, options=None) -> str:
        folder = self.store.folder / "index.npz"
        np.savez(folder, labels=np.ones(200, dtype=np.int64), metadata=np.zeros((200, 1), dtype=np.int64))
        meta = {"dataset": "digits5", "digest": json.dumps(options or {}), "rows": {"test": 200}}
        return put(self.store, "data", meta, {"index.npz": folder.read_bytes()})

    def evaluation(self, seed, right, protocol="split", latency=None, cost=None, predictions=True) -> str:
        """``right``: method -> number of right answers in each domain, of 100."""
        from safetensors.numpy import save

        methods = []
        logits = {"rows": np.arange(200)}
        for name, counts in right.items():
            reference = name.rpartition("_")[0] if "_" in name else ""
            scores = [count / 100 for count in counts]
            methods.append(
                {
                    "name": name,
                    "label": name.replace("_", " + "),
                    "reference": reference,
                    "scores": {"accuracy": sum(scores) / 2, "macro_f1": sum(scores) / 2 - 0.1},
                    "domain_scores": scores,
                    "cost": cost or {},
                }
            )
            answers = np.concatenate([np.arange(100) < count for count in counts])
            logits[name] = np.stack([~answers, answers], axis=1).astype(np.float32)
        record = {
            "format": 1,
            "dataset": "digits5",
            "task": "multiclass",
            "metric": "accuracy",
            "protocol": protocol,
            "split": "test",
            "seed": seed,
            "support_size": 64,
            "domains": list(DOMAINS),
            "counts": [100, 100],
            "methods": methods,
            "settings": {"erm_steps": 40, "student_steps": 20},
            "rows": list(range(200)),
        }
        files = {"evaluation.json": (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()}
        if predictions:
            files["logits.safetensors"] = save(logits)
        self.made += 1
        return put(self.store, "metrics", {"dataset": "digits5", "nonce": self.made}, files)

    def run(
        self,
        right=None,
        seeds=(0, 1, 2),
        name="toy",
        stages=None,
        status="finished",
        hours=3600.0,
        spec=None,
        artifacts=None,
        **evaluation,
    ):
        """A run; ``right`` may be a function of the seed. Returns its id."""
        self.made += 1
        run = self.store.folder / "runs" / f"{name}-20260101-{self.made:06d}-{self.made:04x}"
        run.mkdir(parents=True)
        every = stages or STAGES
        document = {"apiVersion": "moepipe/v1", "name": name, "scale": "smoke", "seeds": list(seeds), "stages": every}
        (run / "spec.json").write_text(json.dumps({**document, **(spec or {})}))
        (run / "run.json").write_text(json.dumps({"id": run.name, "created": float(self.made), "origin": None}))
        events = [(0.0, "run-started", "", {})]
        made = {"data": self.data(every["data"]["config"].get("options"))}
        for seed in seeds:
            answers = right(seed) if callable(right) else right
            for stage in ("erm", "distill"):
                made[f"{stage}/seed={seed}"] = put(self.store, "model", {"stage": stage, "seed": seed}, {})
            if answers is not None:
                made[f"evaluate/seed={seed}"] = self.evaluation(seed, answers, **evaluation)
        made.update(artifacts or {})
        for node, digest in made.items():
            events.append((1.0, "member-started", node, {"attempt": 1}))
            events.append((1.5, "member-progress", node, {"done": 1, "total": 2, "values": {"loss": 1.0}}))
            if node.startswith("evaluate"):
                events.append((1.6, "member-metrics", node, {"values": {"latency_ms/student": 2.5}, "step": None}))
            events.append((2.0, "member-finished", node, {"key": digest, "digest": digest, "seconds": hours}))
        events.append((3.0, "run-finished", "", {"status": status}))
        lines = [{"time": when, "kind": kind, "node": node, "data": data} for when, kind, node, data in events]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        (run / "events.jsonl").write_text(text)
        (run / "artifacts.json").write_text(json.dumps(made))
        return run.name
