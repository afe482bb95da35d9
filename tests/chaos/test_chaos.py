"""``kill -9`` of driver, member, Train worker and raylet at random moments: same artifacts, little work lost.

Run by hand: ``pytest -m chaos -s``. ``MOEPIPE_CHAOS_SEED`` and ``MOEPIPE_CHAOS_KILLS`` change moments and number.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.chaos.disturb import ROOT, Arena, Strike, account, disturbed, shuffled_deck, table, undisturbed
from tests.chaos.killer import KINDS, Family

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
SEED = int(os.environ.get("MOEPIPE_CHAOS_SEED", "0"))
KILLS = int(os.environ.get("MOEPIPE_CHAOS_KILLS", "20"))
CHECKPOINT_EVERY = 5  # in both pipelines


def rounds(pipeline, folder, kills, arguments=(), data_root=None):
    """Disturbed rounds until ``kills`` strikes hit; every round must give the artifacts of the undisturbed run."""
    rng = random.Random(SEED)
    expected = undisturbed(Arena(pipeline, folder / "peace", arguments, data_root))
    deck, strikes, family, number = shuffled_deck(rng, kills), [], Family(), 0
    try:
        while deck:
            number += 1
            arena = Arena(pipeline, folder / f"round{number}", arguments, data_root)
            before = len(strikes)
            try:
                assert disturbed(arena, deck, rng, family, strikes, number) == expected
            finally:
                account(arena, [strike for strike in strikes if strike.round == number])
            assert len(strikes) > before, f"A whole round without a chance to strike: {deck} left."
        assert not family.orphans(30), "Processes outlived their driver."
    finally:
        family.clear()
        print("\n" + table(strikes))
    assert len(strikes) == kills and {strike.kind for strike in strikes} == set(KINDS)
    return strikes


def test_counting_stages(tmp_path):
    strikes = rounds(ROOT / "tests" / "chaos" / "steps.yaml", tmp_path, KILLS)
    assert most_repeated(strikes) <= CHECKPOINT_EVERY  # exactly, by the journal of executed steps


def test_the_real_thing(tmp_path):
    """The demo, shortened: torch training in actors, DeepSpeed on two Train workers, real data."""
    strikes = rounds(ROOT / "tests" / "chaos" / "demo.yaml", tmp_path, KILLS)
    # By the run record. Features and evaluation count rows and domains, not steps between checkpoints.
    assert most_repeated(strikes, ("shared", "experts", "aggregator", "distill", "erm", "oracle")) <= CHECKPOINT_EVERY


def most_repeated(strikes: list[Strike], stages: tuple[str, ...] = ("",)) -> int:
    steps = [again for strike in strikes for node, again in strike.repeated.items() if node.startswith(stages)]
    return max(steps, default=0)
