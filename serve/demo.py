"""``python -m serve.demo``: a whole round against a real server, on the domain that a run held out.

Starts ``moepipe serve`` for the newest run with a student, asks the base model for the held-out test images, adapts
from the unlabelled support images with every method that fits, asks again, prints accuracy before and after, and stops
the server. Labels never leave this process: the server sees pictures only.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import MoepipeError, NotFoundError
from orchestrator import console
from orchestrator.runs import Run, RunStore
from orchestrator.store import DEFAULT_URL, Store
from serve.client import Client
from workers.context import Input
from workers.data import open_data
from workers.datasets.base import DomainData
from workers.protocols import DomainRows, domain_rows

_ROWS = 128
_START_S = 180.0
_STOP_S = 60.0
_SKIPPED = ("none",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serve.demo", description=__doc__)
    parser.add_argument("--run", default=None, help="run id; by default the newest with a student")
    parser.add_argument("--store", default=os.environ.get("MOEPIPE_STORE", DEFAULT_URL))
    parser.add_argument("--data", default=None, help="folder with prepared data sets; default STORE/data")
    parser.add_argument("--support", type=int, default=256, help="unlabelled images to adapt on")
    parser.add_argument("--limit", type=int, default=None, help="score at most so many images")
    options = parser.parse_args(arguments)
    try:
        show(options)
    except MoepipeError as error:
        return console.show_error(error)
    return 0


def show(options: argparse.Namespace) -> None:
    """The round itself. Raises NotFoundError without a finished run, EnvironmentProblem when no server comes up."""
    store = Store.open(options.store)
    run = _newest(store) if options.run is None else RunStore(store).open(options.run)
    root = Path(options.data) if options.data else store.folder / "data"
    data = open_data(_data_of(run, store), root)
    domains = domain_rows(data, "test", "split", options.support, options.limit)
    with (
        tempfile.TemporaryDirectory(prefix="moepipe-demo-") as folder,
        _server(run.id, options.store, Path(folder)) as url,
        Client(url, timeout=600.0) as client,
    ):
        model = client.model()
        console.say(f"{model['name']} {model['version'][:12]} at {url}, held-out domains: {len(domains)}")
        methods = [name for name, why in model["methods"].items() if why is None and name not in _SKIPPED]
        for domain in domains:
            _domain(client, data, domain, methods)


def _domain(client: Client, data: DomainData, domain: DomainRows, methods: Sequence[str]) -> None:
    support = [_picture(data, row) for row in domain.adapt]
    queries = [_picture(data, row) for row in domain.score]
    labels = np.asarray(data.labels)[domain.score].astype(np.int64)
    rows = []
    for method in methods:
        name = f"demo-{method}"
        report = client.adapt(name, support, method=method)
        version = report["state"] and report["state"]["reference"]
        before, after = _accuracy(client, queries, labels, name if version else None)
        weights = ", ".join(f"{weight:.2f}" for weight in report["expert_weights"])
        told = "-" if after is None else f"{after:.3f}"
        rows.append((method, f"{before:.3f}", told, report["collapse"], console.seconds(report["seconds"]), weights))
    console.say(f"domain {domain.name}: adapted on {len(support)} unlabelled images, scored on {len(queries)} others")
    console.show_table(("method", "accuracy before>", "after>", "collapse check", "adapting>", "experts heard"), rows)


def _accuracy(
    client: Client, images: Sequence[NDArray[Any]], labels: NDArray[np.int64], state: str | None
) -> tuple[float, float | None]:
    """Share of right answers of the base, and of the state where there is one."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(images), _ROWS):
        found += client.predict(images[start : start + _ROWS], state)["predictions"]
    right = [np.mean([row[when]["index"] for row in found] == labels) for when in ("before", "after") if found[0][when]]
    return float(right[0]), float(right[1]) if len(right) > 1 else None


def _picture(data: DomainData, row: int) -> NDArray[Any]:
    return np.asarray(data.images[int(row)])


def _newest(store: Store) -> Run:
    for run in RunStore(store).list():
        if any(name.startswith("distill") for name in run.artifacts()):
            return run
    raise NotFoundError(f"No finished run with a student in {store.url}.", "`make demo` makes one in a few minutes.")


def _data_of(run: Run, store: Store) -> Input:
    for node, digest in run.artifacts().items():
        artifact = store.artifact(digest)
        if artifact.kind == "data":
            return Input(node, digest, store.local_path(artifact), artifact.meta)
    raise NotFoundError(f"Run {run.id} has no prepared data.", "`make demo` makes a run that has.")


@contextmanager
def _server(run: str, store: str, folder: Path) -> Iterator[str]:
    """``moepipe serve`` as a process of its own, with an empty catalogue; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "orchestrator.cli", "serve", run, "--store", store, "--port", str(port)]
    console.note(f"$ moepipe serve {run} --port {port}")
    process = subprocess.Popen([*command, "--states", str(folder / "states")], stdout=subprocess.DEVNULL)
    try:
        with Client(url) as client:
            client.wait_until_ready(_START_S, lambda: process.poll() is not None)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
