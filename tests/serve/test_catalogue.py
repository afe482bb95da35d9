import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open

from moe.errors import CheckpointError, NotFoundError, SpecError
from serve.catalogue import Catalogue, Facts
from serve.delta import Delta
from serve.errors import NoRoom, StaleState
from serve.records import parse_reference

FACTS = Facts(
    "v1", "bn", support=16, loss_before=2.0, loss_after=float("nan"), expert_weights=(0.25, 0.75), seconds=0.5
)
TRAVERSALS = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    ".aside",
    "a.b",
    "x" * 65,
    "a\0",
    "a\n",
    "-x",
    "é",
    "/etc",
    " a",
    None,
]


def delta(seed, numbers=1000):
    return Delta({"features.x": torch.randn(numbers, generator=torch.Generator().manual_seed(seed))})


@pytest.fixture
def catalogue(tmp_path):
    return Catalogue(tmp_path / "states", resident_bytes=20_000)


def test_publish_get_list_versions(catalogue):
    first, second = catalogue.publish("t", "hall", delta(1), FACTS), catalogue.publish("t", "hall", delta(2), FACTS)
    assert (first.version, second.version) == (1, 2) and second.bytes == 4000 and second.kind == "delta"
    assert catalogue.get("t", "hall") == second and catalogue.get("t", "hall", 1).digest == delta(1).digest
    assert [r.version for r in catalogue.versions("t", "hall")] == [2, 1]
    assert [r.current for r in catalogue.versions("t", "hall")] == [True, False]
    catalogue.publish("t", "barn", delta(3), FACTS)
    assert [r.name for r in catalogue.list("t")] == ["barn", "hall"]
    assert catalogue.get("t", "hall").expert_weights == (0.25, 0.75) and catalogue.get("t", "hall").loss_after is None
    assert catalogue.stats().registered == 2


def test_survives_a_restart_with_the_same_bits(catalogue):
    catalogue.publish("t", "hall", delta(1), FACTS)
    again = Catalogue(catalogue.folder, resident_bytes=20_000)
    assert torch.equal(again.resident("t", "hall").tensors["features.x"], delta(1).tensors["features.x"])


def test_evicted_and_reloaded_states_are_equal_in_every_bit_and_memory_is_bounded(catalogue):
    for seed in range(40):
        catalogue.publish("t", f"s{seed}", delta(seed), FACTS)
        assert catalogue.resident_stats().bytes <= 20_000
    for seed in list(range(40)) * 2:
        assert catalogue.resident("t", f"s{seed}").to_bytes() == delta(seed).to_bytes()
        assert catalogue.resident_stats().bytes <= 20_000
    stats = catalogue.resident_stats()
    assert stats.entries == 5 and stats.evictions >= 70 and stats.misses >= 70


def test_least_recently_used_goes_first_and_pinned_stays(catalogue):
    for seed in range(5):
        catalogue.publish("t", f"s{seed}", delta(seed), FACTS)
    assert catalogue.pin("t", "s0").pinned
    catalogue.resident("t", "s1")
    for seed in range(5, 8):
        catalogue.publish("t", f"s{seed}", delta(seed), FACTS)
    before = catalogue.resident_stats()
    assert before.pinned_bytes == 4000
    catalogue.resident("t", "s0")
    catalogue.resident("t", "s1")
    assert catalogue.resident_stats().hits == before.hits + 2
    catalogue.resident("t", "s2")
    assert catalogue.resident_stats().misses == before.misses + 1
    catalogue.evict()
    assert catalogue.resident_stats().entries == 1
    assert not catalogue.unpin("t", "s0").pinned and not catalogue.unpin("t", "s0").pinned
    catalogue.evict()
    assert catalogue.resident_stats().bytes == 0


def test_pins_cannot_exceed_the_limit(catalogue):
    for seed in range(6):
        catalogue.publish("t", f"s{seed}", delta(seed), FACTS)
    for seed in range(5):
        catalogue.pin("t", f"s{seed}")
    with pytest.raises(NoRoom, match="24000 bytes"):
        catalogue.pin("t", "s5")
    assert not catalogue.get("t", "s5").pinned
    assert catalogue.resident("t", "s5") == delta(5)  # served, without being held
    assert catalogue.resident_stats().bytes == 20_000


def test_unpinned_by_another_process_makes_room_here(catalogue):
    for seed in range(6):
        catalogue.publish("t", f"s{seed}", delta(seed), FACTS)
    for seed in range(5):
        catalogue.pin("t", f"s{seed}")
    Catalogue(catalogue.folder).unpin("t", "s3")
    catalogue.pin("t", "s5")
    assert catalogue.resident_stats().pinned_bytes == 20_000


def test_a_delta_larger_than_the_memory_is_served_without_being_held(tmp_path):
    small = Catalogue(tmp_path, resident_bytes=100)
    small.publish("t", "big", delta(1), FACTS)
    assert small.resident("t", "big") == delta(1) and small.resident_stats().bytes == 0


def test_rollback_and_what_comes_after(catalogue):
    for seed in (1, 2, 3):
        catalogue.publish("t", "hall", delta(seed), FACTS)
    assert catalogue.rollback("t", "hall").version == 2
    assert catalogue.resident("t", "hall") == delta(2) and catalogue.resident("t", "hall", 3) == delta(3)
    assert catalogue.rollback("t", "hall", to=3).version == 3 and catalogue.rollback("t", "hall", to=1).version == 1
    with pytest.raises(NotFoundError, match=r"Its versions are 1, 2, 3"):
        catalogue.rollback("t", "hall")
    with pytest.raises(NotFoundError):
        catalogue.rollback("t", "hall", to=9)
    assert catalogue.publish("t", "hall", delta(4), FACTS).version == 4


def test_deleted_versions_are_never_used_again(catalogue):
    catalogue.publish("t", "hall", delta(1), FACTS)
    held = catalogue.resident("t", "hall")
    catalogue.delete("t", "hall")
    for call in (
        catalogue.get,
        catalogue.resident,
        catalogue.delete,
        catalogue.pin,
        catalogue.export,
        catalogue.versions,
    ):
        with pytest.raises(NotFoundError):
            call("t", "hall")
    assert catalogue.list("t") == [] and catalogue.stats().registered == 0
    assert held == delta(1)  # a request that had it goes on
    assert catalogue.publish("t", "hall", delta(2), FACTS).version == 2
    with pytest.raises(NotFoundError):
        catalogue.get("t", "hall", 1)


def test_old_versions_go_but_not_pinned_or_current_ones(tmp_path):
    kept = Catalogue(tmp_path, keep_versions=2)
    kept.publish("t", "hall", delta(0), FACTS)
    kept.pin("t", "hall")
    for seed in range(1, 6):
        kept.publish("t", "hall", delta(seed), FACTS)
    assert [r.version for r in kept.versions("t", "hall")] == [6, 5, 1]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_names_that_could_leave_the_folder_are_refused(catalogue, name):
    catalogue.publish("t", "hall", delta(1), FACTS)
    files = sorted(catalogue.folder.rglob("*"))
    for call in (
        catalogue.get,
        catalogue.delete,
        catalogue.pin,
        catalogue.rollback,
        catalogue.resident,
        catalogue.export,
    ):
        with pytest.raises(SpecError, match="not allowed"):
            call("t", name)
        with pytest.raises(SpecError, match="not allowed"):
            call(name, "hall")
    with pytest.raises(SpecError, match="not allowed"):
        catalogue.publish("t", name, delta(2), FACTS)
    with pytest.raises(SpecError, match="not allowed"):
        catalogue.list(name)
    assert sorted(catalogue.folder.rglob("*")) == files


def test_references():
    assert parse_reference("hall") == ("hall", None) and parse_reference("hall.12") == ("hall", 12)
    for wrong in ("", ".", "hall.", "hall.0", "hall.-1", "hall.1.2", "../x", "hall.1e3", "hall.٣", "hall.9999999999"):
        with pytest.raises(SpecError):
            parse_reference(wrong)


def test_tenants_never_see_each_other(catalogue):
    catalogue.publish("ann", "hall", delta(1), FACTS)
    catalogue.publish("bob", "hall", delta(2), FACTS)
    catalogue.publish("ann", "secret", delta(3), FACTS)
    assert [r.name for r in catalogue.list("bob")] == ["hall"] and catalogue.list("nobody") == []
    assert catalogue.resident("ann", "hall") == delta(1) and catalogue.resident("bob", "hall") == delta(2)
    mine, none = "", ""
    for name in ("secret", "absent"):
        with pytest.raises(NotFoundError) as error:
            catalogue.get("bob", name)
        mine, none = none, str(error.value).replace(name, "")
    assert mine == none  # the answer does not tell whether someone else has it
    catalogue.delete("bob", "hall")
    assert catalogue.resident("ann", "hall") == delta(1)


def test_a_failed_publish_changes_nothing(catalogue, monkeypatch):
    catalogue.publish("t", "hall", delta(1), FACTS)
    real = os.rename

    def broken(source, target):
        if str(target).endswith("/2"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("serve.state_files.os.rename", broken)
    with pytest.raises(Exception, match="No space left"):
        catalogue.publish("t", "hall", delta(2), FACTS)
    monkeypatch.undo()
    assert catalogue.get("t", "hall").version == 1 and catalogue.resident("t", "hall") == delta(1)
    assert not list((catalogue.folder / ".aside").iterdir())
    assert catalogue.publish("t", "hall", delta(2), FACTS).version == 2


def test_a_crash_before_the_head_leaves_the_old_state(catalogue, monkeypatch):
    catalogue.publish("t", "hall", delta(1), FACTS)
    with monkeypatch.context() as patch:
        patch.setattr("serve.state_files.StateFiles.write_head", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            catalogue.publish("t", "hall", delta(2), FACTS)
    again = Catalogue(catalogue.folder)
    assert again.get("t", "hall").version == 1
    assert again.publish("t", "hall", delta(3), FACTS).version == 2 and again.resident("t", "hall") == delta(3)


def test_damaged_files_are_told(catalogue):
    record = catalogue.publish("t", "hall", delta(1), FACTS)
    folder = catalogue.folder / "t" / "hall" / "1"
    other = Catalogue(catalogue.folder)
    (folder / "delta.safetensors").write_bytes(delta(2).to_bytes())
    with pytest.raises(CheckpointError, match="damaged"):
        other.resident("t", "hall")
    (folder / "delta.safetensors").write_bytes(delta(1).to_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        other.resident("t", "hall")
    (folder / "record.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"record\.json"):
        Catalogue(catalogue.folder).get("t", "hall")
    assert catalogue.load(record) == delta(1)  # still in memory


def test_states_of_another_base_are_listed_but_not_served(catalogue):
    catalogue.publish("t", "hall", delta(1), FACTS)
    other = Catalogue(catalogue.folder, model_version="v2")
    assert other.list("t")[0].model_version == "v1"
    with pytest.raises(StaleState, match="Adapt again"):
        other.resident("t", "hall")


def test_quota_of_a_tenant_counts_live_states(tmp_path):
    limited = Catalogue(tmp_path, states_per_tenant=3)
    for name in "abc":
        limited.publish("t", name, delta(1), FACTS)
    with pytest.raises(NoRoom, match="3 states"):
        limited.publish("t", "d", delta(1), FACTS)
    limited.publish("t", "a", delta(2), FACTS)  # a new version of what is there
    limited.publish("u", "d", delta(1), FACTS)
    limited.delete("t", "b")
    assert limited.publish("t", "d", delta(1), FACTS).version == 1
    assert [r.name for r in limited.list("t")] == ["a", "c", "d"]


def test_export_holds_the_tensors_and_the_record(catalogue, tmp_path):
    catalogue.publish("t", "hall", delta(1), FACTS)
    data = catalogue.export("t", "hall")
    assert Delta.from_bytes(data) == delta(1)
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        note = json.loads(file.metadata()["moepipe"])
    assert note["method"] == "bn" and note["model_version"] == "v1" and "tenant" not in note


# ---- kept as support features ----------------------------------------------------------------------------------------


def recompute(record, support):
    return Delta({"features.x": support["seed"].float().repeat(record.options["times"])})


def test_kept_as_support_and_recomputed_to_the_same_bits(tmp_path):
    facts = Facts("v1", "distill", {"times": 1000})
    made = recompute(type("R", (), {"options": {"times": 1000}}), {"seed": torch.tensor([1.5, 2.5])})
    states = Catalogue(tmp_path, recompute=recompute)
    record = states.publish("t", "hall", made, facts, support={"seed": torch.tensor([1.5, 2.5])})
    assert record.kind == "features" and record.stored_bytes < 200 < record.bytes
    states.evict()
    assert states.resident("t", "hall").to_bytes() == made.to_bytes() and states.stats().recomputed == 1
    with pytest.raises(StaleState, match="nobody here can"):
        Catalogue(tmp_path).resident("t", "hall")
    other = Catalogue(tmp_path, recompute=lambda record, support: delta(7))
    with pytest.raises(StaleState, match="does not come out the same"):
        other.resident("t", "hall")


def test_kept_as_a_delta_when_support_is_larger_or_gives_other_bits(tmp_path):
    states = Catalogue(tmp_path, recompute=recompute)
    facts = Facts("v1", "distill", {"times": 1000})
    assert states.publish("t", "a", delta(1), facts, support={"seed": torch.tensor([1.0])}).kind == "delta"
    big = {"seed": torch.randn(2000)}
    assert states.publish("t", "b", delta(1), facts, support=big).kind == "delta"
    states.evict()
    assert states.resident("t", "a") == delta(1)


# ---- many at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_thousand_states_bounded_memory(tmp_path, count):
    states = Catalogue(tmp_path, resident_bytes=64_000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: states.publish("t", f"s{seed}", delta(seed), FACTS), range(count)))
    stats = states.stats()
    assert stats.registered == count and stats.resident.bytes <= 64_000 and stats.resident.entries <= 16
    for seed in (0, count // 2, count - 1):
        assert states.resident("t", f"s{seed}") == delta(seed)


def test_many_threads_one_file_read(catalogue):
    catalogue.publish("t", "hall", delta(1), FACTS)
    catalogue.evict()
    reads, real = [], catalogue._files.content
    catalogue._files.content = lambda record: (reads.append(1), threading.Event().wait(0.05), real(record))[2]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: catalogue.resident("t", "hall"), range(8)))
    assert len(reads) == 1 and len({id(one) for one in found}) == 1


def _publish_many(folder, first, seen_one):
    states = Catalogue(folder)
    for seed in range(first, first + 6):
        states.publish("t", "hall", delta(seed), FACTS)
        assert seen_one.wait(60)  # while they write, the reader has read at least once


def test_processes_take_turns_and_readers_see_whole_states(tmp_path):
    context = multiprocessing.get_context("spawn")
    seen_one = context.Event()
    writers = [context.Process(target=_publish_many, args=(tmp_path, 100 * n, seen_one)) for n in (1, 2)]
    reader = Catalogue(tmp_path, resident_bytes=8_000, keep_versions=100)
    known = {delta(100 * n + k).digest for n in (1, 2) for k in range(6)}
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        time.sleep(0.002)
        try:
            record = reader.get("t", "hall")
        except NotFoundError:
            continue
        try:
            assert reader.load(record).digest == record.digest
        except NotFoundError:
            continue  # eight versions later it may be gone
        seen.add(record.version)
        seen_one.set()
        assert record.digest in known
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert reader.get("t", "hall").version == 12 and seen


def test_deletion_during_use_gives_not_found_or_the_state(catalogue):
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            catalogue.evict()
            try:
                if catalogue.resident("t", "hall").digest not in digests:
                    wrong.append("another state")
            except NotFoundError:
                pass
            except Exception as error:
                wrong.append(error)

    digests = {delta(seed).digest for seed in range(30)}
    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for seed in range(12):
        catalogue.publish("t", "hall", delta(seed), FACTS)
        catalogue.delete("t", "hall")
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
