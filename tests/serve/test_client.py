"""The client against a scripted server on a real socket: what it sends, when it tries again, what a refusal becomes."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from moe.errors import BusyError, DataError, EnvironmentProblem, NotFoundError, SpecError
from serve.client import AsyncClient, Client
from serve.wire import HEADER_LENGTH

PICTURE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


class Script:
    """Answers in turn; the last one is repeated. Keeps what was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self):
                length = int(self.headers.get("Content-Length", 0))
                script.asked.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
                status, headers, body = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                if status == 0:
                    self.close_connection = True
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def script():
    made = []

    def make(*answers):
        made.append(Script(*answers))
        return made[-1]

    yield make
    for item in made:
        item.server.shutdown()
        item.server.server_close()


@pytest.fixture
def waited(monkeypatch):
    """The seconds the client would wait. Only its own clock is replaced: other threads go on to sleep."""
    waits = []
    clock = types.SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr("serve.client.time", clock)
    return waits


def ok(body):
    return (200, {}, body)


def refused(status, code="x", **headers):
    return (status, headers, {"error": {"code": code, "message": "It does not fit.", "fix": "Make it fit."}})


def test_overload_is_tried_again_after_the_time_that_the_server_names(script, waited):
    server = script(refused(429, **{"Retry-After": "7"}), refused(503), ok({"states": [{"name": "a"}]}))
    with Client(server.url) as client:
        assert client.states() == [{"name": "a"}]
    assert waited[0] == 7 and waited[1] > 0 and len(waited) == 2 and len(server.asked) == 3


def test_it_gives_up_after_the_last_retry(script, waited):
    server = script(refused(429, "overloaded"))
    with Client(server.url, retries=2) as client, pytest.raises(BusyError, match=r"It does not fit.*429, overloaded"):
        client.model()
    assert len(server.asked) == 3


def test_a_batch_of_a_stream_is_sent_again_only_under_a_key(script, waited):
    server = script((0, {}, b""), ok({"state": "flow.1"}))
    with Client(server.url) as client:
        with pytest.raises(EnvironmentProblem):
            client.stream("flow", [PICTURE], method="bn")
        server.answers = [(0, {}, b""), ok({"state": "flow.1"})]
        assert client.stream("flow", [PICTURE], method="bn", idempotency_key="k1") == {"state": "flow.1"}
        with pytest.raises(SpecError, match="no setting 'dry_run'"):
            client.stream("flow", [PICTURE], dry_run=True)
    assert [asked[2].get("Idempotency-Key") for asked in server.asked] == [None, "k1", "k1"]
    assert {asked[1] for asked in server.asked} == {"/v1/stream/flow?method=bn"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, SpecError), (401, SpecError), (404, NotFoundError), (409, BusyError), (413, DataError), (415, DataError)],
)
def test_refusals_become_errors_of_ours_and_are_not_repeated(script, status, kind):
    server = script(refused(status, "some-code"))
    with Client(server.url) as client, pytest.raises(kind) as caught:
        client.state("desert")
    assert len(server.asked) == 1
    assert caught.value.hint == "Make it fit." and "some-code" in caught.value.message


@pytest.mark.parametrize(
    "body", [b"<html>bad gateway</html>", {"error": "text", "code": "c", "message": "m"}, [], {"error": None}]
)
def test_foreign_error_bodies_do_not_hurt(script, body):
    server = script((502, {}, body))
    with Client(server.url) as client, pytest.raises(EnvironmentProblem, match="HTTP 502"):
        client.model()


def test_a_broken_connection_is_repeated_only_where_it_does_no_harm(script, waited):
    server = script((0, {}, b""), ok({"name": "m"}))
    with Client(server.url) as client:
        assert client.model() == {"name": "m"}
    server = script((0, {}, b""), ok({"version": 1}))
    with Client(server.url) as client, pytest.raises(EnvironmentProblem, match="no answer"):
        client.rollback("desert")
    assert len(server.asked) == 1


def test_an_adaptation_keeps_its_key_when_it_is_repeated(script, waited):
    server = script((0, {}, b""), refused(503), ok({"kept": True}))
    with Client(server.url, token="s" * 20) as client:
        assert client.adapt("desert", [PICTURE, PICTURE], method="bn", step_cap=3, options={"prior": 2.0})["kept"]
    keys = {headers["Idempotency-Key"] for _, _, headers, _ in server.asked}
    assert len(server.asked) == 3 and len(keys) == 1
    method, path, headers, body = server.asked[-1]
    assert method == "POST" and path.startswith("/v1/states/desert?")
    assert {"method=bn", "step_cap=3", "wait=true"} < set(path.partition("?")[2].split("&"))
    assert headers["Content-Type"] == "application/x-npy" and headers["Authorization"] == "Bearer " + "s" * 20
    assert np.array_equal(np.load(io.BytesIO(body)), np.stack([PICTURE, PICTURE]))


def test_pictures_travel_as_files_and_lose_nothing(script, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    server = script(ok({"predictions": []}))
    with Client(server.url) as client:
        client.predict([path, PICTURE, path.read_bytes()], state="desert.2")
    body = server.asked[0][3]
    assert body.count(b"filename=") == 3 and b'name="state"\r\n\r\ndesert.2' in body
    assert body.count(path.read_bytes()) >= 2
    with pytest.raises(NotFoundError), Client(server.url) as client:
        client.predict([tmp_path / "none.png"])
    with pytest.raises(DataError), Client(server.url) as client:
        client.predict([PICTURE.astype(np.float32)])


def test_infer_reads_the_binary_extension(script):
    logits = np.array([[1.5, -2.0], [0.25, 3.0]], dtype="<f4")
    head = json.dumps({"outputs": [{"name": "logits", "shape": [2, 2], "datatype": "FP32"}]}).encode()
    server = script(ok({"name": "m"}), (200, {HEADER_LENGTH: str(len(head))}, head + logits.tobytes()))
    images = np.random.default_rng(0).random((2, 1, 3, 3), dtype=np.float32)
    with Client(server.url) as client:
        assert np.array_equal(client.infer(images, state="desert"), logits)
    _, path, headers, body = server.asked[-1]
    size = int(headers[HEADER_LENGTH])
    request = json.loads(body[:size])
    assert path == "/v2/models/m/infer" and request["parameters"]["state"] == "desert"
    assert np.array_equal(np.frombuffer(body[size:], "<f4").reshape(2, 1, 3, 3), images)


def test_progress_follows_the_job_to_its_end(script, waited):
    job = {"id": "j1", "total": 4}
    server = script(
        (202, {}, {**job, "status": "queued", "done": 0}),
        ok({**job, "status": "running", "done": 3}),
        ok({**job, "status": "done", "done": 4, "report": {"kept": True}}),
    )
    seen = []
    with Client(server.url) as client:
        assert client.adapt("desert", [PICTURE], progress=lambda *at: seen.append(at)) == {"kept": True}
    assert seen == [(0, 4), (3, 4), (4, 4)] and server.asked[-1][1] == "/v1/jobs/j1"
    server = script((202, {}, {**job, "status": "failed", "done": 1, "error": {"code": "data", "message": "Bad."}}))
    with Client(server.url) as client, pytest.raises(SpecError, match="Bad"):
        client.adapt("desert", [PICTURE], progress=lambda *at: None)


def test_names_cannot_leave_their_place_in_the_address(script):
    server = script(ok({}))
    with Client(server.url) as client:
        client.state("../../v1/model")
    assert server.asked[0][1] == "/v1/states/..%2F..%2Fv1%2Fmodel"


def test_neither_or_both_sources_are_refused(script):
    with Client("http://127.0.0.1:1") as client:
        with pytest.raises(SpecError):
            client.adapt("desert")
        with pytest.raises(SpecError):
            client.adapt("desert", [PICTURE], uri="dataset:digits5/test")


def test_nobody_there_is_said_with_the_address(waited):
    with Client("http://127.0.0.1:1", retries=1) as client:
        assert not client.ready()
        with pytest.raises(EnvironmentProblem, match=r"127\.0\.0\.1:1"):
            client.model()
        with pytest.raises(EnvironmentProblem):
            client.wait_until_ready(0.1, lambda: True)


def test_the_asynchronous_client_does_the_same(script, tmp_path):
    async def walk(url):
        async with AsyncClient(url, retries=1) as client:
            assert await client.ready()
            assert (await client.state("a"))["name"] == "a"
            with pytest.raises(NotFoundError):
                await client.delete("b")
            return await client.export("a", tmp_path / "a.safetensors")

    server = script(ok({}), refused(503, **{"Retry-After": "0"}), ok({"name": "a"}), refused(404), ok(b"bytes"))
    assert asyncio.run(walk(server.url)).read_bytes() == b"bytes"
    public = {name for name in vars(Client) if not name.startswith("_")} - {"close", "wait_until_ready"}
    assert public <= set(vars(AsyncClient))
