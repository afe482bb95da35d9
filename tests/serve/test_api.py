"""The adaptation API, plain predictions, metrics and documents, over a real model in this process."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from serve.batching import BatchLimits
from serve.catalogue import Catalogue
from serve.delta import Delta
from serve.http.api import make_api
from serve.http.limits import Limits
from serve.local import LocalBackend
from tests.serve.http_support import adapt, client_for, files, npy, pixels, refused, tiny_model


@pytest.fixture
def client(tmp_path):
    with client_for(tmp_path) as found:
        yield found


def finished(client, job):
    """The job's last status."""
    deadline = time.monotonic() + 60
    while True:
        status = client.get(f"/v1/jobs/{job}").json()
        assert 0 <= status["done"] <= status["total"]
        if status["status"] in ("done", "failed"):
            return status
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_state_lives(client):
    report = adapt(client, "park").json()
    assert (report["kept"], report["version"], report["support"], report["method"]) == (True, 1, 8, "bn")
    assert report["state"]["reference"] == "park.1"
    assert adapt(client, "park", pixels(8, seed=1), method="tent", step_cap=2).json()["version"] == 2

    known = client.get("/v1/states/park").json()
    assert (known["version"], known["method"]) == (2, "tent")
    assert [item["version"] for item in known["versions"]] == [2, 1]
    assert client.get("/v1/states/park?version=1").json()["method"] == "bn"
    assert [item["name"] for item in client.get("/v1/states").json()["states"]] == ["park"]

    assert client.post("/v1/states/park/pin").json()["pinned"] is True
    assert client.post("/v1/states/park/unpin").json()["pinned"] is False
    assert client.post("/v1/states/park/rollback").json()["version"] == 1
    assert client.post("/v1/states/park/rollback", json={"to": 2}).json()["version"] == 2
    assert client.post("/v1/states/park/rollback?to=1").json()["version"] == 1
    refused(client.post("/v1/states/park/rollback?to=7"), 404, "not-found")
    refused(client.post("/v1/states/park/rollback", json={"to": "x"}), 422, "invalid")

    exported = client.get("/v1/states/park/export")
    assert exported.headers["content-disposition"] == 'attachment; filename="park.1.safetensors"'
    assert Delta.from_bytes(exported.content).digest == client.get("/v1/states/park").json()["digest"]

    assert client.delete("/v1/states/park").status_code == 204
    refused(client.get("/v1/states/park"), 404, "not-found")
    refused(client.delete("/v1/states/park"), 404, "not-found")


def test_all_forms_of_the_same_images_give_the_same_state(client):
    from safetensors.numpy import save

    shown = pixels(6)
    digests = {adapt(client, "files", shown).json()["state"]["digest"]}
    for name, body, kind in (
        ("npy", npy(shown), "application/x-npy"),
        ("fortran", npy(np.asfortranarray(shown)), "application/x-npy"),
        ("safe", save({"images": shown}), "application/safetensors"),
    ):
        answer = client.post(f"/v1/states/{name}", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text
        digests.add(answer.json()["state"]["digest"])
    assert len(digests) == 1


def test_settings_may_be_fields_of_the_form(client):
    data = {"method": "tent", "step_cap": "1", "dry_run": "true", "options": json.dumps({"lr": 0.01})}
    report = client.post("/v1/states/park", files=files(pixels(8)), data=data).json()
    assert (report["method"], report["steps"], report["dry_run"], report["kept"]) == ("tent", 1, True, False)
    assert client.get("/v1/states").json()["states"] == []


def test_a_job_goes_on_after_its_answer(client):
    answer = adapt(client, "park", wait=False)
    assert answer.status_code == 202
    job = answer.json()["id"]
    assert answer.headers["location"] == f"/v1/jobs/{job}"
    status = finished(client, job)
    assert status["report"]["state"]["reference"] == "park.1" and status["error"] is None
    assert client.get("/v1/states/park").status_code == 200
    refused(client.get("/v1/jobs/nothing"), 404, "not-found")


def test_large_sets_become_jobs_by_themselves(tmp_path):
    with client_for(tmp_path, limits=Limits(async_support=4)) as client:
        assert adapt(client, "small", pixels(4)).status_code == 200
        answer = adapt(client, "large", pixels(5))
        assert answer.status_code == 202
        assert finished(client, answer.json()["id"])["status"] == "done"


def test_a_failed_job_tells_why(tmp_path):
    model = tiny_model()
    backend = LocalBackend(model, Catalogue(tmp_path, model_version=model.info.version, states_per_tenant=1))
    with TestClient(make_api(backend), raise_server_exceptions=False) as client:
        assert adapt(client, "first").status_code == 200
        status = finished(client, adapt(client, "second", wait=False).json()["id"])
        assert (status["status"], status["report"], status["error"]["code"]) == ("failed", None, "no-room")
        refused(adapt(client, "second"), 409, "no-room")


def test_predictions_before_and_after(client):
    shown = pixels(3)
    plain = client.post("/v1/predict", files=files(shown)).json()
    assert [item["name"] for item in plain["predictions"]] == ["0.png", "1.png", "2.png"]
    assert all(
        item["after"] is None and item["before"]["label"] in ("cat", "dog", "owl") for item in plain["predictions"]
    )
    adapt(client, "park", pixels(8) // 4)
    by_query = client.post("/v1/predict?state=park", files=files(shown)).json()
    by_field = client.post("/v1/predict", files=files(shown), data={"state": "park.1"}).json()
    assert by_query == by_field
    assert by_query["state"] == "park.1"
    for before, both in zip(plain["predictions"], by_query["predictions"], strict=True):
        assert both["before"]["confidence"] == pytest.approx(before["before"]["confidence"], rel=1e-5)
        assert both["after"]["confidence"] != both["before"]["confidence"]
    refused(client.post("/v1/predict?state=nowhere", files=files(shown)), 404, "not-found")


def test_photographs_are_turned_upright(client):
    image = np.zeros((20, 20, 3), np.uint8)
    image[:10] = 255
    turned = Image.fromarray(np.rot90(image, 1).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    names = [("files", ("a.png", buffer.getvalue(), "image/png"))]
    upright, photo = (
        client.post("/v1/predict", files=form).json()["predictions"][0]["before"] for form in (files([image]), names)
    )
    assert upright["confidence"] == pytest.approx(photo["confidence"], rel=1e-6)


def test_a_stream_is_followed(client):
    before = None
    for step in range(3):
        answer = client.post("/v1/stream/cam", files=files(pixels(8, seed=step)), params={"method": "bn"})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert len(told["predictions"]) == 8
        assert told["report"]["method"] == "bn"
        assert told["state"] != before
        before = told["state"]
    assert before is not None


def test_a_stream_takes_its_settings_from_the_form_too(client):
    fields = {"method": "tent", "options": '{"steps": 3}', "step_cap": "1"}
    report = client.post("/v1/stream/cam", files=files(pixels(8)), data=fields).json()["report"]
    assert (report["method"], report["steps"]) == ("tent", 1)
    for dry in ({"params": {"dry_run": "true"}}, {"data": {"dry_run": "true"}}):
        refused(client.post("/v1/stream/cam", files=files(pixels(8)), **dry), 422, "spec")
    assert client.get("/v1/states/cam").json()["version"] == 1


@pytest.mark.parametrize("path", ["/v1/states/cam", "/v1/stream/cam", "/v1/predict"])
def test_a_setting_that_does_not_exist_is_refused(client, path):
    for wrong in ({"params": {"dry-run": "true"}}, {"data": {"steps": "5"}}):
        told = refused(client.post(path, files=files(pixels(8)), **wrong), 422, "invalid")
        assert "There is no setting" in str(told)
    assert client.get("/v1/states").json()["states"] == []


def test_states_of_another_base_are_refused(tmp_path):
    with client_for(tmp_path) as client:
        adapt(client, "park")
        backend = client.app.state.backend
        backend.catalogue.model_version = "f" * 64
        backend.catalogue.evict()
        refused(client.post("/v1/predict?state=park", files=files(pixels(1))), 409, "stale-state")


def test_states_survive_a_restart_and_are_shared(tmp_path):
    with client_for(tmp_path) as first, client_for(tmp_path) as second:
        adapt(first, "park")
        by_first = first.post("/v1/predict?state=park", files=files(pixels(2))).json()
        assert second.post("/v1/predict?state=park", files=files(pixels(2))).json() == by_first
    with client_for(tmp_path) as again:
        assert again.post("/v1/predict?state=park", files=files(pixels(2))).json() == by_first


def test_overload_is_refused_and_recovers(tmp_path, monkeypatch):
    import threading

    batch = BatchLimits(rows=1, queue_rows=2, timeout=300)
    with client_for(tmp_path, batch=batch) as client:
        backend, gate, begun = client.app.state.backend, threading.Event(), threading.Event()
        compute = backend._batcher.compute

        def slow(images, states):
            begun.set()
            assert gate.wait(120)
            return compute(images, states)

        backend._batcher.compute = slow
        body, statuses = npy(pixels(1)), []

        def ask():
            answer = client.post("/v1/predict", content=body, headers={"Content-Type": "application/x-npy"})
            statuses.append(answer.status_code)
            if answer.status_code == 429:
                refused(answer, 429, "overloaded")

        threads = [threading.Thread(target=ask) for _ in range(12)]
        threads[0].start()
        assert begun.wait(60)  # otherwise all might come before it leaves the queue, where there is room for two
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 60
        while statuses.count(429) < 9 and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.set()
        for thread in threads:
            thread.join(60)
        assert sorted(set(statuses)) == [200, 429]
        assert (statuses.count(200), statuses.count(429)) == (3, 9)
        ask()
        assert statuses[-1] == 200


def test_metrics_tell_what_happened(client):
    adapt(client, "park")
    client.post("/v1/predict?state=park", files=files(pixels(2)))
    text = client.get("/metrics").text
    for line in (
        'moepipe_infer_rows_total{domain="base"} 2.0',
        'moepipe_infer_rows_total{domain="park"} 2.0',
        'moepipe_adapt_seconds_count{method="bn"} 1.0',
        "moepipe_domain_states_resident 1.0",
        "moepipe_batch_rows_count 2.0",
        'moepipe_requests_total{method="POST",route="/v1/predict",status="200"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_openapi_names_every_route_and_error(client):
    document = client.get("/openapi.json").json()
    assert {"/v2/models/{model}/infer", "/v1/states/{name}", "/v1/jobs/{job}", "/v1/predict"} <= set(document["paths"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if not path.startswith("/v2/health") and path != "/v2":
                assert {"401", "422", "429", "503"} <= set(operation["responses"]), (path, method)
    assert "HTTPValidationError" not in json.dumps(document)


@pytest.mark.parametrize(("method", "path", "status"), [("PUT", "/v1/states", 405), ("GET", "/v1/nothing", 404)])
def test_unknown_routes_and_methods(client, method, path, status):
    refused(client.request(method, path), status, {404: "not-found", 405: "method-not-allowed"}[status])


def test_experts_are_heard(served_model, domain_images, tmp_path):
    """The bundle with experts: Meta-DMoE's own step is the default, and the weights of the experts are told."""
    catalogue = Catalogue(tmp_path, model_version=served_model.info.version)
    images = np.stack([np.asarray(image)[..., 0] for image in domain_images(45, 16)[0]])
    with TestClient(make_api(LocalBackend(served_model, catalogue)), raise_server_exceptions=False) as client:
        report = adapt(client, "tilted", images).json()
        assert report["method"] == "distill"
        assert len(report["expert_weights"]) == served_model.info.experts
        assert sum(report["expert_weights"]) == pytest.approx(1, abs=1e-3)
        assert report["loss_after"] < report["loss_before"]
        told = client.post("/v1/predict?state=tilted", files=files(images)).json()
        assert len(told["predictions"]) == 16
