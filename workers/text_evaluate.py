"""What a search found: the best rate of a method, its seeds in and out of domain, split at test time, merged back.

Every network comes back with the conversion that its artifact records, the gate's settings included, so a test out of
domain uses the gates that were trained. Source: EMoE (arXiv 2310.10908), section 4: the learning rate with the best
mean over seeds of the selection score; means with population standard deviations.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from moe.errors import NotFoundError
from workers.context import Context, Input
from workers.device import setup
from workers.glue import select_lr
from workers.loop import mix
from workers.text_merge import MergeBias, can_merge, merge_in_place, usage
from workers.text_models import open_tuned
from workers.text_settings import LABELS, SearchSettings
from workers.text_split import labels_for, shared_split
from workers.text_tokens import TokenRows, read_tokens
from workers.text_train import ROUTING, predict_rows, score_rows

EVALUATION = "evaluation.json"
Form = Literal["trained", "merged", "split"]
Scores = dict[str, dict[str, float]]
Size = tuple[int, int, float]
"""Experts, chosen experts, learning rate."""


def evaluate_member(
    settings: SearchSettings,
    method: str,
    tuning: str,
    forms: Sequence[Form],
    batch_size: int,
    merge_bias: MergeBias,
    context: Context,
) -> dict[str, Any]:
    """Select, test, and write ``evaluation.json``; ``meta`` is the same record.

    Args:
        settings: of the search; only for splitting dense networks at test time.
        method: of the runs to look at.
        tuning: likewise.
        forms: ``trained``; ``merged``: experts put back; ``split``: a dense network split at test time only.
        batch_size: texts per pass; moves the last bits only, unless the experts have a capacity in evaluation.
        merge_bias: how the experts' shares of the output bias are averaged.
        context: ports ``tokens``, ``models`` and maybe ``split``.

    Raises:
        NotFoundError: no run of this method has finished.
    """
    device = setup(context.threads, "auto").device
    tokens = context.inputs["tokens"][0]
    splits = read_tokens(tokens.path, tokens.meta)
    runs = [m for m in context.inputs["models"] if (m.meta["method"], m.meta["tuning"]) == (method, tuning)]
    if not runs:
        raise NotFoundError(f"No run of {method} {tuning} has finished.", "Resume the run to train what is missing.")
    selected, candidates = select(runs)
    results: dict[str, dict[str, Scores]] = {}
    residual: dict[str, float] = {}
    for run in selected:
        seed, pad = str(run.meta["seed"]), int(tokens.meta["special"]["pad"])
        for form in forms:
            model = open_tuned(run.path, run.meta, context.data_root).to(device)
            if form == "merged":
                if not can_merge(run.meta):
                    continue
                counts = None if merge_bias == "uniform" else usage(model, run.meta, splits["selection"], pad, device)
                residual[seed] = merge_in_place(model, counts)
            elif form == "split":
                if run.meta["emoe"] is not None:
                    continue
                _split_at_test(model, settings, run, context)
            results.setdefault(form, {})[seed] = _scores(model, splits, pad, device, batch_size, context)
    routed = next((run for run in selected if (run.path / ROUTING).is_file()), None)
    if routed is not None:
        shutil.copyfile(routed.path / ROUTING, context.output / ROUTING)
    record = {
        "method": method,
        "label": LABELS[method],
        "tuning": tuning,
        "dataset": tokens.meta["dataset"],
        "title": tokens.meta["title"],
        "selection": tokens.meta["selection"],
        "metrics": tokens.meta["metrics"],
        "rows": tokens.meta["rows"],
        "miniature": tokens.meta["miniature"],
        "selected": _record(selected, candidates),
        "candidates": candidates,
        "results": results,
        "residual": residual,
        "merge_bias": merge_bias,
        "steps": {str(run.meta["seed"]): run.meta["steps"] for run in selected},
        "trainable": selected[0].meta["trainable"],
        "layers": selected[0].meta["layers"],
        "emoe": selected[0].meta["emoe"],
        "rules": selected[0].meta["rules"],
    }
    (context.output / EVALUATION).write_text(json.dumps(record, indent=1, sort_keys=True))
    for kind, seeds in results.items():
        for name in next(iter(seeds.values())):
            mean = float(np.mean([scores[name]["average"] for scores in seeds.values()]))
            context.metrics({f"{kind}/{name.replace(':', '_')}": mean})
    return record


def select(runs: Sequence[Input]) -> tuple[list[Input], list[dict[str, Any]]]:
    """The runs (one a seed) of the experts and rate with the best mean selection score, and all candidates.

    Candidates with fewer seeds than the most complete one do not take part, and say so.
    """
    by_size: dict[Size, list[Input]] = {}
    for run in runs:
        by_size.setdefault((run.meta["num_experts"], run.meta["top_k"], run.meta["lr"]), []).append(run)
    seeds = max(len(found) for found in by_size.values())
    complete = {size: found for size, found in by_size.items() if len(found) == seeds}
    scores = [[run.meta["selection"]["average"] for run in found] for found in complete.values()]
    best = int(select_lr(np.asarray(scores), list(range(len(complete)))).value)
    sizes = list(complete)
    candidates = []
    for size, found in by_size.items():
        averages = [run.meta["selection"]["average"] for run in found]
        candidates.append(
            {
                "num_experts": size[0],
                "top_k": size[1],
                "lr": size[2],
                "mean": float(np.mean(averages)),
                "std": float(np.std(averages)),
                "seeds": len(found),
                "complete": len(found) == seeds,
                "selected": size == sizes[best],
            }
        )
    chosen = sorted(complete[sizes[best]], key=lambda run: int(run.meta["seed"]))
    return chosen, candidates


def _record(selected: Sequence[Input], candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    best = next(candidate for candidate in candidates if candidate["selected"])
    return {
        **{name: best[name] for name in ("num_experts", "top_k", "lr", "mean", "std")},
        "seeds": [run.meta["seed"] for run in selected],
        "runs": [run.digest for run in selected],
    }


def _scores(
    model: nn.Module,
    splits: Mapping[str, TokenRows],
    pad: int,
    device: torch.device,
    batch_size: int,
    context: Context,
) -> Scores:
    """Every split but the training rows."""
    model.eval()
    found = {}
    for name, rows in splits.items():
        if name in ("train", "selection"):  # the selection score is known
            continue
        found[name] = score_rows(predict_rows(model, rows, pad, device, batch_size, context.check), rows)
    return found


def _split_at_test(model: nn.Module, settings: SearchSettings, run: Input, context: Context) -> None:
    """Convert a network that was tuned densely, as EMoE would have been."""
    from moe.models.emoe_convert import convert_layers

    spec = settings.sized(*settings.grid()[0])
    layers = run.meta["layers"]
    labels = labels_for(shared_split(settings, context), spec, layers)
    torch.manual_seed(mix(0, 5))
    convert_layers(model, layers, spec, labels)
