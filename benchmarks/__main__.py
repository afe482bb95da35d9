"""``python -m benchmarks [NAME ...] [--quick]``: the table of speed ratios, each measured within one run.

Names: see ``NAMES``; all by default. ``--quick`` uses tiny models and
only shows that everything runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from benchmarks.measure import Row
from benchmarks.setting import Sizes

NAMES = (
    "meta_step",
    "aggregator",
    "evaluation",
    "expert_stage",
    "sweep",
    "moe_layer",
    "emoe",
    "transformer_step",
    "sphero",
    "nac",
    "recycle",
    "teaching_pairs",
    "compare",
    "serve",
    "search",
    "scheduler",
)


def main() -> int:
    """Run and print; exit code 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; default all")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that it runs, the ratios mean nothing")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of this process")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose among {', '.join(NAMES)}")
    import torch

    torch.set_num_threads(arguments.threads)
    sizes = Sizes.quick() if arguments.quick else Sizes()
    rows: list[Row] = []
    for name in arguments.names or NAMES:
        print(f"running {name} ...", file=sys.stderr, flush=True)
        rows += importlib.import_module(f"benchmarks.{name}").run(sizes)
    print(json.dumps([row.to_json() for row in rows], indent=1) if arguments.json else table(rows, arguments.quick))
    return 0 if arguments.quick or all(row.met for row in rows) else 1


def table(rows: list[Row], quick: bool = False) -> str:
    """The rows as aligned text; with ``quick`` no verdict is given."""
    header = ("what", "baseline", "ours", "ratio", "target", "met?", "note")
    lines = [header]
    for row in rows:
        target = "-" if row.target is None else f"{row.target:.2f}x"
        met = "(quick)" if quick else "yes" if row.met else "NO"
        times = (f"{row.baseline:.3g} s", f"{row.ours:.3g} s", f"{row.ratio:.2f}x")
        lines.append((row.what, *times, target, met, row.note))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
