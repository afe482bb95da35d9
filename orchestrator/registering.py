"""What the projection says about models and data sets: versions in the registry, inputs of runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moe.errors import NotFoundError
from orchestrator.artifacts import Artifact
from orchestrator.model_package import write_package
from orchestrator.store import Store
from orchestrator.tracking import Writer


def register(
    writer: Writer, store: Store, name: str, digest: str, run: str, when: float, tags: Mapping[str, str]
) -> str:
    """Version of a registered model for an artifact, with its files, signature and input example where they fit.

    Args:
        writer: where to.
        store: where the artifact is; when it is gone, the version only names it.
        name: in the registry.
        digest: of the artifact.
        run: MLflow run that it came from.
        when: time of the deployment, in seconds.
        tags: of a new version.
    """
    model = None
    with suppress(NotFoundError), tempfile.TemporaryDirectory(prefix="moepipe-model-") as place:
        artifact = store.artifact(digest)
        folder = store.local_path(artifact)
        package = write_package(folder, artifact.meta, digest, artifact.bytes, Path(place))
        if package is not None:
            model = writer.model(run, name, package)
    return writer.register(name, digest, run, when, tags, model)


def data_record(artifact: Artifact, name: str) -> tuple[str, str]:
    """Name of a data set, and its digest: that of the rows where it is known."""
    return str(artifact.meta.get("dataset") or name), str(artifact.meta.get("digest") or artifact.digest)


def data_rows(artifact: Artifact) -> dict[str, int]:
    """Rows by split of a prepared data set."""
    rows = artifact.meta.get("rows")
    return {str(split): int(count) for split, count in rows.items()} if isinstance(rows, Mapping) else {}
