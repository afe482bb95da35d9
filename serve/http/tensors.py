"""Tensors on the wire of the Open Inference Protocol v2: JSON data or the binary tensor extension.

With the extension a body is a JSON document whose length the header ``Inference-Header-Content-Length`` tells, followed
by the raw little-endian bytes of the tensors in order; elements of BYTES have a 4-byte length in front of each.

Reference: the protocol's "Inference Request" and Triton's "Binary tensor data" extension. Differs: NaN and
infinities are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.http.limits import Limits
from serve.http.problems import Refused, too_large

FLOATS: Mapping[str, str] = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_LENGTH = struct.Struct("<I")
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Tensor:
    """One input: an array of numbers, or the byte strings of a BYTES tensor in order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: NDArray[Any] | None
    strings: tuple[bytes, ...] = ()


def read_inputs(document: Mapping[str, Any], binary: memoryview, limits: Limits) -> list[Tensor]:
    """All inputs of an inference request.

    Args:
        document: the JSON part.
        binary: what follows it.
        limits: bounds on rows and bytes.

    Raises:
        Refused: 400 when the document does not follow the protocol or bytes are missing or left over, 413 and 422 for
            tensors that are too large, of another type, or not finite.
    """
    declared = document.get("inputs")
    if not isinstance(declared, list) or not declared:
        raise _bad("The request has no list 'inputs'.")
    found: list[Tensor] = []
    for item in declared:
        if not isinstance(item, dict):
            raise _bad("An input is not an object.")
        tensor, used = _read_input(item, binary, limits)
        binary = binary[used:]
        found.append(tensor)
    if len(binary):
        raise _bad(f"{len(binary)} bytes follow the last tensor.")
    return found


def _read_input(item: Mapping[str, Any], binary: memoryview, limits: Limits) -> tuple[Tensor, int]:
    """The tensor and the number of binary bytes it took."""
    name, datatype = item.get("name"), item.get("datatype")
    if not isinstance(name, str) or not isinstance(datatype, str):
        raise _bad("An input lacks a 'name' or a 'datatype'.")
    if datatype not in (*FLOATS, "UINT8", "BYTES"):
        raise Refused(
            422, "wrong-dtype", f"The datatype {datatype[:20]!r} is not read.", "Use FP32, FP16, FP64, UINT8 or BYTES."
        )
    shape = _shape(item.get("shape"))
    count = math.prod(shape)
    if count * np.dtype(FLOATS.get(datatype, "u1")).itemsize > limits.max_decoded_bytes:
        raise too_large("A tensor", count, limits.max_decoded_bytes, "bytes")
    size = parameters(item).get("binary_data_size")
    if size is None:
        if "data" not in item:
            raise _bad(f"The input {name[:40]!r} has neither 'data' nor 'binary_data_size'.")
        return _from_json(name, datatype, shape, item["data"]), 0
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary):
        raise _bad(f"'binary_data_size' of {name[:40]!r} does not fit the {len(binary)} bytes that are there.")
    raw = binary[:size]
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, None, _strings(raw, count)), size
    kind = np.dtype(FLOATS.get(datatype, "u1"))
    if size != count * kind.itemsize:
        raise _bad(f"The input {name[:40]!r} needs {count * kind.itemsize} bytes and has {size}.")
    return Tensor(name, datatype, shape, _finite(np.frombuffer(raw, kind), name).reshape(shape)), size


def _shape(value: Any) -> tuple[int, ...]:
    plain = isinstance(value, list) and 0 < len(value) <= _MAX_DIMENSIONS
    if not plain or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31 for n in value):
        raise _bad("An input's 'shape' is not a list of 1 to 8 sizes.")
    return tuple(value)


def _from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> Tensor:
    count = math.prod(shape)
    if datatype == "BYTES":
        flat = data if isinstance(data, list) else [data]
        if len(flat) != count or not all(isinstance(text, str) for text in flat):
            raise _bad(f"The data of {name[:40]!r} are not {count} strings.")
        return Tensor(name, datatype, shape, None, tuple(text.encode("utf-8", "surrogatepass") for text in flat))
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):  # ragged lists
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf" or array.size != count:
        raise _bad(f"The data of {name[:40]!r} are not {count} numbers.")
    if datatype == "UINT8":
        if array.dtype.kind == "f" or (array.size and (array.min() < 0 or array.max() > 255)):
            raise Refused(422, "wrong-dtype", f"The data of {name[:40]!r} are not whole numbers from 0 to 255.")
        return Tensor(name, datatype, shape, array.astype(np.uint8).reshape(shape))
    with np.errstate(over="ignore"):
        floats = array.astype(FLOATS[datatype])
    return Tensor(name, datatype, shape, _finite(floats, name).reshape(shape))


def _strings(raw: memoryview, count: int) -> tuple[bytes, ...]:
    """The elements of a binary BYTES tensor. Raises Refused (400) when lengths and bytes disagree."""
    found: list[bytes] = []
    while len(raw):
        length = _LENGTH.unpack(raw[:4])[0] if len(raw) >= 4 else len(raw)
        if len(found) == count or 4 + length > len(raw):
            raise _bad("The lengths inside a BYTES tensor do not fit its size.")
        found.append(bytes(raw[4 : 4 + length]))
        raw = raw[4 + length :]
    if len(found) != count:
        raise _bad(f"A BYTES tensor has {len(found)} elements instead of {count}.")
    return tuple(found)


def _finite(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(
            422, "not-finite", f"The input {name[:40]!r} holds NaN or infinite values.", "Send finite values."
        )
    return array


def parameters(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``parameters`` of a request, an input or an output; empty when absent. Raises Refused (400)."""
    found = item.get("parameters", {})
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _bad("'parameters' is not an object.")
    return found


def write_output(
    name: str, datatype: str, array: NDArray[Any] | Sequence[str], binary: bool
) -> tuple[dict[str, Any], bytes]:
    """One output as (its JSON object, its binary bytes or none).

    Args:
        name: of the output.
        datatype: FP32, INT64 or BYTES.
        array: numbers of any shape, or strings.
        binary: use the binary extension.
    """
    if datatype == "BYTES":
        shape = [len(array)]
        told: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if not binary:
            return {**told, "data": list(array)}, b""
        raw = b"".join(_LENGTH.pack(len(text)) + text for text in (str(item).encode("utf-8") for item in array))
    else:
        numbers = np.asarray(array, dtype="<i8" if datatype == "INT64" else "<f4")
        told = {"name": name, "datatype": datatype, "shape": list(numbers.shape)}
        if not binary:
            return {**told, "data": numbers.ravel().tolist()}, b""
        raw = numbers.tobytes()
    return {**told, "parameters": {"binary_data_size": len(raw)}}, raw


def _bad(message: str) -> Refused:
    return Refused(400, "bad-request", message, "See the Open Inference Protocol v2, 'Inference Request'.")
