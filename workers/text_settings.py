"""Settings of the text stages: frozen records without torch, shared by the stages and what does their work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe.errors import SpecError, nearest
from moe.models.emoe_spec import EMoESpec
from moe.models.text_spec import LoraSpec, TextModelSpec, TuningRules

Tuning = Literal["full", "lora"]

METHODS: Mapping[str, Mapping[str, Any] | None] = {
    "dense": None,
    "noisy": None,  # noisy tuning (arXiv 2202.12024)
    "block": None,  # low-rank baseline that also tunes the layers which EMoE converts
    "gmoe": {"gate": "cosine", "split": "copy"},
    "emoe": {},
    "emoe_learn": {"gate": "cosine"},
    "emoe_random": {"split": "random"},
    "emoe_contiguous": {"split": "contiguous"},
    "emoe_not_top": {"choice": "not_top"},
    "emoe_bottom": {"choice": "bottom"},
}
"""Method -> what it changes in the conversion; None converts nothing. Source: EMoE (arXiv 2310.10908), section 4."""

LABELS: Mapping[str, str] = {
    "dense": "dense",
    "noisy": "noisy tuning",
    "block": "dense + block",
    "gmoe": "GMoE",
    "emoe": "EMoE",
    "emoe_learn": "EMoE-learn",
    "emoe_random": "EMoE, random split",
    "emoe_contiguous": "EMoE, contiguous split",
    "emoe_not_top": "EMoE, all but the best",
    "emoe_bottom": "EMoE, the worst",
}


class Settings(BaseModel):
    """Frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSource(Settings):
    """The network that is tuned."""

    weights: str | None = Field(
        default=None,
        description="minilm (packaged MiniLM-L6), or a Hugging Face folder with config.json and safetensors: a path, "
        "relative to the data root",
    )
    random: TextModelSpec | None = Field(
        default=None,
        description="instead of weights: random initialisation; vocabulary, padding and outputs follow from the texts",
    )

    @model_validator(mode="after")
    def _one(self) -> TextSource:
        if (self.weights is None) == (self.random is None):
            raise ValueError("give either weights (minilm or a folder) or random (the shape of a network).")
        for name in ("vocabulary", "pad_token", "num_outputs"):
            given = None if self.random is None else getattr(self.random, name)
            if given not in (None, TextModelSpec.model_fields[name].default):
                raise ValueError(f"random.{name}={given} has no effect: it follows from the texts; leave it out.")
        return self


class Phase(Settings):
    """How one kind of tuning trains; the defaults are the published search of GLUE in full."""

    learning_rates: tuple[float, ...] = Field(default=(2e-5, 3e-5, 5e-5), min_length=1, description="searched")
    epochs: int | None = Field(default=10, ge=1, description="most passes over the training rows")
    steps: int | None = Field(default=None, ge=1, description="most updates; the smaller of both limits counts")
    batch_size: int = Field(default=32, ge=1, description="texts per update")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's; never on biases and norms")
    patience: int | None = Field(
        default=4, ge=1, description="evaluations in a row without a better average, then stop"
    )
    evaluate_every: int | None = Field(default=None, ge=1, description="updates between evaluations; null: an epoch")
    checkpoint_every: int = Field(default=200, ge=1, description="updates between checkpoints")
    clip: float | None = Field(default=None, gt=0, description="largest gradient norm")
    freeze: tuple[str, ...] = Field(default=(), description="parts of parameter names that do not train: embeddings")
    freeze_layers: tuple[int, ...] = Field(default=(), description="layers that do not train")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of forward and backward passes")

    @model_validator(mode="after")
    def _length(self) -> Phase:
        if self.epochs is None and self.steps is None:
            raise ValueError("give epochs, steps or both.")
        return self


def lora_phase() -> Phase:
    """The published low-rank search of GLUE."""
    return Phase(learning_rates=(2e-4, 3e-4, 5e-4), epochs=20)


class SplitSettings(Settings):
    """Which layers of which network become how many experts."""

    model: TextSource = Field(description="the network")
    emoe: EMoESpec = Field(default_factory=EMoESpec, description="experts, gate and rules of the EMoE methods")
    num_experts: tuple[int, ...] = Field(default=(), description="searched as well; emoe.num_experts when empty")
    top_k: tuple[int, ...] = Field(default=(), description="searched as well; emoe.top_k when empty")
    layers: tuple[int, ...] = Field(default=(), description="converted layers from 0; the last even ones when empty")
    last_even: int = Field(default=1, ge=1, le=64, description="without `layers`: how many of the last even layers")

    @model_validator(mode="after")
    def _sizes(self) -> SplitSettings:
        if self.layers and self.last_even != 1:
            raise ValueError(f"last_even={self.last_even} has no effect beside layers; leave one of them out.")
        for experts, top_k in self.grid():
            self.sized(experts, top_k)
        return self

    def grid(self) -> list[tuple[int, int]]:
        """Pairs of experts and chosen experts; pairs with more chosen than there are do not count."""
        pairs = [(e, k) for e in self.num_experts or (self.emoe.num_experts,) for k in self.top_k or (self.emoe.top_k,)]
        fitting = [(e, k) for e, k in pairs if k <= e]
        if not fitting:
            raise ValueError(
                f"every top_k of {list(self.top_k)} is above every num_experts of {list(self.num_experts)}."
            )
        return fitting

    def sized(self, num_experts: int, top_k: int) -> EMoESpec:
        """EMoE's own conversion with so many experts."""
        return EMoESpec(**{**self.emoe.model_dump(), "num_experts": num_experts, "top_k": top_k})


class SearchSettings(SplitSettings):
    """Every run of a search."""

    methods: tuple[str, ...] = Field(default=("dense", "emoe"), min_length=1, description=", ".join(METHODS))
    tunings: tuple[Tuning, ...] = Field(default=("full",), min_length=1, description="full fine-tuning, low-rank, both")
    full: Phase = Field(default_factory=Phase, description="full fine-tuning")
    lora: Phase = Field(default_factory=lora_phase, description="low-rank tuning")
    adapter: LoraSpec = Field(default_factory=LoraSpec, description="the low-rank adapters")
    gmoe: EMoESpec = Field(
        default_factory=lambda: EMoESpec(num_experts=4, top_k=2), description="the same of the GMoE baseline"
    )
    rules: Literal["official", "fair"] = Field(
        default="official", description="which parts train: the public code's rules, or equal ones for every method"
    )
    noise: float = Field(default=0.15, gt=0, le=10, description="strength of noisy tuning")

    @model_validator(mode="after")
    def _known(self) -> SearchSettings:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"there is no method {name!r}. {nearest(name, METHODS)}")
        if self.lora.freeze or self.lora.freeze_layers:
            raise ValueError(
                "lora.freeze: adapters freeze the network already, and by the public rules a freezing flag there lets "
                "everything else train. Leave it out."
            )
        for name, own in (METHODS["gmoe"] or {}).items():
            given = getattr(self.gmoe, name)
            if given not in (own, EMoESpec.model_fields[name].default):
                raise ValueError(
                    f"gmoe.{name}={given} has no effect: the GMoE baseline has {name}: {own}. Leave it out."
                )
        if len(set(self.methods)) < len(self.methods) or len(set(self.tunings)) < len(self.tunings):
            raise ValueError("methods and tunings must not repeat a name.")
        for name in self.methods:
            for experts, top_k in self.grid():
                try:
                    self.emoe_spec(name, experts, top_k)
                except ValidationError as error:
                    told = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"the method {name} does not go with these settings: {told}") from None
        return self

    def emoe_spec(self, method: str, num_experts: int, top_k: int) -> EMoESpec | None:
        """The conversion of a method; None when it converts nothing."""
        changes = METHODS[method]
        if changes is None:
            return None
        base = self.gmoe if method == "gmoe" else self.sized(num_experts, top_k)
        return EMoESpec(**{**base.model_dump(), **changes})

    def phase(self, tuning: Tuning) -> Phase:
        """How ``tuning`` trains."""
        return self.full if tuning == "full" else self.lora

    def jobs(self) -> list[Job]:
        """Every run of one seed; dense methods do not repeat over experts."""
        found = []
        for tuning in self.tunings:
            for method in self.methods:
                sizes = self.grid() if METHODS[method] is not None and method != "gmoe" else [(0, 0)]
                for experts, top_k in sizes:
                    for rate in self.phase(tuning).learning_rates:
                        found.append(Job(method=method, tuning=tuning, lr=rate, num_experts=experts, top_k=top_k))
        return found


class Job(Settings):
    """One run of a search; experts are 0 where the method has no choice of them."""

    method: str
    tuning: Tuning
    lr: float = Field(gt=0)
    num_experts: int = 0
    top_k: int = 0

    @property
    def name(self) -> str:
        """Name of the member."""
        size = f" E={self.num_experts} K={self.top_k}" if self.num_experts else ""
        return f"{self.method} {self.tuning}{size} lr={self.lr:g}"


def tuning_rules(settings: SearchSettings, job: Job, spec: EMoESpec | None, layers: tuple[int, ...]) -> TuningRules:
    """Which parameters train in a run.

    Source: search scripts of EMoE's public code (arXiv 2310.10908): in low-rank runs the feed-forward layers stay as
    they are and of a converted layer only a learned gate trains.
    """
    lora, phase = job.tuning == "lora", settings.phase(job.tuning)
    converted = spec is not None
    block = job.method == "block"
    return TuningRules(
        lora=lora,
        moe_layers=layers if converted or block else (),
        one_score=spec is not None and spec.is_avg_k,
        freeze=phase.freeze,
        freeze_layer=phase.freeze_layers,
        tune_moe_layers_only=lora and (converted or block),
        tune_gates_only=lora and converted,
        fair=settings.rules == "fair",
    )


def fill_text_preset(values: Any, known: Collection[str]) -> Any:
    """``values`` of a config with the published settings of ``preset`` (a GLUE task) underneath.

    Args:
        values: as they were written.
        known: names of the config's fields; settings of others are left out.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(values, Mapping) or not values.get("preset"):
        return values
    from moe.algorithms.emoe import TextConfig

    task = str(values["preset"])
    try:
        full, lora = TextConfig.preset(task), TextConfig.preset(f"{task}@lora")
    except SpecError as error:
        raise ValueError(str(error)) from None
    assert lora.lora is not None and full.emoe is not None  # the presets of TEXT_PRESETS convert and adapt
    base: dict[str, Any] = {
        "full": _phase_fields(full),
        "lora": _phase_fields(lora),
        "adapter": lora.lora.model_dump(),
        "emoe": full.emoe.model_dump(exclude_unset=True),
    }
    base = {name: value for name, value in base.items() if name in known}
    merged = dict(base)
    for name, value in values.items():
        below = base.get(name)
        merged[name] = {**below, **value} if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _phase_fields(config: Any) -> dict[str, Any]:
    names = ("learning_rates", "epochs", "batch_size", "weight_decay", "patience")
    return {name: getattr(config, name) for name in names}
