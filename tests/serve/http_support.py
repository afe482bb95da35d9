"""A small served model and its HTTP surface, in this process."""

from __future__ import annotations

import contextlib
import io
import threading
import time

import numpy as np
import psutil
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import nn

from moe.student import Student
from serve.catalogue import Catalogue
from serve.http.api import make_api
from serve.http.server import server_for
from serve.info import ServedInfo, usable_methods
from serve.local import LocalBackend
from serve.model import ServedModel
from workers.transforms import TransformSpec

SIDE, CLASSES = 12, ("cat", "dog", "owl")


def tiny_model() -> ServedModel:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    base = Student(features, nn.Linear(6, len(CLASSES))).eval()
    transform = TransformSpec(normalisation="unit", size=(SIDE, SIDE), channels=3)
    info = ServedInfo(
        name="tiny",
        version="0123456789abcdef" * 4,
        task="multiclass",
        outputs=len(CLASSES),
        class_names=CLASSES,
        channels=3,
        image_size=(SIDE, SIDE),
        transform=transform.model_dump(mode="json"),
        experts=0,
        methods=usable_methods(base, "multiclass", "the model was trained without experts"),
    )
    return ServedModel(info, base)


def make_backend(folder, **settings) -> LocalBackend:
    model = tiny_model()
    catalogue = Catalogue(folder, 1 << 24, model_version=model.info.version)
    return LocalBackend(model, catalogue, **settings)


@contextlib.contextmanager
def client_for(folder, limits=None, tokens=None, **settings):
    """A client of a fresh application; errors of the server become answers, as over a socket."""
    api = make_api(make_backend(folder, **settings), limits=limits, tokens=tokens)
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


@contextlib.contextmanager
def server_at(folder, limits=None, tokens=None, header_seconds=10.0, **settings):
    """A real server on a free port of loopback; yields (port, backend)."""
    backend = make_backend(folder, **settings)
    server = server_for(make_api(backend, limits=limits, tokens=tokens), port=0, header_seconds=header_seconds)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], backend
    finally:
        server.should_exit = True
        thread.join(60)


def pixels(count=4, side=SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def png(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def files(images):
    return [("files", (f"{number}.png", png(image), "image/png")) for number, image in enumerate(images)]


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def adapt(client, name="park", images=None, **query):
    return client.post(f"/v1/states/{name}", files=files(pixels(8) if images is None else images), params=query)


def check_memory_stays_flat(act, times, most=40 << 20):
    """Assert that so many calls of ``act`` leave this process at most ``most`` bytes larger.

    What every call loses shows in every round; what the allocator holds back, or another thread takes, does not.
    """
    own, grown = psutil.Process(), []
    while not grown or grown[-1] >= most:
        assert len(grown) < 5, grown
        before = own.memory_info().rss
        for _ in range(times):
            act()
        grown.append(own.memory_info().rss - before)


def refused(response, status, code):
    """Assert that ``response`` is our refusal, and return what it tells."""
    assert response.status_code == status, (response.status_code, response.text[:400])
    told = response.json()
    told = told if isinstance(told["error"], str) else told["error"]
    assert told["code"] == code, told
    assert told["message"]
    assert "Traceback" not in response.text and "/tmp" not in response.text
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return told
