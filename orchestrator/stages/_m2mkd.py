"""What the stages of m2mKD share: the method's settings under a preset, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from moe.algorithms.m2mkd import Config
from moe.errors import NotFoundError
from orchestrator.stages.base import Member, StageConfig
from workers.m2mkd_settings import check_method, fill_method, relevant

if TYPE_CHECKING:
    from workers.m2mkd_run import RunSettings


class MethodConfig(StageConfig):
    """The whole method; each stage's results depend on the part that it uses."""

    preset: str | None = Field(
        default=None,
        description="preset of algorithms.m2mkd that `method` starts from, e.g. tiny_imagenet_nac_scale_free",
        json_schema_extra={"cache": False},
    )
    method: Config = Field(
        description="teacher, meta model, modular model and phases; fields that differ from the preset",
        json_schema_extra={"cache": False},
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_method(values)

    @field_validator("method")
    @classmethod
    def _checked(cls, method: Config) -> Config:
        return check_method(method)

    def member(self, phase: str, position: int | None = None) -> Member:
        """A member whose cache key holds what decides ``phase``."""
        params: dict[str, Any] = {"method": relevant(self.method, phase)}
        if position is None:
            return Member("", params)
        return Member(f"position={position}", {**params, "position": position})

    def positions(self, phase: str) -> list[Member]:
        """One member per module."""
        return [self.member(phase, position) for position in range(len(self.method.meta.depths))]


def file_digests(paths: Sequence[str], data_root: str) -> Mapping[str, str]:
    """Checksums of the files that a stage takes weights from, by place in the list.

    Raises:
        NotFoundError: a file is not there.
    """
    from workers.datasets._arrays import sha256_file
    from workers.m2mkd_settings import PACKAGED
    from workers.packaged_weights import weights_digest

    found = {}
    for number, text in enumerate(paths):
        if text == PACKAGED:
            found[f"file/{number}"] = weights_digest(text, True, Path(data_root))
            continue
        path = Path(text).expanduser()
        if not path.is_file():
            raise NotFoundError(f"There is no weights file {path}.", "Check the paths of this stage.")
        found[f"file/{number}"] = sha256_file(path)
    return found


def missing_files(field: str, paths: Sequence[str]) -> list[tuple[tuple[str | int, ...], str, str]]:
    """What ``StageBase.examine`` answers about weights files."""
    from workers.m2mkd_settings import PACKAGED

    lost = [(n, text) for n, text in enumerate(paths) if text != PACKAGED and not Path(text).expanduser().is_file()]
    return [((field, n), f"There is no weights file {text}.", "Check the path.") for n, text in lost]


class TrainingConfig(MethodConfig):
    """What every training stage of m2mKD takes besides the phase's recipe."""

    splits: tuple[str, ...] = Field(default=("train",), min_length=1, description="splits whose rows are trained on")
    val_split: str = Field(default="val", description="split that is scored after every epoch")
    epochs: int | None = Field(default=None, ge=0, description="instead of the phase's; 0 trains nothing")
    select: Literal["last", "best"] = Field(
        default="last", description="state that is kept; last as in the public ViT trainer"
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="null: bf16 autocast where the phase has amp; weights stay fp32"
    )
    eval_batch_size: int = Field(default=128, ge=1, description="images per forward pass of validations")
    checkpoint_every: int = Field(
        default=100, ge=1, description="updates between checkpoints", json_schema_extra={"cache": False}
    )
    loader_threads: int = Field(default=0, ge=0, description="decoding threads", json_schema_extra={"cache": False})
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")

    def run_settings(self) -> RunSettings:
        """The same for the workers. Imports torch."""
        from workers.m2mkd_run import RunSettings

        return RunSettings(
            splits=self.splits,
            val_split=self.val_split,
            epochs=self.epochs,
            select=self.select,
            precision=self.precision,
            eval_batch=self.eval_batch_size,
            checkpoint_every=self.checkpoint_every,
            device=self.device,
            threads=self.loader_threads,
        )
