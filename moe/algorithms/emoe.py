"""EMoE: emergent mixture of experts, a pretrained network's own neurons as experts while it is fine-tuned.

Paper: Qiu, Huang, Fu (NAACL 2024, "Unlocking Emergent Modularity in Large Language Models"; arXiv 2310.10908). Public
code: qiuzh20/EMoE, commit ba8e1757. Equation: feed-forward layer sum_i act(x k_i + b_i) v_i, restricted to the K of E
clusters of neurons whose mean key fits the token best; task loss plus 0.01 * (variation of importance + variation of
load) / 2 for every converted layer.

- Parity: balanced clusters of normalised keys, gate = mean keys, set anew after every optimiser step, chosen experts
  weigh 1; DomainBed's Adam and rates, GLUE's AdamW, search and early stopping.
- Differs: nothing is dropped and evaluation does not depend on the batch; ``EMoESpec.official()`` brings that back.
- Differs: the gate is set at conversion, not after the first step.
- Differs: the network is converted after its pretrained weights were loaded, by :meth:`Method.convert`; without
  pretrained weights :meth:`Method.build` does it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field, model_validator

from moe.algorithms._domains import domains_of, forward, joined
from moe.algorithms._emoe_presets import TEXT_PRESETS, VISION_PRESETS
from moe.algorithms._supervised import Supervised, SupervisedConfig
from moe.algorithms.base import Settings
from moe.errors import SpecError, nearest
from moe.models.emoe_layers import vision_layers
from moe.models.emoe_spec import EMoESpec
from moe.models.text_spec import LoraSpec, TextModelSpec, TuningRules
from moe.specs import BackboneSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe.losses import Losses

R = TypeVar("R")


class Config(SupervisedConfig):
    """Settings of EMoE on a vision transformer."""

    emoe: EMoESpec = Field(description="Experts, gate, rules.")
    layers: tuple[int, ...] | None = Field(
        default=None, description="Converted blocks; by the rule below when left out."
    )
    num_inter: int = Field(default=2, ge=0, le=512, description="Number of converted blocks.")
    every_moe: bool = Field(default=True, description="Every other block from the end; else the last ones.")
    skip_last: int = Field(default=0, ge=0, le=512, description="Dense blocks behind the pattern.")
    drop_path: float = Field(
        default=0.1, ge=0, lt=1, description="Stochastic depth of the last block; grows linearly from 0 in the first."
    )

    @model_validator(mode="after")
    def _dense(self) -> Config:
        if self.backbone.gmoe is not None or self.backbone.emoe is not None:
            raise ValueError(
                "The backbone has experts already; EMoE converts a dense one: leave gmoe and emoe out of it."
            )
        rule = {name: getattr(self, name) for name in ("num_inter", "every_moe", "skip_last")}
        idle = [name for name, value in rule.items() if value != type(self).model_fields[name].default]
        if self.layers is not None and idle:
            raise ValueError(f"{idle[0]}={rule[idle[0]]} has no effect beside layers; leave one of them out.")
        return self


class TextConfig(Settings):
    """Settings of EMoE on a text classifier; the search is ``workers.glue``'s."""

    model: TextModelSpec = Field(description="Network.")
    emoe: EMoESpec | None = Field(default=None, description="Experts, gate, rules; none is a dense baseline.")
    layers: tuple[int, ...] = Field(default=(), description="Converted layers.")
    lora: LoraSpec | None = Field(default=None, description="Low-rank adapters, or none for full tuning.")
    tuning: TuningRules = Field(default_factory=TuningRules, description="Which parameters train.")
    learning_rates: tuple[float, ...] = Field(min_length=1, description="Rates of the search.")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="Seeds per rate.")
    epochs: int = Field(ge=1, description="Most passes over the rows.")
    patience: int = Field(default=4, ge=1, description="Epochs in a row without a better average that end a run.")
    batch_size: int = Field(default=32, ge=1, description="Texts per update.")
    max_length: int = Field(default=128, ge=1, description="Longest text in tokens; longer ones are cut.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's; never on biases and norms.")

    @model_validator(mode="after")
    def _fits(self) -> TextConfig:
        if self.emoe is not None and not self.layers:
            raise ValueError("emoe needs the layers to convert.")
        outside = [layer for layer in self.layers if not 0 <= layer < self.model.layers]
        if outside:
            raise ValueError(f"layers={list(self.layers)}: the network has the layers 0 to {self.model.layers - 1}.")
        if self.tuning.lora != (self.lora is not None):
            raise ValueError("tuning.lora and lora contradict each other.")
        return self

    @classmethod
    def preset(cls, task: str, **changes: Any) -> TextConfig:
        """Settings of a GLUE task (``rte``, or ``rte@lora``); top-level fields may be replaced.

        Raises:
            SpecError: there is no preset for it.
        """
        if task not in TEXT_PRESETS:
            raise SpecError(f"There is no preset for the task {task!r}.", nearest(task, TEXT_PRESETS))
        return cls(**{**TEXT_PRESETS[task], **changes})

    def build(self) -> nn.Module:
        """The network with random weights, adapters included, not yet converted; load weights, then :meth:`convert`."""
        from moe.models.text import add_lora, build_text_model

        model = build_text_model(self.model)
        return model if self.lora is None else add_lora(model, self.model.family, self.lora)

    def convert(self, model: nn.Module, labels: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
        """Convert the layers in place and set which parameters train; the labels used, by layer."""
        from moe.models.emoe_convert import convert_layers
        from moe.models.emoe_tuning import set_trainable

        used = {} if self.emoe is None else convert_layers(model, self.layers, self.emoe, labels)
        set_trainable(model, self.tuning)
        return used


class Method(Supervised[Config]):
    """A vision transformer in student form, some of whose feed-forward layers became experts."""

    Config = Config
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = VISION_PRESETS

    def build(self, num_outputs: int) -> nn.Module:
        """The network, converted; with ``backbone.pretrained`` still dense: load the weights, then :meth:`convert`."""
        from moe.models.emoe_convert import set_drop_path, transformer_layers

        student = super().build(num_outputs)
        if self.config.drop_path > 0:
            set_drop_path(transformer_layers(student), self.config.drop_path)
        if self.config.backbone.pretrained is False:
            self.convert(student)
        return student

    def convert(
        self, module: nn.Module, labels: Mapping[int, Tensor] | None = None, *, split: bool = True
    ) -> dict[int, Tensor]:
        """Convert the chosen blocks in place.

        Args:
            module: what :meth:`build` gave, with its weights.
            labels: known labels by block; only the others are split.
            split: False takes contiguous labels at no cost, for a network that is about to load a converted state.

        Returns:
            The labels used, by block.
        """
        from moe.conversion.split import split_keys
        from moe.models.emoe_convert import convert_layers, dense_ffn, transformer_layers

        parts, spec = transformer_layers(module), self.config.emoe
        layers = self.layers(len(parts))
        if not split and spec.split != "copy":
            known = {i: split_keys(dense_ffn(parts[i]).keys_FD, spec.num_experts, "contiguous") for i in layers}
            labels = {**known, **(labels or {})}
        return convert_layers(module, layers, spec, labels)

    def architecture(self) -> BackboneSpec:
        """See the base class."""
        import torch

        from moe.backbones import build_classifier
        from moe.models.emoe_convert import transformer_layers

        with torch.device("meta"):
            depth = len(transformer_layers(build_classifier(self.config.backbone, 1)))
        changes = {"emoe": self.config.emoe, "emoe_layers": tuple(self.layers(depth))}
        return self.config.backbone.model_copy(update=changes)

    def layers(self, depth: int) -> list[int]:
        """Converted blocks of a network of this depth."""
        config = self.config
        if config.layers is not None:
            return list(config.layers)
        return vision_layers(depth, config.num_inter, config.every_moe, config.skip_last)

    def loss(self, module: nn.Module, batch: Any) -> Losses:
        """Losses of a batch (see ``_domains``); parts ``task`` and ``aux`` (weighted sum over the converted blocks).

        Raises:
            SpecError: no block is converted (yet).
        """
        from moe.losses import Losses, task_loss
        from moe.models.emoe_blocks import converted_layers
        from moe.models.emoe_convert import balance_loss

        if not converted_layers(module):
            raise SpecError("No block of this network is converted.", "Call convert() after loading its weights.")
        rows = joined(domains_of(batch))
        out = forward(module, rows.images)
        task = task_loss(self.task, out.logits_BK, rows.labels)
        aux = balance_loss(module)
        total = task + aux if out.extra is None else task + aux + out.extra
        return Losses(total, {"task": task.detach(), "aux": aux.detach(), **out.parts})

    def update(self, module: nn.Module, batch: Any, take_step: Callable[[Any], R]) -> R:
        """One engine step, after which the avg-k gates follow their experts."""
        from moe.models.emoe_blocks import update_gates

        result = take_step(batch)
        update_gates(module)
        return result
