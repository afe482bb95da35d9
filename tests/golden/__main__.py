"""Command line of the replayer: one line per failed tensor, then ``N passed, N failed``; exit code 1 on any failure.

Cases whose data is not on this machine are named and counted as skipped, never as passed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.golden.registry import load_adapters
from tests.golden.replay import discover, replay


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay every case below the given folders."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Replay golden vectors.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder with cases, at any depth")
    parser.add_argument("-v", "--verbose", action="store_true", help="name the cases that pass, too")
    options = parser.parse_args(arguments)
    empty = [folder for folder in options.folders if not discover([folder])]
    for folder in empty:
        state = "holds no case.json" if folder.is_dir() else "is not a folder"
        print(f"{folder} {state}. Give a folder with golden cases.", file=sys.stderr)
    adapters = load_adapters()
    passed = failed = skipped = 0
    for case in discover(options.folders):
        outcome = replay(case, adapters)
        passed, skipped = passed + outcome.passed, skipped + bool(outcome.skipped)
        failed += bool(outcome.complaints)
        if outcome.skipped:
            print(f"{case}: skipped: {outcome.skipped}")
        for complaint in outcome.complaints:
            print(f"{case}: {complaint}")
        if outcome.passed and options.verbose:
            print(f"{case}: passed")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or empty else 0


if __name__ == "__main__":
    sys.exit(main())
