"""m2mKD's entries and ends: released models, pretrained modules, few-shot episodes of circuits, noise, other sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moe.algorithms.m2mkd import PRESETS
from moe.errors import CheckpointError, DataError, SpecError
from moe.keymaps.m2mkd import to_official
from moe.models.nac.graph_specs import GRAPH_PRESETS
from orchestrator.stages.m2mkd_evaluate import M2mkdEvaluateConfig
from orchestrator.stages.m2mkd_train import M2mkdTrainConfig
from orchestrator.stages.m2mkd_train import Stage as TrainStage
from tests.workers import toy
from tests.workers.test_m2mkd_pipeline import CIRCUIT, METHOD, PHASE, RUN, VIT, Desk, config, network
from workers.context import Input
from workers.data import load_data, write_index
from workers.m2mkd_evaluate import evaluate_member, shared_classes
from workers.m2mkd_files import read_network
from workers.m2mkd_images import eval_reader
from workers.m2mkd_settings import FewShot
from workers.m2mkd_train import train_member
from workers.modelfile import MODEL_FILE, load_tensors, save_tensors

toy.register()
QUIET = replace(RUN, epochs=0)
WIDE = {**CIRCUIT["circuit"], "state_dim": 32}  # fewer channels of the tokenizer tell images hardly apart
LEARNS = {
    **CIRCUIT,
    "circuit": {**WIDE, "latent_graph_kwargs": {**WIDE["latent_graph_kwargs"], "code_dim": 32}},
    "circuit_students": {
        **CIRCUIT["circuit_students"],
        "share_kwargs": {**CIRCUIT["circuit_students"]["share_kwargs"], "state_dim": 32, "code_dim": 32},
    },
    "e2e": {**PHASE, "epochs": 20, "lr": 5e-3},
}
GRAPHS: dict[str, tuple[int, dict[str, Any]]] = {
    "barabasi-albert": (6, {"m": 2}),
    "scale-free": (6, {"m": 2}),
    "planted-partition": (6, {"l": 2, "k": 3, "p_in": 0.9, "p_out": 0.2}),
    "ring-of-cliques": (6, {"num_cliques": 2, "clique_size": 3}),
    "erdos-renyi": (6, {"p": 0.3}),
    "watts-strogatz": (6, {"k": 2, "p": 0.1}),
    "grid-graph": (6, {"dim": [2, 3]}),
    "balanced-tree": (7, {"r": 2, "h": 2}),
    "barbell": (6, {"m1": 3, "m2": 0}),
    "hypercube": (8, {}),
    "complete": (6, {}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Input:
    folder = tmp_path_factory.mktemp("data")
    return Input("data", "d", folder, write_index(load_data("toy", {}, folder), {}, folder))


def with_prior(name: str, **changes: Any) -> dict[str, Any]:
    """The circuit's settings with another graph prior."""
    count, kwargs = GRAPHS[name]
    graph = {
        **CIRCUIT["circuit"]["latent_graph_kwargs"],
        "num_mediator_latents": count,
        "mediator_latent_kwargs": {
            "graph_preset": name,
            "graph_generator_kwargs": {**kwargs, "num_iters": 5, **changes},
        },
    }
    return {**CIRCUIT, "circuit": {**CIRCUIT["circuit"], "latent_graph_kwargs": graph}}


def trained(folder: Path, data: Input, method: dict[str, Any], label: str = "a") -> Input:
    desk = Desk(folder, data=data)
    return desk.artifact(train_member(config(method), "e2e", None, RUN, (), label, desk))


def evaluation(desk: Desk) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((desk.output / "evaluation.json").read_text())
    return found


# Graph priors.


@pytest.mark.parametrize("name", GRAPH_PRESETS)
def test_every_graph_prior_is_a_choice_of_the_settings(name, data, tmp_path):
    meta = train_member(config(with_prior(name)), "e2e", None, QUIET, (), "a", Desk(tmp_path, data=data))
    assert meta["spec"]["latent_graph_kwargs"]["mediator_latent_kwargs"]["graph_preset"] == name
    signatures = load_tensors(tmp_path / "out" / MODEL_FILE)["latent_graphs.0.mediator_latents.signatures_"]
    assert len(signatures) == GRAPHS[name][0] and bool(signatures.isfinite().all())


def test_a_graph_of_another_size_is_refused_with_the_settings():
    with pytest.raises(ValidationError, match="ring-of-cliques of mediator_latent_kwargs has 8 nodes for 6 latents"):
        M2mkdTrainConfig(method=with_prior("ring-of-cliques", clique_size=4), phase="e2e")
    short = with_prior("erdos-renyi")
    del short["circuit"]["latent_graph_kwargs"]["mediator_latent_kwargs"]["graph_generator_kwargs"]["p"]
    with pytest.raises(ValidationError, match=r"'erdos-renyi' needs p; missing: \['p'\]"):
        M2mkdTrainConfig(method=short, phase="e2e")


# Files of other people.


def test_a_finished_model_enters_at_the_end(data, tmp_path):
    for name, method in (("vmoe", METHOD), ("circuit", CIRCUIT)):
        whole = trained(tmp_path / name, data, method)
        state = load_tensors(whole.path / MODEL_FILE)
        path = tmp_path / f"{name}.pth"
        torch.save({"model": to_official(state) if name == "vmoe" else state, "epoch": 3}, path)
        desk = Desk(tmp_path / f"{name} again", data=data)
        meta = train_member(config(method), "e2e", None, QUIET, (str(path),), "released", desk)
        found = load_tensors(desk.output / MODEL_FILE)
        assert all(torch.equal(found[key], value) for key, value in state.items())
        assert meta["label"] == "released" and meta["images"] == 0
        assert meta["scores"]["accuracy"] == pytest.approx(whole.meta["scores"]["accuracy"]) or name == "circuit"
        # Another family, and both ways at once.
        other = METHOD if name == "circuit" else CIRCUIT
        with pytest.raises(CheckpointError, match=r"does not fit|not of this circuit"):
            train_member(config(other), "e2e", None, QUIET, (str(path),), "x", Desk(tmp_path / "x", data=data))
        with pytest.raises(SpecError, match="has files and a network"):
            own = Desk(tmp_path / "y", data=data, init=whole)
            train_member(config(method), "e2e", None, QUIET, (str(path),), "y", own)


def test_a_head_of_other_classes_stays_fresh_on_demand(data, tmp_path):
    source = network(tmp_path / "many", config().teacher.model_copy(update={"num_classes": 9}))
    path = str(source.path / MODEL_FILE)
    with pytest.raises(CheckpointError, match=r"head.weight is \(9, 16\) instead of \(3, 16\)"):
        train_member(config(), "ft", None, QUIET, (path,), "", Desk(tmp_path / "strict", data=data))
    desk = Desk(tmp_path / "fresh", data=data)
    train_member(config(), "ft", None, replace(QUIET, fresh_head=True), (path,), "", desk)
    found, given = load_tensors(desk.output / MODEL_FILE), load_tensors(source.path / MODEL_FILE)
    assert found["head.weight"].shape == (3, 16)
    assert torch.equal(found["blocks.5.attn.qkv.weight"], given["blocks.5.attn.qkv.weight"])


def test_a_meta_model_takes_blocks_of_a_deep_network_and_modules_enter_it(data, tmp_path):
    deep = network(tmp_path / "deep", config().teacher, 1)
    path, given = str(deep.path / MODEL_FILE), load_tensors(deep.path / MODEL_FILE)
    desk = Desk(tmp_path / "meta", data=data)
    meta = train_member(config(), "pt", None, replace(QUIET, take_blocks=(0, 2, 5)), (path,), "meta", desk)
    found = load_tensors(desk.output / MODEL_FILE)
    for place, block in enumerate((0, 2, 5)):
        assert torch.equal(found[f"blocks.{place}.mlp.fc1.weight"], given[f"blocks.{block}.mlp.fc1.weight"])
    with pytest.raises(CheckpointError, match=r"Blocks \[0, 2, 9\] of .* which has 6"):
        bad = replace(QUIET, take_blocks=(0, 2, 9))
        train_member(config(), "pt", None, bad, (path,), "", Desk(tmp_path / "bad", data=data))
    # Phase mt: the module of the position, inside of that meta model.
    hybrid = Desk(tmp_path / "hybrid", data=data, init=desk.artifact(meta))
    train_member(config(), "mt", 1, QUIET, (path,), "", hybrid)
    state = load_tensors(hybrid.output / MODEL_FILE)
    for block, (source, own) in enumerate([(found, 0), (given, 2), (given, 3), (found, 2)]):
        assert torch.equal(state[f"blocks.{block}.mlp.fc2.weight"], source[f"blocks.{own}.mlp.fc2.weight"])


def test_what_the_packaged_vit_cannot_be_is_said_before_anything_runs():
    small = {**METHOD, "teacher": {**VIT, "depths": [2, 2, 2]}}
    with pytest.raises(ValidationError, match="vit_small_focus has width 384, 6 heads, 12 blocks"):
        M2mkdTrainConfig(method=small, phase="ft", take=["vit_small_focus"])
    given = M2mkdTrainConfig(method=METHOD, phase="e2e", take=["/nowhere/vmoe_base.pth"])
    ((place, message, _),) = TrainStage().examine(given)
    assert place == ("take", 0) and "no weights file /nowhere/vmoe_base.pth" in message


# Evaluation.


def test_few_shot_episodes_of_a_circuit_train_its_classifier_alone(data, tmp_path):
    model = trained(tmp_path / "a", data, LEARNS)
    shots = FewShot(split="train", k_way=3, n_shot=4, queries=5, episodes=3)
    fs = {**PHASE, "batch_size": 12, "epochs": 60, "lr": 0.05, "optimizer": "sgd", "schedule": "constant"}
    accuracies = []
    for lr in (1e-7, 0.05):
        own = config(CIRCUIT, fs={**fs, "lr": lr})
        desk, again = (Desk(tmp_path / f"{name}{lr}", data=data, models=model) for name in ("one", "again"))
        for each in (desk, again):
            evaluate_member(own, ("test",), shots, 32, each)
        assert evaluation(again) == evaluation(desk)  # noise while training included
        accuracies.append(evaluation(desk)["models"][0]["few_shot"]["mean"])
    assert accuracies[0] < 0.8 < accuracies[1]
    preset = PRESETS["tiny_imagenet_nac_scale_free"]["fs"]
    assert (preset["optimizer"], preset["lr"], preset["epochs"]) == ("sgd", 3e-4, 500)


def test_official_evaluation_is_noisy_and_leaves_a_vits_last_batch_out(data, tmp_path):
    learned, vmoe = trained(tmp_path / "a", data, LEARNS), trained(tmp_path / "v", data, METHOD)
    # So much noise that it changes many predictions: one image more or less is a matter of rounding.
    circuit = replace(learned, path=tmp_path / "loud")
    state = load_tensors(learned.path / MODEL_FILE)
    logvar = "latent_graphs.0.latent_seeder.code_to_state_logvar.bias"
    save_tensors(circuit.path / MODEL_FILE, {**state, logvar: state[logvar] + 8})

    def scores(name: str, method: dict[str, Any], model: Input, **more: Any) -> dict[str, float]:
        desk = Desk(tmp_path / name, data=data, models=model)
        draws = more.pop("draws", 1)
        evaluate_member(config(method, **more), ("train",), None, 64, desk, draws)
        found: dict[str, float] = evaluation(desk)["models"][0]["scores"]["train"]
        return {**found, "rows": evaluation(desk)["rows"]["train"]}

    quiet = scores("quiet", CIRCUIT, circuit)
    one, eight = (scores(f"d{n}", CIRCUIT, circuit, parity="official", draws=n) for n in (1, 8))
    assert max(one["accuracy"], eight["accuracy"]) < quiet["accuracy"] - 0.2
    assert eight == scores("again", CIRCUIT, circuit, parity="official", draws=8)
    whole, cut = (scores(p, METHOD, vmoe, parity=p) for p in ("fixed", "official"))
    for found in (whole, cut):  # one batch of 64 of the 96 rows
        assert round(found["rows"] * found["accuracy"], 6).is_integer()
    assert [found["rows"] for found in (one, whole, cut)] == [96, 96, 64]
    with pytest.raises(ValueError, match="draws=2 has no effect"):
        M2mkdEvaluateConfig(method=CIRCUIT, draws=2)


def test_a_set_of_fewer_classes_is_scored_on_its_own_columns(data, tmp_path, monkeypatch):
    whole = load_data("toy", {}, tmp_path)
    named = replace(whole, value_names={**whole.value_names, "y": ("a", "b", "c")})
    rows = np.flatnonzero(whole.labels > 0)
    part = replace(
        named,
        info=replace(whole.info, name="part", num_outputs=2),
        labels=whole.labels - 1,
        splits={**whole.splits, "test": rows},
        value_names={**whole.value_names, "y": ("b", "c")},
    )
    assert shared_classes(named, part).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"toy has the classes a, which part does not know .1 of 3"):
        shared_classes(part, named)
    with pytest.raises(DataError, match="no names of classes"):
        shared_classes(named, replace(part, value_names={}))
    other = Input("part", "p", tmp_path, {})
    monkeypatch.setattr("workers.m2mkd_evaluate.open_data", lambda a, root: part if a is other else named)
    model = trained(tmp_path / "m", data, METHOD)
    desk = Desk(tmp_path / "e", data=data, models=model, ood=other)
    evaluate_member(config(), ("test",), None, 32, desk)
    record = evaluation(desk)
    assert record["splits"] == ["test", "part"] and record["rows"]["part"] == len(rows)
    logits = read_network(model)(eval_reader(named, 12, config().augment, 0).read(rows)).detach()
    right = (logits[:, 1:].argmax(1).numpy() == whole.labels[rows] - 1).mean()
    assert record["models"][0]["scores"]["part"]["accuracy"] == pytest.approx(right)
