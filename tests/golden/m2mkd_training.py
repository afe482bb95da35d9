"""Adapters of m2mKD's training operations: losses, teaching pairs, V-MoE steps, schedule, mixing, samplers, subsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moe.algorithms._m2mkd_phases import rates_after_step
from moe.conversion.kd import kd_loss
from moe.conversion.kd_specs import KDSpec
from moe.conversion.modules import stage_module
from moe.conversion.teaching import TeachingPair
from moe.keymaps.m2mkd import to_official
from moe.mixup import MixDraw, mix
from moe.models.nac.draws import Draws
from moe.models.nac.specs import StudentSpec
from moe.models.nac.students import build_student
from moe.param_groups import decay_groups
from tests.golden.m2mkd_modules import below, decay_names, expect, load_vit, vit_spec, vmoe_spec
from tests.golden.registry import check, op
from tests.golden.replay import compare
from workers.few_shot import class_subset, fewshot_split, repeated_indices

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

SMALL = 1e-5  # below it the sign of AdamW's first step is rounding (OPS.md, new_weight_rule)


def kd_spec(params: Case) -> KDSpec:
    return KDSpec(kind=params["distillation_type"], alpha=params["alpha_teacher"], tau=params["tau"])


@op("m2mkd.kd_loss")
def kd(case: Case, tensors: Tensors) -> Tensors:
    student, teacher = (tensors[f"in.{who}_logits"].clone().requires_grad_() for who in ("student", "teacher"))
    loss = kd_loss(student, teacher, tensors["in.target"], kd_spec(case["params"])).total
    loss.backward()
    if teacher.grad is not None:
        raise ValueError("the teacher got a gradient")
    return {"out.loss": loss, "out.grad.student_logits": student.grad}


def one_step(module: nn.Module, loss: torch.Tensor, params: Case) -> Tensors:
    """Backward, optional clipping, one AdamW step; official names."""
    names = {key: sorted(params[key]) for key in ("decay", "no_decay")}
    expect(names, **decay_names(module))
    loss.backward()
    limit = params.get("clip_grad")
    norm = nn.utils.clip_grad_norm_(module.parameters(), torch.inf if limit is None else limit)
    groups = [
        {"params": group.parameters, "lr": group.lr, "weight_decay": group.weight_decay}
        for group in decay_groups(module, params["lr"], params["weight_decay"])
    ]
    gradients = to_official({name: p.grad for name, p in module.named_parameters()})
    outputs = {f"out.grad.{name}": value.clone() for name, value in gradients.items()}
    betas, eps = tuple(params.get("betas", (0.9, 0.999))), params.get("eps", 1e-8)
    torch.optim.AdamW(groups, betas=betas, eps=eps).step()
    weights = to_official({name: p.detach() for name, p in module.named_parameters()})
    return {**outputs, **{f"out.new.{name}": value for name, value in weights.items()}, "out.grad_norm": norm}


@op("m2mkd.vmoe_forward")
def vmoe_forward(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    model = load_vit(vmoe_spec(params["kwargs"]), below(tensors, "w."))
    logits = model(tensors["in.images"])
    loss = kd_loss(logits, None, tensors["in.target"], KDSpec(kind="none")).total
    return {"out.logits": logits.detach(), "out.loss": loss.detach(), **one_step(model, loss, params)}


def pair_of(params: Case, tensors: Tensors, student: nn.Module) -> TeachingPair:
    """The teaching pair of a case."""
    classes = tensors["w.meta.head.weight"].shape[0]
    meta = load_vit(vit_spec(params, params["meta_divided_depths"], classes), below(tensors, "w.meta."))
    spec = vit_spec(params, params["teacher_divided_depths"], classes)
    teacher = load_vit(spec, below(tensors, "w.teacher."))
    stage = stage_module(teacher, params["teacher_block_index"])
    return TeachingPair(meta, stage, student, params["idx"], kd_spec(params))


def pair_step(params: Case, tensors: Tensors, student: nn.Module, inputs: Case) -> Tensors:
    pair = pair_of(params, tensors, student)
    output = pair(tensors["in.images"], inputs=inputs)
    loss = pair.losses(output, tensors["in.target"]).total
    results = {
        "out.student_logits": output.student_BK.detach(),
        "out.teacher_logits": output.teacher_BK,
        "out.loss": loss.detach(),
    }
    if output.hidden_BTD is not None:
        results["out.meta_hidden"] = output.hidden_BTD
    return {**results, **one_step(pair.student, loss, params)}


@op("m2mkd.teaching_pair_vmoe")
def teaching_pair_vmoe(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    spec = vmoe_spec(params["student_kwargs"], len(params["meta_divided_depths"]))
    return pair_step(params, tensors, load_vit(spec, below(tensors, "w.student.")), {})


@op("m2mkd.teaching_pair_nac")
def teaching_pair_nac(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    student = build_student(StudentSpec.model_validate({**params["student_cfg"], "student": params["student"]}))
    student.load_official(below(tensors, "w.student."))
    inputs = {name: tensors[f"in.{name}"] for name in ("codes", "states") if f"in.{name}" in tensors}
    return pair_step(params, tensors, student, {**inputs, "draws": Draws(below(tensors, "in.noise."))})


@check("m2mkd.teaching_pair_vmoe")
@check("m2mkd.teaching_pair_nac")
@check("m2mkd.vmoe_forward")
def compare_steps(case: Case, tensors: Tensors, outputs: Tensors) -> Iterator[str]:
    """As usual, but an entry whose gradient is nearly 0 may be off by the step that AdamW makes of its sign."""
    if "new_weight_rule" not in case["params"]:
        yield from compare(case, tensors, outputs)
        return
    answers = dict(outputs)
    for key in [key for key in tensors if key.startswith("out.new.") and key in outputs]:
        stored, answer = tensors[key], outputs[key]
        small = tensors[key.replace("out.new.", "out.grad.")].abs() < SMALL
        limit = case["atol"] + case["rtol"] * stored.abs() + 2 * case["params"]["lr"]
        if answer.shape == stored.shape:
            answers[key] = torch.where(small & ((answer - stored).abs() <= limit), stored, answer)
    yield from compare(case, tensors, answers)


@op("m2mkd.lr_schedule")
def lr_schedule(case: Case, tensors: Tensors) -> Tensors:
    return {"out.lr_after_step": torch.tensor(rates_after_step(**case["params"]))}


@op("m2mkd.mixup")
def mixup(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    centre = tuple(params["cy_cx"]) if params.get("cy_cx") is not None else None
    draw = MixDraw(params["beta_draw"], params["use_cutmix"], centre)
    images, target = mix(
        tensors["in.images"], tensors["in.labels"], draw, params["num_classes"], params["label_smoothing"]
    )
    return {"out.images": images, "out.target": target}


@op("m2mkd.repeated_aug_sampler")
def repeated_aug_sampler(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    index = repeated_indices(
        params["dataset_len"], params["world_size"], params["rank"], params["epoch"], params["repeats"]
    )
    expect(params, selected=len(index))
    return {"out.index": torch.from_numpy(index)}


@op("m2mkd.fewshot_split_official")
def fewshot_split_official(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    counts = (params["k_way"], params["n_shot"], params["val_sample"], params["seed"])
    episode = fewshot_split(tensors["in.targets"].numpy(), *counts, protocol="official")
    expect(params, chosen_classes_in_draw_order=list(episode.classes), overlap_train_val=episode.overlap)
    parts = ("train_index", "train_label", "val_index", "val_label")
    return {f"out.{part}": torch.from_numpy(getattr(episode, part)) for part in parts}


@op("m2mkd.ood_class_subset")
def ood_class_subset(case: Case, tensors: Tensors) -> Tensors:
    logits = tensors["in.logits"]
    base = {1000: "imagenet-1k", 200: "tiny-imagenet-200"}[logits.shape[1]]
    kept = torch.from_numpy(class_subset(base, case["params"]["wnids_r"]))
    return {"out.kept_index": kept, "out.logits": logits[:, kept]}
