"""EMoE's split and gate on real pretrained weights: ``MOEPIPE_DATA=... python -m benchmarks.emoe_real``.

Prints one line per layer of MiniLM-L6 and of a ViT-S/14 (64 experts, 16 chosen) and what misses the acceptance
thresholds of ``workers.modularity``. Both come out of Python packages; whichever is not there is named and left out.
"""

from __future__ import annotations

import sys
import time

from moe.errors import NotFoundError
from workers.modularity import (
    LayerReport,
    complaints,
    minilm_model,
    report,
    text_inputs,
    vision_inputs,
    vit_model,
)

HEAD = "layer  firing  objective  capture avg-k/best/random split/fixed/bottom  overlap  with bias  error avg-k/random"


def line(r: LayerReport) -> str:
    """One layer."""
    q = r.routes
    captures = "/".join(f"{q[name].capture:.3f}" for name in ("avg_k", "best", "random_split", "fixed", "bottom"))
    return (
        f"{r.layer:5d}  {r.firing:6.3f}  {r.objective:9.1f}  {captures:45s}  {q['avg_k'].overlap:7.2f}  "
        f"{q['avg_k_bias'].overlap:9.2f}  {q['avg_k'].error:.2f}/{q['random'].error:.2f}"
    )


def main() -> int:
    """Print both tables; 1 when a threshold is missed."""
    missed = 0
    for kind in ("text", "vision"):
        try:
            model = minilm_model() if kind == "text" else vit_model()
        except NotFoundError as error:
            print(f"{kind}: left out. {error}")
            continue
        inputs = text_inputs(model) if kind == "text" else vision_inputs(model)
        begin = time.process_time()
        reports = report(model, inputs)
        seconds = time.process_time() - begin
        print(f"{kind}: {len(reports)} layers, {len(next(iter(inputs.values())))} tokens, {seconds:.0f} s\n{HEAD}")
        for r in reports:
            print(line(r))
        wrong = complaints(kind, reports)
        ratio = sum(r.routes["avg_k"].error / r.routes["random"].error for r in reports) / len(reports)
        print(f"mean error ratio to random routing {ratio:.3f}; {len(wrong)} thresholds missed")
        for text in wrong:
            print(f"  {text}")
        missed += len(wrong)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
