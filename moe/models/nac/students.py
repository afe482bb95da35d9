"""Distillation students: one module of a circuit between stitches, to stand in for a block of a meta model.

A **stage** is what a teaching pair replaces: an ``nn.Module`` that maps states to states, called with one tensor. The
first stage of a network takes images and returns hidden states, the last takes hidden states and returns logits, all
others map ``[B, T, M] -> [B, T, M]`` (M the meta model's width). :class:`Stage` is that protocol; every student follows
it, so that ``head(m_2(student(m_0(images))))`` needs to know nothing about circuits.

A student has one code for all tokens (the real circuit has one per latent) and, where it reads in or out, one initial
state. They are part of its state dict (``codes``, ``initial_states``); official files do not have them, and
:meth:`NacStudent.load_official` keeps those at hand.

``Differs:`` official codes and states are drawn anew by every process and never saved; ours are drawn from the seed
with the weights, and saved. The official initial state differs by position in the batch; ours is one for all.
``Parity:`` the read-in student's feed-forward layer scale starts at 1e-6 (``official_layer_scale``).

Shapes: B batch, T tokens, M meta width, S state, C code, U slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.attention import LatentAttention, Nodes
from moe.models.nac.checkpoints import load_strictly
from moe.models.nac.draws import Draws, draws_or_default
from moe.models.nac.ffn import ModFFN
from moe.models.nac.modfc import EPS
from moe.models.nac.pooling import OutputLatentPooling
from moe.models.nac.read_in import AttentiveReadIn, ReadInAttention
from moe.models.nac.specs import PoolingSpec, StudentSpec, TokenizerSpec
from moe.models.nac.tokenizer import Tokenizer

OWN_TENSORS = ("codes", "initial_states")
"""What our students keep and official files do not have."""

OFFICIAL_READ_IN_FFN_SCALE = 1e-6


@runtime_checkable
class Stage(Protocol):
    """A replaceable stage of a network: images or states in, states or logits out."""

    def __call__(self, states: Tensor) -> Tensor:
        """Apply the stage."""
        ...


class NacStudent(nn.Module):
    """Common part of the three students: codes, and what is shared with the circuit's modules.

    Args:
        spec: the section of this position.
    """

    codes: Tensor

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        self._keep("codes", torch.randn(spec.num_codes, spec.code_dim))

    def _keep(self, name: str, value: Tensor) -> None:
        if self.spec.train_codes:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _attention(self, include_residual: bool) -> LatentAttention:
        spec = self.spec
        return LatentAttention(
            spec.state_dim,
            spec.code_dim,
            spec.num_heads,
            spec.head_dim,
            spec.latent_attention_kwargs,
            mod=spec.mod_fc_kwargs,
            layer_scale=spec.layer_scale_initial_value,
            qkv_bias=spec.qkv_bias_in_attention,
            path_drop_prob=spec.path_drop_prob,
            include_residual=include_residual,
            use_kernel=False,
        )

    def _ffn(self, layer_scale: float | None) -> ModFFN:
        spec = self.spec
        return ModFFN(
            spec.state_dim,
            spec.code_dim,
            spec.ffn_capacity_factor,
            use_geglu=spec.use_geglu,
            layer_scale=layer_scale,
            mod=spec.mod_fc_kwargs,
            path_drop_prob=spec.path_drop_prob,
        )

    def forward(
        self, hidden: Tensor, codes: Tensor | None = None, states: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        """Apply the stage; the mean over the student's codes if it has several.

        Args:
            hidden: images ``[B, c, h, w]`` (read-in) or hidden states ``[B, T, M]``.
            codes: ``[K, C]`` in place of the student's own.
            states: initial states ``[B, U, S]`` in place of the student's own (read-in, read-out).
            draws: random numbers: ``attn_path``, ``ffn_path``, ``pool.exponential``.
        """
        source = draws_or_default(draws)
        used = self.codes if codes is None else codes
        results = [self.apply_code(hidden, code.unsqueeze(0), states, source) for code in used.unbind(0)]
        return results[0] if len(results) == 1 else torch.stack(results).mean(dim=0)

    def apply_code(self, hidden: Tensor, code_1C: Tensor, states: Tensor | None, draws: Draws) -> Tensor:
        """The stage under one code."""
        raise NotImplementedError

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Load an official student file strictly; the student keeps its own codes and initial states.

        Raises:
            CheckpointError: missing, extra or misshapen tensors.
        """
        load_strictly(self, state, f"These weights are not of this {self.spec.student} student", OWN_TENSORS)

    def official_state_dict(self) -> dict[str, Tensor]:
        """The tensors of an official student file."""
        return {name: value for name, value in self.state_dict().items() if name not in OWN_TENSORS}

    def _check(self, hidden: Tensor) -> None:
        if hidden.ndim != 3 or hidden.shape[-1] != self.spec.stitch_dim:
            raise SpecError(
                f"This {self.spec.student} student reads states [B, T, {self.spec.stitch_dim}], got "
                f"{tuple(hidden.shape)}.",
                "stitch_dim is the width of the meta model.",
            )


class MediatorStudent(NacStudent):
    """Stitch, one attention without kernel and feed-forward block, stitch: ``[B, T, M] -> [B, T, M]``."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__(spec)
        self.pre_stitch = nn.Linear(spec.stitch_dim, spec.state_dim)
        self.latent_attention = self._attention(include_residual=True)
        self.ffn = self._ffn(spec.layer_scale_initial_value)
        self.post_stitch = nn.Linear(spec.state_dim, spec.stitch_dim)

    def apply_code(self, hidden: Tensor, code_1C: Tensor, states: Tensor | None, draws: Draws) -> Tensor:
        """See :meth:`NacStudent.forward`."""
        self._check(hidden)
        nodes = Nodes(self.pre_stitch(hidden), code_1C)
        attended = self.latent_attention(nodes, nodes, draws.at(path_drop="attn_path"))
        out = self.ffn(attended, code_1C, draws.at(path_drop="ffn_path"))
        return self.post_stitch(out)  # type: ignore[no-any-return]


class _SlotStudent(NacStudent):
    """A student with one slot, whose initial state is its own."""

    initial_states: Tensor

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__(spec)
        self._keep("initial_states", torch.randn(1, 1, spec.state_dim))

    def _states(self, given: Tensor | None, batch: int) -> Tensor:
        return self.initial_states.expand(batch, -1, -1) if given is None else given


class ReadInStudent(_SlotStudent):
    """Tokenizer, read-in into one slot, stitch: images ``-> [B, 1, M]``."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__(spec)
        tokenizer = spec.tokenizer_kwargs or TokenizerSpec()
        if not isinstance(tokenizer, TokenizerSpec):
            raise SpecError("A readin student needs the tokenizer_kwargs of an image tokenizer.")
        self.tokenizer = Tokenizer(spec.input_dim, spec.state_dim, tokenizer)
        attention = ReadInAttention(
            self.tokenizer.out_features,
            spec.state_dim,
            spec.code_dim,
            spec.num_heads,
            spec.head_dim,
            mod=spec.mod_fc_kwargs,
            qkv_bias=spec.qkv_bias_in_attention,
            include_residual=spec.include_residual_in_read_in_attention,
            path_drop_prob=spec.path_drop_prob,
        )
        scale = OFFICIAL_READ_IN_FFN_SCALE if spec.official_layer_scale else spec.layer_scale_initial_value
        self.read_in = AttentiveReadIn(attention, self._ffn(scale))
        self.post_stitch = nn.Linear(spec.state_dim, spec.stitch_dim)

    def apply_code(self, hidden: Tensor, code_1C: Tensor, states: Tensor | None, draws: Draws) -> Tensor:
        """See :meth:`NacStudent.forward`; ``hidden`` are images."""
        tokens = self.tokenizer(hidden)
        return self.post_stitch(self.read_in(self._states(states, len(hidden)), code_1C, tokens, draws))  # type: ignore[no-any-return]


class ReadOutStudent(_SlotStudent):
    """Stitch, attention into one slot, feed-forward block, pooled logits: ``[B, T, M] -> [B, K]``."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__(spec)
        pooling = spec.tokenizer_kwargs or PoolingSpec()
        if not isinstance(pooling, PoolingSpec):
            raise SpecError("A readout student needs the tokenizer_kwargs of an output pooling.")
        self.pre_stitch = nn.Linear(spec.stitch_dim, spec.state_dim)
        self.latent_attention = self._attention(include_residual=spec.include_residual_in_latent_attention)
        self.ffn = self._ffn(spec.layer_scale_initial_value)
        self.pre_output_layernorm = nn.LayerNorm(spec.state_dim, eps=EPS) if spec.pre_output_layernorm else None
        self.head = nn.Linear(spec.state_dim, spec.output_dim) if spec.use_head else None
        width = spec.output_dim if spec.use_head else spec.state_dim
        self.tokenizer = OutputLatentPooling(width, spec.output_dim, pooling)

    def apply_code(self, hidden: Tensor, code_1C: Tensor, states: Tensor | None, draws: Draws) -> Tensor:
        """See :meth:`NacStudent.forward`."""
        self._check(hidden)
        receivers = Nodes(self._states(states, len(hidden)), code_1C)
        senders = Nodes(self.pre_stitch(hidden), code_1C)
        out = self.latent_attention(receivers, senders, draws.at(path_drop="attn_path"))
        out = self.ffn(out, code_1C, draws.at(path_drop="ffn_path"))
        if self.pre_output_layernorm is not None:
            out = self.pre_output_layernorm(out)
        out = out if self.head is None else self.head(out)
        return self.tokenizer(out, draws.at(exponential="pool.exponential"))  # type: ignore[no-any-return]


def build_student(spec: StudentSpec, seed: int | None = None) -> NacStudent:
    """The student module of one position.

    Args:
        spec: the section of this position.
        seed: weights, codes and initial states follow from it alone; None uses torch's generator as it stands.

    Raises:
        SpecError: tokenizer options of another position.
    """
    kinds: dict[str, type[NacStudent]] = {
        "readin": ReadInStudent,
        "mediator": MediatorStudent,
        "readout": ReadOutStudent,
    }
    if seed is None:
        return kinds[spec.student](spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[spec.student](spec)
