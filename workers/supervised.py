"""One member of the ``train`` stage: rows, initial weights, training, and what the artifact says about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moe.algorithms.base import Algorithm
from moe.errors import DataError, SpecError
from moe.specs import BackboneSpec
from workers.algorithm_options import make_algorithm
from workers.context import Context, Input
from workers.data import rows_of
from workers.datasets.base import DomainData
from workers.loop import mix
from workers.modelfile import Form, load_classifier, model_meta
from workers.networks import backbone_of, balance_left_out, build_network, require_same
from workers.segments import Segment
from workers.settings import AlgorithmBlock, TrainSettings
from workers.train_model import train_model
from workers.transforms import recorded, transform_after


def expert_domains(groups: Input | None, count: int, group: int | None) -> list[int] | None:
    """Domains of expert ``group``, or None for a network that is trained on all of them.

    Raises:
        SpecError: a fan-out without a ``groups`` input, or one of another size.
    """
    if group is None:
        made = 1 if groups is None else len(groups.meta["groups"])
        if made > 1:
            raise SpecError(
                f"The split that is wired to `groups` made {made}, but groups is 1: one network of all domains.",
                f"Set groups to {made}, or take the input away.",
            )
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
    algorithm: AlgorithmBlock | None = None,
    segment: Segment | None = None,
) -> dict[str, Any]:
    """Train one network and write it into ``context.output``: a classifier, or with ``algorithm`` a student.

    Args:
        data: the data set.
        backbone: the network; ignored but for its architecture when ``init`` is given.
        settings: how to train.
        context: of the member.
        splits: whose rows are trained on.
        val_split: whose rows select the state.
        domains: keep only rows of these domains; None keeps all.
        init: start from this model, behind the preprocessing that its record names.
        algorithm: what makes network, loss and updates; None is plain ERM.
        segment: train a part only.

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
    method = None if algorithm is None else make_algorithm(algorithm, spec, settings, data.info.task)
    network = initial_network(spec, data, init, mix(context.seed, 11), context, method)
    what = "all domains" if domains is None else f"domains {domains}"
    by = "" if algorithm is None else f" by {algorithm.name}"
    context.log(f"training {spec.name}{by} on {len(rows)} rows of {what}")
    if method is None and (left := balance_left_out(spec)):
        context.log(f"plain training has no {left}; name an `algorithm` that has one, e.g. gmoe or emoe.")
    start: Mapping[str, Any] = {} if init is None else init.meta
    training, evaluation = (transform_after(start, data.info, settings.image_size, train) for train in (True, False))
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
        transforms=(training, evaluation),
        algorithm=method,
        segment=segment,
    )
    context.metrics({f"val/{name}": value for name, value in result.scores.items()}, step=result.step)
    form: Form = "classifier" if method is None else "student"
    built = spec if method is None else method.architecture()  # type: ignore[attr-defined]
    block = None if method is None else method.config.moe
    more = {"segment": {"updates": result.fit.steps, "left": result.fit.left}} if result.fit.left else {}
    return {
        **model_meta(form, built, data.info.num_outputs, feature_dim(built), data.info.name, block),
        "image_size": settings.image_size,
        **recorded(start, evaluation),
        "rows": len(rows),
        "domains": domains,
        "steps": result.fit.steps,
        "selected_step": result.step,
        "scores": {name: round(float(value), 6) for name, value in result.scores.items()},
        **more,
    }


def initial_network(
    spec: BackboneSpec,
    data: DomainData,
    init: Input | None,
    seed: int,
    context: Context,
    method: Algorithm[Any] | None = None,
) -> nn.Module:
    """The network at step 0: fresh from ``seed``, pretrained, or a copy of ``init`` (same architecture).

    With a ``method`` it is that algorithm's student, made from the same weights.
    """
    from moe.backbones import build_classifier
    from workers.weights import load_pretrained

    torch.manual_seed(seed)
    if method is not None:
        return build_network(method, data.info.num_outputs, context.data_root, init)
    if init is not None:
        require_same(backbone_of(init), spec)
        return load_classifier(init.path, init.meta)
    network = build_classifier(spec, data.info.num_outputs)
    if spec.pretrained:
        load_pretrained(spec, network, context.data_root)
    return network
