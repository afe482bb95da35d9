"""The constants of MoE Jetpack per data set, as fields of ``moe.algorithms.jetpack.Config``.

``NAME``: the released ViT-T configuration (public code at its last commit), made for ImageNet-1k and used for all sets;
only classes and statistics of the images differ. ``NAME-paper``: the paper's table of hyper-parameters (appendix).
SVHN is in the public code only. ``imagenet1k-scratch``: the released configuration without recycling and layer decay.
"""

from __future__ import annotations

from typing import Any

from moe.algorithms._jetpack_recipe import RateSpec, ScheduleSpec
from moe.conversion.recycle.options import RecycleOptions
from moe.jetpack_specs import v_jetmoe

Fields = dict[str, Any]

DATASETS = ("imagenet1k", "cifar10", "cifar100", "flowers102", "pets", "dtd", "stl10", "food101", "svhn")

RELEASED: Fields = {
    # Source: public code; 4 GPUs x 256 images x 4 micro-batches.
    "model": v_jetmoe("tiny"),
    "recycle": RecycleOptions(),
    "rates": RateSpec(lr=4e-3, weight_decay=0.05, layer_decay=0.6),
    "schedule": ScheduleSpec(warmup_epochs=20, cosine_epochs=280),
    "batch_size": 1024,
    "accumulate": 4,
    "epochs": 300,
}

SCRATCH: Fields = {
    **RELEASED,
    # Source: public code. There, no donor and one rate for all.
    "recycle": None,
    "rates": RateSpec(rule="default", lr=4e-3, weight_decay=0.05),
}


def _paper(batch_size: int, warmup: int, epochs: int, drop_path: float) -> Fields:
    """Source: paper, table of hyper-parameters: no layer decay, layer scale from 1e-6."""
    return {
        **RELEASED,
        "model": v_jetmoe("tiny", drop_path=drop_path, init_values=1e-6),
        "rates": RateSpec(rule="default", lr=4e-3, weight_decay=0.05),
        "schedule": ScheduleSpec(warmup_epochs=warmup, cosine_epochs=epochs - warmup),
        "batch_size": batch_size,
        "accumulate": 1,
        "epochs": epochs,
    }


PAPER: dict[str, Fields] = {
    "imagenet1k": _paper(4096, 50, 300, 0.0),
    "cifar10": _paper(512, 50, 300, 0.1),
    "cifar100": _paper(512, 50, 300, 0.1),
    "food101": _paper(512, 50, 300, 0.1),
    "stl10": _paper(512, 50, 300, 0.0),
    "pets": _paper(512, 100, 600, 0.1),
    "flowers102": _paper(512, 100, 600, 0.1),
    "dtd": _paper(512, 100, 600, 0.2),
}

PRESETS: dict[str, Fields] = {
    **dict.fromkeys(DATASETS, RELEASED),
    **{f"{name}-paper": fields for name, fields in PAPER.items()},
    "imagenet1k-scratch": SCRATCH,
}
