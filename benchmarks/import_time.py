"""How long the light commands take to answer, as wall time of a whole process; the best of several."""

from __future__ import annotations

import subprocess
import sys
import time

BUDGET_S = 0.3
_RUNS = 7
_COMMANDS = (("--help",), ("submit", "--help"), ("version",), ("ls",))


def best_seconds(arguments: tuple[str, ...], runs: int = _RUNS) -> float:
    """Shortest wall time of ``moepipe ARGUMENTS`` in seconds, after one warm-up."""
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", *arguments]
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bare_python(runs: int = _RUNS) -> float:
    """Shortest wall time of an interpreter that does nothing: the floor."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    """Print one line per command."""
    floor = bare_python()
    print(f"{'python -c pass':28} {floor:6.3f} s")
    for arguments in _COMMANDS:
        seconds = best_seconds(arguments)
        note = (
            "" if arguments != ("--help",) else f"  (budget {BUDGET_S} s: {'met' if seconds < BUDGET_S else 'MISSED'})"
        )
        print(f"{'moepipe ' + ' '.join(arguments):28} {seconds:6.3f} s{note}")


if __name__ == "__main__":
    main()
