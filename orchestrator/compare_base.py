"""What readers of results share: files of artifacts, settings of what made them, time and cost.

Only JSON is read here; stored predictions are named and read when the bootstrap needs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.errors import DataError
from orchestrator.artifacts import MANIFEST
from orchestrator.compare_cost import Clock
from orchestrator.compare_read import Made, RunFacts, read_run
from orchestrator.compare_result import ModelCost
from orchestrator.runs import RunStore
from orchestrator.store import Store

EVALUATION = "evaluation.json"
_SEARCHED = 50  # runs in which the measurements of hits are looked for
# Choices of a data set that say which domain is held out: other domains are other columns, not other data.
HELD_OUT = ("target", "holdout", "held_out", "test", "fold")
# Settings that say what is run and reported, and not how a model is made.
NOT_HOW: Mapping[str, tuple[str, ...]] = {
    "sweep": ("datasets", "algorithms", "n_trials", "test_envs", "extends", "routing", "merge", "save_model"),
    "evaluate": ("curve", "streams", "replicates", "batch_size"),
}


class Source:
    """Files and settings of the runs of one store, each read once.

    Args:
        store: where the artifacts are.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.clock = Clock(store)
        self._settings: dict[tuple[str, str], tuple[Mapping[str, Any], str]] = {}
        self._measured: dict[str, Mapping[str, float]] | None = None

    def settings(self, run: RunFacts, stages: Sequence[str]) -> tuple[dict[str, Mapping[str, Any]], str]:
        """Settings of stages and of all that they are made from, and the same as one text to compare by.

        Without the data and without what only decides what is reported.
        """
        found, texts = {}, []
        for name in run.closure(stages):
            stage = run.stages[name]
            if stage.kind in ("prepare", "text_prepare"):
                continue
            if (run.id, name) not in self._settings:
                hidden = NOT_HOW.get(stage.kind, ())
                kept = {key: value for key, value in stage.config.items() if key not in hidden}
                self._settings[run.id, name] = kept, f"{name}:{stage.kind}:{json.dumps(kept, sort_keys=True)}"
            found[name], text = self._settings[run.id, name]
            texts.append(text)
        return found, "\n".join(texts)

    def metrics(self, made: Made) -> Mapping[str, float]:
        """What a member recorded; for a hit, what it recorded in the run that made it, if that is among the last."""
        if made.metrics or made.seconds is not None:
            return made.metrics
        if self._measured is None:
            self._measured = {}
            for run in RunStore(self.store).list()[:_SEARCHED]:
                for other in read_run(run).made.values():
                    if other.metrics:
                        self._measured.setdefault(other.key, other.metrics)
        return self._measured.get(made.key, {})

    def folder(self, digest: str) -> Path:
        """Where an artifact's files are; a remote one is fetched."""
        if self.store.is_local:
            return self.store.folder / "artifacts" / digest
        return self.store.local_path(self.store.artifact(digest))

    def json(self, digest: str, name: str) -> dict[str, Any]:
        """A JSON file of an artifact (DataError when it is not there any more, or damaged)."""
        try:
            text = (self.folder(digest) / name).read_bytes()
            found: dict[str, Any] = json.loads(_without_rows(text))
            return found
        except (OSError, ValueError) as error:
            raise DataError(
                f"{name} of artifact {digest[:12]} cannot be read: {error}.",
                "moepipe show RUN --verify says more; submit again to make it anew.",
            ) from None

    def meta(self, digest: str) -> dict[str, Any]:
        """The record of an artifact."""
        found: dict[str, Any] = self.json(digest, MANIFEST)["meta"]
        return found


def _without_rows(text: bytes) -> bytes:
    """An evaluation without the list of its rows, most of the file, which a table does not need."""
    begin = text.find(b'\n "rows": [')
    end = text.find(b"]", begin)
    return text[:begin] + b'\n "rows": []' + text[end + 1 :] if 0 <= begin < end else text


def data_of(run: RunFacts, stage: str) -> tuple[str, str]:
    """Identity of the rows (digest of the prepared data) and the options but for what is held out, as one text."""
    if stage not in run.stages:
        return "", ""
    options = run.stages[stage].config.get("options") or {}
    digest = next((made.digest for _, made in run.of_stage(stage, None)), "")
    return digest, text_of({key: value for key, value in options.items() if key not in HELD_OUT})


def cost_of(record: Mapping[str, Any], latency: float | None) -> ModelCost:
    """What a record says of a model's cost; ``latency`` in milliseconds comes from the event log."""
    return ModelCost(record.get("parameters"), record.get("active_parameters"), record.get("flops"), latency)


def text_of(options: Mapping[str, Any]) -> str:
    """Options as one text, sorted by name."""
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(options.items()))
