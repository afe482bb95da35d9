"""What hostile or careless requests cost: they are refused early, memory stays flat, and nothing answers 500."""

from __future__ import annotations

import gzip
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from serve.http.limits import Limits
from tests.serve.http_support import adapt, check_memory_stays_flat, client_for, files, npy, pixels, png, refused

SMALL = Limits(
    max_body_bytes=200_000,
    max_json_bytes=20_000,
    max_rows=8,
    max_support=16,
    max_pixels=100_000,
    max_decoded_bytes=1_000_000,
)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with client_for(tmp_path_factory.mktemp("states"), limits=SMALL) as found:
        yield found


def bomb(side=30_000):
    """A PNG of ``side`` squared pixels in a few kB: only its header is honest."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def one_file(data, name="x.png"):
    return {"files": [("files", (name, data, "image/png"))]}


NPY, SAFE = {"Content-Type": "application/x-npy"}, {"Content-Type": "application/safetensors"}
PNG = png(pixels(1)[0])
FORM = {"Content-Type": "multipart/form-data; boundary=zz"}
PART = b'--zz\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + PNG


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, 64)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


def header_of(shape, descr="|u1"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


CASES = {
    "not an image": (one_file(b"hello"), 422, "not-an-image"),
    "an svg": (one_file(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 422, "not-an-image"),
    "a truncated image": (one_file(PNG[:-30]), 422, "not-an-image"),
    "a truncated jpeg": (one_file(jpeg()[:-200]), 422, "not-an-image"),
    "a decompression bomb": (one_file(bomb()), 413, "too-many-pixels"),
    "a bomb below the library's own limit": (one_file(bomb(400)), 413, "too-many-pixels"),
    "no images": ({"content": b"--zz--\r\n", "headers": FORM}, 422, "no-images"),
    "an empty file": (one_file(b""), 422, "not-an-image"),
    "too many images": ({"files": files(pixels(17))}, 413, "too-many-images"),
    "a body too large": ({"content": bytes(200_001), "headers": NPY}, 413, "too-large"),
    "no body": ({}, 415, "media-type"),
    "an unknown type": ({"content": b"x", "headers": {"Content-Type": "text/html"}}, 415, "media-type"),
    "a truncated form": ({"content": PART, "headers": FORM}, 400, "bad-multipart"),
    "a form cut in the boundary": ({"content": PART + b"\r\n--zz", "headers": FORM}, 400, "bad-multipart"),
    "a form without boundary": (
        {"content": PART, "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "bad-multipart",
    ),
    "a form that is none": ({"content": b"hello", "headers": FORM}, 400, "bad-multipart"),
    "an empty form": ({"content": b"", "headers": FORM}, 400, "bad-multipart"),
    "a form with a codec as charset": (
        {"content": PART + b"\r\n--zz", "headers": {"Content-Type": "multipart/form-data; charset=hex; boundary=zz"}},
        400,
        "bad-multipart",
    ),
    "not a npy": ({"content": b"hello", "headers": NPY}, 400, "bad-array"),
    "a truncated npy": ({"content": npy(pixels(2))[:-1], "headers": NPY}, 400, "bad-array"),
    "a npy with a tail": ({"content": npy(pixels(2)) + b"x", "headers": NPY}, 400, "bad-array"),
    "a npy of 8 EB": ({"content": header_of((2**30, 2**30, 8)), "headers": NPY}, 400, "bad-array"),
    "a npy of negative size": ({"content": header_of((-1, 4, 4)), "headers": NPY}, 400, "bad-array"),
    "a npy of objects": ({"content": header_of((1,), "|O"), "headers": NPY}, 422, "wrong-dtype"),
    "a npy of floats": ({"content": npy(np.zeros((2, 9, 9, 3), np.float32)), "headers": NPY}, 422, "wrong-dtype"),
    "a npy with NaN": ({"content": npy(np.full((2, 9, 9, 3), np.nan)), "headers": NPY}, 422, "not-finite"),
    "a npy of two dimensions": ({"content": npy(np.zeros((9, 9), np.uint8)), "headers": NPY}, 422, "wrong-shape"),
    "a npy of seven channels": ({"content": npy(np.zeros((2, 9, 9, 7), np.uint8)), "headers": NPY}, 422, "wrong-shape"),
    "a npy without pixels": ({"content": npy(np.zeros((2, 0, 9, 3), np.uint8)), "headers": NPY}, 422, "wrong-shape"),
    "a npy without images": ({"content": npy(np.zeros((0, 9, 9, 3), np.uint8)), "headers": NPY}, 422, "no-images"),
    "not safetensors": ({"content": b"hello", "headers": SAFE}, 400, "bad-array"),
    "safetensors of 8 EB": ({"content": b"\xff" * 8 + b"{}", "headers": SAFE}, 400, "bad-array"),
    "no uri": ({"json": {"url": "x"}}, 422, "invalid"),
    "a path as uri": ({"json": {"uri": "file:///etc/passwd"}}, 422, "spec"),
    "an unknown data set": ({"json": {"uri": "dataset:none/test"}}, 404, "not-found"),
    "json that is none": ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "bad-json"),
    "an unknown method": ({"files": files(pixels(2)), "params": {"method": "magic"}}, 422, "unknown-method"),
    "a method that does not fit": (
        {"files": files(pixels(2)), "params": {"method": "distill"}},
        422,
        "method-does-not-fit",
    ),
    "no steps": ({"files": files(pixels(2)), "params": {"step_cap": 0}}, 422, "invalid"),
    "options that are none": ({"files": files(pixels(2)), "params": {"options": "[1]"}}, 422, "invalid"),
    "unknown options": ({"files": files(pixels(2)), "params": {"options": '{"x": 1}'}}, 422, "spec"),
    "a wild key": ({"files": files(pixels(2)), "headers": {"Idempotency-Key": "a b"}}, 422, "invalid"),
    "a bad field": ({"files": files(pixels(2)), "data": {"step_cap": "\u0663"}}, 422, "invalid"),
}


@pytest.mark.parametrize("case", CASES)
def test_adaptation_refuses(client, case):
    request, status, code = CASES[case]
    refused(client.post("/v1/states/park", **request), status, code)
    assert client.get("/v1/states").json()["states"] == []


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "%2e%2e",
        "..%2f..%2fetc",
        "%2e%2e%2fx",
        "a%00b",
        "-x",
        ".x",
        "a.b",
        "x" * 65,
        "%F0%9F%98%80",
        "a%5Cb",
        "%20",
    ],
)
def test_names_that_travel_are_refused_everywhere(client, name):
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", ""), ("POST", "/pin"), ("GET", "/export")):
        response = client.request(method, f"/v1/states/{name}{path}")
        assert response.status_code in (404, 405, 422), response.text
        assert "error" in response.json()
    response = client.get(f"/v2/models/tiny/versions/{name}")
    assert response.status_code in (200 if name == ".." else 404, 404, 422)


def test_a_png_full_of_text_and_a_form_of_fields_are_refused(client):
    fields = b"".join(b'--zz\r\nContent-Disposition: form-data; name="a%d"\r\n\r\nx\r\n' % n for n in range(100))
    refused(client.post("/v1/states/park", content=fields + b"--zz--", headers=FORM), 400, "bad-multipart")


def test_a_compressed_bomb_is_stopped_while_it_unpacks(client):
    body = gzip.compress(bytes(50_000_000))
    response = client.post("/v2/models/tiny/infer", content=body, headers={"Content-Encoding": "gzip"})
    refused(response, 413, "too-large")


def test_json_has_a_limit_of_its_own(client):
    refused(client.post("/v2/models/tiny/infer", content=b" " * 20_001), 413, "too-large")


def test_too_many_rows(client):
    shown = pixels(9)
    refused(client.post("/v1/predict", files=files(shown)), 413, "too-many-images")


def test_grey_transparent_and_rotated_pictures_are_read(client):
    for mode in ("L", "LA", "RGBA", "P", "1", "I;16", "CMYK"):
        buffer = io.BytesIO()
        Image.new(mode, (20, 10)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        answer = client.post("/v1/predict", **one_file(buffer.getvalue()))
        assert answer.status_code == 200, (mode, answer.text)


def test_same_key_works_once_and_another_request_conflicts(client):
    key = {"Idempotency-Key": "once-1"}
    first, second = (client.post("/v1/states/once", files=files(pixels(4)), headers=key) for _ in range(2))
    assert first.status_code == 200, first.text
    assert first.json() == second.json()
    assert client.get("/v1/states/once").json()["version"] == 1
    other = client.post("/v1/states/once", files=files(pixels(5)), headers=key)
    refused(other, 409, "idempotency-conflict")
    assert client.delete("/v1/states/once").status_code == 204


def test_memory_stays_flat_under_bombs_and_large_bodies(tmp_path):
    limits = Limits(max_body_bytes=4 << 20, max_decoded_bytes=16 << 20, max_pixels=4_000_000)
    with client_for(tmp_path, limits=limits) as client:
        packed = gzip.compress(bytes(60_000_000))

        def attack():
            refused(client.post("/v1/predict", **one_file(bomb())), 413, "too-many-pixels")
            refused(client.post("/v1/predict", content=bytes(5 << 20), headers=NPY), 413, "too-large")
            response = client.post("/v2/models/tiny/infer", content=packed, headers={"Content-Encoding": "gzip"})
            refused(response, 413, "too-large")
            large = npy(np.zeros((1, 1000, 1000, 3), np.uint8))
            assert client.post("/v1/predict", content=large, headers=NPY).status_code == 200

        for _ in range(3):
            attack()
        check_memory_stays_flat(attack, 15)


def test_deletion_during_use_serves_who_came_before(tmp_path):
    with client_for(tmp_path) as client:
        assert adapt(client).status_code == 200
        backend = client.app.state.backend
        delta = backend.catalogue.resident("default", "park")
        assert client.delete("/v1/states/park").status_code == 204
        images = backend.model.preprocess(list(pixels(2)))
        assert backend.model.predict(images, [delta, None]).isfinite().all()  # rows in the queue hold their delta
        refused(client.post("/v1/predict?state=park", files=files(pixels(1))), 404, "not-found")
