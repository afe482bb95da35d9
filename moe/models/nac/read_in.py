"""Read-in: input latents gather the image's tokens, each through its own key and value projection.

Latent u sees token x through ``W_k (s_u * x)`` and ``W_v (s'_u * x)``, where s_u comes from its code. Computing all
those projections costs a matrix product per (token, latent) pair. But they are linear in the token, so with q the
latent's query and w its attention weights

    q . W_k (s_u * x) = (s_u * W_k^T q) . x            the key projection moves into the query
    sum_v w_v W_v (s'_u * x_v) = W_v (s'_u * sum_v w_v x_v)   the value projection comes after the sum

are exact, and the cost is a matrix product per latent plus one dot product per (token, latent, head). A key bias adds
the same to all scores of a latent and drops out of the softmax; a value bias is added at the end, since weights sum to
1. Where the scaled token is normalised as well (``scale_times_input_normalization_type``), its norm and mean are two
more matrix products with s and s squared.

Known differences: none (golden vectors); only the order of summation.

Shapes: B batch, U latents, V tokens, N token width, S state, C code, H heads, D head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.errors import SpecError
from moe.models.nac.attention import split_heads
from moe.models.nac.draws import Draws, draws_or_default, path_drop
from moe.models.nac.ffn import ModFFN
from moe.models.nac.graph_specs import ModFCSpec
from moe.models.nac.modfc import EPS, L2_EPS, LayerScale, ModLinear


class TokenNorm(NamedTuple):
    """From ``s_u * x_v`` to its normalised form: subtract ``shift``, multiply by ``factor``; each ``[B, U, V]``."""

    shift: Tensor | None
    factor: Tensor


def token_norm(layer: ModLinear, x_BVN: Tensor, scale_UN: Tensor | None) -> TokenNorm | None:
    """The normalisation of scaled tokens without ever forming them; None when the layer has none."""
    kind = layer.spec.scale_times_input_normalization_type
    if scale_UN is None or kind == "none":
        return None
    squares_BUV = (scale_UN**2) @ (x_BVN**2).transpose(1, 2)
    if kind == "l2":
        # The floor inside the root keeps the gradient of an all-zero token finite; its result is zero either way.
        return TokenNorm(None, squares_BUV.clamp_min(L2_EPS**2).rsqrt())
    mean_BUV = (scale_UN @ x_BVN.transpose(1, 2)) / layer.in_features
    variance = (squares_BUV / layer.in_features - mean_BUV**2).clamp_min(0)
    return TokenNorm(mean_BUV, (variance + EPS).rsqrt())


def folded_attention(key: ModLinear, value: ModLinear, q_BUHD: Tensor, x_BVN: Tensor, codes_UC: Tensor) -> Tensor:
    """Attention of U latents over V tokens with per-latent projections, which are never formed.

    Args:
        key: layer N -> H*D.
        value: layer N -> H*D.
        q_BUHD: queries.
        x_BVN: tokens (after their layer norm).
        codes_UC: codes of the latents, ``[U, C]`` or ``[1, C]``.

    Returns:
        Messages ``[B, U, H*D]``.
    """
    batch, latents, heads, width = q_BUHD.shape
    weights_BUHV = _scores(key, q_BUHD * (1 / math.sqrt(width)), x_BVN, codes_UC).softmax(dim=-1)
    scale = value.input_scale(codes_UC)
    norm = token_norm(value, x_BVN, scale)
    if norm is not None:
        weights_BUHV = weights_BUHV * norm.factor.unsqueeze(2)
    pooled = torch.bmm(weights_BUHV.flatten(1, 2), x_BVN).view(batch, latents, heads, -1)
    if scale is not None:
        pooled = pooled * scale.unsqueeze(1)
    if norm is not None and norm.shift is not None:
        pooled = pooled - (weights_BUHV * norm.shift.unsqueeze(2)).sum(dim=-1, keepdim=True)
    w_HDN = value.native_weight.view(heads, width, -1)
    message = torch.einsum("buhn,hdn->buhd", pooled, w_HDN).flatten(2)
    if scale is not None and value.spec.kind == "WModFC":
        message = message / value.demodulation(scale)
    return message if value.native_bias is None else message + value.native_bias


def _scores(key: ModLinear, q_BUHD: Tensor, x_BVN: Tensor, codes_UC: Tensor) -> Tensor:
    """``q . key(x)`` for every latent, head and token, ``[B, U, H, V]``; ``q`` is already divided by sqrt(D)."""
    batch, latents, heads, width = q_BUHD.shape
    scale = key.input_scale(codes_UC)
    q = q_BUHD
    if scale is not None and key.spec.kind == "WModFC":
        q = q / split_heads(key.demodulation(scale), heads)
    w_HDN = key.native_weight.view(heads, width, -1)
    raw_BUHN = torch.einsum("buhd,hdn->buhn", q, w_HDN)
    folded = raw_BUHN if scale is None else raw_BUHN * scale.unsqueeze(1)
    scores = torch.bmm(folded.flatten(1, 2), x_BVN.transpose(1, 2)).view(batch, latents, heads, -1)
    norm = token_norm(key, x_BVN, scale)
    if norm is not None:
        if norm.shift is not None:
            scores = scores - norm.shift.unsqueeze(2) * raw_BUHN.sum(dim=-1, keepdim=True)
        scores = scores * norm.factor.unsqueeze(2)
    if key.native_bias is None:
        return scores
    # Cancels in the softmax; kept so that the bias is in the graph and decays like every other weight.
    return scores + (q_BUHD * key.native_bias.view(heads, width)).sum(dim=-1, keepdim=True)


class ReadInAttention(nn.Module):
    """Attention from latents to tokens.

    Args:
        input_dim: token width N.
        state_dim: width S.
        code_dim: width C.
        num_heads: heads H.
        head_dim: width D of a head.
        mod: options of the modulated layers.
        qkv_bias: biases of query, key and value.
        layer_scale: start of the layer scale; None for none.
        include_residual: add the latents' states.
        path_drop_prob: stochastic depth in training (with a residual only).
    """

    def __init__(
        self,
        input_dim: int,
        state_dim: int,
        code_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        mod: ModFCSpec,
        qkv_bias: bool = False,
        layer_scale: float | None = 1.0,
        include_residual: bool = True,
        path_drop_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.receiver_layernorm = nn.LayerNorm(state_dim, eps=EPS)
        self.sender_layernorm = nn.LayerNorm(input_dim, eps=EPS)
        self.query_compiler = ModLinear(state_dim, inner, code_dim, mod, qkv_bias)
        self.key_compiler = ModLinear(input_dim, inner, code_dim, mod, qkv_bias)
        self.value_compiler = ModLinear(input_dim, inner, code_dim, mod, qkv_bias)
        self.exit_layer = ModLinear(inner, state_dim, code_dim, mod)
        self.layer_scale = LayerScale(state_dim, layer_scale)
        self.include_residual = include_residual
        self.path_drop_prob = path_drop_prob

    def forward(self, states_BUS: Tensor, codes_UC: Tensor, tokens_BVN: Tensor, draws: Draws | None = None) -> Tensor:
        """New states ``[B, U, S]``. Draw: ``attn_path`` (uniform, ``[B, 1, 1]``) in training with a rate above 0.

        Raises:
            SpecError: tokens of another width.
        """
        if tokens_BVN.shape[-1] != self.key_compiler.in_features:
            raise SpecError(
                f"The read-in wants tokens of width {self.key_compiler.in_features}, got {tuple(tokens_BVN.shape)}.",
                "The width is the last tokenizer stage's plus the position grid's channels.",
            )
        q = split_heads(self.query_compiler(self.receiver_layernorm(states_BUS), codes_UC), self.num_heads)
        tokens = self.sender_layernorm(tokens_BVN)
        message = folded_attention(self.key_compiler, self.value_compiler, q, tokens, codes_UC)
        residual = self.layer_scale(self.exit_layer(message, codes_UC))
        if not self.include_residual:
            return residual  # type: ignore[no-any-return]
        source = draws_or_default(draws)
        return path_drop(states_BUS, residual, self.path_drop_prob, self.training, "attn_path", source)


class AttentiveReadIn(nn.Module):
    """:class:`ReadInAttention` and a modulated feed-forward block."""

    def __init__(self, attention: ReadInAttention, ffn: ModFFN) -> None:
        super().__init__()
        self.read_in_attention = attention
        self.ffn = ffn

    def forward(self, states_BUS: Tensor, codes_UC: Tensor, tokens_BVN: Tensor, draws: Draws | None = None) -> Tensor:
        """Input states ``[B, U, S]``. Draws: ``attn_path``, ``ffn_path`` in training with a rate above 0."""
        source = draws_or_default(draws)
        read = self.read_in_attention(states_BUS, codes_UC, tokens_BVN, source)
        return self.ffn(read, codes_UC, source.at(path_drop=source.name("ffn_path")))  # type: ignore[no-any-return]


class ProjectionReadIn(nn.Module):
    """One token per input latent: token u, normalised and projected under latent u's code, is its state.

    Needs as many tokens as input latents. The initial states are not used; the feed-forward block follows.

    Args:
        input_dim: token width N.
        state_dim: width S.
        code_dim: width C.
        mod: options of the modulated layer.
        ffn: the feed-forward block.
    """

    def __init__(self, input_dim: int, state_dim: int, code_dim: int, mod: ModFCSpec, ffn: ModFFN) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(input_dim, eps=EPS)
        self.projection = ModLinear(input_dim, state_dim, code_dim, mod)
        self.ffn = ffn

    def forward(self, states_BUS: Tensor, codes_UC: Tensor, tokens_BVN: Tensor, draws: Draws | None = None) -> Tensor:
        """Input states ``[B, U, S]``. Draw: ``ffn_path`` where its rate is above 0 in training.

        Raises:
            SpecError: another number of tokens than latents.
        """
        if tokens_BVN.shape[1] != states_BUS.shape[1]:
            raise SpecError(
                f"A projection read-in needs one token per input latent, got {tokens_BVN.shape[1]} tokens for "
                f"{states_BUS.shape[1]} latents.",
                "Set num_input_latents to the number of tokens, or use AttentiveReadIn.",
            )
        source = draws_or_default(draws)
        read = self.projection(self.layernorm(tokens_BVN), codes_UC)
        return self.ffn(read, codes_UC, source.at(path_drop=source.name("ffn_path")))  # type: ignore[no-any-return]
