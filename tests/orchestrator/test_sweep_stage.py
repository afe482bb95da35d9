"""The sweep and its tables as stages: official job ids, what is taken over, what a broken run leaves behind."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from orchestrator import result
from orchestrator.executors.inline import InlineExecutor
from orchestrator.graph import build_graph
from orchestrator.runs import RunStore
from orchestrator.scheduler import execute
from orchestrator.spec import PipelineSpec
from orchestrator.stages.sweep import Stage, SweepConfig
from orchestrator.store import Store
from workers.domainbed.jobs import RESULTS, Sweep, job_id, sweep_jobs

SWEEP = {
    "protocol": "domainbed_2020",
    "datasets": ["Debug28"],
    "algorithms": ["ERM", "IRM"],
    "n_trials": 1,
    "n_hparams": 1,
    "steps": 3,
    "checkpoint_freq": 2,
    "hparams": {"batch_size": 4},
}


def spec_of(**changes):
    return PipelineSpec(
        apiVersion="moepipe/v1",
        name="sweep",
        seeds=[0],
        stages={
            "sweep": {"kind": "sweep", "config": {**SWEEP, **changes}, "min_success": 0.3},
            "tables": {
                "kind": "domainbed_tables",
                "inputs": {"runs": "${stages.sweep}"},
                "config": {"title": "Debug"},
            },
        },
    )


def submit(folder, **changes):
    spec, store = spec_of(**changes), Store.open(folder / "store")
    run = RunStore(store).create(spec)
    outcome = execute(build_graph(spec), store, run, InlineExecutor(), data_root=folder / "data")
    return outcome, store


def output(outcome, store, node):
    return store.local_path(store.artifact(outcome.artifacts[node]))


def test_every_run_of_the_official_sweep_is_a_member_with_its_id():
    config = SweepConfig(**SWEEP, single_test_envs=False)
    official = sweep_jobs(
        Sweep(datasets=("Debug28",), algorithms=("ERM", "IRM"), n_trials=1, n_hparams=1, steps=3,
              data_dir="./domainbed/data/", hparams='{"batch_size": 4}')
    )  # fmt: skip
    members = Stage().members(config)
    assert [job_id(m.params["args"]) for m in members] == [job.output_dir.rpartition("/")[2] for job in official]
    assert len({member.name for member in members}) == len(members) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithms": ["EMR"]}, "EMR"),
        ({"datasets": ["PACSS"]}, "PACSS"),
        ({"protocol": "domainbed"}, "domainbed_2020"),
        ({"n_hparams": 1, "n_hparams_from": 1}, "n_hparams"),
    ],
)
def test_bad_settings_name_the_field(change, message):
    with pytest.raises(ValidationError, match=message):
        SweepConfig(**{**SWEEP, **change})


class TestTables:
    def test_from_yaml_to_all_forms(self, tmp_path, capsys):
        outcome, store = submit(tmp_path)
        assert outcome.error is None
        folder = output(outcome, store, "tables")
        text = (folder / "tables.txt").read_text()
        assert "protocol: domainbed_2020" in text
        assert "updates: 3" in text
        assert "ERM" in text
        assert "leave-one-domain-out" in text  # says why it is not there
        for name in ("tables.md", "tables.tex", "tables.csv", "tables.html", "report.html", "accuracy_Debug28.png"):
            assert (folder / name).stat().st_size > 0
        assert len(list((folder / "sweep").iterdir())) == 6
        document = {"run": "r", "status": "finished", "members": 7, "hits": 0, "failed": {}, "options": {}}
        result.show({**document, "reports": [{"path": str(folder)}]})
        result.show_next(document, build_graph(spec_of()), None, "")
        told = capsys.readouterr().out
        assert text.strip() in told and "moepipe show r" in told and "--seeds" not in told  # a sweep has no seeds

    def test_finished_runs_of_another_folder_are_taken_over(self, tmp_path):
        first, store = submit(tmp_path / "a")
        theirs = output(first, store, "tables") / "sweep"
        second, store = submit(tmp_path / "b", extends=str(theirs), algorithms=["ERM", "IRM", "CORAL"])
        assert second.error is None
        text = (output(second, store, "tables") / "tables.txt").read_text()
        assert "taken over: 6 runs" in text
        assert "CORAL" in text

    def test_a_broken_run_leaves_a_marked_cell(self, tmp_path):
        outcome, store = submit(
            tmp_path,
            algorithms=["ERM", "WIDE"],
            methods={"WIDE": {"algorithm": "erm", "config": {"backbone": {"pretrained": "/nowhere.safetensors"}}}},
        )
        folder = output(outcome, store, "tables")
        text = (folder / "tables.txt").read_text()
        assert "* Debug28, WIDE, 0 held out: 1 run missing" in text
        assert json.loads((folder / "scores.json").read_text()).keys() == {"iid/Debug28/ERM", "oracle/Debug28/ERM"}

    def test_records_are_read_by_the_official_layout(self, tmp_path):
        outcome, store = submit(tmp_path)
        folder = output(outcome, store, "tables") / "sweep"
        for run in folder.iterdir():
            record = json.loads((run / RESULTS).read_text().splitlines()[0])
            assert job_id(record["args"]) == run.name


class TestGrowing:
    """A sweep that grows trains what is new in it, as the public launcher does in a folder of results."""

    def test_wider_in_any_direction(self, tmp_path):
        first, _ = submit(tmp_path, algorithms=["ERM"], test_envs=[[0]])
        assert len(first.artifacts) == 2
        steps = (
            ({"algorithms": ["ERM"]}, 1),
            ({"algorithms": ["IRM", "ERM"], "methods": {"MINE": {"algorithm": "erm"}}}, 3),
            ({"algorithms": ["ERM", "IRM"], "single_test_envs": False}, 6),
            ({"algorithms": ["ERM"], "n_trials": 2, "n_hparams": 2}, 3),
        )
        for changes, hits in steps:
            outcome, store = submit(tmp_path, **changes)
            assert outcome.error is None and outcome.hits == hits, changes
        alone, _ = submit(tmp_path, algorithms=["ERM"])
        assert alone.hits == 4
        assert "missing" not in (output(alone, store, "tables") / "tables.txt").read_text()

    def test_the_code_of_a_run_is_what_its_hyper_parameters_choose(self):
        emoe = {"protocol": "emoe_fork", "algorithms": ["GMOE"], "datasets": ["PACS"]}
        for flag, name in (("vanilla_ViT", "erm"), ("MoE_from_ffn", "emoe")):
            config = SweepConfig(**{**SWEEP, **emoe, "hparams": {flag: True}})
            own = Stage().narrow(config, Stage().members(config)[0])
            assert f"moe.algorithms.{name}" in Stage().code(own)

    def test_other_data_sets_change_nothing(self):
        one, more = (SweepConfig(**{**SWEEP, "datasets": names}) for names in (["Debug28"], ["PACS", "Debug28"]))
        member = Stage().members(one)[0]
        assert member in Stage().members(more)
        assert Stage().narrow(one, member) == Stage().narrow(more, member)

    def test_what_is_skipped_without_pairs_is_scored_with_them(self, tmp_path):
        submit(tmp_path, algorithms=["ERM"], evaluation="needed")
        outcome, _ = submit(tmp_path, algorithms=["ERM"], evaluation="needed", single_test_envs=False)
        assert outcome.hits == 0

    def test_only_a_changed_method_trains_anew(self, tmp_path):
        mine = {"MINE": {"algorithm": "erm", "config": {"train": {"lr": 0.01}}}}
        submit(tmp_path, algorithms=["ERM", "MINE"], methods=mine, test_envs=[[0]])
        mine["MINE"]["config"]["train"]["lr"] = 0.02
        outcome, _ = submit(tmp_path, algorithms=["ERM", "MINE"], methods=mine, test_envs=[[0]])
        assert outcome.hits == 1 and not outcome.failures


def problem(**changes):
    """The problem that a sweep with these settings has."""
    with pytest.raises(ValidationError) as caught:
        SweepConfig(**{**SWEEP, **changes})
    return str(caught.value)


class TestNoSettingIsIgnored:
    """What would be read, put into the key and then change nothing is refused."""

    @pytest.mark.parametrize(
        ("envs", "message"),
        [([[0], [7]], r"has \[7\]"), ([[0], [0, 1]], r"has \[0, 1\]"), ([[1, 0]], "ascending order")],
    )
    def test_held_out_domains_that_no_run_holds_out(self, envs, message):
        with pytest.raises(ValidationError, match=message):
            SweepConfig(**SWEEP, test_envs=envs)
        assert len(SweepConfig(**SWEEP, test_envs=[[0], [0, 1]], single_test_envs=False).jobs()) == 4

    @pytest.mark.parametrize(
        ("hparams", "message"),
        [
            ({"lrr": 0.1}, "Did you mean 'lr'"),
            ('{"nonlinear_classifier": true}', "'nonlinear_classifier', so True would have no effect"),
            ({"topk": 2}, "'topk'"),
            ({"mmd_gamma": 2.0}, "'mmd_gamma'"),
            ({"resnet18": True}, "'resnet18'"),
        ],
    )
    def test_hyper_parameters_that_no_method_reads(self, hparams, message):
        assert message in problem(hparams=hparams)
        assert SweepConfig(**{**SWEEP, "hparams": {"irm_lambda": 2.0, "nonlinear_classifier": False}})

    def test_the_mixture_is_a_hyper_parameter_of_emoe_s_fork_alone(self):
        from workers.domainbed.hparams import EMOE, EMOE_LARGE

        emoe = {"protocol": "emoe_fork", "algorithms": ["GMOE"], "datasets": ["PACS"], "hparams": dict(EMOE)}
        assert SweepConfig(**{**SWEEP, **emoe}, merge=True).merge
        for changes in ({"protocol": "gmoe_fork"}, {"hparams": dict(EMOE_LARGE)}):
            assert "would have no effect" in problem(**{**emoe, **changes})

    @pytest.mark.parametrize("name", ["batch_size", "steps", "schedule", "evaluate_every"])
    def test_training_settings_of_a_method_that_the_sweep_decides(self, name):
        methods = {"X": {"algorithm": "erm", "config": {"train": {"lr": 0.1, name: 3}}}}
        assert f"train.{name} has no effect" in problem(methods=methods, algorithms=["X"])

    def test_options_that_only_split_a_set(self):
        common = {"datasets": ["digits5"], "environments": {"digits5": 5}}
        assert "test_envs" in problem(**common, dataset_options={"target": "synth", "per_domain": 100})
        assert "'id_fraction'" in problem(**common, dataset_options={"source_options": {"id_fraction": 0.5}})
        assert SweepConfig(**{**SWEEP, **common}, dataset_options={"per_domain": 100, "seed": 1})
        assert "'seed'" in problem(datasets=["PACS"], dataset_options={"seed": 1})
        assert SweepConfig(**{**SWEEP, "datasets": ["PACS"]}, dataset_options={"per_domain": 100, "seed": 1})

    def test_experts_of_a_backbone_that_nothing_balances(self):
        grouped = {"name": "timm:vit_tiny_patch16_224", "emoe": {"num_experts": 4, "top_k": 2}, "emoe_layers": [10]}
        assert "only the algorithm emoe trains" in problem(backbone=grouped)
        methods = {"X": {"algorithm": "coral", "config": {"backbone": grouped}}}
        assert "only the algorithm emoe trains" in problem(methods=methods, algorithms=["X"])

    def test_merging_without_an_emoe_and_adaptation_without_unlabelled_images(self):
        assert "none of ERM, IRM is an EMoE" in problem(merge=True)
        assert "uda_holdout_fraction" in problem(task="domain_adaptation")

    def test_a_folder_to_go_on_from_that_is_not_there(self, tmp_path):
        outcome, _ = submit(tmp_path, extends=str(tmp_path / "nowhere"))
        assert f"There is no folder {tmp_path / 'nowhere'}" in str(outcome.error)

    def test_another_data_root_is_a_miss(self, tmp_path):
        from workers.datasets import pacs

        config = SweepConfig(**{**SWEEP, "datasets": ["PACS"]})
        assert Stage().external(config, str(tmp_path)) == {}
        found = []
        for seed in (0, 1):
            pacs.miniature(tmp_path / str(seed), seed)
            found.append(Stage().external(config, str(tmp_path / str(seed)))["files/PACS"])
        assert found[0] != found[1]

    def test_replaced_weights_of_a_method_s_own_network_are_a_miss(self, tmp_path):
        weights = tmp_path / "a.safetensors"
        own = {"algorithm": "erm", "config": {"backbone": {"name": "tiny_cnn", "pretrained": str(weights)}}}
        config = SweepConfig(**{**SWEEP, "algorithms": ["X"]}, methods={"X": own})
        found = []
        for content in (b"a", b"b"):
            weights.write_bytes(content)
            found.append(Stage().external(config, str(tmp_path))["weights/X"])
        assert found[0] != found[1]
        weights.unlink()
        assert Stage().external(config, str(tmp_path)) == {}
