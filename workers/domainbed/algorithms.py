"""From a run's hyper-parameters by official name to one of our algorithms with its network.

An official algorithm (``ERM``, ``GMOE``, ``CORAL`` ...) is one file of ``moe/algorithms``; its hyper-parameters become
fields of that file's ``Config``. A sweep may add methods of its own (:class:`MethodSpec`): GMoE's network under Fish or
SWAD, EMoE, another backbone; they are named by the sweep, and the name is part of the runs' identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moe.algorithms.base import Algorithm, algorithm
from moe.errors import SpecError, nearest
from workers.domainbed.benchmark_sets import SETS, SMALL_IMAGES
from workers.domainbed.hparams import Value, hparam_table
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
_READ = frozenset(
    {"batch_size", "lr", "weight_decay", "data_augmentation", "class_balanced", "resnet_dropout", "freeze_bn"}
)
"""Official hyper-parameters that every run reads; ``resnet_dropout`` and ``freeze_bn`` act where a network has them."""
_MIXTURE = frozenset({"num_experts", "topk", "num_inter", "every_moe", "skip_last", "router", "gate_noise"})
_MIXTURE_OF: Mapping[str, frozenset[str]] = {
    "gmoe": _MIXTURE | {"aux_loss_weight", "capacity_factor"},
    "emoe": _MIXTURE
    | {"aux_loss_weight", "expert_repeat", "one_score_gate", "normalize_one_score_gate"}
    | {"one_score_gate_update_momentum"},
}
"""File of ``moe/algorithms`` -> hyper-parameters of EMoE's fork that it reads."""
_OWN_TRAIN = ("lr", "weight_decay", "optimizer", "clip")
"""What a method says about training by itself; the sweep and its hyper-parameters say the rest."""


class MethodSpec(BaseModel):
    """A row of the table that is not an official algorithm as it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: str = Field(description="file of moe/algorithms, e.g. gmoe, emoe, fish, swad")
    hparams_of: str = Field(default="ERM", description="official algorithm whose hyper-parameters are drawn")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the algorithm's Config that replace what the protocol says"
    )

    @field_validator("config")
    @classmethod
    def _train(cls, config: dict[str, Any]) -> dict[str, Any]:
        train = config.get("train") or {}
        other = sorted(set(train) - set(_OWN_TRAIN)) if isinstance(train, Mapping) else []
        if other:
            raise ValueError(
                f"train.{other[0]} has no effect on a run of a sweep; a method takes {', '.join(_OWN_TRAIN)}. The "
                "number of updates is `steps` of the sweep, batch_size one of its `hparams`, the rate is constant."
            )
        return config


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


def check_overrides(
    overrides: Mapping[str, Any],
    methods: Sequence[MethodSpec],
    protocol_name: str,
    datasets: Sequence[str],
    backbone: Mapping[str, Any] | None = None,
) -> None:
    """Refuse overriding hyper-parameters that no method reads, unless they only repeat a default.

    Args:
        overrides: by official name.
        methods: of the sweep.
        protocol_name: decides defaults, and whether the mixture is a hyper-parameter.
        datasets: of the sweep.
        backbone: network of all methods that do not bring their own.

    Raises:
        SpecError: the name, and those that are read.
    """
    small = all(dataset in SMALL_IMAGES for dataset in datasets)
    read = sorted({n for m in methods for n in _read(m, protocol_name, overrides, backbone, small)})
    for name in sorted(set(overrides) - set(read)):
        tables = [hparam_table(protocol_name, m.hparams_of, known_as(d)) for m in methods for d in datasets]
        if not any(name in table and table[name].default == overrides[name] for table in tables):
            raise SpecError(
                f"No method of this sweep reads the hyper-parameter {name!r}, so {overrides[name]!r} would have no "
                "effect.",
                nearest(name, read) if name not in {n for table in tables for n in table} else "Leave it out.",
            )


def known_as(dataset: str, small: bool = False) -> str:
    """The benchmark set whose hyper-parameters a data set takes: its own, or those of most sets of its kind."""
    if dataset in SETS:
        return dataset
    return "RotatedMNIST" if small or dataset in SMALL_IMAGES else "VLCS"


def _read(
    method: MethodSpec,
    protocol_name: str,
    overrides: Mapping[str, Any],
    backbone: Mapping[str, Any] | None,
    small: bool,
) -> set[str]:
    """Names of the hyper-parameters that a run of a method reads."""
    name = algorithm_name(method, overrides)
    read = {*_READ, *_FIELDS.get(method.hparams_of, {})}
    read |= {"vanilla_ViT", "MoE_from_ffn"} if method.algorithm == "gmoe" else set()
    if backbone is None and not small:
        transformer = name in ("gmoe", "emoe") or overrides.get("vanilla_ViT")
        read |= {"vit_type"} if transformer else {"resnet18", "resnet50_augmix"}
    given = name == "gmoe" and bool((backbone or {}).get("gmoe"))
    if protocol_name == "emoe_fork" and method.hparams_of == "GMOE" and not given:
        read |= {*_MIXTURE_OF.get(name, ()), *(["MoE_from_ffn"] if name == "emoe" else [])}
    return read


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
    name = algorithm_name(method, hparams)
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
    for key, value in (("channels", data.channels), ("image_size", data.image_size)):
        if fields["backbone"].get(key) not in (None, value):
            raise SpecError(
                f"The backbone's {key} is {fields['backbone'][key]}, and {data.name} gives {value}.",
                "Leave it out of the backbone; `image_size` of the sweep is the side in pixels.",
            )
        fields["backbone"][key] = value
    try:
        return kind(kind.Config(**fields))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SpecError(f"The settings of {name} do not fit: {found}.") from None


def algorithm_name(method: MethodSpec, hparams: Mapping[str, Any]) -> str:
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
        "gate": "cosine" if _learned(hparams) else "linear",
        "gate_noise": hparams["gate_noise"],
        "capacity_factor": hparams["capacity_factor"],
        "aux_weight": 0.01 * float(hparams["aux_loss_weight"]),
    }


def _learned(hparams: Mapping[str, Value]) -> bool:
    """Whether the router of EMoE's fork is its cosine one, and not the plain one."""
    routers = ("cosine_top", "top")
    if hparams["router"] not in routers:
        raise SpecError(f"router is {hparams['router']!r}.", nearest(str(hparams["router"]), routers))
    return hparams["router"] == "cosine_top"


def _emoe_fields(hparams: Mapping[str, Value]) -> dict[str, Any]:
    """EMoE's hyper-parameters of its own fork as fields of our ``Config``."""
    learned = _learned(hparams)
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
