"""The published circuits by name: two image sizes and four graph priors, few-shot, and the students of both sizes.

Source: the nine ``nac_*_config.yml`` and two ``nac_student_*_config.yml`` files of m2mKD's public code (values), the
same for all priors but for the prior itself and its regulariser. Torch-free, but for :func:`regularizer_preset`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from moe.errors import SpecError, nearest
from moe.models.nac.specs import CircuitSpec, StudentSpec

if TYPE_CHECKING:
    from moe.models.nac.regularizers import RegularizerSpec

Position = Literal["readin", "mediator", "readout"]

_SIZES: dict[str, dict[str, Any]] = {
    "tiny_imagenet": {
        "state": 384,
        "heads": 6,
        "capacity": 2.0,
        "inputs": 64,
        "mediators": 256,
        "grid": 8,
        "classes": 200,
    },
    "imagenet": {
        "state": 512,
        "heads": 8,
        "capacity": 1.0,
        "inputs": 192,
        "mediators": 768,
        "grid": 28,
        "classes": 1000,
    },
    "few_shot": {"state": 512, "heads": 8, "capacity": 1.0, "inputs": 192, "mediators": 768, "grid": 28, "classes": 8},
}
PRIORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scale_free": ("barabasi-albert", {"m": 2}, {"m": 6}),
    "planted": (
        "planted-partition",
        {"l": 8, "k": 32, "p_in": 0.9, "p_out": 0.2},
        {"l": 12, "k": 64, "p_in": 0.9, "p_out": 0.2},
    ),
    "ring": ("ring-of-cliques", {"num_cliques": 8, "clique_size": 32}, {"num_cliques": 12, "clique_size": 64}),
    "erdos": ("erdos-renyi", {"p": 0.1}, {"p": 0.1}),
}
"""Short name -> graph prior, its arguments for 256 mediators, and for 768."""

_MOD = {"add_one_to_scale": True, "learnable_scale_gain": True, "scale_gain": 0.1}


def _choice(name: str, table: dict[str, Any], noun: str) -> Any:
    if name not in table:
        raise SpecError(f"There is no circuit {noun} named {name!r}.", nearest(name, table))
    return table[name]


def _tokenizer(grid: int) -> dict[str, Any]:
    positions = {"dim": 64, "grid_size": (grid, grid)}
    return {"capacity_preset": "tiny", "num_stages": 2, "positional_grid_kwargs": positions}


def circuit_preset(dataset: str, prior: str = "scale_free", num_classes: int | None = None) -> CircuitSpec:
    """A published circuit.

    Args:
        dataset: ``tiny_imagenet``, ``imagenet`` or ``few_shot``.
        prior: a key of :data:`PRIORS`; few-shot was published with ``scale_free`` only.
        num_classes: in place of the data set's.

    Raises:
        SpecError: unknown names.
    """
    size = _choice(dataset, _SIZES, "size")
    graph, small, large = _choice(prior, PRIORS, "prior")
    kernel = {"stochastic_kernel": True, "stochastic_sampling_temperature": 0.5, "truncation": 0.9}
    return CircuitSpec.from_official(
        {
            "output_dim": num_classes or size["classes"],
            "state_dim": size["state"],
            "input_tokenizer_kwargs": _tokenizer(size["grid"]),
            "latent_graph_kwargs": {
                "code_dim": size["state"],
                "signature_dim": 64,
                "num_input_latents": size["inputs"],
                "num_mediator_latents": size["mediators"],
                "num_output_latents": 64,
                "num_iterations": 8,
                "num_heads": size["heads"],
                "head_dim": 64,
                "path_drop_prob": 0.1,
                "layer_scale_initial_value": 0.1,
                "ffn_capacity_factor": size["capacity"],
                "code_noise_scale": 0.05,
                "mod_fc_kwargs": _MOD,
                "mediator_latent_kwargs": {
                    "graph_preset": graph,
                    "graph_generator_kwargs": small if size["mediators"] == 256 else large,
                },
                "propagator_kwargs": {"latent_attention_kwargs": {"kernel_kwargs": kernel, "share_layernorm": True}},
                "read_out_kwargs": {"use_head": False},
            },
            "output_tokenizer_kwargs": {"softmax_type": "gumbel"},
        }
    )


def regularizer_preset(prior: str = "scale_free") -> RegularizerSpec:
    """The published graph regulariser of a prior: block-model matching for ``planted``, hinge repulsion for others.

    ``Parity:`` the block model has 8 clusters also where the ImageNet prior has 12 groups; set ``num_clusters`` to 12
    to make them agree.
    """
    from moe.models.nac.regularizers import RegularizerKwargs, RegularizerSpec

    _choice(prior, PRIORS, "prior")
    if prior == "planted":
        kwargs = RegularizerKwargs(num_clusters=8, p_in=0.9, p_out=0.2)
        return RegularizerSpec(type="stochastic_block_model_regularization", kwargs=kwargs)
    return RegularizerSpec(type="signature_hinge_repulsion", hinge=0.4, weight=0.1)


def student_preset(dataset: str, position: Position, stitch_dim: int = 1280) -> StudentSpec:
    """A published distillation student.

    Args:
        dataset: ``tiny_imagenet`` or ``imagenet``, the circuit that will be assembled; both are distilled on ImageNet.
        position: place in the circuit.
        stitch_dim: width of the meta model; 1280 is ViT-H's.

    Raises:
        SpecError: unknown names.
    """
    size = _choice(dataset, {name: _SIZES[name] for name in ("tiny_imagenet", "imagenet")}, "size")
    shared = {
        "state_dim": size["state"],
        "code_dim": size["state"],
        "layer_scale_initial_value": 0.1,
        "ffn_capacity_factor": size["capacity"],
        "mod_fc_kwargs": _MOD,
        "num_heads": size["heads"],
        "head_dim": 64,
    }
    own: dict[str, dict[str, Any]] = {
        "mediator": {"path_drop_prob": 0.1, "latent_attention_kwargs": {"share_layernorm": True}},
        "readin": {"tokenizer_kwargs": _tokenizer(28)},
        "readout": {"tokenizer_kwargs": {"softmax_type": "gumbel"}, "output_dim": 1000},
    }
    return StudentSpec.from_official(
        {"share_kwargs": shared, position: _choice(position, own, "position")}, position, stitch_dim
    )
