"""Before any tuning: the experts of each layer, clustered once for a whole search, and how modular the layers are.

Labels depend on the weights, the number of experts and the kind of split only, so every method, rate and seed shares
them. Beside avg-k routing the report has the best possible, a random and a fixed choice, and a random split.
Source: EMoE (arXiv 2310.10908), sections 3 and 5.

Shapes: T tokens, F neurons, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe.conversion.modularity import sparsity
from moe.conversion.split import DenseFFN, split_keys
from moe.errors import SpecError
from moe.models.emoe_convert import dense_ffn, ffn_inputs, transformer_layers
from moe.models.emoe_layers import last_even_layers
from moe.models.emoe_spec import EMoESpec
from workers.context import Context, Input
from workers.device import setup
from workers.loop import mix
from workers.modularity import report_layer
from workers.text_models import build_base
from workers.text_settings import SplitSettings
from workers.text_tokens import TokenRows, read_tokens

SPLITS, REPORT, ACTIVATIONS = "splits.npz", "modularity.json", "activations.npz"
TOP_SHARE = 0.011  # of the activations that the figure shows, as in the paper's
FIGURE_TOKENS = 320


def layers_of(settings: SplitSettings, model: nn.Module) -> tuple[int, ...]:
    """The layers that a search converts.

    Raises:
        SpecError: the network has no such layer.
    """
    count = len(transformer_layers(model))
    if not settings.layers:
        return tuple(last_even_layers(count, settings.last_even))
    outside = [layer for layer in settings.layers if not 0 <= layer < count]
    if outside:
        raise SpecError(f"layers={list(settings.layers)}: the network has the layers 0 to {count - 1}.")
    return tuple(sorted(set(settings.layers)))


def split_member(
    settings: SplitSettings, measured: Literal["converted", "all", "none"], texts: int, context: Context
) -> dict[str, Any]:
    """Write the labels of every clustered split and the report; returns ``meta``.

    Args:
        settings: of the search.
        measured: which layers the report covers.
        texts: training rows whose tokens it is measured on.
        context: port ``tokens``.
    """
    setup(context.threads, "cpu")
    tokens = context.inputs["tokens"][0]
    torch.manual_seed(mix(0, 4))  # of a network without weights; with weights only the head is fresh
    model, family, _ = build_base(settings.model, context.data_root, tokens.meta)
    model.eval()
    layers, parts = layers_of(settings, model), transformer_layers(model)
    rows = read_tokens(tokens.path, tokens.meta)["train"]
    wanted = range(len(parts)) if measured == "all" else layers
    hidden = _inputs(model, rows, texts, sorted({*wanted, *layers}), context)
    labels: dict[str, Tensor] = {}
    for spec in _clustered(settings):
        for layer in layers:
            context.check()
            name = _key(spec, layer)
            if name not in labels:
                labels[name] = _split(dense_ffn(parts[layer]), spec, hidden[layer])
                context.log(f"Layer {layer}: {spec.num_experts} experts ({spec.split}).")
    arrays: dict[str, Any] = {name: values.numpy().astype(np.int32) for name, values in labels.items()}
    np.savez(context.output / SPLITS, **arrays)
    reports = [] if measured == "none" or family == "llama" else _report(settings, parts, hidden, wanted, labels)
    record = {"family": family, "layers": list(layers), "reports": reports}
    (context.output / REPORT).write_text(json.dumps(record, indent=1, sort_keys=True))
    if family != "llama":
        _write_activations(settings, dense_ffn(parts[layers[-1]]), hidden[layers[-1]], labels, layers[-1], context)
    return {"layers": list(layers), "splits": sorted(labels), "reports": len(reports)}


def shared_split(settings: SplitSettings, context: Context) -> Input | None:
    """The artifact with the search's clusters; None without one, and for networks whose weights differ by seed."""
    found = context.inputs.get("split", ())
    return found[0] if found and settings.model.weights is not None else None


def labels_for(artifact: Input | None, spec: EMoESpec | None, layers: Sequence[int]) -> dict[int, Tensor] | None:
    """The labels that an artifact holds for a conversion; None where it has none, and they are made anew."""
    if artifact is None or spec is None:
        return None
    with np.load(artifact.path / SPLITS, allow_pickle=False) as archive:
        found = {n: archive[_key(spec, n)] for n in layers if _key(spec, n) in archive.files}
    return {layer: torch.from_numpy(values.astype(np.int64)) for layer, values in found.items()} or None


def _clustered(settings: SplitSettings) -> list[EMoESpec]:
    """One conversion for each number of experts, where the split takes time; others are made where they are used."""
    specs = {experts: settings.sized(experts, top_k) for experts, top_k in settings.grid()}
    return [spec for spec in specs.values() if spec.split in ("balanced", "coactivation")]


def _key(spec: EMoESpec, layer: int) -> str:
    return f"layer={layer} E={spec.num_experts} {spec.split} seed={spec.seed} restarts={spec.restarts}"


def _split(dense: DenseFFN, spec: EMoESpec, x_TD: Tensor) -> Tensor:
    if spec.split == "copy":
        raise SpecError("Copies of a layer have no split.")
    given = x_TD if spec.split == "coactivation" else None
    return split_keys(
        dense.keys_FD, spec.num_experts, spec.split, seed=spec.seed, restarts=spec.restarts, hidden_TD=given
    )


def _inputs(
    model: nn.Module, rows: TokenRows, texts: int, layers: Sequence[int], context: Context
) -> dict[int, Tensor]:
    """Inputs of the feed-forward parts for evenly spread training rows, one text at a time, so without padding."""
    from moe.models.text import classify

    chosen = np.unique(np.linspace(0, len(rows) - 1, min(texts, len(rows))).astype(np.int64))

    def run() -> None:
        for done, row in enumerate(chosen):
            batch = rows.batch(np.asarray([row]), 0)
            classify(model, batch.ids, None, batch.types)
            context.progress(done + 1, len(chosen))

    return ffn_inputs(model, run, layers)


def _report(
    settings: SplitSettings,
    parts: Sequence[nn.Module],
    hidden: Mapping[int, Tensor],
    wanted: Sequence[int],
    labels: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Figures of the layers for every number of experts and of chosen ones."""
    found = []
    for experts, top_k in settings.grid():
        spec = settings.sized(experts, top_k)
        for layer in wanted:
            dense, known = dense_ffn(parts[layer]), labels.get(_key(spec, layer))
            report = report_layer(layer, dense, hidden[layer], experts, top_k, settings.emoe.restarts, known)
            measured = asdict(sparsity(dense, hidden[layer]))
            found.append({**report.to_json(), **measured, "num_experts": experts, "top_k": top_k})
    return found


def _write_activations(
    settings: SplitSettings, dense: DenseFFN, x_TD: Tensor, labels: Mapping[str, Tensor], layer: int, context: Context
) -> None:
    """Activations of the last converted layer, all but the largest 1.1 % set to 0, with the clusters of its neurons."""
    known = labels.get(_key(settings.sized(*settings.grid()[0]), layer))
    if known is None:
        return
    x_TD = x_TD[:: max(1, len(x_TD) // FIGURE_TOKENS)][:FIGURE_TOKENS]
    active_TF = torch.nn.functional.gelu(x_TD @ dense.keys_FD.t() + dense.bias_F).clamp_min(0)
    limit = torch.quantile(active_TF.flatten()[:: max(1, active_TF.numel() // 1_000_000)], 1 - TOP_SHARE)
    shown = torch.where(active_TF >= limit, active_TF, torch.zeros_like(active_TF))
    np.savez(
        context.output / ACTIVATIONS,
        active=shown.numpy().astype(np.float16),
        labels=known.numpy().astype(np.int32),
        layer=np.asarray(layer),
    )
