"""The stage contract. One stage is one file ``orchestrator/stages/<kind>.py`` with a class ``Stage``.

A stage module imports neither torch nor ray at module level, so that ``validate`` and ``plan`` stay instant; heavy
imports happen inside :meth:`StageBase.run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from moe.registry import Registry
from workers.context import Context

STAGES = Registry("orchestrator.stages", noun="stage kind", entry_point="moepipe.stages")


class StageConfig(BaseModel):
    """Base of every stage's ``config:`` block: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Port:
    """A declared input.

    Attributes:
        kind: artifact kind it accepts (``data``, ``model``, ``features``, ``metrics``, ...).
        also: further kinds that serve as well.
        many: several artifacts may arrive (a fan-out), in member order; otherwise exactly one.
        optional: may be left out of the YAML.
        doc: one line for ``moepipe explain``.
    """

    kind: str
    many: bool = False
    optional: bool = False
    doc: str = ""
    also: tuple[str, ...] = ()

    def accepts(self, kind: str) -> bool:
        """Whether an artifact of this kind may arrive here."""
        return kind == self.kind or kind in self.also


NETWORKS = ("jetpack_start", "jetpack_run", "m2mkd_network")
"""Kinds besides ``model`` whose artifacts are whole networks, which other stages can go on with."""


@dataclass(frozen=True)
class Member:
    """One unit of a stage's fan-out.

    Attributes:
        name: stable, e.g. ``group=2`` (empty for the only one); the seed is put before it by the graph.
        params: JSON values that ``run`` needs and that enter the cache key.
        weight: relative cost, for longest-first order.
    """

    name: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


class StageBase(Generic[C]):
    """Base class of the stages.

    Class attributes:
        version: bump when the meaning of the output changes.
        output: artifact kind it makes.
        inputs: ports by name.
        per_seed: members are made for every seed of the pipeline (True), or one set over all seeds (False), whose
            inputs then gather the members of all seeds.
        gang: ``run`` calls ``context.train``.
        modules: what takes the ranks of a gang seconds to import; they may do it ahead.
        leads: ``run`` starts processes that take the member's resources; its own takes none.
        open_ports: ports and output are known when the config is (:meth:`bind`).
        changeable: paths of the config that may change while training goes on; a stage that names some can train in
            segments (:mod:`workers.segments`), and so in a population. Fields that shapes, data, their order or the
            number of updates follow from cannot.
        Config: the pydantic model of the ``config:`` block.
    """

    version: ClassVar[int] = 1
    output: ClassVar[str]
    inputs: ClassVar[Mapping[str, Port]] = {}
    per_seed: ClassVar[bool] = True
    gang: ClassVar[bool] = False
    modules: ClassVar[Sequence[str]] = ()
    leads: ClassVar[bool] = False
    open_ports: ClassVar[bool] = False
    changeable: ClassVar[Sequence[str]] = ()
    Config: ClassVar[type[StageConfig]] = StageConfig

    def bind(self, config: C) -> StageBase[Any]:
        """This stage with the ports and output that it has under ``config``; most have the same under all."""
        return self

    def examine(self, config: C) -> Sequence[tuple[tuple[str | int, ...], str, str]]:
        """``(path in the config block, message, hint)`` of what is wrong with a config that its model accepts."""
        return ()

    def slots(self, config: C) -> int:
        """How many times its resources a member can use at once; it gets what is free, at least one."""
        return 1

    def kinds(self, config: C) -> list[str]:
        """Other stage kinds that ``run`` works with."""
        return []

    def members(self, config: C) -> list[Member]:
        """The fan-out; one member by default."""
        return [Member()]

    def narrow(self, config: C, member: Member) -> C:
        """The config as far as the member's result may depend on it: what its key has, and what ``run`` sees.

        A stage whose members are listed in its config leaves out the other members here; so a list that grows is a hit
        for those that were there before. Made by ``model_copy``: it need not be a config that a user could write.
        """
        return config

    def code(self, config: C) -> list[str]:
        """Modules whose source decides the result besides this one's static import closure (registry choices)."""
        return []

    def external(self, config: C, data_root: str) -> Mapping[str, str]:
        """Digests of what the stage reads from outside the store (data files), by name; they enter the cache key."""
        return {}

    def weigh(self, config: C, member: Member, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
        """Relative cost of a member whose inputs have arrived; the heaviest of the ready members starts first.

        Args:
            config: of the stage.
            member: of the fan-out.
            inputs: port -> ``meta`` of the arriving artifacts, in member order; optional ports may lack.
        """
        return member.weight

    def run(self, config: C, member: Member, context: Context) -> Mapping[str, Any]:
        """Do the work: write files into ``context.output`` and return the artifact's small JSON ``meta``.

        ``config`` is that of :meth:`narrow`. The files and ``meta`` must be a function of config, member, inputs and
        seed alone: no times, paths or host names, so that an interrupted and resumed run gives the same digest.
        """
        raise TypeError(f"{type(self).__module__} does not define run().")
