"""Names of GMoE's and DomainBed's official checkpoints, in both directions.

``model.pkl`` of a GMoE run holds, under ``model_dict``, the tensors of timm's ViT behind the prefix ``model.``; a
sparse block's feed-forward network is a Tutel layer. Reading the file (never by unpickling freely) is the caller's;
state dicts come in and go out here. Public code: Luodian/Generalizable-Mixture-of-Experts, commit 0689d557; microsoft/
Tutel, commit 82af7aad; facebookresearch/DomainBed, commit b93c22a1.

=========================================  ===========  ============================================
official, after ``blocks.<i>.mlp.``        shape        ours, after ``blocks.<i>.mlp.``
=========================================  ===========  ============================================
``experts.batched_fc1_w``                  E, H, D      ``experts.w1``
``experts.batched_fc2_w``                  E, H, D      ``experts.w2`` ``[E, D, H]``, transposed
``experts.batched_fc{1,2}_bias``           E, H / E, D  ``experts.b{1,2}``; ``[E, 1, .]`` is accepted
``gates.0.{temperature,sim_matrix}``       1 / P, E     ``gate.{temperature,sim_matrix}``
``gates.0.cosine_projector.{weight,bias}`` P, D / P     ``gate.projector.{weight,bias}``
``gates.0.wg.weight``                      E, D         ``gate.weight``
``_num_global_experts``                    scalar       none; must equal E; absent in old files
=========================================  ===========  ============================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from moe.backbones import build_classifier, check_state, layout_of
from moe.errors import CheckpointError
from moe.specs import BackboneSpec

PREFIX = "model."
COUNT = "_num_global_experts"

# In the order of an official file.
_TENSORS = {
    "experts.batched_fc1_w": "experts.w1",
    "experts.batched_fc2_w": "experts.w2",
    "experts.batched_fc1_bias": "experts.b1",
    "experts.batched_fc2_bias": "experts.b2",
    "gates.0.temperature": "gate.temperature",
    "gates.0.sim_matrix": "gate.sim_matrix",
    "gates.0.cosine_projector.weight": "gate.projector.weight",
    "gates.0.cosine_projector.bias": "gate.projector.bias",
    "gates.0.wg.weight": "gate.weight",
}
_OURS = {ours: official for official, ours in _TENSORS.items()}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and layouts for an official GMoE state dict, with or without the prefix ``model.``.

    Raises:
        CheckpointError: an unknown tensor in a sparse block, a stored number of experts that the tensors contradict
            (one rank's share, see :func:`merge_ranks`), or an expert tensor of impossible rank.
    """
    if state and all(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    layers = {name.removesuffix("experts.batched_fc1_w") for name in state if name.endswith("experts.batched_fc1_w")}
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = next((prefix for prefix in layers if name.startswith(prefix)), None)
        if layer is None:
            out[name] = value
            continue
        tensor = name.removeprefix(layer)
        if tensor == COUNT:
            _check_count(name, int(value), state[f"{layer}experts.batched_fc1_w"].shape[0])
        elif tensor in _TENSORS:
            out[f"{layer}{_TENSORS[tensor]}"] = _ours(name, value)
        else:
            raise CheckpointError(
                f"{name} {tuple(value.shape)} is unknown in a sparse block.", f"Known: {', '.join(_TENSORS)}."
            )
    return out


def to_official(state: Mapping[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Inverse of :func:`from_official`, in the official order and with the stored number of experts.

    Args:
        state: state dict of a ViT with or without sparse blocks.
        prefix: put before every name; empty for the bare network.
    """
    layers = {name.removesuffix("experts.w1"): value.shape[0] for name, value in state.items() if _is_w1(name)}
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = next((layer for layer in layers if name.startswith(layer)), None)
        if layer is None:
            out[f"{prefix}{name}"] = value
        elif f"{prefix}{layer}{COUNT}" not in out:
            out[f"{prefix}{layer}{COUNT}"] = torch.tensor(layers[layer])
            for official, ours in _TENSORS.items():
                if f"{layer}{ours}" in state:
                    out[f"{prefix}{layer}{official}"] = _official(ours, state[f"{layer}{ours}"])
    return out


def load_official(vit: VisionTransformer, state: Mapping[str, Tensor]) -> None:
    """Load an official GMoE state dict into ``vit``, which must have its geometry and class count.

    Raises:
        CheckpointError: as :func:`from_official`; tensors missing, unexpected or of another shape. ``vit`` is then
            unchanged.
    """
    ours = from_official(state)
    shapes = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    check_state(ours, shapes, "These weights are not a GMoE network of this geometry")
    vit.load_state_dict(ours)


def merge_ranks(shares: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One official state dict out of the files of a multi-rank Tutel run; each holds its rank's share of the experts.

    Args:
        shares: state dicts in the order of the ranks.

    Raises:
        CheckpointError: no file, other names on some rank, or a tensor outside the experts that differs.
    """
    if not shares:
        raise CheckpointError("There is no file to merge.", "Give one state dict per rank.")
    first = shares[0]
    for rank, share in enumerate(shares):
        if share.keys() != first.keys():
            odd = sorted(share.keys() ^ first.keys())
            raise CheckpointError(f"Rank {rank} and rank 0 do not name the same tensors: {', '.join(odd[:4])}.")
    out = {}
    for name, value in first.items():
        if ".experts.batched_fc" in name:
            out[name] = torch.cat([share[name] for share in shares])
            continue
        for rank, share in enumerate(shares):
            if not torch.equal(share[name], value):
                raise CheckpointError(f"{name} of rank {rank} is not that of rank 0.", "Are these files of one run?")
        out[name] = value
    return out


def erm_from_official(state: Mapping[str, Tensor], backbone: BackboneSpec) -> dict[str, Tensor]:
    """Classifier weights (torchvision's, timm's or ours) out of an official dense ERM state dict.

    Every tensor stands there twice, as ``featurizer.*`` and ``network.0.*``, ``classifier.*`` and ``network.1.*``;
    image networks lie one level deeper, under ``featurizer.network.``.

    Raises:
        CheckpointError: the two copies differ; tensors missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        probe = build_classifier(backbone, 1)
    head = layout_of(backbone, probe).head
    deep = "network." if any(name.startswith("featurizer.network.") for name in state) else ""
    out = {}
    for name, value in state.items():
        twin = name.replace("featurizer.", "network.0.", 1).replace("classifier.", "network.1.", 1)
        if name.startswith("featurizer."):
            out[name.removeprefix("featurizer.").removeprefix(deep)] = value
        elif name.startswith("classifier."):
            out[f"{head}.{name.removeprefix('classifier.')}"] = value
        if twin != name and twin in state and not torch.equal(state[twin], value):
            raise CheckpointError(f"{name} and its copy {twin} differ.", "The file is damaged or was edited.")
    shapes = {name: tuple(value.shape) for name, value in probe.state_dict().items()}
    outputs = state["classifier.bias"].shape[0] if "classifier.bias" in state else 1
    shapes[f"{head}.weight"], shapes[f"{head}.bias"] = (outputs, shapes[f"{head}.weight"][1]), (outputs,)
    check_state(out, shapes, f"This is not an official ERM checkpoint of {backbone.name}")
    return out


def erm_to_official(state: Mapping[str, Tensor], backbone: BackboneSpec, deep: bool = True) -> dict[str, Tensor]:
    """Inverse of :func:`erm_from_official`; every tensor appears twice and shares its storage.

    Args:
        state: classifier weights.
        backbone: the architecture.
        deep: image networks lie under ``featurizer.network.``; the 28 x 28 network does not.
    """
    with torch.device("meta"):
        head = layout_of(backbone, build_classifier(backbone, 1)).head
    body = "network." if deep else ""
    features = {f"{body}{name}": value for name, value in state.items() if not name.startswith(f"{head}.")}
    last = {name.removeprefix(f"{head}."): value for name, value in state.items() if name.startswith(f"{head}.")}
    out = {f"featurizer.{name}": value for name, value in features.items()}
    out |= {f"classifier.{name}": value for name, value in last.items()}
    out |= {f"network.0.{name}": value for name, value in features.items()}
    return out | {f"network.1.{name}": value for name, value in last.items()}


def _is_w1(name: str) -> bool:
    return name.endswith(".experts.w1")


def _ours(name: str, value: Tensor) -> Tensor:
    """Value in our layout."""
    if name.endswith("_bias") and value.ndim == 3 and value.shape[1] == 1:
        return value[:, 0]
    if name.endswith("batched_fc2_w"):
        if value.ndim != 3:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)} instead of (experts, hidden, width).")
        return value.transpose(1, 2).contiguous()
    return value


def _official(ours: str, value: Tensor) -> Tensor:
    return value.transpose(1, 2).contiguous() if ours == "experts.w2" else value


def _check_count(name: str, stored: int, held: int) -> None:
    if stored != held:
        raise CheckpointError(
            f"{name} says {stored} experts, the tensors hold {held}.",
            "A multi-rank run writes one file per rank: merge them first (merge_ranks).",
        )
