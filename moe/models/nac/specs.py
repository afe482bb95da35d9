"""Configurations of a whole circuit and of its modules as distillation students; see ``moe.models.nac.graph_specs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from moe.errors import SpecError
from moe.models.nac.graph_specs import AttentionOptions, GraphSpec, ModFCSpec, NacSpec

DEPTH_PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny": (3, 3, 9),
    "mini": (3, 3, 6),
    "micro": (3, 3, 3),
    "nano": (1, 1, 1),
    "pico": (1, 1, 0),
    "femto": (1, 0, 0),
    "atto": (0, 0, 0),
}
"""ConvNeXt blocks per stage of the tokenizer, by ``capacity_preset``."""

_NOT_ABOUT_THE_MODEL = (
    "simplified_interface",
    "student_state_dict_dir",
    "student_type",
    "find_unused_parameters_in_ddp",
)


class GridSpec(NacSpec):
    """``positional_grid_kwargs``: learned positions that are concatenated to the tokens."""

    dim: int = Field(ge=1, le=4096, description="Channels of a position.")
    grid_size: tuple[int, int] = Field(description="Rows and columns; equal to those of the tokens.")


class TokenizerSpec(NacSpec):
    """``input_tokenizer_kwargs``: a ConvNeXt stem and its first stages."""

    capacity_preset: str = Field(default="tiny", description=f"One of {', '.join(DEPTH_PRESETS)}.")
    num_stages: int = Field(default=3, ge=1, le=3, description="Stages used; total stride 4, 8, 16.")
    depths: tuple[int, ...] | None = Field(default=None, description="Blocks by stage; null: those of the preset.")
    positional_grid_kwargs: GridSpec | None = Field(default=None, description="Positions; null: none.")

    @field_validator("capacity_preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DEPTH_PRESETS:
            raise ValueError(f"There is no tokenizer capacity named {name!r}; allowed: {', '.join(DEPTH_PRESETS)}.")
        return name

    @model_validator(mode="after")
    def _fits(self) -> TokenizerSpec:
        if self.depths is not None and (len(self.depths) != self.num_stages or min(self.depths) < 0):
            raise ValueError(f"depths={list(self.depths)} does not name the blocks of {self.num_stages} stages.")
        return self

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage in use."""
        return self.depths or DEPTH_PRESETS[self.capacity_preset][: self.num_stages]


class PoolingSpec(NacSpec):
    """``output_tokenizer_kwargs``."""

    softmax_type: Literal["gumbel", "gumbel-hard", "vanilla"] = Field(default="gumbel", description="Kind of weights.")
    temperature: float = Field(default=1.0, gt=0, le=100, description="Temperature of the softmax over latents.")


class CircuitSpec(NacSpec):
    """A whole neural attentive circuit for images (``model.kwargs`` of the published files)."""

    input_dim: int = Field(default=3, ge=1, le=64, description="Channels of the images.")
    output_dim: int = Field(ge=1, le=1_000_000, description="Classes.")
    state_dim: int = Field(ge=4, le=65536, description="Width S of a state.")
    input_tokenizer_type: Literal["ConvNeXtImageTokenizer"] = Field(
        default="ConvNeXtImageTokenizer", description="Kind of tokenizer."
    )
    input_tokenizer_kwargs: TokenizerSpec = Field(default_factory=TokenizerSpec, description="Tokenizer.")
    latent_graph_type: Literal["LatentGraph"] = Field(default="LatentGraph", description="Kind of graph.")
    latent_graph_kwargs: GraphSpec = Field(description="The graph.")
    output_tokenizer_type: Literal["OutputLatentPooling", "FirstSlotAsLogits"] = Field(
        default="OutputLatentPooling", description="Pooled logits, or the first output state as logits."
    )
    output_tokenizer_kwargs: PoolingSpec = Field(default_factory=PoolingSpec, description="Pooling.")
    eval_noise: Literal["official", "off"] = Field(
        default="official",
        description="official: seeder and Gumbel noise stay on in evaluation. off: mean states, plain softmax.",
    )

    @model_validator(mode="after")
    def _fits(self) -> CircuitSpec:
        graph = self.latent_graph_kwargs
        if self.output_tokenizer_type == "FirstSlotAsLogits" and not graph.read_out_kwargs.use_head:
            raise ValueError("FirstSlotAsLogits reads logits from the read-out's head; set read_out_kwargs.use_head.")
        if graph.latent_seeder_kwargs.use_code_as_mean_state and graph.code_dim != self.state_dim:
            raise ValueError(
                f"use_code_as_mean_state needs code_dim = state_dim, got {graph.code_dim} and {self.state_dim}."
            )
        return self

    @classmethod
    def from_official(cls, kwargs: Mapping[str, Any]) -> CircuitSpec:
        """The spec of ``model.kwargs`` in a published YAML file; keys about training or files are left out.

        Raises:
            SpecError: unknown keys or values that don't fit, all named.
        """
        kept = {key: value for key, value in kwargs.items() if key not in _NOT_ABOUT_THE_MODEL}
        try:
            return cls.model_validate(kept)
        except ValidationError as error:
            raise SpecError(f"This is not the configuration of a neural attentive circuit: {error}") from None


class StudentSpec(NacSpec):
    """One module of a circuit as a distillation student: a section of a student YAML file with its ``share_kwargs``."""

    student: Literal["readin", "mediator", "readout"] = Field(description="Position of the module in the circuit.")
    stitch_dim: int = Field(ge=1, le=65536, description="Width of the meta model that the student is put into.")
    state_dim: int = Field(ge=1, le=65536, description="Width S of a state.")
    code_dim: int = Field(ge=1, le=65536, description="Width C of a code.")
    num_heads: int = Field(ge=1, le=256, description="Attention heads.")
    head_dim: int = Field(ge=1, le=4096, description="Width of a head.")
    layer_scale_initial_value: float | None = Field(default=0.1, gt=0, le=100, description="Null: no layer scale.")
    use_geglu: bool = Field(default=True, description="Gated GELU.")
    qkv_bias_in_attention: bool = Field(default=False, description="Biases of query, key and value.")
    ffn_capacity_factor: float = Field(default=1.0, gt=0, le=64, description="Hidden width as a multiple of S.")
    mod_fc_kwargs: ModFCSpec = Field(default_factory=ModFCSpec, description="Options of modulated layers.")
    path_drop_prob: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth.")
    latent_attention_kwargs: AttentionOptions = Field(default_factory=AttentionOptions, description="Attention.")
    input_dim: int = Field(default=3, ge=1, le=64, description="readin: channels of the images.")
    tokenizer_type: Literal["ConvNeXtImageTokenizer", "OutputLatentPooling"] | None = Field(
        default=None, description="Follows from the position."
    )
    tokenizer_kwargs: TokenizerSpec | PoolingSpec | None = Field(
        default=None, description="readin: tokenizer. readout: pooling."
    )
    include_residual_in_read_in_attention: bool = Field(default=True, description="readin.")
    include_residual_in_latent_attention: bool = Field(default=False, description="readout.")
    pre_output_layernorm: bool = Field(default=False, description="readout.")
    output_dim: int = Field(default=1000, ge=1, le=1_000_000, description="readout: classes.")
    use_head: bool = Field(default=False, description="readout.")
    train_codes: bool = Field(default=False, description="Train the student's code and initial state.")
    num_codes: int = Field(default=1, ge=1, le=64, description="Codes whose results are averaged; official: 1.")
    official_layer_scale: bool = Field(
        default=True,
        description="readin: the feed-forward block's layer scale starts at 1e-6 as in the official code, where the "
        "configured value does not reach it; False uses layer_scale_initial_value.",
    )

    @classmethod
    def from_official(cls, config: Mapping[str, Any], student: str, stitch_dim: int) -> StudentSpec:
        """The spec of one position from a whole student YAML file (``share_kwargs`` and one section per position).

        Raises:
            SpecError: no such section, unknown keys or values that don't fit.
        """
        if student not in config:
            raise SpecError(f"The student configuration has no section {student!r}; it has {', '.join(config)}.")
        merged = {**(config.get("share_kwargs") or {}), **config[student]}
        try:
            return cls.model_validate({**merged, "student": student, "stitch_dim": stitch_dim})
        except ValidationError as error:
            raise SpecError(f"This is not the configuration of a {student} student: {error}") from None
