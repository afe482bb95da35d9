"""The aggregator: a small transformer over the E experts' feature vectors of one image.

Pre-norm encoder layers over the expert axis, no positional code and no class token (permutation-invariant in the
experts), pooled to one feature vector: the teacher signal of meta-distillation. A LayerNorm and a linear layer on top
give class scores, used only in its own pre-training. Source: Meta-DMoE (arXiv 2210.03885), section 3.2.

Module names are those of the public checkpoints, so that a state dict can be exchanged as it is.

Shapes: B batch, E expert tokens, D feature width, H heads, L layers, K outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import SpecError, nearest

Exclusion = Literal["drop", "zero", "none"]
EXCLUSIONS: tuple[Exclusion, ...] = ("drop", "zero", "none")


class AggregatorOutput(NamedTuple):
    """Result of :class:`Aggregator`.

    Attributes:
        feat_BD: pooled feature, the teacher signal.
        logits_BK: class scores from ``feat_BD``.
        attention_LBHEE: attention of each token (second last axis) over the tokens (last axis, sums to 1), or None.
    """

    feat_BD: Tensor
    logits_BK: Tensor
    attention_LBHEE: Tensor | None = None


def mask_tokens(features_BED: Tensor, owners_B: Tensor | None, mode: str = "drop") -> Tensor:
    """Hide from each sample the expert that was trained on its domain.

    Args:
        features_BED: features of all experts, ``[B, E, D]``.
        owners_B: int64 ``[B]``, expert that owns the sample's domain, in 0..E-1. Not looked at for ``none``.
        mode: ``drop`` keeps the other experts in ascending order (``[B, E-1, D]``), ``zero`` replaces the owner's
            token by zeros (``[B, E, D]``), ``none`` returns the input (the paper's row "without mask").

    Raises:
        SpecError: unknown mode, owners missing, or outside 0..E-1.
    """
    if mode == "none":
        return features_BED
    if mode not in EXCLUSIONS:
        raise SpecError(f"There is no exclusion mode {mode!r}.", nearest(mode, EXCLUSIONS))
    size, experts, width = features_BED.shape
    if owners_B is None or owners_B.shape != (size,):
        seen = None if owners_B is None else tuple(owners_B.shape)
        raise SpecError(f"Exclusion {mode!r} needs one owner per sample: {size} samples, owners of shape {seen}.")
    if size and not (int(owners_B.min()) >= 0 and int(owners_B.max()) < experts):
        raise SpecError(
            f"Owners reach from {int(owners_B.min())} to {int(owners_B.max())}, but there are {experts} experts.",
            "The domain split does not belong to these experts.",
        )
    if mode == "zero":
        own_BE = F.one_hot(owners_B, experts).bool()
        return features_BED.masked_fill(own_BE.unsqueeze(-1), 0.0)
    rest_E = torch.arange(experts - 1, device=features_BED.device)
    index_BE = rest_E + (rest_E >= owners_B.unsqueeze(1)).long()
    return features_BED.gather(1, index_BE.unsqueeze(-1).expand(-1, -1, width))


class TokenAttention(nn.Module):
    """Multi-head self-attention across the tokens of one sample.

    Parameter names, shapes and initialisation are those of ``torch.nn.MultiheadAttention`` (rows q, k, v). The product
    is written out because the tokens are few and the attention maps are wanted.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BED: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the new tokens ``[B, E, D]`` and the attention ``[B, H, E, E]`` before dropout."""
        size, tokens, dim = x_BED.shape
        qkv = F.linear(x_BED, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(size, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5
        attention = scores.softmax(dim=-1)
        mixed = (self.dropout(attention) @ v).transpose(1, 2).reshape(size, tokens, dim)
        out: Tensor = self.out_proj(mixed)
        return out, attention


class _AttentionBlock(nn.Module):
    """Names of the public checkpoints: ``norm`` and ``fn.attend``."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = nn.ModuleDict({"attend": TokenAttention(dim, heads, dropout)})

    def forward(self, x_BED: Tensor) -> tuple[Tensor, Tensor]:
        mixed, attention = self.fn["attend"](self.norm(x_BED))
        return x_BED + mixed, attention


class _MLPBlock(nn.Module):
    """Names of the public checkpoints: ``norm`` and ``fn.net``."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        net = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )
        self.fn = nn.ModuleDict({"net": net})

    def forward(self, x_BED: Tensor) -> Tensor:
        out: Tensor = x_BED + self.fn["net"](self.norm(x_BED))
        return out


class Aggregator(nn.Module):
    """Reads any number of expert tokens per image and emits one feature vector.

    Args:
        dim: feature width D of the experts.
        num_outputs: class scores K of the pre-training head.
        depth: encoder layers.
        heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden width of the feed-forward part as a multiple of D (rounded).
        dropout: probability on attention weights and in the feed-forward part, in training mode only.
        pool: ``mean`` or ``max`` over the tokens. Differs: the public code's ``max`` crashes; this one works.
        plain_head: scores are a linear function of the feature, without the LayerNorm, so that the head can be a copy
            of the student's and the teacher's features mean to it what the student's do. Differs: not in the paper.

    Raises:
        SpecError: ``heads`` does not divide ``dim``, or unknown ``pool``.
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        depth: int = 1,
        heads: int = 16,
        mlp_ratio: float = 2.0,
        dropout: float = 0.1,
        pool: str = "mean",
        plain_head: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            divisors = [h for h in range(1, min(dim, 64) + 1) if dim % h == 0]
            raise SpecError(f"heads={heads} does not divide the feature width {dim}.", f"Use one of {divisors}.")
        if pool not in ("mean", "max"):
            raise SpecError(f"There is no pooling {pool!r}.", nearest(pool, ("mean", "max")))
        self.pool = pool
        hidden = max(1, round(dim * mlp_ratio))
        layers = nn.ModuleList(
            nn.ModuleList([_AttentionBlock(dim, heads, dropout), _MLPBlock(dim, hidden, dropout)]) for _ in range(depth)
        )
        self.transformer = nn.ModuleDict({"layers": layers})
        norm = nn.Identity() if plain_head else nn.LayerNorm(dim)
        self.mlp = nn.Sequential(norm, nn.Linear(dim, num_outputs))

    def forward(self, tokens_BED: Tensor, need_attention: bool = False) -> AggregatorOutput:
        """Pool the experts' views of each image.

        Args:
            tokens_BED: ``[B, E, D]`` with any E >= 1.
            need_attention: return the attention maps of all layers as well.

        Raises:
            SpecError: there is no token to look at.
        """
        if tokens_BED.shape[1] == 0:
            raise SpecError(
                "The aggregator got no expert to look at.",
                "With a single expert, set the exclusion mode to 'none' (or use at least two experts).",
            )
        x_BED = tokens_BED
        maps: list[Tensor] = []
        for attend, mlp in cast(Iterable[tuple[nn.Module, nn.Module]], self.transformer["layers"]):
            x_BED, attention = attend(x_BED)
            x_BED = mlp(x_BED)
            maps.append(attention)
        feat_BD = x_BED.mean(dim=1) if self.pool == "mean" else x_BED.amax(dim=1)
        stacked = torch.stack(maps) if need_attention and maps else None
        return AggregatorOutput(feat_BD, self.mlp(feat_BD), stacked)
