"""What the MLflow projection knows without MLflow: where it writes, how far it is, and what things are called.

The state of a run's projection is one small JSON file, ``tracking/<run>.json`` in the store (an ended run's own folder
is never written again). It makes the projection repeatable: what was written is known by position, and MLflow ignores
the same point or tag written twice.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.blobs import write_atomic
from orchestrator.spec import PipelineSpec
from orchestrator.store import Store

CHAMPION, CANDIDATE = "champion", "candidate"
MAX_PARAMS = 100
MAX_METRIC_KEYS = 60
_MAX_KEY = 250
_MAX_PARAM = 6000
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_\-. :/]")


@dataclass
class TrackingState:
    """How far the projection of one run to one server is.

    Attributes:
        uri: MLflow tracking address.
        experiment: experiment id, empty before the first contact.
        position: byte position in the event file up to which everything is written.
        runs: MLflow run ids by name: "" (the pipeline), ``stage:NAME``, ``node:ID``.
        reused: node id -> MLflow run id of the earlier run that made a hit.
        ended: names of runs that were closed.
        complete: the run's last event is written.
        error: in words, why it is not; empty when nothing is wrong.
    """

    uri: str = ""
    experiment: str = ""
    position: int = 0
    runs: dict[str, str] = field(default_factory=dict)
    reused: dict[str, str] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    complete: bool = False
    error: str = ""

    @staticmethod
    def load(path: Path, uri: str | None = None) -> TrackingState:
        """The state on disk; a fresh one when there is none or when it belongs to another ``uri``."""
        try:
            state = TrackingState(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return TrackingState(uri=uri or "")
        return state if uri in (None, state.uri) else TrackingState(uri=uri or "")

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        write_atomic(path, json.dumps(asdict(self), indent=1).encode())


def state_path(store: Store, run: str) -> Path:
    """Where the state of a run's projection lies; the process's own messages are beside it, ``.log``."""
    return store.folder / "tracking" / f"{run}.json"


def tracking_uri(spec: PipelineSpec | None, store: Store) -> str:
    """Where a run is projected to: the spec's address, ``MLFLOW_TRACKING_URI``, or a sqlite file in the store."""
    chosen = (spec.tracking.uri if spec else None) or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"sqlite:///{store.folder / 'mlflow.db'}"


def artifact_folder(store: Store) -> Path:
    """Where MLflow keeps its copies of reports when the database is the store's own."""
    return store.folder / "mlflow"


def experiment_name(spec: PipelineSpec) -> str:
    """MLflow experiment of a pipeline."""
    return spec.tracking.experiment or spec.name


def clean_key(name: str) -> str:
    """``name`` with only the characters that MLflow accepts, at most 250 long."""
    return _NOT_ALLOWED.sub("_", name).strip("/")[:_MAX_KEY] or "_"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, texts of at most 6000 characters.

    Lists stay one value. The first 100 are kept: the whole specification is attached as a file.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        elif value is not None and value != {} and value != "":
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[clean_key(name)] = text[:_MAX_PARAM]
    return dict(list(flat.items())[:MAX_PARAMS])


def parse_node(node: str) -> tuple[str, int | None, str]:
    """Stage, seed and member of a node id: ``experts/seed=0/group=2`` -> ``("experts", 0, "group=2")``."""
    stage, *rest = node.split("/")
    seed = None
    if rest and re.fullmatch(r"seed=\d+", rest[0]):
        seed = int(rest.pop(0).removeprefix("seed="))
    return stage, seed, "/".join(rest)
