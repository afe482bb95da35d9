"""The books of the chaos run: steps done twice are charged to the right kill."""

from __future__ import annotations

import random

import pytest

from orchestrator.events import Event
from tests.chaos.disturb import Strike, account_by_record, account_exactly, shuffled_deck, table
from tests.chaos.killer import KINDS


def strikes():
    return [Strike(1, 1, "member", "a", 10.0), Strike(2, 1, "driver", "b", 20.0, "resume", 3.0)]


def test_from_the_record():
    found = strikes()
    events = [
        Event(1, "member-started", "x"),
        Event(2, "member-progress", "x", {"done": 1, "total": 50}),
        Event(9, "member-progress", "x", {"done": 13, "total": 50}),
        Event(11, "member-started", "x"),
        Event(12, "member-log", "x", {"message": "Resumed at step 10 of 50."}),
        Event(12, "member-progress", "x", {"done": 11, "total": 50}),  # steps 11, 12, 13 again
        Event(19, "member-progress", "x", {"done": 20, "total": 50}),
        Event(21, "member-started", "x"),
        Event(22, "member-log", "x", {"message": "Resumed at step 20 of 50."}),
        Event(22, "member-progress", "x", {"done": 21, "total": 50}),  # nothing again
        Event(23, "member-started", "y"),
        Event(24, "member-progress", "y", {"done": 3, "total": 5}),  # a first start repeats nothing
    ]
    account_by_record(events, found)
    assert [strike.repeated for strike in found] == [{"x": 3}, {}]


def test_from_the_journal():
    found = strikes()
    account_exactly([(1, "x", 0), (2, "x", 1), (11, "x", 1), (12, "x", 2), (21, "x", 2), (21, "y", 2)], found)
    assert [strike.repeated for strike in found] == [{"x": 1}, {"x": 1}]
    with pytest.raises(AssertionError, match="although nothing was killed"):
        account_exactly([(1, "x", 0), (2, "x", 0)], found)


def test_deck_and_table():
    deck = shuffled_deck(random.Random(0), 20)
    assert all(deck.count(kind) == 5 for kind in KINDS) and deck != sorted(deck)
    text = table(strikes())
    assert "2 kills (driver 1, member 1, train 0, raylet 0)" in text and "resume" in text
