"""Adapter of EMoE's acceptance on real pretrained weights; skipped where their package is not on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moe.conversion.modularity import route_quality, sparsity
from moe.conversion.split import DenseFFN, split_keys, split_objective
from tests.golden.registry import Skip, check, op
from tests.golden.replay import compare
from workers.text_weights import minilm_folder, minilm_state

Case = dict[str, Any]


@op("emoe.real_modularity")
def real_modularity(case: Case, tensors: Case) -> Case:
    params = case["params"]
    if minilm_folder() is None:
        raise Skip(f"no package {params['package']} (unpack it below $MOEPIPE_DATA/packages)")
    state = minilm_state()
    layer = params["weights"].split(".intermediate")[0]
    dense = DenseFFN.from_tensors(
        *(state[f"{layer}.{part}.dense.{kind}"] for part in ("intermediate", "output") for kind in ("weight", "bias"))
    )
    labels, x, experts = tensors["in.labels"], tensors["in.x"], params["num_experts"]
    own = split_keys(dense.keys_FD, experts)
    out: Case = {
        "out.frac_positive": torch.tensor([sparsity(dense, x).firing]),
        "out.inertia": torch.tensor([split_objective(dense.keys_FD, labels)]),
        "own.inertia": split_objective(dense.keys_FD, own),
        "own.capture": route_quality(dense, own, x, experts, 16).capture,
        "reference.capture": route_quality(dense, labels, x, experts, 16).capture,
    }
    for top_k in params["top_k"]:
        for name, route in (("avgk", "avg_k"), ("bottom", "bottom")):
            found = route_quality(dense, labels, x, experts, top_k, route)  # type: ignore[arg-type]
            out[f"out.{name}_k{top_k}"] = torch.tensor([found.capture, found.overlap, found.error])
    return out


@check("emoe.real_modularity")
def own_split_is_as_good(case: Case, tensors: Case, outputs: Case) -> Iterator[str]:
    yield from compare(case, tensors, {k: v for k, v in outputs.items() if k.startswith("out.")})
    limit = 1.02 * float(tensors["out.inertia"])
    if outputs["own.inertia"] > limit:
        yield f"own split: objective {outputs['own.inertia']:.6g} is more than {limit:.6g}"
    if abs(outputs["own.capture"] - outputs["reference.capture"]) > 0.05:
        yield f"own split: capture {outputs['own.capture']:.3f}, the reference {outputs['reference.capture']:.3f}"
