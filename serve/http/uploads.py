"""Images of a request in whichever form they came: picture files, ``.npy``, safetensors, or a data set by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from moe.errors import nearest
from serve.http.bodies import limits_of, media_type, read_body, read_form, read_json
from serve.http.images import ARRAYS, Images, check_count, decode_files, total_bytes
from serve.http.limits import charge
from serve.http.problems import Refused

if TYPE_CHECKING:
    from serve.http.backend import Backend

_MULTIPART = "multipart/form-data"
_JSON = "application/json"


@dataclass(frozen=True)
class Upload:
    """What came.

    Attributes:
        images: uint8 ``[H, W, C]``.
        names: of the files, or ``image-0`` and so on.
        fields: plain fields of a form.
    """

    images: Images
    names: tuple[str, ...]
    fields: dict[str, str]


async def read_images(request: Request, backend: Backend, most: int, uri: bool = False) -> Upload:
    """The images of a body.

    Args:
        request: its body was not read yet.
        backend: knows the channels that the model reads, and the data sets.
        most: images.
        uri: allow ``{"uri": ...}``.

    Raises:
        Refused: 400 malformed, 413 too many or too large, 415 unknown content type, 422 none, or not images.
        NotFoundError: no such data set.
    """
    kind, channels, limits = media_type(request), backend.info.channels, limits_of(request)
    fields: dict[str, str] = {}
    names: tuple[str, ...] = ()
    if kind == _MULTIPART:
        files, fields = await read_form(request, most)
        try:
            named = [(file.filename or f"image-{number}", await file.read()) for number, file in enumerate(files)]
        finally:
            for file in files:
                await file.close()
        check_count(len(named), most)
        names = tuple(name for name, _ in named)
        images = await run_in_threadpool(decode_files, named, channels, limits)
    elif kind in ARRAYS:
        images = await run_in_threadpool(ARRAYS[kind], await read_body(request), channels, limits)
    elif kind == _JSON and uri:
        images = await backend.dataset(_uri(await read_json(request)))
    else:
        told = ", ".join([_MULTIPART, *ARRAYS, *([_JSON] if uri else [])])
        raise Refused(415, "media-type", f"The content type {kind[:80]!r} is not read here.", f"Use one of {told}.")
    check_count(len(images), most)
    charge(request.scope, total_bytes(images))
    return Upload(images, names or tuple(f"image-{number}" for number in range(len(images))), fields)


def require_known(request: Request, fields: Iterable[str], names: Collection[str]) -> None:
    """Refuse settings of the query or the form that the route does not have: a wrong name would have no effect.

    Raises:
        Refused: 422, there is one.
    """
    for name in (*request.query_params, *fields):
        if name not in names:
            raise Refused(422, "invalid", f"There is no setting {name[:80]!r}.", nearest(name[:80], names))


def _uri(document: Any) -> str:
    if not isinstance(document, dict) or set(document) != {"uri"} or not isinstance(document["uri"], str):
        raise Refused(422, "invalid", "The document is not {'uri': 'dataset:NAME'}.", "Send exactly this key.")
    return str(document["uri"])
