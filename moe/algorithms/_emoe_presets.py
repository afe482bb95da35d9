"""Constants of EMoE per data set, for vision (DomainBed) and language (GLUE).

Source: EMoE's public code, commit ba8e1757 (paper arXiv 2310.10908): its registered hyper-parameters, README commands
and search scripts. Presets of the embedded sets are ours.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

# Data set -> rate and weight decay (Adam, constant rate). Source: registered hyper-parameters.
RATES = {
    "pacs": (3e-5, 1e-6),
    "vlcs": (3e-5, 1e-6),
    "officehome": (1e-5, 1e-6),
    "terraincognita": (5e-5, 1e-4),
    "domainnet": (5e-5, 0.0),
    "cub_dg": (5e-5, 0.0),
}


def _vision(dataset: str) -> Fields:
    """DeiT-S, blocks 8 and 10, 24 experts of 64 neurons, 4 per token. Source: README (EMoE command)."""
    lr, weight_decay = RATES[dataset]
    steps, every = (15001, 500) if dataset == "domainnet" else (5001, 300)
    return {
        "backbone": {"name": "timm:deit_small_patch16_224", "pretrained": True},
        "emoe": {"num_experts": 24, "top_k": 4, "dropout": 0.1},
        "train": {
            "batch_size": 32,
            "per_domain": True,
            "steps": steps,
            "evaluate_every": every,
            "lr": lr,
            "weight_decay": weight_decay,
            "schedule": "constant",
        },
    }


VISION_PRESETS: dict[str, Fields] = {
    **{name: _vision(name) for name in RATES},
    # Ours: to try the method on the embedded digits in minutes on a CPU.
    "rotated14": {
        "backbone": {"name": "timm:vit_tiny_patch16_224", "channels": 1, "image_size": 64},
        "emoe": {"num_experts": 24, "top_k": 4, "restarts": 1},
        "train": {"batch_size": 32, "steps": 500, "lr": 3e-4, "schedule": "constant"},
    },
}

# Task -> epochs of a full and of a low-rank run. Source: search scripts.
EPOCHS = {
    "cola": (10, 20),
    "sst2": (10, 20),
    "mrpc": (10, 20),
    "stsb": (10, 20),
    "qqp": (3, 5),
    "mnli": (3, 5),
    "qnli": (3, 5),
    "rte": (10, 20),
}
OUTPUTS = {"stsb": 1, "mnli": 3}


def _text(task: str, lora: bool) -> Fields:
    """BERT-large, its last even layer, 64 experts. Source: paper, section 4.1 and appendix; search scripts."""
    layers = [22]
    fields: Fields = {
        "model": {
            "family": "bert",
            "hidden": 1024,
            "layers": 24,
            "heads": 16,
            "ffn": 4096,
            "num_outputs": OUTPUTS.get(task, 2),
        },
        "emoe": {"num_experts": 64, "top_k": 16},
        "layers": layers,
        "tuning": {"moe_layers": layers, "one_score": True},
        "epochs": EPOCHS[task][1 if lora else 0],
        "learning_rates": [2e-4, 3e-4, 5e-4] if lora else [2e-5, 3e-5, 5e-5],
    }
    if lora:
        fields["lora"] = {"rank": 8, "alpha": 16, "dropout": 0.1}
        fields["tuning"] |= {"lora": True, "tune_moe_layers_only": True, "tune_gates_only": True}
    return fields


TEXT_PRESETS: dict[str, Fields] = {
    **{task: _text(task, lora=False) for task in EPOCHS},
    **{f"{task}@lora": _text(task, lora=True) for task in EPOCHS},
}
