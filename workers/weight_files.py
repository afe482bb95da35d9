"""Reading files of tensors without running what is in them, and fitting them onto a network by name and shape.

Every tensor must fit; only the head may differ, because a backbone is trained for other classes than the task's.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import CheckpointError, NotFoundError

HEADS = ("fc.", "classifier.", "head.", "heads.")

# torchvision's published DenseNet files still write "denselayer1.norm.1.weight" for "denselayer1.norm1.weight".
_LEGACY_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file or of a ``torch.save`` file (opened with ``weights_only=True``).

    A ``state_dict``, ``model`` or ``model_dict`` entry around the tensors is unwrapped.

    Raises:
        NotFoundError: no such file.
        CheckpointError: truncated, holds anything but tensors, or would need to run code to open.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no weights file {path}.", "Check the path under `pretrained`.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds objects other than tensors, which are never executed here.",
            "Save the plain state_dict, best as .safetensors.",
        ) from error
    except Exception as error:  # both readers raise nearly anything on garbage: KeyError, UnicodeDecodeError, ...
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}).", "Is it truncated? Copy it again."
        ) from error
    for wrapper in ("state_dict", "model", "model_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a state_dict of tensors.", "Save module.state_dict() alone.")
    return {str(key): value for key, value in content.items()}


def apply_state(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy ``state`` into ``module``; both must name the same tensors with the same shapes, apart from the head.

    A prefix that ``module`` puts before every name of ``state`` (``features.``, ``backbone.``) or that the file puts
    before every name (``module.``) is found and bridged. Head tensors (``fc.``, ``classifier.``, ``head.``) are taken
    only when all of them fit.

    Raises:
        CheckpointError: names the tensors that are missing, extra or of another shape; ``module`` is then unchanged.
    """
    own = module.state_dict()
    given = _bridge({_LEGACY_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}, own)
    # Files older than PyTorch 0.4.1 lack these counters, which nothing reads in evaluation.
    given = {key: own[key] for key in own if key.endswith("num_batches_tracked")} | given
    body = {key for key in own if not _is_head(key, own)}
    missing = sorted(body - given.keys())
    extra = sorted(key for key in given.keys() - own.keys() if not _is_head(key, given))
    wrong = [key for key in sorted(body & given.keys()) if given[key].shape != own[key].shape]
    problems = []
    if wrong:
        shapes = ", ".join(f"{k} is {list(given[k].shape)}, expected {list(own[k].shape)}" for k in wrong[:3])
        problems.append(f"{len(wrong)} of another shape ({shapes}{', ...' if len(wrong) > 3 else ''})")
    for what, keys in (("missing", missing), ("unknown to the network", extra)):
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    if problems:
        raise CheckpointError(
            f"The weights in {origin} do not fit the network: tensors {'; '.join(problems)}.",
            "Check the backbone's name, channels and image_size against the file.",
        )
    head = {key for key in own if key not in body}
    fits = head and all(key in given and given[key].shape == own[key].shape for key in head)
    taken = body | head if fits else body
    module.load_state_dict({key: given[key] if key in taken else own[key] for key in own}, strict=True)


def _is_head(key: str, names: Mapping[str, Any]) -> bool:
    """Whether ``key`` belongs to the classifier: its name starts with a head's, behind a prefix common to all names."""
    return key.removeprefix(_common_prefix(names)).startswith(HEADS)


def _common_prefix(names: Mapping[str, Any]) -> str:
    """The first part, with its dot, when all names share it; otherwise empty."""
    first = {name.partition(".")[0] for name in names}
    return f"{first.pop()}." if len(first) == 1 else ""


def _bridge(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``given`` renamed to the names of ``own`` when one has a prefix before all names of the other's body."""
    keys = [key for key in given if not _is_head(key, given)]
    if not keys or all(key in own for key in keys):
        return given
    stem = _common_prefix(given)
    if stem and any(key.removeprefix(stem) in own for key in keys):
        return {key.removeprefix(stem): value for key, value in given.items()}
    for prefix in sorted({name.removesuffix(keys[0]) for name in own if name.endswith(f".{keys[0]}")}, key=len):
        if all(f"{prefix}{key}" in own for key in keys):
            return {f"{prefix}{key}": value for key, value in given.items()}
    return given
