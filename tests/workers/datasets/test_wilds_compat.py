"""The work-arounds around the ``wilds`` package: they work, they end, and its own evaluators agree with our scores."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.workers.datasets.wilds_sets import NAMES, loaded, root_of
from workers import wilds_compat
from workers.metrics import score


def state():
    return (
        pd.Series.__dict__["values"],
        pd.to_datetime,
        Image.MAX_IMAGE_PIXELS,
        sys.modules.get("torch_scatter"),
        os.environ.get("OUTDATED_IGNORE"),
        list(warnings.filters),
    )


def test_nothing_leaks():
    before = state()
    with wilds_compat.construction():
        series = pd.Series([1, 2, 3])
        series.values[0] = 9  # a writable copy
        assert series.tolist() == [1, 2, 3]
        mixed = pd.to_datetime(pd.Series(["2015-01-01T00:00:00Z", "2016-01-01T00:00:00.123Z"]))
        assert mixed.dt.year.tolist() == [2015, 2016]
        Image.MAX_IMAGE_PIXELS = 10**10  # what importing the fmow module does
    assert state() == before
    with wilds_compat.evaluation():
        import torch_scatter

        assert torch_scatter.scatter(torch.ones(2), torch.tensor([0, 0]), dim_size=1).tolist() == [1.0]
    assert state() == before


def test_nothing_leaks_after_an_error():
    before = state()
    for context in (wilds_compat.construction, wilds_compat.evaluation):
        with pytest.raises(ValueError, match="boom"), context():
            raise ValueError("boom")
        assert state() == before


def test_strings_keep_their_kind():
    with wilds_compat.construction():
        assert list(pd.Series(["a", "b"]).values) == ["a", "b"]


def test_import_asks_no_network_and_starts_no_thread():
    code = (
        "import threading, socket, os, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "started = []\n"
        "start = threading.Thread.start\n"
        "threading.Thread.start = lambda self: (started.append(self), start(self))[1]\n"
        "from workers.wilds_compat import construction\n"
        "with construction():\n"
        "    import wilds\n"
        "assert not [t for t in started if 'check' in repr(getattr(t, '_target', None))], started\n"
        "assert 'outdated' not in sys.modules and 'OUTDATED_IGNORE' not in os.environ\n"
        "print(wilds.__version__)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "OUTDATED_IGNORE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2.0")


def test_records_import_nothing_heavy():
    code = (
        "import sys\nfrom pathlib import Path\n"
        f"for name in {NAMES!r}:\n"
        "    module = __import__(f'workers.datasets.{name}', fromlist=['INFO'])\n"
        "    module.INFO, module.Options(), module.LAYOUT, module.missing(Path())\n"
        "heavy = {'torch', 'pandas', 'wilds', 'ray', 'mlflow', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scatter_is_a_group_mean():
    values, index = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([2, 2, 0])
    assert wilds_compat.scatter(values, index, dim_size=4).tolist() == [10.0, 0.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="only knows"):
        wilds_compat.scatter(values, index, dim_size=4, reduce="sum")


# our metric -> name in the package's results
OFFICIAL = {
    "accuracy": "acc_avg",
    "macro_f1": "F1-macro_all",
    "macro_recall": "recall-macro_all",
    "acc_wg": "acc_wg",
    "acc_worst_region": "acc_worst_region",
    "acc_worst_year": "acc_worst_year",
    "pearson_r": "r_all",
    "worst_group_pearson_r": "r_wg",
    "mse": "mse_avg",
}


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("name", NAMES)
def test_our_scores_are_the_packages(name, split):
    data = loaded(name)
    rows = data.splits[split]
    official = wilds_compat.open_dataset(name, str(root_of(name)))
    rng = np.random.default_rng(3)
    labels = data.labels[rows]
    if data.info.task == "regression":
        predictions = (labels + rng.normal(0, 0.7, len(rows))).astype(np.float32)
        tensors = [torch.from_numpy(values)[:, None] for values in (predictions, labels)]
    else:
        flip = rng.random(len(rows)) < 0.4
        predictions = np.where(flip, rng.integers(0, labels.max() + 1, len(rows)), labels)
        tensors = [torch.from_numpy(values) for values in (predictions, labels)]
    theirs = wilds_compat.evaluate(official, *tensors, official.metadata_array[rows])
    ours = score(
        data.info,
        predictions,
        labels,
        data.metadata[rows],
        data.fields,
        data.value_names,
        data.column("y", rows) * 0 if "y" in data.fields else None,
    )
    compared = [metric for metric in data.info.metrics if metric in OFFICIAL]
    assert len(compared) >= 2
    for metric in compared:
        assert ours[metric] == pytest.approx(theirs[OFFICIAL[metric]], abs=2e-6), metric
