"""Options that several commands share, and what the shell completes for them. Light: no torch, ray or pydantic."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = "./.moepipe"
JSON_KEY = "moepipe.json"


def _remember_json(context: typer.Context, value: bool) -> bool:
    """Let the error handler know that the caller reads JSON."""
    context.meta[JSON_KEY] = value
    return value


def complete_pipeline(incomplete: str) -> Iterator[str]:
    """YAML files below ``pipelines/``, and paths that begin as typed."""
    folder = Path(incomplete).parent if "/" in incomplete else Path()
    found = {*Path("pipelines").glob("**/*.yaml"), *folder.glob("*.yaml")}
    yield from sorted(str(path) for path in found if str(path).startswith(incomplete))


def complete_run(incomplete: str) -> Iterator[str]:
    """Run ids in the store of the environment (or the default one), newest first."""
    folder = Path(os.environ.get("MOEPIPE_STORE", DEFAULT_STORE)) / "runs"
    names = sorted((path.name for path in folder.glob("*") if path.is_dir()), reverse=True)
    yield from (name for name in names if name.startswith(incomplete))


def complete_path(incomplete: str) -> Iterator[str]:
    """What ``moepipe explain`` knows."""
    from orchestrator.explain import paths

    yield from (name for name in paths() if name.startswith(incomplete))


def complete_method(incomplete: str) -> Iterator[str]:
    """What ``moepipe init`` can write."""
    from orchestrator.scaffold import methods

    yield from (name for name in methods() if name.startswith(incomplete))


def complete_dataset(incomplete: str) -> Iterator[str]:
    """Data set names, texts included."""
    from workers.datasets.base import DATASETS
    from workers.texts.base import TEXTS

    yield from (name for name in [*DATASETS.names(), *TEXTS.names()] if name.startswith(incomplete))


Pipeline = Annotated[
    Path,
    typer.Argument(metavar="PIPELINE", help="The pipeline's YAML file.", autocompletion=complete_pipeline),
]
RunId = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Run id, a unique beginning of one, or 'latest'.", autocompletion=complete_run),
]
Profile = Annotated[
    str | None,
    typer.Option("--profile", "-p", envvar="MOEPIPE_PROFILE", help="Name of a profile in the YAML, e.g. laptop."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="PATH=VALUE", help="Override one value of the YAML; may be repeated."),
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="0,1,2", help="Override the pipeline's seeds."),
]
Sweep = Annotated[
    list[str] | None,
    typer.Option("--sweep", metavar="PATH=A,B,...", help="Run at every value; several options make a grid."),
]
StoreUrl = Annotated[
    str,
    typer.Option("--store", envvar="MOEPIPE_STORE", help="Where artifacts and run records live (folder or URL)."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data", envvar="MOEPIPE_DATA", help="Folder with prepared data sets.", show_default="STORE/data"),
]
On = Annotated[
    str,
    typer.Option(
        "--on", metavar="WHERE", help="ray (own local cluster), inline (this process), or a cluster's address."
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        "--address",
        metavar="WHERE",
        help="Run it there through Ray Jobs: a cluster's YAML, or http://host:8265.",
    ),
]
RunName = Annotated[
    str | None,
    typer.Option("--run", metavar="NAME", help="The run's id; submitting the same name again continues it."),
]
Detach = Annotated[bool, typer.Option("--detach", help="With --cluster: submit and leave.")]
AnyCode = Annotated[bool, typer.Option("--any-code", help="With --cluster: though its code differs from here.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout.", callback=_remember_json),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; the result and errors only.")]


def data_root(data: Path | None, store: str) -> Path:
    """Folder with prepared data sets: the option, or ``data`` inside a local store, or ``./.moepipe/data``."""
    if data is not None:
        return data
    local = store.removeprefix("file://")
    return Path(DEFAULT_STORE if "://" in local else local) / "data"


def store_there(store: str) -> str | None:
    """The store as a cluster is told of it: a URL, or None, then the cluster's own MOEPIPE_STORE counts there.

    Raises:
        SpecError: a folder of this machine was asked for (not by MOEPIPE_STORE, which is this machine's default).
    """
    from moe.errors import SpecError

    if "://" in store and not store.startswith("file://"):
        return store
    if store not in (DEFAULT_STORE, os.environ.get("MOEPIPE_STORE")):
        raise SpecError(
            f"--store {store} is a folder, and --cluster uses the folder that MOEPIPE_STORE names there.",
            "Set it on the cluster (deploy/env.sh), or give a URL like s3://bucket/path, which is passed on.",
        )
    return None


def data_there(data: Path | None) -> str | None:
    """The folder with data sets on a cluster; None: the cluster's own MOEPIPE_DATA counts there."""
    return None if data is None or os.environ.get("MOEPIPE_DATA") == str(data) else str(data)


def all_overrides(overrides: list[str] | None, seeds: str | None) -> list[str]:
    """The ``--set`` values, with ``--seeds`` as one of them."""
    chosen = list(overrides or [])
    if seeds is not None:
        chosen.append(f"seeds=[{seeds}]")
    return chosen


def store_flag(place: Path | str) -> str:
    """`` --store PLACE`` for commands that are printed, empty where they find the store without it."""
    if os.environ.get("MOEPIPE_STORE") or Path(place) == Path(DEFAULT_STORE).resolve():
        return ""
    return f" --store {place}"
