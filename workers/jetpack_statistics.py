"""One member of ``jetpack_statistics``: a shard of one streamed pass of the predecessor over training images.

Memory does not grow with the number of images. The sums so far are a checkpoint, so that a killed member goes on where
it was; shards are merged by whoever uses them. Source: MoE Jetpack (arXiv 2406.04801), section 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.conversion.recycle.convnext import CONVNEXT_BLOCKS, CONVNEXT_PLACES, read_convnext
from moe.conversion.recycle.layout import read_dense
from moe.conversion.recycle.probe import PLACES, collect_statistics
from moe.conversion.recycle.record import StatisticsRecord, sample_rows
from moe.conversion.recycle.statistics import StatisticsAccumulator, merge_all
from moe.errors import DataError, SpecError
from moe.specs import BackboneSpec
from workers.batches import ImageReader, chunks
from workers.context import Context, Input
from workers.data import open_data, rows_of
from workers.device import setup
from workers.jetpack_settings import StatisticsSettings, family_of
from workers.loop import mix
from workers.modelfile import load_tensors, save_tensors
from workers.transforms import transform_for

STATISTICS = "statistics.safetensors"
_DONE = "done"


def dense_network(spec: BackboneSpec, data_root: Path) -> nn.Module:
    """A dense vision transformer or ConvNeXt in evaluation mode; without pretrained weights always the same one.

    Raises:
        NotFoundError, CheckpointError: the weights are not there, are damaged, or are of another family.
    """
    from moe.backbones import build_classifier
    from workers.weights import load_pretrained

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(0, 21))
        network = build_classifier(spec, 1)
    load_pretrained(spec, network, data_root)
    if family_of(spec, "network") == "convnext":
        read_convnext(network.state_dict(), spec.name)
    else:
        read_dense(network.state_dict(), spec.name)
    return network.eval()


def network_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights without head and positions, which differ by task and by image size."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if "head" not in name and name != "pos_embed":
            digest.update(name.encode() + state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def statistics_member(settings: StatisticsSettings, shard: int, context: Context) -> dict[str, Any]:
    """Write the sums of one shard; returns ``meta``.

    Args:
        settings: of the pass.
        shard: number of this member; it takes the batches ``shard``, ``shard + shards``, ...
        context: port ``data``.

    Raises:
        SpecError: more shards than batches.
        CheckpointError: the predecessor is of another family, or its weights are damaged.
        DataError: non-finite activations.
    """
    device = setup(context.threads, settings.device).device
    spec = settings.predecessor
    network = dense_network(spec, context.data_root).to(device)
    digest = network_digest(network.state_dict())
    data = open_data(context.inputs["data"][0], context.data_root)
    rows = rows_of(data, settings.splits)
    chosen = rows[sample_rows(len(rows), settings.images, settings.order, _generator(settings.seed)).numpy()]
    batches = list(enumerate(chunks(chosen, settings.batch_size)))
    own = batches[shard :: settings.shards]
    if len(batches) < settings.shards:
        raise SpecError(
            f"{settings.shards} shards share only {len(batches)} batches of {settings.batch_size} images.",
            "Use fewer shards or smaller batches.",
        )
    side = spec.image_size or _input_side(network)
    transform = transform_for(
        data.info, side, train=False, normalisation=settings.normalisation, channels=spec.channels
    )
    reader = ImageReader(data.images, transform)
    context.log(f"statistics of {spec.name} over {len(chosen)} images, shard {shard + 1} of {settings.shards}")
    path = context.scratch / STATISTICS
    accumulator, done = _resumed(path, settings)

    def images(part: Sequence[tuple[int, Any]], begin: int) -> Iterator[Tensor]:
        for count, (_, piece) in enumerate(part):
            yield reader.read(piece).to(device)
            context.progress(begin + count + 1, len(own))

    convnext = family_of(spec, "predecessor") == "convnext"
    places, blocks = (CONVNEXT_PLACES, CONVNEXT_BLOCKS) if convnext else (PLACES, "blocks")
    try:
        while done < len(own):
            part = own[done : done + settings.checkpoint_every]
            numbers = [number for number, _ in part]
            # Sums are merged checkpoint by checkpoint, so that a resumed pass adds in the same order.
            accumulator.merge(
                collect_statistics(
                    network, images(part, done), settings.statistics, places=places, blocks=blocks, numbers=numbers
                )
            )
            done += len(part)
            save_tensors(path, {**accumulator.state_dict(), _DONE: torch.tensor(done)})
            context.check()
    finally:
        reader.close()
    save_tensors(context.output / STATISTICS, accumulator.state_dict())
    return {
        "predecessor": spec.name,
        "digest": digest,
        "shard": shard,
        "shards": settings.shards,
        "images": len(chosen),
        "batches": len(own),
        "dataset": data.info.name,
        "metrics": list(settings.statistics.metrics),
    }


def merged_statistics(shards: Sequence[Input], digest: str, predecessor: str) -> StatisticsRecord | None:
    """The finished statistics of all shards of one pass; None without any.

    Args:
        shards: artifacts of :func:`statistics_member`.
        digest: of the predecessor that is recycled (:func:`network_digest`).
        predecessor: its name, for messages.

    Raises:
        DataError: statistics of another model, or a shard that is missing or there twice.
    """
    if not shards:
        return None
    for shard in shards:
        if shard.meta["digest"] != digest:
            raise DataError(
                f"These are the statistics of another model: {shard.meta['predecessor']} "
                f"({shard.meta['digest'][:12]}), but {predecessor} ({digest[:12]}) is recycled.",
                "Give both stages the same predecessor.",
            )
    numbers = sorted(int(shard.meta["shard"]) for shard in shards)
    if numbers != list(range(int(shards[0].meta["shards"]))):
        raise DataError(
            f"The pass has {shards[0].meta['shards']} shards, but these are the shards {numbers}.",
            "Wire all members of one statistics stage to the input, once.",
        )
    return merge_all(StatisticsAccumulator.from_state(load_tensors(s.path / STATISTICS)) for s in shards).finalise()


def _resumed(path: Path, settings: StatisticsSettings) -> tuple[StatisticsAccumulator, int]:
    """The sums so far and the number of batches in them."""
    if not path.is_file():
        return StatisticsAccumulator(settings.statistics), 0
    state = load_tensors(path)
    done = int(state.pop(_DONE))
    return StatisticsAccumulator.from_state(state), done


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(seed, 22))


def _input_side(network: nn.Module) -> int:
    """Side in pixels that a network of timm was built for."""
    if hasattr(network, "patch_embed"):
        return int(network.patch_embed.img_size[0])  # type: ignore[union-attr,index]
    return int(network.pretrained_cfg["input_size"][-1])  # type: ignore[union-attr,index,call-overload]
