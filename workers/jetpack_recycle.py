"""One member of ``jetpack_recycle``: the weights of one start at step 0.

Random parts (head, router queries, whatever is not recycled) come from the pipeline's seed alone, so the starts of a
seed share them. Source: MoE Jetpack (arXiv 2406.04801), section 3.2, and its public code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.backbones import build_classifier, check_state
from moe.conversion.recycle.convnext import check_convnext_sizes, convnext_lists, cut_convnext
from moe.conversion.recycle.dense import recycle_dense
from moe.conversion.recycle.recycle import check_sizes, recycle
from moe.errors import SpecError
from moe.jet_specs import JetConvNeXtSpec
from moe.jetpack_specs import JetViTSpec
from moe.keymaps.jetpack import fit_to_model, flat_state, from_official
from moe.models.jet_networks import build_jet_network, head_name
from moe.specs import BackboneSpec
from workers.context import Context, Input, run_seed
from workers.data import open_data
from workers.device import setup
from workers.jetpack_settings import RecycleSettings, Start
from workers.jetpack_statistics import dense_network, merged_statistics, network_digest
from workers.loop import mix
from workers.method_networks import FORM_OF, backbone_record, jet_network
from workers.modelfile import MODEL_FILE, save_tensors
from workers.weight_files import read_state

State = Mapping[str, Tensor]


def _check_sizes(settings: RecycleSettings) -> None:
    """Every member refuses sizes that do not fit, also one that is not recycled: else it would be trained in vain.

    Raises:
        CheckpointError: some start is recycled, and the successor cannot be cut out of the predecessor.
    """
    used = [start.recycle for start in settings.starts.values() if start.recycle is not None]
    if not used:
        return
    with torch.device("meta"):
        source = build_classifier(settings.predecessor, 1).state_dict()
        target = build_jet_network(settings.network(Start()), 1).state_dict()
    check = check_convnext_sizes if isinstance(settings.model, JetConvNeXtSpec) else check_sizes
    check(source, target, used[0].depth)


@dataclass(frozen=True)
class Made:
    """Weights of a start; ``origin`` counts tensors by where they are from."""

    state: State
    origin: Mapping[str, int]


def recycle_member(settings: RecycleSettings, name: str, start: Start, context: Context) -> dict[str, Any]:
    """Write ``model.safetensors`` of one start; returns ``meta``.

    Args:
        settings: successor, predecessor and donor.
        name: of the start.
        start: what it is.
        context: ports ``data`` and, where the choice needs them, ``statistics`` (all shards).

    Raises:
        SpecError: statistics are needed but not wired, or lack the metric.
        DataError: statistics of another model, or shards that do not make one pass.
        CheckpointError: weights of another family or size, or that are damaged.
    """
    setup(context.threads, "cpu")
    data = open_data(context.inputs["data"][0], context.data_root)
    if data.info.task != "multiclass":
        raise SpecError(f"{data.info.name} is a {data.info.task} task.", "MoE Jetpack trains classifiers of classes.")
    _check_sizes(settings)
    spec, seed = settings.network(start), run_seed(context.member)
    network = fresh_network(spec, data.info.num_outputs, seed)
    if start.weights is not None:
        made = _from_file(Path(start.weights).expanduser(), spec, network)
    elif start.recycle is not None:
        made = _recycled(settings, start, network, data.info.num_outputs, seed, context)
    else:
        made = Made(network.state_dict(), {"fresh": len(network.state_dict())})
    save_tensors(context.output / MODEL_FILE, made.state)
    parts = ", ".join(f"{count} {origin}" for origin, count in sorted(made.origin.items()))
    context.log(f"start {name!r}, {start.network}: tensors {parts}")
    return {
        "form": FORM_OF[type(spec)],
        **backbone_record(spec),
        "start": name,
        "network": start.network,
        "select": None if start.recycle is None else start.recycle.select,
        "spec": spec.model_dump(mode="json"),
        "model": settings.model.model_dump(mode="json"),
        "num_outputs": data.info.num_outputs,
        "dataset": data.info.name,
        "origin": dict(made.origin),
        "parameters": sum(value.numel() for value in network.parameters()),
    }


def fresh_network(spec: JetViTSpec | JetConvNeXtSpec, num_outputs: int, seed: int) -> nn.Module:
    """The network with the random weights of a seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 31))
        return build_jet_network(spec, num_outputs)


def open_network(artifact: Input) -> nn.Module:
    """The network of a start, or of a fine-tuned one, in evaluation mode. Raises as :func:`jet_network`."""
    return jet_network(artifact.path, artifact.meta)


def _recycled(
    settings: RecycleSettings, start: Start, network: nn.Module, num_outputs: int, seed: int, context: Context
) -> Made:
    """Recycled weights; a dense network takes the dense part of the successor that the same draws make."""
    options = start.recycle
    if options is None:
        raise SpecError("This start is not recycled.")
    predecessor = _fitted(settings.predecessor, settings.model, context.data_root)
    donor = None if settings.donor is None else _fitted(settings.donor, settings.model, context.data_root)
    statistics = None
    if start.needs_statistics:
        found = context.inputs.get("statistics", ())
        if not found:
            raise SpecError(
                f"The start selects by {options.select}, which needs activation statistics.",
                "Wire a `jetpack_statistics` stage to the input `statistics`, or select random or uniform.",
            )
        statistics = merged_statistics(found, network_digest(predecessor), settings.predecessor.name)
    fresh = network.state_dict()
    target = fresh
    if start.network == "dense":
        target = fresh_network(settings.network(Start()), num_outputs, seed).state_dict()
    generator = torch.Generator().manual_seed(mix(seed, 32))
    source = donor if start.source == "donor" and donor is not None else predecessor
    if isinstance(settings.model, JetConvNeXtSpec):
        lists = convnext_lists(source, target, options, generator=generator, statistics=statistics)
        norms = options.inherit_norms
        state, origin = cut_convnext(source, fresh, lists, donor=donor, inherit_norms=norms)
        return _with_experts(start, state, origin, fresh)
    made = recycle(source, target, options, generator=generator, statistics=statistics, donor=donor)
    if start.network == "dense":
        state = recycle_dense(fresh, options, predecessor=source, lists=made.dense, donor=donor)
        same = sum(value is fresh[name] for name, value in state.items())
        taken = "predecessor" if donor is None else "donor"
        return Made(state, {taken: len(state) - same, "fresh": same})
    return _with_experts(start, made.state, made.origin, fresh)


def _with_experts(start: Start, state: State, origin: Mapping[str, str], fresh: State) -> Made:
    """The made weights, or those with fresh experts."""
    if start.experts == "recycled":
        return Made(state, _counted(origin.values()))
    state = {name: fresh[name] if "experts" in name else value for name, value in state.items()}
    return Made(state, _counted("fresh" if "experts" in name else where for name, where in origin.items()))


def _counted(origins: Iterable[str]) -> dict[str, int]:
    return dict(Counter(origins))


def _fitted(spec: BackboneSpec, model: JetViTSpec | JetConvNeXtSpec, data_root: Path) -> State:
    """Weights of a dense network with positions and patches of the successor's size, without its head."""
    state = dense_network(spec, data_root).state_dict()
    if isinstance(model, JetConvNeXtSpec):
        return state
    side = model.image_size // model.patch_size
    prefix = 0 if model.no_embed_class else int(model.class_token) + model.reg_tokens
    body = {name: value for name, value in state.items() if "head" not in name}
    return fit_to_model(body, model.patch_size, (side, side), prefix)


def _from_file(path: Path, spec: JetViTSpec | JetConvNeXtSpec, network: nn.Module) -> Made:
    """A checkpoint with the released names; a head of other classes stays fresh."""
    stored, fresh = flat_state(read_state(path)), network.state_dict()
    last = head_name(spec)
    head = {name: value for name, value in fresh.items() if name.startswith(f"{last}.")}
    fits = all(name in stored and stored[name].shape == value.shape for name, value in head.items())
    kept = {} if fits else head
    if isinstance(spec, JetConvNeXtSpec):
        state = {**stored, **kept}
        check_state(state, {n: tuple(v.shape) for n, v in fresh.items()}, "This is not a checkpoint of this network")
    else:
        state = from_official({**stored, **kept}, spec, int(fresh[f"{last}.weight"].shape[0]))
    return Made(state, {"file": len(state) - len(kept), "fresh": len(kept)})
