"""The shipped cluster.yaml passes Ray's own validation."""

from pathlib import Path

import yaml


def test_cluster_yaml_is_accepted_by_ray():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())
    validate_config(prepare_config(config))


def test_cluster_yaml_keeps_token_authentication_on():
    config = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
