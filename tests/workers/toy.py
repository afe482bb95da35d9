"""A small generated data set with domains, for the tests of training code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from workers.datasets._arrays import domain_data
from workers.datasets.base import DATASETS, DatasetInfo, DomainData, Missing


def toy_data(num_domains: int = 6, rows_per_domain: int = 24, size: int = 8, seed: int = 0) -> DomainData:
    """Three classes (position of a bright bar), domains differ in contrast; the last two are val and test."""
    rng = np.random.default_rng(seed)
    count = num_domains * rows_per_domain
    domain = np.repeat(np.arange(num_domains), rows_per_domain)
    labels = rng.integers(0, 3, size=count)
    images = rng.normal(60, 15, size=(count, size, size, 1))
    for row in range(count):
        start = 1 + 2 * labels[row]
        images[row, :, start : start + 2] += 40 + 25 * domain[row]
    info = DatasetInfo(
        name="toy",
        title="bars",
        task="multiclass",
        num_outputs=3,
        channels=1,
        image_size=(size, size),
        domain_field="domain",
        group_fields=("domain",),
        metrics=("macro_f1", "accuracy"),
        selection_metric="accuracy",
        normalisation="unit",
        licence="none",
        source="generated",
    )
    train = np.flatnonzero(domain < num_domains - 2)
    splits = {
        "train": train,
        "val": np.flatnonzero(domain == num_domains - 2),
        "test": np.flatnonzero(domain == num_domains - 1),
    }
    metadata = np.stack([domain, labels], axis=1).astype(np.int64)
    pixels = images.clip(0, 255).astype(np.uint8)
    return domain_data(info, pixels, labels.astype(np.int64), metadata, ("domain", "y"), splits, {})


INFO = toy_data(3, 1).info


class Options(BaseModel):
    """The registry's way to open the set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_domains: int = 6
    rows_per_domain: int = 24
    size: int = 12


def load(root: Path, options: Options) -> DomainData:
    return toy_data(options.num_domains, options.rows_per_domain, options.size)


def missing(root: Path) -> list[Missing]:
    """Nothing: it is made in memory."""
    return []


def register() -> None:
    DATASETS.add("toy", "tests.workers.toy")


def distill_job(folder: Path, name: str = "job", **settings: Any) -> dict[str, Any]:
    """A distillation job of two random experts on the toy set, as JSON; artifacts are made once per folder."""
    from moe.aggregator import Aggregator
    from moe.backbones import build_classifier
    from moe.specs import BackboneSpec
    from tests.workers.test_loop import Recorder
    from workers.features import write_features
    from workers.modelfile import MODEL_FILE, load_student, model_meta, save_aggregator, save_tensors
    from workers.transforms import transform_for

    register()
    data, spec = toy_data(size=12), BackboneSpec(name="tiny_cnn", channels=1, width=2)
    meta = model_meta("classifier", spec, 3, 32, "toy")
    aggregator = {"dim": 32, "num_outputs": 3, "heads": 4}
    if not (folder / "aggregator").exists():
        for index in range(3):
            torch.manual_seed(index)
            place = folder / f"expert{index}"
            save_tensors(place / MODEL_FILE, build_classifier(spec, 3).state_dict())
            expert, transform = load_student(place, meta), transform_for(data.info, None, train=True)
            rows = np.concatenate([data.splits["train"], data.splits["val"]])
            write_features(expert.extract, data.images, rows, transform, folder / f"features{index}", 32, Recorder())
        torch.manual_seed(9)
        (folder / "aggregator").mkdir()
        save_aggregator(folder / "aggregator", Aggregator(**aggregator))
    values = {
        "meta": {"inner_lr": 0.05},
        "student_lr": 1e-2,
        "aggregator_lr": 1e-3,
        "support": 8,
        "query": 8,
        "steps": 6,
        "tasks_per_step": 2,
        "checkpoint_every": 2,
        "engine": "torch",
        "cadence": "steps",
        "evaluate_every": 3,
        **settings,
    }
    (folder / name).mkdir(exist_ok=True)
    return {
        "dataset": "toy",
        "data_root": str(folder),
        "student": {"path": str(folder / "expert0"), "meta": meta},
        "aggregator": {"path": str(folder / "aggregator"), "meta": {"aggregator": aggregator}},
        "features": [str(folder / f"features{index}") for index in range(3)],
        "groups": [[0, 1], [2], [3]],
        "settings": values,
        "seed": 4,
        "scratch": str(folder / f"{name}-scratch"),
        "output": str(folder / name),
    }
