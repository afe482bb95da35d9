"""The Kubernetes manifests: pods against Kubernetes' schemas, Ray's objects against ours of KubeRay's fields."""

from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.kuberay_schema import SCHEMAS

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
NEWEST = "1.34"


def objects():
    """Every object of every manifest."""
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield pytest.param(document, id=f"{path.name}:{document['kind']}")


def cluster_of(document):
    """The Ray cluster inside a RayJob or RayService."""
    return document["spec"].get("rayClusterSpec") or document["spec"]["rayClusterConfig"]


def pods_of(document):
    """(name, pod template) of everything that becomes a pod."""
    if document["kind"] == "StatefulSet":
        return [("pod", document["spec"]["template"])]
    if document["kind"] not in SCHEMAS:
        return []
    cluster = cluster_of(document)
    groups = [(group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"]]
    return [("head", cluster["headGroupSpec"]["template"]), *groups]


def validate(document):
    kubernetes_validate.validate(document, NEWEST, strict=True)


@pytest.mark.parametrize("document", objects())
def test_it_follows_its_schema(document):
    if document["kind"] in SCHEMAS:
        jsonschema.validate(document, SCHEMAS[document["kind"]])
    else:
        validate(document)
    for name, template in pods_of(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template.get("metadata", {})}}
        validate({**pod, "spec": template["spec"]})


def test_a_misspelt_field_is_found():
    (job,) = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    job["spec"]["backOffLimit"] = job["spec"].pop("backoffLimit")
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        jsonschema.validate(job, SCHEMAS["RayJob"])
    (_, template), *_ = pods_of(job)
    template["spec"]["containers"][0]["volumemounts"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]})


@pytest.mark.parametrize("document", objects())
def test_pods_have_no_privileges_and_bounded_appetites(document):
    for name, template in pods_of(document):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        claims = {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes | claims
            assert ":" in container["image"] and not container["image"].endswith(":latest")
            for variable in container.get("env", []):
                secret = any(word in variable["name"] for word in ("PASSWORD", "KEY", "TOKEN"))
                assert not secret or "valueFrom" in variable


def ray_objects():
    return [param for param in objects() if param.values[0]["kind"] in SCHEMAS]


@pytest.mark.parametrize("document", ray_objects())
def test_ray_asks_for_a_token_and_is_not_exposed(document):
    import ray

    cluster = cluster_of(document)
    assert cluster["authOptions"] == {"mode": "token"} and cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["rayVersion"] == ray.__version__
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("document", ray_objects())
def test_ray_start_understands_the_parameters(document):
    import json

    from ray.scripts.scripts import start

    cluster = cluster_of(document)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items() if name != "resources"]
        assert start.make_context("start", words).params["object_store_memory"] > 0
        if "resources" in group["rayStartParams"]:  # KubeRay wants a JSON text inside a JSON text
            assert json.loads(json.loads(group["rayStartParams"]["resources"]))


def test_the_job_can_be_tried_again():
    """The entry point parses, names its run, and both words stand where the comment says."""
    from typer.main import get_command

    from orchestrator.cli import app

    (job,) = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    command, *words = job["spec"]["entrypoint"].split()[1:]
    given = get_command(app).commands[command].make_context("submit", words).params
    assert given["run_name"] == job["metadata"]["name"] and given["on"] == "auto" and job["spec"]["backoffLimit"] > 0


def test_the_service_survives_its_head():
    (service,) = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    options = cluster["gcsFaultToleranceOptions"]
    redis = list(yaml.safe_load_all((FOLDER / "redis.yaml").read_text()))
    (endpoint,) = (document for document in redis if document["kind"] == "Service")
    port = endpoint["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"redis://{endpoint['metadata']['name']}:{port}"
    assert "valueFrom" in options["redisPassword"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_service_is_one_that_ray_serve_and_the_app_accept(monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    from serve.config import ServeConfig

    (service,) = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    settings = ServeConfig(**config["applications"][0]["args"])
    mounts = cluster_of(service)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMounts"]
    places = tuple(mount["mountPath"] for mount in mounts)
    assert settings.states.startswith(places) and settings.tokens_file.startswith(places)


def test_the_driver_knows_how_far_the_job_s_cluster_may_grow(monkeypatch):
    import json

    from orchestrator.cluster_growth import node_types

    (job,) = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    cluster = cluster_of(job)
    env = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    monkeypatch.setenv(
        "MOEPIPE_NODE_TYPES", next(item["value"] for item in env if item["name"] == "MOEPIPE_NODE_TYPES")
    )
    told = node_types()
    assert {group["groupName"]: group["maxReplicas"] for group in cluster["workerGroupSpecs"]} == {
        name: kind["max_workers"] for name, kind in told.items()
    }
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = json.loads(json.loads(group["rayStartParams"]["resources"]))
        expected = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"]), **custom}
        assert told[group["groupName"]]["resources"] == expected
