"""Evaluation of adaptation methods on the domains of a split, without Ray and without the orchestrator.

For every domain each method adapts once, from unlabelled images, on a private copy of what it changes; then all methods
predict the same rows, which are decoded once. Nothing is second order here.
Source of the procedure: Meta-DMoE (arXiv 2210.03885), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe.errors import SpecError
from workers.batches import ImageReader, chunks
from workers.context import Reporter
from workers.datasets.base import DomainData, IntArray
from workers.evaluation_cost import IMAGES, latency_ms, model_cost
from workers.evaluation_methods import ImageSource, Method, TokenSource
from workers.evaluation_result import Attention, Curve, EvaluationResult, LossPair, StreamResult
from workers.evaluation_scores import Scorer, Scores, method_results
from workers.intervals import PairedBootstrap
from workers.loop import mix
from workers.protocols import DomainRows
from workers.sampling import group_index
from workers.streams import StreamBatch, stream
from workers.transforms import Transform

if TYPE_CHECKING:
    from moe.adaptation.base import AdaptResult
    from moe.aggregator import Aggregator, AggregatorOutput
    from moe.student import Student

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation computes.

    Attributes:
        split: name of the scored split, for the record.
        protocol: ``official`` or ``split``, for the record.
        support_size: most rows adapted on per domain, for the record.
        seed: of adaptation noise, streams, and the bootstrap.
        run_seed: seed of the run that made the models, for the record; ``seed`` when None.
        batch_size: images per forward pass; has no influence on the numbers beyond rounding.
        replicates: bootstrap resamples; 0 leaves out intervals.
        curve_sizes: support sizes of the adaptation curves; empty draws none.
        streams: online settings to run (``workers.streams.SETTINGS``).
        stream_batch: images per online batch.
        settings: more values for the record (JSON).
    """

    split: str = "test"
    protocol: str = "official"
    support_size: int = 64
    seed: int = 0
    run_seed: int | None = None
    batch_size: int = 128
    replicates: int = 1000
    curve_sizes: tuple[int, ...] = ()
    streams: tuple[str, ...] = ()
    stream_batch: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)


def evaluate_methods(
    data: DomainData,
    domains: Sequence[DomainRows],
    methods: Sequence[Method],
    transform: Transform,
    options: EvaluationOptions,
    reporter: Reporter,
    *,
    aggregator: Aggregator | None = None,
    tokens: TokenSource | None = None,
    device: torch.device | None = None,
    loader_threads: int = 0,
    timings: Callable[[Mapping[str, float]], None] | None = None,
) -> EvaluationResult:
    """Adapt, predict and score.

    Args:
        data: the data set.
        domains: who is adapted and scored on what (``workers.protocols.domain_rows``).
        methods: the table's rows (``workers.evaluation_methods.standard_methods``); put into evaluation mode.
        transform: evaluation transform of the images.
        options: see :class:`EvaluationOptions`.
        reporter: progress over domains; asked whether to stop between domains.
        aggregator: teacher of the adaptations that need one, and source of the attention map.
        tokens: experts' features; needed with an aggregator.
        device: where the models are; CPU by default.
        loader_threads: decoding threads.
        timings: takes ``latency_ms/MODEL`` of each model; not part of the result, since it depends on the machine.

    Raises:
        SpecError: no methods, two of one name, or a method that needs what is not there.
        DataError: a corrupt image.
    """
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise SpecError(f"The methods to evaluate are {names}.", "Give at least one, each once.")
    missing = [m.reference for m in methods if m.reference and m.reference not in names]
    if missing:
        raise SpecError(f"The reference {missing[0]!r} is not evaluated.", f"Evaluated: {', '.join(names)}.")
    reader = ImageReader(data.images, transform, loader_threads)
    images = ImageSource(reader, device or torch.device("cpu"), len(data.images), options.seed)
    runner = _Runner(data, methods, options, reporter, images, aggregator, tokens)
    try:
        return runner.run(domains, timings)
    finally:
        reader.close()


class _Runner:
    """One call of :func:`evaluate_methods`."""

    def __init__(
        self,
        data: DomainData,
        methods: Sequence[Method],
        options: EvaluationOptions,
        reporter: Reporter,
        images: ImageSource,
        aggregator: Aggregator | None,
        tokens: TokenSource | None,
    ) -> None:
        self.data, self.methods, self.options, self.reporter = data, methods, options, reporter
        self.images, self.aggregator, self.tokens = images, aggregator, tokens
        for module in [method.model for method in methods] + ([aggregator] if aggregator is not None else []):
            module.eval()
        self.parts = 1 + len(set(options.curve_sizes) - {0})
        self.unadapted: dict[str, int] = {}

    def run(
        self, domains: Sequence[DomainRows], timings: Callable[[Mapping[str, float]], None] | None = None
    ) -> EvaluationResult:
        options, info = self.options, self.data.info
        costs = self._costs(domains[0].score[:IMAGES], timings)
        logits, losses, mass = self._all_domains(domains, self.methods, part=0)
        rows = np.concatenate([domain.score for domain in domains])
        groups = np.repeat([domain.domain for domain in domains], [len(domain.score) for domain in domains])
        scorer = Scorer(self.data, rows, groups, [domain.domain for domain in domains])
        bootstrap = PairedBootstrap(groups, options.replicates, options.seed) if options.replicates else None
        attention = None
        if mass and self.tokens is not None:
            attention = Attention(self.tokens.labels, [d.name for d in domains], np.stack(mass).tolist())
        curves, streams = self._curves(domains, logits, scorer), self._streams(domains)
        return EvaluationResult(
            dataset=info.name,
            title=info.title,
            task=info.task,
            metric=info.selection_metric,
            protocol=options.protocol,
            split=options.split,
            seed=options.seed if options.run_seed is None else options.run_seed,
            support_size=options.support_size,
            domains=[domain.name for domain in domains],
            counts=[len(domain.score) for domain in domains],
            support_counts=[len(domain.adapt) for domain in domains],
            methods=method_results(self.methods, logits, losses, scorer, info.selection_metric, bootstrap, costs),
            attention=attention,
            curves=curves,
            streams=streams,
            settings=dict(options.settings) | ({"unadapted_domains": self.unadapted} if self.unadapted else {}),
            rows=rows,
            logits=logits,
        )

    def _costs(
        self, rows: IntArray, timings: Callable[[Mapping[str, float]], None] | None
    ) -> dict[str, dict[str, float]]:
        """What using each model costs, on a few images; how long they take goes to ``timings``."""
        found, taken = {}, {}
        for method in [method for method in self.methods if not method.reference]:
            forwards = [self._one_image(method, rows[i : i + 1]) for i in range(len(rows))]
            found[method.name] = model_cost(method.model, forwards).to_json()
            if timings is not None:
                taken[f"latency_ms/{method.name}"] = latency_ms(forwards, self.images.device)
        if timings is not None:
            timings(taken)
        return found

    def _one_image(self, method: Method, row: IntArray) -> Callable[[], object]:
        """A forward pass of one image that is read already."""
        images = self.images(row) if method.reads == "images" else None
        tokens = self._tokens(row) if method.reads == "tokens" else None
        return lambda: _logits(method, images, tokens, {})

    def _all_domains(
        self, domains: Sequence[DomainRows], methods: Sequence[Method], part: int
    ) -> tuple[dict[str, FloatArray], dict[str, list[LossPair]], list[NDArray[np.float64]]]:
        """Logits ``[N, K]`` and adaptation losses by method, and the attention mass ``[E]`` by domain."""
        parts: dict[str, list[FloatArray]] = {method.name: [] for method in methods}
        losses: dict[str, list[LossPair]] = {}
        mass: list[NDArray[np.float64]] = []
        for number, domain in enumerate(domains):
            deltas: dict[str, Mapping[str, Tensor]] = {}
            for method in methods:
                result = self.adapt(method, method.model, domain.adapt, domain.domain)
                deltas[method.name] = {} if result is None else result.delta
                if result is not None and result.loss_before is not None:
                    losses.setdefault(method.name, []).append((result.loss_before, result.loss_after))
            if self.aggregator is not None and self.tokens is not None and part == 0:
                mass.append(attention_mass(self.aggregator, self._tokens(domain.adapt)))
            for piece in chunks(domain.score, self.options.batch_size):
                for name, values in self._predict(methods, deltas, piece).items():
                    parts[name].append(values)
            self.reporter.progress(part * len(domains) + number + 1, self.parts * len(domains))
            self.reporter.check()
        return {name: np.concatenate(values) for name, values in parts.items()}, losses, mass

    def _predict(
        self, methods: Sequence[Method], deltas: Mapping[str, Mapping[str, Tensor]], rows: IntArray
    ) -> dict[str, FloatArray]:
        """Logits of every method for ``rows``; images and tokens are read once, no model is copied."""
        found: dict[str, FloatArray] = {}
        needed = {method.reads for method in methods}
        images = self.images(rows) if "images" in needed else None
        tokens = self._tokens(rows) if "tokens" in needed else None
        for method in methods:
            with torch.inference_mode():
                found[method.name] = _logits(method, images, tokens, deltas[method.name]).float().cpu().numpy()
        return found

    def adapt(self, method: Method, model: nn.Module, rows: IntArray, number: int) -> AdaptResult | None:
        """Adapt ``model`` on the images of ``rows``; None when the method does not adapt."""
        if method.adaptation is None:
            return None
        tokens = self._tokens(rows) if method.adaptation.needs_teacher else None
        generator = torch.Generator().manual_seed(mix(self.options.seed, number))
        try:
            return method.adaptation.adapt(
                cast("Student", model), self.images(rows), tokens, self.aggregator, generator
            )
        except SpecError as error:
            if len(rows) > 1:
                raise
            # A single image has no batch statistics; the domain keeps the unadapted model, and the record says so.
            self.unadapted[method.name] = self.unadapted.get(method.name, 0) + 1
            self.reporter.log(f"{method.label}: one image is not enough to adapt on ({error.message})")
            return None

    def _tokens(self, rows: IntArray) -> Tensor:
        if self.tokens is None:
            raise SpecError("A method reads the experts' features and there are no experts.", "Pass tokens.")
        return self.tokens(rows, self.images, self.images.variants(rows)).to(self.images.device)

    def _curves(self, domains: Sequence[DomainRows], logits: Mapping[str, FloatArray], scorer: Scorer) -> list[Curve]:
        """Scores after adapting on the first 0, s1, s2, ... of the support rows."""
        methods = [method for method in self.methods if method.adaptation is not None]
        sizes = sorted(set(self.options.curve_sizes) - {0})
        if not sizes or not methods:
            return []
        points: dict[str, list[tuple[int, Scores]]] = {
            m.name: [(0, scorer(logits[m.reference]))] if m.reference else [] for m in methods
        }
        for number, size in enumerate(sizes):
            shorter = [DomainRows(d.domain, d.name, d.adapt[:size], d.score) for d in domains]
            found, _, _ = self._all_domains(shorter, methods, part=1 + number)
            for method in methods:
                points[method.name].append((size, scorer(found[method.name])))
        return [
            Curve(
                method.name,
                method.label,
                [size for size, _ in points[method.name]],
                [s.overall[self.data.info.selection_metric] for _, s in points[method.name]],
                [s.mean for _, s in points[method.name]],
                [s.worst for _, s in points[method.name]],
            )
            for method in methods
        ]

    def _streams(self, domains: Sequence[DomainRows]) -> list[StreamResult]:
        """Online settings over the scored rows: adapt on a batch, predict it, keep or reset."""
        found = []
        for setting in self.options.streams:
            batches = stream(
                [(domain.domain, domain.score) for domain in domains],
                self.data.labels,
                setting,
                self.options.stream_batch,
                self.options.seed,
            )
            rows = np.concatenate([batch.rows for batch in batches])
            groups, _ = group_index(self.data.metadata, self.data.fields, self.data.info.group_fields)
            scorer = Scorer(self.data, rows, groups[rows])
            for method in self.methods:
                if method.reads == "images":
                    scores = scorer(self._online(method, batches))
                    overall = scores.overall[self.data.info.selection_metric]
                    found.append(StreamResult(setting, method.name, method.label, overall, scores.mean, scores.worst))
        return found

    def _online(self, method: Method, batches: Sequence[StreamBatch]) -> FloatArray:
        model, parts = method.model, []
        for number, batch in enumerate(batches):
            model = method.model if batch.reset else model
            result = self.adapt(method, model, batch.rows, number)
            # The next batch adapts further from here, so the delta is put into a copy.
            model = model if result is None else result.model
            online = replace(method, model=model)
            for piece in chunks(batch.rows, self.options.batch_size):
                parts.append(self._predict([online], {method.name: {}}, piece)[method.name])
            self.reporter.check()
        return np.concatenate(parts)


def _logits(method: Method, images: Tensor | None, tokens: Tensor | None, delta: Mapping[str, Tensor]) -> Tensor:
    if method.reads == "tokens":
        teacher: AggregatorOutput = method.model(tokens)
        return teacher.logits_BK
    if delta:
        return cast("Student", method.model).run(cast("Tensor", images), delta).logits_BK
    logits: Tensor = method.model(images)
    return logits


def attention_mass(aggregator: Aggregator, tokens: Tensor) -> NDArray[np.float64]:
    """Share of the attention that each expert receives, float64 ``[E]``, summing to 1.

    The mean over images, heads, layers and attending tokens of the attention paid to a token.

    Args:
        aggregator: in evaluation mode.
        tokens: ``[B, E, D]`` on its device.
    """
    with torch.inference_mode():
        maps = aggregator(tokens, need_attention=True).attention_LBHEE
    if maps is None:  # an aggregator without layers pools all experts alike
        return np.full(tokens.shape[1], 1.0 / tokens.shape[1])
    return np.asarray(maps.double().mean(dim=(0, 1, 2, 3)).cpu().numpy())
