"""``python -m tests.chaos --faults 100 --seed 0``: the campaign; its table on stdout, and with its log in a folder."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.chaos.campaign import Campaign
from tests.chaos.faults import FAULTS
from tests.chaos.report import table


def main() -> int:
    """Run it; 0 when everything was as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=12, help="faults in one run, at most")
    parser.add_argument("--kinds", nargs="*", choices=sorted(FAULTS), help="only these")
    parser.add_argument("--folder", type=Path, default=Path(f"/tmp/moepipe-chaos-{time.strftime('%H%M%S')}"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    start = time.monotonic()
    campaign = Campaign(
        given.folder, given.faults, given.seed, given.kinds, given.most, lambda line: print(line, flush=True)
    )
    rounds = campaign.run()
    text = table(rounds)
    (given.folder / "campaign.md").write_text(text + "\n")
    print(text)
    wrong = [f"{done.name}: {words}" for done in rounds for words in done.wrong]
    minutes = (time.monotonic() - start) / 60
    print(f"{campaign.count} faults in {len(rounds)} runs, {minutes:.0f} minutes; log in {given.folder}")
    print("\n".join(wrong) or "Nothing was wrong.")
    return 1 if wrong or campaign.count < given.faults else 0


if __name__ == "__main__":
    sys.exit(main())
