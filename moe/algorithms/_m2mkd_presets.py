"""The constants of m2mKD per data set and model, as fields of ``moe.algorithms.m2mkd.Config``.

Source: public code (kamanphoebe/m2mKD, commit 067fa1f): DeiT-style command line for the ViT phases, YAML files for the
circuits; Deep Incubation (arXiv 2212.04129) for pt, mt and ft. Names: ``<data set>`` for the V-MoE recipe,
``<data set>_nac_<graph prior>`` for circuits. ``rotated14`` is ours.
"""

from __future__ import annotations

from typing import Any

from moe.models.nac.presets import circuit_preset
from moe.models.vit_specs import named_vit, named_vmoe

Fields = dict[str, Any]

# Source: command line of the public code on 8 devices; rates are 5e-4 * batch / 512.
_COMMON: Fields = {"lr": 5e-4, "min_lr": 1e-5, "warmup_lr": 1e-6, "weight_decay": 0.05}
PT: Fields = {**_COMMON, "batch_size": 2048, "epochs": 300, "warmup_epochs": 20}
MT: Fields = {**_COMMON, "batch_size": 2048, "accumulate": 2, "epochs": 100, "warmup_epochs": 20, "drop_path": 0.1}
FT: Fields = {**_COMMON, "batch_size": 1024, "epochs": 100, "warmup_epochs": 0, "clip": 1.0, "drop_path": 0.1}
STUDENT: Fields = dict(MT)


def _few_shot(k_way: int, n_shot: int) -> Fields:
    """V-MoE: only the head is trained, on one device, at an unscaled rate."""
    return {
        **_COMMON,
        "batch_size": k_way * n_shot,
        "epochs": 100,
        "warmup_epochs": 20,
        "lr": 2e-3,
        "lr_batch": None,
        "drop_path": 0.1,
        "amp": False,
        "only": "head",
    }


def _vit_phases() -> Fields:
    return {"pt": PT, "mt": MT, "ft": FT, "student": STUDENT}


# Source: spec of the released V-MoE: teacher ViT-L in four modules, meta model of four blocks, 12 expert blocks.
_LARGE = named_vit("vit_large_patch16_224", depths=(6, 6, 6, 6)).model_dump()
_LARGE_META = {**_LARGE, "depths": (1, 1, 1, 1)}
# Source: released teacher modules of a ViT-H; the documented depths (nine, sum 29) do not fit them.
_HUGE = named_vit("vit_huge_patch14_224", depths=(4, 3, 3, 3, 3, 3, 3, 3, 3, 4)).model_dump()
_HUGE_META = {**_HUGE, "depths": (1,) * 10}

VMOE: Fields = {
    "teacher": _LARGE,
    "meta": _LARGE_META,
    "vmoe": named_vmoe("vmoe_base").model_dump(),
    **_vit_phases(),
    "e2e": FT,
    "fs": _few_shot(8, 5),
}

_TINY, _IMAGENET = "tiny_imagenet", "imagenet1k"
_SIZES: dict[str, Fields] = {
    _TINY: {"state": 384, "heads": 6, "ffn": 2.0},
    _IMAGENET: {"state": 512, "heads": 8, "ffn": 1.0},
}

_HINGE: Fields = {"type": "signature_hinge_repulsion", "weight": 0.1, "hinge": 0.4, "reduction": "sum"}
# Parity: 8 clusters also for the 12 groups of the ImageNet graph; 12 would match it.
_BLOCKS: Fields = {
    "type": "stochastic_block_model_regularization",
    "weight": 1.0,
    "kwargs": {"num_clusters": 8, "p_in": 0.9, "p_out": 0.2},
}


_MOD: Fields = {"add_one_to_scale": True, "learnable_scale_gain": True, "scale_gain": 0.1}


def _tokenizer(grid: int) -> Fields:
    positions = {"dim": 64, "grid_size": [grid, grid]}
    return {"capacity_preset": "tiny", "num_stages": 2, "positional_grid_kwargs": positions}


def circuit(data: str, prior: str) -> Fields:
    """A published circuit, as fields of ``moe.models.nac.specs.CircuitSpec``."""
    names = {"scale_free": "scale_free", "planted_partition": "planted", "ring_of_cliques": "ring"}
    spec = circuit_preset({_IMAGENET: "imagenet"}.get(data, data), {**names, "erdos_renyi": "erdos"}[prior])
    return spec.model_dump()


def circuit_students(data: str) -> dict[str, Fields]:
    """The student YAML file: modules are trained on ImageNet at 224 pixels, whatever the circuit is for."""
    size = _SIZES[data]
    return {
        "share_kwargs": {
            "state_dim": size["state"],
            "code_dim": size["state"],
            "num_heads": size["heads"],
            "head_dim": 64,
            "layer_scale_initial_value": 0.1,
            "use_geglu": True,
            "qkv_bias_in_attention": False,
            "ffn_capacity_factor": size["ffn"],
            "mod_fc_kwargs": _MOD,
        },
        "readin": {"tokenizer_kwargs": _tokenizer(28), "include_residual_in_read_in_attention": True},
        "mediator": {"latent_attention_kwargs": {"share_layernorm": True}},  # its path_drop_prob: see student.drop_path
        "readout": {"output_dim": 1000, "tokenizer_kwargs": {"softmax_type": "gumbel"}},
    }


def _nac(data: str, prior: str) -> Fields:
    """A circuit on ImageNet or Tiny-ImageNet. Every parameter decays; rate and its end are scaled by the batch."""
    tiny = data == _TINY
    end_to_end = {
        "batch_size": 1024 if tiny else 256,
        "epochs": 400 if tiny else 110,
        "lr": 1.2e-3,
        "min_lr": 4e-5,
        "scale_min_lr": True,
        "warmup_epochs": 25,
        "warmup_lr": 1e-6,
        "weight_decay": 0.075 if tiny else 0.05,
        "decay": "all",
        "drop_path": 0.1,
    }
    # Source: few-shot YAML. Parity: SGD at a constant, unscaled rate. The batch there is a quarter of the episode per
    # device whatever their number; here the batch is the episode.
    few_shot = {
        "batch_size": 8,
        "epochs": 500,
        "optimizer": "sgd",
        "momentum": 0.9,
        "lr": 3e-4,
        "lr_batch": None,
        "weight_decay": 0.0,
        "decay": "all",
        "schedule": "constant",
        "only": "output_tokenizer",
    }
    return {
        "teacher": _HUGE,
        "meta": _HUGE_META,
        "circuit": circuit(data, prior),
        "circuit_students": circuit_students(data),
        "graph_sparsity": _BLOCKS if prior == "planted_partition" else _HINGE,
        "assemble": {"student_type": "tinynet" if tiny else "imagenet"},
        **_vit_phases(),
        "e2e": end_to_end,
        "fs": few_shot,
        "augment": {"image_size": 64 if tiny else 224},
    }


def _small() -> Fields:
    """Ours: 14-pixel digits on a CPU, for a look at the whole chain in minutes."""
    vit = {"image_size": 14, "patch_size": 7, "channels": 1, "dim": 32, "heads": 4, "mlp_ratio": 2.0, "num_classes": 10}
    phase = {"batch_size": 64, "epochs": 3, "lr": 2e-3, "lr_batch": None, "amp": False}
    modular = {**vit, "dim": 24, "depths": (1, 1), "moe_blocks": (0, 1), "num_experts": 4, "expert_init": "linear"}
    augment = {"image_size": 14, "randaugment": None, "erasing": 0.0, "repeats": 1, "mixup": 0.0, "cutmix": 0.0}
    names = ("pt", "mt", "ft", "student", "e2e")
    return {
        "teacher": {**vit, "depths": (2, 2)},
        "meta": {**vit, "depths": (1, 1)},
        "vmoe": modular,
        **dict.fromkeys(names, phase),
        "augment": {**augment, "smoothing": 0.0, "color_jitter": 0.0},
    }


PRIORS = ("scale_free", "planted_partition", "ring_of_cliques", "erdos_renyi")

PRESETS: dict[str, Fields] = {
    _IMAGENET: VMOE,
    **{f"{data}_nac_{prior}": _nac(data, prior) for data in (_TINY, _IMAGENET) for prior in PRIORS},
    "rotated14": _small(),
}
