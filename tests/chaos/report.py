"""The table of a campaign; ``python -m tests.chaos.report LOG...`` makes one of the logs of several."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.chaos.campaign import Round, Strike

WORDS = {
    "worker": "worker process (`kill -9`)",
    "rank": "rank of a gang (`kill -9`)",
    "actor": "actor (`ray.kill`)",
    "raylet": "raylet (`kill -9`)",
    "gcs": "head process of an embedded Ray (`kill -9`)",
    "driver": "driver (`kill -9`)",
    "object": "object of Ray's store, or the actor that keeps the signals",
    "pause": "process stands still for 6 to 9 s",
    "freeze": "process stands still for good",
    "damage": "bytes of a checkpoint, and its member with it",
    "artifact": "bytes of an artifact that is still to be read",
    "disk full": "full disk for 1 to 5 s",
    "store away": "S3 server refuses for 3 to 9 s",
    "store silent": "network to the S3 server stands still for 3 to 9 s",
    "node": "node crashes",
    "spot notice": "node drained, then gone",
    "cut": "node stands still until it is given up, and comes back",
    "head": "head with all nodes and the driver",
}


def table(rounds: Sequence[Round]) -> str:
    """Markdown: one line per kind, and one for all. What is lost is told in checkpoint intervals."""
    lines = [
        "| fault | faults | runs finished | digests equal | recovery s, median | most | lost, median | most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    strikes = [(strike, done) for done in rounds for strike in done.strikes]
    for kind, words in [*WORDS.items(), ("", "**all**")]:
        mine = [(strike, done) for strike, done in strikes if not kind or _row(strike) == kind]
        if not mine:
            continue
        took = [strike.recovery_s for strike, _ in mine if strike.recovery_s] or [0.0]
        lost = [strike.lost for strike, _ in mine]
        runs = list({id(done): done for _, done in mine}.values())
        finished, equal = sum(done.finished for done in runs), sum(done.equal for done in runs)
        lines.append(
            f"| {words} | {len(mine)} | {finished} of {len(runs)} | {equal} of {len(runs)} | {median(took):.1f} "
            f"| {max(took):.1f} | {median(lost):.2f} | {max(lost):.2f} |"
        )
    return "\n".join(lines)


def _row(strike: Strike) -> str:
    return "artifact" if strike.kind == "damage" and "artifact" in strike.title else strike.kind


def read(path: Path) -> list[Round]:
    """The rounds of a campaign's log."""
    found = []
    for record in json.loads(path.read_text())["rounds"]:
        strikes = [Strike(**strike) for strike in record.pop("strikes")]
        found.append(Round(**record, strikes=strikes))
    return found


if __name__ == "__main__":
    print(table([done for name in sys.argv[1:] for done in read(Path(name))]))
