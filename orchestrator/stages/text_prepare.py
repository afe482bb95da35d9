"""``text_prepare``: open a text data set, encode it once with a tokenizer, and record its splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe.errors import SpecError
from orchestrator.stages.base import Member, Port, StageBase, StageConfig
from workers.context import Context
from workers.texts.base import TEXTS, parse_options


class TextPrepareConfig(StageConfig):
    """Which texts, cut how, and which rows select."""

    dataset: str = Field(description="text data set; `moepipe data ls` lists them")
    options: dict[str, Any] = Field(default_factory=dict, description="the data set's own options, e.g. task")
    tokenizer: str = Field(
        default="minilm",
        description="minilm, a Hugging Face folder (a path, relative to the data root), or words: the training rows' "
        "own words, for networks that start at random",
    )
    max_length: int = Field(default=128, ge=4, le=65536, description="longest text (or pair) in tokens; others are cut")
    selection: Literal["official", "held_out"] = Field(
        default="official",
        description="official: the validation rows select epoch and rate and are reported; held_out: training rows "
        "are set apart for that",
    )
    selection_fraction: float = Field(default=0.1, gt=0, lt=1, description="of the training rows, for held_out")
    limit: dict[Literal["train", "selection", "validation", "ood"], int] = Field(
        default_factory=dict, description="kind of split: use at most so many rows, drawn at random"
    )
    limit_seed: int = Field(default=0, ge=0, description="seed of these draws")

    @model_validator(mode="after")
    def _known(self) -> TextPrepareConfig:
        try:
            parse_options(self.dataset, self.options)
        except SpecError as error:  # pydantic adds the field's place to a ValueError only
            raise ValueError(str(error)) from None
        if any(rows < 2 for rows in self.limit.values()):
            raise ValueError("limit needs at least 2 rows of each kind.")
        if self.selection == "official" and "selection" in self.limit:
            raise ValueError(
                "limit.selection has no effect with selection: official, where the validation rows select; set "
                "limit.validation, or selection: held_out."
            )
        return self


class Stage(StageBase[TextPrepareConfig]):
    """Encode the texts once; every member of every later stage shares the tokens."""

    output: ClassVar[str] = "tokens"
    per_seed: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, Port]] = {}
    Config: ClassVar[type[StageConfig]] = TextPrepareConfig

    def code(self, config: TextPrepareConfig) -> list[str]:
        """The data set's module."""
        return [TEXTS.module_name(config.dataset)]

    def external(self, config: TextPrepareConfig, data_root: str) -> Mapping[str, str]:
        """Fingerprints of the data set's files and of the tokenizer."""
        from workers.tokenizer_files import tokenizer_digest

        fingerprint = getattr(TEXTS.load(config.dataset), "fingerprint", None)
        found = {"tokenizer": tokenizer_digest(config.tokenizer, Path(data_root))}
        if fingerprint is not None:
            found["files"] = fingerprint(Path(data_root), parse_options(config.dataset, config.options))
        return found

    def run(self, config: TextPrepareConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``tokens.npz`` and ``tokenizer.json``; ``meta`` has rows, metrics and the tokenizer's record."""
        from workers.text_tokens import open_tokenizer, prepare_tokens
        from workers.texts.base import load_text

        data = load_text(config.dataset, config.options, context.data_root)
        tokenizer = open_tokenizer(config.tokenizer, context.data_root, data)
        meta = prepare_tokens(
            data,
            tokenizer,
            config.max_length,
            context.output,
            selection=config.selection,
            fraction=config.selection_fraction,
            limit={str(kind): rows for kind, rows in config.limit.items()},
            seed=config.limit_seed,
        )
        context.log(f"{data.info.name}: " + ", ".join(f"{name} {rows}" for name, rows in meta["rows"].items()))
        return meta
