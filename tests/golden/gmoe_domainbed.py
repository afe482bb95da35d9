"""Adapters of the DomainBed operations: seeds, splits, sampling, hyper-parameters, sweeps, selection, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from tests.golden.registry import check, op
from tests.golden.replay import compare_json
from workers.domainbed import mnist, scores, selection
from workers.domainbed.hparams import default_hparams, random_hparams, run_hparams
from workers.domainbed.jobs import Sweep
from workers.domainbed.jobs import sweep_jobs as project_sweep_jobs
from workers.domainbed.loader import InfiniteBatches
from workers.domainbed.records import parse_record
from workers.domainbed.report import collect
from workers.domainbed.seeds import seed_hash as project_seed_hash
from workers.domainbed.splits import split_domain
from workers.domainbed.tables import render

Case = dict[str, Any]
Tensors = dict[str, torch.Tensor]

PROTOCOLS = {"domainbed": "domainbed_head", "gmoe": "gmoe_fork"}


@op("gmoe.seed_hash")
def seed_hash(case: Case, tensors: Tensors) -> Case:
    return {"out.hash": torch.tensor([project_seed_hash(*args) for args in case["params"]["args_list"]])}


@op("gmoe.dataset_split")
def dataset_split(case: Case, tensors: Tensors) -> Case:
    p = case["params"]
    outputs = {}
    for trial in p["trial_seeds"]:
        for env in p["envs"]:
            split = split_domain(p["n"], trial, env, p["holdout_fraction"], p["uda_holdout_fraction"])
            parts = {"in": split.in_, "out": split.out}
            if p["uda_holdout_fraction"]:
                parts["uda"] = split.uda
            outputs |= {f"out.trial{trial}.env{env}.{part}_keys": torch.from_numpy(k) for part, k in parts.items()}
    return outputs


@op("gmoe.balanced_weights")
def balanced_weights(case: Case, tensors: Tensors) -> Case:
    return {"out.weights": torch.from_numpy(scores.balanced_weights(tensors["in.labels"].numpy()))}


@op("gmoe.accuracy")
def accuracy(case: Case, tensors: Tensors) -> Case:
    batches = [(tensors[f"in.logits{i}"], tensors[f"in.labels{i}"]) for i in range(case["params"]["n_batches"])]
    return {"out.accuracy": torch.tensor(scores.accuracy(batches, tensors.get("in.weights")))}


@op("gmoe.infinite_loader")
def infinite_loader(case: Case, tensors: Tensors) -> Case:
    p = case["params"]
    generator = torch.Generator().manual_seed(p["seed"])
    batches = InfiniteBatches(p["n"], p["batch_size"], generator, tensors.get("in.weights"))
    return {"out.batches": torch.tensor(list(islice(batches, p["steps"])))}


def environments(dealt: mnist.Dealt) -> Case:
    outputs = {"out.permutation": torch.from_numpy(dealt.permutation)}
    for i, env in enumerate(dealt.environments):
        outputs |= {f"out.env{i}.x_u8": torch.from_numpy(env.x), f"out.env{i}.y": torch.from_numpy(env.y)}
    return outputs


@op("gmoe.rotated_mnist")
def rotated_mnist(case: Case, tensors: Tensors) -> Case:
    p = case["params"]
    generator = torch.Generator().manual_seed(p["seed"])
    pooled = tensors["in.images"].numpy(), tensors["in.labels"].numpy()
    return environments(mnist.rotated_mnist(*pooled, generator, p["environments"]))


@op("gmoe.colored_mnist")
def colored_mnist(case: Case, tensors: Tensors) -> Case:
    p = case["params"]
    generator = torch.Generator().manual_seed(p["seed"])
    pooled = tensors["in.images"].numpy(), tensors["in.labels"].numpy()
    return environments(mnist.colored_mnist(*pooled, generator, p["environments"]))


@op("gmoe.hparams")
def hparams(case: Case, tensors: Tensors) -> Case:
    p = case["params"]
    which = PROTOCOLS[p["registry"]], p["algorithm"]
    return {
        "expected": {
            dataset: {"default": default_hparams(*which, dataset)}
            | {f"seed{seed}": random_hparams(*which, dataset, seed) for seed in p["seeds"]}
            for dataset in p["datasets"]
        }
    }


@check("gmoe.hparams")
def check_hparams(case: Case, tensors: Tensors, outputs: Case) -> Iterator[str]:
    """Which (hparams_seed, trial) pairs a case holds is said by the keys of its results only."""
    p = case["params"]
    answers = {dataset: dict(values) for dataset, values in outputs["expected"].items()}
    for dataset, stored in case["expected"].items():
        for key in stored:
            if pair := re.fullmatch(r"hparams_seed(\d+)_trial(\d+)", key):
                run = int(pair[1]), int(pair[2])
                answers[dataset][key] = run_hparams(PROTOCOLS[p["registry"]], p["algorithm"], dataset, *run)
    yield from compare_json(answers, case["expected"], "expected", float(case["rtol"]), float(case["atol"]))


@op("gmoe.sweep_jobs")
def sweep_jobs(case: Case, tensors: Tensors) -> Case:
    p = dict(case["params"])
    jobs = project_sweep_jobs(Sweep(datasets=p.pop("dataset_names"), **p))
    listed = [{"train_args": job.train_args, "output_dir": job.output_dir, "command": job.command} for job in jobs]
    return {"expected": {"n_jobs": len(jobs), "jobs": listed}}


def as_pair(accuracy: selection.Accuracy | None) -> Case | None:
    return None if accuracy is None else {"val_acc": accuracy.val, "test_acc": accuracy.test}


@op("gmoe.model_selection")
def model_selection(case: Case, tensors: Tensors) -> Case:
    p = case["params"]
    records = [parse_record(record, grouped=False) for record in p["records"]]
    expected = {}
    for method in p["methods"]:
        choices = selection.run_choices(records, method)
        expected[method] = {
            "runs": [{"hparams_seed": c.hparams_seed, "run_acc": as_pair(c.accuracy)} for c in choices],
            "ranking": [[accuracy.val, accuracy.test] for _, accuracy in selection.ranking(choices)],
            "sweep_acc": selection.sweep_accuracy(choices),
        }
    return {"expected": expected}


@op("gmoe.collect_results")
def collect_results(case: Case, tensors: Tensors) -> Case:
    p = case["params"]
    report = collect([parse_record(record) for record in p["records"]])
    return {"expected": {"text": render(report, "latex" if p["latex"] else "text", compat=True)}}
