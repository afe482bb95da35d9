"""Predictions over HTTP: our server, direct and behind Ray Serve's proxies, against plain FastAPI with the same model.

All servers of a model run at the same time on this machine, each in processes of its own, and rounds of requests take
turns among them, so that a busy moment hits all. Wall-clock here, and not CPU time: what counts is when the answer is
there. The body is one uint8 image, the answer its logits. Adaptation and states have files of their own.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import serve_adapt, serve_states
from benchmarks.measure import Row
from benchmarks.serve_setting import alternate, bundle, get, infer, ours, pictures, plain, post
from benchmarks.setting import Sizes

_LATENCY, _THROUGHPUT = 1 / 1.3, 0.8
FRONTS = ("direct", "proxy", "haproxy")


def run(sizes: Sizes) -> list[Row]:
    """Everything about serving in one table."""
    rows: list[Row] = []
    models = ["tiny_cnn"] if quick(sizes) else ["timm:vit_tiny_patch16_224", "timm:resnet18"]
    for name in models:
        rows += predictions(name, sizes, FRONTS if name == models[0] else FRONTS[:1])
    return rows + serve_adapt.run(sizes) + serve_states.run(sizes)


def quick(sizes: Sizes) -> bool:
    """Whether the tiny model was asked for."""
    return sizes.backbone == "tiny_cnn"


def predictions(name: str, sizes: Sizes, fronts: tuple[str, ...] = FRONTS) -> list[Row]:
    """p50 and throughput with 1 and 16 clients, and the overhead of a request that computes nothing."""
    side, rounds = (32, 2) if quick(sizes) else (224, 5)
    image = pictures(1, side, 0)
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mp-")))
        model = bundle(folder, name, side)
        theirs = stack.enter_context(plain(model))
        for front in fronts:
            with ours(model, folder / front / "states", front) as port:
                for clients in (1, 16):
                    for what, own, other, count in (
                        ("nothing", get("/v2/health/live"), get("/nothing"), 200),
                        (name, infer(image), post(image), 8),
                    ):
                        count = (4 if quick(sizes) else count) * max(1, 4 // clients)
                        yardstick, measured = alternate([(theirs, other), (port, own)], clients, count, rounds)
                        judged = what == name and front == "direct"  # the others are shown for comparison
                        title = f"{what}, {front}, {clients} client{'s' * (clients > 1)}"
                        rows += _rows(title, yardstick, measured, judged)
                        print(f"  {title}: {yardstick} {measured}", file=sys.stderr, flush=True)
    return rows


def _rows(name: str, plain: tuple[float, float], ours: tuple[float, float], judged: bool) -> list[Row]:
    note = "wall-clock; the load generator shares the cores"
    return [
        Row(f"{name}: p50", plain[0], ours[0], _LATENCY if judged else None, note),
        Row(f"{name}: time per request", plain[1], ours[1], _THROUGHPUT if judged else None, note),
    ]
