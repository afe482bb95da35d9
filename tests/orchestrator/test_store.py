import json
import os
import subprocess
import sys
import textwrap

import pytest

from moe.errors import EnvironmentProblem, NotFoundError, RunFailed
from orchestrator.artifacts import Artifact, canonical_json, check_name, digest_of
from orchestrator.store import Key, Store

KEY = Key(digest_of(b"a key"), {"kind": "numbers"})


def fill(store, **files):
    folder = store.staging()
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def everything(store):
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


@pytest.fixture(params=["folder", "memory"])
def any_store(request, tmp_path):
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}"
    return Store.open(url, tmp_path / "cache")


def test_commit_and_lookup(any_store):
    made = any_store.commit(fill(any_store, a="one", b="two"), "number", {"value": 1}, KEY, "n", 1.5)
    found = any_store.lookup(KEY)
    assert found == made
    assert found.files["a.txt"].size == 3 and found.meta == {"value": 1} and found.bytes == 6
    assert (any_store.local_path(found) / "b.txt").read_text() == "two"
    assert any_store.verify(found) == []
    record = any_store.record(KEY)
    assert (record.node, record.seconds, record.parts, record.bytes) == ("n", 1.5, KEY.parts, 6)
    assert [r.key for r in any_store.records()] == [KEY.digest] and any_store.digests() == [made.digest]


def test_equal_content_is_one_artifact_and_the_digest_is_that_of_the_manifest(any_store):
    first = any_store.commit(fill(any_store, a="one"), "number", {"value": 1})
    second = any_store.commit(fill(any_store, a="one"), "number", {"value": 1})
    other = any_store.commit(fill(any_store, a="one"), "number", {"value": 2})
    assert first == second and other.digest != first.digest
    assert digest_of(first.manifest()) == first.digest
    assert len(any_store.digests()) == 2
    assert not list((any_store.folder / "staging").iterdir())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text("tw"), "file b.txt is 1 bytes short"),
        (lambda path: path.write_text("twoo"), "file b.txt is 1 bytes too long"),
        (lambda path: path.unlink(), "file b.txt is missing"),
        (lambda path: (path.parent / "manifest.json").write_text("{}"), "is unreadable"),
        (lambda path: (path.parent / "manifest.json").unlink(), "is gone"),
    ],
)
def test_a_damaged_artifact_is_a_miss_with_its_reason_and_is_rebuilt(store, damage, words):
    made = store.commit(fill(store, a="one", b="two"), "number", {}, KEY)
    damage(store.local_path(made) / "b.txt")
    assert store.lookup(KEY) is None
    assert words in store.examine(KEY).reason
    again = store.commit(fill(store, a="one", b="two"), "number", {}, KEY)
    assert again == made and store.lookup(KEY) == made and store.verify(made) == []


def test_changed_bytes_of_equal_size_are_found_by_verify(store):
    made = store.commit(fill(store, a="one"), "number", {}, KEY)
    (store.local_path(made) / "a.txt").write_text("0ne")
    assert store.lookup(KEY) is not None
    assert store.verify(made) == ["file a.txt has other bytes than when it was written"]
    store.commit(fill(store, a="one"), "number", {}, KEY)
    assert store.verify(made) == []


def test_unknown_and_removed(any_store):
    assert any_store.lookup(KEY) is None and any_store.examine(KEY).reason == ""
    made = any_store.commit(fill(any_store, a="one"), "number", {}, KEY)
    any_store.remove(made.digest)
    assert "is gone" in any_store.examine(KEY).reason
    any_store.forget(KEY.digest)
    assert any_store.record(KEY) is None
    with pytest.raises(NotFoundError):
        any_store.artifact(made.digest)


def test_a_damaged_download_is_refused(tmp_path):
    store = Store.open(f"memory://{tmp_path.name}", tmp_path / "cache")
    made = store.commit(fill(store, a="one"), "number", {}, KEY)
    store.blobs.write(f"artifacts/{made.digest}/a.txt", b"0ne")
    with pytest.raises(NotFoundError, match=r"a\.txt"):
        store.local_path(made)
    assert not (store.folder / "downloads" / made.digest).exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a\\b", "./x", "a\nb", "manifest.json"])
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(RunFailed, match="not allowed"):
        check_name(name)


def test_a_manifest_with_a_traversal_is_not_read(store):
    evil = {"format": 1, "kind": "k", "meta": {}, "files": {"../../x": {"size": 1, "sha256": "0"}}}
    data = canonical_json(evil)
    store.blobs.write(f"artifacts/{digest_of(data)}/manifest.json", data)
    with pytest.raises(RunFailed, match="not allowed"):
        Artifact.parse(digest_of(data), data)


@pytest.mark.parametrize("key", ["../../etc/passwd", "ABC", "0" * 63])
def test_a_key_is_a_digest(store, key):
    with pytest.raises(RunFailed, match="64 hexadecimal"):
        store.lookup(key)


def test_links_and_records_that_are_not_json_are_refused(store):
    folder = fill(store, a="one")
    os.symlink("/etc/hostname", folder / "link")
    with pytest.raises(RunFailed, match="link"):
        store.commit(folder, "number", {})
    with pytest.raises(RunFailed, match="not plain JSON"):
        store.commit(fill(store, a="one"), "number", {"path": store.folder})
    assert store.digests() == []


def test_a_crash_before_the_rename_leaves_nothing(store, monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.blobs.os.rename", crash)
        with pytest.raises(KeyboardInterrupt):
            store.commit(fill(store, a="one"), "number", {}, KEY)
    assert store.digests() == [] and store.lookup(KEY) is None
    store.commit(fill(store, a="one"), "number", {}, KEY)
    assert store.lookup(KEY) is not None


def test_a_remote_upload_cut_short_does_not_exist(tmp_path, monkeypatch):
    store = Store.open(f"memory://{tmp_path.name}", tmp_path / "cache")
    real = store.blobs.fs.put_file

    def cut(source, target, **options):
        if target.endswith("manifest.json"):
            raise ConnectionError("cut")
        return real(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store.blobs.fs, "put_file", cut)
        patch.setenv("MOEPIPE_STORE_PATIENCE_S", "0")
        with pytest.raises(EnvironmentProblem, match="does not answer: ConnectionError: cut"):
            store.commit(fill(store, a="one", z="two"), "number", {}, KEY)
    assert store.lookup(KEY) is None
    made = store.commit(fill(store, a="one", z="two"), "number", {}, KEY)
    assert store.lookup(KEY) == made and store.verify(made) == []


def test_a_full_disk_is_an_error_for_people_and_leaves_no_part(store):
    """A file size limit of the process makes the kernel refuse to write the manifest, as a full disk does."""
    script = textwrap.dedent(f"""
        import resource, signal
        from moe.errors import EnvironmentProblem
        from orchestrator.store import Store, Key
        store = Store.open({str(store.folder)!r})
        folder = store.staging()
        (folder / "a.txt").write_text("one")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
        try:
            store.commit(folder, "number", {{}}, Key({KEY.digest!r}, {{}}))
        except EnvironmentProblem as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "No space left to write" in done.stdout and str(store.folder) in done.stdout
    assert not any("artifacts" in name or "keys" in name for name in everything(store))
    assert not any("manifest" in name for name in everything(store))


def test_a_store_that_cannot_be_made():
    with pytest.raises(EnvironmentProblem, match="cannot be made"):
        Store.open("/proc/nowhere/store")
    with pytest.raises(EnvironmentProblem, match="cannot be opened"):
        Store.open("nosuchprotocol://bucket/x")


def test_locks_exclude_each_other_and_scratch_survives(store):
    first = store.try_lock(KEY)
    assert first is not None and store.try_lock(KEY) is None
    first.release()
    again = store.try_lock(KEY)
    assert again is not None
    again.release()
    (store.scratch(KEY) / "checkpoint").write_text("1")
    assert (Store.open(store.url).scratch(KEY) / "checkpoint").read_text() == "1"
    store.drop_scratch(KEY)
    assert not (store.folder / "scratch" / KEY.digest).exists()


def test_a_key_record_of_another_format_is_a_miss(store):
    store.commit(fill(store, a="one"), "number", {}, KEY)
    path = store.folder / "keys" / f"{KEY.digest}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    assert store.lookup(KEY) is None
    path.write_text("{torn")
    assert store.lookup(KEY) is None
