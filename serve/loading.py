"""From what a user names to the files of a model: student, its frozen experts, their aggregator.

A source is one of

- a folder with a ``manifest.json``: an artifact of kind ``model``, ``student``, ``jetpack_run`` or ``m2mkd_network``,
  or a *bundle* (kind ``served``, made by :func:`write_bundle`) that carries the experts with it;
- the digest of an artifact in the store, or its first 8 digits or more;
- a run id (``RUN`` takes what it deployed first, else its first student, else its only model; ``RUN/NODE`` names the
  member), or a deployment, which stands for its model;
- ``models:/NAME@ALIAS``: a version in MLflow's registry whose tag ``moepipe.artifact`` holds the digest.

A student's experts are found through the record of how it was made: its ``features`` inputs name their networks. The
names of the classes come the same way, from the prepared data set.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError, MoepipeError, NotFoundError, SpecError
from orchestrator.artifacts import MANIFEST, Artifact, describe_folder, digest_of
from orchestrator.blobs import write_atomic
from orchestrator.runs import Run, RunStore
from orchestrator.store import DEFAULT_URL, Store
from orchestrator.tracking_state import tracking_uri
from workers.modelfile import AGGREGATOR_FILE, MODEL_FILE

BUNDLE = "served"
_MODELS = ("model", "jetpack_run", "m2mkd_network")
_SERVABLE = (BUNDLE, "student", *_MODELS)
_DEPLOYMENT = "deployment"
_REGISTRY = re.compile(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))")
_DIGITS = re.compile(r"[0-9a-f]{8,64}")
_NATURAL = re.compile(r"(\d+)")
_VALUE_NAMES = "value_names.json"  # of a data artifact: metadata column -> names of its values


@dataclass(frozen=True)
class Network:
    """A network on disk: the folder with ``model.safetensors`` and the record that rebuilds it."""

    folder: Path
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """What :func:`locate` found.

    Attributes:
        name: for people and URLs: letters, digits, ``-`` and ``_``.
        version: hex digest of the artifact (or bundle); a state belongs to exactly one.
        student: the network that is served.
        experts: frozen experts in the order in which the aggregator was trained; empty when they are not known.
        why: in words, why there are no experts or no aggregator; empty when both are there.
        class_names: names of the K outputs, or empty.
    """

    name: str
    version: str
    student: Network
    experts: Sequence[Network] = ()
    why: str = ""
    class_names: Sequence[str] = ()

    @property
    def has_aggregator(self) -> bool:
        """Whether the student's aggregator lies beside it."""
        return "aggregator" in self.student.meta and (self.student.folder / AGGREGATOR_FILE).is_file()


def locate(source: str, store_url: str | None = None, name: str | None = None) -> Parts:
    """Find the files of ``source``.

    Args:
        source: see the module.
        store_url: the store of digests, runs and registry; the default store when left out.
        name: replaces the name that the source suggests.

    Raises:
        NotFoundError: there is no such folder, artifact, run or registered model.
        SpecError: the artifact is not a model, or a run has several.
        CheckpointError: the manifest does not belong to the folder.
        EnvironmentProblem: the registry does not answer.
    """
    folder = Path(source).expanduser()
    if source.startswith("models:"):
        parts = _registered(source, Store.open(store_url or DEFAULT_URL))
    elif (folder / MANIFEST).is_file():
        parts = _folder(folder, Store.open(store_url) if store_url else None)
    elif folder.is_dir():
        raise NotFoundError(f"The folder {folder} has no {MANIFEST}.", "Give the folder of an artifact or of a bundle.")
    else:
        store = Store.open(store_url or DEFAULT_URL)
        found = [d for d in store.digests() if d.startswith(source)] if _DIGITS.fullmatch(source) else []
        if len(found) > 1:
            raise NotFoundError(f"{source!r} could be {len(found)} artifacts.", "Give more digits.")
        parts = _stored(store, found[0]) if found else _of_run(source, store)
    return replace(parts, name=plain_name(name)) if name else parts


def write_bundle(parts: Parts, folder: Path, class_names: Sequence[str] | None = None) -> str:
    """Copy everything that serving needs into one folder, which needs no store, and return its digest.

    Args:
        parts: what to copy.
        folder: new or empty.
        class_names: names of the outputs; those of ``parts`` when left out.

    Raises:
        SpecError: the folder has something in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SpecError(f"{folder} is not empty.", "Choose a new folder.")
    shutil.copyfile(parts.student.folder / MODEL_FILE, folder / MODEL_FILE)
    if parts.has_aggregator:
        shutil.copyfile(parts.student.folder / AGGREGATOR_FILE, folder / AGGREGATOR_FILE)
    for number, expert in enumerate(parts.experts):
        (folder / f"experts/{number}").mkdir(parents=True)
        shutil.copyfile(expert.folder / MODEL_FILE, folder / f"experts/{number}" / MODEL_FILE)
    meta = {
        **parts.student.meta,
        "name": parts.name,
        "class_names": list(parts.class_names if class_names is None else class_names),
        "experts": [dict(expert.meta) for expert in parts.experts],
    }
    manifest = describe_folder(folder, BUNDLE, meta).manifest()
    write_atomic(folder / MANIFEST, manifest)
    return digest_of(manifest)


def plain_name(text: str) -> str:
    """``text`` with everything but letters, digits, ``-`` and ``_`` replaced; never empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:64] or "model"


def _folder(folder: Path, store: Store | None) -> Parts:
    data = (folder / MANIFEST).read_bytes()
    try:
        artifact = Artifact.parse(digest_of(data), data)
    except (ValueError, KeyError, TypeError, MoepipeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}.", "Copy the folder again.") from None
    return _parts(artifact, folder, store, plain_name(folder.resolve().name))


def _stored(store: Store, digest: str, name: str = "") -> Parts:
    artifact = store.artifact(digest)
    if artifact.kind == _DEPLOYMENT:
        return _stored(store, str(artifact.meta["model"]), str(artifact.meta["name"]))
    return _parts(artifact, store.local_path(artifact), store, name or str(artifact.meta.get("dataset", "model")))


def _parts(artifact: Artifact, folder: Path, store: Store | None, name: str) -> Parts:
    if artifact.kind not in _SERVABLE:
        raise SpecError(
            f"Artifact {artifact.digest[:12]} is of kind {artifact.kind!r}, which cannot be served.",
            f"Serve one of kind {' or '.join(_SERVABLE)}.",
        )
    if artifact.kind == "jetpack_run" and not (folder / MODEL_FILE).is_file():
        raise NotFoundError(
            f"Artifact {artifact.digest[:12]} keeps no weights.",
            "Set save_model: true in the jetpack_train stage that made it.",
        )
    meta = dict(artifact.meta)
    class_names = meta.get("class_names", ())
    if artifact.kind == BUNDLE:
        experts = [Network(folder / f"experts/{n}", record) for n, record in enumerate(meta.pop("experts", []))]
    else:
        made = [] if store is None else [r.parts for r in store.records() if r.artifact == artifact.digest]
        experts = _experts_of(made, store) if artifact.kind == "student" and store is not None else []
        class_names = class_names or (_class_names(made, store) if store is not None else ())
    parts = Parts(
        name=plain_name(str(meta.pop("name", "")) or name),
        version=artifact.digest,
        student=Network(folder, meta),
        experts=experts,
        class_names=tuple(class_names),
    )
    return replace(parts, why=_why(parts, store))


def _why(parts: Parts, store: Store | None) -> str:
    if not parts.has_aggregator:
        return "the model was not meta-distilled: it has no aggregator"
    if parts.experts:
        return ""
    where = "no store was given to look for them in" if store is None else "the record of its training names none"
    return f"the model's experts are not known: {where}"


def _experts_of(made: Sequence[Mapping[str, str]], store: Store) -> list[Network]:
    """The networks whose features a student was distilled from, in order; empty when any of them is gone.

    Args:
        made: parts of the keys under which the student was made.
        store: where they are looked up.
    """
    for parts in made:
        arriving = parts.get("input.features", "")
        if arriving:
            try:
                features = [store.artifact(item.rpartition("@")[2]) for item in arriving.split()]
                experts = [store.artifact(str(item.meta["expert"])) for item in features]
                return [Network(store.local_path(expert), expert.meta) for expert in experts]
            except (NotFoundError, KeyError):
                continue
    return []


def _class_names(made: Sequence[Mapping[str, str]], store: Store) -> tuple[str, ...]:
    """Names of the classes in the data set that a network was trained on; empty when it is gone or has none."""
    for parts in made:
        try:
            data = store.artifact(parts.get("input.data", "").rpartition("@")[2])
            names = json.loads((store.local_path(data) / _VALUE_NAMES).read_text(encoding="utf-8"))
            return tuple(map(str, names.get("y", ())))
        except (MoepipeError, OSError, ValueError):
            continue
    return ()


def _of_run(source: str, store: Store) -> Parts:
    runs = RunStore(store)
    run_id, _, node = source.partition("/")
    try:
        run = runs.open(run_id)
    except NotFoundError as error:
        raise NotFoundError(
            f"{source!r} is not a folder, an artifact's digest or a run of {store.url}.", error.hint
        ) from None
    made = _results(run)
    found = {name: store.artifact(digest) for name, digest in made.items()}
    if node:
        if node not in made:
            raise NotFoundError(f"Run {run.id} has no finished member {node!r}.", f"It has: {', '.join(made)}.")
        return _stored(store, made[node], run.spec().name)
    ordered = sorted(made, key=_natural)
    deployed = [name for name in ordered if found[name].kind == _DEPLOYMENT]
    if deployed:
        return _stored(store, made[deployed[0]])
    students = [name for name in ordered if found[name].kind == "student"]
    models = [name for name in ordered if found[name].kind in _MODELS and MODEL_FILE in found[name].files]
    chosen = students[:1] or models
    if not chosen:
        raise NotFoundError(f"Run {run.id} has made no model yet.", f"See `moepipe status {run.id}`.")
    if len(chosen) > 1:
        raise SpecError(
            f"Run {run.id} has {len(chosen)} models.", f"Choose one: {shlex.quote(f'{run.id}/{chosen[0]}')}, ..."
        )
    return _stored(store, made[chosen[0]], run.spec().name)


def _results(run: Run) -> dict[str, str]:
    """Node -> digest of all finished members, also of a run that goes on or failed."""
    made = dict(run.artifacts())
    for event in () if made else run.events():
        if event.kind in ("member-hit", "member-finished") and event.data.get("digest"):
            made[event.node] = str(event.data["digest"])
    return made


def _natural(text: str) -> list[Any]:
    return [int(piece) if piece.isdigit() else piece for piece in _NATURAL.split(text)]


def _registered(source: str, store: Store) -> Parts:
    match = _REGISTRY.fullmatch(source)
    if match is None:
        raise SpecError(f"{source!r} is not a registered model.", "Write models:/NAME@ALIAS or models:/NAME/VERSION.")
    uri = tracking_uri(None, store)
    nothing = "Serve a folder, an artifact's digest or a run, or set MLFLOW_TRACKING_URI."
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise NotFoundError(f"{source}: there is no model registry ({uri} does not exist).", nothing)
    from orchestrator.tracking import connect

    client = connect(uri)
    name, alias = match["name"], match["alias"]
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(name, match["version"])
    except Exception as error:  # MLflow has one exception class for everything
        line = (str(error).strip().splitlines() or ["no answer"])[0][:200]
        raise NotFoundError(f"{source} is not in the registry at {uri}: {line}", nothing) from error
    digest = dict(version.tags).get("moepipe.artifact")
    if not digest:
        raise NotFoundError(
            f"{source} has no tag moepipe.artifact, which names its artifact.", "Register it again with the tag."
        )
    return _stored(store, digest, name)
