"""Modularity of real pretrained networks, layer by layer, and EMoE's acceptance thresholds on them.

Two Python packages carry real transformer weights: MiniLM-L6 (BERT) and a ViT-S/14 of DINOv2 form. Their feed-forward
layers see real text (the standard library's own documentation) and real photographs (scikit-learn's two samples). A
correct split and gate find most of what fires; a random one does not. Source of the thresholds: figures measured with
the public code's split of EMoE (arXiv 2310.10908), 64 experts.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.conversion.modularity import Route, RouteQuality, route_quality, sparsity
from moe.conversion.split import DenseFFN, split_keys, split_objective
from moe.errors import EnvironmentProblem
from moe.models.emoe_convert import dense_ffn, ffn_inputs, transformer_layers

OBJECTIVES = {
    "text": {0: 1225.1, 1: 1323.0, 2: 1314.5, 3: 1340.3, 4: 1352.4, 5: 1349.0},
    "vision": {0: 1194.5, 1: 1313.1, 4: 1337.6, 8: 1362.1, 10: 1372.6, 11: 1362.8},
}
"""Objective of the public code's split of these networks' layers into 64 experts."""


@dataclass(frozen=True)
class LayerReport:
    """Figures of one layer.

    Attributes:
        layer: number.
        firing: share of positive pre-activations.
        objective: of the balanced split.
        routes: quality by route; ``random_split`` is avg-k on a random split.
    """

    layer: int
    firing: float
    objective: float
    routes: dict[str, RouteQuality]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def report_layer(
    number: int,
    dense: DenseFFN,
    x_TD: Tensor,
    num_experts: int = 64,
    top_k: int = 16,
    restarts: int = 10,
    labels: Tensor | None = None,
) -> LayerReport:
    """Measure every route on a layer's inputs ``[T, D]``, on a new split or on the given ``labels`` ``[F]``."""
    if labels is None:
        labels = split_keys(dense.keys_FD, num_experts, restarts=restarts)
    shuffled = split_keys(dense.keys_FD, num_experts, "random")
    names: tuple[Route, ...] = ("avg_k", "avg_k_bias", "best", "bottom", "random", "fixed")
    routes: dict[str, RouteQuality] = {}
    for name in names:
        routes[name] = route_quality(dense, labels, x_TD, num_experts, top_k, name)
    routes["random_split"] = route_quality(dense, shuffled, x_TD, num_experts, top_k)
    return LayerReport(number, sparsity(dense, x_TD).firing, split_objective(dense.keys_FD, labels), routes)


def report(
    model: nn.Module, inputs: dict[int, Tensor], num_experts: int = 64, top_k: int = 16, restarts: int = 10
) -> list[LayerReport]:
    """One report per layer with inputs (:func:`moe.models.emoe_convert.ffn_inputs`), before any training."""
    parts = transformer_layers(model)
    return [report_layer(n, dense_ffn(parts[n]), x, num_experts, top_k, restarts) for n, x in sorted(inputs.items())]


def complaints(kind: str, reports: list[LayerReport]) -> list[str]:
    """What misses the acceptance thresholds for ``text`` or ``vision``, 64 experts, 16 chosen; empty if nothing."""
    text = kind == "text"
    found = list(_single(kind, reports))
    ratios = [r.routes["avg_k"].error / r.routes["random"].error for r in reports]
    limit = 0.85 if text else 0.95
    if np.mean(ratios) > limit:
        found.append(f"mean error ratio to random routing {np.mean(ratios):.3f} > {limit}")
    if text and max(ratios) >= 1:
        found.append(f"error above random routing's in layer {reports[int(np.argmax(ratios))].layer}")
    return found


def _single(kind: str, reports: list[LayerReport]) -> Iterator[str]:
    for r in reports:
        avg_k, where = r.routes["avg_k"], f"{kind} layer {r.layer}"
        if avg_k.capture < 0.42:
            yield f"{where}: capture {avg_k.capture:.3f} < 0.42"
        if avg_k.overlap < (0.65 if kind == "text" else 0.60):
            yield f"{where}: overlap {avg_k.overlap:.3f}"
        if r.routes["bottom"].capture > 0.13:
            yield f"{where}: bottom capture {r.routes['bottom'].capture:.3f} > 0.13"
        if kind == "text" and r.routes["random_split"].capture > 0.40:
            yield f"{where}: capture of a random split {r.routes['random_split'].capture:.3f} > 0.40"
        if kind == "vision" and avg_k.capture <= r.routes["fixed"].capture:
            yield f"{where}: capture {avg_k.capture:.3f} is not above the fixed set's {r.routes['fixed'].capture:.3f}"
        reference = OBJECTIVES[kind].get(r.layer)
        if reference is not None and r.objective > 1.02 * reference:
            yield f"{where}: objective {r.objective:.1f} > 1.02 * {reference}"


def minilm_model(data_root: Path | None = None) -> nn.Module:
    """The packaged MiniLM as transformers' ``BertModel``.

    Raises:
        NotFoundError: the package is not there.
        EnvironmentProblem: transformers is not installed.
    """
    from workers.text_weights import minilm_state, require_minilm

    folder = require_minilm(data_root)
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise EnvironmentProblem(
            "Text models need transformers.", "Install it with: pip install 'moepipe[text]'"
        ) from error
    model: nn.Module = BertModel(BertConfig.from_json_file(folder / "config.json")).eval()
    state = minilm_state(data_root)
    model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
    return model


def prose_tokens(data_root: Path | None = None, texts: int = 40, length: int = 80) -> list[Tensor]:
    """Token numbers ``[1, S]`` of passages of English documentation (``pydoc_data``), S = ``length``."""
    from pydoc_data import topics

    from tokenizers import Tokenizer

    from workers.text_weights import require_minilm

    tokenizer = Tokenizer.from_file(str(require_minilm(data_root) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    passages = (" ".join(topics.topics[name].split()) for name in sorted(topics.topics))
    encoded = (tokenizer.encode(passage).ids for passage in passages if len(passage) > 8 * length)
    chosen = [ids[: length - 1] + ids[-1:] for ids in encoded if len(ids) >= length]
    return [torch.tensor([ids]) for ids in chosen[:texts]]


def text_inputs(model: nn.Module, data_root: Path | None = None) -> dict[int, Tensor]:
    """Inputs of MiniLM's feed-forward layers on some 3000 tokens of prose."""

    def run() -> None:
        for ids in prose_tokens(data_root):
            model(input_ids=ids)

    return ffn_inputs(model, run)


def photo_crops(count: int = 30, size: int = 224, seed: int = 0) -> Tensor:
    """Normalised crops ``[count, 3, size, size]`` of scikit-learn's two sample photographs."""
    from sklearn.datasets import load_sample_images

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    photos = [torch.from_numpy(np.array(image)) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for index in range(count):
        photo = photos[index % len(photos)]
        top, left = (int(torch.randint(side - size + 1, (1,), generator=generator)) for side in photo.shape[:2])
        crops.append((photo[top : top + size, left : left + size] / 255 - mean) / std)
    return torch.stack(crops).permute(0, 3, 1, 2).contiguous()


def vit_model(data_root: Path | None = None, size: int = 224) -> nn.Module:
    """The packaged ViT-S/14 in timm's form, without a head (NotFoundError when it is not there)."""
    import timm

    from workers.onnx_weights import vit_small_state
    from workers.packaged_weights import require

    model: nn.Module = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0).eval()
    model.load_state_dict(vit_small_state(require("vit_small_focus", data_root), size))
    return model


def vision_inputs(model: nn.Module, tokens: int = 3000, seed: int = 0) -> dict[int, Tensor]:
    """Inputs of the ViT's feed-forward layers: a sample of the tokens of 30 crops."""
    images = photo_crops()
    inputs = ffn_inputs(model, lambda: [model(batch) for batch in torch.split(images, 10)])
    total = next(iter(inputs.values())).shape[0]
    kept = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:tokens]
    return {number: x[kept] for number, x in inputs.items()}
