"""EMoE's conversion of whole networks: chosen layers of BERT, GPT-2, ViT (timm, Hugging Face) and LLaMA, and back.

Nothing here names a class of transformers or timm: a family is told by the parts of its layers, so that subclasses and
networks under low-rank adapters convert alike. Source: EMoE (arXiv 2310.10908).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moe.conversion.split import DenseFFN, split_keys
from moe.errors import SpecError
from moe.layers.layer import collect_balance
from moe.models.emoe_blocks import ConvertedFFN, converted_layers
from moe.models.emoe_forms import PARTS, PostNorm, convert_bert_layer, convert_mlp, dense_form, layers_of
from moe.models.emoe_spec import EMoESpec
from moe.models.swiglu import BlockMaskedSwiGLU, convert_swiglu, unpermute_swiglu

Kind = Literal["bert", "mlp", "swiglu"]
_NOT_SWIGLU = (
    "capacity_factor", "eval_capacity", "dropout", "dropout_first", "gate_momentum", "normalize_gate",
    "value_norm_weighted",
)  # fmt: skip
"""Settings of gates, seats and experts' dropout, which a SwiGLU layer has not."""


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer, first to last: the longest list of modules that all have a feed-forward part.

    Raises:
        SpecError: there is no such list.
    """
    best: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > len(best):
            children = list(module)
            if all(_kind(child) is not None for child in children):
                best = children
    if not best:
        raise SpecError(
            f"{type(model).__name__} has no layers with a feed-forward part that can be split.",
            "Expected BERT, GPT-2, ViT (timm or Hugging Face) or LLaMA.",
        )
    return best


def dense_ffn(layer: nn.Module) -> DenseFFN:
    """Weights of a dense layer's feed-forward part (of a SwiGLU layer: gate_proj and down_proj, for splitting only).

    Raises:
        SpecError: it has none, or was converted already.
    """
    kind = _kind(layer)
    if kind == "bert" and not isinstance(layer.intermediate, ConvertedFFN):
        return DenseFFN.of(layer.intermediate.dense, layer.output.dense)  # type: ignore[union-attr,arg-type]
    mlp = getattr(layer, "mlp", None)
    if kind == "mlp" and isinstance(mlp, nn.Module) and not isinstance(mlp, ConvertedFFN):
        return DenseFFN.of(*layers_of(mlp))
    if kind == "swiglu" and not isinstance(mlp, BlockMaskedSwiGLU):
        return DenseFFN.of(mlp.gate_proj, mlp.down_proj)  # type: ignore[union-attr,arg-type]
    raise SpecError(f"{type(layer).__name__} has no dense feed-forward part (left).", "Was it converted before?")


def convert_layers(
    model: nn.Module,
    layers: Iterable[int],
    spec: EMoESpec,
    labels: Mapping[int, Tensor] | None = None,
    hidden: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Convert the feed-forward parts of the layers numbered ``layers``, in place.

    Args:
        model: the network, with its weights loaded.
        layers: numbers from 0.
        spec: experts, gate, rules.
        labels: known labels by layer; the others are split as the spec says.
        hidden: inputs ``[T, D]`` of the feed-forward parts by layer, for ``split="coactivation"``.

    Returns:
        The labels used, by layer.

    Raises:
        SpecError: no such layer, one that is converted already, or experts that do not divide the neurons. Nothing is
            changed then.
    """
    parts, chosen = transformer_layers(model), sorted(set(layers))
    outside = [number for number in chosen if not 0 <= number < len(parts)]
    if outside:
        raise SpecError(f"There is no layer {outside[0]}: the network has the layers 0 to {len(parts) - 1}.")
    used: dict[int, Tensor] = {}
    for number in chosen:
        keys = dense_ffn(parts[number]).keys_FD
        if labels is not None and number in labels:
            used[number] = labels[number].detach().cpu().long()
        elif spec.split == "copy":
            used[number] = torch.zeros(keys.shape[0], dtype=torch.int64)
        else:
            given = None if hidden is None else hidden.get(number)
            used[number] = split_keys(
                keys, spec.num_experts, spec.split, seed=spec.seed, restarts=spec.restarts, hidden_TD=given
            )
    for number in chosen:
        convert_layer(parts[number], used[number], spec)
    return used


def convert_layer(layer: nn.Module, labels_F: Tensor, spec: EMoESpec) -> None:
    """Convert one transformer layer (or block) in place, by its kind."""
    kind = _kind(layer)
    if kind in ("bert", "mlp") and spec.select != "gate":
        raise SpecError(
            f"select={spec.select} has no effect here: it scores the blocks of SwiGLU layers.", "Leave select out."
        )
    if kind == "bert":
        convert_bert_layer(layer, labels_F, spec)
    elif kind == "mlp":
        layer.mlp = convert_mlp(layer.mlp, labels_F, spec)  # type: ignore[arg-type]
    elif kind == "swiglu":
        if spec.choice != "top" or spec.split == "copy" or not spec.is_avg_k or spec.expert_repeat > 1:
            raise SpecError(
                "A SwiGLU layer keeps the K blocks of neurons that `select` scores best; it has no other gate, choice, "
                "copies or repeats.",
                "Leave gate, choice and expert_repeat out, and choose another split than copy.",
            )
        unread = [name for name in _NOT_SWIGLU if getattr(spec, name) != EMoESpec.model_fields[name].default]
        if unread:
            raise SpecError(
                f"{unread[0]}={getattr(spec, unread[0])} has no effect on a SwiGLU layer, which has no gate, capacity "
                "or dropout of its own.",
                f"Leave {unread[0]} out.",
            )
        layer.mlp = convert_swiglu(layer.mlp, labels_F, spec.top_k, spec.select)  # type: ignore[arg-type]
    else:
        raise SpecError(f"{type(layer).__name__} has no feed-forward part that can be split.")


@torch.no_grad()
def merge_layers(model: nn.Module, counts: Mapping[int, Tensor] | None = None) -> dict[int, float]:
    """Put the experts of every converted layer back into a dense one, in place; modules are of the original kinds.

    Args:
        model: the network.
        counts: choices of each expert by layer, to weight their shares of the output bias.

    Returns:
        By layer, the largest deviation of an expert's bias from the one used; 0 means the merge is exact.

    Raises:
        SpecError: copies, or replicas that were trained apart; the layers before it are merged already then.
    """
    residual: dict[int, float] = {}
    for number, layer in enumerate(transformer_layers(model)):
        name = "intermediate" if _kind(layer) == "bert" else "mlp"
        part = getattr(layer, name)
        if isinstance(part, ConvertedFFN):
            merged = part.merge(None if counts is None else counts.get(number))
            modules = dense_form(part, merged.dense)
            residual[number] = merged.bias_spread
            if name == "intermediate":
                tail, full = layer.output, modules[1]
                if isinstance(tail, PostNorm):
                    full.LayerNorm, full.dropout = tail.LayerNorm, tail.dropout
                layer.output = full
            setattr(layer, name, modules[0])
    return residual


def unpermute(layer: nn.Module, labels_F: Tensor) -> None:
    """Undo the permutation of a converted SwiGLU layer's neurons in place; it stays in masked form.

    Raises:
        SpecError: another kind of layer.
    """
    mlp = getattr(layer, "mlp", layer)
    if not isinstance(mlp, BlockMaskedSwiGLU):
        raise SpecError(f"{type(mlp).__name__} is not a converted SwiGLU layer.")
    own = dict(mlp.named_parameters())
    with torch.no_grad():
        for name, value in unpermute_swiglu(own, labels_F).items():
            own[name].copy_(value)


def balance_loss(model: nn.Module) -> Tensor:
    """Weighted sum of the balance losses of the last pass; each layer by its own ``aux_weight``.

    Raises:
        SpecError: no converted layer with a gate, or none has run.
    """
    terms = [layer.spec.aux_weight * loss for layer in converted_layers(model) for loss in collect_balance(layer)]
    if not terms:
        raise SpecError("No converted layer has run a pass, so there is no balance loss.", "Call the model first.")
    return torch.stack(terms).sum()


def _kind(layer: nn.Module) -> Kind | None:
    if isinstance(getattr(layer, "intermediate", None), nn.Module) and isinstance(
        getattr(layer, "output", None), nn.Module
    ):
        return "bert"
    mlp = getattr(layer, "mlp", None)
    if isinstance(mlp, ConvertedFFN):
        return "mlp"
    if not isinstance(mlp, nn.Module):
        return None
    if hasattr(mlp, "gate_proj") and hasattr(mlp, "down_proj"):
        return "swiglu"
    return "mlp" if any(all(hasattr(mlp, name) for name in pair) for pair in PARTS) else None


def set_drop_path(blocks: Sequence[nn.Module], rate: float) -> None:
    """Stochastic depth of timm's blocks, linear from 0 in the first to ``rate`` in the last.

    Raises:
        SpecError: blocks without that part.
    """
    from timm.layers import DropPath

    for index, block in enumerate(blocks):
        if not hasattr(block, "drop_path1"):
            raise SpecError(f"{type(block).__name__} has no stochastic depth.", "Set drop_path to 0.")
        own = rate * index / max(1, len(blocks) - 1)
        block.drop_path1 = DropPath(own) if own > 0 else nn.Identity()
        block.drop_path2 = DropPath(own) if own > 0 else nn.Identity()


@torch.no_grad()
def ffn_inputs(model: nn.Module, run: Callable[[], object], layers: Iterable[int] | None = None) -> dict[int, Tensor]:
    """Inputs ``[T, D]`` of the feed-forward parts during ``run``, by layer: for reports and the co-activation split.

    Args:
        model: the network, dense or converted.
        run: calls it, in evaluation mode, as often as it likes.
        layers: numbers; all when left out.
    """
    parts = transformer_layers(model)
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for number in range(len(parts)) if layers is None else layers:
        ffn = parts[number].intermediate if _kind(parts[number]) == "bert" else parts[number].mlp

        def keep(module: nn.Module, given: tuple[Tensor, ...], number: int = number) -> None:
            seen.setdefault(number, []).append(given[0].detach().flatten(0, -2))

        handles.append(ffn.register_forward_pre_hook(keep))  # type: ignore[union-attr]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {number: torch.cat(values) for number, values in seen.items()}
