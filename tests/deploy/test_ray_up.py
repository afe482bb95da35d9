"""cluster.yaml and its siblings: accepted by Ray, by EC2's and Compute Engine's own descriptions, and safe."""

import importlib.resources
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on_prem.yaml"]
CLOUDS = FILES[:2]


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def starts(config):
    """The `ray start` commands: (head, worker)."""
    found = [[c for c in config[f"{who}_start_ray_commands"] if "ray start" in c] for who in ("head", "worker")]
    assert [len(commands) for commands in found] == [1, 1]
    return found[0][0], found[1][0]


def options(command):
    """What `ray start` makes of a command line; refuses what it does not know."""
    from ray.scripts.scripts import start

    words = shlex.split(command)
    return start.make_context("start", words[words.index("start") + 1 :], resilient_parsing=False).params


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(name)))


def test_ray_would_refuse_a_misspelt_key():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("cluster.yaml")
    config["idle_timeout_minuts"] = config.pop("idle_timeout_minutes")
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_ray_start_understands_its_options(name):
    head, worker = (options(command) for command in starts(read(name)))
    assert head["head"] and head["port"] == 6379 and not worker["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    for given in (head, worker):
        assert given["object_store_memory"] >= 10**9 and given["object_spilling_directory"]


@pytest.mark.parametrize("name", FILES)
def test_every_start_has_the_token_and_nothing_secret_is_in_the_file(name):
    config = read(name)
    mounts = config["file_mounts"]
    home = f"/home/{config['auth']['ssh_user']}/moepipe"
    assert mounts[f"{home}/env.sh"] == "./deploy/env.sh" and mounts[f"{home}/ray_token"] == "~/.moepipe/ray_token"
    assert (ROOT / "deploy/env.sh").is_file() and (ROOT / mounts[f"{home}/constraints.txt"]).is_file()
    for command in [*starts(config), *(c for c in config["head_start_ray_commands"] if "ray stop" in c)]:
        assert command.startswith(". ~/moepipe/env.sh && ")
    assert "chmod 600 ~/moepipe/ray_token" in config["setup_commands"]
    assert not re.search(r"AKIA|SECRET|password|0\.0\.0\.0", (ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_it_installs_the_wheel_of_this_version_with_the_tested_set(name):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    (install,) = (command for command in read(name)["setup_commands"] if "pip install" in command)
    assert f"moepipe-{version}-" in install and "--constraint ~/moepipe/constraints.txt" in install
    # pip does nothing about a wheel whose version is installed already: a second `ray up` would keep the old code.
    assert install.rstrip().endswith('pip install --quiet --no-deps --force-reinstall "$wheel"')


@pytest.mark.parametrize("name", CLOUDS)
def test_node_types_fit_together(name):
    """What Ray's validation lets through: more workers wanted than allowed, unknown head, stages without a node."""
    config = read(name)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert all(entry["min_workers"] <= entry["max_workers"] <= config["max_workers"] for entry in types.values())
    assert sum(entry["min_workers"] for entry in types.values()) <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 30
    spot = {kind: entry["resources"] for kind, entry in types.items() if "spot" in kind}
    assert spot and all("spot" in amounts and "on_demand" not in amounts for amounts in spot.values())
    assert all("on_demand" in types[kind]["resources"] for kind in types if kind not in spot)
    assert any(amounts["resources"]["GPU"] for amounts in types.values())


def test_ec2_accepts_the_node_configs():
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    types = read("cluster.yaml")["available_node_types"]
    for kind, entry in types.items():
        report = ParamValidator().validate({**entry["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{kind}: {report.generate_report()}"
        assert entry["node_config"]["SecurityGroupIds"]  # else Ray makes one that is open to the world on ssh
        assert all(disk["Ebs"]["Encrypted"] for disk in entry["node_config"]["BlockDeviceMappings"])
    assert types["spot_gpu_worker"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def _problems(value, schema, schemas, path):
    """Where ``value`` does not follow a schema of a Google discovery document."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"]]
    kind = schema.get("type")
    if kind == "object":
        known, other = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            if name not in known and other is None:
                yield f"{path}.{name} is unknown"
            else:
                yield from _problems(item, known.get(name, other), schemas, f"{path}.{name}")
    elif kind == "array":
        for index, item in enumerate(value):
            yield from _problems(item, schema["items"], schemas, f"{path}[{index}]")
    elif kind == "boolean" and not isinstance(value, bool):
        yield f"{path} is not a boolean"
    elif kind == "string" and schema.get("format") != "int64" and not isinstance(value, str):
        yield f"{path} is not a text"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"


def test_compute_engine_accepts_the_node_configs():
    found = importlib.resources.files("googleapiclient") / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(found.read_text())["schemas"]
    types = read("deploy/gcp.yaml")["available_node_types"]
    for kind, entry in types.items():
        assert list(_problems(entry["node_config"], schemas["Instance"], schemas, kind)) == []
    assert types["spot_gpu_worker"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    wrong = {**types["head"]["node_config"], "machinetype": "n2"}
    assert list(_problems(wrong, schemas["Instance"], schemas, "head")) == ["head.machinetype is unknown"]


def test_on_prem_hosts_stay_when_idle():
    from ray.autoscaler._private.util import prepare_config

    config = read("deploy/on_prem.yaml")
    (worker,) = (e for kind, e in prepare_config(config)["available_node_types"].items())
    assert worker["min_workers"] == worker["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_environment_of_the_hosts(tmp_path):
    """It is what bash makes of it that counts."""
    script = f". {ROOT / 'deploy/env.sh'} && env"
    clean = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-euc", script], env=clean, capture_output=True, text=True, check=True)
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert seen["RAY_AUTH_MODE"] == "token" and seen["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/moepipe/ray_token"
    assert seen["MOEPIPE_STORE"].startswith("s3://") and seen["RAY_USAGE_STATS_ENABLED"] == "0"
    assert seen["PATH"].startswith(f"{tmp_path}/moepipe/venv/bin:")
    misses, wait, every = (
        float(seen[f"RAY_health_check_{name}"]) for name in ("failure_threshold", "timeout_ms", "period_ms")
    )
    assert 10_000 <= misses * (wait + every) <= 30_000  # a lost host is noticed, a busy one is not buried
    assert 10 <= float(seen["RAY_gcs_rpc_server_reconnect_timeout_s"]) <= 60
