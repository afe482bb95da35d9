"""Hyper-parameters: defaults and random draws of every algorithm, data set and protocol.

Each name draws one value from its own ``RandomState(seed_hash(seed, name))``, so that a value depends on nothing but
its name and the seed. Source: DomainBed (arXiv 2007.01434, appendix D.2; public code b93c22a1), GMoE (0689d557)
and EMoE (ba8e1757).

Known differences: values are built-in numbers (the public code leaves NumPy scalars in records). Algorithms whose
search space is not tabled here raise instead of silently drawing the common names only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from moe.errors import SpecError, nearest
from workers.domainbed.benchmark_sets import BenchmarkSet
from workers.domainbed.protocol import Protocol, protocol
from workers.domainbed.seeds import builtin, seed_hash

Value = bool | int | float | str
Draw = Callable[[np.random.RandomState], Any]


@dataclass(frozen=True)
class HParam:
    """One hyper-parameter: its default, and how a random value is drawn (None: always the default)."""

    default: Value
    draw: Draw | None = None

    def sample(self, name: str, seed: int) -> Value:
        """The value of ``name`` for the random seed ``seed``."""
        if self.draw is None:
            return self.default
        value: Value = builtin(self.draw(np.random.RandomState(seed_hash(seed, name))))
        return value


Table = dict[str, HParam]


def power(base: float, low: float, high: float) -> Draw:
    """Draws ``base ** U(low, high)``."""
    return lambda random: base ** random.uniform(low, high)


def uniform(low: float, high: float) -> Draw:
    """Draws ``U(low, high)``."""
    return lambda random: random.uniform(low, high)


def choice(*values: float) -> Draw:
    """Draws one of ``values``, all equally likely."""
    return lambda random: random.choice(values)


def whole(draw: Draw) -> Draw:
    """The draw without its decimals."""
    return lambda random: int(draw(random))


def always(value: Value) -> Draw:
    """No chance in it; for names whose random value is another constant than the default."""
    return lambda random: value


_ANNEAL = HParam(500, whole(power(10, 0, 4)))
_DROPOUT = choice(0.0, 0.1, 0.5)
_BIG_RATE, _SMALL_RATE = power(10, -5, -3.5), power(10, -4.5, -2.5)
_DECAY = HParam(0.0, power(10, -6, -2))
_NO_DECAY = HParam(0.0)
_MMD: Table = {"mmd_gamma": HParam(1.0, power(10, -1, 1))}
_DANN: Table = {
    "lambda": HParam(1.0, power(10, -2, 2)),
    "weight_decay_d": _DECAY,
    "d_steps_per_g_step": HParam(1, whole(power(2, 0, 3))),
    "grad_penalty": HParam(0.0, power(10, -2, 1)),
    "beta1": HParam(0.5, choice(0.0, 0.5)),
    "mlp_width": HParam(256, whole(power(2, 6, 10))),
    "mlp_depth": HParam(3, choice(3, 4, 5)),
    "mlp_dropout": HParam(0.0, _DROPOUT),
}

# Names that an algorithm adds to the common ones.
_ALGORITHMS: dict[str, Table] = {
    "ERM": {},
    "ERM_SMA": {},
    "GMOE": {},
    "ARM": {},
    "SelfReg": {},
    "IRM": {"irm_lambda": HParam(100.0, power(10, -1, 5)), "irm_penalty_anneal_iters": _ANNEAL},
    "VREx": {"vrex_lambda": HParam(10.0, power(10, -1, 5)), "vrex_penalty_anneal_iters": _ANNEAL},
    "CORAL": _MMD,
    "MMD": _MMD,
    "Mixup": {"mixup_alpha": HParam(0.2, power(10, -1, 1))},
    "GroupDRO": {"groupdro_eta": HParam(0.01, power(10, -3, -1))},
    "MLDG": {"mldg_beta": HParam(1.0, power(10, -1, 1))},
    "Fish": {"meta_lr": HParam(0.5, choice(0.05, 0.1, 0.5))},
    "MTL": {"mtl_ema": HParam(0.99, choice(0.5, 0.9, 0.99, 1.0))},
    "SD": {"sd_reg": HParam(0.1, power(10, -5, -1))},
    "RSC": {
        "rsc_f_drop_factor": HParam(1 / 3, uniform(0, 0.5)),
        "rsc_b_drop_factor": HParam(1 / 3, uniform(0, 0.5)),
    },
    "SagNet": {"sag_w_adv": HParam(0.1, power(10, -2, 1))},
    "ANDMask": {"tau": HParam(1.0, uniform(0.5, 1))},
    "SANDMask": {"tau": HParam(1.0, uniform(0, 1)), "k": HParam(10.0, power(10, -3, 5))},
    "IGA": {"penalty": HParam(1000.0, power(10, 1, 5))},
    "Fishr": {
        "lambda": HParam(1000.0, power(10, 1, 4)),
        "penalty_anneal_iters": HParam(1500, whole(uniform(0, 5000))),
        "ema": HParam(0.95, uniform(0.9, 0.99)),
    },
    "DANN": _DANN,
    "CDANN": _DANN,
}
FORK_ONLY = frozenset({"ERM_SMA", "GMOE"})

# GMOE: data set -> rate, weight decay, dropout that is registered and never read. Rates are drawn as for small images.
_GMOE = {
    "PACS": (3e-5, 1e-6, 0.0),
    "VLCS": (3e-5, 1e-6, 0.5),
    "OfficeHome": (1e-5, 1e-6, 0.1),
    "TerraIncognita": (5e-5, 1e-4, 0.0),
    "DomainNet": (5e-5, 0.0, 0.1),
    "CUB": (5e-5, 0.0, 0.1),
}

# What EMoE's code reads of the mixture, under its names; never drawn. Its algorithm is called GMOE, too.
_MIXTURE: Table = {
    "vit_type": HParam("small"),
    "vanilla_ViT": HParam(False),
    "num_experts": HParam(6),
    "topk": HParam(1),
    "num_inter": HParam(2),
    "every_moe": HParam(True),
    "skip_last": HParam(0),
    "router": HParam("cosine_top"),
    "MoE_from_ffn": HParam(False),
    "one_score_gate": HParam(False),
    "normalize_one_score_gate": HParam(False),
    "one_score_gate_update_momentum": HParam(0.0),
    "gate_noise": HParam(1.0),
    "capacity_factor": HParam(1.5),
    "expert_repeat": HParam(1),
    "aux_loss_weight": HParam(1.0),
}
# Overrides that make GMOE of ``emoe_fork`` an EMoE. Source: README of EMoE's code.
EMOE: Mapping[str, Value] = MappingProxyType(
    {"MoE_from_ffn": True, "router": "top", "one_score_gate": True, "num_experts": 24, "topk": 4, "num_inter": 2}
)
# Further names with their defaults that its code reads where vit_type is "large" (low-rank tuning of a ViT-L).
EMOE_LARGE: Mapping[str, Value] = MappingProxyType(
    {
        "vit_type": "large",
        "peft": True,
        "lora_config": 32,  # rank and alpha
        "tune_moe_layers_only": True,
        "tune_gates_only": False,
        "tune_layernorm": False,
        "tune_embeddings": True,
        "random_init_gate": False,
    }
)


def hparam_table(protocol_name: str, algorithm: str, dataset: str) -> Table:
    """Every hyper-parameter of an algorithm on a data set, in the order of the records.

    Args:
        protocol_name: ``domainbed_2020``, ``domainbed_head``, ``gmoe_fork`` or ``emoe_fork``.
        algorithm: official name, e.g. ``CORAL``.
        dataset: official name, e.g. ``OfficeHome``.

    Raises:
        SpecError: an unknown name, or one that this protocol does not have.
    """
    rules = protocol(protocol_name)
    entry = rules.check(dataset)
    own = _own(rules, algorithm)
    table = {**_common(rules), **own, **_optimiser(rules, algorithm, entry)}
    if algorithm == "GMOE" and rules.name == "emoe_fork":
        table |= _MIXTURE
    if algorithm == "GMOE" and entry.name in _GMOE:
        rate, decay, dropout = _GMOE[entry.name]
        table["lr"] = HParam(rate, _SMALL_RATE)
        table["weight_decay"] = HParam(decay, always(0.0))
        table["resnet_dropout"] = replace(table["resnet_dropout"], default=dropout)
    return table


def default_hparams(protocol_name: str, algorithm: str, dataset: str) -> dict[str, Value]:
    """The default of every name. Raises SpecError, see :func:`hparam_table`."""
    return {name: entry.default for name, entry in hparam_table(protocol_name, algorithm, dataset).items()}


def random_hparams(protocol_name: str, algorithm: str, dataset: str, seed: int) -> dict[str, Value]:
    """A random value of every name, a function of ``seed``. Raises SpecError, see :func:`hparam_table`."""
    table = hparam_table(protocol_name, algorithm, dataset)
    return {name: entry.sample(name, seed) for name, entry in table.items()}


def run_hparams(
    protocol_name: str, algorithm: str, dataset: str, hparams_seed: int, trial_seed: int
) -> dict[str, Value]:
    """What a run of a sweep uses: the defaults for ``hparams_seed`` 0, else a draw that also depends on the trial.

    Raises:
        SpecError: see :func:`hparam_table`.
    """
    if hparams_seed == 0:
        return default_hparams(protocol_name, algorithm, dataset)
    return random_hparams(protocol_name, algorithm, dataset, seed_hash(hparams_seed, trial_seed))


def _own(rules: Protocol, algorithm: str) -> Table:
    allowed = [name for name in _ALGORITHMS if rules.fork or name not in FORK_ONLY]
    if algorithm not in allowed:
        raise SpecError(
            f"The hyper-parameters of {algorithm!r} under {rules.name} are not tabled.", nearest(algorithm, allowed)
        )
    own = dict(_ALGORITHMS[algorithm])
    if algorithm == "Mixup" and rules.fork:
        own["mixup_alpha"] = HParam(0.1)
    if algorithm == "MLDG" and rules.name == "domainbed_head":
        own["n_meta_test"] = HParam(2, choice(1, 2))
    return own


def _common(rules: Protocol) -> Table:
    """Names of every algorithm but those of the optimiser."""
    head = rules.name == "domainbed_head"
    table: Table = {"data_augmentation": HParam(True), "resnet18": HParam(False)}
    if head:
        table |= {
            "resnet50_augmix": HParam(True),
            "dinov2": HParam(False),
            "vit": HParam(False),
            "vit_attn_tune": HParam(False),
            "freeze_bn": HParam(False),
            "lars": HParam(False),
            "linear_steps": HParam(500),
        }
    table["resnet_dropout"] = HParam(0.0, _DROPOUT)
    if head:
        table["vit_dropout"] = HParam(0.0, _DROPOUT)
    table |= {"class_balanced": HParam(False), "nonlinear_classifier": HParam(False)}
    if rules.fork:  # in the records; its code reads none of the four
        table |= {
            "optimizer": HParam("adam"),
            "val_augment": HParam(False),
            "freeze_bn": HParam(True),
            "pretrained": HParam(True),
        }
    return table


def _optimiser(rules: Protocol, algorithm: str, entry: BenchmarkSet) -> Table:
    """Rates, weight decays and batch size."""
    table: Table = {
        "lr": HParam(1e-3, _SMALL_RATE) if entry.small else HParam(rules.rate, _BIG_RATE),
        "weight_decay": _NO_DECAY if entry.small else _DECAY,
        "batch_size": _batch_size(algorithm, entry),
    }
    if algorithm in ("DANN", "CDANN"):
        rate = HParam(1e-3, _SMALL_RATE) if entry.small else HParam(5e-5, _BIG_RATE)
        table |= {"lr_g": rate, "lr_d": rate, "weight_decay_g": _NO_DECAY if entry.small else _DECAY}
    return table


def _batch_size(algorithm: str, entry: BenchmarkSet) -> HParam:
    """Images of one domain in a minibatch."""
    if entry.small:
        return HParam(64, whole(power(2, 3, 9)))
    if algorithm == "ARM":
        return HParam(8)
    return HParam(32, whole(power(2, 3, 5 if entry.name == "DomainNet" else 5.5)))
