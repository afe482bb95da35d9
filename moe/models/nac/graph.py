"""The latent graph: read-in, L propagators, read-out.

```
tokens --read-in--> input latents --+--> mediators --propagator 1..L--> mediators --+--read-out--> output latents
                                    +--------------- (persistent) ------------------+
```
Tensors carry the official names (``read_in.*``, ``propagators.<l>.*``, ``read_out.*``, ``*_latents.*``,
``latent_seeder.*``), so that official checkpoints load as they are.

Shapes: B batch, U latents, V tokens, N token width, S state, L propagators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.models.nac.attention import LatentAttention, Nodes
from moe.models.nac.draws import Draws, code_noise, draws_or_default
from moe.models.nac.ffn import ModFFN
from moe.models.nac.graph_specs import FFNOptions, GraphSpec, LatentSpec
from moe.models.nac.latents import Latents, LatentSeeder
from moe.models.nac.modfc import EPS
from moe.models.nac.read_in import AttentiveReadIn, ProjectionReadIn, ReadInAttention


class GraphStates(NamedTuple):
    """States ``[B, U, S]`` of the three groups after read-in, the last propagator and the read-out."""

    input: Tensor
    mediator: Tensor
    output: Tensor


class Propagator(nn.Module):
    """Messages to the mediators, then the modulated feed-forward block."""

    def __init__(self, attention: LatentAttention, ffn: ModFFN) -> None:
        super().__init__()
        self.latent_attention = attention
        self.ffn = ffn

    def forward(self, receivers: Nodes, senders: Nodes, draws: Draws | None = None) -> Tensor:
        """New states of the receivers. Draws: ``kernel``, ``attn_path``, ``ffn_path`` as their users need them."""
        source = draws_or_default(draws)
        names = {"kernel": source.name("kernel"), "path_drop": source.name("attn_path")}
        states = self.latent_attention(receivers, senders, source.at(**names))
        return self.ffn(states, receivers.codes, source.at(path_drop=source.name("ffn_path")))  # type: ignore[no-any-return]


class ReadOut(Propagator):
    """A propagator for the output latents, with an optional layer norm and linear head."""

    def __init__(
        self, attention: LatentAttention, ffn: ModFFN, state_dim: int, layernorm: bool, head_dim: int | None
    ) -> None:
        super().__init__(attention, ffn)
        self.pre_output_layernorm = nn.LayerNorm(state_dim, eps=EPS) if layernorm else None
        self.head = None if head_dim is None else nn.Linear(state_dim, head_dim)
        self.out_features = state_dim if head_dim is None else head_dim

    def forward(self, receivers: Nodes, senders: Nodes, draws: Draws | None = None) -> Tensor:
        """Output states ``[B, U, S]``, or ``[B, U, K]`` with a head. Draws as :class:`Propagator`."""
        states = super().forward(receivers, senders, draws)
        if self.pre_output_layernorm is not None:
            states = self.pre_output_layernorm(states)
        return states if self.head is None else self.head(states)


class KeptStitch(nn.Module):
    """A pair of stitches kept between two modules: ``x + pre(gelu(post(LN(x))))``, S -> stitch -> S."""

    def __init__(self, state_dim: int, stitch_dim: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(state_dim, eps=EPS)
        self.post_stitch = nn.Linear(state_dim, stitch_dim)
        self.pre_stitch = nn.Linear(stitch_dim, state_dim)

    def forward(self, states_BUS: Tensor) -> Tensor:
        """Shape-preserving."""
        return states_BUS + self.pre_stitch(F.gelu(self.post_stitch(self.layernorm(states_BUS))))  # type: ignore[no-any-return]


class LatentGraph(nn.Module):
    """The circuit between tokens and pooled outputs.

    Args:
        spec: everything but the widths.
        input_dim: token width N.
        state_dim: width S.
        output_dim: width of the read-out's head, if it has one.
        eval_noise: whether seeded states are noisy in evaluation.
    """

    def __init__(
        self, spec: GraphSpec, input_dim: int, state_dim: int, output_dim: int, eval_noise: bool = True
    ) -> None:
        super().__init__()
        self.spec, self.state_dim = spec, state_dim
        self.code_noise_scale = spec.code_noise_scale or 0.0
        per_layer = None if spec.share_codes_between_iterations else spec.num_iterations
        self.input_latents = self._latents(spec.num_input_latents, spec.input_latent_kwargs, per_layer)
        self.mediator_latents = self._latents(spec.num_mediator_latents, spec.mediator_latent_kwargs, per_layer)
        self.output_latents = self._latents(spec.num_output_latents, spec.output_latent_kwargs, None)
        seeder_noise = self.code_noise_scale if spec.use_code_noise_in_latent_seeder else 0.0
        self.latent_seeder = (
            LatentSeeder(spec.code_dim, state_dim, seeder_noise, spec.latent_seeder_kwargs, eval_noise)
            if spec.use_latent_seeder
            else None
        )
        self.read_in = self._read_in(input_dim)
        self.propagators = nn.ModuleList(self._propagators())
        self.read_out = self._read_out(output_dim)
        self.stitches = (
            None
            if spec.stitch_dim is None
            else nn.ModuleList(KeptStitch(state_dim, spec.stitch_dim) for _ in range(spec.num_iterations + 1))
        )

    def _latents(self, count: int, spec: LatentSpec, iterations: int | None) -> Latents:
        state_dim = None if self.spec.use_latent_seeder else self.state_dim
        return Latents(count, self.spec.signature_dim, self.spec.code_dim, spec, iterations, state_dim)

    def _ffn(self, options: FFNOptions, path_drop_prob: float) -> ModFFN:
        spec = self.spec
        return ModFFN(
            self.state_dim,
            spec.code_dim,
            spec.ffn_capacity_factor,
            use_geglu=spec.use_geglu if options.use_geglu is None else options.use_geglu,
            layer_scale=spec.layer_scale_initial_value,
            mod=spec.mod,
            path_drop_prob=path_drop_prob,
        )

    def _read_in(self, input_dim: int) -> AttentiveReadIn | ProjectionReadIn:
        spec, own = self.spec, self.spec.read_in_kwargs
        ffn = self._ffn(own.ffn_kwargs, own.path_drop_prob)
        if spec.read_in_type == "ProjectionReadIn":
            return ProjectionReadIn(input_dim, self.state_dim, spec.code_dim, spec.mod, ffn)
        bias = own.read_in_attention_kwargs.qkv_bias
        attention = ReadInAttention(
            input_dim,
            self.state_dim,
            spec.code_dim,
            own.num_heads or spec.num_heads,
            spec.head_dim,
            mod=spec.mod,
            qkv_bias=spec.qkv_bias_in_attention if bias is None else bias,
            layer_scale=own.read_in_layer_scale_initial_value,
            include_residual=own.include_residual_in_read_in_attention,
            path_drop_prob=own.path_drop_prob,
        )
        return AttentiveReadIn(attention, ffn)

    def _propagators(self) -> list[Propagator]:
        spec = self.spec
        made: list[Propagator] = []
        for layer in range(spec.num_iterations):
            if made and spec.share_propagator_weights:
                made.append(made[0])
                continue
            own = spec.propagator(layer)
            rate = spec.path_drop_prob if own.path_drop_prob is None else own.path_drop_prob
            attention = LatentAttention(
                self.state_dim,
                spec.code_dim,
                own.num_heads or spec.num_heads,
                spec.head_dim,
                own.latent_attention_kwargs,
                mod=spec.mod,
                layer_scale=spec.layer_scale_initial_value,
                qkv_bias=spec.qkv_bias_in_attention,
                path_drop_prob=rate,
            )
            shared = made[0].ffn if made and spec.share_ffn_between_propagators else None
            made.append(Propagator(attention, shared or self._ffn(own.ffn_kwargs, rate)))
        return made

    def _read_out(self, output_dim: int) -> ReadOut:
        spec, own = self.spec, self.spec.read_out_kwargs
        attention = LatentAttention(
            self.state_dim,
            spec.code_dim,
            own.num_heads or spec.num_heads,
            spec.head_dim,
            own.latent_attention_kwargs,
            mod=spec.mod,
            layer_scale=spec.layer_scale_initial_value,
            qkv_bias=spec.qkv_bias_in_attention,
            path_drop_prob=own.path_drop_prob,
            include_residual=own.include_residual_in_latent_attention,
        )
        ffn = self._ffn(own.ffn_kwargs, own.path_drop_prob)
        return ReadOut(attention, ffn, self.state_dim, own.pre_output_layernorm, output_dim if own.use_head else None)

    def initial_states(self, latents: Latents, batch: int, role: str, draws: Draws) -> Tensor:
        """Seeded or learned states ``[B, U, S]`` of one group; draws ``seed_<role>.code`` and ``seed_<role>.state``."""
        if self.latent_seeder is None or latents.initial_states_ is not None:
            return latents.initial_states_.expand(batch, -1, -1)  # type: ignore[union-attr]
        names = {name: f"seed_{role}.{name}" for name in ("code", "state")}
        return self.latent_seeder(latents.codes(), batch, draws.at(**names))  # type: ignore[no-any-return]

    def forward(self, tokens_BVN: Tensor, draws: Draws | None = None) -> GraphStates:
        """Tokens to output states.

        Draws, in this order: ``seed_{input,mediator,output}.{code,state}``, ``read_in.code``, per propagator
        ``prop<l>.{receiver_code,sender_code,kernel,attn_path,ffn_path}``, then ``read_out.*`` alike; code, kernel and
        path draws in training only, where their scale or rate is above 0.
        """
        source, batch, spec = draws_or_default(draws), tokens_BVN.shape[0], self.spec
        inputs = self.initial_states(self.input_latents, batch, "input", source)
        mediators = None
        if not spec.use_input_states_as_mediator_states:
            mediators = self.initial_states(self.mediator_latents, batch, "mediator", source)
        outputs = self.initial_states(self.output_latents, batch, "output", source)
        inputs = self._read(inputs, tokens_BVN, source)
        mediators = inputs if mediators is None else mediators
        for layer, propagator in enumerate(self.propagators):
            mediators = self._propagate(layer, propagator, inputs, mediators, source)
            if self.stitches is not None:
                mediators = self.stitches[layer + 1](mediators)
        receivers = self._nodes(outputs, [(self.output_latents, outputs)], -1, "read_out.receiver_code", source)
        sent = [(self.mediator_latents, mediators)]
        if spec.enable_input_output_communication:
            sent.insert(0, (self.input_latents, inputs))
        senders = self._nodes(outputs, sent, -1, "read_out.sender_code", source)
        out = self.read_out(receivers, senders, source.at(**_local("read_out")))
        return GraphStates(inputs, mediators, out)

    def _read(self, inputs: Tensor, tokens_BVN: Tensor, draws: Draws) -> Tensor:
        codes = self._noisy(self.input_latents.codes(), "read_in.code", draws)
        states: Tensor = self.read_in(inputs, codes, tokens_BVN, draws.at(**_local("read_in")))
        return states if self.stitches is None else self.stitches[0](states)

    def _propagate(self, layer: int, propagator: nn.Module, inputs: Tensor, mediators: Tensor, draws: Draws) -> Tensor:
        spec = self.spec
        group = [(self.mediator_latents, mediators)]
        hears_inputs = spec.enable_persistent_input_mediator_communication or layer == 0
        sent = list(group)
        if hears_inputs and not spec.disable_input_mediator_communication:
            sent.insert(0, (self.input_latents, inputs))
        receivers = self._nodes(mediators, group, layer, f"prop{layer}.receiver_code", draws)
        senders = self._nodes(mediators, sent, layer, f"prop{layer}.sender_code", draws)
        return propagator(receivers, senders, draws.at(**_local(f"prop{layer}")))  # type: ignore[no-any-return]

    def _nodes(self, like: Tensor, groups: list[tuple[Latents, Tensor]], layer: int, noise: str, draws: Draws) -> Nodes:
        """Groups side by side, their codes with noise."""
        codes = torch.cat([latents.codes(layer) for latents, _ in groups])
        signatures = torch.cat([latents.signatures_ for latents, _ in groups])
        states = torch.cat([state.to(like.dtype) for _, state in groups], dim=1)
        return Nodes(states, self._noisy(codes, noise, draws), signatures)

    def _noisy(self, codes: Tensor, name: str, draws: Draws) -> Tensor:
        return code_noise(codes, self.code_noise_scale, name, draws) if self.training else codes


def _local(scope: str) -> dict[str, str]:
    """Draw names of a propagator, read-in or read-out -> names of the whole circuit."""
    return {name: f"{scope}.{name}" for name in ("kernel", "attn_path", "ffn_path")}
