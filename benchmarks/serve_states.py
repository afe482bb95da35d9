"""Many states on one model: predictions by 1,000 of them against one, memory held, and mixed batches.

Over HTTP to a server in this process, in CPU time of client and server together.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import httpx
import torch

from benchmarks.measure import Row, alternate
from benchmarks.serve_setting import alternate as take_turns
from benchmarks.serve_setting import bundle, infer, local, pictures
from benchmarks.setting import Sizes
from serve.catalogue import Catalogue, Facts
from serve.delta import Delta
from serve.http.auth import DEFAULT_TENANT
from serve.model import ServedModel

DOMAINS = 8
_MIB = 2**20
_FLAT, _MIXED = 1 / 1.1, 1 / 1.5


def run(sizes: Sizes) -> list[Row]:
    """1,000 states over HTTP on the ResNet-18; mixed batches on both networks."""
    if sizes.backbone == "tiny_cnn":
        return [*_many("tiny_cnn", 32, 20, 2, 1), _mixed("tiny_cnn", 32, 2)]
    rows = _many("timm:resnet18", 224, 1000, 5, 32)
    return rows + [_mixed(name, 224, 5) for name in ("timm:vit_tiny_patch16_224", "timm:resnet18")]


def norm_delta(model: ServedModel, seed: int) -> Delta:
    """A state as bn and tent make them: all norm tensors of the features moved a little, nothing else."""
    generator = torch.Generator().manual_seed(seed)
    owners = {n for n, m in model.base.named_modules() if "norm" in type(m).__name__.lower()}
    found = {
        name: value * (0.95 + 0.1 * torch.rand(value.shape, generator=generator))
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] in owners and value.is_floating_point()
    }
    return Delta(found)


def _many(name: str, side: int, states: int, rounds: int, memory: int) -> list[Row]:
    count = 8 if states < 100 else 100
    image, draw = pictures(1, side, 0), random.Random(0)
    with tempfile.TemporaryDirectory(prefix="moepipe-bench-") as folder:
        path = bundle(Path(folder), name, side)
        model = ServedModel.load(str(path))
        catalogue = Catalogue(Path(folder) / "states", _MIB)
        for number in range(states):
            delta = norm_delta(model, number)
            facts = Facts(model.info.version, "bn", {}, 16, None, None, (), {}, 0.0)
            catalogue.publish(DEFAULT_TENANT, f"site{number}", delta, facts)
        with local(path, Path(folder) / "states", memory) as port:
            one = infer(image, lambda: "site0")
            any_of = infer(image, lambda: f"site{draw.randrange(states)}")
            measured = take_turns([(port, one), (port, any_of)], 1, count, rounds, time.process_time)
            held = {
                line.partition(" ")[0]: float(line.rpartition(" ")[2])
                for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
                if line.startswith(("moepipe_resident_bytes ", "moepipe_evictions "))
            }
    what = f"{states} states of {delta.nbytes / 1e3:.0f} kB"
    bytes_held, gone = held["moepipe_resident_bytes"], held["moepipe_evictions"]
    note = f"CPU; of {what}, drawn at random, {memory} MiB allowed; {gone:.0f} evictions"
    return [
        Row(f"{name}: p50 of one state, of {states}", measured[0][0], measured[1][0], _FLAT, note),
        Row("MiB of states: allowed, held", float(memory), bytes_held / _MIB, 1.0, f"{what}; MiB, not seconds"),
    ]


def _mixed(name: str, side: int, repetitions: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="moepipe-bench-") as folder:
        model = ServedModel.load(str(bundle(Path(folder), name, side)))
    deltas = [norm_delta(model, seed) for seed in range(DOMAINS)]
    images = model.preprocess(list(pictures(DOMAINS, side, 0)))
    single, mixed = alternate(
        [lambda: model.predict(images, deltas[0]), lambda: model.predict(images, deltas)], repetitions
    )
    note = f"{DOMAINS} rows of one domain, of {DOMAINS}; norm tensors differ; CPU time"
    return Row(f"{name}: mixed batch", single, mixed, _MIXED, note)
