"""The documents that hand a model to Ray Serve: its config file, and a Kubernetes RayService around it.

The app is named by import path and its settings are plain values (``serve.config.ServeConfig`` checks them where they
arrive), so nothing of ``serve`` is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

APP = "serve.app"
IMPORT_PATH = f"{APP}:build"
APPLICATION = "moepipe"
RAY_VERSION = "2.60.0"


def serve_document(arguments: Mapping[str, Any], host: str = "127.0.0.1", port: int = 8000) -> dict[str, Any]:
    """A config file for ``serve deploy``.

    Args:
        arguments: settings of the app (fields of ``serve.config.ServeConfig``); ``front`` becomes ``proxy``, since on a
            cluster Ray Serve's own proxies take the requests.
        host: address of the proxies.
        port: port of the proxies.
    """
    dropped = ("front", "host", "port")
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port, "request_timeout_s": 600.0},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {**{k: v for k, v in arguments.items() if k not in dropped}, "front": "proxy"},
            }
        ],
    }


def rayservice_document(
    arguments: Mapping[str, Any], name: str, image: str, cpus: int = 2, memory_gb: int = 4
) -> dict[str, Any]:
    """A RayService for the KubeRay operator.

    The image must hold moepipe, and ``model``, ``store`` and ``states`` must be paths or URLs that its pods see (a
    mounted volume, an object store).

    Args:
        arguments: as :func:`serve_document`.
        name: of the Kubernetes object.
        image: container image.
        cpus: cores of the head pod.
        memory_gb: memory of the head pod.
    """
    from ruamel.yaml.scalarstring import LiteralScalarString

    amounts = {"cpu": str(cpus), "memory": f"{memory_gb}Gi"}
    container = {
        "name": "ray-head",
        "image": image,
        "resources": {"limits": dict(amounts), "requests": dict(amounts)},
        "ports": [{"containerPort": 8000, "name": "serve"}],
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {
            # A text that the operator hands to Ray Serve. Inside a pod the proxy listens for the service.
            "serveConfigV2": LiteralScalarString(to_yaml(serve_document(arguments, host="0.0.0.0"))),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                # Ray's dashboard port runs code for whoever reaches it: token authentication, and no public service.
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"dashboard-host": "0.0.0.0"},
                    "template": {"spec": {"containers": [container]}},
                },
            },
        },
    }


def to_yaml(document: Mapping[str, Any]) -> str:
    """The document as YAML text."""
    from io import StringIO

    from ruamel.yaml import YAML

    stream = StringIO()
    writer = YAML()
    writer.width = 1000
    writer.dump(dict(document), stream)
    return stream.getvalue()
