"""MoE Jetpack's stages end to end on tiny networks: shards, strategies, baselines, resuming, the report, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moe.errors import CheckpointError, DataError, Interrupted, NotFoundError, SpecError
from moe.keymaps.jetpack import to_official
from orchestrator.stages.jetpack_recycle import JetpackRecycleConfig
from orchestrator.stages.jetpack_train import JetpackTrainConfig
from serve.model import ServedModel
from tests.support.draws import leaves_random_alone
from tests.support.pipelines import go, pipeline
from tests.workers import toy
from tests.workers.test_loop import Recorder
from workers.context import Input
from workers.data import load_data, write_index
from workers.jetpack_images import TrainingImages
from workers.jetpack_recycle import open_network, recycle_member
from workers.jetpack_report import Run, _row
from workers.jetpack_settings import RecipeSettings, RecycleSettings, Start, StatisticsSettings
from workers.jetpack_statistics import STATISTICS, dense_network, merged_statistics, network_digest, statistics_member
from workers.jetpack_train import CURVE, _Run, train_member
from workers.modelfile import MODEL_FILE, load_student, load_tensors, save_tensors
from workers.transforms import transform_for

SIDE = 32
TEACHER = {"name": "timm:test_vit", "image_size": SIDE}  # width 64, 6 blocks, 192 hidden neurons
EXPERTS = {"core_experts": 2, "univ_experts": 4, "compress_ratio": 0.75, "noise": True, "drop": 0.1}
MODEL = {
    "image_size": SIDE,
    "patch_size": 16,
    "dim": 32,
    "depth": 4,
    "num_heads": 1,
    "mlp_ratio": 3.0,
    "drop_path": 0.1,
    "moe": EXPERTS,
    "moe_layers": [2, 3],
}
PASS = {"predecessor": TEACHER, "batch_size": 8, "images": 60}
RECIPE = {
    "batch_size": 16,
    "epochs": 2,
    "schedule": {"warmup_epochs": 1, "cosine_epochs": 1},
    "augment": "none",
    "evaluate_every": 3,
}
STARTS: dict[str, dict[str, Any]] = {
    "dense random": {"network": "dense"},
    "dense recycled": {"network": "dense", "recycle": {}},
    "Soft MoE random": {"network": "soft_moe"},
    "Soft MoE recycled": {"network": "soft_moe", "recycle": {"select": "uniform"}},
    "random": {},
    "L2": {"recycle": {}},
}


class World(Recorder):
    """A member's context without an executor."""

    def __init__(self, folder: Path, member: str = "seed=1/x", stop_after: int | None = None, **inputs: Any) -> None:
        super().__init__(stop_after)
        self.run, self.member, self.seed, self.threads, self.inputs = "r", member, 0, 1, inputs
        self.output, self.scratch, self.data_root = folder / "out", folder / "scratch", folder / "data"
        for path in (self.output, self.scratch):
            path.mkdir(parents=True, exist_ok=True)

    def metrics(self, values: Any, step: int | None = None) -> None: ...


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Input:
    toy.register()
    folder, options = tmp_path_factory.mktemp("data"), {"size": SIDE}
    return Input("data", "d", folder, write_index(load_data("toy", options, folder), options, folder))


def measured(folder: Path, data: Input, shard: int = 0, **changes: Any) -> Input:
    context = World(folder, "", data=[data])
    settings = StatisticsSettings(**{**PASS, **changes})
    return Input(f"shard={shard}", "s", context.output, statistics_member(settings, shard, context))


@pytest.fixture(scope="module")
def statistics(data, tmp_path_factory) -> Input:
    return measured(tmp_path_factory.mktemp("statistics"), data)


def recycle(folder: Path, data: Input, start: dict[str, Any], *shards: Input, seed: int = 1, **changes: Any) -> Input:
    settings = RecycleSettings(**{"model": MODEL, "predecessor": TEACHER, "starts": {"x": start}, **changes})
    context = World(folder, f"seed={seed}/start=x", data=[data], statistics=list(shards))
    meta = recycle_member(settings, "x", settings.starts["x"], context)
    return Input(context.member, "i", context.output, meta)


def train(folder: Path, data: Input, start: Input, stop_after: int | None = None, **changes: Any) -> Input:
    context = World(folder, start.member, stop_after, data=[data], start=[start])
    meta = train_member(RecipeSettings(**{**RECIPE, **changes}), context)
    return Input(start.member, "t", context.output, meta)


def state_of(artifact: Input) -> dict[str, torch.Tensor]:
    return load_tensors(artifact.path / MODEL_FILE)


# The whole pipeline.


def spec(starts=STARTS, **recipe: Any):
    data = "${stages.data}"
    return pipeline(
        {
            "data": {"kind": "prepare", "config": {"dataset": "toy", "options": {"size": SIDE}}},
            "statistics": {"kind": "jetpack_statistics", "inputs": {"data": data}, "config": {**PASS, "shards": 2}},
            "recycle": {
                "kind": "jetpack_recycle",
                "inputs": {"data": data, "statistics": "${stages.statistics}"},
                "config": {"model": MODEL, "predecessor": TEACHER, "starts": starts},
            },
            "train": {
                "kind": "jetpack_train",
                "inputs": {"data": data, "start": "${stages.recycle}"},
                "config": {**RECIPE, "starts": list(starts), **recipe},
            },
            "report": {
                "kind": "jetpack_report",
                "inputs": {"runs": "${stages.train}"},
                "config": {"title": "T", "reference": "random", "targets": [0.2]},
            },
        },
        seeds=(0, 1),
    )


def test_the_whole_pipeline_with_a_report(store):
    toy.register()
    outcome, run = go(spec(save_model=["L2"]), store)
    assert outcome.status == "finished", [e.data for e in run.events() if "fail" in e.kind]
    report = store.local_path(store.artifact(outcome.artifacts["report"]))
    table = json.loads((report / "table.json").read_text())
    assert [row["start"] for row in table["rows"]] == list(STARTS)
    assert all(row["final"]["seeds"] == 2 for row in table["rows"])
    assert "times fewer than random" in (report / "table.md").read_text()
    assert (report / "report.html").read_text().count("data:image/png") == 1

    again, _ = go(spec(save_model=["L2"]), store)
    assert again.artifacts == outcome.artifacts

    # One start keeps its weights: it is what a run serves, member by member.
    with pytest.raises(SpecError, match="has 2 models") as caught:
        ServedModel.load(run.id, store.url)
    assert f"{run.id}/train/seed=0/start=L2" in caught.value.hint
    served = ServedModel.load(f"{run.id}/train/seed=1/start=L2", store.url)
    assert served.info.outputs == 3 and served.info.version == outcome.artifacts["train/seed=1/start=L2"]
    with pytest.raises(NotFoundError, match="keeps no weights"):
        ServedModel.load(f"{run.id}/train/seed=1/start=random", store.url)

    more = {**STARTS, "uniform": {"recycle": {"select": "uniform"}}}
    wider, _ = go(spec(more, save_model=["L2"]), store)
    for name, digest in outcome.artifacts.items():
        if name != "report":
            assert wider.artifacts[name] == digest  # what was there is not made again


CONVNEXT = {
    "image_size": SIDE,
    "dims": (12, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "moe": EXPERTS | {"compress_ratio": 1.0},
    "moe_layers": (2, 3, 4),
    "stage_experts": (None, None, None, (1, 2)),
}


def test_a_convnext_goes_the_same_way(data, tmp_path):
    predecessor = {"name": "timm:test_convnext"}
    shards = [measured(tmp_path / f"s{i}", data, i, shards=2, predecessor=predecessor) for i in range(2)]
    changes = {"model": CONVNEXT, "predecessor": predecessor}
    for name in ("Soft MoE random", "dense recycled", "random", "L2"):
        start = recycle(tmp_path / name, data, STARTS[name], *shards, **changes)
        assert start.meta["form"] == "jetconvnext"
        assert set(start.meta["origin"]) == ({"predecessor", "fresh"} if "recycle" in STARTS[name] else {"fresh"})
        run = train(tmp_path / f"run {name}", data, start, rates={"rule": "default", "lr": 1e-3})
        network = open_network(run)
        assert network(torch.randn(2, 3, SIDE, SIDE)).shape == (2, 3)
        student = load_student(run.path, run.meta)
        assert torch.equal(student(torch.ones(1, 3, SIDE, SIDE)), network(torch.ones(1, 3, SIDE, SIDE)))
    with pytest.raises(SpecError, match="counts the blocks of a vision transformer"):
        train(tmp_path / "layer decay", data, start)
    given = recycle(tmp_path / "file", data, {"weights": str(start.path / MODEL_FILE)}, **changes)
    assert given.meta["origin"]["file"] == len(state_of(start))
    with pytest.raises(DataError, match="statistics of another model"):
        recycle(tmp_path / "x", data, STARTS["L2"], measured(tmp_path / "vit", data), **changes)


# Statistics.


def test_shards_merge_to_the_pass(data, statistics, tmp_path):
    digest = statistics.meta["digest"]
    shards = [measured(tmp_path / str(i), data, i, shards=3) for i in range(3)]
    whole, merged = (merged_statistics(found, digest, "t") for found in ([statistics], shards[::-1]))
    assert whole is not None and merged is not None and whole.values.keys() == merged.values.keys()
    for key, layers in whole.values.items():
        for layer, value in layers.items():
            torch.testing.assert_close(merged.values[key][layer], value, rtol=1e-6, atol=0)


def test_an_interrupted_pass_ends_with_the_same_bytes(data, tmp_path):
    whole = measured(tmp_path / "whole", data, checkpoint_every=2)
    settings = StatisticsSettings(**PASS, checkpoint_every=2)
    with pytest.raises(Interrupted):
        statistics_member(settings, 0, World(tmp_path / "cut", "", 2, data=[data]))
    context = World(tmp_path / "cut", "", data=[data])
    assert statistics_member(settings, 0, context) == whole.meta
    assert context.progressed[0][0] == 5  # four batches were there
    assert (context.output / STATISTICS).read_bytes() == (whole.path / STATISTICS).read_bytes()


# Recycling.


@pytest.mark.parametrize("select", ["L1", "L2", "act_patrn", "random", "uniform", "co_act"])
def test_every_strategy_cuts_experts_out_of_the_predecessor(select, data, tmp_path):
    options: dict[str, Any] = {"select": select}
    if select == "co_act":
        options["graph"] = {"method": "louvain", "parts": 4}
    metrics = ["co_act"] if select == "co_act" else ["L1", "L2", "act_patrn"]
    shard = measured(tmp_path / "s", data, statistics={"metrics": metrics})
    made = recycle(tmp_path / "r", data, {"recycle": options}, shard)
    state, teacher = (
        state_of(made),
        dense_network(RecycleSettings(model=MODEL, predecessor=TEACHER).predecessor, tmp_path),
    )
    for block in (2, 3):
        source = set(teacher.state_dict()[f"blocks.{block}.mlp.fc1.weight"].flatten().tolist())
        for family in ("core_experts", "univ_experts"):
            expert = state[f"blocks.{block}.mlp.{family}.vit_fc1.weight"]
            assert set(expert.flatten().tolist()) <= source
    assert set(made.meta["origin"]) == {"predecessor", "fresh"}
    assert open_network(made)(torch.randn(1, 3, SIDE, SIDE)).shape == (1, 3)


def test_starts_of_a_seed_share_what_is_random_and_the_dense_part(data, statistics, tmp_path):
    made = {
        name: state_of(recycle(tmp_path / name, data, start, *([statistics] if "recycle" in start else [])))
        for name, start in STARTS.items()
    }
    for name in ("head.weight", "blocks.2.mlp.phi"):
        assert torch.equal(made["random"][name], made["L2"][name])
    dense = [name for name in made["L2"] if not name.startswith(("head", "fc_norm")) and "mlp" not in name]
    assert len(dense) == 36
    assert all(torch.equal(made["L2"][name], made["dense recycled"][name]) for name in dense)
    other = state_of(recycle(tmp_path / "other", data, {}, seed=2))
    assert not torch.equal(other["head.weight"], made["random"]["head.weight"])


def test_only_the_dense_part_when_experts_stay_fresh(data, statistics, tmp_path):
    whole = state_of(recycle(tmp_path / "a", data, {"recycle": {}}, statistics))
    part = state_of(recycle(tmp_path / "b", data, {"recycle": {}, "experts": "fresh"}, statistics))
    plain = state_of(recycle(tmp_path / "c", data, {}))
    for name, value in part.items():
        assert torch.equal(value, (plain if "experts" in name else whole)[name])


def test_upcycling_copies_the_donors_networks(data, tmp_path):
    model = {**MODEL, "dim": 64, "depth": 6, "num_heads": 2}
    start = {"network": "soft_moe", "source": "donor", "recycle": {"select": "copy"}}
    state = state_of(recycle(tmp_path, data, start, model=model, donor=TEACHER, soft_experts=3))
    teacher = dense_network(RecycleSettings(model=MODEL, predecessor=TEACHER).predecessor, tmp_path).state_dict()
    for expert in state["blocks.3.mlp.experts.vit_fc2.weight"]:
        assert torch.equal(expert, teacher["blocks.3.mlp.fc2.weight"])


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_a_file_with_the_released_names(form, data, tmp_path):
    given = recycle(tmp_path / "a", data, {}, seed=5)
    network = open_network(given)
    settings = RecycleSettings(model=MODEL, predecessor=TEACHER)
    stored = to_official(network, settings.network(Start()), form)
    (stored.get("state_dict", stored))["head.weight" if form == "flat" else "backbone.head.weight"] = torch.zeros(9, 32)
    torch.save(stored, tmp_path / "file.pt")
    made = recycle(tmp_path / "b", data, {"weights": str(tmp_path / "file.pt")})
    ours, theirs = state_of(made), state_of(given)
    assert made.meta["origin"]["fresh"] == 2  # a head of nine classes does not fit
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if not name.startswith("head."))


# Fine-tuning.


def test_an_interrupted_fine_tuning_ends_with_the_same_bytes(data, tmp_path):
    start = recycle(tmp_path / "start", data, {})
    changes = {"checkpoint_every": 1, "accumulate": 2, "ema_decay": 0.9, "augment": "rand"}
    whole = train(tmp_path / "whole", data, start, **changes)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", data, start, stop_after=3, **changes)
    resumed = train(tmp_path / "cut", data, start, **changes)
    assert resumed.meta == whole.meta
    for name in (CURVE, MODEL_FILE):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_starts_of_a_seed_see_the_same_mixed_batches(data, tmp_path):
    runs = []
    for name, start in (("a", {}), ("b", {"network": "dense"})):
        made = recycle(tmp_path / name, data, start)
        context = World(tmp_path / f"{name}-run", made.member, data=[data])
        network, device = open_network(made), torch.device("cpu")
        settings = RecycleSettings(model=MODEL, predecessor=TEACHER)
        toy_set = load_data("toy", {"size": SIDE}, tmp_path)
        recipe = RecipeSettings(**{**RECIPE, "accumulate": 4})
        runs.append(
            _Run(recipe, toy_set, network, settings.network(Start(**start)), settings.model, context, device)  # type: ignore[arg-type]
        )
    first, second = runs
    assert first.per_epoch == 6 and first.steps == 3
    for update in range(3):
        for one, other in zip(first.batches(update), second.batches(update), strict=True):
            assert torch.equal(one.batch[0], other.batch[0]) and torch.equal(one.batch[1], other.batch[1])
            assert one.weight == 1 / 4
    assert first.factor(0) == first.method.config.schedule.factor(3, 6)  # micro-batches count


def test_augmentation_is_a_function_of_its_seed(data, tmp_path):
    toy_set = load_data("toy", {"size": SIDE}, tmp_path)
    transform = transform_for(toy_set.info, SIDE, train=False, channels=3)
    rows = toy_set.splits["train"][:8]
    images = TrainingImages(toy_set, transform, "rand")
    torch.manual_seed(3)
    expected = torch.rand(1)
    np.random.seed(1), torch.manual_seed(3)
    before = np.random.get_state()[1].copy()
    first = images.read(rows, 7)
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(np.random.get_state()[1], before) and leaves_random_alone(lambda: images.read(rows, 7))
    assert first.shape == (8, 3, SIDE, SIDE)
    assert torch.equal(first, images.read(rows, 7)) and not torch.equal(first, images.read(rows, 8))
    plain = TrainingImages(toy_set, transform, "none").read(rows, 7)
    assert torch.equal(plain, TrainingImages(toy_set, transform, "none").read(rows, 8))


# The report.


def test_updates_to_a_target_are_compared_within_a_seed():
    def made(seed: int, *scores: float) -> Run:
        meta = {"seed": seed, "network": "sphero", "parameters": 1, "tests": {}, "metric": "accuracy"}
        return Run(meta, (10, 20, 40), scores)

    reference = [made(0, 0.1, 0.4, 0.6), made(1, 0.2, 0.3, 0.4)]
    fast = [made(0, 0.6, 0.6, 0.6), made(1, 0.1, 0.5, 0.7)]
    row = _row("fast", fast, reference, (0.4, 0.5))
    assert row["reached"][0] == {"mean": 15.0, "reached": 2, "runs": 2}
    first, second = row["speedup"]
    assert first == {"ratio": pytest.approx(2.0), "bound": False}  # 20/10 and 40/20
    assert second == {"ratio": pytest.approx(8**0.5), "bound": True}  # 40/10 and at least 40/20
    assert _row("fast", fast, reference, (0.65,))["speedup"] == [None]


# Bad input, before any training.


@pytest.mark.parametrize(
    ("recycle", "words"),
    [
        ({"select": "L2", "graph": {"weights": "scaled"}}, "graph has no effect with select: L2"),
        ({"select": "co_act", "graph": {"method": "louvain", "weights": "scaled"}}, "weights=scaled has no effect"),
        ({"select": "co_act", "graph": {"resolution": 2.0}}, "resolution=2.0 has no effect with method: metis"),
    ],
)
def test_options_of_another_partition_are_refused(recycle, words):
    with pytest.raises(ValueError, match=words):
        Start(recycle=recycle)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed=1 has no effect"),
        ({"statistics": {"averaging": "positions", "group": 2}}, "group=2 has no effect with averaging: positions"),
        ({"statistics": {"percentile": 50.0}}, "percentile=50.0 has no effect with threshold: fixed"),
    ],
)
def test_options_of_another_statistic_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        StatisticsSettings(predecessor={"name": "vit_small_focus"}, **changes)


def test_predecessor_and_successor_are_of_one_family():
    with pytest.raises(ValidationError, match="is a ConvNeXt, but the successor is a vision transformer"):
        RecycleSettings(model=MODEL, predecessor={"name": "timm:convnext_tiny"})
    with pytest.raises(ValidationError, match="the donor 'timm:test_vit' is a vision transformer"):
        RecycleSettings(model=CONVNEXT, predecessor={"name": "timm:convnext_tiny"}, donor=TEACHER)


def test_another_family_is_refused_when_the_file_is_read():
    with pytest.raises(ValidationError, match="not a vision transformer"):
        RecycleSettings(model=MODEL, predecessor={"name": "torchvision:resnet18"})
    with pytest.raises(ValidationError, match="not a vision transformer"):
        StatisticsSettings(predecessor={"name": "tiny_cnn"})


def test_a_network_of_timm_that_is_no_plain_transformer_is_named(data, tmp_path):
    with pytest.raises(CheckpointError, match="vision transformer"):
        measured(tmp_path, data, predecessor={"name": "timm:test_resnet"})


def test_statistics_of_another_model_are_refused(data, statistics, tmp_path):
    path = tmp_path / "other.safetensors"
    teacher = dense_network(RecycleSettings(model=MODEL, predecessor=TEACHER).predecessor, tmp_path)
    save_tensors(path, {name: value + 1 for name, value in teacher.state_dict().items()})
    with pytest.raises(DataError, match="statistics of another model"):
        recycle(tmp_path, data, {"recycle": {}}, statistics, predecessor={**TEACHER, "pretrained": str(path)})


def test_the_digest_of_a_model_looks_past_head_and_positions(tmp_path):
    state = dense_network(RecycleSettings(model=MODEL, predecessor=TEACHER).predecessor, tmp_path).state_dict()
    changed = {**state, "pos_embed": state["pos_embed"] + 1, "head.weight": torch.zeros(7, 64)}
    assert network_digest(changed) == network_digest(state)
    assert network_digest({**state, "norm.bias": state["norm.bias"] + 1}) != network_digest(state)


def test_a_missing_or_repeated_shard_is_named(data, tmp_path):
    shards = [measured(tmp_path / str(i), data, i, shards=2) for i in range(2)]
    for given in (shards[:1], [shards[0], shards[0], shards[1]]):
        with pytest.raises(DataError, match="has 2 shards"):
            recycle(tmp_path / "r", data, {"recycle": {}}, *given)


def test_statistics_that_are_needed_but_not_there(data, statistics, tmp_path):
    with pytest.raises(SpecError, match="needs activation statistics"):
        recycle(tmp_path, data, {"recycle": {}})
    with pytest.raises(SpecError, match="no 'co_act'"):
        recycle(tmp_path, data, {"recycle": {"select": "co_act"}}, statistics)
    with pytest.raises(SpecError, match="60 shards share only 8 batches"):
        measured(tmp_path, data, shards=60)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": 8}, CheckpointError, "8 blocks, the predecessor only 6"),
        ({"dim": 128, "num_heads": 2}, CheckpointError, "larger than the predecessor"),
        ({"mlp_ratio": 4.0}, CheckpointError, "has shape"),
    ],
)
def test_sizes_that_do_not_fit(change, error, words, data, statistics, tmp_path):
    with pytest.raises(error, match=words):
        recycle(tmp_path, data, {"recycle": {}}, statistics, model={**MODEL, **change})
    if "shape" not in words:  # nor is the start beside it trained, which needs no predecessor
        with pytest.raises(error, match=words):
            beside = {"x": {}, "other": {"recycle": {}}}
            recycle(tmp_path, data, {}, model={**MODEL, **change}, starts=beside)


def test_blocks_that_do_not_exist_and_models_without_experts():
    with pytest.raises(ValidationError, match="do not exist"):
        JetpackRecycleConfig(model={**MODEL, "moe_layers": [3, 4]}, predecessor=TEACHER)
    with pytest.raises(ValidationError, match="needs a SpheroMoE"):
        JetpackRecycleConfig(model={**MODEL, "moe": None, "moe_layers": []}, predecessor=TEACHER)
    with pytest.raises(ValidationError, match="there is no donor"):
        JetpackRecycleConfig(
            model=MODEL, predecessor=TEACHER, starts={"a": {"source": "donor", "recycle": {"select": "copy"}}}
        )


def test_presets_are_those_of_the_algorithm():
    config = JetpackTrainConfig(preset="pets-paper", batch_size=8)
    assert (config.epochs, config.schedule.warmup_epochs, config.batch_size) == (600, 100, 8)
    made = JetpackRecycleConfig(preset="imagenet1k", predecessor=TEACHER, model={"image_size": 112})
    assert made.model.moe_layers == (6, 7, 8, 9, 10, 11) and made.model.image_size == 112
    with pytest.raises(ValidationError, match="Did you mean 'pets-paper'"):
        JetpackTrainConfig(preset="pets-papre")


def test_a_start_for_other_classes_is_refused(data, tmp_path):
    start = recycle(tmp_path / "a", data, {})
    wrong = Input(start.member, "i", start.path, {**start.meta, "dataset": "digits5"})
    with pytest.raises(SpecError, match="Wire one data set"):
        train(tmp_path / "b", data, wrong)
