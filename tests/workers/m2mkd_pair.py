"""Two ranks of m2mKD's training jobs: ``python -m tests.workers.m2mkd_pair JOBS.json`` (a list of configs)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from moe.errors import Interrupted
from tests.workers.test_loop import Recorder
from tests.workers.toy import register
from workers.m2mkd_job import train_rank


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    register()
    lines = []
    for config in json.loads(path.read_text()):
        stop = config.pop("stop_after", None)
        # Both ranks stop at the same checkpoint, as when the whole group is killed.
        reporter = Recorder() if stop is None else Recorder(stop_after=stop)
        try:
            train_rank({**config, "reporter": reporter})
            lines.append({"losses": reporter.losses(), "logs": reporter.logs})
        except Interrupted:
            lines.append({"interrupted": True})
    if dist.get_rank() == 0:
        (path.parent / "pair.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
