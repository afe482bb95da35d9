"""Dense feed-forward modules of timm and Hugging Face in the form of emergent experts, and back into their own kinds.

A module is told by the names of its parts, its activation by its values, so that subclasses convert alike. What is kept
of the dense module is its form on the meta device, without weights, from which :func:`dense_form` makes it anew.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe.conversion.split import DenseFFN
from moe.errors import SpecError
from moe.layers.activation import ACTIVATIONS, Activation, activate
from moe.models.emoe_blocks import ConvertedFFN
from moe.models.emoe_spec import EMoESpec

PARTS = (("fc1", "fc2"), ("c_fc", "c_proj"))
"""Names of the two linear layers in timm and Hugging Face's ViT, and in GPT-2."""


class PostNorm(nn.Module):
    """BERT's ``output`` without its dense layer: ``LayerNorm(dropout(hidden) + input)``."""

    def __init__(self, norm: nn.Module, dropout: nn.Module, dense: nn.Module | None = None) -> None:
        super().__init__()
        if dense is not None:
            self.dense = dense
        self.LayerNorm = norm
        self.dropout = dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Converted layer's result and its input, both ``[..., D]``."""
        out: Tensor = self.LayerNorm(self.dropout(hidden_states) + input_tensor)
        return out


def convert_mlp(mlp: nn.Module, labels_F: Tensor, spec: EMoESpec, activation: str | None = None) -> ConvertedFFN:
    """Convert a module of two linear layers (``fc1``, ``fc2`` or ``c_fc``, ``c_proj``) with an activation between.

    Args:
        mlp: timm's ``Mlp``, Hugging Face's ``ViTMLP`` or ``GPT2MLP``, or any other of that form; left as it is.
        labels_F: expert of each neuron.
        spec: experts, gate, rules.
        activation: its name; found out from the module when left out.

    Raises:
        SpecError: another kind of module, an unknown activation, or labels that do not fit.
    """
    first, second = layers_of(mlp)
    act = activation or activation_name(_part(mlp, ("act", "activation_fn", "act_fn")))
    inner, outer = (_rate(mlp, name) for name in ("drop1", "drop2"))
    if hasattr(mlp, "c_fc"):
        outer = _rate(mlp, "dropout")
    converted = ConvertedFFN(DenseFFN.of(first, second), labels_F, spec, act, inner, outer)
    converted.train(mlp.training)
    # The dense module's form without its weights, for merging back; a list hides it from the module's state.
    converted.__dict__["_form"] = [copy.deepcopy(mlp).to("meta")]
    return converted


def convert_bert_layer(layer: nn.Module, labels_F: Tensor, spec: EMoESpec, activation: str | None = None) -> None:
    """Convert the feed-forward part of a ``BertLayer`` in place: ``intermediate`` and ``output``.

    Raises:
        SpecError: as :func:`convert_mlp`.
    """
    intermediate, output = _part(layer, ("intermediate",)), _part(layer, ("output",))
    first, second = _part(intermediate, ("dense",)), _part(output, ("dense",))
    act = activation or activation_name(_part(intermediate, ("intermediate_act_fn",)))
    converted = ConvertedFFN(DenseFFN.of(first, second), labels_F, spec, act)
    converted.__dict__["_form"] = [copy.deepcopy(intermediate).to("meta"), copy.deepcopy(output).to("meta")]
    if spec.keep_dense:
        converted.dense = first
    layer.intermediate = converted.train(layer.training)
    kept = second if spec.keep_dense else None
    layer.output = PostNorm(_part(output, ("LayerNorm",)), _part(output, ("dropout",)), kept).train(layer.training)


def dense_form(converted: ConvertedFFN, dense: DenseFFN) -> list[nn.Module]:
    """Modules of the original kind that hold ``dense``: one, or BERT's ``intermediate`` and ``output``.

    Raises:
        SpecError: the layer was not made by one of the converters above.
    """
    form: Sequence[nn.Module] = converted.__dict__.get("_form", ())
    if not form:
        raise SpecError("This layer does not know which dense module it was made from.", "Use merge() for the weights.")
    modules = [copy.deepcopy(module) for module in form]
    bert = len(modules) == 2
    layers: tuple[Any, Any] = (modules[0].dense, modules[1].dense) if bert else layers_of(modules[0])
    weights = ((dense.keys_FD, dense.bias_F), (dense.values_DF, dense.bias_D))
    for layer, (weight, bias) in zip(layers, weights, strict=True):
        stored = weight if isinstance(layer, nn.Linear) else weight.t().contiguous()
        layer.weight = nn.Parameter(stored.clone())
        if layer.bias is not None:
            layer.bias = nn.Parameter(bias.clone())
    return [module.train(converted.training) for module in modules]


def layers_of(mlp: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two linear layers of a feed-forward module.

    Raises:
        SpecError: it has none of the known names, or a part between them that a split would lose.
    """
    for names in PARTS:
        if all(hasattr(mlp, name) for name in names):
            norm = getattr(mlp, "norm", None)
            if norm is not None and not isinstance(norm, nn.Identity):
                raise SpecError(f"{type(mlp).__name__} has a norm between its layers, which experts cannot share.")
            return _part(mlp, (names[0],)), _part(mlp, (names[1],))
    raise SpecError(
        f"{type(mlp).__name__} is not a feed-forward layer that can be split.",
        "Expected parts fc1 and fc2, or c_fc and c_proj; SwiGLU layers are converted by moe.models.swiglu.",
    )


def activation_name(function: Any) -> Activation:
    """Which of the experts' activations a function is, told by its values.

    Raises:
        SpecError: none of them.
    """
    grid = torch.linspace(-4.0, 4.0, 65, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        value = function(grid)
    for name in ACTIVATIONS:
        if torch.allclose(value, activate(grid, name), rtol=0, atol=1e-6):
            return name
    raise SpecError(f"The activation {function} is none of {', '.join(ACTIVATIONS)}.", "Give its name.")


def _part(module: nn.Module, names: Sequence[str]) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise SpecError(f"{type(module).__name__} has no part named {' or '.join(names)}, so it cannot be converted.")


def _rate(module: nn.Module, name: str) -> float:
    part = getattr(module, name, None)
    return float(part.p) if isinstance(part, nn.Dropout) else 0.0
