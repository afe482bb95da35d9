"""Draws of timm's transforms: the shared generators' own, and nobody else's."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from workers.timm_draws import timm_draws

POLICY = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
ERASE = RandomErasing(0.5, mode="pixel", device="cpu")
PIXELS = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def pictures(count=20):
    from PIL import Image

    drawn = np.stack([np.asarray(POLICY(Image.fromarray(PIXELS))) for _ in range(count)])
    return ERASE(torch.from_numpy(drawn).permute(0, 3, 1, 2).float())


def compare_with_the_shared_generators():
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    wanted = pictures()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with timm_draws() as seeded:
        seeded(5)
        assert torch.equal(pictures(), wanted)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_draws_are_those_of_the_shared_generators_and_leave_them_alone():
    # In a process of its own: threads that earlier tests left in this one may draw from the shared generators.
    call = f"from {__name__} import *; compare_with_the_shared_generators()"
    subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parents[2], check=True)


def test_a_thread_that_draws_meanwhile_changes_nothing():
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            random.random()

    with timm_draws() as seeded:
        seeded(7)
        alone = pictures()
        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        try:
            for _ in range(5):
                seeded(7)
                assert torch.equal(pictures(), alone)
        finally:
            stop.set()
            thread.join()
