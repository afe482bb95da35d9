"""``deploy``: the documents that put a finished student, or any other whole network, behind an address.

Nothing is started here. The artifact holds a Ray Serve config that names the model by digest and the app by import
path, and a manifest that says what will be served, so that what was trained and what is deployed are tied together by
content. Where the store lies is not part of it: ``MOEPIPE_STORE`` says so on the machine that serves. With
``register_as`` the model gets a name in MLflow's registry besides; ``orchestrator.projection`` writes it, since a stage
only makes files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, model_validator

from moe.errors import NotFoundError, SpecError, nearest
from orchestrator.serving import IMPORT_PATH, serve_document, to_yaml
from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context, Input

CONFIG_FILE = "serve.yaml"
MANIFEST_FILE = "deployment.json"
SERVED = ("jetpack_run", "m2mkd_network")
"""Kinds besides ``model`` and ``student`` that ``moepipe serve`` takes."""


class DeployConfig(StageConfig):
    """How the model will be served."""

    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="name in the addresses; null: the data set's"
    )
    member: str | None = Field(
        default=None,
        max_length=200,
        description="which member of a fan-out at `model` is served, e.g. start=SpheroMoE L2; null: there is only one",
    )
    host: str = Field(default="127.0.0.1", description="address of Ray Serve's proxies")
    port: int = Field(default=8000, ge=1, le=65535, description="port of Ray Serve's proxies")
    replicas: int = Field(default=1, ge=1, le=256, description="processes that answer predictions")
    threads: int = Field(default=1, ge=1, le=256, description="compute threads of each process")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda)$", description="cpu or cuda")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that each process reserves; fractions are shared")
    resident_mb: int = Field(default=256, ge=1, description="MB of domain states that each process holds in memory")
    tokens_file: str | None = Field(
        default=None, description="path, on the servers, of the file with tenant:token lines"
    )
    register_as: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="name in MLflow's model registry; null: not registered",
    )
    alias: str = Field(
        default="candidate",
        pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$",
        description="alias that the first seed's model gets there; moepipe promote makes it champion",
    )

    @model_validator(mode="after")
    def _registered(self) -> DeployConfig:
        if self.register_as is None and self.alias != type(self).model_fields["alias"].default:
            raise ValueError(f"alias belongs to register_as: without a name nothing gets the alias {self.alias!r}")
        return self


class Stage(StageBase[DeployConfig]):
    """Write a Serve config and a manifest for a finished student."""

    output: ClassVar[str] = "deployment"
    inputs: ClassVar[Mapping[str, Port]] = {
        "student": Port("student", optional=True, doc="a meta-distilled student; its experts are found by its record"),
        "model": Port("model", optional=True, also=SERVED, doc="any other whole network, instead of a student"),
    }
    Config: ClassVar[type[StageConfig]] = DeployConfig

    def bind(self, config: DeployConfig) -> StageBase[Any]:
        """With ``member``, the port takes a whole fan-out."""
        if config.member is None:
            return self
        ports = {**self.inputs, "model": replace(self.inputs["model"], many=True)}
        bound: type[StageBase[Any]] = type("Stage", (type(self),), {"inputs": ports, "__module__": __name__})
        return bound()

    def run(self, config: DeployConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``serve.yaml`` and ``deployment.json``.

        Raises:
            SpecError: not exactly one model is wired, or none of the members is the one that is named.
            NotFoundError: the model's weights were not kept.
        """
        served = _chosen(config, context)
        arguments = {
            "model": served.digest,
            "name": config.name or str(served.meta["dataset"]),
            "replicas": config.replicas,
            "threads": config.threads,
            "device": config.device,
            "gpus": config.gpus,
            "resident_bytes": config.resident_mb * 10**6,
            "tokens_file": config.tokens_file,
        }
        document = serve_document(arguments, config.host, config.port)
        (context.output / CONFIG_FILE).write_text(to_yaml(document))
        manifest = {
            "model": served.digest,
            "name": arguments["name"],
            "dataset": served.meta["dataset"],
            "outputs": served.meta["num_outputs"],
            "backbone": served.meta["backbone"]["name"] if "backbone" in served.meta else served.meta["form"],
            "adapts_by_distillation": "aggregator" in served.meta,
            "import_path": IMPORT_PATH,
        }
        if config.register_as is not None:
            manifest["registry"] = {"name": config.register_as, "alias": config.alias}
        (context.output / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        context.log(
            f"Start it: moepipe serve {served.digest[:12]}, or on a cluster, with MOEPIPE_STORE set, "
            f"serve deploy {CONFIG_FILE}"
        )
        return manifest


def _chosen(config: DeployConfig, context: Context) -> Input:
    """The one model to serve."""
    models = context.inputs.get("model", ())
    if config.member is not None:
        named = [one for one in models if one.member == config.member or one.member.endswith(f"/{config.member}")]
        if not named:
            hint = nearest(config.member, [one.member.rpartition("/")[2] for one in models])
            raise SpecError(f"No member {config.member!r} arrives at `model`.", hint)
        models = named
    wired = [*context.inputs.get("student", ()), *models]
    if len(wired) != 1:
        raise SpecError(f"{len(wired)} models are wired to be deployed.", "Wire either student or model.")
    if not any(wired[0].path.glob("*.safetensors")):  # modelfile's name for it; importing that would import torch
        raise NotFoundError(
            f"{wired[0].member} keeps no weights.", "Set save_model in the stage that makes it, true or its name."
        )
    return wired[0]
