"""How a network is recycled and fine-tuned as a pipeline (MoE Jetpack, arXiv 2406.04801): settings, free of torch.

One *start* is one way to begin: which network (SpheroMoE, Soft MoE or dense), and where its weights come from (random,
recycled by one of the strategies, or a released file). All starts of a seed share the random parts and the batches, so
that their curves can be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe.algorithms._jetpack_recipe import RateSpec, ScheduleSpec
from moe.conversion.recycle.options import RecycleOptions, StatisticsOptions
from moe.errors import nearest
from moe.jet_specs import JetConvNeXtSpec, JetSpec
from moe.jetpack_specs import JetViTSpec, SoftMoESpec, SpheroSpec
from moe.specs import BackboneSpec
from workers.overlay import overlay
from workers.transforms import Normalisation

NetworkKind = Literal["sphero", "soft_moe", "dense"]
RECIPE_FIELDS = (
    "rates", "schedule", "batch_size", "accumulate", "epochs", "clip", "label_smoothing", "mixup", "cutmix"
)  # fmt: skip


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_GRAPH_FIELDS = {
    "weights": ("metis",),
    "resolution": ("louvain",),
    "trials": ("spectral",),
    "seed": ("louvain", "spectral"),
}
"""Options of a partition -> the methods that read them."""


def _unused(block: BaseModel, name: str, fields: tuple[str, ...], why: str) -> None:
    """Refuse values that nothing reads (ValueError)."""
    for field in fields:
        value = getattr(block, field)
        if value != type(block).model_fields[field].default:
            raise ValueError(f"{name}.{field}={value} has no effect with {why}; leave it out.")


class StatisticsSettings(_Settings):
    """One pass over images, which says how important the predecessor's channels and neurons are."""

    predecessor: BackboneSpec = Field(description="the dense vision transformer or ConvNeXt that experts are cut from")
    normalisation: Normalisation | None = Field(
        default=None, description="of the images, e.g. imagenet for a pretrained network; null: the set's own"
    )
    splits: tuple[str, ...] = Field(default=("train",), min_length=1, description="splits whose rows are looked at")
    images: int = Field(default=38_400, ge=1, description="images at most; the released tool takes 38,400")
    order: Literal["first", "random"] = Field(
        default="first",
        description="first: of the set, as the released tool (a sorted folder: few classes); random: a sample",
    )
    seed: int = Field(default=0, ge=0, description="of the random sample")
    batch_size: int = Field(default=256, ge=1, description="images per batch; averages depend on it, see `statistics`")
    statistics: StatisticsOptions = Field(default=StatisticsOptions(), description="which statistics")
    shards: int = Field(default=1, ge=1, le=10_000, description="members that share the pass; merged when used")
    checkpoint_every: int = Field(default=16, ge=1, description="batches of a shard between checkpoints")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")

    @model_validator(mode="after")
    def _fits(self) -> StatisticsSettings:
        family_of(self.predecessor, "predecessor")
        if self.seed != 0 and self.order != "random":
            raise ValueError(f"seed={self.seed} has no effect: it is of the random sample, and order is {self.order}.")
        own = self.statistics
        if own.averaging != "groups":
            _unused(own, "statistics", ("group",), f"averaging: {own.averaging}")
        if own.threshold != "percentile":
            _unused(own, "statistics", ("percentile",), f"threshold: {own.threshold}")
        return self


class Start(_Settings):
    """One way to begin the fine-tuning."""

    network: NetworkKind = Field(
        default="sphero", description="sphero: `model`; soft_moe: its blocks as plain Soft MoE; dense: without experts"
    )
    recycle: RecycleOptions | None = Field(default=None, description="how experts are chosen; null: random weights")
    experts: Literal["recycled", "fresh"] = Field(
        default="recycled", description="fresh: only the dense part is taken over, experts stay random"
    )
    source: Literal["predecessor", "donor"] = Field(
        default="predecessor", description="whose feed-forward networks the experts are; donor and copy: upcycling"
    )
    weights: str | None = Field(
        default=None, description="a checkpoint with the released names (weights to start from, or trained ones)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Start:
        if self.weights is not None and self.recycle is not None:
            raise ValueError("weights and recycle exclude each other: a file needs no recycling.")
        if self.experts == "fresh" and (self.recycle is None or self.network == "dense"):
            raise ValueError("experts: fresh has a meaning only for a recycled network with experts.")
        if self.source == "donor" and (self.recycle is None or self.needs_statistics):
            raise ValueError("source: donor goes with copy, random and uniform; statistics are the predecessor's.")
        if self.recycle is not None:
            graph, select = self.recycle.graph, self.recycle.select
            if select != "co_act" and graph != type(graph)():
                raise ValueError(f"recycle.graph has no effect with select: {select}; it is for co_act. Leave it out.")
            for field, methods in _GRAPH_FIELDS.items():
                if graph.method not in methods:
                    _unused(graph, "recycle.graph", (field,), f"method: {graph.method}")
        return self

    @property
    def needs_statistics(self) -> bool:
        """Whether its choice looks at activations."""
        return self.recycle is not None and self.recycle.select not in ("random", "uniform", "copy")


def default_starts() -> dict[str, Start]:
    """The released strategy beside random weights, plain Soft MoE and the dense network."""
    return {
        "dense random": Start(network="dense"),
        "dense recycled": Start(network="dense", recycle=RecycleOptions()),
        "soft moe random": Start(network="soft_moe"),
        "random": Start(),
        "L2": Start(recycle=RecycleOptions()),
    }


class RecycleSettings(_Settings):
    """The successor, and the ways to start it."""

    model: JetSpec = Field(description="the successor with SpheroMoE layers; with `dims` it is a ConvNeXt")
    soft_experts: int | None = Field(
        default=None, ge=1, le=65_536, description="experts of the Soft MoE baseline; null: as many as tokens"
    )
    predecessor: BackboneSpec = Field(description="as in the statistics stage")
    donor: BackboneSpec | None = Field(
        default=None, description="dense network of the successor's width for all but the experts; null: cut as well"
    )
    starts: dict[str, Start] = Field(
        default_factory=default_starts,
        min_length=1,
        description="the ways to start, by name; one member each",
        json_schema_extra={"cache": False},  # each member carries its own
    )
    parity: Literal["official", "fixed"] = Field(
        default="fixed", description="official: released start of experts, noise in evaluation and shared options"
    )

    @model_validator(mode="after")
    def _fits(self) -> RecycleSettings:
        own = "convnext" if isinstance(self.model, JetConvNeXtSpec) else "vit"
        for what, spec in (("predecessor", self.predecessor), ("donor", self.donor)):
            if spec is not None and (theirs := family_of(spec, what)) != own:
                names = {"vit": "a vision transformer", "convnext": "a ConvNeXt"}
                raise ValueError(f"the {what} {spec.name!r} is {names[theirs]}, but the successor is {names[own]}.")
        if not isinstance(self.model.moe, SpheroSpec) or not self.model.moe_layers:
            raise ValueError("model needs a SpheroMoE (`moe` with core_experts) and `moe_layers`, the blocks with it.")
        lost = [name for name, start in self.starts.items() if start.source == "donor" and self.donor is None]
        if lost:
            raise ValueError(f"the starts {lost} take experts of the donor, but there is no donor.")
        return self

    def network(self, start: Start) -> JetViTSpec | JetConvNeXtSpec:
        """The network of a start: `model`, or a baseline of the same geometry."""
        from moe.algorithms.jetpack import Config

        model = Config(model=self.model, batch_size=1, epochs=1, parity=self.parity).network
        moe = model.moe
        if start.network == "sphero" or not isinstance(moe, SpheroSpec):
            return model
        convnext = isinstance(model, JetConvNeXtSpec)
        if start.network == "dense":
            none: dict[str, Any] = {"stage_experts": ()} if convnext else {"shared_layers": {}, "shared_queries": {}}
            return model.model_copy(update={"moe": None, "moe_layers": (), **none})
        common = {name: getattr(moe, name) for name in ("compress_ratio", "drop", "drop_act", "drop_path")}
        if isinstance(model, JetConvNeXtSpec):
            stages = {
                stage: self.soft_experts or model.tokens(stage) for stage in map(model.stage_of, model.moe_layers)
            }
            soft = SoftMoESpec(num_experts=1, expert_init=moe.expert_init, **common)
            counts = tuple((stages[stage], 0) if stage in stages else None for stage in range(len(model.depths)))
            return model.model_copy(update={"moe": soft, "stage_experts": counts})
        tokens = (model.image_size // model.patch_size) ** 2 + int(model.class_token) + model.reg_tokens
        soft = SoftMoESpec(num_experts=self.soft_experts or tokens, expert_init=moe.expert_init, **common)
        return model.model_copy(update={"moe": soft})


class RecipeSettings(_Settings):
    """Fine-tuning; fields and defaults are those of the algorithm (``moe.algorithms.jetpack``)."""

    starts: tuple[str, ...] = Field(
        default=tuple(default_starts()),
        min_length=1,
        description="names of the ways to start, as in the recycle stage",
        json_schema_extra={"cache": False},  # each member has its own
    )
    rates: RateSpec = Field(default=RateSpec(), description="rates and decay by parameter (AdamW)")
    schedule: ScheduleSpec = Field(default=ScheduleSpec(), description="warm-up and cosine")
    batch_size: int = Field(ge=1, description="images per micro-batch")
    accumulate: int = Field(default=1, ge=1, le=4096, description="micro-batches per update")
    epochs: int = Field(ge=1, description="passes over the rows")
    steps: int | None = Field(default=None, ge=1, description="updates at most; the schedule stays that of the epochs")
    clip: float | None = Field(default=5.0, gt=0, description="largest gradient norm")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="of the targets, soft ones included")
    mixup: float = Field(default=0.8, ge=0, description="alpha of mixup; 0: off")
    cutmix: float = Field(default=1.0, ge=0, description="alpha of CutMix; 0: off")
    augment: Literal["none", "crop", "rand"] = Field(
        default="rand",
        description="rand: random crop, flip, RandAugment and erasing (released); crop: crop and flip (SVHN); none",
    )
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="average the weights; released: off")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast; weights stay fp32")
    splits: tuple[str, ...] = Field(default=("train",), min_length=1, description="splits whose rows are trained on")
    val_split: str = Field(default="val", description="split of the curve")
    test_splits: tuple[str, ...] = Field(default=("test",), description="splits scored once, at the end")
    evaluate_every: int = Field(default=100, ge=1, description="updates between points of the curve")
    eval_batch_size: int = Field(default=128, ge=1, description="images per forward pass of evaluations")
    normalisation: Normalisation | None = Field(default=None, description="of the images; null: the set's own")
    evaluate_on: Literal["whole", "centre"] = Field(
        default="whole",
        description="whole: images resized to a square; centre: short edge to 8/7 of the side (256 for 224), then the "
        "centre, bicubic (released)",
    )
    save_model: bool | tuple[str, ...] = Field(
        default=True, description="keep the fine-tuned weights; a list of starts: of these alone"
    )
    checkpoint_every: int = Field(
        default=200, ge=1, description="updates between checkpoints", json_schema_extra={"cache": False}
    )
    parity: Literal["official", "fixed"] = Field(default="fixed", description="official: released rates by layer")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")

    @model_validator(mode="after")
    def _known_starts(self) -> RecipeSettings:
        kept = () if isinstance(self.save_model, bool) else self.save_model
        for name in kept:
            if name not in self.starts:
                raise ValueError(
                    f"save_model names the start {name!r}, which is not there. {nearest(name, self.starts)}"
                )
        return self

    def keeps(self, start: str) -> bool:
        """Whether the fine-tuned weights of a start are kept."""
        return self.save_model if isinstance(self.save_model, bool) else start in self.save_model


def family_of(spec: BackboneSpec, what: str) -> Literal["vit", "convnext"]:
    """The family of a network that can be recycled; others are refused before anything runs.

    Raises:
        ValueError: another family, or a network that is cut or sparse already.
    """
    if spec.name != "vit_small_focus" and not spec.name.startswith("timm:"):
        raise ValueError(
            f"the {what} {spec.name!r} is not a vision transformer or ConvNeXt; recycling knows vit_small_focus, "
            "timm:vit_* and timm:convnext_*."
        )
    if spec.gmoe is not None or spec.first_block is not None:
        raise ValueError(f"the {what} must be whole and dense; leave gmoe and first_block out.")
    return "convnext" if "convnext" in spec.name else "vit"


def fill_jetpack_preset(values: Any, fields: Mapping[str, Any]) -> Any:
    """``values`` of a config block with the algorithm's preset underneath (for a pydantic ``before`` validator).

    Args:
        values: the block; its ``preset`` is a name of ``moe.algorithms.jetpack.PRESETS``.
        fields: names that the block knows; the preset's other fields belong to other stages.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(values, Mapping) or not values.get("preset"):
        return values
    from moe.algorithms._jetpack_presets import PRESETS

    name = str(values["preset"])
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. {nearest(name, PRESETS)}")
    known = {key: _plain(value) for key, value in PRESETS[name].items() if key in fields and key != "recycle"}
    given = values.get("model")
    if isinstance(given, Mapping) and "dims" in given:
        known.pop("model", None)  # the presets' transformer does not mix with a ConvNeXt
    return overlay(known, values)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value
