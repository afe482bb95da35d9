"""``sweep``: a DomainBed sweep; every (data set, algorithm, held-out domains, hyper-parameter seed, trial) is a member.

Job ids, seeds, splits and draws are the public code's, so that its result folders and ours can be mixed: ``extends``
names a folder whose finished runs are taken over instead of trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe.errors import DataError, NotFoundError, SpecError
from moe.specs import BackboneSpec
from orchestrator.stages.base import Member, StageBase, StageConfig
from workers.context import Context
from workers.domainbed.algorithms import MethodSpec, algorithm_name, check_overrides, method_of
from workers.domainbed.environments import REGISTRY_NAMES, SPLIT_OPTIONS
from workers.domainbed.jobs import RESULTS, Job, Sweep, job_state, run_name, sweep_jobs
from workers.domainbed.protocol import ProtocolName
from workers.overlay import overlay


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
        default="domain_generalization",
        description="official argument; part of a run's identity. No algorithm here trains on unlabelled images",
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
            methods = [method_of(name, self.methods) for name in self.algorithms]
            self._check_held_out(self.jobs())
            given = self.overrides()
            backbone = None if self.backbone is None else self.backbone.model_dump(exclude_defaults=True)
            check_overrides(given, methods, self.protocol, self.datasets, backbone)
            self._check_effects(methods, given, backbone or {})
        except SpecError as error:
            raise ValueError(str(error)) from None
        return self

    def overrides(self) -> dict[str, Any]:
        """``hparams`` by name."""
        given: dict[str, Any] = json.loads(self.hparams) if isinstance(self.hparams, str) else (self.hparams or {})
        return given

    def _check_held_out(self, jobs: Sequence[Job]) -> None:
        """Every entry of ``test_envs`` belongs to a run."""
        held_out = [job.train_args["test_envs"] for job in jobs]
        for envs in map(list, self.test_envs):
            if envs not in held_out:
                raise SpecError(
                    f"test_envs has {envs}, which no run of this sweep holds out.",
                    "Domains are counted from 0; pairs stand in ascending order and need single_test_envs: false.",
                )

    def _check_effects(
        self, methods: Sequence[MethodSpec], hparams: Mapping[str, Any], backbone: Mapping[str, Any]
    ) -> None:
        """Refuse what would be read and then change nothing."""
        nested = self.dataset_options.get("source_options")
        splits = sorted(SPLIT_OPTIONS & {*self.dataset_options, *(nested if isinstance(nested, Mapping) else ())})
        named = {*REGISTRY_NAMES, *REGISTRY_NAMES.values()}  # their seed draws splits, and images for per_domain
        if "seed" in self.dataset_options and self.dataset_options.get("per_domain") is None:
            splits += ["seed"] if named.issuperset(self.datasets) else []
        if splits:
            raise SpecError(
                f"dataset_options has {splits[0]!r}, which only says what the set's own splits are; a sweep makes its "
                "own.",
                "Leave it out; which domains are held out is `test_envs`, and how much of a domain `holdout_fraction`.",
            )
        if any((overlay(backbone, method.config.get("backbone") or {})).get("emoe") for method in methods):
            raise SpecError(
                "A backbone has emoe, whose balance loss and gates only the algorithm emoe trains.",
                "Give a dense backbone, and a method {algorithm: emoe, config: {emoe: ...}}.",
            )
        if self.merge and not any(algorithm_name(method, hparams) == "emoe" for method in methods):
            raise SpecError(f"merge is on, and none of {', '.join(self.algorithms)} is an EMoE.", "Set merge to false.")
        if self.task == "domain_adaptation" and not self.uda_holdout_fraction:
            raise SpecError(
                "task is domain_adaptation, and uda_holdout_fraction is 0: no image is set aside as unlabelled.",
                "Set uda_holdout_fraction, as the public code demands, or leave task out.",
            )

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

    def pairs(self) -> bool:
        """Whether pairs of domains are held out, which leave-one-domain-out selection reads."""
        return not self.single_test_envs or any(len(envs) > 1 for envs in self.test_envs)


class Stage(StageBase[SweepConfig]):
    """Train every run of a DomainBed sweep, in parallel."""

    output: ClassVar[str] = "run"
    per_seed: ClassVar[bool] = False
    Config: ClassVar[type[StageConfig]] = SweepConfig

    def __init__(self) -> None:
        self._digests: dict[tuple[str, ...], str] = {}

    def members(self, config: SweepConfig) -> list[Member]:
        """One member per run; the content of a finished run's records belongs to the member that takes it over."""
        found = []
        for job in config.jobs():
            params: dict[str, Any] = {"args": job.train_args}
            taken = _finished(config.extends, job)
            if taken is not None:
                params["records"] = hashlib.sha256(taken.read_bytes()).hexdigest()
            found.append(Member(run_name(job.train_args), params, 0.1 if taken else 1.0))
        return found

    def narrow(self, config: SweepConfig, member: Member) -> SweepConfig:
        """The settings of one run: a sweep of more methods, sets, domains, seeds or trials trains what is new in it."""
        dataset, method = (str(member.params["args"][name]) for name in ("dataset", "algorithm"))
        return config.model_copy(
            update={
                "datasets": (dataset,),
                "algorithms": (method,),
                "methods": {name: spec for name, spec in config.methods.items() if name == method},
                "environments": {name: count for name, count in config.environments.items() if name == dataset},
                "n_trials": 1,
                "n_hparams_from": 0,
                "n_hparams": 1,
                "test_envs": (),
                "single_test_envs": config.evaluation == "exact" or not config.pairs(),
                "extends": config.extends if "records" in member.params or not _there(config.extends) else None,
            }
        )

    def code(self, config: SweepConfig) -> list[str]:
        """The algorithms and data sets that are named."""
        from moe.algorithms.base import ALGORITHMS
        from workers.datasets.base import DATASETS
        from workers.domainbed.environments import DEALT

        chosen = [method_of(name, config.methods) for name in config.algorithms]
        files = {name for method in chosen for name in (method.algorithm, algorithm_name(method, config.overrides()))}
        methods = {ALGORITHMS.module_name(name) for name in files}
        sets = {DATASETS.module_name(REGISTRY_NAMES.get(n, n)) for n in config.datasets if n not in DEALT}
        return sorted(methods | sets)

    def external(self, config: SweepConfig, data_root: str) -> Mapping[str, str]:
        """Files below the data root and pretrained weights, so that a replaced one trains anew.

        Data, and weights of single methods, that are not there are left to the runs that need them.
        """
        from workers.packaged_weights import weights_digest

        root, common = Path(data_root), config.backbone

        def digest(name: str, pretrained: bool | str) -> str:
            place = ("weights", name, str(pretrained), data_root)
            return self._once(place, partial(weights_digest, name, pretrained, root))

        digests = {common.name: digest(common.name, common.pretrained)} if common else {}
        for method in dict.fromkeys(config.algorithms):
            own = method_of(method, config.methods).config.get("backbone") or {}
            if {"name", "pretrained"} & own.keys():
                name = str(own.get("name", common.name if common else ""))
                with suppress(NotFoundError):
                    digests[method] = digest(name, own.get("pretrained", common.pretrained if common else False))
        found = {f"weights/{name}": value for name, value in digests.items() if value}
        return found | self._fingerprints(config, root)

    def run(self, config: SweepConfig, member: Member, context: Context) -> Mapping[str, Any]:
        """Write ``results.jsonl`` and ``done``; ``meta`` has arguments and hyper-parameters."""
        from workers.domainbed.run import RunSettings, run_job
        from workers.domainbed.takeover import take_over

        args = member.params["args"]
        if "records" in member.params and config.extends is not None:
            return take_over(Path(config.extends), args, member.params["records"], context)
        if config.extends is not None:
            raise NotFoundError(
                f"There is no folder {config.extends}, whose finished runs `extends` takes over.",
                "Correct the path, which every node must see, or leave it out to train all runs.",
            )
        settings = RunSettings(
            protocol=config.protocol,
            methods=config.methods,
            backbone=None if config.backbone is None else config.backbone.model_dump(exclude_defaults=True),
            dataset_options=config.dataset_options,
            image_size=config.image_size,
            normalisation=config.normalisation,
            checkpoint_freq=config.checkpoint_freq,
            evaluation=config.evaluation,
            pairs=config.pairs(),
            uda_fraction=config.uda_holdout_fraction,
            precision=config.precision,
            device=config.device,
            save_model=config.save_model,
            routing=config.routing,
            merge=config.merge,
            resume_every=config.resume_every,
            environments=config.environments,
        )
        return run_job(args, settings, context)

    def _fingerprints(self, config: SweepConfig, root: Path) -> dict[str, str]:
        """What the files of the data sets are, for those that have files."""
        from workers.data import parse_options
        from workers.datasets.base import DATASETS
        from workers.domainbed.environments import DEALT

        found = {}
        for name in config.datasets:
            own = REGISTRY_NAMES.get(name, name)
            fingerprint = None if name in DEALT else getattr(DATASETS.load(own), "fingerprint", None)
            if fingerprint is not None:
                options = parse_options(own, config.dataset_options)
                place = ("files", own, options.model_dump_json(), str(root))
                with suppress(NotFoundError, DataError):
                    found[f"files/{name}"] = self._once(place, partial(fingerprint, root, options))
        return found

    def _once(self, place: tuple[str, ...], find: Callable[[], str]) -> str:
        """A digest of files, worked out once by this object: the runs of a sweep read the same ones."""
        if place not in self._digests:
            self._digests[place] = find()
        return self._digests[place]


def _there(folder: str | None) -> bool:
    return folder is None or Path(folder).expanduser().is_dir()


def _finished(folder: str | None, job: Job) -> Path | None:
    """The records of a run that has ended below ``folder``."""
    if folder is None:
        return None
    own = Path(folder).expanduser() / Path(job.output_dir).name
    return own / RESULTS if job_state(own) == "done" and (own / RESULTS).is_file() else None
