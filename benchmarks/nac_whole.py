"""A training step of the Tiny-ImageNet circuit (NAC-Tiny) against its official form, as a whole.

The official form is built here from the method's description, layer by layer: the read-in projects every token once per
latent; attention is written out with one einsum per product over all edges, closed ones included; edges are sampled and
normalised by the formulas as they stand; AdamW goes through the 362 tensors one by one. Each side runs in a process of
its own, which reports CPU seconds, and the two take turns; both get the same weights and the same random draws, and
logits, loss and every gradient are compared before the row is told.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.measure import Row
from moe.models.nac.attention import LatentAttention, Nodes
from moe.models.nac.circuit import Circuit, build_circuit
from moe.models.nac.draws import Draws, draws_or_default
from moe.models.nac.ffn import ModFFN
from moe.models.nac.kernel import DotProductKernel, cosine_distance
from moe.models.nac.modfc import ModLinear
from moe.models.nac.presets import circuit_preset, regularizer_preset
from moe.models.nac.read_in import ReadInAttention
from moe.models.nac.regularizers import block_model, graph_regularizer
from moe.models.nac.specs import CircuitSpec
from workers.device import setup

BATCH = 4
ROUNDS = 2
"""Processes of each side; the sides take turns."""
WARM, STEPS = 4, 4
"""Steps that are not timed (memory is taken from the system) and steps that are, in each process."""


def step_rows(quick: bool) -> list[Row]:
    """A step with each of the two published graph regularisers: hinge repulsion, block-model matching."""
    return [_step_row("scale_free", "signature hinge", quick), _step_row("planted", "block model", quick)]


def _step_row(prior: str, regularizer: str, quick: bool) -> Row:
    """Forward, loss with its graph regulariser, backward and AdamW."""
    found: dict[str, list[dict[str, Any]]] = {"official": [], "ours": []}
    for _ in range(1 if quick else ROUNDS):
        for form, taken in found.items():
            taken.append(_process(form, prior, quick))
    base, ours = (statistics.median(t for one in taken for t in one["seconds"]) for taken in found.values())
    worst = max(one["difference"] for one in found["official"])
    note = (
        f"float32, batch {BATCH}; logits, loss and gradients off by {worst:.0e} of their largest entry; "
        "each in a process of its own"
    )
    return Row(f"training step of NAC-Tiny ({prior}, {regularizer}), 64 px, with AdamW", base, ours, 3.0, note)


def _process(form: str, prior: str, quick: bool) -> dict[str, Any]:
    code = f"from benchmarks.nac_whole import report_step; report_step({form!r}, {prior!r}, {quick})"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report_step(form: str, prior: str, quick: bool) -> None:
    """Print the CPU seconds of steps; the official side's difference from ours as well."""
    torch.set_num_threads(1)
    if form == "ours":
        setup(1, "cpu")  # as every training function of ours begins
    spec = _spec(prior, quick)
    circuit = build_circuit(spec, fit_priors=False).train()
    if form == "official":
        make_official(circuit)
    optimizer = torch.optim.AdamW(circuit.parameters(), lr=1e-4, weight_decay=0.075, fused=form == "ours")
    images, target = batch_of(spec)
    loss_of = official_loss if form == "official" else our_loss
    seconds = []
    for _ in range(2 if quick else WARM + STEPS):
        start = time.process_time()
        loss_of(circuit, prior, images, target)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    difference = compare(spec, prior) if form == "official" else 0.0
    print(json.dumps({"seconds": seconds[1 if quick else WARM :], "difference": difference}))


def _spec(prior: str, quick: bool) -> CircuitSpec:
    """The published circuit for Tiny-ImageNet; for a quick look a tiny one with the same switches."""
    spec = circuit_preset("tiny_imagenet", prior)
    if not quick:
        return spec
    graph = spec.latent_graph_kwargs.model_copy(
        update={"num_input_latents": 8, "num_mediator_latents": 16, "num_output_latents": 4, "num_iterations": 2}
    )
    return spec.model_copy(update={"latent_graph_kwargs": graph})


def batch_of(spec: CircuitSpec) -> tuple[Tensor, Tensor]:
    """Images and mixed labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, spec.input_dim, 64, 64, generator=generator)
    return images, torch.randn(BATCH, spec.output_dim, generator=generator).softmax(dim=-1)


def our_loss(
    circuit: Circuit, prior: str, images: Tensor, target: Tensor, draws: Draws | None = None
) -> tuple[Tensor, Tensor]:
    """Logits, and the published loss: soft cross-entropy and the weighted graph regulariser."""
    logits, criterion = circuit(images, draws), regularizer_preset(prior)
    return logits, F.cross_entropy(logits, target) + criterion.weight * graph_regularizer(circuit, criterion)


def official_loss(
    circuit: Circuit, prior: str, images: Tensor, target: Tensor, draws: Draws | None = None
) -> tuple[Tensor, Tensor]:
    """The same; a block model is matched layer by layer through the differences of all pairs of rows."""
    logits, criterion = circuit(images, draws), regularizer_preset(prior)
    if criterion.type == "signature_hinge_repulsion":
        return logits, F.cross_entropy(logits, target) + criterion.weight * graph_regularizer(circuit, criterion)
    own, signatures = criterion.kwargs, circuit.signatures()["mediator"]
    graphon = block_model(len(signatures), own.num_clusters, own.p_in, own.p_out)
    loss = F.cross_entropy(logits, target)
    for bandwidth in circuit.bandwidths():
        distance = cosine_distance(signatures, signatures)
        affinities = (-distance / bandwidth).exp() * (distance <= own.truncation)
        with torch.no_grad():
            cost = (graphon.unsqueeze(1) - affinities.unsqueeze(0)).square().mean(dim=-1)
        rows = torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
        loss = loss + criterion.weight * (affinities[rows] - graphon).square().mean()
    return logits, loss


class Recorded(Draws):
    """Draws by name from one generator; a name asked for again, by the other form, gets the same numbers."""

    def __init__(self, names: dict[str, str] | None = None, kept: dict[str, Tensor] | None = None) -> None:
        super().__init__(None, torch.Generator().manual_seed(0), names)
        self.kept = {} if kept is None else kept

    def at(self, **names: str) -> Recorded:
        """See :meth:`Draws.at`."""
        child = Recorded(names, self.kept)
        child.generator = self.generator
        return child

    def _find(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        return self.kept.get(self.name(name))

    def uniform(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """See :class:`Draws`."""
        return self.kept.setdefault(self.name(name), super().uniform(name, shape, like))

    def normal(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """See :class:`Draws`."""
        return self.kept.setdefault(self.name(name), super().normal(name, shape, like))

    def exponential(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """See :class:`Draws`."""
        return self.kept.setdefault(self.name(name), super().exponential(name, shape, like))


def compare(spec: CircuitSpec, prior: str) -> float:
    """Largest difference of logits, loss and gradients of the two forms, each relative to its largest entry."""
    images, target = batch_of(spec)
    draws, found = Recorded(), []
    for official in (True, False):
        circuit = build_circuit(spec, fit_priors=False).train()
        if official:
            make_official(circuit)
        logits, loss = (official_loss if official else our_loss)(circuit, prior, images, target, draws)
        loss.backward()
        grads = {name: p.grad for name, p in circuit.named_parameters() if p.grad is not None}
        found.append({"logits": logits.detach(), "loss": loss.detach(), **grads})
    theirs, ours = found
    if theirs.keys() != ours.keys():
        raise SystemExit(f"One form alone has gradients of {sorted(theirs.keys() ^ ours.keys())}.")
    return max(float((a - ours[n]).abs().max() / a.abs().max().clamp_min(1e-6)) for n, a in theirs.items())


def make_official(circuit: Circuit) -> None:
    """Give the circuit's attention layers and read-in the official execution; weights stay."""
    for module in circuit.modules():
        run: Any = None
        if isinstance(module, ReadInAttention):
            run = official_read_in
        elif isinstance(module, LatentAttention):
            run = official_attention
        elif isinstance(module, ModLinear):
            run = official_modfc
        elif isinstance(module, ModFFN):
            run = official_ffn
        if run is not None:
            module.forward = run.__get__(module)  # type: ignore[method-assign]


def official_modfc(self: ModLinear, x: Tensor, code: Tensor) -> Tensor:
    """A modulated layer: the code's scale, the input times it, the shared matrix."""
    mapped = F.linear(code, self.scale.weight)
    scale = self.scale_gain * F.layer_norm(mapped, mapped.shape[-1:], eps=1e-5) + 1
    return F.linear(x * scale, self.native_weight, self.native_bias)


def official_ffn(self: ModFFN, states: Tensor, codes: Tensor, draws: Draws | None = None) -> Tensor:
    """The feed-forward block, of every sample."""
    into, _, out = self.ffn
    value, gate = into(self.layernorm(states), codes).chunk(2, dim=-1)
    residual = self.layer_scale(out(value * F.gelu(gate), codes))
    return official_path_drop(self, states, residual, draws_or_default(draws))


def official_path_drop(self: ModFFN | LatentAttention, old: Tensor, residual: Tensor, draws: Draws) -> Tensor:
    """The branch is computed for every sample, and then times 0 for those that drop it."""
    if self.path_drop_prob and self.training:
        u = draws.uniform("path_drop", (len(residual), 1, 1), residual)
        residual = residual / (1 - self.path_drop_prob) * torch.floor((1 - self.path_drop_prob) + u)
    return old + residual


def official_read_in(
    self: ReadInAttention, states: Tensor, codes: Tensor, tokens: Tensor, draws: Draws | None = None
) -> Tensor:
    """The read-in's attention with keys and values of every (token, latent) pair."""
    heads = self.num_heads
    x_BV1N = self.sender_layernorm(tokens).unsqueeze(2)
    q_BUHD = self.query_compiler(self.receiver_layernorm(states), codes).unflatten(-1, (heads, -1))
    k_BVUHD, v_BVUHD = (
        compiler(x_BV1N.expand(-1, -1, len(codes), -1), codes).unflatten(-1, (heads, -1))
        for compiler in (self.key_compiler, self.value_compiler)
    )
    weights = (torch.einsum("buhd,bvuhd->buhv", q_BUHD, k_BVUHD) / math.sqrt(q_BUHD.shape[-1])).softmax(-1)
    message = torch.einsum("buhv,bvuhd->buhd", weights, v_BVUHD).flatten(2)
    residual: Tensor = self.layer_scale(self.exit_layer(message, codes))
    return states + residual if self.include_residual else residual


def official_attention(self: LatentAttention, receivers: Nodes, senders: Nodes, draws: Draws | None = None) -> Tensor:
    """Attention between latents over all edges, one einsum per product."""
    source = draws_or_default(draws)
    log_affinity = official_affinities(self.kernel, receivers, senders, source)
    norm = self.receiver_layernorm if self.sender_layernorm is None else self.sender_layernorm
    received, sent = self.receiver_layernorm(receivers.states), norm(senders.states)
    q_BUHD = self.query_compiler(received, receivers.codes).unflatten(-1, (self.num_heads, -1))
    k_BVHD, v_BVHD = (
        compiler(sent, senders.codes).unflatten(-1, (self.num_heads, -1))
        for compiler in (self.key_compiler, self.value_compiler)
    )
    scores = torch.einsum("buhd,bvhd->bhuv", q_BUHD, k_BVHD) / math.sqrt(q_BUHD.shape[-1])
    weights = (scores + log_affinity.unsqueeze(-3)).softmax(dim=-1)
    message = torch.einsum("bhuv,bvhd->buhd", weights, v_BVHD).flatten(2)
    residual: Tensor = self.layer_scale(self.exit_layer(message, receivers.codes))
    return official_path_drop(self, receivers.states, residual, source) if self.include_residual else residual


def official_affinities(kernel: DotProductKernel | None, receivers: Nodes, senders: Nodes, draws: Draws) -> Tensor:
    """Log-affinities by the formulas as they stand; sampled edges ``[B, U, V]`` in training."""
    if kernel is None or receivers.signatures is None or senders.signatures is None:
        raise TypeError("A circuit's attention has a kernel and signatures.")
    scaled = cosine_distance(receivers.signatures, senders.signatures) / kernel.bandwidth
    if kernel.spec.truncation is not None:
        scaled = scaled.masked_fill(scaled > kernel.spec.truncation / kernel.bandwidth.detach(), math.inf)
    y = -scaled
    if kernel.training and kernel.spec.stochastic_kernel:
        limits = torch.finfo(y.dtype)
        u = draws.uniform("kernel", (len(receivers.states), *y.shape), y).clamp(limits.eps, 1 - limits.eps)
        p = y.exp()
        p = (p + (p.clamp(0, 1) - p).detach()).clamp(limits.eps, 1 - limits.eps)
        z = (u.log() - (1 - u).log() + p.log() - (1 - p).log()) / kernel.spec.stochastic_sampling_temperature
        y = z.sigmoid().clamp(limits.tiny, 1 - limits.eps).log()
    return y - y.logsumexp(dim=-1, keepdim=True) if kernel.normalize_along_senders else y
