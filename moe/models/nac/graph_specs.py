"""What a latent graph is, in words: frozen records with the key names of the published YAML files. Torch-free.

``moe.models.nac.specs`` holds the records of a whole circuit and of distillation students.
``CircuitSpec.from_official(config["model"]["kwargs"])`` reads any of the nine published configurations,
``StudentSpec.from_official`` a section of the two student configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Normalization = Literal["ln", "l2", "none", "sigmoid", "tanh"]

PRIOR_NEEDS: dict[str, tuple[str, ...]] = {
    "barabasi-albert": ("m",),
    "scale-free": ("m",),
    "planted-partition": ("l", "k", "p_in", "p_out"),
    "ring-of-cliques": ("num_cliques", "clique_size"),
    "erdos-renyi": ("p",),
    "watts-strogatz": ("k", "p"),
    "grid-graph": ("dim",),
    "balanced-tree": ("r", "h"),
    "barbell": ("m1",),
    "hypercube": (),
    "complete": (),
}
"""Graph priors by name -> arguments that they need; ``scale-free`` is another name of ``barabasi-albert``."""
GRAPH_PRESETS = tuple(PRIOR_NEEDS)


def prior_nodes(name: str, count: int, kwargs: Mapping[str, Any]) -> int:
    """Nodes of a graph prior for ``count`` latents.

    Raises:
        ValueError: arguments are missing or no numbers.
    """
    missing = [key for key in PRIOR_NEEDS[name] if key not in kwargs]
    if missing:
        raise ValueError(f"The graph prior {name!r} needs {', '.join(PRIOR_NEEDS[name])}; missing: {missing}.")
    if name == "planted-partition":
        return int(kwargs["l"]) * int(kwargs["k"])
    if name == "ring-of-cliques":
        return int(kwargs["num_cliques"]) * int(kwargs["clique_size"])
    if name == "grid-graph":
        dim = kwargs["dim"]
        return math.prod(int(side) for side in dim) if isinstance(dim, list | tuple) else int(dim)
    if name == "balanced-tree":
        return sum(int(kwargs["r"]) ** level for level in range(int(kwargs["h"]) + 1))
    if name == "barbell":
        return 2 * int(kwargs["m1"]) + int(kwargs.get("m2", 0))
    if name == "hypercube":
        return 1 << int(kwargs.get("n", count.bit_length() - 1 if count & (count - 1) == 0 else 8))
    return int(kwargs.get("n", count))


class NacSpec(BaseModel):
    """Base of all records: frozen, no unknown keys, ``null`` keyword groups mean the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        """``some_kwargs: null`` in the published files means "as by default"."""
        if not isinstance(data, Mapping):
            return data
        return {k: v for k, v in data.items() if not (v is None and k.endswith("_kwargs")) and k != "__speedrun__"}


class ModFCSpec(NacSpec):
    """How a code modulates a linear layer (``moe.models.nac.modfc``)."""

    kind: Literal["ModFC", "FC", "WModFC"] = Field(
        default="ModFC",
        description="ModFC scales the input by the code; FC ignores the code; WModFC scales, demodulates the weight.",
    )
    scale_normalization_type: Normalization = Field(default="ln", description="Normalisation of the raw scale.")
    scale_times_input_normalization_type: Literal["none", "ln", "l2"] = Field(
        default="none", description="Normalisation of the scaled input."
    )
    add_one_to_scale: bool = Field(default=False, description="Scale around 1 instead of around 0.")
    learnable_scale_gain: bool = Field(default=False, description="Whether the gain of the scale is trained.")
    scale_gain: float = Field(default=1.0, ge=-100, le=100, description="Gain of the scale (its start, if trained).")


class KernelSpec(NacSpec):
    """Affinity of signatures (``moe.models.nac.kernel``)."""

    truncation: float | None = Field(
        default=None, gt=0, le=2, description="Cosine distance beyond which an edge is cut; null cuts none."
    )
    stochastic_kernel: bool = Field(default=False, description="Sample relaxed edges in training.")
    stochastic_sampling_temperature: float = Field(
        default=1.0, gt=0, le=100, description="Temperature of the relaxed Bernoulli samples."
    )
    learnable_bandwidth: bool = Field(default=True, description="Whether the bandwidth is trained.")
    initial_bandwidth: float = Field(default=1.0, gt=0, le=100, description="Start of the bandwidth.")
    straight_through: bool = Field(default=True, description="Accepted for old files; it has no effect.")
    truncation_implementation: Literal["direct", "masked"] = Field(
        default="direct",
        description="direct: no gradient through cut edges. masked: the plain kernel keeps the uncut gradient.",
    )


class AttentionOptions(NacSpec):
    """``latent_attention_kwargs``: options of attention between latents."""

    kernel_type: Literal["DotProductKernel"] = Field(default="DotProductKernel", description="Kind of kernel.")
    kernel_kwargs: KernelSpec = Field(default_factory=KernelSpec, description="Options of the kernel.")
    share_layernorm: bool = Field(default=False, description="One layer norm for receivers and senders.")
    mask_attn_scores_with_affinities: bool = Field(default=True, description="Add log-affinities to the scores.")
    scale_attn_with_affinities: bool = Field(
        default=False, description="Multiply attention weights by affinities after the softmax."
    )
    normalize_kernel_along_keys: bool = Field(default=True, description="Affinities sum to 1 over senders.")
    qkv_bias: bool | None = Field(default=None, description="Biases of query, key, value; null: the graph's choice.")


class FFNOptions(NacSpec):
    """``ffn_kwargs``: options of a modulated feed-forward block."""

    use_geglu: bool | None = Field(default=None, description="Gated GELU; null: the graph's choice.")


class PropagatorSpec(NacSpec):
    """``propagator_kwargs`` and the entries of ``propagator_layerwise_kwargs``."""

    latent_attention_kwargs: AttentionOptions = Field(default_factory=AttentionOptions, description="Attention.")
    ffn_kwargs: FFNOptions = Field(default_factory=FFNOptions, description="Feed-forward block.")
    path_drop_prob: float | None = Field(default=None, ge=0, lt=1, description="Null: the graph's rate.")
    num_heads: int | None = Field(default=None, ge=1, le=256, description="Null: the graph's number.")


class ReadInAttentionOptions(NacSpec):
    """``read_in_attention_kwargs``."""

    qkv_bias: bool | None = Field(default=None, description="Null: the graph's choice.")


class ReadInSpec(NacSpec):
    """``read_in_kwargs``: tokens to input latents."""

    num_heads: int | None = Field(default=None, ge=1, le=256, description="Null: the graph's number.")
    path_drop_prob: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth inside the read-in.")
    include_residual_in_read_in_attention: bool = Field(default=True, description="Add the initial states.")
    read_in_layer_scale_initial_value: float | None = Field(
        default=1.0, gt=0, le=100, description="Layer scale of the attention; null: none."
    )
    read_in_attention_kwargs: ReadInAttentionOptions = Field(
        default_factory=ReadInAttentionOptions, description="Attention."
    )
    ffn_kwargs: FFNOptions = Field(default_factory=FFNOptions, description="Feed-forward block.")


class ReadOutSpec(NacSpec):
    """``read_out_kwargs``: mediators and inputs to output latents."""

    num_heads: int | None = Field(default=None, ge=1, le=256, description="Null: the graph's number.")
    path_drop_prob: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth inside the read-out.")
    include_residual_in_latent_attention: bool = Field(default=False, description="Add the initial output states.")
    pre_output_layernorm: bool = Field(default=False, description="Layer norm after the block.")
    use_head: bool = Field(default=True, description="Linear map of output states to output_dim.")
    latent_attention_kwargs: AttentionOptions = Field(default_factory=AttentionOptions, description="Attention.")
    ffn_kwargs: FFNOptions = Field(default_factory=FFNOptions, description="Feed-forward block.")


class LatentSpec(NacSpec):
    """``*_latent_kwargs``: how one group of latents starts."""

    graph_preset: str | None = Field(default=None, description=f"One of {', '.join(GRAPH_PRESETS)}; null: random.")
    graph_generator_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the graph generator, besides truncation, num_iters, learning_rate, loss of the fit.",
    )
    learnable_signatures: bool = Field(default=True, description="Whether signatures are trained.")
    learnable_codes: bool = Field(default=True, description="Whether codes are trained.")

    @field_validator("graph_preset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in GRAPH_PRESETS:
            raise ValueError(f"There is no graph prior named {name!r}; allowed: {', '.join(GRAPH_PRESETS)}.")
        return name


class SeederSpec(NacSpec):
    """``latent_seeder_kwargs``."""

    use_state_noise: bool = Field(default=True, description="Add learned noise to the seeded states.")
    use_code_as_mean_state: bool = Field(
        default=False, description="The code itself is the mean state (needs code_dim = state_dim)."
    )


class GraphSpec(NacSpec):
    """``latent_graph_kwargs``: the circuit between tokens and pooled outputs."""

    code_dim: int = Field(ge=1, le=65536, description="Width C of a code.")
    signature_dim: int = Field(default=64, ge=1, le=4096, description="Width Z of a signature.")
    num_input_latents: int = Field(ge=1, le=65536, description="Latents that read the tokens.")
    num_mediator_latents: int = Field(ge=1, le=65536, description="Latents that exchange messages.")
    num_output_latents: int = Field(ge=1, le=65536, description="Latents that are pooled.")
    num_iterations: int = Field(ge=0, le=256, description="Propagators L.")
    num_heads: int = Field(default=6, ge=1, le=256, description="Attention heads.")
    head_dim: int = Field(default=64, ge=1, le=4096, description="Width of a head.")
    path_drop_prob: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth of propagators.")
    layer_scale_initial_value: float | None = Field(default=0.1, gt=0, le=100, description="Null: no layer scale.")
    ffn_capacity_factor: float = Field(default=1.0, gt=0, le=64, description="Hidden width as a multiple of S.")
    code_noise_scale: float | None = Field(default=None, ge=0, le=1, description="Relative noise on codes.")
    use_code_noise_in_latent_seeder: bool = Field(default=True, description="Code noise in the seeder too.")
    qkv_bias_in_attention: bool = Field(default=False, description="Biases of query, key and value.")
    mod_fc_cls: Literal["ModFC", "FC", "WModFC"] = Field(default="ModFC", description="Kind of modulated layers.")
    mod_fc_kwargs: ModFCSpec = Field(default_factory=ModFCSpec, description="Options of modulated layers.")
    use_geglu: bool = Field(default=True, description="Gated GELU in feed-forward blocks.")
    share_propagator_weights: bool = Field(default=False, description="One propagator, applied L times.")
    share_ffn_between_propagators: bool = Field(default=False, description="One feed-forward block for all.")
    share_codes_between_iterations: bool = Field(default=True, description="False: senders' codes per propagator.")
    enable_persistent_input_mediator_communication: bool = Field(
        default=True, description="Mediators see the inputs in every propagator instead of only the first."
    )
    disable_input_mediator_communication: bool = Field(default=False, description="Mediators never see the inputs.")
    enable_input_output_communication: bool = Field(default=True, description="Outputs see the inputs.")
    use_input_states_as_mediator_states: bool = Field(
        default=False, description="Mediators start as the inputs after read-in (needs equal numbers)."
    )
    use_latent_seeder: bool = Field(default=True, description="Initial states from codes; False: learned states.")
    latent_seeder_kwargs: SeederSpec = Field(default_factory=SeederSpec, description="Options of the seeder.")
    input_latent_kwargs: LatentSpec = Field(default_factory=LatentSpec, description="Input latents.")
    mediator_latent_kwargs: LatentSpec = Field(default_factory=LatentSpec, description="Mediator latents.")
    output_latent_kwargs: LatentSpec = Field(default_factory=LatentSpec, description="Output latents.")
    read_in_type: Literal["AttentiveReadIn", "ProjectionReadIn"] = Field(
        default="AttentiveReadIn", description="Attention over tokens, or one projected token per latent."
    )
    read_in_kwargs: ReadInSpec = Field(default_factory=ReadInSpec, description="Options of the read-in.")
    propagator_kwargs: PropagatorSpec = Field(default_factory=PropagatorSpec, description="Options of propagators.")
    propagator_layerwise_kwargs: tuple[PropagatorSpec | None, ...] = Field(
        default=(), description="Options by propagator in place of propagator_kwargs; null entries use these."
    )
    read_out_kwargs: ReadOutSpec = Field(default_factory=ReadOutSpec, description="Options of the read-out.")
    stitch_dim: int | None = Field(
        default=None, ge=1, le=65536, description="Keep a pair of stitch layers S -> stitch -> S after each propagator."
    )

    @model_validator(mode="after")
    def _fits(self) -> GraphSpec:
        given = len(self.propagator_layerwise_kwargs)
        if given not in (0, self.num_iterations):
            raise ValueError(f"propagator_layerwise_kwargs has {given} entries for {self.num_iterations} propagators.")
        if given and self.share_propagator_weights:
            raise ValueError("propagator_layerwise_kwargs contradicts share_propagator_weights=true; drop one.")
        if self.use_input_states_as_mediator_states and self.num_input_latents != self.num_mediator_latents:
            raise ValueError(
                "use_input_states_as_mediator_states needs as many input latents as mediators, got "
                f"{self.num_input_latents} and {self.num_mediator_latents}."
            )
        for role in ("input", "mediator", "output"):
            count, own = getattr(self, f"num_{role}_latents"), getattr(self, f"{role}_latent_kwargs")
            if own.graph_preset is None:
                continue
            nodes = prior_nodes(own.graph_preset, count, own.graph_generator_kwargs)
            if nodes != count:
                raise ValueError(
                    f"The graph prior {own.graph_preset} of {role}_latent_kwargs has {nodes} nodes for {count} "
                    f"latents; set num_{role}_latents to {nodes}, or change graph_generator_kwargs."
                )
        return self

    @property
    def mod(self) -> ModFCSpec:
        """Options of modulated layers, ``mod_fc_cls`` included."""
        return self.mod_fc_kwargs.model_copy(update={"kind": self.mod_fc_cls})

    def propagator(self, layer: int) -> PropagatorSpec:
        """Options of propagator ``layer``."""
        own = self.propagator_layerwise_kwargs[layer] if self.propagator_layerwise_kwargs else None
        return self.propagator_kwargs if own is None else own
