"""Two ranks of distillation jobs in one go: ``python -m tests.workers.distill_pair JOBS.json`` (a list of configs)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from moe.errors import Interrupted
from tests.workers.test_loop import Recorder
from tests.workers.toy import register
from workers.distill_job import distill


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    register()
    rank = dist.get_rank()
    lines = []
    for config in json.loads(path.read_text()):
        stop = config.pop("stop_after", None)
        reporter = Recorder()
        if rank == 0:
            config["reporter"] = reporter
        if stop is None:
            distill(config)
        else:
            # Both ranks stop at the same checkpoint, as when the whole group is killed.
            config["reporter"] = Recorder(stop_after=stop)
            try:
                distill(config)
            except Interrupted:
                lines.append("interrupted")
        lines.append({"logs": reporter.logs, "losses": reporter.losses()})
    if rank == 0:
        (path.parent / "pair.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
