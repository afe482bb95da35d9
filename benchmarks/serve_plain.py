"""What a user would write instead of a server of ours: plain FastAPI around one model, and adaptation in bare Python.

The bare adaptations compute the same steps as ours on one thread: no report, no guard, no state on disk. They measure
no loss beside the one that their step needs. ``python -m benchmarks.serve_plain FOLDER PORT`` is the plain server.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from torch import Tensor, nn

from moe.adaptation.eata import redundancy
from moe.inner import is_norm
from moe.student import Student
from serve.model import ServedModel

STEPS = 5  # of tent and eata; their default is 20
Bare = Callable[[ServedModel, np.ndarray], object]


def prepare(model: ServedModel, pictures: np.ndarray) -> Tensor:
    """uint8 ``[S, H, W, 3]`` of the network's size to its input, as one would write it."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (scaled - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def bn(model: ServedModel, pictures: np.ndarray) -> Student:
    """BatchNorm statistics of the images: one pass in training mode."""
    found = copy.deepcopy(model.base)
    _estimate(found, prepare(model, pictures))
    return found


def _estimate(found: Student, images: Tensor) -> None:
    layers = [m for m in found.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    if layers:
        with torch.no_grad():
            found(images)
    found.eval()


def tent(model: ServedModel, pictures: np.ndarray) -> Student:
    """Entropy minimisation over the norm layers, all images in each step."""
    return _descend(model, pictures, lambda moved: torch.optim.Adam(moved, 1e-3), _Entropy())


def eata(model: ServedModel, pictures: np.ndarray) -> Student:
    """The same for reliable images that are not redundant, weighted."""
    return _descend(model, pictures, lambda moved: torch.optim.SGD(moved, 2.5e-4, momentum=0.9), _Selected())


class _Entropy:
    def __call__(self, logits: Tensor) -> Tensor | None:
        log = logits.log_softmax(1)
        return -(log.exp() * log).sum(1).mean()


class _Selected:
    average: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor | None:
        log = logits.log_softmax(1)
        p = log.exp()
        entropy = -(p * log).sum(1)
        limit = 0.4 * math.log(p.shape[1])
        keep = entropy.detach() < limit
        if self.average is not None:
            near = nn.functional.cosine_similarity(p.detach(), self.average[None]).abs()
            keep &= near < redundancy(p.shape[1])
        if not bool(keep.any()):
            return None
        mean = p.detach()[keep].mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return ((limit - entropy.detach()).exp() * entropy)[keep].mean()


def _descend(
    model: ServedModel,
    pictures: np.ndarray,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    objective: Callable[[Tensor], Tensor | None],
) -> Student:
    found = copy.deepcopy(model.base)
    images = prepare(model, pictures)
    _estimate(found, images)
    moved: list[Tensor] = [p for m in found.features.modules() if is_norm(m) for p in m.parameters(recurse=False)]
    for parameter in moved:
        parameter.requires_grad_(True)
    optimizer = make(moved)
    for _ in range(STEPS):
        loss = objective(found(images))
        if loss is not None:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return found


def distill(model: ServedModel, pictures: np.ndarray) -> Student:
    """One step towards the aggregator's features."""
    assert model.aggregator is not None
    images = prepare(model, pictures)
    with torch.no_grad():
        tokens = torch.stack([expert.extract(images) for expert in model.experts], 1)
        target = model.aggregator(tokens).feat_BD
    found = copy.deepcopy(model.base)
    moved = [p.requires_grad_(True) for p in found.features.parameters()]
    loss = (found.extract(images) - target).square().mean()
    gradients = torch.autograd.grad(loss, moved)
    with torch.no_grad():
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter -= float(model.defaults["distill"]["inner_lr"]) * gradient
    return found


BARE: Mapping[str, Bare] = {"bn": bn, "tent": tent, "eata": eata, "distill": distill}


def main(folder: str, port: int) -> None:
    """FastAPI, one model, no states, no limits."""
    import uvicorn

    torch.set_num_threads(1)
    model = ServedModel.load(folder)
    height, width = model.info.image_size
    api = FastAPI()

    def predict(body: bytes) -> bytes:
        pixels = np.frombuffer(bytearray(body), np.uint8).reshape(1, height, width, 3)
        with torch.inference_mode():
            logits: Tensor = model.base(prepare(model, pixels))
            return logits.numpy().tobytes()

    @api.post("/predict")
    async def answer(request: Request) -> Response:
        return Response(await run_in_threadpool(predict, await request.body()))

    @api.get("/nothing")
    @api.get("/v2/health/ready")
    async def nothing() -> dict[str, bool]:
        return {"live": True}

    uvicorn.run(api, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
