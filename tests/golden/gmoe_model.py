"""Adapters of GMoE's model operations: blocks, vision transformer, training step, upcycling, checkpoint keys, CNN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moe.algorithms.gmoe import Method
from moe.conversion.upcycle import upcycle as upcycle_state
from moe.keymaps.gmoe import COUNT, from_official, to_official
from moe.models.gmoe_spec import GMoESpec
from moe.models.mnist_cnn import MnistCNN
from moe.models.vit import BlockDraws, ViTShape, build_vit, run_block, run_vit
from tests.golden.registry import check, op
from tests.golden.replay import compare

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def spec_of(params: Case, kinds: list[str]) -> GMoESpec | None:
    if "S" not in kinds:
        return None
    return GMoESpec(
        pattern=tuple(kinds),
        num_experts=params["num_experts"],
        top_k=params.get("top_k", 1),
        gate="linear" if params.get("router") == "top" else "cosine",
        projection=params.get("proj_dim", 256),
        capacity_factor=params.get("capacity_factor", 1.5),
        eval_capacity=True,
        gate_noise=params.get("gate_noise", 1.0),
        aux_weight=params.get("aux_loss_weight", 0.01),
        dropout=params.get("moe_drop_p", 0.1),
        drop_path=params.get("drop_path_rate", params.get("drop_path", 0.0)),
    )


def build(params: Case, kinds: list[str], **shape: Any) -> torch.nn.Module:
    sizes = {
        "image_size": params.get("img_size", 16),
        "patch_size": params.get("patch_size", 8),
        "channels": params.get("in_chans", 3),
        "depth": len(kinds),
        "num_heads": params.get("num_heads", 1),
        "mlp_ratio": params.get("mlp_ratio", 4.0),
        "qkv_bias": params.get("qkv_bias", True),
        "distilled": params.get("distilled", False),
        "drop_path": params.get("drop_path_rate", params.get("drop_path", 0.0)),
        "norm_eps": params.get("norm_eps", 1e-6),
    }
    return build_vit(ViTShape(**{**sizes, **shape}), params.get("num_classes", 1), spec_of(params, kinds))


def draws_of(tensors: Tensors, prefix: str, suffix: str = "") -> BlockDraws:
    names = ("noise", "moe_drop_mask", "drop_path_mask_attn", "drop_path_mask_mlp")
    return BlockDraws(*(tensors.get(f"{prefix}{name}{suffix}") for name in names))


def gradients(module: torch.nn.Module, prefix: str) -> Tensors:
    """Gradients under official names; zeros for weights that nothing used."""
    own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    return {f"{prefix}{name}": g for name, g in to_official(own, prefix="").items() if not name.endswith(COUNT)}


@op("gmoe.vit_block")
def vit_block(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    # The second of two blocks, because the first never has stochastic depth.
    vit = build(params, ["F", params["kind"]], dim=params["dim"])
    block = vit.blocks[1].train(params["training"])
    block.load_state_dict(from_official(below(tensors, "w.")))
    x = tensors["in.x"].clone().requires_grad_()
    out = run_block(block, x, draws_of(tensors, "in."), attention_map=True)
    objective = (out.y_BND * tensors["in.cotangent"]).sum()
    answer = {"out.y": out.y_BND, "out.attn": out.map_BhNN}
    if out.record is not None:
        routing = out.record.routing
        answer["out.aux_loss"] = params["aux_loss_weight"] * routing.balance
        answer |= {"out.indices": routing.experts_NK[:, 0], "out.locations": routing.seats_NK[:, 0]}
        answer["out.capacity"] = routing.capacity
        objective = objective + answer["out.aux_loss"]
    objective.backward()
    return {**answer, "out.objective": objective, "out.grad.x": x.grad, **gradients(block, "out.grad.")}


def load_model(params: Case, tensors: Tensors) -> torch.nn.Module:
    vit = build(params, params["moe_layers"], dim=params["embed_dim"])
    vit.load_state_dict(from_official(below(tensors, "w.")))
    return vit.train(params.get("training", True))


@op("gmoe.vit_model")
def vit_model(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    vit = load_model(params, tensors)
    draws = {i: draws_of(tensors, "in.", f".{i}") for i in range(params["depth"])}
    out = run_vit(vit, tensors["in.x"], draws)
    objective = (out.logits_BK * tensors["in.cotangent"]).sum() + sum(out.aux.values())
    aux = torch.stack(list(out.aux.values())) if out.aux else torch.zeros(0)
    answer = {"out.logits": out.logits_BK, "out.aux_losses": aux}
    if out.logits_dist_BK is not None:
        answer["out.logits_dist"] = out.logits_dist_BK
        objective = objective + (out.logits_dist_BK * tensors["in.cotangent_dist"]).sum()
    for i, record in out.records.items():
        answer[f"out.indices.{i}"] = record.routing.experts_NK[:, 0]
        answer[f"out.kept.{i}"] = record.routing.kept_NK[:, 0]
    objective.backward()
    return {**answer, "out.objective": objective, **gradients(vit, "out.grad.")}


@op("gmoe.train_step")
def train_step(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    vit = load_model(params, tensors)
    method = Method(Method.preset("pacs"))
    optimizer = torch.optim.Adam(
        vit.parameters(), params["lr"], params["betas"], params["eps"], weight_decay=params["weight_decay"]
    )
    losses, aux, first = [], [], {}
    for step in range(params["steps"]):
        given = f"in.step{step}."
        batch = [(tensors[f"{given}x{d}"], tensors[f"{given}y{d}"]) for d in range(params["n_domains"])]
        draws = {i: draws_of(tensors, given, f".{i}") for i in range(params["depth"])}
        loss = method.loss(vit, batch, draws)
        optimizer.zero_grad()
        loss.total.backward()
        first = first or gradients(vit, "out.step0.grad.")
        optimizer.step()
        losses.append(loss.total.detach())
        aux.append(loss.parts["aux"])
    final = {f"out.w.{n}": v for n, v in to_official(vit.state_dict(), prefix="").items() if not n.endswith(COUNT)}
    return {"out.losses": torch.stack(losses), "out.loss_aux": torch.stack(aux), **first, **final}


@check("gmoe.train_step")
def first_gradients_where_stored(case: Case, tensors: Tensors, outputs: Tensors) -> Iterable[str]:
    """Only some cases store the gradients of step 0."""
    gradients_stored = any(name.startswith("out.step0.grad.") for name in tensors)
    wanted = {n: v for n, v in outputs.items() if gradients_stored or not n.startswith("out.step0.grad.")}
    return compare(case, tensors, wanted)


@op("gmoe.upcycle")
def upcycle(case: Case, tensors: Tensors) -> Tensors:
    params, dense = case["params"], below(tensors, "in.")
    hidden, dim = dense["blocks.0.mlp.fc1.weight"].shape
    vit = build(
        params,
        params["moe_layers"],
        dim=dim,
        mlp_ratio=(hidden + 0.5) / dim,
        distilled="dist_token" in dense,
        num_heads=1,
    )
    state, fresh = upcycle_state(dense, vit)
    loaded = to_official({name: value for name, value in state.items() if name not in fresh}, prefix="")
    return {f"out.{name}": value for name, value in loaded.items() if not name.endswith(COUNT)}


@op("gmoe.checkpoint_keys")
def checkpoint_keys(case: Case, tensors: Tensors) -> dict[str, Any]:
    params = case["params"]
    with torch.device("meta"):
        vit = build(params, params["moe_layers"], dim=params["embed_dim"])
    state = to_official(vit.state_dict(), prefix="")
    keys = [[name, list(value.shape)] for name, value in state.items()]
    return {"expected": {"state_dict": keys, "n_parameters": sum(p.numel() for p in vit.parameters())}}


@op("gmoe.mnist_cnn")
def mnist_cnn(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    network = MnistCNN(params["in_channels"])
    own = dict(network.named_parameters())
    norms = {f"bn{i}.weight" for i in range(4)}
    with torch.no_grad():
        for i, name in enumerate(params["parameter_order"]):
            wave = 0.05 * torch.sin(0.37 * torch.arange(own[name].numel(), dtype=torch.float64) + i + 1)
            own[name].copy_((wave + (name in norms)).reshape(own[name].shape))
    x = tensors["in.x"].clone().requires_grad_()
    features = network(x)
    (features * tensors["in.cotangent"]).sum().backward()
    norms_of_gradients = torch.stack([own[name].grad.norm() for name in params["parameter_order"]])
    return {"out.features": features, "out.grad.x": x.grad, "out.grad_norms": norms_of_gradients}
