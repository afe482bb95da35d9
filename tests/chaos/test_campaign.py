"""A small campaign of random faults, a few of each place; and its books. By hand: ``python -m tests.chaos``."""

from __future__ import annotations

import random

import pytest
import yaml

from orchestrator.events import Event
from tests.chaos.campaign import PLACES, Campaign, Round, Strike, charge, make_deck, moved_after
from tests.chaos.faults import CAUSES, FAULTS, SHARES
from tests.chaos.places import CHECKPOINT_EVERY, EXPERT_STEPS, PIPELINE
from tests.chaos.report import WORDS, table


def strike(kind="worker", nodes=("a",), **more):
    return Strike(1, "machine1", kind, "x", 10.0, list(nodes), **more)


def test_every_kind_has_a_place_a_share_a_cause_and_words():
    assert (
        set(FAULTS)
        == set(CAUSES)
        == set(SHARES)
        == set(WORDS) - {"artifact"}
        == {kind for place in PLACES for kind in place.kinds}
    )


def test_the_pipeline_is_what_the_books_think():
    stages = yaml.safe_load(PIPELINE.read_text())["stages"]
    assert {stage["config"]["checkpoint_every"] for stage in stages.values()} == {CHECKPOINT_EVERY}
    assert stages["experts"]["config"]["steps"] == EXPERT_STEPS


def test_the_deck():
    deck = make_deck(100, random.Random(0), tuple(SHARES))
    assert len(deck) >= 100 and set(deck) == set(SHARES)
    assert all(abs(deck.count(kind) - SHARES[kind]) <= 3 for kind in SHARES)
    assert make_deck(3, random.Random(0), ("node",)) == ["node"] * 3
    assert len(make_deck(4, random.Random(0), tuple(SHARES))) == 4


def test_recovery_is_of_what_was_hit_and_of_a_new_process():
    events = [
        Event(9, "member-started", "a"),
        Event(11, "member-progress", "b"),
        Event(12, "member-progress", "a"),  # words of the dead
        Event(12, "member-hit", "c"),
        Event(13, "member-started", "a"),
        Event(14, "member-progress", "a"),
    ]
    assert moved_after(events, strike()) == 14
    assert moved_after(events, strike("pause")) == 14
    assert moved_after(events, strike("raylet", nodes=())) == 14
    assert moved_after(events, strike("store away", nodes=())) == 11
    assert moved_after(events, strike(nodes=("z",))) is None
    ended = [*events, Event(20, "run-finished", "", {"status": "failed"})]
    assert moved_after(ended, strike(nodes=("z",))) is None
    assert moved_after([*ended, Event(30, "run-finished", "", {"status": "finished"})], strike(nodes=("z",))) == 30


def test_what_was_done_twice_is_charged_to_the_fault_that_interrupted():
    first, second = strike(), Strike(2, "machine1", "node", "y", 12.0, [])
    journal = [(9.0, "x", 0), (10.1, "x", 1), (9.9, "y", 5), (11.0, "z", 0)]
    journal += [(13.0, "x", 1), (13.1, "y", 3), (13.2, "y", 4)]
    assert charge(journal, [first, second]) == []
    assert (first.repeated, second.repeated) == ({"x": 1, "y": 3}, {})  # both begin again only after the second fault
    assert charge([(1.0, "x", 1), (2.0, "x", 1)], [first]) == ["x did step 1 twice although nothing had happened"]


def test_a_damaged_artifact_pays_for_its_member():
    killed, damaged = strike(), Strike(2, "machine1", "damage", "one bit of an artifact", 12.0, ["b"])
    assert charge([(11.0, "x", EXPERT_STEPS - 1), (13.0, "x", 0)], [killed, damaged]) == []
    assert (killed.repeated, damaged.repeated) == ({}, {"x": EXPERT_STEPS})


def test_the_table():
    cheap = strike(recovery_s=2.0, repeated={"a": CHECKPOINT_EVERY // 2, "b": 1})
    dear = strike("head", recovery_s=40.0)
    text = table([Round("machine1", "machine", 60.0, True, True, [cheap]), Round("c2", "cluster", strikes=[dear])])
    lines = text.splitlines()
    assert lines[2].split("|")[2:-1] == [" 1 ", " 1 of 1 ", " 1 of 1 ", " 2.0 ", " 2.0 ", " 0.50 ", " 0.50 "]
    assert "| 1 | 0 of 1 | 0 of 1 | 40.0 " in lines[3] and "| **all** | 2 | 1 of 2 | 1 of 2 | 21.0 | 40.0 |" in lines[4]


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kinds", [("worker", "rank", "driver", "freeze"), ("node", "spot notice"), ("store away",)])
def test_a_small_campaign(tmp_path, kinds):
    campaign = Campaign(tmp_path, len(kinds) + 1, 1, kinds, most=4)
    rounds = campaign.run()
    assert [words for done in rounds for words in done.wrong] == []
    assert all(done.finished and done.equal for done in rounds) and campaign.count >= len(kinds)
