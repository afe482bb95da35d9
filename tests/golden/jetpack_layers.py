"""Adapters of MoE Jetpack's layers: entmax, experts, Soft MoE, SpheroMoE and whole vision transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe.jetpack_specs import SoftMoESpec, SpheroSpec
from moe.layers.draws import Draws
from moe.layers.entmax import entmax15
from moe.layers.slot_experts import ExpertConv2d, ExpertLayerNorm, ExpertMLP, by_expert
from moe.layers.slots import adjust_query_length, unit
from moe.layers.soft_moe import SoftMoE
from moe.layers.sphero import SpheroMoE
from tests.golden.registry import op

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def gradients(module: nn.Module) -> Tensors:
    """Gradients by parameter, of those that have one."""
    return {f"out.grad.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}


def run(module: nn.Module, tensors: Tensors, training: bool, **more: Any) -> Tensors:
    """Load the weights, run, differentiate ``sum(y * cot)``."""
    module.load_state_dict(below(tensors, "w."))
    module.train(training)
    x = tensors["in.x"].clone().requires_grad_()
    y = module(x, **more)
    (y * tensors["in.cot"]).sum().backward()
    return {"out.y": y, "out.grad.x": x.grad, **gradients(module)}


@op("jetpack.entmax15")
def entmax(case: Case, tensors: Tensors) -> Tensors:
    x = tensors["in.x"].clone().requires_grad_()
    p = entmax15(x, case["params"].get("dim", -1))
    (p * tensors["in.cot"]).sum().backward()
    return {"out.p": p, "out.grad.x": x.grad}


@op("jetpack.l2norm")
def l2norm(case: Case, tensors: Tensors) -> Tensors:
    x = tensors["in.x"].clone().requires_grad_()
    y = unit(x, case["params"].get("eps", 1e-6))
    (y * tensors["in.cot"]).sum().backward()
    return {"out.y": y, "out.grad.x": x.grad}


@op("jetpack.expert_layernorm")
def expert_layernorm(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    norm = ExpertLayerNorm(params["num_experts"], params["dim"], params.get("eps", 1e-6))
    norm.load_state_dict(below(tensors, "w."))
    x = tensors["in.x"].clone().requires_grad_()
    batch, _, slots, _ = x.shape
    y = norm(by_expert(x)).unflatten(1, (batch, slots)).transpose(0, 1)
    (y * tensors["in.cot"]).sum().backward()
    return {"out.y": y, "out.grad.x": x.grad, **gradients(norm)}


@op("jetpack.adjust_query_length")
def query_length(case: Case, tensors: Tensors) -> Tensors:
    return {"out.y": adjust_query_length(tensors["in.x"], case["params"]["new_length"])}


@op("jetpack.expert_mlp")
def expert_mlp(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    names = ("glu", "layer_scale", "inner_layernorm", "drop", "drop_act")
    module = ExpertMLP(
        params["dim"], params["hidden"], params["num_experts"], **{n: params[n] for n in names if n in params}
    )
    return run(module, tensors, params.get("training", False), draws=Draws(None, below(tensors, "in.mask.")))


@op("jetpack.expert_conv2d")
def expert_conv2d(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    module = ExpertConv2d(**{name: value for name, value in params.items() if name not in ("seed", "training")})
    return run(module, tensors, False)


def slot_options(params: Case) -> dict[str, Any]:
    """Constructor options of both layers -> fields of the specs, as the released code behaves."""
    return {
        "slots_per_expert": params.get("slots_per_expert", 1),
        "compress_ratio": params.get("compress_ratio", 1.0),
        "key_proj": "affine" if params.get("key_proj") else "none",
        "query_proj": "affine" if params.get("query_proj") else "none",
        "slot_layernorm": params.get("slot_layernorm", False),
        "noise": params.get("add_noise", False),
        "noise_mult": params.get("noise_mult", 1.0),
        "noise_in_eval": True,
        "drop": params.get("moe_droprate", 0.0),
        "drop_act": params.get("moe_droprate_act"),
        "drop_path": params.get("moe_drop_path_rate", 0.0),
        "expert_init": "official",
    }


def soft_spec(params: Case) -> SoftMoESpec:
    return SoftMoESpec(
        **slot_options(params),
        num_experts=params["num_experts"],
        layer_scale=params.get("layer_scale", False),
        logit_dropout=params.get("moe_logits_drop", 0.0),
        logit_dropout_in_eval=True,
    )


def sphero_spec(params: Case) -> SpheroSpec:
    return SpheroSpec(
        **slot_options(params),
        core_experts=params["core_experts"],
        univ_experts=params["univ_experts"],
        univ_factor=params.get("univ_factor", 0.25),
        input_as_phi=params.get("input_as_phi", False),
        num_heads=params.get("num_heads") if params.get("multi_head") else None,
    )


def layer_draws(tensors: Tensors) -> Draws:
    masks = below(tensors, "in.mask.")
    if "in.logit_drop" in tensors:
        masks["logit_drop"] = tensors["in.logit_drop"]
    return Draws(tensors.get("in.noise"), masks)


@op("jetpack.soft_moe")
def soft_moe(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    layer = SoftMoE(params["dim"], soft_spec(params))
    return run(layer, tensors, params.get("training", False), draws=layer_draws(tensors))


@op("jetpack.sphero_moe")
def sphero_moe(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    layer = SpheroMoE(params["dim"], sphero_spec(params))
    return run(layer, tensors, params.get("training", False), draws=layer_draws(tensors))


@op("jetpack.sphero_init")
def sphero_init(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    slots = params.get("slots_per_expert", 1)
    options = {"slots_per_expert": slots, "slot_layernorm": True, "expert_init": "official"}
    ratio = params["core_hidden"] / (4 * params["dim"])
    layer = SpheroMoE(
        params["dim"],
        SpheroSpec(
            core_experts=params["core_experts"],
            univ_experts=params["univ_experts"],
            compress_ratio=ratio,
            univ_factor=params["univ_hidden"] / params["core_hidden"],
            **options,
        ),
    )
    matrix = layer.phi.detach().flatten(1)
    core, univ = layer.core_experts, layer.univ_experts
    bound = (core.hidden * core.dim) ** -0.5
    largest = core.vit_fc1.weight.abs().max()
    if not 0.5 * bound < largest <= bound or (core.hidden, univ.hidden) != (
        params["core_hidden"],
        params["univ_hidden"],
    ):
        raise ValueError(f"largest weight {largest}, bound {bound}, hidden widths {core.hidden}, {univ.hidden}")
    return {
        "out.gram": matrix @ matrix.t() if params["gram_side"] == "rows" else matrix.t() @ matrix,
        "out.fc1_bias_sum": core.vit_fc1.bias.abs().sum(),
        "out.fc1_absmax_bound": torch.tensor([bound]),
        "out.scales": torch.stack(list(layer.scales)),
        "out.slot_norm_weight": layer.slot_norm.weight,
        "out.slot_norm_bias": layer.slot_norm.bias,
    }
