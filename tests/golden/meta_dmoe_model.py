"""Adapters of Meta-DMoE's model operations: aggregator, token mask, losses, meta step, checkpoint keys."""

from __future__ import annotations

from typing import Any

import torch

from moe.aggregator import Aggregator, mask_tokens
from moe.inner import inner_step, uniform_rates
from moe.keymaps.meta_dmoe import backbone_of, backbone_shapes, selector_shapes
from moe.losses import l2_loss as project_l2_loss
from moe.losses import task_of
from moe.meta_step import Episode, EpisodeModule, teacher
from moe.specs import MetaStepSpec
from moe.student import Layout, Student, student_view
from tests.golden.registry import op
from tests.golden.toys import toy_classifier
from workers.schedules import constant, cosine_warmup

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

LAYOUTS = {
    "toy_res": Layout("children", "fc"),
    "toy_res_block": Layout("children", "fc"),
    "toy_dense": Layout("features", "classifier"),
}


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_aggregator(params: Case, num_outputs: int, dim: int, state: Tensors) -> Aggregator:
    """The aggregator of a case, in evaluation mode."""
    aggregator = Aggregator(
        dim,
        num_outputs,
        params["depth"],
        params["heads"],
        params["mlp_dim"] / dim,
        params.get("dropout", 0.1),
        params.get("pool", "mean"),
    )
    aggregator.load_state_dict(state)
    return aggregator.eval()


def load_student(params: Case, state: Tensors) -> Student:
    """A toy backbone in student form; extractor weights (no classifier) keep a head that nobody uses."""
    stem = next(value.shape[0] for value in state.values() if value.ndim == 4 and value.shape[1] == 3)
    classifier = toy_classifier(params["backbone"], stem, params["dim"], params["num_classes"])
    student = student_view(classifier, LAYOUTS[params["backbone"]])
    missing, unexpected = student.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("classifier.") for name in missing):
        raise ValueError(f"Weights do not fit: missing {missing}, unexpected {unexpected}.")
    return student.eval()


def qkv_rule(name: str, value: torch.Tensor) -> Tensors:
    """The key third of the fused bias is not compared."""
    if not name.endswith("in_proj_bias"):
        return {name: value}
    q, _, v = value.chunk(3)
    return {f"{name}_q": q, f"{name}_v": v}


@op("meta_dmoe.aggregator")
def aggregator(case: Case, tensors: Tensors) -> Tensors:
    params, state = case["params"], below(tensors, "w.")
    module = load_aggregator(params, params["out_dim"], tensors["in.x"].shape[-1], state)
    x = tensors["in.x"].clone().requires_grad_()
    out = module(x)
    torch.autograd.backward([out.feat_BD, out.logits_BK], [tensors["in.cot_feat"], tensors["in.cot_logits"]])
    gradients = {f"out.grad.{name}": p.grad for name, p in module.named_parameters()}
    return {"out.feat": out.feat_BD, "out.logits": out.logits_BK, "out.grad.x": x.grad, **gradients}


@op("meta_dmoe.mask_feat")
def mask_feat(case: Case, tensors: Tensors) -> Tensors:
    mode = "drop" if case["params"]["exclude"] else "zero"
    return {"out.tokens": mask_tokens(tensors["in.feat"].transpose(1, 2), tensors["in.expert"], mode)}


@op("meta_dmoe.l2_loss")
def l2_loss(case: Case, tensors: Tensors) -> Tensors:
    given, target = (tensors[f"in.{name}"].clone().requires_grad_() for name in ("input", "target"))
    loss = project_l2_loss(given, target)
    loss.backward()
    return {"out.loss": loss, "out.grad.input": given.grad, "out.grad.target": target.grad}


@op("meta_dmoe.checkpoint_keys")
def checkpoint_keys(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    backbone, outputs, dim = backbone_of(params["dataset"]), params["num_classes"], params["feat_dim"]
    parts = {part: backbone_shapes(part, backbone, outputs) for part in ("student", "expert", "expert_feature")}
    parts["selector"] = selector_shapes(dim, outputs, params["depth"], params["heads"], params["mlp_dim"] / dim)
    return {
        f"out.{part}.{name}": torch.tensor(shape, dtype=torch.int64)
        for part, shapes in parts.items()
        for name, shape in shapes.items()
    }


def first_step(module: EpisodeModule, episode: Episode, config: MetaStepSpec) -> Tensors:
    """What the case stores of step 0 besides gradients."""
    target = teacher(module.aggregator, episode, config)
    rates = uniform_rates(module.student, config.inner_lr)
    inner = inner_step(module.student, episode.support, target, rates)
    with torch.no_grad():
        return {
            "out.tokens": mask_tokens(episode.tokens_SED, episode.owners_S, config.exclusion),
            "out.teacher": target,
            "out.student_support": module.student.extract(episode.support),
            "out.logits_before": module.student(episode.query),
            "out.logits_query": module.student.run(episode.query, inner.adapted).logits_BK,
            **{f"out.adapted.{name}": value for name, value in inner.adapted.items()},
        }


def parameters(module: EpisodeModule) -> dict[str, torch.nn.Parameter]:
    """``student.*`` and ``selector.*``, without the aggregator's head."""
    student = {f"student.{name}": p for name, p in module.student.named_parameters()}
    selector = {f"selector.{name}": p for name, p in module.aggregator.named_parameters() if not name.startswith("mlp")}
    return {**student, **selector}


@op("meta_dmoe.meta_step")
def meta_step(case: Case, tensors: Tensors) -> Tensors:
    params = case["params"]
    experts = [load_student(params, below(tensors, f"w.expert.{e}.")) for e in range(params["num_experts"])]
    selector = load_aggregator(params, params["num_classes"], params["dim"], below(tensors, "w.selector."))
    config = MetaStepSpec(inner_lr=params["ilr"], loss_before=True)
    student = load_student(params, below(tensors, "w.student."))
    module = EpisodeModule(student, selector, config, task_of(params["num_classes"]))
    optimizers = (
        torch.optim.Adam(student.parameters(), lr=params["slr"]),
        torch.optim.Adam(selector.parameters(), lr=params["tlr"]),
    )
    per_epoch = params["iters_per_epoch"]
    cosine = params["student_schedule"] == "cosine_warmup"
    multiplier = cosine_warmup(per_epoch, per_epoch * params["num_epochs"]) if cosine else constant()
    outputs: Tensors = {}
    rows: list[list[float]] = []
    for step in range(params["steps"]):
        images, labels, size = tensors[f"in.x.{step}"], tensors[f"in.y.{step}"], params["sup_size"]
        with torch.no_grad():
            tokens = torch.stack([expert.extract(images[:size]) for expert in experts], dim=1)
        owners = tensors[f"in.expert.{step}"]
        episode = Episode(images[:size], images[size:], labels[size:], tokens, owners)
        if step == 0:
            outputs |= first_step(module, episode, config)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = module(episode)
        losses.total.backward()
        if step == 0:
            outputs |= {f"out.grad.{name}": p.grad.clone() for name, p in parameters(module).items()}
        optimizers[0].param_groups[0]["lr"] = params["slr"] * multiplier(step)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        rows.append([*(float(losses.parts[n]) for n in ("inner_loss", "loss_before", "query_loss")), *rates])
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in parameters(module).items():
        outputs |= {f"out.new.{key}": value for key, value in qkv_rule(name, parameter.detach()).items()}
    names = ("inner_loss", "loss_before", "loss_query", "lr_student", "lr_selector")
    return outputs | {f"out.{name}": column for name, column in zip(names, torch.tensor(rows).unbind(1), strict=True)}
