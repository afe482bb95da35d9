"""Settings reach what they are for: limits the adapter, the samples folder the page. No Ray is started."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from moe.errors import SpecError
from serve.config import checked
from serve.http.problems import Refused
from serve.requests import AdaptRequest


@pytest.fixture
def settings(served_folder, tmp_path):
    return {"model": str(served_folder), "states": str(tmp_path / "states")}


def test_the_bounds_of_an_adaptation_reach_the_adapter(settings, domain_images):
    from serve.app import _load

    bounds = {"adapt_queue": 3, "adapt_steps": 5, "limits": {"max_support": 7}}
    adapter = _load(checked({**settings, **bounds})).adapter
    images = domain_images(45, 8)[0]
    with pytest.raises(Refused, match="8 images"):
        adapter.plan(AdaptRequest("me", "x", "bn", {}, images))
    with pytest.raises(SpecError, match="step cap is 6"):
        adapter.plan(AdaptRequest("me", "x", "tent", {}, images[:7], step_cap=6))
    for _ in range(adapter.turns.at_once + 3):  # those that compute, and three that wait
        adapter.turns.reserve()
    with pytest.raises(Refused) as caught:
        adapter.turns.reserve()
    assert caught.value.status == 429


def test_the_page_offers_the_samples_of_the_settings(settings, tmp_path):
    from serve.app import _replica

    (tmp_path / "samples" / "north").mkdir(parents=True)
    (tmp_path / "samples" / "north" / "1.png").write_bytes(b"picture")
    for more, names in (({}, []), ({"samples": str(tmp_path / "samples")}, ["north/1.png"])):
        _, api = _replica({**settings, **more}, None)
        with TestClient(api) as client:
            assert [sample["name"] for sample in client.get("/v1/samples").json()["samples"]] == names
            found = client.get("/v1/samples/north/1.png")
            assert (found.status_code, found.content == b"picture") == ((200, True) if names else (404, False))


def test_a_samples_folder_must_be_there(settings, tmp_path):
    with pytest.raises(SpecError, match="no folder"):
        checked({**settings, "samples": str(tmp_path / "none")})
