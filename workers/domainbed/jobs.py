"""The runs of a sweep: arguments, seeds, folders and commands, identical to DomainBed's.

A run is identified by its arguments, so results of the public code and of ours can lie in one folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe.errors import SpecError, nearest
from workers.domainbed.benchmark_sets import SETS
from workers.domainbed.seeds import seed_hash

JobState = Literal["not launched", "incomplete", "done"]
RESULTS, DONE = "results.jsonl", "done"


class Sweep(BaseModel):
    """What a sweep runs over. A full one: 3 trials, 20 seeds, every domain and every pair of domains held out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: tuple[str, ...] = Field(min_length=1, description="official names")
    algorithms: tuple[str, ...] = Field(min_length=1, description="official names")
    n_trials: int = Field(3, ge=1, description="trial seeds 0 .. n_trials - 1: other splits")
    n_hparams_from: int = Field(0, ge=0, description="first hyper-parameter seed; 0 means the defaults")
    n_hparams: int = Field(20, ge=1, description="end of the hyper-parameter seeds, not included")
    steps: int | None = Field(None, ge=1, description="updates; default: the data set's")
    data_dir: str = Field(min_length=1, description="data root; part of a run's identity")
    task: Literal["domain_generalization", "domain_adaptation"] = Field(
        "domain_generalization", description="domain_adaptation also gives unlabelled images of the test domain"
    )
    holdout_fraction: float = Field(0.2, ge=0, le=1, description="share of every domain kept as `out`")
    single_test_envs: bool = Field(False, description="no pairs; then leave-one-domain-out selection is impossible")
    hparams: str | None = Field(None, description="JSON object of hyper-parameters that override; kept as text")
    environments: Mapping[str, int] = Field({}, description="number of domains of data sets of one's own")

    @field_validator("hparams")
    @classmethod
    def _object(cls, value: str | None) -> str | None:
        if value is not None and not isinstance(json.loads(value), dict):  # a JSON error is a ValueError already
            raise ValueError('hparams is a JSON object, such as {"lr": 0.001}.')
        return value

    @model_validator(mode="after")
    def _some_seed(self) -> Sweep:
        if self.n_hparams <= self.n_hparams_from:
            raise ValueError(
                f"n_hparams ({self.n_hparams}) is the end of the seeds; it must be above n_hparams_from "
                f"({self.n_hparams_from})."
            )
        return self


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        train_args: arguments by official name, in the official order; without the folder.
        output_dir: where its results go: md5 of the arguments below the root.
        command: the public code's command line.
    """

    train_args: dict[str, Any]
    output_dir: str
    command: str


def sweep_jobs(sweep: Sweep, root: str = "sweep_out") -> list[Job]:
    """All runs of a sweep, by trial, data set, algorithm, held-out domains and hyper-parameter seed.

    Args:
        sweep: what to run over.
        root: folder of the sweep.

    Raises:
        SpecError: a data set whose number of domains is not known.
    """
    seeds = range(sweep.n_hparams_from, sweep.n_hparams)
    jobs = []
    for trial, dataset, algorithm in product(range(sweep.n_trials), sweep.datasets, sweep.algorithms):
        for held_out in held_out_sets(_environments(sweep, dataset), sweep.single_test_envs):
            jobs += [_job(sweep, root, trial, dataset, algorithm, held_out, seed) for seed in seeds]
    return jobs


def held_out_sets(environments: int, single: bool = False) -> list[list[int]]:
    """Every domain, each followed by its pairs with later ones (unless ``single``)."""
    sets = []
    for first in range(environments):
        sets.append([first])
        if not single:
            sets += [[first, second] for second in range(first + 1, environments)]
    return sets


def job_id(train_args: Mapping[str, Any]) -> str:
    """Name of a run's folder: md5 of its arguments as sorted JSON.

    Args:
        train_args: without ``output_dir``.
    """
    text = json.dumps(dict(train_args), sort_keys=True)
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


def run_name(train_args: Mapping[str, Any]) -> str:
    """Short name of a run within a sweep, e.g. ``PACS,ERM,test=0+2,hparams=0,trial=1``."""
    held_out = "+".join(map(str, train_args["test_envs"]))
    seeds = f"hparams={train_args['hparams_seed']},trial={train_args['trial_seed']}"
    return f"{train_args['dataset']},{train_args['algorithm']},test={held_out},{seeds}"


def named_run(name: str) -> tuple[str, str, list[int]]:
    """Data set, algorithm and held-out domains of a run by its :func:`run_name`.

    Raises:
        SpecError: the member of another stage.
    """
    found = re.fullmatch(r"([^,]+),(.+),test=(\d+(?:\+\d+)*),hparams=\d+,trial=\d+", name)
    if found is None:
        raise SpecError(f"{name!r} is no run of a sweep.", "The tables are made from `sweep` stages.")
    return found[1], found[2], [int(domain) for domain in found[3].split("+")]


def job_state(folder: Path) -> JobState:
    """``done`` when the run has left a file of that name, ``incomplete`` when there is only the folder."""
    if (folder / DONE).exists():
        return "done"
    return "incomplete" if folder.exists() else "not launched"


def _environments(sweep: Sweep, dataset: str) -> int:
    if dataset in sweep.environments:
        return sweep.environments[dataset]
    if dataset not in SETS:
        raise SpecError(
            f"The number of domains of {dataset!r} is not known.",
            f"Give it in environments, or: {nearest(dataset, SETS)}",
        )
    return len(SETS[dataset].labels)


def _job(
    sweep: Sweep, root: str, trial: int, dataset: str, algorithm: str, held_out: list[int], hparams_seed: int
) -> Job:
    train_args: dict[str, Any] = {
        "dataset": dataset,
        "algorithm": algorithm,
        "test_envs": held_out,
        "holdout_fraction": sweep.holdout_fraction,
        "hparams_seed": hparams_seed,
        "data_dir": sweep.data_dir,
        "task": sweep.task,
        "trial_seed": trial,
        "seed": seed_hash(dataset, algorithm, held_out, hparams_seed, trial),
    }
    if sweep.steps is not None:
        train_args["steps"] = sweep.steps
    if sweep.hparams is not None:
        train_args["hparams"] = sweep.hparams
    folder = f"{root}/{job_id(train_args)}"
    return Job(train_args, folder, _command({**train_args, "output_dir": folder}))


def _command(arguments: Mapping[str, Any]) -> str:
    words = ["python", "-m", "domainbed.scripts.train"]
    for name, value in sorted(arguments.items()):
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(shlex.quote(part) if isinstance(part, str) else str(part) for part in values)]
    return " ".join(words)
