"""Networks of MoE Jetpack from their record, whatever the family: vision transformers and ConvNeXts with slots."""

from __future__ import annotations

from torch import nn

from moe.jet_specs import JetConvNeXtSpec
from moe.jetpack_specs import JetViTSpec
from moe.models.convnext import build_jet_convnext
from moe.models.sphero_vit import build_sphero_vit


def build_jet_network(spec: JetViTSpec | JetConvNeXtSpec, num_classes: int) -> nn.Module:
    """A randomly initialised network.

    Args:
        spec: geometry and slots.
        num_classes: K.
    """
    network: nn.Module
    if isinstance(spec, JetConvNeXtSpec):
        network = build_jet_convnext(spec, num_classes)
    else:
        network = build_sphero_vit(spec, num_classes)
    return network


def head_name(spec: JetViTSpec | JetConvNeXtSpec) -> str:
    """Name of the linear head of such a network."""
    return "head.fc" if isinstance(spec, JetConvNeXtSpec) else "head"
