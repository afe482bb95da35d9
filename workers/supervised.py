"""One member of the ``train`` stage: rows, initial weights, training, and what the artifact says about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moe.errors import DataError, SpecError
from moe.specs import BackboneSpec
from workers.context import Context, Input
from workers.data import rows_of
from workers.datasets.base import DomainData
from workers.loop import mix
from workers.modelfile import load_classifier, model_meta
from workers.settings import TrainSettings
from workers.train_model import train_model


def expert_domains(groups: Input | None, count: int, group: int | None) -> list[int] | None:
    """Domains of expert ``group``, or None for a network that is trained on all of them.

    Raises:
        SpecError: a fan-out without a ``groups`` input, or one of another size.
    """
    if group is None:
        return None
    if groups is None:
        raise SpecError("groups is above 1 but nothing is wired to the input `groups`.", "Wire a `split` stage to it.")
    found: list[list[int]] = groups.meta["groups"]
    if len(found) != count:
        raise SpecError(f"groups is {count} here, but the split made {len(found)}.", "Use one number for both stages.")
    return found[group]


def train_member(
    data: DomainData,
    backbone: BackboneSpec,
    settings: TrainSettings,
    context: Context,
    *,
    splits: Sequence[str],
    val_split: str,
    domains: list[int] | None,
    init: Input | None,
) -> dict[str, Any]:
    """Train one classifier and write it into ``context.output``.

    Args:
        data: the data set.
        backbone: the network; ignored but for its architecture when ``init`` is given.
        settings: how to train.
        context: of the member.
        splits: whose rows are trained on.
        val_split: whose rows select the state.
        domains: keep only rows of these domains; None keeps all.
        init: start from this model.

    Returns:
        The artifact's ``meta``.

    Raises:
        DataError: no rows are left.
        CheckpointError: ``init`` is of another architecture.
    """
    from moe.backbones import feature_dim

    rows = rows_of(data, tuple(splits))
    if domains is not None:
        rows = rows[np.isin(data.column(data.info.domain_field, rows), domains)]
    if not len(rows):
        raise DataError(f"No rows of {data.info.name} to train on (splits {list(splits)}, domains {domains}).")
    spec = backbone.model_copy(update={"channels": data.info.channels})
    network = initial_network(spec, data, init, mix(context.seed, 11), context)
    what = "all domains" if domains is None else f"domains {domains}"
    context.log(f"training {spec.name} on {len(rows)} rows of {what}")
    result = train_model(
        settings,
        data,
        rows,
        rows_of(data, (val_split,)),
        network,
        context,
        context.scratch,
        context.output,
        seed=context.seed,
        threads=context.threads,
    )
    context.metrics({f"val/{name}": value for name, value in result.scores.items()}, step=result.step)
    return {
        **model_meta("classifier", spec, data.info.num_outputs, feature_dim(spec), data.info.name),
        "image_size": settings.image_size,
        "rows": len(rows),
        "domains": domains,
        "steps": result.fit.steps,
        "selected_step": result.step,
        "scores": {name: round(float(value), 6) for name, value in result.scores.items()},
    }


def initial_network(spec: BackboneSpec, data: DomainData, init: Input | None, seed: int, context: Context) -> nn.Module:
    """The classifier at step 0: fresh from ``seed``, pretrained, or a copy of ``init`` (same architecture)."""
    from moe.backbones import build_classifier
    from workers.weights import load_pretrained

    torch.manual_seed(seed)
    if init is not None:
        meta: Mapping[str, Any] = init.meta
        theirs = BackboneSpec(**{**meta["backbone"], "pretrained": False})
        if theirs != spec.model_copy(update={"pretrained": False}):
            raise SpecError(
                f"The network to start from is {theirs.name} ({theirs.model_dump(exclude_defaults=True)}), this stage "
                f"says {spec.name} ({spec.model_dump(exclude_defaults=True)}).",
                "Use the same backbone in both stages.",
            )
        return load_classifier(init.path, meta)
    network = build_classifier(spec, data.info.num_outputs)
    if spec.pretrained:
        load_pretrained(spec, network, context.data_root)
    return network
