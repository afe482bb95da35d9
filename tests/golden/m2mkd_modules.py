"""Adapters of m2mKD's network operations: ViT in stages, split, assembly, V-MoE."""

from __future__ import annotations

from typing import Any

import torch

from moe.conversion.modules import assemble_hybrids, assemble_stages, load_assembled, split_state
from moe.keymaps.m2mkd import all_official_names, from_official, official_names, to_official
from moe.models.vit_specs import ViTSpec, VMoESpec, position_of, spans_of
from moe.models.vit_stages import ViTStages, resize_positions
from moe.models.vmoe import VMoE, build_vit
from moe.param_groups import decays
from tests.golden.registry import op

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

PARTS = {0: "first", -1: "last"}


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def expect(params: Case, **results: Any) -> None:
    """Results that a case lists among its parameters; lists of names count as sets."""
    for key, value in results.items():
        if key in params and params[key] != value:
            raise ValueError(f"{key} is {value!r} instead of {params[key]!r}")


def vit_spec(params: Case, depths: list[int], num_classes: int) -> ViTSpec:
    """The spec of a dense network; keys that a case leaves out have OPS.md's values."""
    return ViTSpec(
        image_size=params.get("img_size", 8),
        patch_size=params.get("patch_size", 4),
        dim=params["embed_dim"],
        heads=params["num_heads"],
        mlp_ratio=params.get("mlp_ratio", 2),
        qkv_bias=params.get("qkv_bias", True),
        ln_eps=params.get("ln_eps", 1e-6),
        num_classes=num_classes,
        depths=tuple(depths),
    )


def vmoe_spec(kwargs: Case, pairs: int | None = None) -> VMoESpec:
    """The spec of a V-MoE or, with ``pairs`` positions in the meta model, of one student module."""
    part = "whole"
    if kwargs["is_student"]:
        index = kwargs["idx"] if pairs is None else position_of(kwargs["idx"], pairs)
        part = "last" if pairs is not None and index == pairs - 1 else PARTS.get(index, "middle")
    return VMoESpec(
        image_size=kwargs["img_size"],
        patch_size=kwargs["patch_size"],
        dim=kwargs["embed_dim"],
        heads=kwargs["num_heads"],
        mlp_ratio=kwargs["mlp_ratio"],
        qkv_bias=kwargs["qkv_bias"],
        num_classes=kwargs["num_classes"],
        depths=tuple(kwargs["divided_depths"]),
        part=part,
        moe_blocks=tuple(kwargs["moe_pos"] or ()),
        num_experts=kwargs["num_expert"],
        pre_stitch=tuple(kwargs["pre_stitch_pos"] or ()),
        post_stitch=tuple(kwargs["post_stitch_pos"] or ()),
        stitch_dim=kwargs["stitch_dim"],
    )


def load_vit(spec: ViTSpec, state: Tensors) -> ViTStages:
    """A network with a case's weights, in training mode (no drop path, so that nothing is random)."""
    model = build_vit(spec)
    model.load_state_dict(from_official(state))
    return model


def decay_names(module: torch.nn.Module) -> dict[str, list[str]]:
    """Official names by whether they decay, sorted."""
    found: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name, parameter in module.named_parameters():
        key = "decay" if decays(name, parameter) else "no_decay"
        found[key] += official_names(name, parameter.shape[0] if parameter.ndim else 1)
    return {key: sorted(names) for key, names in found.items()}


@op("m2mkd.vit_stages")
def vit_stages(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    model = load_vit(vit_spec(params, params["divided_depths"], params["num_classes"]), below(tensors, "w."))
    images = x = tensors["in.images"]
    outputs = {}
    for index, (start, end) in enumerate(params["spans"]):
        x = outputs[f"out.span{index}"] = model(x, start, end)
    return {**outputs, "out.logits": model(images)}


@op("m2mkd.teacher_split")
def teacher_split(case: Case, tensors: Tensors) -> Tensors:
    params, state = case["params"], below(tensors, "w.")
    depths, patch = params["divided_depths"], state["patch_embed.proj.weight"].shape[-1]
    stages = split_state(from_official(state), depths)
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    shape = {**params, "patch_size": patch, "img_size": grid * patch, "mlp_ratio": hidden / params["embed_dim"]}
    shape["qkv_bias"] = "blocks.0.attn.qkv.bias" in state
    spec = vit_spec(shape, depths, state["head.weight"].shape[0])
    for index, stage in enumerate(stages):
        build_vit(spec.stage(index)).load_state_dict(stage)
    expect(
        {**params, "all_state_dict_keys": sorted(params["all_state_dict_keys"])},
        spans=[list(span) for span in spans_of(depths)],
        stage_keys={str(index): sorted(stage) for index, stage in enumerate(stages)},
        all_state_dict_keys=all_official_names(spec),
    )
    return {f"out.stage{i}.{name}": value for i, stage in enumerate(stages) for name, value in stage.items()}


@op("m2mkd.teacher_assembly")
def teacher_assembly(case: Case, tensors: Tensors) -> Tensors:
    depths = case["params"]["divided_depths"]
    names = range(len(depths))
    hybrids = [[below(tensors, f"in.hybrid{i}.stage{j}.") for j in names] for i in names]
    return {f"out.{name}": value for name, value in assemble_hybrids(hybrids, depths).state.items()}


@op("m2mkd.vmoe_assembly")
def vmoe_assembly(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    depths, keep = params["divided_depths"], (params["pre_stitch_pos"] or (), params["post_stitch_pos"] or ())
    students = [from_official(below(tensors, f"in.student{i}.")) for i in range(len(depths))]
    assembled = assemble_stages(students, depths, *keep)
    state = assembled.state
    patch, grid = state["patch_embed.proj.weight"].shape[-1], round((state["pos_embed"].shape[1] - 1) ** 0.5)
    moe = tuple(i for i in range(sum(depths)) if f"blocks.{i}.mlp.experts.w1" in state)
    hidden = state[f"blocks.{moe[0]}.mlp.experts.w1"].shape[1] if moe else state["blocks.0.mlp.fc1.weight"].shape[0]
    model = VMoE(
        VMoESpec(
            image_size=grid * patch,
            patch_size=patch,
            dim=params["embed_dim"],
            heads=1,
            mlp_ratio=hidden / params["embed_dim"],
            qkv_bias="blocks.0.attn.qkv.bias" in state,
            num_classes=state["head.weight"].shape[0],
            depths=tuple(depths),
            moe_blocks=moe,
            num_experts=params["num_expert"],
            pre_stitch=tuple(keep[0]),
            post_stitch=tuple(keep[1]),
            stitch_dim=params["stitch_dim"],
        )
    )
    load_assembled(model, assembled)
    return {f"out.{name}": value for name, value in to_official(model.state_dict()).items()}


@op("m2mkd.pos_embed_resize")
def pos_embed_resize(case: Case, tensors: Tensors) -> Tensors:
    return {"out.pos_embed": resize_positions(tensors["in.pos_embed"], case["params"]["new_grid"])}
