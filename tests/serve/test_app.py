"""The application on a real Ray Serve: both deployments, both fronts, killed processes. One Ray for the file."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import psutil
import pytest

from moe.errors import EnvironmentProblem, MoepipeError, NotFoundError, SpecError
from serve.client import Client
from serve.model import ServedModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def starting(ray_local, served_folder, tmp_path_factory):
    """``starting(front)``: settings of an application that runs; the one before is ended."""
    from serve import app

    def start(front, **more):
        app.ray_serve.shutdown()
        states = tmp_path_factory.mktemp("states")
        settings = {"model": str(served_folder), "states": str(states), "front": front, "port": free_port(), **more}
        app.start(settings)
        return settings

    yield start
    app.ray_serve.shutdown()


@pytest.fixture(scope="module")
def direct(starting):
    return starting("direct")


@pytest.fixture
def client(direct):
    with Client(f"http://127.0.0.1:{direct['port']}", timeout=120, retries=8) as made:
        made.wait_until_ready(120)
        yield made


def kill_replica(deployment):
    """End the replica of a deployment of this test's own Ray; waits until the process is gone."""
    mine = psutil.Process().children(recursive=True)
    found = [process for process in mine if f"ServeReplica:moepipe:{deployment}" in " ".join(process.cmdline())]
    assert len(found) == 1
    found[0].kill()
    psutil.wait_procs(found, 10)


def test_what_it_predicts_is_what_the_model_predicts(client, served_model, domain_images):
    images, labels = domain_images(0, 40)
    guesses = client.predict(images)["predictions"]
    assert np.mean([row["before"]["index"] for row in guesses] == labels) > 0.6
    prepared = served_model.preprocess(images)
    assert np.allclose(client.infer(prepared.numpy()), served_model.predict(prepared).numpy(), atol=1e-5)
    info = client.model()
    assert info["version"] == served_model.info.version and info["methods"]["distill"] is None


def test_adapting_goes_to_the_other_process_and_comes_back(client, direct, domain_images, served_folder):
    from serve.catalogue import Catalogue

    images, _ = domain_images(45, 64)
    report = client.adapt("slanted", images)
    assert report["method"] == "distill" and report["kept"] and report["loss_after"] < report["loss_before"]
    assert len(report["expert_weights"]) == 3 and abs(sum(report["expert_weights"]) - 1) < 1e-4
    model = ServedModel.load(str(served_folder))
    delta = Catalogue(direct["states"], model_version=model.info.version).resident("default", "slanted")
    prepared = model.preprocess(images)
    assert np.allclose(client.infer(prepared.numpy(), "slanted"), model.predict(prepared, delta).numpy(), atol=1e-5)
    answer = client.predict(images[:4], "slanted")
    assert answer["state"] == "slanted.1" and all(row["after"] for row in answer["predictions"])


def test_refusals_cross_the_processes_as_they_are(client, domain_images):
    images, _ = domain_images(45, 8)
    with pytest.raises(MoepipeError, match="HTTP 422"):
        client.adapt("x", images, method="bn", options={"nonsense": 1})
    with pytest.raises(NotFoundError):
        client.job("unheard-of")
    with pytest.raises(NotFoundError):
        client.predict(images, "nobody")


def test_jobs_and_repeats(client, domain_images):
    images, _ = domain_images(30, 32)
    seen = []
    report = client.adapt("job", images, method="tent", progress=lambda *at: seen.append(at))
    assert report["version"] == 1 and seen[-1][0] == seen[-1][1]
    first = client.adapt("once", images, method="bn", idempotency_key="k-1")
    assert client.adapt("once", images, method="bn", idempotency_key="k-1") == first
    assert client.state("once")["version"] == 1
    assert client.stream("flow", images, method="bn")["state"]
    client.delete("job")
    assert {state["name"] for state in client.states()} >= {"once", "flow"}


def test_a_killed_adaptation_worker_loses_no_state_and_the_client_only_waits(client, domain_images):
    images, _ = domain_images(45, 32)
    client.adapt("kept", images, method="bn")
    kill_replica("adaptation")
    assert client.predict(images[:2], "kept")["state"] == "kept.1"  # predictions do not notice
    again = Client(client.url, timeout=120, retries=30)
    assert again.adapt("kept", images, method="bn")["version"] == 2


def test_a_killed_replica_comes_back_with_every_state(client, domain_images):
    images, _ = domain_images(45, 16)
    client.adapt("survivor", images, method="bn")
    before = client.predict(images, "survivor")["predictions"]
    kill_replica("inference")
    client.wait_until_ready(180)
    assert client.predict(images, "survivor")["predictions"] == before


def test_an_occupied_port_and_a_lost_model_are_said_before_anything_starts(direct):
    from serve import app

    with pytest.raises(EnvironmentProblem, match=str(direct["port"])):
        app.start(direct)
    with pytest.raises(NotFoundError):
        app.run({"model": "no-such-model", "store": direct["states"], "front": "direct", "port": free_port()})
    with pytest.raises(SpecError):
        app.build({"model": "x", "front": "sideways"})


def test_two_replicas_share_the_port_and_tenants_see_their_own(starting, tmp_path, domain_images):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann:{'a' * 20}\nbob:{'b' * 20}\n")
    settings = starting("direct", replicas=2, tokens_file=str(tokens))
    url = f"http://127.0.0.1:{settings['port']}"
    images, _ = domain_images(45, 16)
    with Client(url, "a" * 20, 120) as ann, Client(url, "b" * 20, 120) as bob, Client(url) as nobody:
        ann.adapt("mine", images, method="bn")
        answers = []

        def ask():
            with Client(url, "a" * 20, 120) as own:  # a connection of its own, to either replica
                answers.append(own.predict(images[:2], "mine")["predictions"])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 8 and all(answer == answers[0] for answer in answers)
        assert bob.states() == []
        with pytest.raises(NotFoundError):
            bob.predict(images, "mine")
        with pytest.raises(SpecError, match="401"):
            nobody.states()


def test_behind_the_proxy_of_ray_serve(starting, domain_images):
    settings = starting("proxy")
    images, _ = domain_images(45, 16)
    with Client(f"http://127.0.0.1:{settings['port']}", timeout=120) as client:
        deadline = time.monotonic() + 60
        while not client.ready():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert client.adapt("far", images, method="bn")["version"] == 1
        assert client.predict(images, "far")["state"] == "far.1"
        with pytest.raises(NotFoundError):
            client.state("nobody")
