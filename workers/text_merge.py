"""A tuned network as an ordinary dense one, for serving: experts put back, adapters folded in.

EMoE (arXiv 2310.10908), section 4.3: what the split gains it gains in training. The merge is exact where the experts'
output biases are still equal (low-rank tuning, frozen layers); otherwise the residual says how far apart they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe.errors import NotFoundError, SpecError
from moe.models.emoe_convert import merge_layers
from moe.models.swiglu import BlockMaskedSwiGLU
from workers.context import Context, Input
from workers.device import setup
from workers.modelfile import MODEL_FILE, save_tensors
from workers.text_models import CONFIG, config_of, open_tuned
from workers.text_tokens import TOKENIZER, TokenRows, read_tokens
from workers.text_train import EVAL_BATCH, RoutingCount, predict_rows

FOLDER = "model"
MergeBias = Literal["uniform", "usage"]


def can_merge(meta: Mapping[str, Any]) -> bool:
    """Whether a tuned network has a dense form: copies of a whole layer and repeated experts have none."""
    emoe = meta["emoe"]
    return emoe is not None and emoe["split"] != "copy" and emoe["expert_repeat"] == 1


def merge_in_place(model: nn.Module, counts: Mapping[int, Tensor] | None = None) -> float:
    """Make every converted layer dense; the largest deviation of an expert's bias from the one used, 0 when exact.

    SwiGLU layers keep their permuted neurons, which is an ordinary checkpoint of the same function.
    """
    for layer in model.modules():
        if isinstance(layer, BlockMaskedSwiGLU):
            layer.top_k = layer.num_experts
    return max(merge_layers(model, counts).values(), default=0.0)


def usage(
    model: nn.Module, meta: Mapping[str, Any], rows: TokenRows, pad: int, device: torch.device
) -> dict[int, Tensor] | None:
    """How often each expert is chosen on some rows, by layer; None for a network without experts.

    Args:
        model: a tuned network.
        meta: of its artifact.
        rows: texts, in practice those that select.
        pad: id of the padding token.
        device: where to compute.
    """
    count = RoutingCount(model)
    predict_rows(model, rows, pad, device, EVAL_BATCH, count.add)
    return dict(zip(meta["layers"], count.counts, strict=True)) if count.counts else None


def merge_member(
    method: str, tuning: str, seed: int | None, merge_bias: MergeBias | None, context: Context
) -> dict[str, Any]:
    """Write the merged network as a Hugging Face folder ``model`` with its tokenizer; returns ``meta``.

    Args:
        method: whose selected run is taken.
        tuning: likewise.
        seed: of the run; the one with the best selection score when left out.
        merge_bias: how the experts' shares of the output bias are averaged; as in the evaluation when left out.
        context: ports ``tokens``, ``evaluations`` and ``models``.

    Raises:
        NotFoundError: that method was not evaluated, or the seed not trained.
        SpecError: copies of a whole layer.
    """
    device = setup(context.threads, "cpu").device
    tokens = context.inputs["tokens"][0]
    evaluation, run = _selected(method, tuning, seed, context)
    merge_bias = merge_bias or evaluation["merge_bias"]
    if run.meta["emoe"] is not None and not can_merge(run.meta):
        raise SpecError(f"{method} holds copies of a layer, which have no dense form.", "Merge an EMoE method.")
    model: Any = open_tuned(run.path, run.meta, context.data_root)
    counts = None
    if merge_bias == "usage":
        rows, pad = read_tokens(tokens.path, tokens.meta)["selection"], int(tokens.meta["special"]["pad"])
        counts = usage(model, run.meta, rows, pad, device)
    residual = merge_in_place(model, counts)
    dense = model.merge_and_unload() if run.meta["lora"] is not None else model
    folder = context.output / FOLDER
    folder.mkdir()
    state: dict[str, Tensor] = dict(dense.state_dict())
    save_tensors(folder / MODEL_FILE, state)
    record = json.loads((run.path / CONFIG).read_text())
    record["architectures"] = [type(dense).__name__]
    (folder / CONFIG).write_text(json.dumps(record, indent=1, sort_keys=True))
    shutil.copyfile(tokens.path / TOKENIZER, folder / TOKENIZER)
    context.log(f"Merged {run.member}: residual {residual:.3g}{' (exact)' if residual == 0 else ''}.")
    return {
        "form": "text_dense",
        "family": run.meta["family"],
        "outputs": run.meta["outputs"],
        "dataset": run.meta["dataset"],
        "method": method,
        "tuning": tuning,
        "seed": run.meta["seed"],
        "lr": run.meta["lr"],
        "residual": residual,
        "exact": residual == 0.0,
        "all_neurons": run.meta["emoe"] is not None,
        "max_length": tokens.meta["max_length"],
        "parameters": sum(value.numel() for value in state.values()),
        "position_limit": int(getattr(config_of(dense), "max_position_embeddings", 0) or 0),
    }


def _selected(method: str, tuning: str, seed: int | None, context: Context) -> tuple[Mapping[str, Any], Input]:
    """The record of the evaluation that selected, and the run."""
    found = [e.meta for e in context.inputs["evaluations"] if (e.meta["method"], e.meta["tuning"]) == (method, tuning)]
    if not found:
        have = ", ".join(sorted(f"{e.meta['method']} {e.meta['tuning']}" for e in context.inputs["evaluations"]))
        raise NotFoundError(f"{method} {tuning} was not evaluated.", f"There are: {have}.")
    chosen = found[0]["selected"]
    runs = [m for m in context.inputs["models"] if m.digest in chosen["runs"]]
    if seed is not None:
        runs = [m for m in runs if m.meta["seed"] == seed]
    if not runs:
        raise NotFoundError(f"{method} {tuning} has no selected run of seed {seed}.", f"Seeds: {chosen['seeds']}.")
    return found[0], max(runs, key=lambda m: (m.meta["selection"]["average"], -m.meta["seed"]))
