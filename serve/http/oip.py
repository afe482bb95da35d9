"""The Open Inference Protocol v2 under ``/v2``: health, metadata, ready, infer; a domain state is a model version.

``/v2/models/{model}/versions/{NAME}`` (or ``NAME.VERSION``, or the request parameter ``state``) asks a state; without a
version, or with the base model's own, the base answers. ``model_version`` of the answer names what served it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from serve.http.auth import tenant_of
from serve.http.bodies import limits_of, media_type, parse_json, read_body
from serve.http.documents import INFER_BODY, MODEL, READY, SERVER, VERSION, responses
from serve.http.errors import Json
from serve.http.images import check_count, decode_files, split_array, total_bytes
from serve.http.limits import charge
from serve.http.outputs import labels, probabilities, ranked
from serve.http.problems import Refused
from serve.http.tensors import parameters, read_inputs, write_output
from serve.records import parse_reference

if TYPE_CHECKING:
    from serve.http.backend import Answer, Backend
    from serve.http.tensors import Tensor
    from serve.info import ServedInfo

INPUT = "image"
HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "classification", "moepipe_domain_states")
_MEDIA = ("", "application/json", "application/octet-stream", "application/vnd.sagemaker-triton.binary+json")

router = APIRouter(tags=["Open Inference Protocol"])


@dataclass(frozen=True)
class Wanted:
    """One requested output: its name, binary or JSON, and how many classes (0: the tensor itself)."""

    name: str
    binary: bool
    classes: int = 0


def backend_of(request: Request) -> Backend:
    """The computing side."""
    found: Backend = request.app.state.backend
    return found


@router.get("/v2", responses=SERVER)
async def server() -> Response:
    """Name, version and extensions of the server."""
    return Json({"name": "moepipe", "version": installed("moepipe"), "extensions": list(EXTENSIONS)})


@router.get("/v2/health/live", responses=READY)
async def live() -> Response:
    """The process answers."""
    return Json({"live": True})


@router.get("/v2/health/ready", responses=READY)
async def ready(request: Request) -> Response:
    """The model is loaded and predictions are answered; 503 until then."""
    return _ready(await backend_of(request).ready())


@router.get("/v2/models/{model}", responses=MODEL)
@router.get("/v2/models/{model}/versions/{version}", responses=MODEL)
async def model(request: Request, model: str, version: str | None = None, tenant: str = Depends(tenant_of)) -> Response:
    """Inputs and outputs of the model, and the base version."""
    info = _check_model(request, model)
    await _exists(request, info, tenant, version)
    return Json(metadata(info))


@router.get("/v2/models/{model}/ready", responses=READY)
@router.get("/v2/models/{model}/versions/{version}/ready", responses=READY)
async def model_ready(
    request: Request, model: str, version: str | None = None, tenant: str = Depends(tenant_of)
) -> Response:
    """The model, or the domain state, can be asked."""
    info = _check_model(request, model)
    await _exists(request, info, tenant, version)
    return _ready(await backend_of(request).ready())


@router.post("/v2/models/{model}/infer", responses=responses(VERSION), openapi_extra=INFER_BODY)
@router.post("/v2/models/{model}/versions/{version}/infer", responses=responses(VERSION), openapi_extra=INFER_BODY)
async def infer(request: Request, model: str, version: str | None = None, tenant: str = Depends(tenant_of)) -> Response:
    """Predict; JSON and binary tensors, in and out."""
    info = _check_model(request, model)
    document, binary = await _read(request)
    asked = parameters(document)
    name, number = _state(info, version, asked.get("state"))
    inputs = read_inputs(document, binary, limits_of(request))
    wanted = _wanted(document, info)
    images = await _images(request, inputs, info)
    answer = await backend_of(request).infer(images, tenant, name, number)
    identity = document.get("id")
    return _respond(info, answer, wanted, identity if isinstance(identity, str) else None)


def metadata(info: ServedInfo) -> dict[str, Any]:
    """Model metadata. ``parameters.accepts`` lists further forms of the one input."""
    height, width = info.image_size
    outputs = [{"name": "logits", "datatype": "FP32", "shape": [-1, info.outputs]}]
    if info.task != "regression":
        outputs.append({"name": "probabilities", "datatype": "FP32", "shape": [-1, len(info.class_names)]})
        outputs.append({"name": "label", "datatype": "BYTES", "shape": [-1]})
    return {
        "name": info.name,
        "versions": [info.version],
        "platform": "moepipe_torch",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, info.channels, height, width]}],
        "outputs": outputs,
        "parameters": {
            "accepts": "FP32/FP16/FP64 [B,C,H,W] normalised; UINT8 [B,H,W,C] as decoded; BYTES [B] of picture files",
            "state": "name of a domain state, or NAME.VERSION; also as model version",
        },
    }


def _ready(is_ready: bool) -> Response:
    if not is_ready:
        raise Refused(503, "not-ready", "The model is being loaded.", "Try again in a moment.", retry_after=1)
    return Json({"ready": True})


def _check_model(request: Request, name: str) -> ServedInfo:
    info = backend_of(request).info
    if name != info.name:
        raise Refused(404, "not-found", f"There is no model {name[:80]!r} here.", f"This server has {info.name!r}.")
    return info


def _state(info: ServedInfo, version: str | None, parameter: Any = None) -> tuple[str | None, int | None]:
    """Name and version of the state that is asked for; (None, None) is the base."""
    if parameter is not None and not isinstance(parameter, str):
        raise Refused(400, "bad-request", "The parameter 'state' is not a string.")
    base = (None, "", info.version)
    if version not in base and parameter not in (*base, version):
        raise Refused(400, "bad-request", "Model version and parameter 'state' name different states.", "Give one.")
    asked = version if version not in base else parameter
    return (None, None) if asked in base or asked is None else parse_reference(asked)


async def _exists(request: Request, info: ServedInfo, tenant: str, version: str | None) -> None:
    name, number = _state(info, version)
    if name is not None:
        await run_in_threadpool(backend_of(request).catalogue.get, tenant, name, number)


async def _read(request: Request) -> tuple[Mapping[str, Any], memoryview]:
    """The JSON part of a body, and what follows it."""
    if media_type(request) not in _MEDIA:
        raise Refused(
            415,
            "media-type",
            f"The content type {media_type(request)[:80]!r} is not read here.",
            "Use application/json.",
        )
    body = await read_body(request)
    length = request.headers.get(HEADER_LENGTH)
    if length is not None and not (length.isdecimal() and len(length) < 12 and int(length) <= len(body)):
        raise Refused(400, "bad-request", f"{HEADER_LENGTH} does not fit the body of {len(body)} bytes.")
    cut = len(body) if length is None else int(length)
    document = await parse_json(body[:cut], limits_of(request).max_json_bytes)
    if not isinstance(document, dict):
        raise Refused(400, "bad-request", "The request is not a JSON object.")
    return document, memoryview(body)[cut:]


def _wanted(document: Mapping[str, Any], info: ServedInfo) -> list[Wanted]:
    """The requested outputs; all of them when the request names none. Raises Refused (400, 422)."""
    known = [str(item["name"]) for item in metadata(info)["outputs"]]
    binary = parameters(document).get("binary_data_output", False) is True
    listed = document.get("outputs")
    if listed is None or listed == []:
        return [Wanted(name, binary) for name in known]
    if not isinstance(listed, list) or len(listed) > 16 or not all(isinstance(item, dict) for item in listed):
        raise Refused(400, "bad-request", "'outputs' is not a short list of objects.")
    wanted: list[Wanted] = []
    for item in listed:
        name, options = item.get("name"), parameters(item)
        if name not in known:
            raise Refused(422, "wrong-name", f"There is no output {str(name)[:40]!r}.", f"Use {', '.join(known)}.")
        classes = options.get("classification", 0)
        if not isinstance(classes, int) or classes < 0:
            raise Refused(400, "bad-request", "'classification' is not a number of classes.")
        if classes and name == "label":
            raise Refused(400, "bad-request", "'classification' fits the outputs of numbers only.")
        wanted.append(Wanted(name, options.get("binary_data", binary) is True, int(classes)))
    return wanted


async def _images(request: Request, inputs: Sequence[Tensor], info: ServedInfo) -> torch.Tensor:
    """The network's input, from whichever form the client sent."""
    if len(inputs) != 1 or inputs[0].name != INPUT:
        names = ", ".join(repr(tensor.name[:40]) for tensor in inputs)
        raise Refused(422, "wrong-name", f"The inputs are {names}.", f"The model has one input, {INPUT!r}.")
    tensor, limits = inputs[0], limits_of(request)
    check_count(tensor.shape[0], limits.max_rows)
    backend = backend_of(request)
    if tensor.array is None:
        files = [(f"{INPUT}[{row}]", data) for row, data in enumerate(tensor.strings)]
        check_count(len(files), limits.max_rows)
        images = await run_in_threadpool(decode_files, files, info.channels, limits)
    elif tensor.datatype == "UINT8":
        images = split_array(tensor.array, info.channels, limits)
    else:
        expected = (info.channels, *info.image_size)
        if tensor.shape[1:] != expected:
            told = ", ".join(map(str, expected))
            raise Refused(422, "wrong-shape", f"The input has the shape {list(tensor.shape)}.", f"Send [B, {told}].")
        return torch.from_numpy(_safe(tensor.array))
    charge(request.scope, total_bytes(images))
    return await backend.preprocess(images)


def _safe(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 in memory of its own: the body's bytes are read-only and maybe unaligned."""
    with np.errstate(over="ignore"):
        floats = np.array(array, dtype=np.float32)
    if array.dtype == np.dtype("<f8") and not np.isfinite(floats).all():
        raise Refused(422, "not-finite", "The input holds values beyond 32-bit floats.", "Send smaller values.")
    return floats


def _respond(info: ServedInfo, answer: Answer, wanted: Sequence[Wanted], identity: str | None) -> Response:
    logits = answer.logits_BK
    outputs: list[dict[str, Any]] = []
    tail = b""
    for item in wanted:
        values = probabilities(info, logits) if item.name != "logits" else logits
        if item.classes:
            told, raw = write_output(item.name, "BYTES", ranked(info, values, item.classes), item.binary)
            told["shape"] = [
                len(logits),
                len(told.get("data", ())) // len(logits) or min(item.classes, values.shape[1]),
            ]
        elif item.name == "label":
            told, raw = write_output(item.name, "BYTES", labels(info, logits), item.binary)
        else:
            told, raw = write_output(item.name, "FP32", values, item.binary)
        outputs.append(told)
        tail += raw
    state = answer.state
    document: dict[str, Any] = {
        "model_name": info.name,
        "model_version": info.version if state is None else f"{state.name}.{state.version}",
        "outputs": outputs,
    }
    if identity is not None:
        document["id"] = identity
    head = json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii")
    if not tail:
        return Response(head, media_type="application/json")
    return Response(head + tail, media_type="application/octet-stream", headers={HEADER_LENGTH: str(len(head))})


__all__ = ["EXTENSIONS", "HEADER_LENGTH", "INPUT", "metadata", "router"]
