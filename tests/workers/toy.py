"""A small generated data set with domains, for the tests of training code."""

from __future__ import annotations

import numpy as np

from workers.datasets._arrays import domain_data
from workers.datasets.base import DatasetInfo, DomainData


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
