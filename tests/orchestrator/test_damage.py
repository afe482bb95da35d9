"""Damaged bytes in the store are never computed with: the reader finds them, and the next start makes them again."""

import os

import pytest

from orchestrator import context
from orchestrator.executors.inline import InlineExecutor
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import DIAMOND, go, pipeline

VICTIM = "squares/seed=0/item=1"


def spoil(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


@pytest.mark.parametrize("how", ["bit", "short", "missing"])
def test_the_reader_finds_it_and_resume_heals(store, tmp_path, how):
    calm, _ = go(pipeline(DIAMOND), Store.open(tmp_path / "calm"))

    def listen(event):
        if event.kind == "member-finished" and event.node == VICTIM:
            spoil(store.folder / "artifacts" / event.data["digest"] / "value.json", how)

    outcome, run = go(pipeline(DIAMOND), store, listeners=[listen])
    assert outcome.status == "failed"
    failed = outcome.failures["total/seed=0"]
    assert failed.cause == "user" and calm.artifacts[VICTIM][:12] in failed.error.message
    assert "damaged in the store" in failed.error.message and "resume" in failed.error.hint
    again, _ = go(pipeline(DIAMOND), store, InlineExecutor(), run=RunStore(store).resume(run.id))
    assert again.status == "finished" and again.artifacts == calm.artifacts
    assert again.hits == len(again.artifacts) - 3  # made again: it, and what never came to be


def test_sound_bytes_are_hashed_once_per_process(store, monkeypatch):
    outcome, _ = go(pipeline({"n": {"kind": "numbers", "config": {"count": 1}}}), store)
    (digest,) = outcome.artifacts.values()
    hashed, real = [], Store.verify
    monkeypatch.setattr(Store, "verify", lambda self, artifact: hashed.append(artifact.digest) or real(self, artifact))
    for _ in range(3):
        assert context._sound(store, digest, "n").digest == digest
    assert hashed == [digest]
    # Not the time it is: a file that was made within the same tick of the kernel's clock would keep its own.
    os.utime(store.folder / "artifacts" / digest / "value.json", (1.0, 1.0))
    context._sound(store, digest, "n")
    assert hashed == [digest, digest]
