"""m2mKD's settings as the stages share them: presets underneath, what cannot work refused, what a phase depends on.

Torch-free. A stage holds the whole method, but its members depend on the part that they use: a new rate of the last
phase must not throw the distilled modules away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe.algorithms.m2mkd import PRESETS, Config, Method
from moe.errors import SpecError, nearest
from moe.models.vit_specs import ViTSpec, student_specs
from workers.context import Input
from workers.overlay import overlay

PACKAGED = "vit_small_focus"
"""In place of a path: the pretrained ViT-S/14 that a Python package carries."""

PACKAGED_DEPTH = 12
"""Its blocks."""

# What decides a member's result, by phase; `cache` is what a frozen meta model and teacher say.
_PARTS: dict[str, tuple[str, ...]] = {
    "pt": ("meta", "pt"),
    "mt": ("meta", "teacher", "mt"),
    "ft": ("teacher", "ft"),
    "cache": ("meta", "teacher"),
    "student": ("meta", "teacher", "vmoe", "circuit", "circuit_students", "loss", "student"),
    "assemble": ("meta", "vmoe", "circuit", "assemble"),
    "e2e": ("vmoe", "circuit", "graph_sparsity", "assemble", "e2e"),
    "fs": ("fs",),
}


class FewShot(BaseModel):
    """Episodes of one split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str = Field(default="test", description="split whose images are dealt out")
    k_way: int = Field(default=8, ge=2, description="classes of an episode")
    n_shot: int = Field(default=5, ge=1, description="training images of each class")
    queries: int = Field(default=15, ge=1, description="test images of each class")
    episodes: int = Field(default=20, ge=2, description="episodes; their mean and a 95 % interval are reported")
    protocol: Literal["disjoint", "official"] = Field(
        default="disjoint", description="official: the public split, whose test images hold the training images"
    )


def fill_method(values: Any) -> Any:
    """A stage's config block whose ``method`` has the fields of its ``preset`` underneath.

    For a pydantic ``before`` validator.

    Raises:
        ValueError: no such preset; ``phase`` or ``position`` are given; the teacher's depths do not add up to the
            preset's teacher.
    """
    if not isinstance(values, Mapping) or isinstance(values.get("method"), Config):
        return values
    name, own = values.get("preset"), values.get("method") or {}
    if not isinstance(own, Mapping):
        return values
    for field, default in (("phase", "student"), ("position", None)):
        if own.get(field, default) != default:
            raise ValueError(f"method.{field} follows from the stage; leave it out.")
    if name is None:
        return values
    if name not in PRESETS:
        raise ValueError(f"There is no m2mKD preset {name!r}. {nearest(str(name), PRESETS)}")
    base = PRESETS[name]
    teacher = own.get("teacher")
    if isinstance(teacher, Mapping) and "depths" in teacher and "dim" not in teacher:
        wanted, seen = sum(base["teacher"]["depths"]), sum(teacher["depths"])
        if seen != wanted:
            raise ValueError(
                f"teacher.depths={list(teacher['depths'])} add up to {seen}; the teacher of {name} has {wanted} blocks."
            )
    return {**values, "method": overlay(base, own)}


def check_method(config: Config) -> Config:
    """Refuse what would only fail after a phase has been trained, or have no effect.

    Raises:
        ValueError: stitches that do not have the meta model's width, a circuit's module without settings, a setting
            that this kind of model or phase does not have.
    """
    if lost := without_effect(config):
        raise ValueError(lost)
    try:
        if config.vmoe is not None:
            model = config.vmoe
            if model.pre_stitch or model.post_stitch or model.stitch_dim not in (None, config.meta.dim):
                raise ValueError(
                    f"vmoe.stitch_dim={model.stitch_dim}, pre_stitch={model.pre_stitch}, "
                    f"post_stitch={model.post_stitch}: stitches follow from the stages and have the meta model's width "
                    f"{config.meta.dim}; leave them out (assemble.keep_stitches keeps them)."
                )
            for name in ("image_size", "channels"):
                if getattr(model, name) != getattr(config.meta, name):
                    raise ValueError(f"vmoe.{name}={getattr(model, name)} must equal meta.{name}.")
            student_specs(model, config.meta.dim)
        else:
            kept = config.circuit.latent_graph_kwargs.stitch_dim if config.circuit else None
            if kept not in (None, config.meta.dim):
                raise ValueError(
                    f"circuit.latent_graph_kwargs.stitch_dim={kept}: the students' stitches have the meta model's "
                    f"width {config.meta.dim}."
                )
            for position in range(len(config.meta.depths)):
                Method(config).circuit_student(position, config.meta.num_classes)
    except SpecError as error:
        raise ValueError(str(error)) from None
    return config


def without_effect(config: Config) -> str:
    """The first setting that nothing would read, and what to do; empty when there is none."""
    for name in ("teacher", "meta", "vmoe"):
        spec = getattr(config, name)
        if spec is not None and spec.drop_path > 0:
            return f"{name}.drop_path={spec.drop_path} has no effect: each phase has its own; set drop_path there."
    if config.vmoe is not None:
        given = {
            "circuit_students": config.circuit_students is not None,
            "graph_sparsity": config.graph_sparsity is not None,
            "assemble.student_type": config.assemble.student_type != "imagenet",
            "assemble.resize_grid": config.assemble.resize_grid,
        }
    else:
        own = config.circuit.latent_graph_kwargs.path_drop_prob if config.circuit is not None else 0.0
        if config.e2e.drop_path not in (0.0, own):
            return (
                f"e2e.drop_path={config.e2e.drop_path} has no effect on a circuit; its stochastic depth is "
                f"circuit.latent_graph_kwargs.path_drop_prob={own}."
            )
        between = ((config.circuit_students or {}).get("mediator") or {}).get("path_drop_prob")
        if between not in (None, config.student.drop_path):
            return (
                f"circuit_students.mediator.path_drop_prob={between} has no effect; students have the stochastic depth "
                f"student.drop_path={config.student.drop_path}. Set that, or leave it out."
            )
        given = {"assemble.keep_stitches": config.assemble.keep_stitches}
    kind = "V-MoE" if config.vmoe is not None else "circuit"
    for name, there in given.items():
        if there:
            return f"{name} has no effect on a {kind}; leave it out."
    unread = {"soft": (), "hard": ("tau", "reduction"), "none": ("alpha", "tau", "reduction")}[config.loss.kind]
    for name in unread:
        if getattr(config.loss, name) != type(config.loss).model_fields[name].default:
            return (
                f"loss.{name}={getattr(config.loss, name)} has no effect with kind: {config.loss.kind}; leave it out."
            )
    for name in ("pt", "mt", "ft", "student", "e2e", "fs"):
        phase = getattr(config, name)
        if phase is not None and phase.schedule == "constant" and phase.warmup_epochs > 0:
            return f"{name}.warmup_epochs={phase.warmup_epochs} has no effect with schedule: constant; set it to 0."
    few = config.fs
    if few is not None and (few.clip is not None or few.layer_decay < 1 or few.accumulate > 1):
        return "fs: few-shot episodes train one layer on whole episodes; leave clip, layer_decay and accumulate out."
    return ""


def packaged_problem(spec: ViTSpec) -> str:
    """Why the packaged ViT-S/14 does not fit a network's settings; empty when it does."""
    shape = (spec.dim, spec.heads, spec.depth, spec.patch_size, spec.channels, spec.mlp_ratio, spec.qkv_bias)
    if shape == (384, 6, PACKAGED_DEPTH, 14, 3, 4.0, True):
        return ""
    return (
        f"{PACKAGED} has width 384, 6 heads, 12 blocks and patches of 14 pixels of 3 channels; the settings say "
        f"{spec.dim}, {spec.heads}, {spec.depth} (depths {spec.depths}), {spec.patch_size} and {spec.channels}."
    )


def relevant(config: Config, phase: str) -> dict[str, Any]:
    """The settings that decide a member of ``phase``, as JSON values."""
    parts = {*_PARTS[phase], "seed", "parity"} | (set() if phase == "assemble" else {"augment"})
    if phase == "e2e" and config.assemble.keep_stitches:
        parts.add("meta")  # for their width
    return config.model_dump(mode="json", include=parts)


def phase_method(config: Config, phase: str, seed: int, position: int | None = None, classes: int = 0) -> Method:
    """The algorithm of one member. ``seed`` is the run's; ``classes`` those of the data (0 leaves them as they are)."""
    fields: dict[str, Any] = {"phase": phase, "position": position, "seed": config.seed + seed}
    if classes:
        fields["meta"] = config.meta.model_copy(update={"num_classes": classes})
        fields["teacher"] = config.teacher.model_copy(update={"num_classes": classes})
    return Method(config.model_copy(update=fields))


def image_side(config: Config, phase: str) -> int:
    """Side of the images of a phase in pixels."""
    if phase in ("e2e", "fs", "assemble"):
        return config.vmoe.image_size if config.vmoe is not None else config.augment.image_size
    return config.meta.image_size


def in_order(inputs: Iterable[Input], count: int, what: str) -> list[Input]:
    """Module artifacts by position, each exactly once.

    Raises:
        SpecError: a position is missing, there twice, or not one of ``count``.
    """
    found: dict[int, list[Input]] = {}
    for artifact in inputs:
        found.setdefault(int(artifact.meta.get("position", -1)), []).append(artifact)
    missing = [p for p in range(count) if p not in found]
    double = [p for p, ones in found.items() if len(ones) > 1]
    outside = sorted(p for p in found if not 0 <= p < count)
    if missing or double or outside:
        raise SpecError(
            f"{what}: {count} modules are needed, one for each position; missing {missing}, more than once "
            f"{sorted(double)}, without a place {outside}.",
            "Wire one stage whose members are the positions, and the same number of stages in meta model and model.",
        )
    return [found[p][0] for p in range(count)]
