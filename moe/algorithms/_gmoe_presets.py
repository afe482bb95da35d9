"""Constants of the DomainBed protocol per data set, for GMoE and for the baselines on a ResNet-50.

Sources: GMoE's public code, commit 0689d557 (``gmoe_fork``: hyper-parameters that its authors registered per data set),
paper arXiv 2206.04046; DomainBed's, commit b93c22a1 (``domainbed_2020``: arXiv 2007.01434; ``domainbed_head``: today's
defaults). Names are those of the data sets in the registry, or would be.
"""

from __future__ import annotations

from typing import Any

from moe.algorithms._meta_dmoe_presets import PRESETS as META_PRESETS

Fields = dict[str, Any]

# Data set -> rate and weight decay of GMoE (Adam, constant rate). Source: gmoe_fork.
GMOE_RATES = {
    "pacs": (3e-5, 1e-6),
    "vlcs": (3e-5, 1e-6),
    "officehome": (1e-5, 1e-6),
    "terraincognita": (5e-5, 1e-4),
    "domainnet": (5e-5, 0.0),
    "cub_dg": (5e-5, 0.0),
    "sviro": (3e-5, 0.0),
    "wilds_camelyon": (3e-5, 0.0),
    "wilds_fmow": (3e-5, 0.0),
}
SMALL = ("rotated_mnist", "colored_mnist")
CHANNELS = {"colored_mnist": 2, "rotated_mnist": 1}
BATCH = 32  # images of each source domain; 64 for 28 x 28
STEPS = 5001


def _phase(dataset: str, lr: float, weight_decay: float, fork: bool) -> Fields:
    """Adam at a constant rate, evaluated as the protocol says."""
    steps, every = STEPS, 300
    if dataset == "domainnet":
        steps, every = (15001, 500) if fork else (STEPS, 1000)
    if dataset.startswith("wilds_") or dataset in SMALL:
        every = 100
    return {
        "batch_size": 64 if dataset in SMALL else BATCH,
        "per_domain": True,
        "steps": steps,
        "evaluate_every": every,
        "lr": lr,
        "weight_decay": weight_decay,
        "schedule": "constant",
    }


def _embedded(fields: Fields, train: str = "student") -> Fields:
    """The student pre-training of Meta-DMoE on the same rows: equal budgets. Source: see there."""
    return {"backbone": fields["backbone"], "train": fields[train]}


def _gmoe(dataset: str) -> Fields:
    lr, weight_decay = GMOE_RATES[dataset]
    backbone = {"name": "timm:deit_small_patch16_224", "pretrained": True, "gmoe": {}}
    return {"backbone": backbone, "train": _phase(dataset, lr, weight_decay, fork=True)}


def _baseline(dataset: str, head: bool) -> Fields:
    """ERM and what is built on it; BatchNorm is frozen in the setup of 2020."""
    if dataset in SMALL:
        backbone: Fields = {"name": "mnist_cnn", "channels": CHANNELS[dataset], "image_size": 28}
        return {"backbone": backbone, "train": _phase(dataset, 1e-3, 0.0, fork=False)}
    name = "timm:resnet50.ram_in1k" if head else "torchvision:resnet50"
    return {
        "backbone": {"name": name, "pretrained": True},
        "train": _phase(dataset, 5e-5, 0.0, fork=False),
        "freeze_bn": not head,
    }


# Ours: to try the method on the embedded digits in minutes on a CPU; they are resized to 64 pixels.
_TINY: Fields = {
    "name": "timm:vit_tiny_patch16_224",
    "channels": 1,
    "image_size": 64,
    "gmoe": {"num_experts": 4, "projection": 64},
}
_SHORT: Fields = {"batch_size": 32, "steps": 500, "lr": 3e-4, "schedule": "constant"}

GMOE_PRESETS: dict[str, Fields] = {
    **{name: _gmoe(name) for name in GMOE_RATES},
    "rotated14": {"backbone": _TINY, "train": _SHORT},
}

BASELINE_PRESETS: dict[str, Fields] = {
    **{name: _embedded(fields) for name, fields in META_PRESETS.items()},
    **{name: _baseline(name, head=False) for name in (*GMOE_RATES, *SMALL)},
    **{f"{name}@domainbed_head": _baseline(name, head=True) for name in GMOE_RATES},
}
