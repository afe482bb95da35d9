"""Networks of methods that no backbone describes (ConvNeXts of MoE Jetpack, circuits), as students to be served.

A student is a feature extractor and a linear head made of the network's own modules, so it computes exactly what the
network computes. Which forms there are stands in :data:`FORMS`. All others say in their record which backbone they are,
and ``workers.modelfile`` builds them from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import CheckpointError, NotFoundError
from moe.jet_specs import JetConvNeXtSpec, jet_spec
from moe.jetpack_specs import JetViTSpec
from moe.specs import BackboneSpec

FORM_OF: Mapping[type, str] = {JetViTSpec: "jetvit", JetConvNeXtSpec: "jetconvnext"}
"""Record of a network of MoE Jetpack -> form of its artifacts."""

if TYPE_CHECKING:
    from torch import nn

    from moe.student import Student


def backbone_record(spec: JetViTSpec | JetConvNeXtSpec) -> dict[str, Any]:
    """What an artifact of MoE Jetpack says about itself so that other stages can go on with it; ConvNeXts cannot.

    The noise that ``parity: official`` adds in evaluation is left out: a network that is adapted or distilled has to
    give one answer.
    """
    if not isinstance(spec, JetViTSpec):
        return {}
    if spec.moe is not None:
        spec = spec.model_copy(update={"moe": spec.moe.model_copy(update={"noise_in_eval": False})})
    backbone = BackboneSpec(name="jetvit", channels=spec.channels, image_size=spec.image_size, jetvit=spec)
    return {"backbone": backbone.model_dump(mode="json"), "feature_dim": spec.dim, "image_size": spec.image_size}


def method_student(folder: Path, meta: Mapping[str, Any]) -> Student:
    """The network of an artifact whose form is one of :data:`FORMS`, in evaluation mode.

    Raises:
        NotFoundError: the artifact keeps no weights.
        CheckpointError: damaged file, or tensors that do not fit.
    """
    from moe.student import Layout, student_view

    build, head = FORMS[str(meta["form"])]
    return student_view(build(folder, meta), Layout("whole", head)).eval()


def jet_network(folder: Path, meta: Mapping[str, Any], *, noise: bool = True) -> nn.Module:
    """A network of MoE Jetpack, in evaluation mode.

    Args:
        folder: of the artifact.
        meta: its record.
        noise: keep the noise that ``parity: official`` adds in evaluation, which makes predictions random.

    Raises:
        NotFoundError: the artifact keeps no weights.
        CheckpointError: damaged file, another kind of artifact, or tensors that do not fit.
    """
    from moe.models.jet_networks import build_jet_network
    from workers.engines.torch import load_strict
    from workers.modelfile import MODEL_FILE, load_tensors

    if meta.get("form") not in FORM_OF.values():
        raise CheckpointError(f"{folder} holds no network of MoE Jetpack.", "Check which stage is wired.")
    path = folder / MODEL_FILE
    if not path.is_file():
        raise NotFoundError(f"{folder} keeps no weights.", "Set save_model: true in its jetpack_train stage.")
    spec = jet_spec(meta["spec"])
    if spec.moe is not None and not noise:
        spec = spec.model_copy(update={"moe": spec.moe.model_copy(update={"noise_in_eval": False})})
    network = build_jet_network(spec, int(meta["num_outputs"]))
    load_strict(network, load_tensors(path), what=str(path))
    return network.eval()


def _served_jet_network(folder: Path, meta: Mapping[str, Any]) -> nn.Module:
    return jet_network(folder, meta, noise=False)


def _circuit(folder: Path, meta: Mapping[str, Any]) -> nn.Module:
    """A circuit of m2mKD's stages, without noise."""
    from workers.context import Input
    from workers.m2mkd_files import read_network

    return read_network(Input(folder.name, "", folder, meta), quiet=True)


FORMS: Mapping[str, tuple[Callable[[Path, Mapping[str, Any]], nn.Module], str]] = {
    "jetconvnext": (_served_jet_network, "head.fc"),
    "circuit": (_circuit, "output_tokenizer.to_logits"),
}
"""Form -> how its network is read, and the name of its linear head."""
