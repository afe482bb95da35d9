"""Adapters of EMoE's GLUE protocol."""

from __future__ import annotations

from typing import Any

import torch

from tests.golden.registry import op
from workers.glue import glue_metrics, select_lr

Case = dict[str, Any]


@op("emoe.glue_metrics")
def metrics(case: Case, tensors: Case) -> Case:
    scores = glue_metrics(case["params"]["task"], tensors["in.predictions"].numpy(), tensors["in.references"].numpy())
    return {f"out.{name}": torch.tensor([value]) for name, value in scores.items()}


@op("emoe.select_lr")
def learning_rate(case: Case, tensors: Case) -> Case:
    best = select_lr(tensors["in.best_metric"].numpy(), case["params"]["learning_rates"])
    return {
        "out.best_lr": torch.tensor([best.value]),
        "out.mean": torch.tensor([best.mean]),
        "out.std": torch.tensor([best.std]),
    }
