"""Adaptation over HTTP against the same step in bare Python, one at a time and 16 at once.

Ours is the whole request: client, body, images, step, guard, report, the state on disk and published. Bare is
``benchmarks.serve_plain``: images, step, nothing else; in particular no pass that measures what came out, which the
guard of ours needs. Both compute in this process, taking turns. One at a time is told in CPU time, which other work on
the machine hardly touches; 16 at once in wall-clock. Not in: the way between the two replicas of a Ray Serve
application, some milliseconds for the body.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from benchmarks.measure import Row
from benchmarks.serve_plain import BARE, STEPS
from benchmarks.serve_setting import EXPERTS, Ask, answered, bundle, load, local, pictures
from benchmarks.setting import Sizes
from serve.model import ServedModel

SUPPORT, AT_ONCE = 16, 16
_SINGLE, _TOGETHER = 1 / 1.15, 1.0


def run(sizes: Sizes) -> list[Row]:
    """All methods on a ResNet-18 (the one with BatchNorm) at 224 with four experts."""
    quick = sizes.backbone == "tiny_cnn"
    name, side, rounds = ("tiny_cnn", 32, 1) if quick else ("timm:resnet18", 224, 3)
    with tempfile.TemporaryDirectory(prefix="moepipe-bench-") as folder:
        model = bundle(Path(folder), name, side, EXPERTS)
        bare = ServedModel.load(str(model))
        with local(model, Path(folder) / "states") as port:
            rows = [_single(bare, port, method, side, rounds) for method in BARE]
            together = [_together(bare, port, method, side) for method in ("bn", "distill")]
    return rows + together


def _single(bare: ServedModel, port: int, method: str, side: int, rounds: int) -> Row:
    fresh = _sets(SUPPORT, side)
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        support = next(fresh)
        begin = time.process_time()
        BARE[method](bare, support)
        middle = time.process_time()
        load(port, adapt(method, iter([support])), 1, 1)
        if turn:  # the first warms up
            times[0].append(middle - begin)
            times[1].append(time.process_time() - middle)
    note = f"CPU; {SUPPORT} images, {steps(method)}; ours with guard, report and the state on disk"
    return Row(f"adapt {method}", statistics.median(times[0]), statistics.median(times[1]), _SINGLE, note)


def _together(bare: ServedModel, port: int, method: str, side: int) -> Row:
    """Both sides may use all cores: bare by threads inside the operators, ours by adaptations side by side."""
    fresh, cores = _sets(SUPPORT // 2, side), len(os.sched_getaffinity(0))
    sets = [next(fresh) for _ in range(AT_ONCE)]
    before = torch.get_num_threads()
    walls = []
    for threads in (1, cores):
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        for support in sets:
            BARE[method](bare, support)
        walls.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    wall = load(port, adapt(method, iter(sets)), AT_ONCE, 1)[1]
    note = f"{SUPPORT // 2} images each; bare with {cores} threads; with 1: {walls[0] / AT_ONCE:.2f} s"
    return Row(f"{AT_ONCE} at once, {method}: time of one", walls[1] / AT_ONCE, wall / AT_ONCE, _TOGETHER, note)


def steps(method: str) -> str:
    """What is computed, in words."""
    words = {"bn": "one pass", "distill": f"{EXPERTS} experts, one step"}
    return words.get(method, f"{STEPS} steps")


def _sets(images: int, side: int) -> Iterator[np.ndarray]:
    """New support sets without end: nothing is answered from a cache."""
    return (pictures(images, side, seed) for seed in count(100))


_NUMBERS = count()


def adapt(method: str, supports: Iterator[np.ndarray]) -> Ask:
    """Make a new state, each from the next support set."""
    options = {"steps": STEPS} if method in ("tent", "eata") else {}

    def ask(connection: http.client.HTTPConnection) -> None:
        body = io.BytesIO()
        np.save(body, next(supports))
        query = f"method={method}&wait=true&options={quote(json.dumps(options))}"
        headers = {"Content-Type": "application/x-npy"}
        connection.request("POST", f"/v1/states/site{next(_NUMBERS)}?{query}", body.getvalue(), headers)
        report = json.loads(answered(connection))
        if not report["kept"]:
            raise RuntimeError(f"{method} published nothing: {report['collapse']}")

    return ask
