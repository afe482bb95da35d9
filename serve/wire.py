"""What the client puts on the wire and reads from it: requests as values, pictures as bodies, refusals as errors."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

from moe.errors import BusyError, DataError, EnvironmentProblem, MoepipeError, NotFoundError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

Picture = Path | str | bytes | NDArray[Any]
Images = Sequence[Picture] | NDArray[Any]

NPY = "application/x-npy"
HEADER_LENGTH = "Inference-Header-Content-Length"
_STREAMED = ("method", "options", "step_cap")
_ERRORS: Mapping[int, type[MoepipeError]] = {
    400: SpecError,
    401: SpecError,
    403: SpecError,
    404: NotFoundError,
    405: SpecError,
    408: BusyError,
    409: BusyError,
    410: NotFoundError,
    413: DataError,
    415: DataError,
    422: DataError,
    429: BusyError,
    503: BusyError,
}


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        method: HTTP method.
        path: below the server's address.
        arguments: keyword arguments of httpx (``json``, ``content``, ``files``, ``params``, ``headers``).
        idempotent: sending it twice does no harm.
    """

    method: str
    path: str
    arguments: dict[str, Any] = field(default_factory=dict)
    idempotent: bool = False


# ---- requests ------------------------------------------------------------------------------------------------------


def get_call(path: str) -> Call:
    """A request that only reads."""
    return Call("GET", path, idempotent=True)


def state_path(name: str, action: str = "") -> str:
    """Address of a state, or of something that is done with it."""
    return f"/v1/states/{quote(name, safe='')}{'/' + action if action else ''}"


def send_call(method: str, path: str, body: Mapping[str, Any] | None = None) -> Call:
    """A request that changes something; sent once."""
    return Call(method, path, {"json": dict(body)} if body else {})


def infer_call(model: str, images_BCHW: NDArray[np.float32], state: str | None) -> Call:
    """Inference by the Open Inference Protocol with the binary extension: a JSON header, then the raw tensor.

    Raises:
        DataError: not four dimensions.
    """
    if images_BCHW.ndim != 4:
        raise DataError(f"The images have the shape {images_BCHW.shape}.", "Give [B, C, H, W].")
    raw = np.ascontiguousarray(images_BCHW, dtype="<f4").tobytes()
    tensor = {
        "name": "image",
        "shape": list(images_BCHW.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(raw)},
    }
    output = {"name": "logits", "parameters": {"binary_data": True}}
    request: dict[str, Any] = {"inputs": [tensor], "outputs": [output]}
    if state is not None:
        request["parameters"] = {"state": state}
    header = json.dumps(request).encode()
    headers = {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    path = f"/v2/models/{quote(model, safe='')}/infer"
    return Call("POST", path, {"content": header + raw, "headers": headers}, idempotent=True)


def read_infer(response: httpx.Response) -> NDArray[np.float32]:
    """The first output tensor of an answer, binary or JSON."""
    length = response.headers.get(HEADER_LENGTH)
    head = response.content if length is None else response.content[: int(length)]
    output = json.loads(head)["outputs"][0]
    if length is None:
        values = np.asarray(output["data"], dtype=np.float32)
    else:
        values = np.frombuffer(response.content, dtype="<f4", offset=int(length)).copy()
    return values.reshape(output["shape"])


def predict_call(images: Images, state: str | None) -> Call:
    """Predictions for pictures."""
    return Call("POST", "/v1/predict", {"files": _files(images), "data": _fields(state=state)}, idempotent=True)


def adapt_call(
    name: str,
    images: Images | None,
    *,
    uri: str | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    step_cap: int | None = None,
    dry_run: bool = False,
    key: str,
    wait: bool = True,
) -> Call:
    """An adaptation from pictures (files, bytes), an array, or a data set that the server knows.

    Raises:
        SpecError: neither pictures nor a data set, or both.
    """
    if (images is None) == (uri is None):
        raise SpecError("An adaptation needs either images or the URI of a data set.", "Give one of them.")
    settings = _fields(
        method=method,
        options=None if not options else json.dumps(dict(options)),
        step_cap=step_cap,
        dry_run=dry_run or None,
        wait=wait,
    )
    body = {"json": {"uri": uri}} if images is None else _body(images)
    return _with_settings(Call("POST", state_path(name), {**body, "params": settings}, idempotent=True), key)


def stream_call(name: str, images: Images, settings: Mapping[str, Any]) -> Call:
    """The next images of a stream. Idempotent only under a key: the state moves with each.

    Raises:
        SpecError: a setting that streams do not have.
    """
    told = dict(settings)
    key = told.pop("idempotency_key", None)
    for unknown in sorted(set(told) - set(_STREAMED)):
        raise SpecError(f"A stream has no setting {unknown!r}.", f"It has {', '.join(_STREAMED)}, idempotency_key.")
    if told.get("options") is not None:
        told["options"] = json.dumps(dict(told["options"]))
    call = Call("POST", f"/v1/stream/{quote(name, safe='')}", {**_body(images), "params": _fields(**told)}, bool(key))
    return call if key is None else _with_settings(call, key)


def _with_settings(call: Call, key: str) -> Call:
    headers = {**call.arguments.get("headers", {}), "Idempotency-Key": key}
    return Call(call.method, call.path, {**call.arguments, "headers": headers}, call.idempotent)


def _fields(**values: Any) -> dict[str, str]:
    """Fields of a form or a query; None is left out."""
    told = {name: value for name, value in values.items() if value is not None}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in told.items()}


def _body(images: Images) -> dict[str, Any]:
    """Arrays of one shape travel as one ``.npy``, everything else as files."""
    stack = images if isinstance(images, np.ndarray) else None
    if stack is None and images and all(isinstance(image, np.ndarray) for image in images):
        arrays = [np.asarray(image) for image in images]
        if len({(array.shape, array.dtype) for array in arrays}) == 1:
            stack = np.stack(arrays)
    if stack is None:
        return {"files": _files(images)}
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(stack), allow_pickle=False)
    return {"content": buffer.getvalue(), "headers": {"Content-Type": NPY}}


def _files(images: Images) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Pictures as the files of a form. Raises DataError for what is not a picture, NotFoundError for a lost file."""
    return [("files", (name, data, "application/octet-stream")) for name, data in _pictures(images)]


def _pictures(images: Images) -> Iterator[tuple[str, bytes]]:
    for number, image in enumerate(images):
        if isinstance(image, bytes):
            yield f"image-{number}", image
        elif isinstance(image, (str, Path)):
            try:
                yield Path(image).name, Path(image).read_bytes()
            except OSError as error:
                raise NotFoundError(f"The picture {image} cannot be read: {error.strerror}.") from None
        else:
            yield f"image-{number}.png", _png(np.asarray(image))


def _png(image: NDArray[Any]) -> bytes:
    """A uint8 array ``[H, W, C]`` or ``[H, W]`` as PNG, which keeps every value."""
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise DataError(
            f"An image of type {image.dtype} and shape {image.shape} is not a picture.",
            "Pictures are uint8 [H, W, C] or [H, W].",
        )
    squeezed = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(squeezed).save(buffer, "PNG")
    return buffer.getvalue()


# ---- answers -------------------------------------------------------------------------------------------------------


def retry_after(response: httpx.Response, attempt: int) -> float:
    """Seconds to wait after a 429 or 503: what the server says (at most a minute), else longer each time."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), 60.0) if said.isdigit() else min(0.5 * 2.0**attempt, 10.0)


def failure(response: httpx.Response) -> MoepipeError:
    """The error that a refusal stands for: what the server says, as one of the project's own classes."""
    code, message, fix = f"HTTP {response.status_code}", response.text[:200].strip(), ""
    try:
        told = response.json()
        told = told["error"] if isinstance(told["error"], dict) else told  # under /v2 `error` is a text
    except (ValueError, KeyError, TypeError):
        told = {}
    message, fix = str(told.get("message", message)), str(told.get("fix") or "")
    code = f"{code}, {told['code']}" if "code" in told else code
    kind = _ERRORS.get(response.status_code, EnvironmentProblem)
    return kind(f"The server refused: {message or 'no reason given'} [{code}]", fix)


def told_failure(told: Mapping[str, Any]) -> MoepipeError:
    """The error of a job that failed."""
    return SpecError(
        f"The adaptation failed: {told.get('message', 'no reason given')} [{told.get('code', 'unknown')}]",
        str(told.get("fix") or ""),
    )


def unreachable(url: str, call: Call, error: httpx.TransportError | None) -> EnvironmentProblem:
    """Nobody answers, or the connection broke."""
    said = f": {error}" if error is not None and str(error) else ""
    return EnvironmentProblem(
        f"{call.method} {call.path} got no answer from {url}{said}.",
        "Is it running? `moepipe serve RUN` starts one; --url names another address.",
    )
