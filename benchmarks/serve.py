"""Predictions over HTTP: our server, direct and behind Ray Serve's proxy, against plain FastAPI with the same model.

All servers run at the same time on this machine, each in processes of its own, and rounds of requests take turns among
them, so that a busy moment hits all. Wall-clock here, and not CPU time: what counts is when the answer is there. The
body is one uint8 image, the answer its logits; both sides prepare the image by the same transform.

``python -m benchmarks.serve FOLDER PORT`` is the plain server itself.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from benchmarks.measure import Row
from benchmarks.setting import Sizes
from moe.backbones import build_classifier, classifier_to_student
from moe.specs import BackboneSpec
from serve.client import Client
from serve.loading import Network, Parts, write_bundle
from serve.wire import HEADER_LENGTH
from workers.modelfile import MODEL_FILE, model_meta, save_tensors
from workers.transforms import TransformSpec

OUTPUTS = 62
_LATENCY, _THROUGHPUT = 1 / 1.3, 0.8
_WAIT_S = 240.0
Ask = Callable[[http.client.HTTPConnection], None]


def run(sizes: Sizes) -> list[Row]:
    """p50 and throughput with 1 and 16 clients, and the overhead of a request that computes nothing."""
    quick = sizes.backbone == "tiny_cnn"
    backbone, side = ("tiny_cnn", 32) if quick else ("timm:vit_tiny_patch16_224", 224)
    image = np.random.default_rng(0).integers(0, 255, (1, side, side, 3), dtype=np.uint8)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moepipe-bench-")))
        bundle = _bundle(folder, backbone, side)
        plain = stack.enter_context(_process([sys.executable, "-m", "benchmarks.serve", str(bundle)], ()))
        sides = {}
        for front in ("direct", "proxy"):
            command = [sys.executable, "-m", "orchestrator.cli", "serve", str(bundle), "--name", "model"]
            options = ("--front", front, "--store", str(folder / front))
            sides[front] = stack.enter_context(_process([*command, "--port"], options))
        rows = []
        for front, port in sides.items():
            for what, ours, theirs in (
                ("nothing", _get("/v2/health/live"), _get("/nothing")),
                (backbone, _infer(image), _post(image)),
            ):
                for clients in (1, 16):
                    rounds = 2 if quick else 5
                    count = 4 if quick else (200 if what == "nothing" else 8)
                    measured = _alternate(
                        [(plain, theirs), (port, ours)], clients, count * max(1, 4 // clients), rounds
                    )
                    rows += _rows(what, front, clients, *measured, judged=what != "nothing")
        return rows


def _rows(
    what: str, front: str, clients: int, plain: tuple[float, float], ours: tuple[float, float], judged: bool
) -> list[Row]:
    name = f"{what}, {front}, {clients} client{'s' if clients > 1 else ''}"
    note = "wall-clock; the load generator shares the cores"
    judged = judged and front == "direct"  # the proxy is shown for comparison
    return [
        Row(f"{name}: p50", plain[0], ours[0], _LATENCY if judged else None, note),
        Row(f"{name}: seconds per request", plain[1], ours[1], _THROUGHPUT if judged else None, note),
    ]


def _alternate(sides: list[tuple[int, Ask]], clients: int, count: int, rounds: int) -> list[tuple[float, float]]:
    """(p50, seconds per request) of each side."""
    times: list[list[float]] = [[] for _ in sides]
    spent = [0.0 for _ in sides]
    for turn in range(rounds + 1):
        for number, (port, ask) in enumerate(sides):
            taken, wall = _round(port, ask, clients, count)
            if turn:  # the first warms up
                times[number] += taken
                spent[number] += wall
    return [(statistics.median(own), wall / len(own)) for own, wall in zip(times, spent, strict=True)]


def _round(port: int, ask: Ask, clients: int, count: int) -> tuple[list[float], float]:
    """Seconds of every request, and of all together."""
    taken: list[float] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for _ in range(count):
            begin = time.perf_counter()
            ask(connection)
            taken.append(time.perf_counter() - begin)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begin
    if len(taken) != clients * count:
        raise RuntimeError(f"{clients * count - len(taken)} of {clients * count} requests failed on port {port}")
    return taken, wall


def _answered(connection: http.client.HTTPConnection) -> None:
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {body[:200]!r}")


def _get(path: str) -> Ask:
    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("GET", path)
        _answered(connection)

    return ask


def _post(image: np.ndarray) -> Ask:
    body = image.tobytes()

    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("POST", "/predict", body)
        _answered(connection)

    return ask


def _infer(image: np.ndarray) -> Ask:
    raw = image.tobytes()
    tensor = {"name": "image", "shape": list(image.shape), "datatype": "UINT8"}
    request = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(request).encode()
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}

    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("POST", "/v2/models/model/infer", head + raw, headers)
        _answered(connection)

    return ask


def _bundle(folder: Path, name: str, side: int) -> Path:
    """A randomly initialised model as a folder that can be served."""
    torch.manual_seed(0)
    backbone = BackboneSpec(name=name, image_size=None if name == "tiny_cnn" else side)
    classifier = build_classifier(backbone, OUTPUTS)
    head = list(classifier.parameters())[-2]
    meta = model_meta("student", backbone, OUTPUTS, head.shape[1], "fmow")
    spec = TransformSpec(normalisation="imagenet", size=(side, side), channels=3)
    meta |= {"transform": spec.model_dump(mode="json")}
    save_tensors(folder / "parts" / MODEL_FILE, classifier_to_student(backbone, classifier.state_dict()))
    parts = Parts("model", "0" * 64, Network(folder / "parts", meta))
    write_bundle(parts, folder / "bundle")
    return folder / "bundle"


@contextmanager
def _process(command: list[str], options: tuple[str, ...]) -> Iterator[int]:
    """A server of its own process; yields its port once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(port), *options], env=environment, stdout=subprocess.DEVNULL)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_until_ready(_WAIT_S, lambda: process.poll() is not None)
        yield port
    finally:
        process.terminate()
        process.wait(90)


def serve_plain(folder: str, port: int) -> None:
    """What a user would write instead: FastAPI, one model, no states, no limits."""
    import uvicorn

    from serve.model import ServedModel

    torch.set_num_threads(1)
    model = ServedModel.load(folder)
    height, width = model.info.image_size
    api = FastAPI()

    def predict(body: bytes) -> bytes:
        image = np.frombuffer(body, np.uint8).reshape(height, width, 3)
        with torch.inference_mode():
            return model.base(model.preprocess([image])).numpy().tobytes()

    @api.post("/predict")
    async def answer(request: Request) -> Response:
        return Response(await run_in_threadpool(predict, await request.body()))

    @api.get("/nothing")
    @api.get("/v2/health/ready")
    async def nothing() -> dict[str, bool]:
        return {"live": True}

    uvicorn.run(api, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    serve_plain(sys.argv[1], int(sys.argv[2]))
