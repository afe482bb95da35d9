"""``kill -9`` of driver, member, Train worker and raylet at random moments: same artifacts, little work lost.

Run by hand: ``pytest -m chaos -s``. ``MOEPIPE_CHAOS_SEED`` and ``MOEPIPE_CHAOS_KILLS`` change moments and number.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from tests.chaos.disturb import ROOT, Arena, Strike, disturbed, shuffled_deck, table, undisturbed
from tests.chaos.killer import KINDS, Family

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
SEED = int(os.environ.get("MOEPIPE_CHAOS_SEED", "0"))
KILLS = int(os.environ.get("MOEPIPE_CHAOS_KILLS", "20"))
CHECKPOINT_EVERY = 5  # in both pipelines


def rounds(pipeline, folder, kills, arguments=(), data_root=None):
    """Disturbed rounds until ``kills`` strikes hit; every round must give the artifacts of the undisturbed run."""
    rng = random.Random(SEED)
    expected = undisturbed(Arena(pipeline, folder / "peace", arguments, data_root))
    deck, strikes, family, arenas = shuffled_deck(rng, kills), [], Family(), []
    try:
        while deck:
            arena = Arena(pipeline, folder / f"round{len(arenas) + 1}", arguments, data_root)
            arenas.append(arena)
            before = len(strikes)
            assert disturbed(arena, deck, rng, family, strikes, len(arenas)) == expected
            assert len(strikes) > before, f"A whole round without a chance to strike: {Counter(deck)} left."
        assert not family.orphans(30), "Processes outlived their driver."
    finally:
        family.clear()
        print("\n" + table(strikes))
    assert len(strikes) == kills and {strike.kind for strike in strikes} == set(KINDS)
    return strikes, arenas


def test_counting_stages(tmp_path):
    strikes, arenas = rounds(ROOT / "tests" / "chaos" / "steps.yaml", tmp_path, KILLS)
    assert most_repeated(strikes) <= CHECKPOINT_EVERY
    # Exactly, by the journal: every kill costs a member at most one checkpoint interval.
    for number, arena in enumerate(arenas, 1):
        hits = sum(strike.round == number for strike in strikes)
        again = Counter()
        for line, times in arena.twice().items():
            again[line.rpartition(" ")[0]] += times
        assert max(again.values(), default=0) <= CHECKPOINT_EVERY * hits, again


def most_repeated(strikes: list[Strike]) -> int:
    return max((steps for strike in strikes for steps in strike.repeated.values()), default=0)
