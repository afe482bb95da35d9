"""Tokens: who may ask, and that tenants never see each other."""

from __future__ import annotations

import pytest

from moe.errors import NotFoundError, SpecError
from serve.http.auth import DEFAULT_TENANT, Tokens
from serve.http.problems import Refused
from tests.serve.http_support import adapt, client_for, files, pixels, refused

ANNA, BERT = "a" * 20, "b" * 20
AS_ANNA, AS_BERT = ({"Authorization": f"Bearer {token}"} for token in (ANNA, BERT))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    tokens = Tokens.parse(f"# who may ask\n\nanna:{ANNA}\nbert:{BERT}\n")
    with client_for(tmp_path_factory.mktemp("states"), tokens=tokens) as found:
        yield found


def test_without_tokens_everybody_is_one_tenant():
    assert not Tokens().required
    assert Tokens().tenant(None) == Tokens().tenant("anything") == DEFAULT_TENANT


def test_tokens_tell_tenants_and_are_not_kept():
    tokens = Tokens({ANNA: "anna", BERT: "bert"})
    assert (tokens.tenant(ANNA), tokens.tenant(BERT)) == ("anna", "bert")
    assert ANNA not in repr(vars(tokens))
    for wrong in (None, "", ANNA[:-1], ANNA + "a", "\ud800" * 20):
        with pytest.raises(Refused) as caught:
            tokens.tenant(wrong)
        assert caught.value.status == 401


@pytest.mark.parametrize("text", ["anna", "anna:short", f"an/na:{ANNA}", f"anna:{ANNA}\nbert:{ANNA}", f"anna:a {ANNA}"])
def test_bad_token_files_are_refused_without_telling_the_token(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        Tokens.read(path)
    assert ANNA not in str(caught.value)


def test_an_empty_or_missing_token_file_does_not_open_the_door(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# nobody yet\n")
    with pytest.raises(SpecError):
        Tokens.read(path)
    with pytest.raises(NotFoundError):
        Tokens.read(tmp_path / "none")


CLOSED = [
    ("GET", "/v2/models/tiny"),
    ("GET", "/v2/models/tiny/ready"),
    ("POST", "/v2/models/tiny/infer"),
    ("GET", "/v1/model"),
    ("POST", "/v1/predict"),
    ("GET", "/v1/states"),
    ("POST", "/v1/states/park"),
    ("GET", "/v1/states/park"),
    ("DELETE", "/v1/states/park"),
    ("POST", "/v1/states/park/pin"),
    ("POST", "/v1/states/park/unpin"),
    ("POST", "/v1/states/park/rollback"),
    ("GET", "/v1/states/park/export"),
    ("GET", "/v1/jobs/abc"),
    ("POST", "/v1/stream/park"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("header", [None, "Bearer wrong-token-of-some-length", "Basic YTpi", "Bearer", "Bearer \xff"])
def test_every_route_but_health_needs_a_token(client, method, path, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = client.request(method, path, headers=headers)
    refused(response, 401, "unauthorised")
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_the_list_of_closed_routes_is_complete(client):
    document = client.get("/openapi.json").json()
    known = {
        (method, path.replace("tiny", "{model}").replace("park", "{name}").replace("abc", "{job}"))
        for method, path in CLOSED
    }
    for path, operations in document["paths"].items():
        for method in operations:
            if path.startswith("/v2/health") or path == "/v2" or "{version}" in path:
                continue
            assert (method.upper(), path) in known


@pytest.mark.parametrize("path", ["/", "/v2", "/v2/health/live", "/v2/health/ready"])
def test_health_and_page_need_none(client, path):
    assert client.get(path).status_code == 200


def test_tenants_never_see_each_others_states(client):
    client.headers.update(AS_ANNA)
    assert adapt(client, "secret").status_code == 200
    job = adapt(client, "secret", wait=False).json()["id"]
    assert [state["name"] for state in client.get("/v1/states").json()["states"]] == ["secret"]
    del client.headers["Authorization"]

    client.headers.update(AS_BERT)
    assert client.get("/v1/states").json()["states"] == []
    refused(client.get("/v1/states/secret"), 404, "not-found")
    refused(client.get("/v1/states/secret/export"), 404, "not-found")
    refused(client.delete("/v1/states/secret"), 404, "not-found")
    refused(client.get(f"/v1/jobs/{job}"), 404, "not-found")
    for action in ("pin", "unpin", "rollback"):
        refused(client.post(f"/v1/states/secret/{action}"), 404, "not-found")
    refused(client.post("/v1/predict?state=secret", files=files(pixels(1))), 404, "not-found")
    refused(client.get("/v2/models/tiny/versions/secret/ready"), 404, "not-found")
    assert "secret" not in client.get("/metrics").text
    assert adapt(client, "secret", pixels(8, seed=3)).json()["version"] == 1  # a state of its own under the same name
    del client.headers["Authorization"]

    client.headers.update(AS_ANNA)
    assert client.get("/v1/states/secret").json()["support"] == 8
    del client.headers["Authorization"]
