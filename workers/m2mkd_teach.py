"""One student module of m2mKD: trained in its place of the frozen meta model, beside its teacher module.

Every module is a member of its own. With a cache (:func:`cache_member`) the frozen prefix and the teacher's hybrid have
run once for all members and are only read; a member then holds its student and the meta model's blocks after it. The
cache is exact where nothing is drawn for an image: without random augmentation and without mixing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe.algorithms.m2mkd import Augmentation, Config
from moe.conversion.teaching import PairOutput, TeachingPair, prefixes
from moe.errors import DataError, SpecError
from moe.losses import Losses
from workers.batches import chunks
from workers.context import Context, Input, run_seed
from workers.data import open_data, rows_of
from workers.datasets.base import IntArray
from workers.device import setup
from workers.engines.base import Weighted
from workers.features import FEATURES, ROWS, write_features
from workers.loop import mix
from workers.m2mkd_files import frozen_meta, read_network, require_spec, teacher_module, write_network
from workers.m2mkd_images import TrainImages, eval_reader, eval_transform, is_plain, mixes
from workers.m2mkd_run import RunSettings, run_phase
from workers.m2mkd_settings import image_side, phase_method
from workers.m2mkd_train import check_data
from workers.train_model import score_logits


def require_plain(augment: Augmentation) -> None:
    """Refuse to keep what frozen networks say about images that are never seen twice.

    Raises:
        SpecError: random augmentation or mixing is on.
    """
    if not is_plain(augment) or mixes(augment) or augment.repeats > 1:
        raise SpecError(
            "What the frozen networks say can only be kept for images without random augmentation and mixing.",
            "Leave the m2mkd_cache stage out, or set augment: {randaugment: null, erasing: 0, color_jitter: 0, "
            "mixup: 0, cutmix: 0, repeats: 1}.",
        )


# The cache.


def cache_member(
    config: Config, splits: tuple[str, ...], dtype: Literal["float32", "float16"], batch_size: int, context: Context
) -> dict[str, Any]:
    """Run meta model and teacher hybrids once over the rows of ``splits``; ports ``data``, ``meta``, ``teacher``.

    One row holds, by position, the tokens that enter it (none at 0), then the teacher hybrid's logits of all positions.

    Returns:
        The artifact's ``meta``.

    Raises:
        SpecError: networks that do not fit the settings; augmentation that cannot be kept.
    """
    device = setup(context.threads).device
    data = open_data(context.inputs["data"][0], context.data_root)
    method = phase_method(config, "student", run_seed(context.member), None, data.info.num_outputs)
    config = method.config
    require_plain(config.augment)
    check_data(config, "student", data)
    first, teacher = context.inputs["meta"][0], context.inputs["teacher"][0]
    require_spec(first, config.meta, "The meta model")
    count = len(config.meta.depths)
    meta = read_network(first).to(device)
    modules = [teacher_module(teacher, config.teacher, place).to(device).eval() for place in range(count)]
    spans = config.meta.spans

    def extract(images: Tensor) -> Tensor:
        hidden = prefixes(meta, images, range(count))  # type: ignore[arg-type]
        found, logits = [], []
        for place, module in enumerate(modules):
            entering = hidden[place]
            out = module(images if entering is None else entering)
            logits.append(out if place == count - 1 else meta(out, spans[place][1]))
            found += [] if entering is None else [entering.flatten(1)]
        return torch.cat([*found, *logits], dim=1)

    rows, side = rows_of(data, splits), image_side(config, "student")
    transform = eval_transform(data, side, config.augment)
    record = write_features(
        extract, data.images, rows, transform, context.output, batch_size, context,
        dtype=dtype, scratch=context.scratch, device=device,
    )  # fmt: skip
    tokens = 1 + config.meta.grid**2
    context.log(f"{len(rows)} rows, {record.dim} numbers each")
    return {
        "positions": count,
        "tokens": tokens,
        "dim": config.meta.dim,
        "classes": data.info.num_outputs,
        "rows": len(rows),
        "dtype": dtype,
        "meta_model": first.digest,
        "teacher": teacher.digest,
    }


class Cache:
    """Reads one position of a cache, rows as they are asked for; nothing else is loaded.

    Args:
        artifact: of :func:`cache_member`.
        position: of the pair.

    Raises:
        SpecError: it has other positions.
    """

    def __init__(self, artifact: Input, position: int, config: Config) -> None:
        meta = artifact.meta
        shape = (len(config.meta.depths), 1 + config.meta.grid**2, config.meta.dim, config.meta.num_classes)
        seen = (meta["positions"], meta["tokens"], meta["dim"], meta["classes"])
        if seen != shape:
            raise SpecError(
                f"The cache has (positions, tokens, width, classes) {seen}, the settings say {shape}.",
                "Use the same `method` and data in both stages.",
            )
        count, tokens, dim, classes = shape
        self._rows: IntArray = np.load(artifact.path / ROWS)
        self._values = np.load(artifact.path / FEATURES, mmap_mode="r")
        self._shape = (tokens, dim)
        width = tokens * dim
        self._hidden = None if position == 0 else slice((position - 1) * width, position * width)
        start = (count - 1) * width + position * classes
        self._logits = slice(start, start + classes)

    def read(self, rows: IntArray) -> tuple[Tensor | None, Tensor]:
        """Entering tokens ``[B, T, D]`` (None at position 0) and the teacher's logits ``[B, K]``, float32.

        Raises:
            DataError: a row was not stored.
        """
        places = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        if not np.array_equal(self._rows[places], rows):
            raise DataError("The cache does not hold all rows.", "Add their split to the m2mkd_cache stage.")
        logits = torch.from_numpy(np.array(self._values[0, places, self._logits], dtype=np.float32))
        if self._hidden is None:
            return None, logits
        hidden = np.array(self._values[0, places, self._hidden], dtype=np.float32).reshape(len(rows), *self._shape)
        return torch.from_numpy(hidden), logits


# A pair.


def teach_member(config: Config, position: int, settings: RunSettings, context: Context) -> dict[str, Any]:
    """Train the student of one position; ports ``data``, ``meta``, ``teacher`` and perhaps ``cache``.

    Returns:
        The artifact's ``meta``: position, stitch width, scores of the student's hybrid on ``val_split``.

    Raises:
        SpecError: networks, data and settings that do not belong together.
        CheckpointError: weights that do not fit.
    """
    device = setup(context.threads, settings.device).device
    data = open_data(context.inputs["data"][0], context.data_root)
    method = phase_method(config, "student", run_seed(context.member), position, data.info.num_outputs)
    config = method.config
    check_data(config, "student", data)
    caches = context.inputs.get("cache", ())
    if caches:
        require_plain(config.augment)
    first, teacher_file = context.inputs["meta"][0], context.inputs["teacher"][0]
    cache = Cache(caches[0], position, config) if caches else None
    meta = frozen_meta(first, config.meta, position, prefix=cache is None)
    teacher = None if cache is not None else teacher_module(teacher_file, config.teacher, position)
    torch.manual_seed(mix(context.seed, 11))
    student = method.build_students(data.info.num_outputs)[position]
    pair = TeachingPair(meta, teacher, student, position, config.loss)
    rows, val_rows = rows_of(data, settings.splits), rows_of(data, (settings.val_split,))
    side = image_side(config, "student")
    images = TrainImages(data, rows, side, config.training, config.augment, context.seed, settings.threads)
    batches = _Batches(images, cache)
    reader = eval_reader(data, side, config.augment, settings.threads)

    def evaluate(module: nn.Module, step: int) -> Mapping[str, float]:
        parts = []
        with torch.inference_mode():
            for piece in chunks(val_rows, settings.eval_batch):
                batch = batches.of(piece, lambda own: reader.read(own))
                output = _run(module, tuple(None if x is None else x.to(device) for x in batch))
                parts.append((output.student_BK.float().cpu(), output.teacher_BK.float().cpu()))
        mine, theirs = (torch.cat(side) for side in zip(*parts, strict=True))
        scores = score_logits(data, val_rows, mine.numpy())
        agreement = float((mine.argmax(1) == theirs.argmax(1)).float().mean())
        metric = data.info.selection_metric
        return {**scores, "agreement": agreement, "teacher": score_logits(data, val_rows, theirs.numpy())[metric]}

    def loss(module: nn.Module, batch: tuple[Any, ...]) -> Losses:
        losses = module.losses(_run(module, batch[:-1]), batch[-1])  # type: ignore[operator]
        return method.with_auxiliary(module, losses)

    kept = sum(p.numel() for p in itertools.chain(meta.parameters(), teacher.parameters() if teacher else ()))
    context.log(f"position {position}: {sum(p.numel() for p in student.parameters()):,} trained, {kept:,} frozen")
    trained = run_phase(method, pair, batches, settings, context, device, evaluate, data.info.selection_metric, loss)
    state = {name.removeprefix("student."): value for name, value in trained.state.items()}
    record = write_network(student, context.output, state)
    return {
        **record,
        **trained.record(),
        "position": position,
        "stitch_dim": config.meta.dim,
        "images": trained.steps * trained.batch_size,
        "dataset": data.info.name,
        "cached": cache is not None,
    }


def _run(module: nn.Module, batch: tuple[Any, ...]) -> PairOutput:
    images, hidden, logits = batch
    output: PairOutput = module(images if images is not None else hidden, hidden, logits)
    return output


class _Batches:
    """Updates of a pair: (images or None, entering tokens or None, teacher's logits or None, targets)."""

    def __init__(self, images: TrainImages, cache: Cache | None) -> None:
        self.images, self.cache = images, cache
        self.steps_per_epoch = images.steps_per_epoch

    def __call__(self, step: int) -> list[Weighted]:
        if self.cache is None:
            return [Weighted((p.batch[0], None, None, p.batch[1]), p.weight) for p in self.images(step)]
        rows = self.images.chosen(step)
        pieces = np.array_split(rows, min(self.images.phase.accumulate, len(rows)))
        reading = self.images.reader.read
        return [
            Weighted((*self.of(part, reading), self.images.targets(part)), len(part) / len(rows)) for part in pieces
        ]

    def of(self, rows: IntArray, read: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What enters the pair for ``rows``, without augmentation."""
        if self.cache is None:
            return read(rows), None, None
        hidden, logits = self.cache.read(rows)
        return (read(rows) if hidden is None else None), hidden, logits
