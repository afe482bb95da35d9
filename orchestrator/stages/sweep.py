"""``sweep``: a DomainBed sweep; every (data set, algorithm, held-out domains, hyper-parameter seed, trial) is a member.

Job ids, seeds, splits and draws are the public code's, so that its result folders and ours can be mixed: ``extends``
names a folder whose finished runs are taken over instead of trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe.errors import SpecError
from moe.specs import BackboneSpec
from orchestrator.stages.base import Member, StageBase, StageConfig
from workers.context import Context
from workers.domainbed.algorithms import MethodSpec, method_of
from workers.domainbed.jobs import RESULTS, Job, Sweep, job_state, sweep_jobs
from workers.domainbed.protocol import ProtocolName


class SweepConfig(StageConfig):
    """What the sweep runs over, under which protocol, and how."""

    protocol: ProtocolName = Field(description="the setting that is meant by DomainBed; there is no default")
    datasets: tuple[str, ...] = Field(min_length=1, description="official names, or names of `moepipe data ls`")
    algorithms: tuple[str, ...] = Field(min_length=1, description="official names, or names under `methods`")
    methods: dict[str, MethodSpec] = Field(default_factory=dict, description="rows of one's own, by name")
    backbone: BackboneSpec | None = Field(default=None, description="network of every method without one of its own")
    n_trials: int = Field(default=3, ge=1, description="trial seeds 0 .. n_trials - 1: other splits")
    n_hparams_from: int = Field(default=0, ge=0, description="first hyper-parameter seed; 0 means the defaults")
    n_hparams: int = Field(default=20, ge=1, description="end of the hyper-parameter seeds, not included")
    hparams: dict[str, Any] | str | None = Field(
        default=None,
        description="hyper-parameters that override all draws; a JSON text is kept as it is in the runs' identity",
    )
    test_envs: tuple[tuple[int, ...], ...] = Field(
        default=(), description="only these sets of held-out domains; empty: every domain (and pair)"
    )
    single_test_envs: bool = Field(
        default=True, description="no pairs of held-out domains; then leave-one-domain-out selection is impossible"
    )
    steps: int | None = Field(default=None, ge=1, description="updates; null: the data set's")
    checkpoint_freq: int | None = Field(default=None, ge=1, description="updates between evaluations; null: the set's")
    holdout_fraction: float = Field(default=0.2, gt=0, lt=1, description="share of every domain kept as `out`")
    task: Literal["domain_generalization", "domain_adaptation"] = Field(
        default="domain_generalization", description="official argument; part of a run's identity"
    )
    uda_holdout_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of a held-out domain's `in` set aside as unlabelled"
    )
    data_dir: str = Field(default="./domainbed/data/", description="official argument; part of a run's identity only")
    environments: dict[str, int] = Field(default_factory=dict, description="number of domains of sets of one's own")
    dataset_options: dict[str, Any] = Field(default_factory=dict, description="options of a registry data set")
    image_size: int | None = Field(default=None, ge=8, le=2048, description="side in pixels; null: the set's")
    normalisation: Literal["imagenet", "unit", "instance", "none"] | None = Field(
        default=None, description="of the images, e.g. imagenet for a pretrained network; null: the set's own"
    )
    evaluation: Literal["exact", "needed"] = Field(
        default="exact", description="needed: leave out what no selection method reads (NaN in the records)"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast; weights stay fp32")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")
    save_model: bool = Field(default=False, description="keep the weights of each run's best checkpoint")
    routing: int = Field(
        default=0, ge=0, le=100_000, description="images of each domain on which routers are recorded; 0: none"
    )
    merge: bool = Field(
        default=False, description="EMoE: also score and keep the selected network with its experts put back"
    )
    resume_every: int = Field(
        default=200, ge=1, description="updates between checkpoints", json_schema_extra={"cache": False}
    )
    extends: str | None = Field(
        default=None, description="folder of a DomainBed sweep whose finished runs are taken over"
    )

    @model_validator(mode="after")
    def _known(self) -> SweepConfig:
        try:
            for name in self.algorithms:
                method_of(name, self.methods)
            self.jobs()
        except SpecError as error:
            raise ValueError(str(error)) from None
        return self

    def sweep(self) -> Sweep:
        """The official part."""
        given = self.hparams
        return Sweep(
            datasets=self.datasets,
            algorithms=self.algorithms,
            n_trials=self.n_trials,
            n_hparams_from=self.n_hparams_from,
            n_hparams=self.n_hparams,
            steps=self.steps,
            data_dir=self.data_dir,
            task=self.task,
            holdout_fraction=self.holdout_fraction,
            single_test_envs=self.single_test_envs,
            hparams=json.dumps(given, sort_keys=True) if isinstance(given, dict) else given,
            environments=self.environments,
        )

    def jobs(self) -> list[Job]:
        """The runs, in the official order."""
        chosen = [list(envs) for envs in self.test_envs]
        return [job for job in sweep_jobs(self.sweep()) if not chosen or job.train_args["test_envs"] in chosen]

    def expected(self) -> dict[str, dict[str, dict[str, int]]]:
        """Number of runs with one held-out domain: data set -> algorithm -> domain -> count."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for job in self.jobs():
            args = job.train_args
            if len(args["test_envs"]) == 1:
                cells = counts.setdefault(args["dataset"], {}).setdefault(args["algorithm"], {})
                domain = str(args["test_envs"][0])
                cells[domain] = cells.get(domain, 0) + 1
        return counts


class Stage(StageBase[SweepConfig]):
    """Train every run of a DomainBed sweep, in parallel."""

    output: ClassVar[str] = "run"
    per_seed: ClassVar[bool] = False
    Config: ClassVar[type[StageConfig]] = SweepConfig

    def members(self, config: SweepConfig) -> list[Member]:
        """One member per run; the content of a finished run's records belongs to the member that takes it over."""
        found = []
        for job in config.jobs():
            args = job.train_args
            held_out = "+".join(map(str, args["test_envs"]))
            name = f"{args['dataset']},{args['algorithm']},test={held_out},hparams={args['hparams_seed']},"
            params: dict[str, Any] = {"args": args}
            taken = _finished(config.extends, job)
            if taken is not None:
                params["records"] = hashlib.sha256(taken.read_bytes()).hexdigest()
            found.append(Member(f"{name}trial={args['trial_seed']}", params, 0.1 if taken else 1.0))
        return found

    def code(self, config: SweepConfig) -> list[str]:
        """The algorithms and data sets that are named."""
        from moe.algorithms.base import ALGORITHMS
        from workers.datasets.base import DATASETS
        from workers.domainbed.environments import DEALT, REGISTRY_NAMES

        methods = {ALGORITHMS.module_name(method_of(name, config.methods).algorithm) for name in config.algorithms}
        sets = {DATASETS.module_name(REGISTRY_NAMES.get(n, n)) for n in config.datasets if n not in DEALT}
        return sorted(methods | sets)

    def external(self, config: SweepConfig, data_root: str) -> Mapping[str, str]:
        """The pretrained weights, so that a replaced file trains anew."""
        from workers.packaged_weights import weights_digest

        specs = [config.backbone] if config.backbone else []
        digests = {spec.name: weights_digest(spec.name, spec.pretrained, Path(data_root)) for spec in specs}
        return {f"weights/{name}": digest for name, digest in digests.items() if digest}

    def run(self, config: SweepConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``results.jsonl`` and ``done``; ``meta`` has arguments, hyper-parameters and the whole sweep."""
        from workers.domainbed.run import RunSettings, run_job
        from workers.domainbed.takeover import take_over

        args = member.params["args"]
        expected = {"expected": config.expected()}
        if "records" in member.params and config.extends is not None:
            return {**take_over(Path(config.extends), args, member.params["records"], context), **expected}
        settings = RunSettings(
            protocol=config.protocol,
            methods=config.methods,
            backbone=None if config.backbone is None else config.backbone.model_dump(exclude_defaults=True),
            dataset_options=config.dataset_options,
            image_size=config.image_size,
            normalisation=config.normalisation,
            checkpoint_freq=config.checkpoint_freq,
            evaluation=config.evaluation,
            pairs=not config.single_test_envs or any(len(envs) > 1 for envs in config.test_envs),
            uda_fraction=config.uda_holdout_fraction,
            precision=config.precision,
            device=config.device,
            save_model=config.save_model,
            routing=config.routing,
            merge=config.merge,
            resume_every=config.resume_every,
        )
        return {**run_job(args, settings, context), **expected}


def _finished(folder: str | None, job: Job) -> Path | None:
    """The records of a run that has ended below ``folder``."""
    if folder is None:
        return None
    own = Path(folder).expanduser() / Path(job.output_dir).name
    return own / RESULTS if job_state(own) == "done" and (own / RESULTS).is_file() else None
