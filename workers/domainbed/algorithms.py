"""From a run's hyper-parameters by official name to one of our algorithms with its network.

An official algorithm (``ERM``, ``GMOE``, ``CORAL`` ...) is one file of ``moe/algorithms``; its hyper-parameters become
fields of that file's ``Config``. A sweep may add methods of its own (:class:`MethodSpec`): GMoE's network under Fish or
SWAD, EMoE, another backbone; they are named by the sweep, and the name is part of the runs' identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe.algorithms.base import Algorithm, algorithm
from moe.errors import SpecError, nearest
from workers.domainbed.hparams import Value
from workers.domainbed.protocol import protocol
from workers.overlay import overlay

if TYPE_CHECKING:
    from workers.domainbed.environments import EnvironmentSet

OFFICIAL: Mapping[str, str] = {
    "ERM": "erm",
    "GMOE": "gmoe",
    "Fish": "fish",
    "IRM": "irm",
    "CORAL": "coral",
    "ERM_SMA": "sma",
}
"""Official algorithm -> file of ``moe/algorithms``."""
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "IRM": {"irm_lambda": "penalty", "irm_penalty_anneal_iters": "penalty_anneal_iters"},
    "CORAL": {"mmd_gamma": "gamma"},
    "Fish": {"meta_lr": "meta_lr"},
}
"""Official hyper-parameter -> field of our ``Config``, for those that all algorithms do not share."""


class MethodSpec(BaseModel):
    """A row of the table that is not an official algorithm as it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: str = Field(description="file of moe/algorithms, e.g. gmoe, emoe, fish, swad")
    hparams_of: str = Field(default="ERM", description="official algorithm whose hyper-parameters are drawn")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the algorithm's Config that replace what the protocol says"
    )


def method_of(name: str, methods: Mapping[str, MethodSpec]) -> MethodSpec:
    """What runs under the name ``name``.

    Raises:
        SpecError: neither official (and here) nor one of ``methods``.
    """
    if name in methods:
        return methods[name]
    if name not in OFFICIAL:
        raise SpecError(
            f"The algorithm {name!r} is not implemented.",
            f"{nearest(name, [*OFFICIAL, *methods])} Others are described under `methods`.",
        )
    return MethodSpec(algorithm=OFFICIAL[name], hparams_of=name)


def make_algorithm(
    method: MethodSpec,
    hparams: Mapping[str, Value],
    data: EnvironmentSet,
    protocol_name: str,
    steps: int,
    backbone: Mapping[str, Any] | None = None,
) -> Algorithm[Any]:
    """The algorithm of a run.

    Args:
        method: which.
        hparams: of the run, by official name.
        data: the environments; decide channels and, without ``backbone``, the network.
        protocol_name: decides ResNet-50's weights and whether its BatchNorm is frozen.
        steps: updates of the run.
        backbone: network of all methods that do not bring their own.

    Raises:
        SpecError: settings that do not fit each other.
    """
    name = _algorithm_name(method, hparams)
    kind = algorithm(name)
    network = dict(backbone or _default_backbone(name, hparams, data, protocol_name))
    if name == "gmoe" and network.get("gmoe") is None:
        network["gmoe"] = _gmoe_fields(hparams)
    fields: dict[str, Any] = {
        "backbone": overlay(network, method.config.get("backbone") or {}),
        "train": {
            "batch_size": hparams["batch_size"],
            "per_domain": True,
            "steps": steps,
            "lr": hparams["lr"],
            "weight_decay": hparams["weight_decay"],
            "schedule": "constant",
        },
        "dropout": 0.0 if name in ("gmoe", "emoe") or data.small else hparams["resnet_dropout"],
        "freeze_bn": bool(hparams.get("freeze_bn", protocol(protocol_name).freeze_bn)) and not data.small,
    }
    fields |= {ours: hparams[name] for name, ours in _FIELDS.get(method.hparams_of, {}).items() if name in hparams}
    fields |= _emoe_fields(hparams) if name == "emoe" and "topk" in hparams else {}
    fields = overlay(fields, {key: value for key, value in method.config.items() if key != "backbone"})
    fields["backbone"] |= {"channels": data.channels, "image_size": data.image_size}
    try:
        return kind(kind.Config(**fields))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SpecError(f"The settings of {name} do not fit: {found}.") from None


def _algorithm_name(method: MethodSpec, hparams: Mapping[str, Value]) -> str:
    """File of the algorithm; in EMoE's fork the hyper-parameters of GMOE decide among three."""
    if method.algorithm == "gmoe" and hparams.get("vanilla_ViT"):
        return "erm"
    return "emoe" if method.algorithm == "gmoe" and hparams.get("MoE_from_ffn") else method.algorithm


def _default_backbone(
    name: str, hparams: Mapping[str, Value], data: EnvironmentSet, protocol_name: str
) -> dict[str, Any]:
    """The network of the protocol: four convolutions for 28 x 28, a transformer for GMoE and EMoE, else a ResNet."""
    if data.small:
        return {"name": "mnist_cnn"}
    if name in ("gmoe", "emoe") or hparams.get("vanilla_ViT"):
        size = hparams.get("vit_type", "small")
        return {"name": f"timm:deit_{size}_patch16_224", "pretrained": True}
    if hparams.get("resnet18"):
        return {"name": "torchvision:resnet18", "pretrained": True}
    augmix = bool(hparams.get("resnet50_augmix", protocol(protocol_name).augmix))
    return {"name": "timm:resnet50.ram_in1k" if augmix else "torchvision:resnet50", "pretrained": True}


def _gmoe_fields(hparams: Mapping[str, Value]) -> dict[str, Any]:
    """GMoE's blocks: as published, or as EMoE's fork registers them."""
    if "topk" not in hparams:
        return {}
    from moe.models.emoe_layers import vision_layers

    every, last = bool(hparams["every_moe"]), int(hparams["skip_last"])
    sparse = vision_layers(12, int(hparams["num_inter"]), every, last)
    return {
        "pattern": ["S" if block in sparse else "F" for block in range(12)],
        "num_experts": hparams["num_experts"],
        "top_k": hparams["topk"],
        "gate": "cosine" if hparams["router"] == "cosine_top" else "linear",
        "gate_noise": hparams["gate_noise"],
        "capacity_factor": hparams["capacity_factor"],
        "aux_weight": 0.01 * float(hparams["aux_loss_weight"]),
    }


def _emoe_fields(hparams: Mapping[str, Value]) -> dict[str, Any]:
    """EMoE's hyper-parameters of its own fork as fields of our ``Config``."""
    learned = hparams["router"] != "top"
    emoe = {
        "num_experts": hparams["num_experts"],
        "top_k": hparams["topk"],
        "gate": "cosine" if learned else "avg_k",
        "one_score": hparams["one_score_gate"],
        "split": "balanced" if hparams["MoE_from_ffn"] else "copy",
        "expert_repeat": hparams["expert_repeat"],
        "gate_noise": hparams["gate_noise"],
        "gate_momentum": hparams["one_score_gate_update_momentum"],
        "normalize_gate": hparams["normalize_one_score_gate"],
        "dropout": 0.1,
        "aux_weight": 0.01 * float(hparams["aux_loss_weight"]),
    }
    return {"emoe": emoe, **{name: hparams[name] for name in ("num_inter", "every_moe", "skip_last")}}
