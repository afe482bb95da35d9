"""Adapters of Meta-DMoE's data, training-loop and evaluation operations; the model's are in ``meta_dmoe_model``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moe.adaptation.base import make
from moe.aggregator import Aggregator
from moe.losses import predict, task_of
from moe.student import Student
from tests.golden.registry import op
from tests.golden.toys import stem_width, toy_classifier, toy_student
from workers import metrics, sampling
from workers.aggregate import aggregator_loss
from workers.checkpoints import CheckpointDir
from workers.datasets.base import DATASETS, DatasetInfo, DomainData
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.engines.torch import TorchEngine
from workers.evaluation import EvaluationOptions, evaluate_methods
from workers.evaluation_methods import Method, TokenSource
from workers.loop import FitResult, fit
from workers.protocols import DomainRows
from workers.train_model import TrainSettings, loop_spec, supervised_loss
from workers.transforms import Transform, TransformSpec, transform_for

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

OFFICIAL_NAMES = {"camelyon": "camelyon17"}  # the public code's names where WILDS' differ

# Metadata columns of the official data sets, in their order.
FIELDS = {
    "iwildcam": ("location", "sequence", "year", "month", "day", "hour", "minute", "second", "y"),
    "camelyon": ("hospital", "slide", "y"),
    "rxrx1": ("cell_type", "experiment", "plate", "well", "site", "y"),
    "fmow": ("region", "year", "y"),
}


@op("meta_dmoe.expert_split")
def expert_split(case: Case, tensors: Tensors) -> Case:
    params = case["params"]
    column = tensors["in.metadata"].numpy()[:, params["column"]]
    split = sampling.domain_groups(column, params["num_experts"], params["seed"])
    domains = [domain for group in split.groups for domain in group]
    return {
        "out.domains": torch.tensor(domains),
        "out.expert": torch.tensor([split.owner[domain] for domain in domains]),
        "out.sizes": torch.tensor([len(group) for group in split.groups]),
    }


@op("meta_dmoe.group_index")
def group_index(case: Case, tensors: Tensors) -> Case:
    group, count = sampling.group_index(
        tensors["in.metadata"].numpy(), case["params"]["fields"], case["params"]["groupby"]
    )
    return {"out.group": torch.from_numpy(group), "out.n_groups": torch.tensor(count)}


@op("meta_dmoe.group_sampler")
def group_sampler(case: Case, tensors: Tensors) -> Case:
    params = case["params"]
    batches = sampling.group_batches(
        tensors["in.group"].numpy(),
        params["batch_size"],
        params["numpy_seed"],
        params["n_groups_per_batch"],
        params["uniform_over_groups"],
        params["distinct_groups"],
        params["epochs"],
    )
    return {"out.batches": torch.from_numpy(batches)}


@op("meta_dmoe.domain_batches")
def domain_batches(case: Case, tensors: Tensors) -> Case:
    params = case["params"]
    cardinality = {name: highest + 1 for name, highest in params["field_max"].items()}
    group, _ = sampling.group_index(tensors["in.metadata"].numpy(), params["fields"], params["groupby"], cardinality)
    domains = sampling.domain_batches(group, params["batch_size"])
    batches = [batch for _, parts in domains for batch in parts]
    return {
        "out.domain_order": torch.tensor([domain for domain, _ in domains]),
        "out.row_index": torch.from_numpy(np.concatenate(batches)),
        "out.batch_sizes": torch.tensor([len(batch) for batch in batches]),
    }


@op("meta_dmoe.transform")
def transform(case: Case, tensors: Tensors) -> Case:
    params = case["params"]
    info = DATASETS.load(OFFICIAL_NAMES.get(params["dataset"], params["dataset"])).INFO
    nominal = params["original_resolution"]
    apply = transform_for(info, None, params["train"], original_resolution=tuple(nominal) if nominal else None)
    result = apply(tensors["in.image"].numpy().astype(np.uint8))
    stride = params["stride"]
    return {
        "out.shape": torch.tensor(result.shape),
        "out.sub": result[:, ::stride, ::stride],
        "out.channel_mean": result.mean(dim=(1, 2)),
        "out.channel_std": result.std(dim=(1, 2)),
    }


@op("meta_dmoe.fmow_metrics")
def fmow_metrics(case: Case, tensors: Tensors) -> Case:
    scored = metrics.Scored(
        tensors["in.pred"].numpy(), tensors["in.y"].numpy(), tensors["in.metadata"].numpy(), case["params"]["fields"]
    )
    scores = metrics.compute(["accuracy", "worst_region_accuracy"], scored)
    return {
        "out.accuracy": torch.tensor(scores["accuracy"]),
        "out.worst_region": torch.tensor(scores["worst_region_accuracy"]),
    }


@op("meta_dmoe.wilds_eval")
def wilds_eval(case: Case, tensors: Tensors) -> Case:
    params = case["params"]
    group = params["group"]
    scored = metrics.Scored(
        tensors["in.pred"].numpy(),
        tensors["in.y"].numpy(),
        tensors["in.metadata"].numpy(),
        params["fields"],
        params["metadata_map"],
        group_field=group if isinstance(group, str) else "",
    )
    return {f"out.{name}": torch.tensor(value) for name, value in metrics.compute(params["metrics"], scored).items()}


class Recorder:
    """A reporter that keeps what the loop says after each update."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []

    def progress(self, done: int, total: int, **values: float) -> None:
        if "loss" in values:
            self.updates.append(values)

    def log(self, message: str) -> None:
        raise AssertionError(f"A fresh run has nothing to say: {message}")

    def check(self) -> None:
        return


def weights(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors below ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def stack(tensors: Tensors, prefix: str) -> list[torch.Tensor]:
    """``prefix0``, ``prefix1``, ... in order."""
    return [tensors[f"{prefix}{index}"] for index in range(sum(name.startswith(prefix) for name in tensors))]


def scores(case: Case, logits: torch.Tensor, labels: torch.Tensor, metadata: torch.Tensor, groups: Any = None) -> Case:
    params = case["params"]
    predictions = predict(task_of(params["num_classes"]), logits)
    fields = FIELDS[params["dataset"]]
    scored = metrics.Scored(predictions.numpy(), labels.numpy(), metadata.numpy(), fields, groups=groups)
    return metrics.compute(params["metric_names"], scored)


def supervised(
    case: Case, tensors: Tensors, module: nn.Module, view: Callable[[torch.Tensor], torch.Tensor], loss: Any
) -> tuple[FitResult, Case]:
    """Drive the project's loop over the stored batches; ``view`` makes the module's input of images."""
    params = case["params"]
    batches = list(zip(map(view, stack(tensors, "in.x.")), stack(tensors, "in.y."), strict=True))
    val_inputs = [view(images) for images in stack(tensors, "in.val_x.")]
    val_labels, val_metadata = (torch.cat(stack(tensors, f"in.val_{name}.")) for name in ("y", "metadata"))

    def evaluate(network: nn.Module, step: int) -> Case:
        with torch.no_grad():
            outputs = [network(inputs) for inputs in val_inputs]
        logits = torch.cat([out if isinstance(out, torch.Tensor) else out.logits_BK for out in outputs])
        return scores(case, logits, val_labels, val_metadata)

    settings = TrainSettings(
        batch_size=params["batch_size"],
        epochs=params["num_epochs"],
        lr=params["lr"],
        weight_decay=params.get("weight_decay", 0.0),
        schedule="cosine" if params.get("schedule", "").startswith("cosine") else "exponential",
        decay=params["decay_rate"],
        warmup_epochs=10,
        cadence="official",
        parity="official",
    )
    per_epoch = params["batches_per_epoch"]
    spec = loop_spec(settings, per_epoch * params["num_epochs"], per_epoch, 0, params["metric_names"][-1])
    group = ParamGroup("model", list(module.parameters()), settings.lr, settings.weight_decay)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            TorchEngine(module, [group], OptimizerOptions()),
            lambda step: [batches[step % per_epoch]],
            replace(spec, evaluate_last=False),
            recorder,
            CheckpointDir(Path(folder)),
            evaluate,
            loss,
        )
    return result, {
        "out.loss": torch.tensor([update["loss"] for update in recorder.updates]),
        "out.lr": torch.tensor([update["lr"] for update in recorder.updates]),
        "out.eval_iter": torch.tensor([e.step for e in result.evaluations], dtype=torch.int64),
        "out.eval_metrics": torch.tensor(
            [[e.scores[name] for name in params["metric_names"]] for e in result.evaluations]
        ).reshape(len(result.evaluations), len(params["metric_names"])),
        "out.saved_iter": torch.tensor([e.step for e in result.evaluations if e.selected], dtype=torch.int64),
    }


@op("meta_dmoe.expert_train")
def expert_train(case: Case, tensors: Tensors) -> Case:
    params, state = case["params"], weights(tensors, "w.model.")
    module = toy_classifier(params["backbone"], stem_width(state), params["dim"], params["num_classes"])
    module.load_state_dict(state)
    loss = supervised_loss(task_of(params["num_classes"]))
    result, outputs = supervised(case, tensors, module, lambda images: images, loss)
    outputs |= {f"out.final.{name}": value for name, value in result.last.items()}
    return outputs | {f"out.best.{name}": value for name, value in (result.best or {}).items()}


def student(case: Case, state: Tensors) -> Student:
    params = case["params"]
    network = toy_student(params["backbone"], stem_width(state), params["dim"], params["num_classes"])
    network.load_state_dict(
        {name: value for name, value in network.state_dict().items() if "classifier" in name} | state
    )
    return network.eval()


def experts(case: Case, tensors: Tensors) -> list[Student]:
    """The frozen experts; their extractor view is a student whose head is not looked at."""
    count = case["params"]["num_experts"]
    return [student(case, weights(tensors, f"w.expert.{index}.")) for index in range(count)]


def tokens_of(networks: list[Student], images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([network.extract(images) for network in networks], dim=1)


def aggregator(case: Case, tensors: Tensors) -> Aggregator:
    params = case["params"]
    module = Aggregator(
        params["dim"],
        params["num_classes"],
        params["depth"],
        params["heads"],
        params["mlp_dim"] / params["dim"],
        params.get("dropout", 0.0),
    )
    module.load_state_dict(weights(tensors, "w.selector."))
    return module.eval()


def without_key_bias(state: Tensors, dim: int) -> Tensors:
    """The key part of the fused bias has no true gradient, so only the query and value parts are stored."""
    outputs = {}
    for name, value in state.items():
        if name.endswith("in_proj_bias"):
            outputs |= {f"{name}_q": value[:dim], f"{name}_v": value[2 * dim :]}
        else:
            outputs[name] = value
    return outputs


@op("meta_dmoe.aggregator_pretrain")
def aggregator_pretrain(case: Case, tensors: Tensors) -> Case:
    networks = experts(case, tensors)
    loss = aggregator_loss(task_of(case["params"]["num_classes"]))
    module = aggregator(case, tensors)
    result, outputs = supervised(case, tensors, module, lambda images: tokens_of(networks, images), loss)
    final = without_key_bias(result.last, case["params"]["dim"])
    return outputs | {f"out.final.{name}": value for name, value in final.items()}


@op("meta_dmoe.adapt_eval")
def adapt_eval(case: Case, tensors: Tensors) -> Case:
    params, labels = case["params"], tensors["in.y"].numpy()
    task = task_of(params["num_classes"])
    data = arrays_as_data(params, tensors, task)
    starts = np.cumsum([0, *params["domain_sizes"]])
    domains = [
        DomainRows(domain, str(domain), np.arange(begin, min(begin + params["batch_size"], end)), np.arange(begin, end))
        for domain, begin, end in zip(params["domain_order"], starts, starts[1:], strict=False)
    ]
    teacher, networks = aggregator(case, tensors), experts(case, tensors)
    method = Method(
        "student_distill",
        "student",
        student(case, weights(tensors, "w.student.")),
        make("distill", {"inner_lr": params["ilr"]}, task),
    )
    result = evaluate_methods(
        data,
        domains,
        [method],
        Transform(TransformSpec(normalisation="none")),
        EvaluationOptions(batch_size=params["batch_size"], replicates=0),
        Recorder(),
        aggregator=teacher,
        tokens=TokenSource(experts=[network.extract for network in networks]),
    )
    scored, logits = result.methods[0], torch.from_numpy(result.logits["student_distill"])
    first = tensors["in.x"][: len(domains[0].adapt)]
    assert len(labels) == len(logits)
    return {
        "out.logits": logits,
        "out.pred": predict(task, logits),
        "out.inner_loss": torch.tensor([before for before, _ in scored.losses]),
        "out.teacher_first": teacher(tokens_of(networks, first)).feat_BD,
        "out.metrics": torch.tensor([scored.scores[name] for name in params["metric_names"]]),
    }


def arrays_as_data(params: Case, tensors: Tensors, task: Any) -> DomainData:
    """The stored, already normalised images as a data set whose adaptation domain is ``in.domain``."""
    images, labels = tensors["in.x"].numpy(), tensors["in.y"].numpy()
    metadata = np.column_stack([tensors["in.metadata"].numpy(), tensors["in.domain"].numpy()])
    names = tuple(params["metric_names"])
    info = DatasetInfo(
        name=params["dataset"],
        title=params["dataset"],
        task=task,
        num_outputs=params["num_classes"],
        channels=images.shape[1],
        image_size=images.shape[2:],
        domain_field="domain",
        group_fields=("domain",),
        metrics=names,
        selection_metric=names[-1],
        normalisation="none",
        licence="",
        source="",
    )
    fields = (*FIELDS[params["dataset"]], "domain")
    return DomainData(info, images, labels, metadata, fields, {"test": np.arange(len(labels))}, digest="")
