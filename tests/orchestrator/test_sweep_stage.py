"""The sweep and its tables as stages: official job ids, what is taken over, what a broken run leaves behind."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

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


def submit(folder, **changes):
    spec = PipelineSpec(
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
    store = Store.open(folder / "store")
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
    def test_from_yaml_to_all_forms(self, tmp_path):
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
