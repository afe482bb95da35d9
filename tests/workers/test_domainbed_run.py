"""One run of a sweep: official draws, records, what may be left out, kill and resume, folders of the public code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.errors import DataError, Interrupted, SpecError
from workers.domainbed.algorithms import MethodSpec, make_algorithm, method_of
from workers.domainbed.environments import open_environments
from workers.domainbed.hparams import default_hparams
from workers.domainbed.jobs import DONE, RESULTS, Sweep, job_id, sweep_jobs
from workers.domainbed.records import read_run
from workers.domainbed.run import RunSettings, run_job, write_records
from workers.domainbed.selection import run_choices
from workers.domainbed.takeover import export_runs, take_over
from workers.modelfile import MODEL_FILE, load_tensors

STEPS = 7


class Desk:
    """A member's context in a folder; ``stop_after`` interrupts at that checkpoint."""

    run, member, seed, threads, inputs = "r", "m", 0, 1, {}

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.output, self.scratch, self.data_root = folder / "output", folder / "scratch", folder / "data"
        for path in (self.output, self.scratch, self.data_root):
            path.mkdir(parents=True, exist_ok=True)
        self.stop_after = stop_after

    def progress(self, done: int, total: int, **values: float) -> None: ...

    def log(self, message: str) -> None: ...

    def metrics(self, values, step=None) -> None: ...

    def check(self) -> None:
        if self.stop_after is not None:
            self.stop_after -= 1
            if not self.stop_after:
                raise Interrupted("stop")


def arguments(algorithm: str = "ERM", test_envs: tuple[int, ...] = (0,), **changes):
    sweep = Sweep(
        datasets=("Debug28",), algorithms=(algorithm,), n_trials=1, n_hparams=1, steps=STEPS, data_dir="data",
        hparams='{"batch_size": 4}', **changes,
    )  # fmt: skip
    return next(job.train_args for job in sweep_jobs(sweep) if job.train_args["test_envs"] == list(test_envs))


def settings(**changes) -> RunSettings:
    methods = {name: MethodSpec(algorithm=name.lower()) for name in ("SWAD", "SMA")}
    return RunSettings(**{"protocol": "domainbed_2020", "methods": methods, "checkpoint_freq": 2, **changes})


def run(folder: Path, algorithm: str = "ERM", **changes) -> list[dict]:
    run_job(arguments(algorithm), settings(**changes), Desk(folder))
    return [json.loads(line) for line in (folder / "output" / RESULTS).read_text().splitlines()]


def test_records_are_those_of_the_public_code(tmp_path):
    records = run(tmp_path)
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    for record in records:
        assert {f"env{e}_{part}_acc" for e in range(3) for part in ("in", "out")} <= record.keys()
        assert record["args"] == arguments()
        assert record["hparams"]["batch_size"] == 4
        assert record["epoch"] == record["step"] / (13 / 4)
    read = read_run(tmp_path / "output")
    assert read.state == "done"
    assert read.records[0].in_acc == tuple(records[0][f"env{e}_in_acc"] for e in range(3))


def test_the_environments_are_drawn_first_from_the_seed(tmp_path):
    args = arguments()
    torch.manual_seed(args["seed"])
    expected = torch.randn(16, 3, 28, 28)
    torch.manual_seed(args["seed"])
    data = open_environments("Debug28", tmp_path, torch.default_generator)
    rows = np.arange(16)
    assert torch.equal(data.environments[0].batch(rows, False, np.random.default_rng(0)), expected)


@pytest.mark.parametrize("algorithm", ["ERM", "Fish", "IRM", "CORAL", "SWAD", "SMA"])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, algorithm):
    run(tmp_path / "whole", algorithm)
    for stop in (1, 2):
        with pytest.raises(Interrupted):
            run_job(arguments(algorithm), settings(resume_every=3), Desk(tmp_path / "killed", stop_after=stop))
    run(tmp_path / "killed", algorithm, resume_every=3)
    for name in (RESULTS, DONE):
        assert (tmp_path / "killed/output" / name).read_bytes() == (tmp_path / "whole/output" / name).read_bytes()


@pytest.mark.parametrize("algorithm", ["ERM", "SWAD"])
@pytest.mark.parametrize("method", ["iid", "oracle"])
def test_what_is_left_out_changes_no_selection(tmp_path, algorithm, method):
    exact = run(tmp_path / "exact", algorithm)
    needed = run(tmp_path / "needed", algorithm, evaluation="needed")
    left_out = [sum(math.isnan(value) for value in r.values() if isinstance(value, float)) for r in needed]
    assert all(left_out[:-1])
    for one, other in zip(exact, needed, strict=True):
        same = [
            one[key] == other[key] for key in other if not (isinstance(other[key], float) and math.isnan(other[key]))
        ]
        assert all(same)
    choices = [run_choices(read_run(tmp_path / name / "output").records, method) for name in ("exact", "needed")]
    assert choices[0] == choices[1]
    assert choices[0][0].accuracy is not None


def test_an_early_end_changes_no_selection_either(tmp_path):
    swad = {"converge": 1, "tolerance": 1, "ratio": 1.0, "train": {"lr": 0.05}}
    methods = {"SWAD": MethodSpec(algorithm="swad", config=swad)}
    choices = []
    for evaluation in ("exact", "needed"):
        meta = run_job(
            {**arguments("SWAD"), "steps": 40},
            settings(methods=methods, evaluation=evaluation),
            Desk(tmp_path / evaluation),
        )
        assert meta["steps"] < 40
        records = read_run(tmp_path / evaluation / "output").records
        choices.append([run_choices(records, method)[0].accuracy for method in ("iid", "oracle")])
    assert choices[0] == choices[1]


def test_with_pairs_the_held_out_domains_are_always_scored(tmp_path):
    args = arguments(test_envs=(0, 1))
    run_job(args, settings(evaluation="needed", pairs=True), Desk(tmp_path))
    for record in read_run(tmp_path / "output").records:
        assert not any(math.isnan(record.in_acc[env]) for env in (0, 1))
        assert math.isnan(record.in_acc[2])


def test_unlabelled_rows_are_set_aside_and_scored(tmp_path):
    records = run(tmp_path, uda_fraction=0.5)
    assert all(0 <= record["env0_uda_acc"] <= 1 for record in records)


def test_a_registry_data_set_has_one_environment_for_each_domain(tmp_path):
    from tests.workers import toy

    toy.register()
    args = {**arguments(), "dataset": "toy"}
    tiny = {"backbone": {"name": "tiny_cnn", "width": 4}, "dataset_options": {"num_domains": 4}, "save_model": True}
    meta = run_job(args, settings(**tiny), Desk(tmp_path))
    assert meta["labels"] == ["0", "1", "2", "3"]
    weights = load_tensors(tmp_path / "output" / MODEL_FILE)
    parameters = sum(value.numel() for name, value in weights.items() if "running" not in name and "num_b" not in name)
    assert meta["cost"]["parameters"] == meta["cost"]["active_parameters"] == parameters
    assert meta["cost"]["flops"] > 2 * parameters  # convolutions use a weight more than once


def test_routers_are_recorded_by_domain_and_class(tmp_path):
    tiny = {"name": "timm:vit_tiny_patch16_224", "gmoe": {"num_experts": 3, "projection": 16}}
    run(tmp_path, "GMOE", protocol="gmoe_fork", backbone=tiny, routing=5)
    record = json.loads((tmp_path / "output/routing.json").read_text())
    assert record["domains"] == ["0", "1", "2"]
    assert len(record["layers"]) == 2
    for layer in record["layers"].values():
        assert sum(map(sum, layer["by_domain"]["counts"])) == layer["tokens"] == 3 * 5 * 2
        assert len(layer["by_class"]["names"]) == 2
    assert (tmp_path / "output/attention.png").read_bytes().startswith(b"\x89PNG")


def test_emoe_is_merged_back_to_a_dense_network(tmp_path):
    tiny = {"name": "timm:vit_tiny_patch16_224"}
    emoe = {"emoe": {"num_experts": 4, "top_k": 4, "split": "contiguous", "gate_noise": 0}, "num_inter": 1}
    methods = {"EMoE": MethodSpec(algorithm="emoe", config=emoe)}
    args = {**arguments("ERM"), "algorithm": "EMoE"}
    meta = run_job(args, settings(backbone=tiny, methods=methods, merge=True), Desk(tmp_path))
    merged = meta["merged"]
    # All experts are chosen, so only the output biases, which are trained apart, can differ.
    assert merged["residual"] < 1e-2
    assert merged["before"].keys() == merged["after"].keys() == {"env0_in_acc", "env1_out_acc", "env2_out_acc"}
    assert (tmp_path / "output/merged.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_envs": [3]}, "test_envs"),
        ({"test_envs": [0, 1, 2]}, "test_envs"),
        ({"dataset": "Debg28"}, "Debg28"),
        ({"hparams": '{"batch_size": 400}'}, "400"),
        ({"algorithm": "DANN"}, "DANN"),
    ],
)
def test_what_cannot_run_is_said_clearly(tmp_path, change, message):
    with pytest.raises(SpecError, match=message):
        run_job({**arguments(), **change}, settings(), Desk(tmp_path))


def test_a_method_of_ones_own_takes_over_network_and_hyper_parameters(tmp_path):
    data = open_environments("Debug28", tmp_path, torch.Generator().manual_seed(0))
    method = MethodSpec(algorithm="fish", hparams_of="Fish", config={"train": {"lr": 0.5}})
    hparams = {"batch_size": 4, "lr": 1e-3, "weight_decay": 0.0, "meta_lr": 0.25, "resnet_dropout": 0.5}
    made = make_algorithm(method, hparams, data, "gmoe_fork", 10)
    assert (made.config.meta_lr, made.config.train.lr, made.config.backbone.name) == (0.25, 0.5, "mnist_cnn")
    assert method_of("GMOE", {}).algorithm == "gmoe"
    with pytest.raises(SpecError, match="do not fit"):
        make_algorithm(MethodSpec(algorithm="erm", config={"nonsense": 1}), hparams, data, "gmoe_fork", 10)


def test_a_backbone_takes_size_and_channels_of_the_data(tmp_path):
    for field, value in (("image_size", 64), ("channels", 1)):
        with pytest.raises(SpecError, match=f"backbone's {field} is {value}, and Debug28 gives"):
            run_job(arguments(), settings(backbone={"name": "tiny_cnn", field: value}), Desk(tmp_path))
    run(tmp_path, backbone={"name": "tiny_cnn", "image_size": 28})


def test_a_method_clips_its_gradients(tmp_path):
    def loss(name: str, **train) -> float:
        methods = {"X": MethodSpec(algorithm="erm", config={"train": {"optimizer": "sgd", **train}})}
        run_job({**arguments(), "algorithm": "X"}, settings(methods=methods), Desk(tmp_path / name))
        return json.loads((tmp_path / name / "output" / RESULTS).read_text().splitlines()[-1])["loss"]

    assert loss("free") != loss("clipped", clip=1e-9)


def test_a_wrong_number_of_domains_is_refused(tmp_path):
    with pytest.raises(SpecError, match="says that Debug28 has 2 domains, and it has 3: 0, 1, 2"):
        run_job(arguments(), settings(environments={"Debug28": 2}), Desk(tmp_path))


def test_routing_without_anything_to_record_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Desk, "log", lambda self, message: told.append(message))
    run(tmp_path, routing=3)
    assert any("neither experts nor a class token" in line for line in told)


def test_an_unknown_router_is_refused(tmp_path):
    data = open_environments("Debug224", tmp_path, torch.Generator().manual_seed(0))
    hparams = {**default_hparams("emoe_fork", "GMOE", "VLCS"), "router": "cosine"}
    with pytest.raises(SpecError, match=r"router is 'cosine'\. Did you mean 'cosine_top'"):
        make_algorithm(method_of("GMOE", {}), hparams, data, "emoe_fork", 10)


class TestFolders:
    """Runs move between the public code's folders and ours."""

    def test_there_and_back(self, tmp_path):
        run(tmp_path / "run")
        source = tmp_path / "run/output"
        assert export_runs([(arguments(), source)], tmp_path / "sweep") == (1, 0)
        assert export_runs([(arguments(), source)], tmp_path / "sweep") == (0, 1)
        folder = tmp_path / "sweep" / job_id(arguments())
        assert (folder / RESULTS).read_bytes() == (source / RESULTS).read_bytes()
        digest = _digest(folder / RESULTS)
        desk = Desk(tmp_path / "next")
        meta = take_over(tmp_path / "sweep", arguments(), digest, desk)
        assert meta["steps"] == STEPS
        assert (desk.output / RESULTS).read_bytes() == (source / RESULTS).read_bytes()

    def test_records_that_changed_are_refused(self, tmp_path):
        folder = self._folder(tmp_path, arguments())
        with pytest.raises(DataError, match="changed"):
            take_over(tmp_path, arguments(), "0" * 64, Desk(tmp_path / "x"))
        assert folder.is_dir()

    def test_records_of_other_arguments_are_refused(self, tmp_path):
        folder = self._folder(tmp_path, {**arguments(), "trial_seed": 5})
        with pytest.raises(DataError, match="belongs to another protocol"):
            take_over(tmp_path, arguments(), _digest(folder / RESULTS), Desk(tmp_path / "x"))

    def _folder(self, root: Path, recorded: dict) -> Path:
        folder = root / job_id(arguments())
        folder.mkdir()
        scores = {f"env{e}_{part}_acc": 0.5 for e in range(3) for part in ("in", "out")}
        write_records([{**scores, "step": 0, "args": recorded}], folder)
        return folder


def _digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
