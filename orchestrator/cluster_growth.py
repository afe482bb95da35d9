"""What an autoscaler may still add to a cluster: a stage that needs a GPU then waits for one and is not refused.

Ray does not tell a driver how far its cluster may grow. On the head of a cluster made by ``ray up`` the configuration
lies in ``~/ray_bootstrap_config.yaml``; elsewhere (Kubernetes) ``MOEPIPE_NODE_TYPES`` says the same, as JSON::

    {"gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4}}
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe.errors import SpecError

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
GROUP = "ray.io/node-group"


def node_types() -> dict[str, Mapping[str, Any]]:
    """Worker types by name, each with ``resources`` (Ray's names) and ``max_workers``; empty for a fixed cluster.

    Raises:
        SpecError: ``MOEPIPE_NODE_TYPES`` is not what it should be.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    reader = YAML(typ="safe")
    given = os.environ.get("MOEPIPE_NODE_TYPES")
    if given:
        try:
            return {
                name: {**kind, "max_workers": int(kind["max_workers"])} for name, kind in reader.load(given).items()
            }
        except (YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"MOEPIPE_NODE_TYPES cannot be read: {type(error).__name__}: {error}.",
                'An example: {"gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4}}',
            ) from None
    path = BOOTSTRAP.expanduser()
    with suppress(OSError, YAMLError, AttributeError):
        config = reader.load(path.read_text(encoding="utf-8"))
        most, head = int(config.get("max_workers", 0)), config.get("head_node_type")
        return {
            name: {"resources": kind.get("resources", {}), "max_workers": min(int(kind.get("max_workers", most)), most)}
            for name, kind in config.get("available_node_types", {}).items()
            if name != head
        }
    return {}


def may_come(nodes: Iterable[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """Resources (Ray's names) of every node that may still be added.

    Args:
        nodes: as ``ray.nodes()`` gives them.
    """
    alive = Counter((node.get("Labels") or {}).get(GROUP, "") for node in nodes if node["Alive"])
    coming: list[Mapping[str, float]] = []
    for name, kind in node_types().items():
        coming += [dict(kind["resources"])] * max(0, kind["max_workers"] - alive[name])
    return coming
