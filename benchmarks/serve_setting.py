"""What the benchmarks of serving share: a model to serve, servers of their own processes, and the load on them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from moe.adaptation.bn import estimate
from moe.aggregator import Aggregator
from moe.backbones import build_classifier, build_student, classifier_to_student
from moe.specs import BackboneSpec
from serve.client import Client
from serve.loading import Network, Parts, write_bundle
from serve.wire import HEADER_LENGTH
from workers.modelfile import MODEL_FILE, model_meta, save_aggregator, save_tensors
from workers.transforms import Transform, TransformSpec

OUTPUTS = 62
EXPERTS = 4
_WAIT_S = 300.0
Ask = Callable[[http.client.HTTPConnection], None]


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """Smooth random pictures, uint8 ``[count, side, side, 3]``: pure noise would look alike to any network."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((count, 3, 7, 7), np.float32))
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (fine.permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()


def bundle(folder: Path, name: str, side: int, experts: int = 0) -> Path:
    """A randomly initialised model as a folder that can be served, with ``experts`` and their aggregator.

    Statistics and head are fitted to a few pictures, so that predictions spread over the classes as those of a trained
    model do: the collapse guard looks at them.
    """
    torch.manual_seed(0)
    backbone = BackboneSpec(name=name, image_size=None if name == "tiny_cnn" else side)
    spec = TransformSpec(normalisation="imagenet", size=(side, side), channels=3)
    images = Transform(spec).batch(pictures(16, side, 1))
    networks, width = [], 0
    for number in range(experts + 1):
        student = build_student(backbone, OUTPUTS).eval()
        student.load_state_dict(classifier_to_student(backbone, build_classifier(backbone, OUTPUTS).state_dict()))
        student.load_state_dict(estimate(student, images), strict=False)
        head = student.classifier[0]
        assert isinstance(head, torch.nn.Linear)
        with torch.no_grad():
            features = student.extract(images)
            head.weight.normal_().div_(features.std(0).mean() * features.shape[1] ** 0.5)
            head.bias.copy_(-(features.mean(0) @ head.weight.T))
        width = student.feature_dim
        save_tensors(folder / "parts" / str(number) / MODEL_FILE, student.state_dict())
        meta = model_meta("student", backbone, OUTPUTS, width, "fmow")
        networks.append(Network(folder / "parts" / str(number), meta | {"transform": spec.model_dump(mode="json")}))
    if experts:
        options = {"dim": width, "num_outputs": OUTPUTS}
        save_aggregator(networks[0].folder, Aggregator(width, OUTPUTS).eval())
        learned = {"inner_lr": 1e-4, "inner_steps": 1, "adapt": "all", "support": 16}
        networks[0] = Network(networks[0].folder, {**networks[0].meta, "aggregator": options, "adaptation": learned})
    parts = Parts("model", "0" * 64, networks[0], networks[1:])
    write_bundle(parts, folder / "bundle")
    return folder / "bundle"


# ---- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def plain(model: Path) -> Iterator[int]:
    """The plain server; yields its port."""
    with _process([sys.executable, "-m", "benchmarks.serve_plain", str(model)]) as port:
        yield port


@contextmanager
def ours(model: Path, states: Path, front: str = "direct") -> Iterator[int]:
    """Our server; yields its port.

    Args:
        model: folder.
        states: folder of the states.
        front: ``direct``, ``proxy``, or ``haproxy`` (Ray's proxy replaced by HAProxy).
    """
    command = [sys.executable, "-m", "orchestrator.cli", "serve", str(model), "--name", "model"]
    options = ("--states", str(states), "--front", "direct" if front == "direct" else "proxy")
    more = {}
    if front == "haproxy":
        own = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_FILE": "server-state"}
        more = {f"RAY_SERVE_HAPROXY_{key}": str(states.parent / value) for key, value in own.items()}
        more |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(states.parent)}
    with _process([*command, *options, "--port"], more) as port:
        yield port


@contextmanager
def local(model: Path, states: Path, memory: int = 256) -> Iterator[int]:
    """Our server in this process, without Ray and its processes, so that CPU time can be counted; yields its port."""
    from serve.catalogue import Catalogue
    from serve.front import Front
    from serve.http.api import make_api
    from serve.local import LocalBackend
    from serve.model import ServedModel

    served = ServedModel.load(str(model), name="model")
    backend = LocalBackend(served, Catalogue(states, memory * 2**20, served.info.version))
    port = _free_port()
    front = Front(make_api(backend), "127.0.0.1", port)
    try:
        yield port
    finally:
        front.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def _process(command: list[str], more: Mapping[str, str] | None = None) -> Iterator[int]:
    """A server of its own process; yields its port once it answers."""
    port = _free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
    process = subprocess.Popen([*command, str(port)], env=environment, stdout=subprocess.DEVNULL)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_until_ready(_WAIT_S, lambda: process.poll() is not None)
        yield port
    finally:
        process.terminate()
        process.wait(120)


# ---- load ------------------------------------------------------------------------------------------------------------


def alternate(
    sides: list[tuple[int, Ask]],
    clients: int,
    count: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """(p50, seconds per request) of each side; the sides take turns, and the first round only warms up.

    The seconds per request are those of the median round, so that one busy moment of the machine does not decide.
    """
    times: list[list[float]] = [[] for _ in sides]
    spent: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for number, (port, ask) in enumerate(sides):
            taken, wall = load(port, ask, clients, count, clock)
            if turn:
                times[number] += taken
                spent[number].append(wall / len(taken))
    return [(statistics.median(own), statistics.median(walls)) for own, walls in zip(times, spent, strict=True)]


def load(
    port: int, ask: Ask, clients: int, count: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], float]:
    """Seconds of every request, and of all together, on ``clock``. Raises RuntimeError when a request fails."""
    taken: list[float] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        for _ in range(count):
            begin = clock()
            ask(connection)
            taken.append(clock() - begin)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = clock()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = clock() - begin
    if len(taken) != clients * count:
        raise RuntimeError(f"{clients * count - len(taken)} of {clients * count} requests failed on port {port}")
    return taken, wall


def answered(connection: http.client.HTTPConnection) -> bytes:
    """The answer's body. Raises RuntimeError when it is not 200."""
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {body[:200]!r}")
    return body


def get(path: str) -> Ask:
    """A request that computes nothing."""

    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("GET", path)
        answered(connection)

    return ask


def post(image: np.ndarray) -> Ask:
    """Ask the plain server."""
    body = image.tobytes()

    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("POST", "/predict", body)
        answered(connection)

    return ask


def infer(image: np.ndarray, choose: Callable[[], str] | None = None) -> Ask:
    """Ask our server; ``choose`` names the state of each request."""
    raw = image.tobytes()
    tensor = {"name": "image", "shape": list(image.shape), "datatype": "UINT8"}
    request = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(request).encode()
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}

    def ask(connection: http.client.HTTPConnection) -> None:
        version = "" if choose is None else f"/versions/{choose()}"
        connection.request("POST", f"/v2/models/model{version}/infer", head + raw, headers)
        answered(connection)

    return ask
