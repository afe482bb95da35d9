"""domain_split.pkl: read without running it, refused when stale."""

from __future__ import annotations

import collections
import os
import pickle

import numpy as np
import pytest

from moe.errors import CheckpointError, NotFoundError
from workers.official_split import LARGEST, read_split, split_bytes
from workers.sampling import DomainSplit, domain_groups

SLIDES = [*range(10), *range(30, 50)]  # camelyon's training slides


@pytest.fixture
def split():
    return domain_groups(np.array(SLIDES), 5, 3407)


@pytest.fixture
def write(tmp_path):
    def writer(content):
        path = tmp_path / "domain_split.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        return path

    return writer


def test_round_trip_of_the_official_split(split, write):
    assert split.groups[0] == [45, 41, 0, 2, 40, 46]
    path = write(split_bytes(split))
    assert read_split(path, 5, 3407) == split
    groups, owner = pickle.loads(path.read_bytes())  # what the public code does
    assert type(groups) is list and type(owner) is dict and owner[45] == 0
    assert read_split(write((split.groups, split.owner)), 5, 3407) == split


def test_groups_of_other_integers_are_written_plain(write):
    numbers = DomainSplit([[np.int64(3)], [np.int64(1)]], {})
    assert read_split(write(split_bytes(numbers)), 2).owner == {3: 0, 1: 1}


def test_a_stale_split_is_refused(split, write):
    path = write(split_bytes(split))
    with pytest.raises(CheckpointError, match=r"stale.*among 5 experts, not 10"):
        read_split(path, 10, 3407)
    with pytest.raises(CheckpointError, match=r"stale.*seed 1 makes") as caught:
        read_split(path, 5, 1)
    assert "--keep-split" in caught.value.hint
    assert read_split(path, 5) == split


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_is_executed(tmp_path, write):
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.system.*Nothing of it was executed"):
        read_split(write(([[Runs(tmp_path / "ran")]], {})), 1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "list.__init__", "object"])
def test_other_builtins_are_refused(write, name):
    with pytest.raises(CheckpointError, match="damaged"):
        read_split(write(b"\x80\x04\x8c\x08builtins\x8c" + bytes([len(name)]) + name.encode() + b"\x93."), 1)


@pytest.mark.parametrize(
    "content",
    [
        ([[1]], collections.OrderedDict({1: 0})),
        ([[np.int64(1)]], {1: 0}),
        ([{1}], {1: 0}),
        ([["1"]], {"1": 0}),
        ([[1.0]], {1.0: 0}),
        ([[True]], {True: 0}),
        ([[-1]], {-1: 0}),
        ([(1,)], {1: 0}),
        ([[1]],),
        [[1], [2]],
        {1: 0},
        None,
    ],
    ids=repr,
)
def test_other_content_is_refused(write, content):
    with pytest.raises(CheckpointError):
        read_split(write(content), 1)


@pytest.mark.parametrize(
    "content",
    [([[1], [2]], {1: 0, 2: 0}), ([[1], [2]], {1: 0}), ([[1], [1]], {1: 1}), ([[1], []], {1: 0, 2: 1})],
    ids=repr,
)
def test_contradictions_are_refused(write, content):
    with pytest.raises(CheckpointError, match="contradicts itself"):
        read_split(write(content), 2)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04", b"\x80\x04]r\xff\xff\xff\x7f."], ids=repr)
def test_garbage_is_refused(write, content):
    with pytest.raises(CheckpointError, match="damaged"):
        read_split(write(content), 1)


def test_truncated_large_and_missing_files(split, write, tmp_path):
    whole = split_bytes(split)
    for length in (1, len(whole) // 2, len(whole) - 1):
        with pytest.raises(CheckpointError):
            read_split(write(whole[:length]), 5)
    with pytest.raises(CheckpointError, match="few thousand"):
        read_split(write(bytes(LARGEST + 1)), 5)
    with pytest.raises(NotFoundError):
        read_split(tmp_path / "none.pkl", 5)
