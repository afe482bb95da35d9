"""The only file that imports MLflow: a few verbs over its client, in our words and within its limits.

What is written when is decided by :mod:`orchestrator.projection`. Everything here may be repeated: runs are found again
by their tags, and MLflow keeps one of two equal points.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock

from moe.errors import EnvironmentProblem
from orchestrator.model_package import Package
from orchestrator.tracking_state import MAX_METRIC_KEYS, MAX_PARAMS, clean_key
from orchestrator.ui_views import TAG, encode, view_state

_BATCH = 1000
_MAX_TAG = 5000
_MAX_DIGEST = 36
_FOUND_AT_ONCE = 5000
_VIEWED = 20
_DEPLOYED = "moepipe.deployed"
_FLOAT = np.dtype("float32")


def connect(uri: str) -> Any:
    """An ``MlflowClient`` for ``uri`` that gives up soon and sends no telemetry.

    Raises:
        EnvironmentProblem: the server does not answer, or the database cannot be used.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    _probe(uri)
    import mlflow
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    try:
        if not uri.startswith("sqlite:///"):
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
            return client
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes must not create the tables of a new file at the same time.
        with FileLock(f"{path}.lock"):
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        return client
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise EnvironmentProblem(f"MLflow at {uri} does not work: {line}", "See moepipe doctor.") from error


def _probe(uri: str) -> None:
    """Ask whether anybody listens before MLflow's own long retries start."""
    if not uri.startswith(("http://", "https://")):
        return
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"MLflow at {uri} does not answer: {error.strerror or error}.", "Start it, or unset MLFLOW_TRACKING_URI."
        ) from None


def save_view(client: Any, experiment: str) -> str:
    """Keep a view of an experiment's last pipeline runs in MLflow; returns its key, empty without runs."""
    query = "tags.`moepipe.type` = 'pipeline'"
    found = client.search_runs([experiment], query, max_results=_VIEWED, order_by=["attributes.start_time DESC"])
    runs = [(run.data.metrics, run.data.params) for run in found]
    if not runs:
        return ""
    key, text = encode(view_state(runs))
    client.set_experiment_tag(experiment, f"{TAG}{key}", text)
    return key


class Writer:
    """Writes to one experiment.

    Args:
        client: from :func:`connect`.
        experiment: its name; made when it does not exist.
        artifacts: where files of a new experiment go; None: where the server wants them.
    """

    def __init__(self, client: Any, experiment: str, artifacts: Path | None) -> None:
        self._client = client
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = (artifacts / clean_key(experiment)).as_uri() if artifacts else None
            with suppress(Exception):  # another process made it in between; the next line finds out
                client.create_experiment(experiment, artifact_location=place)
            found = client.get_experiment_by_name(experiment)
        self.experiment: str = found.experiment_id
        self._points: dict[str, list[Any]] = defaultdict(list)
        self._names: dict[str, set[str]] = defaultdict(set)

    def run(self, title: str, when: float, tags: Mapping[str, str]) -> tuple[str, bool]:
        """Id of the run with the tags ``moepipe.run`` and ``moepipe.name``, and whether it was made now."""
        query = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in ("moepipe.run", "moepipe.name"))
        found = self._client.search_runs([self.experiment], query, max_results=1)
        if found:
            return str(found[0].info.run_id), False
        made = self._client.create_run(self.experiment, int(when * 1000), dict(tags), title)
        return str(made.info.run_id), True

    def reopen(self, run: str) -> None:
        """A run that was closed goes on."""
        self._client.update_run(run, status="RUNNING")

    def end(self, run: str, status: str, when: float) -> None:
        """Close a run: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._client.set_terminated(run, status, int(when * 1000))

    def params(self, run: str, values: Mapping[str, str]) -> None:
        """At most 100 parameters."""
        from mlflow.entities import Param

        self._client.log_batch(run, params=[Param(key, value) for key, value in values.items()][:MAX_PARAMS])

    def tags(self, run: str, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self._client.log_batch(run, tags=[RunTag(key, value[:_MAX_TAG]) for key, value in values.items()])

    def point(self, run: str, key: str, value: float, step: int, when: float) -> None:
        """Queue one point. Of more than 60 names of a run the later ones are left out: charts choke on them."""
        from mlflow.entities import Metric

        label, known = clean_key(key), self._names[run]
        if label in known or len(known) < MAX_METRIC_KEYS:
            known.add(label)
            self._points[run].append(Metric(label, value, int(when * 1000), step))

    def flush(self) -> None:
        """Write the queued points, in batches: one by one they cost some 10 ms each."""
        for run, points in self._points.items():
            for start in range(0, len(points), _BATCH):
                self._client.log_batch(run, metrics=points[start : start + _BATCH])
        self._points.clear()

    def document(self, run: str, name: str, value: dict[str, Any]) -> None:
        """Attach a JSON file."""
        self._client.log_dict(run, value, name)

    def files(self, run: str, folder: Path, name: str) -> None:
        """Attach all files of a folder below ``name``."""
        self._client.log_artifacts(run, str(folder), name)

    def dataset(self, run: str, name: str, digest: str, context: str, rows: Mapping[str, int] | None = None) -> None:
        """Record a data set as an input of a run: ``context`` says what for, ``rows`` how many by split."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(dict(rows)) if rows else None
        source = Dataset(name, digest[:_MAX_DIGEST], "moepipe", f"artifact {digest}", profile=profile)
        self._client.log_inputs(run, [DatasetInput(source, [InputTag("mlflow.data.context", context)])])

    def values(self, run: str, values: Mapping[str, float], when: float) -> None:
        """Write single numbers now, over what stood there."""
        for key, value in values.items():
            self.point(run, key, value, 0, when)
        self.flush()

    def model(self, run: str, name: str, package: Package) -> str:
        """Log a model with its signature and input example; returns its id (the same for one that is there)."""
        from mlflow import pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types.schema import Schema, TensorSpec

        digest = str(package.metadata["artifact"])
        known = self._client.search_logged_models(
            [self.experiment], filter_string=f"tags.`moepipe.artifact` = '{digest}'", max_results=1
        )
        if known:
            return str(known[0].model_id)
        tags = {"moepipe.artifact": digest}
        logged = self._client.create_logged_model(self.experiment, name, run, tags, model_type="moepipe")
        shapes = [Schema([TensorSpec(_FLOAT, shape)]) for shape in (package.inputs, package.outputs)]
        record = Model(
            run_id=run,
            model_id=logged.model_id,
            signature=ModelSignature(*shapes),
            saved_input_example_info={"artifact_path": "input_example.json", "type": "ndarray", "format": "tf-serving"},
            metadata=dict(package.metadata),
        )
        pyfunc.add_to_model(record, "orchestrator.model_package", data="data", python_env="python_env.yaml")
        (package.folder / "python_env.yaml").write_text("dependencies:\n- -r requirements.txt\n")
        record.save(str(package.folder / "MLmodel"))
        self._client.log_model_artifacts(logged.model_id, str(package.folder))
        self._client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)

    def register(
        self, name: str, digest: str, run: str, when: float, tags: Mapping[str, str], model: str | None = None
    ) -> str:
        """Version of the model ``name`` that stands for an artifact; made when there is none yet.

        Args:
            name: in the registry; made when it does not exist.
            digest: of the artifact, kept as tag ``moepipe.artifact``.
            run: MLflow run that it came from.
            when: kept as tag ``moepipe.deployed``, in seconds; the later of two times stays.
            tags: further tags of a new version.
            model: id of the logged model with its files; None: the version only points to the store.
        """
        with suppress(Exception):  # it exists already; the next line finds out
            self._client.create_registered_model(name)
        self._client.get_registered_model(name)
        found = self._version_of(name, digest)
        if found is None:
            own = {**tags, "moepipe.artifact": digest, _DEPLOYED: repr(when)}
            source = f"models:/{model}" if model else f"moepipe:/artifacts/{digest}"
            made = self._client.create_model_version(name, source, run_id=run, tags=own, model_id=model)
            return str(made.version)
        if when > _time_of(found):
            self._client.set_model_version_tag(name, found.version, _DEPLOYED, repr(when))
        return str(found.version)

    def point_alias(self, name: str, alias: str, version: str) -> bool:
        """Let ``alias`` mean ``version``, unless it means one that was deployed later; whether it does now."""
        registered = self._client.get_registered_model(name)
        holder = registered.aliases.get(alias)
        if holder is not None and str(holder) != version:
            times = [_time_of(self._client.get_model_version(name, number)) for number in (str(holder), version)]
            if times[0] > times[1]:
                return False
        self._client.set_registered_model_alias(name, alias, version)
        return True

    def holder(self, name: str, alias: str) -> tuple[str, Mapping[str, str]] | None:
        """The version that ``alias`` means, and its tags; None when there is none."""
        try:
            version = self._client.get_model_version_by_alias(name, alias)
        except Exception:  # neither the model nor the alias has to exist
            return None
        return str(version.version), dict(version.tags)

    def promote(self, name: str, alias: str, version: str, tags: Mapping[str, str]) -> None:
        """Let ``alias`` mean ``version`` from now on, and say on it why."""
        for key, value in tags.items():
            self._client.set_model_version_tag(name, version, key, value[:_MAX_TAG])
        self._client.set_registered_model_alias(name, alias, version)

    def _version_of(self, name: str, digest: str) -> Any:
        query = f"name = '{name}' and tag.`moepipe.artifact` = '{digest}'"
        found = self._client.search_model_versions(query, max_results=1)
        return found[0] if found else None

    def members_by_key(self) -> dict[str, str]:
        """Cache key -> the newest member run that made it, of this experiment."""
        query = "tags.`moepipe.type` = 'member'"
        found = self._client.search_runs([self.experiment], query, max_results=_FOUND_AT_ONCE)
        return {run.data.tags.get("moepipe.key", ""): str(run.info.run_id) for run in reversed(found)}


def _time_of(version: Any) -> float:
    """When a registered version was last deployed; 0 for one that was registered by hand."""
    return float(dict(version.tags).get(_DEPLOYED, 0.0))
