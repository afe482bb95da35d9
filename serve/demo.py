"""``python -m serve.demo``: a whole round against a real server, on the domains that a run held out.

Copies the newest run's student with its experts into a folder of its own, writes pictures of the held-out domains
beside it, starts ``moepipe serve``, asks the base model for the held-out test images, adapts from the unlabelled
support images with every method that fits, asks again, prints accuracy before and after with the experts that were
heard, and stops the server. Labels never leave this process: the server sees pictures only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import MoepipeError, NotFoundError
from orchestrator import console
from orchestrator.runs import Run, RunStore
from orchestrator.store import DEFAULT_URL, Store
from serve.client import Client
from serve.examples import DOMAINS, plain, write_examples
from serve.loading import Parts, locate, write_bundle
from workers.context import Input
from workers.data import open_data
from workers.datasets.base import DomainData
from workers.protocols import DomainRows, domain_rows

FOLDER = "demo-serve"
MODEL = "model"
_ROWS = 128
_START_S = 180.0
_STOP_S = 60.0
_SKIPPED = ("none",)
_HEARD = 2  # experts that are named, the loudest first


@dataclass(frozen=True)
class Outcome:
    """One method on one domain: accuracy before and after (None when nothing was published), and the report."""

    before: float
    after: float | None
    report: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serve.demo", description=__doc__)
    parser.add_argument("--run", default=None, help="run id; by default the newest with a student")
    parser.add_argument("--store", default=os.environ.get("MOEPIPE_STORE", DEFAULT_URL))
    parser.add_argument("--data", default=os.environ.get("MOEPIPE_DATA"), help="prepared data sets; default STORE/data")
    parser.add_argument("--name", default="digits", help="name of the model in the addresses")
    parser.add_argument("--support", type=int, default=100, help="unlabelled images to adapt on")
    parser.add_argument("--limit", type=int, default=None, help="score at most so many images of a domain")
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
    parts = locate(run.id, options.store, options.name)
    folder = store.folder / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    write_bundle(parts, folder / MODEL)
    write_examples(folder, data, domains)
    arguments = _arguments(folder)
    with (
        tempfile.TemporaryDirectory(prefix="moepipe-demo-") as states,
        _server(arguments, Path(states)) as url,
        Client(url, timeout=600.0) as client,
    ):
        methods = [name for name, why in client.model()["methods"].items() if why is None and name not in _SKIPPED]
        rounds = {}
        for domain in domains:
            rounds[domain.name] = _domain(client, data, domain, methods)
            console.note(f"{domain.name}: {', '.join(f'{m} {_change(o)}' for m, o in rounds[domain.name].items())}")
    few, many = len(domains[0].adapt), len(domains[0].score)
    console.say(
        f"{run.spec().name}: adapted on {few} unlabelled images of each held-out domain, scored on {many} others."
    )
    console.show_table(*_table(rounds, methods, _experts(parts, data)))
    console.say("Now by hand, with pictures of these domains, in a browser or with curl (README.md):")
    console.say(f"  moepipe serve {' '.join(arguments)}")


def _domain(client: Client, data: DomainData, domain: DomainRows, methods: Sequence[str]) -> dict[str, Outcome]:
    support = [_picture(data, row) for row in domain.adapt]
    queries = [_picture(data, row) for row in domain.score]
    labels = np.asarray(data.labels)[domain.score].astype(np.int64)
    found = {}
    for method in methods:
        name = plain(f"{domain.name}-{method}")
        report = client.adapt(name, support, method=method)
        before, after = _accuracy(client, queries, labels, name if report["state"] else None)
        found[method] = Outcome(before, after, report)
    return found


def _table(
    rounds: dict[str, dict[str, Outcome]], methods: Sequence[str], experts: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: a domain a line, and the means; which experts were heard, if any."""
    teacher = next((m for m in methods if any(found[m].report["expert_weights"] for found in rounds.values())), None)
    columns = ("held out", "before>", *(f"{method}>" for method in methods), *(("experts heard",) if teacher else ()))
    rows = []
    for name, found in rounds.items():
        heard = (_heard(found[teacher].report["expert_weights"], experts),) if teacher else ()
        before = next(iter(found.values())).before
        rows.append((name, f"{before:.1%}", *(_change(found[method]) for method in methods), *heard))
    if len(rounds) > 1:
        means = [_mean([found[method] for found in rounds.values()]) for method in methods]
        before = float(np.mean([next(iter(found.values())).before for found in rounds.values()]))
        rows.append(("mean", f"{before:.1%}", *means, *(("",) if teacher else ())))
    return columns, rows


def _change(outcome: Outcome) -> str:
    """``88.6% (+2.9)``, or what the guard said."""
    if outcome.after is None:
        return str(outcome.report["collapse"])
    return f"{outcome.after:.1%} ({100 * (outcome.after - outcome.before):+.1f})"


def _mean(outcomes: Sequence[Outcome]) -> str:
    """Mean accuracy of what is served afterwards (the base where nothing was published) and the mean change."""
    after = np.mean([item.before if item.after is None else item.after for item in outcomes])
    return f"{after:.1%} ({100 * (after - np.mean([item.before for item in outcomes])):+.1f})"


def _heard(weights: Sequence[float], experts: Sequence[str]) -> str:
    """The loudest experts by name and share."""
    loudest = sorted(range(len(weights)), key=lambda number: -weights[number])[:_HEARD]
    return ", ".join(f"{experts[number]}: {weights[number]:.0%}" for number in loudest)


def _experts(parts: Parts, data: DomainData) -> list[str]:
    """What each expert knows: its training domains, from the first to the last, else its number."""
    names = data.value_names.get(data.info.domain_field, ())
    told = []
    for number, expert in enumerate(parts.experts):
        own = [int(value) for value in expert.meta.get("domains") or () if int(value) < len(names)]
        told.append(" to ".join(dict.fromkeys([names[own[0]], names[own[-1]]])) if own else f"expert {number + 1}")
    return told


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
    raise NotFoundError(f"No finished run with a student in {store.url}.", "`make demo-serve` makes one in minutes.")


def _data_of(run: Run, store: Store) -> Input:
    for node, digest in run.artifacts().items():
        artifact = store.artifact(digest)
        if artifact.kind == "data":
            return Input(node, digest, store.local_path(artifact), artifact.meta)
    raise NotFoundError(f"Run {run.id} has no prepared data.", "`make demo-serve` makes a run that has.")


def _arguments(folder: Path) -> list[str]:
    """What to give ``moepipe serve`` for the copied model."""
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return [str(shown / MODEL), "--samples", str(shown / DOMAINS)]


@contextmanager
def _server(arguments: Sequence[str], states: Path) -> Iterator[str]:
    """``moepipe serve`` as a process of its own, with an empty catalogue; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    own = [*arguments, "--port", str(port)]
    console.note(f"$ moepipe serve {' '.join(own)}")
    command = [sys.executable, "-m", "orchestrator.cli", "serve", *own, "--states", str(states)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
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
