"""Names of EMoE's public checkpoints: language runs, DomainBed pickles, cluster caches; in both directions.

The public code (arXiv 2310.10908) stores experts in Tutel's layout below ``<layer>.mlp``: ``experts.batched_fc1_w`` [E,
s, D], ``experts.batched_fc1_bias`` [E, s], ``experts.batched_fc2_w`` [E, s, D], ``experts.batched_fc2_bias`` [E, D],
``gates.0.wg.weight`` [E, D] or the cosine gate's four tensors, and ``_num_global_experts``. BERT and Hugging Face's ViT
keep the dead dense weights of converted layers, from which the labels of the split can be told.

Differs from the public files: ours store ``w2`` as [E, D, s]; the labels of the split and the rounding rest of the
output bias are part of our state. An official file has neither: labels are recovered from dead dense weights where they
exist and are contiguous otherwise, which gives the same function and, merged, the same layer up to the order of its
neurons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moe.errors import CheckpointError

_OWN_TO_TUTEL = {
    "experts.w1": "experts.batched_fc1_w",
    "experts.b1": "experts.batched_fc1_bias",
    "experts.w2": "experts.batched_fc2_w",
    "experts.b2": "experts.batched_fc2_bias",
    "gate.weight": "gates.0.wg.weight",
    "gate.temperature": "gates.0.temperature",
    "gate.sim_matrix": "gates.0.sim_matrix",
    "gate.projector.weight": "gates.0.cosine_projector.weight",
    "gate.projector.bias": "gates.0.cosine_projector.bias",
}
_TUTEL_TO_OWN = {official: own for own, official in _OWN_TO_TUTEL.items()}

_OWN = re.compile(r"^(?P<layer>.*?)\.(?:mlp|intermediate)\.moe\.(?P<rest>.*)$")
_TUTEL = re.compile(r"^(?P<layer>.*?)\.mlp\.(?P<rest>(?:experts|gates)\..*)$")
_OURS_ONLY = re.compile(r"\.(?:labels_F|bias_rest_D)$")
_COUNT = re.compile(r"\.mlp\._num_global_experts$")
_BERT = re.compile(r"(?<!vit\.)encoder\.layer\.\d+$")

_QKV = {"q": "query", "k": "key", "v": "value"}

# transformers 5 renamed the parts of Hugging Face's ViT; public files have the names on the right.
_VIT = (
    (re.compile(r"(^|\.)layers\.(\d+)\."), r"\1encoder.layer.\2."),
    (re.compile(r"\.attention\.([qkv])_proj\."), lambda m: f".attention.attention.{_QKV[m[1]]}."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)
_VIT_BACK = (
    (re.compile(r"(^|\.)encoder\.layer\.(\d+)\."), r"\1layers.\2."),
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), lambda m: f".attention.{m[1][0]}_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"(?<!attention)\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"(?<!attention)\.output\.dense\."), ".mlp.fc2."),
)


def official_name(name: str) -> str:
    """The public code's name of one of our parameters; also of adapters (``base_layer`` and wrappers taken off).

    Names outside converted layers stay as they are.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    found = _OWN.match(name)
    if not found:
        return name
    rest = _OWN_TO_TUTEL.get(found["rest"], found["rest"])
    return f"{found['layer']}.mlp.{rest}"


def own_name(name: str) -> str:
    """Our name of one of the public code's parameters; inverse of :func:`official_name` for a plain model."""
    found = _TUTEL.match(name)
    if not found or found["rest"] not in _TUTEL_TO_OWN:
        return name
    part = "intermediate" if _BERT.search(found["layer"]) else "mlp"
    return f"{found['layer']}.{part}.moe.{_TUTEL_TO_OWN[found['rest']]}"


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a converted network under public names and layouts.

    Labels and rounding rests have no place there and are left out; keep them beside the file to merge later.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if _OURS_ONLY.search(name):
            continue
        new = official_name(name)
        if new.startswith("vit."):
            new = vit_to_official(new)
        out[new] = value.transpose(1, 2).contiguous() if new.endswith("batched_fc2_w") else value
        if new.endswith("experts.batched_fc1_w"):
            prefix = new.removesuffix(".experts.batched_fc1_w")
            out[f"{prefix}._num_global_experts"] = torch.tensor(value.shape[0])
    return out


def from_official(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str = "The checkpoint"
) -> dict[str, Tensor]:
    """A public state dict under our names and layouts, checked against a network.

    Args:
        state: as ``torch.load(..., weights_only=True)`` gives it.
        own: the state dict of the converted network that will take it; says which names and shapes are expected, and
            whether dead dense weights are wanted.
        what: beginning of the message.

    Raises:
        CheckpointError: missing, unexpected, transposed or truncated tensors, each by name and shapes; an expert count
            that differs.
    """
    plain = {_unwrapped(name): value for name, value in state.items()}
    if any(name.startswith("vit.layers.") for name in own):
        plain = {vit_from_official(name): value for name, value in plain.items()}
    converted = {found["layer"] for name in plain if (found := _TUTEL.match(name))}
    out: dict[str, Tensor] = {}
    for name, value in plain.items():
        if _COUNT.search(name):
            continue
        new = own_name(name)
        if new not in own and _dead(name, converted):
            continue
        if new.endswith("experts.w2") and value.ndim == 3:
            value = value.transpose(1, 2)
        if new.endswith(("experts.b1", "experts.b2")) and value.ndim == 3 and value.shape[1] == 1:
            value = value.squeeze(1)  # very old Tutel files
        out[new] = value
    for name, value in own.items():
        if _OURS_ONLY.search(name) and name not in out:
            out[name] = _missing_extra(name, value, plain, out)
    _check(out, own, what)
    return {name: value.contiguous() for name, value in out.items()}


def vit_to_official(name: str) -> str:
    """The public name of a parameter of Hugging Face's ViT under transformers 5 (dense layers and attention)."""
    return _renamed(name, _VIT)


def vit_from_official(name: str) -> str:
    """Inverse of :func:`vit_to_official`."""
    return _renamed(name, _VIT_BACK)


def labels_from_dense(fc1_EsD: Tensor, keys_FD: Tensor) -> Tensor:
    """Labels int64 ``[F]`` of experts, told by matching their rows one to one with the dense layer's.

    Exact for experts that were not trained; the nearest matching otherwise.

    Raises:
        CheckpointError: the shapes do not belong together (repeated or copied experts have no one label).
    """
    from scipy.optimize import linear_sum_assignment

    experts, size, width = fc1_EsD.shape
    if tuple(keys_FD.shape) != (experts * size, width):
        raise CheckpointError(
            f"Experts of shape {tuple(fc1_EsD.shape)} are not a split of a layer of shape {tuple(keys_FD.shape)}."
        )
    distance = torch.cdist(keys_FD.double(), fc1_EsD.reshape(-1, width).double())
    _, row = linear_sum_assignment(distance.numpy())
    return torch.from_numpy(row) // size


def cluster_file(family: str, layer: int, num_experts: int, neurons: int, width: int) -> str:
    """Name of a public cluster cache below its root.

    Args:
        family: ``bert``, ``gpt``, ``vit`` (Hugging Face), ``deit`` (timm) or ``llama``.
        layer: number of the layer.
        num_experts: E.
        neurons: F.
        width: D.
    """
    if family == "llama":
        return f"model.layers.{layer}.mlp_clusters{num_experts}_shapetorch.Size([{neurons}, {width}]).pth"
    stem = "" if family == "deit" else f"{family}_"
    return f"cluster_ids/expert{num_experts}/{stem}layer{layer}_{neurons}_{width}.npy"


def _renamed(name: str, rules: Iterable[tuple[re.Pattern[str], object]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)  # type: ignore[call-overload]
    return name


def _unwrapped(name: str) -> str:
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    return name.removeprefix("model.") if name.startswith("model.") and not name.startswith("model.layers.") else name


def _dead(name: str, converted: set[str]) -> bool:
    """Whether this is a dense weight that a converted layer no longer uses."""
    return any(
        name.startswith(
            (f"{layer}.intermediate.dense.", f"{layer}.output.dense.", f"{layer}.mlp.fc", f"{layer}.mlp.c_")
        )
        for layer in converted
    )


def _missing_extra(name: str, own: Tensor, plain: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> Tensor:
    """Labels or rounding rest, which public files do not have."""
    if name.endswith("bias_rest_D"):
        return torch.zeros_like(own)
    layer = name.removesuffix(".labels_F")
    official = layer.removesuffix(".intermediate").removesuffix(".mlp")
    keys = plain.get(f"{official}.intermediate.dense.weight", plain.get(f"{official}.mlp.fc1.weight"))
    experts = out.get(f"{layer}.moe.experts.w1")
    if experts is None:
        return own
    if keys is not None and keys.shape[0] == experts.shape[0] * experts.shape[1]:
        return labels_from_dense(experts, keys)
    per_expert = max(1, own.numel() // experts.shape[0])
    return torch.arange(own.numel()) // per_expert


def _check(state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    wrong = []
    for name in sorted(own.keys() & state.keys()):
        seen, wanted = tuple(state[name].shape), tuple(own[name].shape)
        if seen == wanted:
            continue
        swapped = len(seen) >= 2 and (*seen[:-2], seen[-1], seen[-2]) == wanted
        cut = len(seen) == len(wanted) and all(a <= b for a, b in zip(seen, wanted, strict=True))
        kind = "transposed" if swapped else "truncated" if cut else "of another shape"
        wrong.append(f"{official_name(name)} is {kind}: {seen} instead of {wanted}")
    missing = [official_name(name) for name in sorted(own.keys() - state.keys())]
    extra = [official_name(name) for name in sorted(state.keys() - own.keys())]
    parts = wrong[:4]
    for kind, names in (("missing", missing), ("unexpected", extra)):
        if names:
            parts.append(f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    if parts:
        raise CheckpointError(
            f"{what} does not fit: {'; '.join(parts)}.", "Check model, converted layers, experts and kind of gate."
        )
