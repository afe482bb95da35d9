"""One member of the ``features`` stage: a frozen expert's features of the rows of some splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from workers.context import Context, Input
from workers.data import rows_of
from workers.datasets.base import DomainData
from workers.device import setup
from workers.features import write_features
from workers.modelfile import load_student
from workers.transforms import transform_after


def expert_features(
    data: DomainData,
    model: Input,
    context: Context,
    *,
    splits: Sequence[str],
    image_size: int | None,
    batch_size: int,
    dtype: Literal["float32", "float16"],
    precision: Literal["fp32", "bf16"],
) -> dict[str, Any]:
    """Write the features of ``model`` into ``context.output`` and return the artifact's ``meta``.

    The training transform is used: it is the evaluation transform for every set but rxrx1, whose 8 variants (rotations
    and flip) are all stored; variant 0 is the plain image.

    Raises:
        SpecError: the data set lacks a split.
        CheckpointError: damaged weights.
        EnvironmentProblem: not enough disk space.
    """
    device = setup(context.threads).device
    transform = transform_after(model.meta, data.info, image_size or model.meta.get("image_size"), train=True)
    # The extractor view: for DenseNets it reads before the last ReLU, as official checkpoints do.
    student = load_student(model.path, model.meta).to(device)
    rows = rows_of(data, tuple(splits))
    context.log(f"features of {len(rows)} rows, {transform.variants} variant(s), width {student.feature_dim}")
    record = write_features(
        student.extract,
        data.images,
        rows,
        transform,
        context.output,
        batch_size,
        context,
        dtype=dtype,
        scratch=context.scratch,
        device=device,
        precision=precision,
    )
    return {
        "rows": len(rows),
        "splits": list(splits),
        "dim": record.dim,
        "variants": record.variants,
        "dtype": record.dtype,
        "domains": model.meta.get("domains"),
        "expert": model.digest,
        "dataset": data.info.name,
    }
