"""``moepipe serve``, ``adapt`` and ``predict`` up to the server, and the ``deploy`` stage. Servers: tests/serve."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from moe.errors import NotFoundError, SpecError
from orchestrator import serving
from orchestrator.stages.deploy import DeployConfig, Stage
from serve.config import checked
from tests.orchestrator.cli_support import call, document, folder  # noqa: F401
from tests.serve.test_client import Script
from workers.context import Input

REPORT = {
    "name": "desert",
    "method": "bn",
    "support": 2,
    "loss_before": None,
    "loss_after": 0.25,
    "expert_weights": [0.75, 0.25],
    "collapse": "passed",
    "collapsed": False,
    "dry_run": False,
    "seconds": 0.5,
    "bytes": 1500,
    "state": {"reference": "desert.1"},
}
GUESS = {"label": "camel", "index": 1, "confidence": 0.75, "value": None}


@pytest.fixture
def answering():
    """``answering(body)``: a server that says this, and remembers what it was asked."""
    made = []

    def start(status, body):
        made.append(Script((status, {}, body)))
        return made[-1]

    yield start
    for server in made:
        server.server.shutdown()
        server.server.server_close()


def picture(path, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(path)
    return path


def read(path):
    return YAML(typ="safe").load(path.read_text())


def test_export_writes_what_the_app_accepts(folder):  # noqa: F811
    call("serve", "some-run", "--export", "s.yaml", "--rayservice", "r.yaml", "--replicas", 2, "--image", "me/moe:1")
    config = read(folder / "s.yaml")
    application = config["applications"][0]
    settings = checked(application["args"])
    assert application["import_path"] == "serve.app:build" and settings.replicas == 2
    assert settings.front == "proxy" and settings.model == "some-run"
    assert config["http_options"]["host"] == "127.0.0.1"
    service = read(folder / "r.yaml")
    spec = service["spec"]
    head = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"} and head["image"] == "me/moe:1"
    inner = YAML(typ="safe").load(spec["serveConfigV2"])
    assert inner["applications"] == config["applications"] and inner["http_options"]["host"] == "0.0.0.0"


def test_ray_accepts_the_exported_config(folder):  # noqa: F811
    schema = pytest.importorskip("ray.serve.schema")
    call("serve", "some-run", "--export", "s.yaml")
    parsed = schema.ServeDeploySchema(**read(folder / "s.yaml"))
    assert [application.name for application in parsed.applications] == [serving.APPLICATION]


def test_ray_accepts_what_the_operator_and_the_stage_hand_on(folder, tmp_path):  # noqa: F811
    schema = pytest.importorskip("ray.serve.schema")
    call("serve", "some-run", "--rayservice", "r.yaml", "--replicas", 3, "--threads", 2)
    inner = YAML(typ="safe").load(read(folder / "r.yaml")["spec"]["serveConfigV2"])
    meta = {"dataset": "digits5", "num_outputs": 10, "backbone": {"name": "tiny_cnn"}}
    (tmp_path / "model.safetensors").write_bytes(b"")
    context = SimpleNamespace(inputs={"model": (Input("erm", "ab" * 32, tmp_path, meta),)}, output=tmp_path, log=print)
    Stage().run(DeployConfig(), Stage().members(DeployConfig())[0], context)
    for config in (inner, read(tmp_path / "serve.yaml")):
        (application,) = schema.ServeDeploySchema(**config).applications
        assert application.import_path == serving.IMPORT_PATH and checked(application.args).front == "proxy"


def test_an_open_address_needs_tokens(folder):  # noqa: F811
    told = call("serve", "x", "--host", "0.0.0.0", code=2)
    assert "everybody who reaches this machine" in told.stderr
    told = call("serve", "x", "--host", "0.0.0.0", "--front", "proxy", code=2)
    assert "everybody who reaches this machine" in told.stderr
    told = call("serve", "x", "--tokens", "none.txt", code=2)
    assert "no token file" in told.stderr.lower()


def test_options_of_another_document_are_refused(folder):  # noqa: F811
    told = call("serve", "x", "--export", "s.yaml", "--image", "me/moe:1", code=2)
    assert "--image is for --rayservice" in told.stderr
    told = call("serve", "x", "--rayservice", "r.yaml", "--port", "9000", code=2)
    assert "its pods listen on 0.0.0.0:8000" in told.stderr


def test_settings_are_checked_all_at_once():
    with pytest.raises(SpecError) as caught:
        checked({"model": "x", "port": 0, "replicas": 0, "typo": 1})
    assert all(word in caught.value.message for word in ("port", "replicas", "typo"))
    assert checked({"model": "x", "limits": {"max_rows": 3}}).limits.max_rows == 3


def test_adapt_sends_every_picture_of_a_folder(folder, answering):  # noqa: F811
    (folder / "desert").mkdir()
    picture(folder / "desert" / "b.png", 1)
    picture(folder / "desert" / "a.jpg", 2)
    (folder / "desert" / "notes.txt").write_text("not a picture")
    server = answering(200, REPORT)
    told = call("adapt", "desert", "desert", "--method", "bn", "--option", "prior=4", "--url", server.url)
    assert "desert.1 is served now" in told.stdout and "0.75, 0.25" in told.stdout and "- -> 0.25" in told.stdout
    _, path, headers, body = server.asked[0]
    assert body.count(b"filename=") == 2 and body.index(b"a.jpg") < body.index(b"b.png")
    assert "method=bn" in path and "prior" in path and headers["Idempotency-Key"]
    assert document("adapt", "desert", "desert", "--url", server.url) == REPORT


def test_adapt_says_when_nothing_was_published(folder, answering):  # noqa: F811
    np.save(folder / "n.npy", np.zeros((3, 4, 4, 1), dtype=np.uint8))
    server = answering(200, {**REPORT, "state": None, "collapsed": True, "collapse": "one class", "bytes": None})
    told = call("adapt", "desert", "n.npy", "--url", server.url)
    assert "nothing was published (the adaptation collapsed)" in told.stdout
    assert np.load(io.BytesIO(server.asked[0][3])).shape == (3, 4, 4, 1)


def test_predict_shows_before_and_after(folder, answering):  # noqa: F811
    row = {"name": "a.png", "before": GUESS, "after": {**GUESS, "label": "dune", "confidence": 0.9}}
    server = answering(200, {"model": "m", "model_version": "1", "state": "desert.1", "predictions": [row]})
    told = call("predict", picture(folder / "a.png"), "--state", "desert", "--url", server.url)
    assert [word for word in told.stdout.split() if "%" in word or word in ("camel", "dune")] == [
        *("camel", "75%", "dune", "90%")
    ]


def test_refusals_and_bad_arguments_have_their_exit_codes(folder, answering):  # noqa: F811
    refusal = {"error": {"code": "not-found", "message": "There is no state 'x'.", "fix": "List them."}}
    server = answering(404, refusal)
    path = picture(folder / "a.png")
    assert "List them." in call("predict", path, "--state", "x", "--url", server.url, code=4).stderr
    assert document("predict", path, "--url", server.url, code=4)["error"]["code"] == "not-found"
    assert "no picture or folder" in call("predict", "lost.png", code=4).stderr
    (folder / "empty").mkdir()
    call("predict", "empty", code=6)
    np.save(folder / "f.npy", np.zeros((2, 4, 4, 1)))
    call("predict", "f.npy", code=6)
    assert "NAME=VALUE" in call("adapt", "x", path, "--option", "nonsense", code=2).stderr
    assert "either images or the URI" in call("adapt", "x", code=2).stderr


@pytest.mark.parametrize("port", ["student", "model"])
def test_the_deploy_stage_ties_a_config_to_a_digest(tmp_path, port):
    meta = {"dataset": "digits5", "num_outputs": 10, "backbone": {"name": "tiny_cnn"}, "aggregator": {}}
    said = []
    (tmp_path / "model.safetensors").write_bytes(b"")
    context = SimpleNamespace(
        inputs={port: (Input("distill", "ab" * 32, tmp_path, meta),)}, output=tmp_path, log=said.append
    )
    manifest = Stage().run(DeployConfig(replicas=3), Stage().members(DeployConfig())[0], context)
    assert manifest["model"] == "ab" * 32 and manifest["adapts_by_distillation"]
    arguments = read(tmp_path / "serve.yaml")["applications"][0]["args"]
    assert checked(arguments).replicas == 3 and arguments["model"] == manifest["model"]
    assert json.loads((tmp_path / "deployment.json").read_text()) == manifest
    assert str(tmp_path) not in (tmp_path / "serve.yaml").read_text() and said
    assert "registry" not in manifest
    named = Stage().run(DeployConfig(register_as="digits", alias="best"), Stage().members(DeployConfig())[0], context)
    assert named["registry"] == {"name": "digits", "alias": "best"}


def test_an_alias_needs_a_name_in_the_registry():
    with pytest.raises(ValueError, match="alias belongs to register_as"):
        DeployConfig(alias="staging")
    assert DeployConfig(alias="staging", register_as="digits").alias == "staging"


def test_the_deploy_stage_wants_one_model(tmp_path):
    context = SimpleNamespace(inputs={}, output=tmp_path, log=print)
    with pytest.raises(SpecError, match="0 models"):
        Stage().run(DeployConfig(), Stage().members(DeployConfig())[0], context)


def test_the_deploy_stage_takes_one_member_of_a_fan_out(tmp_path):
    meta = {"dataset": "digits5", "num_outputs": 10, "form": "jetconvnext"}
    members = []
    for number, name in enumerate(("start=random", "start=SpheroMoE L2", "start=bare")):
        place = tmp_path / str(number)
        place.mkdir()
        if name != "start=bare":
            (place / "model.safetensors").write_bytes(b"")
        members.append(Input(f"seed=0/{name}", f"{number}" * 64, place, meta))
    context = SimpleNamespace(inputs={"model": tuple(members)}, output=tmp_path, log=print)

    def deploy(**config):
        return Stage().run(DeployConfig(**config), Stage().members(DeployConfig())[0], context)

    assert deploy(member="start=SpheroMoE L2")["model"] == "1" * 64
    assert deploy(member="seed=0/start=random")["backbone"] == "jetconvnext"
    with pytest.raises(SpecError, match="3 models"):
        deploy()
    with pytest.raises(SpecError, match="No member 'start=SphereMoE L2'") as caught:
        deploy(member="start=SphereMoE L2")
    assert "start=SpheroMoE L2" in caught.value.hint
    with pytest.raises(NotFoundError, match="start=bare keeps no weights"):
        deploy(member="start=bare")
    assert not Stage().bind(DeployConfig()).inputs["model"].many
    assert Stage().bind(DeployConfig(member="start=random")).inputs["model"].many
    assert Stage().inputs["model"].accepts("jetpack_run") and Stage().inputs["model"].accepts("m2mkd_network")


def test_the_command_line_stays_light():
    code = "import sys, orchestrator.cli; print({'ray', 'torch', 'httpx', 'fastapi', 'serve'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
