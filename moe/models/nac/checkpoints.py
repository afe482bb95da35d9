"""Weights of circuits and students: strict loading, official files in and out.

A circuit's tensors carry the official names, so nothing is renamed. The official trainer stores ``model`` beside
optimiser and schedule; shared propagators repeat their weights under every index, in both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import CheckpointError


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], what: str, optional: Collection[str] = frozenset()
) -> None:
    """Load weights whose names and shapes must fit, or nothing.

    Args:
        module: the target.
        state: tensors by name.
        what: beginning of the error message.
        optional: names that may be absent; the module then keeps what it has.

    Raises:
        CheckpointError: missing, extra or misshapen (also transposed, truncated) tensors, named with their shapes, or
            tensors with values that are not finite.
    """
    from moe.backbones import check_state

    own = module.state_dict()
    wanted = {name: tuple(value.shape) for name, value in own.items() if name not in optional or name in state}
    check_state(state, wanted, what)
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(f"{what}: {len(broken)} tensors hold values that are not finite: {broken[:4]}.")
    module.load_state_dict({**own, **state})


def read_trainer_file(payload: Mapping[str, Any]) -> dict[str, Tensor]:
    """The circuit's weights in an official trainer file (``model`` beside optimiser, schedule, epoch) or bare.

    A ``module.`` prefix of data-parallel training is taken off.

    Raises:
        CheckpointError: the file holds something else.
    """
    model = payload.get("model", payload)
    bad = (
        [name for name, value in model.items() if not isinstance(value, Tensor)]
        if isinstance(model, Mapping)
        else ["?"]
    )
    if bad or not model:
        raise CheckpointError(
            "This file holds no weights of a neural attentive circuit; first foreign entry: "
            f"{bad[0] if bad else 'it is empty'}.",
            "Expected a state dict, or a trainer file with one under 'model'.",
        )
    return {name.removeprefix("module."): value for name, value in model.items()}


def load_circuit(circuit: nn.Module, payload: Mapping[str, Any]) -> None:
    """Load an official circuit: a trainer file's content or a bare state dict.

    Raises:
        CheckpointError: as :func:`read_trainer_file` and :func:`load_strictly`.
    """
    load_strictly(circuit, read_trainer_file(payload), "These weights are not of this circuit")
