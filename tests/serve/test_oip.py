"""The Open Inference Protocol: an unmodified public client, and the protocol by hand."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

from serve.http.oip import HEADER_LENGTH
from tests.serve.http_support import CLASSES, SIDE, adapt, client_for, files, pixels, png, refused, server_at

PATH = "/v2/models/tiny/infer"
SHAPE = (2, 3, SIDE, SIDE)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with client_for(tmp_path_factory.mktemp("states")) as found:
        assert adapt(found, "park").status_code == 200
        assert adapt(found, "park", pixels(8, seed=1)).status_code == 200
        yield found


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random(SHAPE, dtype=np.float32)


def ask(images, **more):
    tensor = {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.tolist()}
    return {"inputs": [tensor], **more}


def logits(response):
    assert response.status_code == 200, response.text
    return np.array(next(o for o in response.json()["outputs"] if o["name"] == "logits")["data"], np.float32)


def binary(document, *tensors):
    head = json.dumps(document).encode()
    return {"content": b"".join([head, *tensors]), "headers": {HEADER_LENGTH: str(len(head))}}


def plain(name, datatype, shape, data):
    tensor = {"name": name, "datatype": datatype, "shape": shape, "data": data}
    return {"content": json.dumps({"inputs": [tensor]}).encode()}


def one(raw, datatype="FP32", shape=SHAPE, **parameters):
    options = {"binary_data_size": len(raw), **parameters}
    return {"inputs": [{"name": "image", "shape": list(shape), "datatype": datatype, "parameters": options}]}


# ---- an unmodified client -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_client_finds_its_way(tmp_path, images, compression):
    triton = pytest.importorskip("tritonclient.http")
    with server_at(tmp_path) as (port, backend):
        expected = backend.model.predict(torch.from_numpy(images)).numpy()
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as found:
            assert found.is_server_live() and found.is_server_ready() and found.is_model_ready("tiny")
            assert not found.is_model_ready("other")
            assert "binary_tensor_data" in found.get_server_metadata()["extensions"]
            about = found.get_model_metadata("tiny")
            assert about["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE]}]
            for as_binary in (True, False):
                given = triton.InferInput("image", list(SHAPE), "FP32")
                given.set_data_from_numpy(images, binary_data=as_binary)
                outputs = [
                    triton.InferRequestedOutput("logits", binary_data=as_binary),
                    triton.InferRequestedOutput("label", binary_data=True),
                ]
                told = found.infer(
                    "tiny", [given], outputs=outputs, request_id="7", request_compression_algorithm=compression
                )
                assert told.get_response()["id"] == "7"
                np.testing.assert_allclose(told.as_numpy("logits"), expected, rtol=1e-5)
                assert [CLASSES[k].encode() for k in expected.argmax(1)] == list(told.as_numpy("label"))


def test_triton_client_asks_a_state_by_version_and_by_parameter(tmp_path, images):
    triton = pytest.importorskip("tritonclient.http")
    httpx = pytest.importorskip("httpx")
    with server_at(tmp_path) as (port, backend):
        made = httpx.post(f"http://127.0.0.1:{port}/v1/states/park", files=files(pixels(8)), timeout=60)
        assert made.status_code == 200, made.text
        delta = backend.catalogue.resident("default", "park")
        expected = backend.model.predict(torch.from_numpy(images), delta).numpy()
        assert np.abs(expected - backend.model.predict(torch.from_numpy(images)).numpy()).max() > 1e-3
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as found:
            given = triton.InferInput("image", list(SHAPE), "FP32")
            given.set_data_from_numpy(images)
            assert found.is_model_ready("tiny", "park")
            for options in ({"model_version": "park"}, {"model_version": "park.1"}, {"parameters": {"state": "park"}}):
                told = found.infer("tiny", [given], **options)
                np.testing.assert_allclose(told.as_numpy("logits"), expected, rtol=1e-5)
                assert told.get_response()["model_version"] == "park.1"
            with pytest.raises(triton.InferenceServerException, match="no state 'nowhere'"):
                found.infer("tiny", [given], model_version="nowhere")


def test_triton_client_gets_classes(tmp_path, images):
    triton = pytest.importorskip("tritonclient.http")
    with server_at(tmp_path) as (port, _), triton.InferenceServerClient(f"127.0.0.1:{port}") as found:
        given = triton.InferInput("image", list(SHAPE), "FP32")
        given.set_data_from_numpy(images)
        told = found.infer("tiny", [given], outputs=[triton.InferRequestedOutput("probabilities", class_count=2)])
        rows = told.as_numpy("probabilities")
        assert rows.shape == (2, 2)
        score, index, name = rows[0, 0].decode().split(":")
        assert CLASSES[int(index)] == name and 0 < float(score) < 1


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_json_and_binary_give_the_same_numbers(client, images):
    plain = client.post(PATH, json=ask(images)).json()
    raw = images.tobytes()
    answer = client.post(PATH, **binary({**one(raw), "parameters": {"binary_data_output": True}}, raw))
    head = json.loads(answer.content[: int(answer.headers[HEADER_LENGTH])])
    tail = answer.content[int(answer.headers[HEADER_LENGTH]) :]
    assert [o["name"] for o in head["outputs"]] == ["logits", "probabilities", "label"]
    size = head["outputs"][0]["parameters"]["binary_data_size"]
    assert np.frombuffer(tail[:size], "<f4").tolist() == plain["outputs"][0]["data"]
    assert sum(o["parameters"]["binary_data_size"] for o in head["outputs"]) == len(tail)


def test_a_row_does_not_depend_on_its_neighbours(client, images):
    together = logits(client.post(PATH, json=ask(images))).reshape(2, -1)
    alone = np.stack([logits(client.post(PATH, json=ask(images[row : row + 1]))) for row in range(2)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("datatype", ["FP16", "FP64"])
def test_other_floats_are_read(client, images, datatype):
    raw = images.astype({"FP16": "<f2", "FP64": "<f8"}[datatype]).tobytes()
    found = logits(client.post(PATH, **binary(one(raw, datatype), raw)))
    np.testing.assert_allclose(found, logits(client.post(PATH, json=ask(images))), atol=2e-3)


def test_pixels_and_picture_files_are_preprocessed_by_the_server(client):
    shown = pixels(2)
    raw = shown.tobytes()
    by_pixels = logits(client.post(PATH, **binary(one(raw, "UINT8", shown.shape), raw)))
    pictures = [png(image) for image in shown]
    raw = b"".join(len(data).to_bytes(4, "little") + data for data in pictures)
    by_files = logits(client.post(PATH, **binary(one(raw, "BYTES", [2]), raw)))
    normalised = np.ascontiguousarray(shown.transpose(0, 3, 1, 2), np.float32) / 255
    np.testing.assert_allclose(by_pixels, by_files)
    np.testing.assert_allclose(by_pixels, logits(client.post(PATH, json=ask(normalised))), rtol=1e-4)


def test_every_answer_names_what_served_it(client, images):
    base = client.get("/v2/models/tiny").json()["versions"][0]
    versions = {
        "/v2/models/tiny/infer": base,
        f"/v2/models/tiny/versions/{base}/infer": base,
        "/v2/models/tiny/versions/park/infer": "park.2",
        "/v2/models/tiny/versions/park.1/infer": "park.1",
    }
    for path, expected in versions.items():
        assert client.post(path, json=ask(images)).json()["model_version"] == expected
    told = client.post(PATH, json=ask(images, parameters={"state": "park.1"})).json()
    assert told["model_version"] == "park.1"


def test_gzip_bodies(client, images):
    body = gzip.compress(json.dumps(ask(images)).encode())
    plain = logits(client.post(PATH, json=ask(images)))
    packed = client.post(PATH, content=body, headers={"Content-Encoding": "gzip"})
    np.testing.assert_array_equal(logits(packed), plain)


NAN = np.full(SHAPE, np.nan, np.float32).tobytes()
GOOD = np.zeros(SHAPE, np.float32).tobytes()


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"content": b"{"}, 400, "bad-json"),
        ({"content": b"[" * 100_000}, 400, "bad-json"),
        ({"content": b"\xff\xfe"}, 400, "bad-json"),
        ({"content": b'{"inputs": [NaN]}'}, 400, "bad-json"),
        ({"content": b'{"id": ' + b"9" * 5000 + b"}"}, 400, "bad-json"),
        ({"json": []}, 400, "bad-request"),
        ({"json": {}}, 400, "bad-request"),
        ({"json": {"inputs": [3]}}, 400, "bad-request"),
        ({"json": {"inputs": [{"name": "image", "datatype": "FP32"}]}}, 400, "bad-request"),
        (
            {"json": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [10**400]}]}},
            400,
            "bad-request",
        ),
        (
            {"json": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [2], "data": [[1], [2, 3]]}]}},
            400,
            "bad-request",
        ),
        (
            {"json": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [2], "data": ["1", "2"]}]}},
            400,
            "bad-request",
        ),
        (
            {"json": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [1e300]}]}},
            422,
            "not-finite",
        ),
        (
            {"json": {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [256]}]}},
            422,
            "wrong-dtype",
        ),
        (plain("image", "INT64", [1], [1]), 422, "wrong-dtype"),
        (plain("x", "FP32", [1], [1]), 422, "wrong-name"),
        (plain("image", "FP32", [1], [1]), 422, "wrong-shape"),
        (plain("image", "FP32", [0], []), 422, "no-images"),
        (
            plain("image", "BYTES", [1], ["\ud800"]),
            422,
            "not-an-image",
        ),
        (plain("image", "BYTES", [2, 0], []), 422, "no-images"),
        (binary(one(NAN), NAN), 422, "not-finite"),
        (binary(one(GOOD), GOOD[:-1]), 400, "bad-request"),
        (binary(one(GOOD), GOOD + b"x"), 400, "bad-request"),
        (binary(one(GOOD, shape=[1 << 30, 1 << 30, 4]), GOOD), 413, "too-large"),
        (binary(one(GOOD, binary_data_size=-1), GOOD), 400, "bad-request"),
        (binary(one(GOOD, binary_data_size=True), GOOD), 400, "bad-request"),
        (binary(one(b"\xff\xff\xff\xffab", "BYTES", [1]), b"\xff\xff\xff\xffab"), 400, "bad-request"),
        ({"content": b"{}", "headers": {HEADER_LENGTH: "9"}}, 400, "bad-request"),
        ({"content": b"{}", "headers": {HEADER_LENGTH: "-1"}}, 400, "bad-request"),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "media-type"),
        ({"content": b"{}", "headers": {"Content-Encoding": "br"}}, 415, "media-type"),
        ({"content": b"{}", "headers": {"Content-Encoding": "gzip"}}, 400, "bad-request"),
        ({"content": gzip.compress(b"{}")[:-4], "headers": {"Content-Encoding": "gzip"}}, 400, "bad-request"),
        (binary({**one(GOOD), "outputs": [{"name": "secret"}]}, GOOD), 422, "wrong-name"),
        (binary({**one(GOOD), "outputs": 3}, GOOD), 400, "bad-request"),
        (binary({**one(GOOD), "parameters": []}, GOOD), 400, "bad-request"),
        (binary({**one(GOOD), "parameters": {"state": 3}}, GOOD), 400, "bad-request"),
        (binary({**one(GOOD), "parameters": {"state": "../../etc"}}, GOOD), 422, "spec"),
        (binary({**one(GOOD), "parameters": {"state": "nowhere"}}, GOOD), 404, "not-found"),
        (binary({**one(GOOD), "parameters": {"state": "park.9"}}, GOOD), 404, "not-found"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(client, request_, status, code):
    refused(client.post(PATH, **request_), status, code)


def test_a_surrogate_in_the_id_comes_back_escaped(client, images):
    body = json.dumps(ask(images, id="\ud800"))
    assert client.post(PATH, content=body.encode()).json()["id"] == "\ud800"


def test_error_is_a_string_as_the_protocol_wants(client):
    assert "no model" in client.get("/v2/models/other").json()["error"]
