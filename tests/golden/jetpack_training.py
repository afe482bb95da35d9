"""Adapters of MoE Jetpack's models and recipe: transformers, key layout, losses, parameter groups, schedule, steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moe.algorithms._jetpack_recipe import KeyRule, RateSpec, ScheduleSpec, accumulation, parameter_rules
from moe.batch_mix import apply_mix, draw_mix
from moe.jetpack_specs import JetViTSpec
from moe.keymaps.jetpack import fit_to_model
from moe.layers.draws import injected
from moe.models.sphero_vit import build_sphero_vit, slot_layers
from tests.golden.jetpack_layers import Case, Tensors, below, soft_spec, sphero_spec
from tests.golden.registry import op

DIRECT = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "channels",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "init_values": "init_values",
    "pre_norm": "pre_norm",
    "class_token": "class_token",
    "reg_tokens": "reg_tokens",
    "no_embed_class": "no_embed_class",
    "fc_norm": "fc_norm",
    "drop_path_rate": "drop_path",
}


def vit_spec(params: Case, dense: bool = False) -> JetViTSpec:
    """Constructor options of the released model, or of its dense relative -> a spec."""
    fields = {ours: params[theirs] for theirs, ours in DIRECT.items() if theirs in params}
    groups = params.get("moe_groups_dict") or {}
    if not dense:
        slots = {"core_experts": 98, "univ_experts": 196, "num_experts": 197, **params}
        fields["moe"] = sphero_spec(slots) if params.get("if_dualpath") else soft_spec(slots)
    return JetViTSpec(
        **fields,
        global_pool=params.get("global_pool", "token"),
        moe_layers=tuple(params.get("moe_layers") or ()),
        shared_layers={name: tuple(blocks) for name, blocks in groups.items()},
        shared_queries={name: tuple(users) for name, users in (params.get("phi_groups_dict") or {}).items()},
        shared_options="official",
    )


def numbered(tensors: Tensors, prefix: str) -> list[torch.Tensor]:
    """``prefix0``, ``prefix1``, ... in order."""
    found = below(tensors, prefix)
    return [found[str(i)] for i in range(sum(name.isdigit() for name in found))]


@op("jetpack.moe_vit")
def moe_vit(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    model = build_sphero_vit(vit_spec(params), params["num_classes"])
    model.load_state_dict(below(tensors, "w."))
    model.train(params.get("training", False))
    x = tensors["in.x"].clone().requires_grad_()
    with injected(model, slot_layers(model), numbered(tensors, "in.noise."), below(tensors, "in.mask.")):
        features = model.forward_features(x)
        logits = model.forward_head(features)
    (logits * tensors["in.cot"]).sum().backward()
    gradients = {f"out.grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out.features": features, "out.logits": logits, "out.grad.x": x.grad, **gradients}


@op("jetpack.state_layout")
def state_layout(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    size = {"tiny": {"embed_dim": 192, "num_heads": 3}, "small": {"embed_dim": 384, "num_heads": 6}}
    kwargs = {**size[params["model"].split("_")[1]], **params["kwargs"]}
    with torch.device("meta"):
        model = build_sphero_vit(vit_spec(kwargs, dense="moe" not in params["model"]), kwargs.get("num_classes", 1000))
    state = model.state_dict()
    keys = [[name, list(value.shape)] for name, value in state.items()]
    if keys != params["keys"]:
        wrong = next((pair for pair in zip(keys, params["keys"], strict=False) if pair[0] != pair[1]), "lengths")
        raise ValueError(f"{len(keys)} keys, {len(params['keys'])} stored; first difference: {wrong}")
    return {
        "out.numel": torch.tensor([value.numel() for value in state.values()]),
        "out.num_params": torch.tensor(sum(p.numel() for p in model.parameters())),
    }


@op("jetpack.label_smooth_loss")
def label_smooth_loss(case: Case, tensors: Tensors) -> Tensors:
    logits = tensors["in.logits"].clone().requires_grad_()
    loss = F.cross_entropy(logits, tensors["in.target"], label_smoothing=case["params"]["eps"])
    loss.backward()
    return {"out.loss": loss, "out.grad.logits": logits.grad}


@op("jetpack.batch_mix")
def batch_mix(case: Case, tensors: Tensors) -> Tensors:
    params, x = case["params"], tensors["in.x"]
    generator = torch.Generator().manual_seed(params["seed"])
    draw = draw_mix(params["kind"], params["alpha"], x.shape, np.random.RandomState(params["seed"]), generator)
    if not torch.equal(draw.perm_B, tensors["in.perm"]) or draw.lam != params["lam_drawn"]:
        raise ValueError(f"draws differ: lam {draw.lam} instead of {params['lam_drawn']}")
    mixed, scores = apply_mix(x, tensors["in.scores"], draw)
    return {"out.x": mixed, "out.scores": scores}


def rate_spec(params: Case) -> RateSpec:
    return RateSpec(
        rule=params.get("constructor", "layer_decay"),
        lr=params.get("base_lr", params.get("lr")),
        weight_decay=params["weight_decay"],
        layer_decay=params["layer_decay_rate"] or 1.0,
        norm_decay_mult=params.get("norm_decay_mult", 0.0),
        bias_decay_mult=params.get("bias_decay_mult", 0.0),
        flat_decay_mult=params.get("flat_decay_mult"),
        custom_keys={key: KeyRule(**rule) for key, rule in params["custom_keys"].items()},
        parity="official",
    )


@op("jetpack.param_groups")
def param_groups(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    with torch.device("meta"):
        model = build_sphero_vit(vit_spec(params["model"]), params["model"].get("num_classes", 1000))
    rules = parameter_rules(model, rate_spec(params))
    names = [f"model.{rule.name}" for rule in rules]
    if names != params["names"]:
        raise ValueError(f"parameters differ: {sorted(set(names) ^ set(params['names']))[:4] or 'their order'}")
    return {
        "out.lr": torch.tensor([rule.lr for rule in rules]),
        "out.weight_decay": torch.tensor([rule.weight_decay for rule in rules]),
        "out.lr_scale": torch.tensor([rule.lr_scale for rule in rules]),
        "out.layer_id": torch.tensor([rule.layer_id for rule in rules], dtype=torch.int64),
    }


@op("jetpack.lr_schedule")
def lr_schedule(case: Case, tensors: Tensors) -> Tensors:
    params = dict(case["params"])
    base, epochs, per_epoch = params.pop("base_lrs"), params.pop("epochs"), params.pop("iters_per_epoch")
    schedule = ScheduleSpec(**params, step="epoch")
    factors = [schedule.factor(i, per_epoch) for i in range(epochs * per_epoch)]
    return {"out.lr": torch.tensor(factors, dtype=torch.float64)[:, None] * torch.tensor(base, dtype=torch.float64)}


@op("jetpack.train_steps")
def train_steps(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    model = build_sphero_vit(vit_spec(params["model"]), params["model"]["num_classes"])
    model.load_state_dict(below(tensors, "w."))
    model.train()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[rule.name]], "lr": rule.lr, "weight_decay": rule.weight_decay}
            for rule in parameter_rules(model, rate_spec(params))
        ],
        betas=tuple(params["betas"]),
        eps=params["eps"],
    )
    losses = []
    for i, (weight, update) in enumerate(accumulation(params["steps"], params["accumulate"])):
        with injected(model, slot_layers(model), numbered(tensors, f"in.noise.{i}.")):
            logits = model(tensors[f"in.x.{i}"])
        loss = F.cross_entropy(logits, tensors[f"in.target.{i}"], label_smoothing=params["label_smooth"])
        (loss * weight).backward()
        losses.append(loss.detach())
        if update:
            torch.nn.utils.clip_grad_norm_(model.parameters(), params["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
    outputs: dict[str, Any] = {"out.loss": torch.stack(losses)}
    for name, value in model.state_dict().items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            outputs[f"out.bias_qv.{name.split('.')[1]}"] = torch.cat([q, v])
        else:
            outputs[f"out.w.{name}"] = value
    return outputs


@op("jetpack.load_filter")
def load_filter(case: Case, tensors: Tensors) -> Tensors:
    params, state = case["params"], below(tensors, "w.")
    fitted = fit_to_model(
        state,
        patch_size=params["new_patch"],
        grid=(params["new_grid"], params["new_grid"]),
        num_prefix_tokens=params["num_prefix_tokens"],
        interpolation=params.get("interpolation", "bicubic"),
        antialias=params.get("antialias", True),
    )
    return {f"out.{name}": value for name, value in fitted.items()}
