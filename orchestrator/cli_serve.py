"""Commands around a running server: serve, adapt, predict.

The server and its client live in ``serve``, which is found by import path: nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator import cli_options as opt

CLIENT = "serve.client"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
DEFAULT_URL = f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"
DEFAULT_IMAGE = "moepipe:latest"
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_ROWS = 128

Url = Annotated[str, typer.Option("--url", envvar="MOEPIPE_URL", help="Address of the server.")]
Token = Annotated[
    str | None, typer.Option("--token", envvar="MOEPIPE_TOKEN", help="Bearer token, if the server asks for one.")
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")]
Pictures = Annotated[
    list[Path], typer.Argument(metavar="IMAGES...", help="Picture files, folders of them, or one .npy [N, H, W, C].")
]


def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run id (or 'latest'), artifact digest, folder, or models:/NAME@ALIAS.",
            autocompletion=opt.complete_run,
        ),
    ] = "latest",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = DEFAULT_HOST,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = DEFAULT_PORT,
    name: Annotated[str | None, typer.Option("--name", help="Name of the model in the addresses.")] = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Processes that answer predictions.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Compute threads of each process.")] = 1,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:0.")] = "cpu",
    states: Annotated[
        Path | None, typer.Option("--states", help="Folder of the domain states.", show_default="STORE/states")
    ] = None,
    memory: Annotated[int, typer.Option("--memory", min=1, help="MB of states each process holds in memory.")] = 256,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="File with one tenant:token a line; needed off loopback.")
    ] = None,
    front: Annotated[
        str, typer.Option("--front", help="direct (fast, one machine) or proxy (through Ray Serve's proxy).")
    ] = "direct",
    samples: Annotated[
        Path | None,
        typer.Option("--samples", help="Pictures, or a folder of them for each domain, that the page offers to try."),
    ] = None,
    data: opt.DataRoot = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write a Ray Serve config to this file and start nothing.")
    ] = None,
    rayservice: Annotated[
        Path | None, typer.Option("--rayservice", help="Write a Kubernetes RayService and start nothing.")
    ] = None,
    image: Annotated[
        str, typer.Option("--image", help="Container image with moepipe, for --rayservice.")
    ] = DEFAULT_IMAGE,
) -> None:
    """Serve a model over HTTP; it adapts to new domains from unlabelled images. Ctrl-C ends it."""
    from moe.errors import SpecError
    from orchestrator import console, serving
    from orchestrator.blobs import write_atomic
    from orchestrator.executors.ray_env import prepare_environment
    from orchestrator.store import Store

    if rayservice is None and image != DEFAULT_IMAGE:
        raise SpecError("--image is for --rayservice.", "Add --rayservice FILE, or leave it out.")
    if rayservice is not None and export is None and (host, port) != (DEFAULT_HOST, DEFAULT_PORT):
        raise SpecError(
            "--host and --port have no effect on --rayservice: its pods listen on 0.0.0.0:8000.",
            "Leave them out; the service in front decides what is reached from where.",
        )
    place = Store.open(store)
    arguments: dict[str, Any] = {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "store": str(place.folder) if place.is_local else place.url,
        "name": name,
        "states": str((states or place.folder / "states").absolute()),
        "front": front,
        "host": host,
        "port": port,
        "replicas": replicas,
        "threads": threads,
        "device": device,
        "gpus": 1.0 if device.startswith("cuda") else 0.0,
        "resident_bytes": memory * 10**6,
        "tokens_file": None if tokens is None else str(tokens.absolute()),
        "data": str(opt.data_root(data, store).absolute()),
        "samples": None if samples is None else str(samples.absolute()),
    }
    prepare_environment()  # Ray reads its settings when it is imported, and the app imports it
    app = import_module(serving.APP)
    if export is None and rayservice is None:
        app.run(arguments)
        return
    app.check({**arguments, "front": "proxy"})
    if export is not None:
        write_atomic(export, serving.to_yaml(serving.serve_document(arguments, host, port)).encode())
        console.note(f"Wrote {export}. Next: serve deploy {export}")
    if rayservice is not None:
        document = serving.rayservice_document(arguments, name or "moepipe", image)
        write_atomic(rayservice, serving.to_yaml(document).encode())
        console.note(f"Wrote {rayservice}. Next: kubectl apply -f {rayservice}")


def adapt(
    state: Annotated[str, typer.Argument(metavar="STATE", help="Name of the domain state to make or renew.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGES...", help="Picture files, folders of them, or one .npy [N, H, W, C]."),
    ] = None,
    uri: Annotated[
        str | None, typer.Option("--uri", help="Instead of images: a data set that the server knows.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Adaptation method; by default the model's own.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Option of the method; repeatable.")
    ] = None,
    step_cap: Annotated[int | None, typer.Option("--step-cap", min=1, help="Most optimiser steps.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute and report; publish nothing.")] = False,
    quiet: opt.Quiet = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 600.0,
    json: opt.Json = False,
) -> None:
    """Adapt the served model to a new domain, from unlabelled images."""
    from orchestrator import console

    arguments: dict[str, Any] = {"uri": uri, "method": method, "options": _options(option or [])}
    arguments |= {"step_cap": step_cap, "dry_run": dry_run}
    found = pictures(images) if images else None
    if not (quiet or json) and console.interactive():
        arguments["progress"] = lambda done, total: console.note(f"{done} of {total} steps")
    with import_module(CLIENT).Client(url, token, timeout) as client:
        report = client.adapt(state, found, **arguments)
    if json:
        console.emit_json(console.finite(report))
        return
    show_report(state, report)


def predict(
    images: Pictures,
    state: Annotated[
        str | None, typer.Option("--state", help="Domain state, NAME or NAME.VERSION; shows before and after.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    timeout: Timeout = 60.0,
    json: opt.Json = False,
) -> None:
    """Ask the server what is on pictures; with --state before and after adaptation."""
    from orchestrator import console

    found = pictures(images)
    rows: list[dict[str, Any]] = []
    answer: dict[str, Any] = {}
    with import_module(CLIENT).Client(url, token, timeout) as client:
        for start in range(0, len(found), _ROWS):
            answer = client.predict(found[start : start + _ROWS], state)
            rows += answer["predictions"]
    if json:
        console.emit_json(console.finite({**answer, "predictions": rows}))
        return
    names = [image.name if isinstance(image, Path) else str(number) for number, image in enumerate(found)]
    show_predictions(names, rows)


def pictures(places: Sequence[Path]) -> list[Any]:
    """Picture files in the order given, folders in the order of their names, or the rows of one ``.npy``.

    Raises:
        NotFoundError: a place does not exist.
        DataError: no picture is there, or an array of another form.
    """
    from moe.errors import DataError, NotFoundError

    found: list[Any] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix.lower() in _PICTURES)
        elif not place.exists():
            raise NotFoundError(f"There is no picture or folder {place}.", "Check the path.")
        elif place.suffix == ".npy":
            found += _rows(place)
        else:
            found.append(place)
    if not found:
        raise DataError(
            f"There is no picture in {', '.join(map(str, places))}.", f"Known: {' '.join(sorted(_PICTURES))}."
        )
    return found


def _rows(path: Path) -> list[Any]:
    import numpy as np

    from moe.errors import DataError

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a NumPy array file: {error}.") from None
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}.", "Pictures are uint8 [N, H, W, C] or [N, H, W]."
        )
    return list(array)


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; a value is JSON where it can be read so, else text."""
    import json

    from moe.errors import SpecError

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise SpecError(f"{pair!r} is not NAME=VALUE.", "Write --option lr=0.001.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def show_report(state: str, report: dict[str, Any]) -> None:
    """An adaptation in a few lines."""
    from orchestrator import console

    made = report.get("state")
    outcome = f"{made['reference']} is served now" if made else "nothing was published"
    why = "it was a dry run" if report["dry_run"] else "the adaptation collapsed" if report["collapsed"] else ""
    console.say(f"{state}: {outcome}{f' ({why})' if why and not made else ''}")
    before, after = (_number(report[f"loss_{when}"]) for when in ("before", "after"))
    lines = {
        "method": report["method"],
        "images": report["support"],
        "loss": f"{before} -> {after}",
        "collapse check": report["collapse"],
        "experts heard": ", ".join(f"{weight:.2f}" for weight in report["expert_weights"]) or "none",
        "time": console.seconds(report["seconds"]),
        "size": "-" if report["bytes"] is None else console.size(report["bytes"]),
    }
    console.say(*(f"  {name:<15} {value}" for name, value in lines.items()))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def show_predictions(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """A table: one line for each picture, before and after where a state was asked."""
    from orchestrator import console

    adapted = any(row["after"] for row in rows)
    columns = ("picture", "base", "") + (("adapted", "") if adapted else ())
    table = []
    for name, row in zip(names, rows, strict=True):
        cells = [row["before"], *([row["after"]] if adapted else [])]
        table.append((name, *(text for cell in cells for text in (cell["label"], _percent(cell["confidence"])))))
    console.show_table(columns, table)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
