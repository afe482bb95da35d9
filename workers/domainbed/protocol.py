"""The four settings that get called "DomainBed", each whole, so that nobody mixes them unawares.

``domainbed_2020``: the published study (arXiv 2007.01434). ``domainbed_head``: its public code today (commit b93c22a1).
``gmoe_fork``: the code of GMoE (commit 0689d557). ``emoe_fork``: the code of EMoE (commit ba8e1757), a copy of GMoE's
whose mixture settings are hyper-parameters. There is no default: who uses the protocol says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from moe.errors import SpecError, nearest
from workers.domainbed.benchmark_sets import BenchmarkSet, benchmark_set

ProtocolName = Literal["domainbed_2020", "domainbed_head", "gmoe_fork", "emoe_fork"]

_OFTEN = 100  # checkpoint frequency of MNIST, WILDS, debug and what does not say otherwise
_SELDOM = frozenset({"VLCS", "PACS", "OfficeHome", "TerraIncognita", "SVIRO", "CUB"})


@dataclass(frozen=True)
class Protocol:
    """Settings around the training loop; hyper-parameters are in :mod:`workers.domainbed.hparams`.

    Attributes:
        name: which of the four.
        rate: default learning rate on other than small images.
        domainnet_steps: updates on DomainNet; 5001 elsewhere.
        domainnet_frequency: updates between two evaluations there.
        freeze_bn: BatchNorm statistics stay as pretrained (head: the hyper-parameter ``freeze_bn`` decides, off).
        augmix: ResNet-50 starts from the AugMix weights ``resnet50.ram_in1k`` instead of torchvision's.
        holdout: share of every domain kept as ``out``.
        trials, hparams_seeds: size of a full sweep; seed 0 means the defaults.
        eval_batch: images a batch in evaluation.
        augments_validation: Parity: all splits of a training domain are augmented, its validation part too.
    """

    name: ProtocolName
    rate: float
    domainnet_steps: int
    domainnet_frequency: int
    freeze_bn: bool
    augmix: bool
    holdout: float = 0.2
    trials: int = 3
    hparams_seeds: int = 20
    eval_batch: int = 64
    augments_validation: bool = True

    @property
    def fork(self) -> bool:
        """GMoE's code, or EMoE's, which is a copy of it."""
        return self.name in ("gmoe_fork", "emoe_fork")

    def check(self, dataset: str) -> BenchmarkSet:
        """The record of ``dataset``, if this protocol has it.

        Raises:
            SpecError: unknown, or known to another protocol only.
        """
        entry = benchmark_set(dataset)
        fork = entry.in_fork
        has = {"domainbed_2020": entry.in_2020, "domainbed_head": entry.in_head, "gmoe_fork": fork, "emoe_fork": fork}
        if not has[self.name]:
            others = ", ".join(name for name, there in has.items() if there)
            raise SpecError(f"The protocol {self.name} has no data set {dataset!r}.", f"It belongs to: {others}.")
        return entry

    def steps(self, dataset: str) -> int:
        """Default number of updates. Raises SpecError, see :meth:`check`."""
        return self.domainnet_steps if self.check(dataset).name == "DomainNet" else 5001

    def checkpoint_frequency(self, dataset: str) -> int:
        """Default number of updates between two evaluations. Raises SpecError, see :meth:`check`."""
        name = self.check(dataset).name
        if name == "DomainNet":
            return self.domainnet_frequency
        return 300 if name in _SELDOM else _OFTEN


PROTOCOLS = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Protocol("domainbed_2020", 5e-5, 5001, 1000, freeze_bn=True, augmix=False),
            Protocol("domainbed_head", 5e-5, 5001, 1000, freeze_bn=False, augmix=True),
            Protocol("gmoe_fork", 3e-5, 15001, 500, freeze_bn=True, augmix=False),
            Protocol("emoe_fork", 3e-5, 15001, 500, freeze_bn=True, augmix=False),
        )
    }
)


def protocol(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        SpecError: no such protocol; the message suggests the nearest.
    """
    for known in get_args(ProtocolName):
        if name == known:
            return PROTOCOLS[known]
    raise SpecError(f"There is no protocol {name!r}.", nearest(name, PROTOCOLS))


def evaluation_steps(steps: int, frequency: int) -> list[int]:
    """Numbers of the updates (from 0) after which everything is evaluated: multiples of ``frequency``, and the last.

    Raises:
        SpecError: a number below 1.
    """
    if steps < 1 or frequency < 1:
        raise SpecError(f"{steps} steps, evaluated every {frequency}: both must be at least 1.")
    return sorted({*range(0, steps, frequency), steps - 1})


def steps_per_epoch(in_sizes: Sequence[int], batch_size: int) -> float:
    """Updates in what the records call an epoch: the least of len(in) / batch size over all domains.

    Parity: the domains that are held out for testing count too.

    Args:
        in_sizes: images in ``in`` of every domain.
        batch_size: images of one domain in a minibatch.

    Raises:
        SpecError: no domain, or a number below 1.
    """
    if not in_sizes or min(in_sizes) < 1 or batch_size < 1:
        raise SpecError(f"Sizes {list(in_sizes)} and batch size {batch_size}: all must be at least 1.")
    return min(in_sizes) / batch_size
