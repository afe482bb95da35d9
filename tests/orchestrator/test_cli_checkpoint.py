"""``moepipe checkpoint``: public files into the store or a folder, and out again."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from moe.aggregator import Aggregator
from moe.backbones import build_classifier, build_student
from moe.keymaps.meta_dmoe import BACKBONES, official_files
from moe.specs import BackboneSpec
from orchestrator.cli import app
from orchestrator.runs import RunStore
from orchestrator.store import Store
from tests.support.pipelines import DIAMOND, pipeline
from workers.official_split import split_bytes
from workers.sampling import domain_groups

TINY = BackboneSpec(name="tiny_cnn")
FILES = official_files("camelyon17", 2, 3407)


@pytest.fixture(autouse=True)
def official(tmp_path, monkeypatch):
    """A folder of the public code for a network of a few thousand parameters, and a working directory."""
    monkeypatch.delenv("MOEPIPE_STORE", raising=False)
    monkeypatch.setitem(BACKBONES, "camelyon", "tiny_cnn")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs" / "model" / "camelyon"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    student = build_student(TINY, 1)
    for name in FILES.experts:
        torch.save(build_classifier(TINY, 1).state_dict(), folder / name)
    torch.save(Aggregator(student.feature_dim, 1).state_dict(), folder / FILES.meta_selector)
    torch.save(student.state_dict(), folder / FILES.meta_student)
    (folder / FILES.split).write_bytes(split_bytes(domain_groups(torch.arange(6).numpy(), 2, 3407)))
    return folder


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], prog_name="moepipe")
    assert result.exit_code == code, f"{arguments}: {result.output}\n{result.exception!r}"
    return result


def document(*arguments, code=0):
    return json.loads(call(*arguments, "--json", code=code).stdout)


def equal(left, right):
    """The same files with the same tensors."""
    assert sorted(p.name for p in left.iterdir()) == sorted(p.name for p in right.iterdir())
    for path in left.glob("*.pth"):
        a, b = (torch.load(folder / path.name, weights_only=True) for folder in (left, right))
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_through_the_store(official, tmp_path):
    told = document("import", "theirs", "--dataset", "camelyon17")
    assert (told["dataset"], told["experts"], told["seed"]) == ("camelyon17", 2, 3407)
    made = {row["part"]: row["artifact"] for row in told["parts"]}
    assert list(made) == ["split", "expert-0", "expert-1", "distill"]
    store = Store.open(tmp_path / ".moepipe")
    assert [store.artifact(digest).kind for digest in made.values()] == ["groups", "model", "model", "student"]
    assert not any(store.verify(store.artifact(digest)) for digest in made.values())
    assert list((store.folder / "staging").iterdir()) == []
    arguments = ["--split", made["split"], "--expert", made["expert-0"], "--expert", made["expert-1"]]
    arguments += ["--distill", made["distill"]]
    files = document("export", "mine", "--dataset", "camelyon17", "--seed", 3407, *arguments)["files"]
    assert len(files) == 5
    equal(official, tmp_path / "mine" / "model" / "camelyon")


def test_through_a_plain_folder(official, tmp_path):
    told = call("import", "theirs", "--dataset", "camelyon", "--to", "plain")
    assert "2 experts, seed 3407" in told.stdout and FILES.pretrained_student in told.stderr
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == ["distill", "expert-0", "expert-1", "split"]
    assert not (tmp_path / ".moepipe").exists()
    assert not list(tmp_path.glob(".plain*"))
    arguments = [
        f"--{'expert' if 'expert' in p else p}=plain/{p}" for p in ("split", "expert-0", "expert-1", "distill")
    ]
    call("export", "mine", "--dataset", "camelyon17", "--seed", 3407, *arguments)
    equal(official, tmp_path / "mine" / "model" / "camelyon")
    call("export", "mine", "--dataset", "camelyon17", "--seed", 3407, *arguments, code=2)
    call("export", "mine", "--dataset", "camelyon17", "--seed", 3407, *arguments, "--force")
    call("import", "theirs", "--dataset", "camelyon17", "--to", "plain", code=2)


def test_members_of_a_run(official, tmp_path):
    made = {row["part"]: row["artifact"] for row in document("import", "theirs", "--dataset", "camelyon17")["parts"]}
    store = Store.open(tmp_path / ".moepipe")
    run = RunStore(store).create(pipeline(DIAMOND))
    # Eleven members, so that an order by letters would differ from the order by number.
    experts = {f"experts/seed=0/group={i}": made[f"expert-{i % 2}"] for i in range(11)}
    with run.lock():
        run.finish("finished", {**experts, "distill/seed=0": made["distill"]})
    arguments = ["--expert", "experts/seed=0", "--distill", "distill/seed=0", "--run", run.id]
    files = document("export", "mine", "--dataset", "camelyon17", "--seed", 7, *arguments)["files"]
    names = [file.rpartition("/")[2] for file in files]
    assert names[:11] == [f"camelyon_11experts_seed7_{i}_exp_best.pth" for i in range(11)]
    for number, file in enumerate(files[:11]):
        state = torch.load(file, weights_only=True)
        theirs = torch.load(official / FILES.experts[number % 2], weights_only=True)
        assert all(torch.equal(state[name], theirs[name]) for name in theirs)
    error = document(
        "export", "x", "--dataset", "camelyon17", "--seed", 7, "--run", run.id, "--distill", "distil/seed=0", code=4
    )
    assert "distill/seed=0" in error["error"]["hint"]


def test_a_failed_import_leaves_nothing(official, tmp_path):
    (official / FILES.meta_selector).write_bytes(b"garbage")
    error = document("import", "theirs", "--dataset", "camelyon17", code=6)["error"]
    assert error["code"] == "checkpoint" and FILES.meta_selector in error["message"]
    store = Store.open(tmp_path / ".moepipe")
    assert store.digests() == [] and list((store.folder / "staging").iterdir()) == []
    call("import", "theirs", "--dataset", "camelyon17", "--to", "plain", code=6)
    assert not (tmp_path / "plain").exists() and not list(tmp_path.glob(".plain*"))


def test_a_stale_split_and_a_wrong_name(official):
    (official / FILES.split).write_bytes(split_bytes(domain_groups(torch.arange(6).numpy(), 3, 3407)))
    assert "stale" in document("import", "theirs", "--dataset", "camelyon17", code=6)["error"]["message"]
    call("import", "theirs", "--dataset", "poverty", code=2)
    call("import", "theirs", "--dataset", "fmow", code=4)
    call("export", "mine", "--dataset", "camelyon17", "--seed", 1, "--distill", "nothing", code=4)
