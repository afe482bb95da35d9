"""Public checkpoints of Meta-DMoE: what is imported comes out again, and nothing else gets in."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from moe.aggregator import Aggregator
from moe.backbones import build_classifier, build_student, classifier_to_student
from moe.errors import CheckpointError, NotFoundError, SpecError
from moe.keymaps.meta_dmoe import BACKBONES, backbone_of, backbone_shapes, official_files, selector_shapes
from moe.specs import BackboneSpec, StudentMoESpec
from workers.modelfile import (
    load_aggregator,
    load_classifier,
    load_student,
    load_tensors,
    model_meta,
    save_aggregator,
    save_tensors,
)
from workers.official_checkpoints import find_run, import_run
from workers.official_export import Source, Sources, export_run
from workers.official_split import split_bytes
from workers.sampling import domain_groups

SEED, DATASET = 3407, "camelyon17"
TINY = BackboneSpec(name="tiny_cnn")


@pytest.fixture
def tiny(monkeypatch):
    """camelyon's checkpoints with a network of a few thousand parameters in place of DenseNet-121."""
    monkeypatch.setitem(BACKBONES, "camelyon", "tiny_cnn")


@pytest.fixture
def official(tiny, tmp_path):
    """A folder as the public code leaves it: two experts, both aggregators, both students, the split."""
    folder = tmp_path / "work" / "model" / "camelyon"
    folder.mkdir(parents=True)
    files = official_files(DATASET, 2, SEED)
    torch.manual_seed(0)
    for name in files.experts:
        torch.save(build_classifier(TINY, 1).state_dict(), folder / name)
    dim = build_student(TINY, 1).feature_dim
    for name in (files.pretrained_selector, files.meta_selector):
        torch.save(Aggregator(dim, 1).state_dict(), folder / name)
    for name in (files.pretrained_student, files.meta_student):
        torch.save(build_student(TINY, 1).state_dict(), folder / name)
    (folder / files.split).write_bytes(split_bytes(domain_groups(torch.arange(6).numpy(), 2, SEED)))
    return folder


def working(tmp_path):
    """A maker of folders."""
    tmp_path.mkdir(exist_ok=True)
    return lambda: Path(tempfile.mkdtemp(prefix="part-", dir=tmp_path))


def imported(folder, tmp_path, **options):
    run = find_run(folder, DATASET)
    return {part.name: part for part in import_run(run, working(tmp_path), **options)}


def source(part):
    return Source(part.folder, part.kind, part.meta)


def sources(parts):
    chosen = {name: source(parts[name]) for name in ("split", "aggregator", "student", "distill") if name in parts}
    return Sources(**chosen, experts=[source(part) for name, part in parts.items() if name.startswith("expert-")])


def same_files(left, right):
    """Whether two folders hold the same tensors under the same names, in the same order."""
    assert sorted(path.name for path in left.iterdir()) == sorted(path.name for path in right.iterdir())
    for path in left.glob("*.pth"):
        a, b = (torch.load(folder / path.name, weights_only=True) for folder in (left, right))
        assert list(a) == list(b)
        for name, value in a.items():
            assert torch.equal(value, b[name]) and value.dtype == b[name].dtype, f"{path.name}: {name}"


def test_round_trip_of_a_whole_run(official, tmp_path):
    parts = imported(official.parents[1], tmp_path)
    assert [(part.name, part.kind) for part in parts.values()] == [
        ("split", "groups"),
        ("expert-0", "model"),
        ("expert-1", "model"),
        ("aggregator", "aggregator"),
        ("student", "model"),
        ("distill", "student"),
    ]
    files = export_run(sources(parts), "camelyon", SEED, tmp_path / "out")
    same_files(official, tmp_path / "out" / "model" / "camelyon")
    assert {path.name for path in files} == {path.name for path in official.iterdir()}
    assert find_run(tmp_path / "out", DATASET) == find_run(tmp_path / "out" / "model", DATASET)
    again = (tmp_path / "out" / "model" / "camelyon" / "domain_split.pkl").read_bytes()
    assert again == (official / "domain_split.pkl").read_bytes()


def test_artifacts_open_as_those_of_a_pipeline(official, tmp_path):
    parts = imported(official, tmp_path)
    groups = json.loads((parts["split"].folder / "groups.json").read_text())
    assert groups == parts["split"].meta["groups"] and parts["split"].meta["sizes"] == [3, 3]
    images = torch.rand(2, 3, 32, 32)
    for number in range(2):
        part = parts[f"expert-{number}"]
        expert = load_classifier(part.folder, part.meta)
        state = torch.load(official / part.sources[0], weights_only=True)
        assert part.meta["domains"] == groups[number] and torch.equal(expert.state_dict()["fc.bias"], state["fc.bias"])
        assert load_student(part.folder, part.meta).extract(images).shape == (2, part.meta["feature_dim"])
    distill = parts["distill"]
    student, teacher = load_student(distill.folder, distill.meta), load_aggregator(distill.folder, distill.meta)
    assert teacher(student.extract(images).unsqueeze(1)).logits_BK.shape == (2, 1)
    assert distill.meta["adaptation"] == {"inner_lr": 1e-3, "inner_steps": 1, "adapt": "all", "support": 64}
    assert load_aggregator(parts["aggregator"].folder, parts["aggregator"].meta).pool == "mean"


def test_a_classifier_is_exported_as_a_student_and_back(official, tmp_path):
    parts = imported(official, tmp_path)
    crossed = Sources(student=source(parts["expert-0"]), experts=[source(parts["student"]), source(parts["expert-1"])])
    export_run(crossed, DATASET, SEED, tmp_path / "out")
    folder, files = tmp_path / "out" / "model" / "camelyon", official_files(DATASET, 2, SEED)
    expert = torch.load(official / files.experts[0], weights_only=True)
    student = torch.load(folder / files.pretrained_student, weights_only=True)
    assert all(torch.equal(value, student[name]) for name, value in classifier_to_student(TINY, expert).items())
    back = torch.load(folder / files.experts[0], weights_only=True)
    assert back.keys() == expert.keys()


def test_what_is_not_there_is_left_out(official, tmp_path):
    files = official_files(DATASET, 2, SEED)
    for name in (files.split, files.pretrained_selector, files.pretrained_student, *files.experts):
        (official / name).unlink()
    parts = imported(official, tmp_path)
    assert list(parts) == ["distill"]
    with pytest.raises(SpecError, match="number of experts"):
        export_run(sources(parts), DATASET, SEED, tmp_path / "out")
    written = export_run(sources(parts), DATASET, SEED, tmp_path / "out", experts=2)
    assert [path.name for path in written] == [files.meta_selector, files.meta_student]


def test_which_run_is_meant(official, tmp_path):
    run = find_run(official, "camelyon")
    assert (run.dataset, run.experts, run.seed) == (DATASET, 2, SEED)
    shutil.copy(official / run.files.meta_student, official / "camelyon_5experts_seed1_meta_student_best.pth")
    with pytest.raises(CheckpointError, match="2 runs") as caught:
        find_run(official, DATASET)
    assert "--experts 5 --seed 1" in caught.value.hint
    assert find_run(official, DATASET, experts=2).seed == SEED and find_run(official, DATASET, seed=1).experts == 5
    with pytest.raises(NotFoundError, match="3experts") as missing:
        find_run(official, DATASET, experts=3)
    assert "5 experts with seed 1" in missing.value.hint
    with pytest.raises(NotFoundError):
        find_run(official, "fmow")
    with pytest.raises(NotFoundError):
        find_run(tmp_path / "none", DATASET)
    with pytest.raises(SpecError, match="poverty"):
        find_run(official, "poverty")


def test_missing_experts_and_half_a_pair_are_refused(official, tmp_path):
    files = official_files(DATASET, 2, SEED)
    (official / files.experts[0]).rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"only 1 of 2 files of the experts.*_0_exp_best"):
        imported(official, tmp_path)
    (tmp_path / "kept").rename(official / files.experts[0])
    (official / files.meta_selector).unlink()
    with pytest.raises(CheckpointError, match="meta_selector"):
        imported(official, tmp_path)


def test_a_stale_split_is_refused(official, tmp_path):
    path = official / "domain_split.pkl"
    path.write_bytes(split_bytes(domain_groups(torch.arange(6).numpy(), 3, SEED)))
    with pytest.raises(CheckpointError, match=r"stale.*3 experts, not 2"):
        imported(official, tmp_path)
    path.write_bytes(split_bytes(domain_groups(torch.arange(6).numpy(), 2, 8)))
    with pytest.raises(CheckpointError, match=r"stale.*seed 3407"):
        imported(official, tmp_path)
    assert "split" in imported(official, tmp_path / "kept", keep_split=True)


class Opens:
    """Would run code if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def edit(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(next(iter(s))), "1 missing"),
        (lambda s: s.update(more=torch.zeros(1)), "1 unexpected: more"),
        (lambda s: s.update({name: v[:, :1] for name, v in s.items() if v.ndim == 4}), "of another shape"),
        (lambda s: s.update({"moe.norm.weight": torch.zeros(1)}), "MoE block"),
    ],
    ids=["missing", "unexpected", "shape", "moe"],
)
@pytest.mark.parametrize("name", ["0_exp_best", "pretrained_exp_best", "meta_student_best"])
def test_networks_are_checked_strictly(official, tmp_path, name, change, message):
    file = official / f"camelyon_2experts_seed{SEED}_{name}.pth"
    edit(file, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        imported(official, tmp_path)
    assert file.name in caught.value.message


def test_wrong_classes_and_swapped_files_are_refused(official, tmp_path):
    files = official_files(DATASET, 2, SEED)
    torch.save(build_classifier(TINY, 7).state_dict(), official / files.experts[1])
    with pytest.raises(CheckpointError, match=r"\(7,"):
        imported(official, tmp_path)
    shutil.copy(official / files.pretrained_student, official / files.experts[1])
    with pytest.raises(CheckpointError, match="missing"):
        imported(official, tmp_path)


@pytest.mark.parametrize("content", ["student", "width", "key"])
def test_aggregators_are_checked_strictly(official, tmp_path, content):
    files = official_files(DATASET, 2, SEED)
    path = official / files.pretrained_selector
    if content == "student":
        shutil.copy(official / files.meta_student, path)
    elif content == "width":
        torch.save(Aggregator(32, 1).state_dict(), path)
    else:
        edit(path, lambda state: state.pop("mlp.0.bias"))
    with pytest.raises(CheckpointError, match="pretrained_selector"):
        imported(official, tmp_path)


@pytest.mark.parametrize("content", ["code", "half", "garbage", "list"])
def test_files_that_are_no_state_dict_are_refused_unopened(official, tmp_path, content):
    path = official / official_files(DATASET, 2, SEED).experts[1]
    if content == "code":
        torch.save({"x": Opens(tmp_path / "ran")}, path)
    elif content == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(path.read_bytes()[:500] if content == "half" else b"garbage")
    with pytest.raises(CheckpointError, match="_1_exp_best"):
        imported(official, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_export_refuses_what_the_format_cannot_hold(official, tmp_path):
    parts = imported(official, tmp_path)
    out = tmp_path / "out"

    def refused(match, changed, kind="distill", error=CheckpointError):
        with pytest.raises(error, match=match):
            export_run(Sources(**{kind: changed}), DATASET, SEED, out, experts=2)
        assert not list(out.rglob("*.*")), "a failed export left files"

    good = source(parts["distill"])
    for name, value in (("pool", "max"), ("heads", 8)):
        meta = {**good.meta, "aggregator": {**good.meta["aggregator"], name: value}}
        refused(f"{name}={value}", Source(good.folder, "student", meta))
    other = {**good.meta, "backbone": {**good.meta["backbone"], "name": "torchvision:resnet18"}}
    refused("resnet18", Source(good.folder, "student", other))
    refused("kind 'model'", source(parts["expert-0"]))
    place = tmp_path / "moe"
    moe = build_student(TINY, 1, StudentMoESpec(num_experts=2))
    save_tensors(place / "model.safetensors", moe.state_dict())
    save_aggregator(place, Aggregator(moe.feature_dim, 1))
    refused("MoE block", Source(place, "student", good.meta))
    plain = Aggregator(moe.feature_dim, 1, plain_head=True)
    save_aggregator(place, plain)
    refused("mlp.0", Source(place, "aggregator", good.meta), "aggregator")
    with pytest.raises(SpecError, match="nothing to export"):
        export_run(Sources(), DATASET, SEED, out, experts=2)
    with pytest.raises(SpecError, match="differ"):
        export_run(sources(parts), DATASET, SEED, out, experts=5)


def test_files_that_exist_are_replaced_only_by_force(official, tmp_path):
    parts = imported(official, tmp_path)
    with pytest.raises(SpecError, match="already"):
        export_run(sources(parts), DATASET, SEED, tmp_path / "work")
    before = {path.name: path.read_bytes() for path in official.iterdir()}
    export_run(sources(parts), DATASET, SEED, tmp_path / "work", force=True)
    assert {path.name for path in official.iterdir()} == before.keys()


def test_densenet_with_the_last_relu_is_no_official_student(tmp_path):
    spec = BackboneSpec(name="torchvision:densenet121", last_relu=True)
    student = Source(tmp_path, "model", model_meta("student", spec, 1, 1024, DATASET))
    with pytest.raises(CheckpointError, match="last_relu"):
        export_run(Sources(student=student), DATASET, SEED, tmp_path / "out", experts=5)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["camelyon17", "iwildcam"])
def test_round_trip_of_the_real_networks(dataset, tmp_path):
    """DenseNet-121 and ResNet-50 with all their names and shapes; about 1 GB of temporary files."""
    outputs = {"camelyon17": 1, "iwildcam": 182}[dataset]
    backbone, files = backbone_of(dataset), official_files(dataset, 1, 1)
    name = {"camelyon17": "camelyon"}.get(dataset, dataset)
    folder = tmp_path / "work" / "model" / name
    folder.mkdir(parents=True)

    def write(file, shapes):
        generator = torch.Generator().manual_seed(len(file))
        state = {
            key: torch.tensor(5) if key.endswith("num_batches_tracked") else torch.randn(shape, generator=generator)
            for key, shape in shapes.items()
        }
        torch.save(state, folder / file)

    dim = 1024 if dataset == "camelyon17" else 2048
    write(files.experts[0], backbone_shapes("expert", backbone, outputs))
    write(files.meta_student, backbone_shapes("student", backbone, outputs))
    write(files.meta_selector, selector_shapes(dim, outputs))
    run = find_run(folder, dataset)
    parts = {part.name: part for part in import_run(run, working(tmp_path))}
    assert load_student(parts["distill"].folder, parts["distill"].meta).feature_dim == dim
    assert (
        load_tensors(parts["expert-0"].folder / "model.safetensors").keys()
        == backbone_shapes("expert", backbone, outputs).keys()
    )
    export_run(sources(parts), dataset, 1, tmp_path / "out")
    same_files(folder, tmp_path / "out" / "model" / name)
