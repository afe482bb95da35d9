"""Neural attentive circuits: tokenizer, latent graph, output pooling.

Rahaman, Weiss, Locatello, Pal, Bengio, Schoelkopf, Li, Ballas: *Neural Attentive Circuits*, NeurIPS 2022,
arXiv 2210.08031; in the form that m2mKD (arXiv 2402.16918) trains. A set of latents exchanges messages: a latent's
*signature* decides whom it hears, its *code* what it computes, its *state* is what flows.

``build_circuit`` makes a reproducible circuit, graph priors included; ``Circuit`` alone has random signatures, to be
loaded from a checkpoint. State-dict names are the official ones.

Known differences: see the files of the parts and ``docs/nac.md``.

Shapes: B batch, U latents, S state, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.errors import RunFailed
from moe.models.nac.draws import Draws, draws_or_default
from moe.models.nac.graph import LatentGraph
from moe.models.nac.pooling import FirstSlotAsLogits, OutputLatentPooling
from moe.models.nac.signatures import prior_signatures
from moe.models.nac.specs import CircuitSpec
from moe.models.nac.tokenizer import Tokenizer

ROLES = ("input", "mediator", "output")
"""The three groups of latents, in the order in which they are concatenated."""


class CircuitRecord(NamedTuple):
    """What a forward pass went through.

    Attributes:
        logits: ``[B, K]``.
        input_states: after the read-in, ``[B, U, S]``.
        mediator_states: after the last propagator.
        output_states: after the read-out.
    """

    logits: Tensor
    input_states: Tensor
    mediator_states: Tensor
    output_states: Tensor


class Circuit(nn.Module):
    """A neural attentive circuit for images.

    Args:
        spec: all sizes and switches.
        check_finite: refuse non-finite logits, naming where they began (one value is read back per forward; not under
            ``torch.compile``). Turn it off for float16 with loss scaling, where overflows are part of the procedure.
    """

    def __init__(self, spec: CircuitSpec, check_finite: bool = True) -> None:
        super().__init__()
        self.spec, self.check_finite = spec, check_finite
        noise = spec.eval_noise == "official"
        self.input_tokenizer = Tokenizer(spec.input_dim, spec.state_dim, spec.input_tokenizer_kwargs)
        tokens = self.input_tokenizer.out_features
        graph = LatentGraph(spec.latent_graph_kwargs, tokens, spec.state_dim, spec.output_dim, noise)
        self.latent_graphs = nn.ModuleList([graph])
        self.output_tokenizer: OutputLatentPooling | FirstSlotAsLogits = (
            FirstSlotAsLogits(spec.output_dim)
            if spec.output_tokenizer_type == "FirstSlotAsLogits"
            else OutputLatentPooling(
                graph.read_out.out_features, spec.output_dim, spec.output_tokenizer_kwargs, eval_noise=noise
            )
        )

    @property
    def graph(self) -> LatentGraph:
        """The latent graph."""
        graph: LatentGraph = self.latent_graphs[0]  # type: ignore[assignment]
        return graph

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, c, h, w]``; see :meth:`forward_with_record` for the draws."""
        return self.forward_with_record(images, draws).logits

    def forward_with_record(self, images: Tensor, draws: Draws | None = None) -> CircuitRecord:
        """Logits and the states on the way.

        Args:
            images: ``[B, c, h, w]``.
            draws: random numbers by the names that :class:`LatentGraph` lists and ``pool.exponential``.

        Raises:
            SpecError: the images do not fit the tokenizer.
            RunFailed: logits that are not finite.
        """
        source = draws_or_default(draws)
        states = self.graph(self.input_tokenizer(images), source)
        logits = self.output_tokenizer(states.output, source.at(exponential="pool.exponential"))
        record = CircuitRecord(logits, states.input, states.mediator, states.output)
        if self.check_finite and not torch.compiler.is_compiling() and not bool(torch.isfinite(logits.detach()).all()):
            raise _not_finite(images, record)
        return record

    def signatures(self) -> dict[str, Tensor]:
        """Signatures ``[U, Z]`` by role, what graph regularisers work on."""
        graph = self.graph
        groups = (graph.input_latents, graph.mediator_latents, graph.output_latents)
        return {role: group.signatures_ for role, group in zip(ROLES, groups, strict=True)}

    def bandwidths(self) -> list[Tensor]:
        """Bandwidths of the propagators' kernels, each once."""
        found: list[Tensor] = []
        for propagator in self.graph.propagators:
            kernel = propagator.latent_attention.kernel  # type: ignore[union-attr]
            if not any(kernel.bandwidth is one for one in found):  # type: ignore[union-attr]
                found.append(kernel.bandwidth)  # type: ignore[union-attr,arg-type]
        return found


def _not_finite(images: Tensor, record: CircuitRecord) -> RunFailed:
    """The error that names the first place with bad numbers."""
    places = {"images": images, **{name: getattr(record, name) for name in (*record._fields[1:], "logits")}}
    name, value = next((n, x) for n, x in places.items() if not bool(torch.isfinite(x).all()))
    bad = int((~torch.isfinite(value)).flatten(1).any(dim=1).sum())
    return RunFailed(
        f"The circuit's {name} {tuple(value.shape)}, {value.dtype}, are not finite for {bad} of {len(value)} images.",
        "They are the first bad numbers on the way. Look at the data or the weights before them; try float32 or clip.",
    )


def build_circuit(spec: CircuitSpec, seed: int = 0, fit_priors: bool = True) -> Circuit:
    """A circuit whose weights, graph and signatures follow from ``seed`` alone.

    torch's default generator is left as it was.

    Args:
        spec: all sizes and switches.
        seed: of the weights, the graphs and the fits.
        fit_priors: sample the graph priors and fit signatures to them (a minute for 768 mediators); False keeps
            random signatures, for circuits that are loaded from a checkpoint.

    Raises:
        SpecError: a graph prior does not have as many nodes as there are latents.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        circuit = Circuit(spec)
    if fit_priors:
        kwargs, graph = spec.latent_graph_kwargs, circuit.graph
        for index, role in enumerate(ROLES):
            latents, own = getattr(graph, f"{role}_latents"), getattr(kwargs, f"{role}_latent_kwargs")
            if own.graph_preset is not None:
                fit = prior_signatures(
                    own.graph_preset, latents.count, kwargs.signature_dim, own.graph_generator_kwargs, 3 * seed + index
                )
                latents.set_signatures(fit.signatures)
    return circuit


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters; shared weights count once."""
    return sum(parameter.numel() for parameter in module.parameters())
