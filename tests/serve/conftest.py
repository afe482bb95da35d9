"""A served model for every test of ``serve``: real digits, trained for a few seconds."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from serve.delta import Delta
from serve.model import ServedModel
from tests.serve import making


@pytest.fixture(scope="session")
def served_folder(request, tmp_path_factory):
    """The bundle's folder: student, aggregator, three experts; 28x28 grey digits at 0, 30 and 60 degrees.

    Trained once and kept in pytest's cache until the recipe changes (``pytest --cache-clear`` trains again).
    """
    recipe = hashlib.sha256(Path(making.__file__).read_bytes()).hexdigest()[:16]
    kept = request.config.cache.mkdir("served") / recipe
    with FileLock(f"{kept}.lock"):
        if not (kept / "manifest.json").is_file():
            shutil.rmtree(kept, ignore_errors=True)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                shutil.move(making.make_bundle(tmp_path_factory.mktemp("making") / "digits"), kept)
            finally:
                torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("served") / "digits"
    shutil.copytree(kept, folder)
    return folder


@pytest.fixture(scope="session")
def served_model(served_folder):
    """The loaded model; nothing may change it."""
    return ServedModel.load(str(served_folder))


@pytest.fixture(scope="session")
def domain_images():
    """``domain_images(angle, count)`` -> (uint8 images ``[28, 28, 1]``, labels) that no network has seen."""
    return making.held_out


@pytest.fixture(scope="session")
def make_delta(served_model):
    """``make_delta(seed, pattern)``: a delta whose tensors (names containing ``pattern``) are a tenth off the base."""

    def make(seed, pattern="norm"):
        generator = torch.Generator().manual_seed(seed)
        norms = {name.rpartition(".")[0] for name in served_model.state_dict() if name.endswith("running_mean")}
        changed = {}
        for name, value in served_model.state_dict().items():
            chosen = name.rpartition(".")[0] in norms if pattern == "norm" else pattern in name
            if chosen and value.is_floating_point():
                changed[name] = value * (0.9 + 0.2 * torch.rand(value.shape, generator=generator))
        return Delta(changed)

    return make
