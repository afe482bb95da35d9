"""Everything that is wrong with requests, over real sockets: documented answers, no server error, flat memory."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import httpx
import numpy as np
import pytest

from serve.http.auth import Tokens
from serve.http.limits import Limits
from tests.serve.http_support import (
    CLASSES,
    SIDE,
    adapt,
    check_memory_stays_flat,
    files,
    npy,
    pixels,
    png,
    refused,
    server_at,
)
from tests.serve.test_limits import CASES, FORM, NPY, SMALL, bomb, one_file

ANNA, BERT = "a" * 20, "b" * 20


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with server_at(tmp_path_factory.mktemp("states"), limits=SMALL) as (port, _), client_of(port) as found:
        yield found


def client_of(port, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=60)


def infer(client, shape, data, datatype="FP32"):
    tensor = {"name": "image", "datatype": datatype, "shape": shape, "data": data}
    return client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})


def test_every_bad_upload_is_refused_alike(client):
    for case, (request, status, code) in CASES.items():
        told = refused(client.post("/v1/states/park", **request), status, code)
        assert told["fix"] or status == 400, case
    assert client.get("/v1/states").json()["states"] == []
    for case in (
        "not an image",
        "a decompression bomb",
        "no images",
        "too many images",
        "a truncated form",
        "a npy with NaN",
    ):
        request, status, code = CASES[case]
        for path in ("/v1/predict", "/v1/stream/park"):
            refused(client.post(path, **request), status, code)


def test_bad_tensors_are_refused(client):
    flat = [0.5] * (3 * SIDE * SIDE)
    assert infer(client, [1, 3, SIDE, SIDE], flat).status_code == 200
    refused(infer(client, [1, 3, SIDE, SIDE + 1], [0.5] * (3 * SIDE * (SIDE + 1))), 422, "wrong-shape")
    refused(infer(client, [1, 3, SIDE, SIDE], flat, "INT64"), 422, "wrong-dtype")
    assert infer(client, [1, 3, SIDE, SIDE], flat[:-1]).status_code in (400, 422)
    assert infer(client, [0, 3, SIDE, SIDE], []).status_code == 422
    body = b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1],"data":[NaN]}]}'
    refused(client.post("/v2/models/tiny/infer", content=body), 400, "bad-json")
    raw = np.full((1, 3, SIDE, SIDE), np.nan, np.float32).tobytes()
    head = b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1,3,%d,%d],"parameters":{"binary_data_size":%d}}]}'
    head %= (SIDE, SIDE, len(raw))
    sized = {"Inference-Header-Content-Length": str(len(head))}
    refused(client.post("/v2/models/tiny/infer", content=head + raw, headers=sized), 422, "not-finite")


@pytest.mark.parametrize("name", ["nobody", "..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "x" * 65])
def test_unknown_and_travelling_names(client, name):
    for answer in (
        client.get(f"/v1/states/{name}"),
        client.get(f"/v1/jobs/{name}"),
        client.delete(f"/v1/states/{name}"),
        client.get(f"/v2/models/tiny/versions/{name}/ready"),
        client.post("/v1/predict", params={"state": name}, files=files(pixels(1))),
    ):
        assert answer.status_code in (404, 405, 422) and "error" in answer.json(), answer.text


def test_wrong_tokens_and_other_tenants(tmp_path):
    tokens = Tokens.parse(f"anna:{ANNA}\nbert:{BERT}\n")
    with (
        server_at(tmp_path, tokens=tokens) as (port, _),
        client_of(port) as nobody,
        client_of(port, "c" * 20) as stranger,
        client_of(port, ANNA) as anna,
        client_of(port, BERT) as bert,
    ):
        for wrong in (nobody, stranger):
            refused(adapt(wrong), 401, "unauthorised")
            refused(wrong.get("/metrics"), 401, "unauthorised")
        assert adapt(anna, "secret").status_code == 200
        assert bert.get("/v1/states").json()["states"] == []
        for method, path in (("GET", ""), ("GET", "/export"), ("DELETE", ""), ("POST", "/pin"), ("POST", "/rollback")):
            refused(bert.request(method, f"/v1/states/secret{path}"), 404, "not-found")
        refused(bert.post("/v1/predict?state=secret", files=files(pixels(1))), 404, "not-found")
        key = {"Idempotency-Key": "mine"}
        first = anna.post("/v1/states/once", files=files(pixels(4)), headers=key).json()
        other = bert.post("/v1/states/once", files=files(pixels(5)), headers=key)  # another tenant's key is another key
        assert other.status_code == 200 and other.json()["support"] == 5 and first["support"] == 4


def test_the_same_key_at_the_same_time_works_once(tmp_path):
    with server_at(tmp_path) as (port, _):
        answers = []

        def ask():
            with client_of(port) as own:
                answers.append(own.post("/v1/states/once", files=files(pixels(6)), headers={"Idempotency-Key": "k"}))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200}
        assert all(answer.json() == answers[0].json() for answer in answers)
        with client_of(port) as own:
            assert own.get("/v1/states/once").json()["version"] == 1


def test_a_stream_batch_under_one_key_is_followed_once(tmp_path):
    with server_at(tmp_path) as (port, _), client_of(port) as client:
        key = {"Idempotency-Key": "batch-1"}
        asked = {"content": npy(pixels(8)), "params": {"method": "bn"}}
        first, second = (client.post("/v1/stream/flow", **asked, headers={**NPY, **key}) for _ in range(2))
        assert first.status_code == 200, first.text
        assert first.json() == second.json() and client.get("/v1/states/flow").json()["version"] == 1
        other = client.post("/v1/stream/flow", content=npy(pixels(7)), headers={**NPY, **key})
        refused(other, 409, "idempotency-conflict")


def test_deletion_while_everybody_asks(tmp_path):
    with server_at(tmp_path) as (port, _), client_of(port) as client:
        assert adapt(client).status_code == 200
        statuses, over = [], threading.Event()

        def ask():
            with client_of(port) as own:
                while not over.is_set():
                    statuses.append(own.post("/v1/predict?state=park", files=files(pixels(2))).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while 200 not in statuses:  # later the state may be gone whenever somebody asks
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(5):
            assert client.delete("/v1/states/park").status_code == 204
            refused(client.delete("/v1/states/park"), 404, "not-found")
            assert adapt(client).status_code == 200
        over.set()
        for thread in threads:
            thread.join()
        assert set(statuses) <= {200, 404} and 200 in statuses


def test_memory_stays_flat_under_ten_thousand_images_and_oversize_bodies(tmp_path):
    one = png(pixels(1)[0])
    part = b'--zz\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + one + b"\r\n"
    form = part * 10_000 + b"--zz--\r\n"
    stack = npy(np.zeros((10_000, SIDE, SIDE), np.uint8))
    limits = Limits(max_body_bytes=32 << 20)
    oversize = bytes(33 << 20)
    with server_at(tmp_path, limits=limits) as (port, _), client_of(port) as client:

        def attack():
            for path in ("/v1/states/x", "/v1/predict", "/v1/stream/x"):
                refused(client.post(path, content=form, headers=FORM), 413, "too-many-images")
                refused(client.post(path, content=stack, headers=NPY), 413, "too-many-images")
                refused(client.post(path, **one_file(bomb())), 413, "too-many-pixels")
            with suppress(httpx.TransportError):  # the answer comes, and the connection ends, while the client sends
                refused(client.post("/v1/states/x", content=oversize, headers=NPY), 413, "too-large")

        for _ in range(3):
            attack()
        check_memory_stays_flat(attack, 8)
        assert client.get("/v2/health/ready").status_code == 200


def test_senders_that_go_away_or_speak_something_else(tmp_path):
    with server_at(tmp_path) as (port, _), client_of(port) as client:
        head = (
            b"POST /v1/states/x HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: 1000\r\n\r\n"
        )
        for data in (head + b"abc", head[:40], b""):
            with socket.create_connection(("127.0.0.1", port)) as found:
                found.sendall(data)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as found:
            found.sendall(b"\x16\x03\x01 hello, is this TLS?\r\n\r\n")
            answer = found.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 400") and b'"bad-request"' in answer
        assert client.get("/v1/model").json()["class_names"] == list(CLASSES)
