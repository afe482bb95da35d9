"""From bytes of a stranger to uint8 images: picture files, ``.npy`` and safetensors, each bounded before it is decoded.

Pixels are counted from the header, before a decoder allocates anything (decompression bombs). Nothing is unpickled.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from serve.http.limits import Limits
from serve.http.problems import Refused, too_large

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAX_NPY_HEADER = 10_000
Images = list[NDArray[np.uint8]]


def decode_files(files: Iterable[tuple[str, bytes]], channels: int, limits: Limits) -> Images:
    """Picture files as ``[H, W, C]``.

    Args:
        files: (name for messages, bytes).
        channels: 1 gives grey images, anything else colour.
        limits: bounds of pixels and of all images together.

    Raises:
        Refused: 413 for too many pixels or bytes, 422 for what is not a picture.
    """
    images: Images = []
    total = 0
    for name, data in files:
        image = decode_file(name, data, channels, limits.max_pixels, limits.max_decoded_bytes - total)
        total += image.nbytes
        images.append(image)
    return images


def decode_file(name: str, data: bytes, channels: int, max_pixels: int, left: int) -> NDArray[np.uint8]:
    """One picture as ``[H, W, C]``; see :func:`decode_files`. ``left`` is how many bytes it may decode to."""
    shown = name[:80]
    mode = "L" if channels == 1 else "RGB"
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            pixels = width * height
            if pixels <= max_pixels and pixels * len(mode) <= left:
                upright = ImageOps.exif_transpose(picture)
                return _channels_last(np.asarray(upright.convert(mode)))
    except Pillow.DecompressionBombError:
        pixels = max_pixels + 1
    except Exception as error:  # decoders of a dozen formats raise anything at all on hostile bytes
        kind = "is not a picture" if isinstance(error, UnidentifiedImageError) else "cannot be decoded"
        raise Refused(
            422, "not-an-image", f"The file {shown!r} {kind}.", f"Send one of {', '.join(FORMATS)}, complete."
        ) from None
    if pixels > max_pixels:
        raise Refused(
            413,
            "too-many-pixels",
            f"The image {shown!r} has more than {max_pixels} pixels.",
            "Scale it down before sending; the model resizes it anyway.",
        )
    raise Refused(413, "too-large", "The images of the request decode to more bytes than allowed.", "Send fewer.")


def decode_npy(data: bytes, channels: int, limits: Limits) -> Images:
    """A ``.npy`` array of images; see :func:`split_array` for its form.

    Raises:
        Refused: 400 when it is not a ``.npy`` file or is truncated, else as :func:`split_array`.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file, max_header_size=_MAX_NPY_HEADER)
    except Exception as error:  # numpy evaluates the header as a literal; damaged ones raise many things
        raise Refused(
            400, "bad-array", f"The body is not a .npy file: {str(error)[:120]}.", "Use numpy.save."
        ) from None
    count = math.prod(shape)
    expected = count * dtype.itemsize
    present = len(data) - file.tell()
    if dtype.hasobject or dtype.kind not in "buif" or dtype.itemsize == 0:
        raise Refused(422, "wrong-dtype", f"Arrays of type {dtype.str[:40]} are not images.", "Send uint8.")
    if min(shape, default=0) < 0 or expected != present:
        raise Refused(
            400, "bad-array", f"The header promises {expected} bytes and {present} follow.", "Send the complete file."
        )
    array = np.frombuffer(data, dtype=dtype, count=count, offset=file.tell())
    return split_array(array.reshape(shape, order="F" if fortran else "C"), channels, limits)


def decode_safetensors(data: bytes, channels: int, limits: Limits) -> Images:
    """The tensor ``images`` (or the only one) of a safetensors file; see :func:`split_array` for its form.

    Raises:
        Refused: 400 when it is not such a file, 422 when it has no such tensor, else as :func:`split_array`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise Refused(
            400, "bad-array", f"The body is not a safetensors file of numbers: {str(error)[:120]}.", "Send it complete."
        ) from None
    if "images" not in tensors and len(tensors) != 1:
        raise Refused(422, "wrong-name", f"The file has {len(tensors)} tensors, none named 'images'.", "Name it so.")
    array = tensors["images"] if "images" in tensors else next(iter(tensors.values()))
    return split_array(array, channels, limits)


def split_array(array: NDArray[Any], channels: int, limits: Limits) -> Images:
    """Images of a uint8 array ``[S, H, W, C]`` or ``[S, H, W]``.

    Raises:
        Refused: 422 for another type or shape (with the reason for NaN), 413 above the limits.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(422, "not-finite", "The array holds NaN or infinite values.", "Send finite images.")
    if array.dtype != np.uint8:
        raise Refused(
            422,
            "wrong-dtype",
            f"The array is of type {array.dtype.name}.",
            "Images to adapt to are uint8 [S, H, W, C], as decoded; the server normalises them itself.",
        )
    wanted = (1,) if channels == 1 else (1, 3, channels)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in wanted) or 0 in array.shape[1:]:
        told = " or ".join(map(str, dict.fromkeys(wanted)))
        raise Refused(
            422, "wrong-shape", f"The array has the shape {array.shape}.", f"Images are [S, H, W, C] with C = {told}."
        )
    height, width = array.shape[1:3]
    if height * width > limits.max_pixels:
        raise too_large("An image", height * width, limits.max_pixels, "pixels", "Scale it down before sending.")
    if array.nbytes > limits.max_decoded_bytes:
        raise too_large("An array", array.nbytes, limits.max_decoded_bytes, "bytes")
    return [_channels_last(image) for image in array]


def check_count(count: int, most: int, what: str = "image") -> None:
    """Raises Refused: 422 for none, 413 for more than ``most``."""
    if count == 0:
        raise Refused(422, "no-images", f"The request holds no {what}.", "Send at least one.")
    if count > most:
        raise Refused(
            413, "too-many-images", f"{count} {what}s are above the limit of {most}.", "Send them in several requests."
        )


def total_bytes(images: Sequence[NDArray[np.uint8]]) -> int:
    """Bytes of all images."""
    return sum(image.nbytes for image in images)


def _channels_last(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image[..., None] if image.ndim == 2 else image


Decoder = Callable[[bytes, int, Limits], Images]
ARRAYS: dict[str, Decoder] = {
    "application/x-npy": decode_npy,
    "application/npy": decode_npy,
    "application/safetensors": decode_safetensors,
    "application/x-safetensors": decode_safetensors,
}
