"""The ``model`` artifact: ``model.safetensors`` beside a small JSON record that says how to rebuild the module.

Only safetensors are read, strictly: a truncated file, a missing or an extra tensor is a :class:`CheckpointError` that
names it. Files are written without metadata, so that equal weights give equal bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from moe.errors import CheckpointError, EnvironmentProblem, NotFoundError

if TYPE_CHECKING:
    from moe.aggregator import Aggregator
    from moe.backbones import Student
    from moe.specs import BackboneSpec, StudentMoESpec

MODEL_FILE = "model.safetensors"
AGGREGATOR_FILE = "aggregator.safetensors"
Form = Literal["classifier", "student"]


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors`` atomically (temporary file, then rename); the bytes depend on names and values only.

    Raises:
        EnvironmentProblem: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Contiguous copies: safetensors refuses views that share memory.
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise EnvironmentProblem(f"Could not write {path}: {error}.", "Free some disk space and resume.") from error
    except Exception as error:  # safetensors reports a full disk with its own exception type
        if "No space left" in str(error) or "I/O" in str(error):
            raise EnvironmentProblem(f"Could not write {path}: {error}.", "Free disk space and resume.") from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        NotFoundError: there is no such file.
        CheckpointError: the file is truncated or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise NotFoundError(f"There is no weights file {path}.")
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes: {error}).",
            "Remove that folder and submit again; it will be made anew.",
        ) from error


def model_meta(
    form: Form,
    backbone: BackboneSpec,
    num_outputs: int,
    feature_dim: int,
    dataset: str,
    moe: StudentMoESpec | None = None,
) -> dict[str, Any]:
    """The JSON record of a ``model`` artifact.

    Args:
        form: ``classifier`` (raw torchvision-like keys) or ``student`` (keys ``features.``, ``moe.``, ``classifier.``).
        backbone: how to build it; saved without reading pretrained weights again, since the file holds them.
        num_outputs: classes K, or 1.
        feature_dim: width D of the features.
        dataset: registry name.
        moe: MoE block of a student, or None.
    """
    return {
        "form": form,
        "backbone": {**backbone.model_dump(mode="json"), "pretrained": False},
        "num_outputs": num_outputs,
        "feature_dim": feature_dim,
        "dataset": dataset,
        "moe": None if moe is None else moe.model_dump(mode="json"),
    }


def load_classifier(folder: Path, meta: Mapping[str, Any]) -> nn.Module:
    """The network of a ``model`` artifact as a classifier, in evaluation mode; a student's tensors are renamed.

    Raises:
        CheckpointError: damaged file, tensors missing, extra or of another shape (named); a student with an MoE block.
    """
    from moe.backbones import build_classifier, student_to_classifier
    from workers.engines.torch import load_strict

    spec, tensors = _backbone(meta), load_tensors(folder / MODEL_FILE)
    if meta["form"] == "student":
        tensors = student_to_classifier(spec, tensors)
    module: nn.Module = build_classifier(spec, int(meta["num_outputs"]))
    load_strict(module, tensors, what=str(folder / MODEL_FILE))
    return module.eval()


def load_student(folder: Path, meta: Mapping[str, Any], moe: StudentMoESpec | None = None) -> Student:
    """A student from any form, in evaluation mode.

    A classifier's weights are renamed by the official key map; an MoE block that the file does not have (``moe`` given,
    ``meta`` without) keeps its fresh initialisation, which needs a seeded generator around the call.

    Raises:
        CheckpointError: as :func:`load_classifier`.
    """
    from moe.backbones import build_student, classifier_to_student
    from moe.specs import StudentMoESpec
    from workers.engines.torch import load_strict
    from workers.method_networks import FORMS, method_student

    if "backbone" not in meta and meta["form"] in FORMS:
        return method_student(folder, meta)
    stored = None if meta.get("moe") is None else StudentMoESpec(**meta["moe"])
    spec, tensors = _backbone(meta), load_tensors(folder / MODEL_FILE)
    if meta["form"] != "student":
        tensors = classifier_to_student(spec, tensors)
    student = build_student(spec, int(meta["num_outputs"]), moe=stored or moe)
    if stored is None and moe is not None:
        fresh = {name: value for name, value in student.state_dict().items() if name.startswith("moe.")}
        tensors = {**tensors, **fresh}
    load_strict(student, tensors, what=str(folder / MODEL_FILE))
    return student.eval()


def save_aggregator(folder: Path, aggregator: Aggregator) -> None:
    """Write ``aggregator.safetensors`` under the official key names."""
    save_tensors(folder / AGGREGATOR_FILE, aggregator.state_dict())


def load_aggregator(folder: Path, meta: Mapping[str, Any]) -> Aggregator:
    """The aggregator beside an artifact whose ``meta["aggregator"]`` holds its constructor arguments.

    Raises:
        CheckpointError: damaged file or tensors that do not fit.
    """
    from moe.aggregator import Aggregator
    from workers.engines.torch import load_strict

    aggregator = Aggregator(**meta["aggregator"])
    load_strict(aggregator, load_tensors(folder / AGGREGATOR_FILE), what=str(folder / AGGREGATOR_FILE))
    return aggregator.eval()


def _backbone(meta: Mapping[str, Any]) -> BackboneSpec:
    from moe.specs import BackboneSpec

    if "backbone" not in meta:
        raise CheckpointError(
            f"The record of this {meta.get('form')!r} says no backbone: it is a part of a network, or an older one.",
            "Wire or serve the whole network; submit again if an earlier version made it.",
        )
    return BackboneSpec(**{**meta["backbone"], "pretrained": False})
