"""DeepSpeed engine: ZeRO 0, 1 and 2, expert parallelism through ``deepspeed.moe``, state by plain parameter name.

The only file that imports deepspeed. What it takes care of:

- on a CPU nothing is compiled (:func:`start`), and a plain torch optimiser object is used;
- every MoE block of the module is replaced by DeepSpeed's MoE layer in a class of the same interface
  (:class:`ParallelMoEBlock`), with the switches that make it deterministic and equal to the plain block;
- state is gathered to plain names (experts by global number, both Adam moments), because DeepSpeed's own checkpoints
  cannot change the number of ranks of an MoE model; the plain export loads without DeepSpeed.

Reference: DeepSpeed-MoE (arXiv 2201.05596), ZeRO (arXiv 1910.02054).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.errors import CheckpointError, EnvironmentProblem, SpecError
from moe.layers.block import MoEBlock, MoEOutput, deepspeed_names, hidden_width
from moe.layers.experts import Expert
from moe.layers.layer import LayerRecord, MoELayer
from workers.engines.base import (
    EngineState,
    LossFunction,
    OptimizerOptions,
    ParamGroup,
    autocast,
    build_optimizer,
    read_losses,
    weighted,
)
from workers.engines.layout import Layout
from workers.engines.moments import Moments
from workers.engines.parallel_layer import RoutedGate, layer_names, share_of
from workers.engines.torch import load_strict, reduce_values, set_rates

ZeroStage = Literal[0, 1, 2]
Parallel = TypeVar("Parallel", bound=nn.Module)


@dataclass(frozen=True)
class DeepSpeedOptions:
    """What is specific to this engine.

    Attributes:
        zero_stage: 0 (plain data parallel), 1 (moments divided over ranks) or 2 (gradients as well). Stage 3 refuses
            MoE layers in DeepSpeed itself.
        ep_size: ranks that share the experts of an MoE block; divides the number of ranks and of experts.
    """

    zero_stage: ZeroStage = 1
    ep_size: int = 1


def available() -> str:
    """Empty when DeepSpeed can be imported, else the reason why not."""
    try:
        _import()
    except Exception as error:  # its import runs a lot of code of its own; any failure means "not here"
        return f"{type(error).__name__}: {error}"
    return ""


def start(device: torch.device) -> Any:
    """Import DeepSpeed and join the process group (made here when there is none); returns the package.

    Raises:
        EnvironmentProblem: the package cannot be imported.
    """
    try:
        deepspeed = _import()
    except ImportError as error:
        raise EnvironmentProblem(
            f"DeepSpeed cannot be imported: {error}.", "Install it, or set engine: torch."
        ) from error
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray Train sets it; an inline run has one rank
    if device.type == "cpu":
        _switch_off_compiled_communication(deepspeed)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
        else:
            folder = Path(tempfile.mkdtemp(prefix="moepipe-"))
            where = f"file://{folder / 'store'}"
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", where, rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _import() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _switch_off_compiled_communication(deepspeed: Any) -> None:
    """Keep ``init_distributed`` from compiling its shared-memory extension.

    The compilation takes minutes, fails without ninja or g++, and waits without limit on a lock that all processes of a
    user share. Gloo does the same work. The switch is an internal dictionary: a test fails when an upgrade removes it.
    """
    ops = getattr(deepspeed.ops, "__compatible_ops__", None)
    if not isinstance(ops, dict):
        raise EnvironmentProblem(
            f"DeepSpeed {deepspeed.__version__} has no table of compiled operations to switch off.",
            "Install a version of the tested range (pip install 'deepspeed>=0.19,<0.20').",
        )
    ops["deepspeed_shm_comm"] = False


class ParallelMoEBlock(nn.Module):
    """DeepSpeed's MoE layer in the shape of :class:`moe.layers.block.MoEBlock`: the same numbers, experts over ranks.

    Args:
        block: the plain block whose weights are taken over.
        ep_size: ranks that share the experts.
        ep_rank: this rank's place among them.
    """

    def __init__(self, block: MoEBlock, ep_size: int, ep_rank: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.spec, dim = block.spec, block.norm.normalized_shape[0]
        self.norm = copy.deepcopy(block.norm)
        self.names = deepspeed_names(block.spec.num_experts, ep_rank, ep_size)
        with contextlib.redirect_stdout(io.StringIO()):
            self.layer = MoE(
                hidden_size=dim,
                expert=Expert(dim, hidden_width(dim, block.spec)),
                num_experts=block.spec.num_experts,
                ep_size=ep_size,
                k=block.spec.top_k,
                capacity_factor=block.spec.capacity_factor,
                # Capacity in evaluation mode is experts times what an equal load needs: nothing is dropped.
                eval_capacity_factor=float(block.spec.num_experts),
                min_capacity=0,
                drop_tokens=not block.spec.dropless,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
        state = block.state_dict()
        self.layer.load_state_dict({mine: state[theirs] for mine, theirs in self.names.items()})

    def forward(self, z_ND: Tensor) -> MoEOutput:
        """See :class:`MoEBlock`. Collective among the ranks that share the experts; equal N on all of them."""
        y_ND, balance, counts_E = self.layer(self.norm(z_ND))
        return MoEOutput(z_ND + y_ND, balance, counts_E)


class ParallelMoELayer(MoELayer):
    """DeepSpeed's MoE layer behind :class:`moe.layers.layer.MoELayer`: the same numbers, experts over ranks.

    DeepSpeed sends the tokens; gate, routing rule and kernels are ours (``workers.engines.parallel_layer``). Dropout of
    hidden units is drawn by each rank for the rows that it computes, so it has other draws than the plain layer.

    Args:
        layer: the plain layer whose weights are taken over.
        ep_size: ranks that share the experts.
        ep_rank: this rank's place among them.
    """

    def __init__(self, layer: MoELayer, ep_size: int, ep_rank: int) -> None:
        nn.Module.__init__(self)
        from deepspeed.moe.layer import MoE

        self.dim, self.num_experts, self.spec = layer.dim, layer.num_experts, layer.spec
        self.last: LayerRecord | None = None
        self.names = layer_names(layer)
        share = share_of(layer, ep_size, ep_rank)
        with contextlib.redirect_stdout(io.StringIO()):
            self.layer = MoE(layer.dim, nn.Identity(), layer.num_experts, ep_size)
        for parameter in share.parameters():  # DeepSpeed's marks of a parameter that its group does not share
            parameter.allreduce, parameter.group_name = False, self.layer.expert_group_name  # type: ignore[attr-defined]
        self.layer.deepspeed_moe.gate, self.layer.deepspeed_moe.experts = RoutedGate(layer), share
        self.train(layer.training)

    def forward_with_record(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        dropout_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, LayerRecord]:
        """See :class:`MoELayer`. Collective among the ranks that share the experts; their N may differ.

        Raises:
            SpecError: the last axis is not D, or dropout factors or a generator were given.
        """
        if x.shape[-1] != self.dim:
            raise SpecError(f"The layer expects tokens of width {self.dim}; got shape {tuple(x.shape)}.")
        if dropout_mask is not None or generator is not None:
            raise SpecError("An expert-parallel layer draws for itself.", "Leave out dropout_mask and generator.")
        y, *_ = self.layer(x, noise)
        return y, self.layer.deepspeed_moe.gate.last

    def update_gate(self, momentum: float = 0.0, normalize: bool = False, value_norm_weighted: bool = False) -> None:
        """Not over ranks: no rank has all keys. Raises SpecError."""
        raise SpecError("The gate of an expert-parallel layer cannot follow its keys.", "Train EMoE with ep_size 1.")


class DeepSpeedEngine:
    """See :class:`workers.engines.base.Engine`.

    Args:
        module: plain module, with equal weights on all ranks; kept as the plain layout of evaluation and export.
        groups: its trainable parameters by learning rate.
        options: optimiser, clipping and precision. bf16 is autocast, see :class:`OptimizerOptions`.
        zero: stage and expert parallelism.
        device: where to train.

    Raises:
        SpecError: sizes that do not divide, clipping together with expert parallelism, or nothing to share.
        EnvironmentProblem: DeepSpeed is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        options: OptimizerOptions,
        zero: DeepSpeedOptions,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        deepspeed = start(self.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.options, self.zero = options, zero
        _check(zero, self.world_size, options)
        _check_experts(zero, module)
        self._plain = module.to(self.device)
        names = {parameter: name for name, parameter in module.named_parameters()}
        self.module = copy.deepcopy(self._plain)
        ep_rank = self.rank % zero.ep_size
        blocks = _replace(self.module, MoEBlock, ParallelMoEBlock, zero.ep_size, ep_rank)
        layers = _replace(self.module, MoELayer, ParallelMoELayer, zero.ep_size, ep_rank)
        experts = {f"{name}.layer": (name, block.spec.num_experts) for name, block in blocks.items()}
        stacked = {f"{name}.layer": (name, layer.names) for name, layer in layers.items()}
        self._layout = Layout(self.module, list(module.state_dict()), experts, zero.ep_size, ep_rank, stacked)
        self.optimizer = self._build(deepspeed, [(group, [names[p] for p in group.parameters]) for group in groups])

    def _build(self, deepspeed: Any, groups: list[tuple[ParamGroup, list[str]]]) -> torch.optim.Optimizer:
        from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

        mine = {self._layout.plain_names[name]: parameter for name, parameter in self.module.named_parameters()}
        local = [
            ParamGroup(group.name, [mine[n] for n in names if n in mine], group.lr, group.weight_decay)
            for group, names in groups
        ]
        optimizer = build_optimizer(local, self.options)
        if any(is_moe_param(parameter) for parameter in self.module.parameters()):
            split = split_params_into_different_moe_groups_for_optimizer(optimizer.param_groups)
            optimizer.param_groups[:] = [group for group in split if group["params"]]
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=self._config(), dist_init_required=False
            )
        stage = self.zero.zero_stage
        self._moments = Moments(optimizer, self._engine.optimizer if stage > 0 else None, deepspeed.utils)
        self._layout.group = _expert_group(self.zero.ep_size) if self._layout.parallel else None
        return optimizer

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand in step()
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 30,
            "wall_clock_breakdown": False,
            "zero_optimization": {"stage": self.zero.zero_stage, "overlap_comm": False},
            "gradient_clipping": self.options.clip or 0.0,  # DeepSpeed's own default is to clip at 1
        }

    def set_rates(self, multipliers: Mapping[str, float]) -> dict[str, float]:
        """See the protocol."""
        return set_rates(self.optimizer, multipliers)

    def step(self, microbatches: Sequence[Any], loss_fn: LossFunction) -> dict[str, float]:
        """See the protocol."""
        items = weighted(microbatches, self.world_size)
        sums: dict[str, Tensor] = {}
        for number, item in enumerate(items):
            self._engine.set_gradient_accumulation_boundary(number == len(items) - 1)
            with autocast(self.device, self.options.precision):
                total, parts = read_losses(loss_fn(self.module, item.batch))
            for name, value in {"loss": total, **parts}.items():
                share = value.detach().double() * item.weight
                sums[name] = sums[name] + share if name in sums else share
            # DeepSpeed averages over the ranks where our weights sum to 1 over them.
            self._engine.backward(total * (item.weight * self.world_size), scale_wrt_gas=False)
        values = reduce_values(sums, self.world_size, self.device)
        self._engine.step()
        if self.options.clip is not None:
            values["grad_norm"] = float(self._engine.get_global_grad_norm() or 0.0)
        return values

    def reset_optimizer(self) -> None:
        """See the protocol. Zero moments at step 0 are what a new Adam starts from."""
        self._moments.zero()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the protocol."""
        return self._layout.gather(tensors)

    def scatter(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the protocol."""
        return self._layout.scatter(tensors, self.device)

    def plain(self) -> nn.Module:
        """See the protocol."""
        load_strict(self._plain, self.gather(self.module.state_dict()))
        return self._plain

    def state_dict(self) -> EngineState:
        """See the protocol."""
        moments: dict[str, dict[str, Tensor]] = {}
        for slot, local in self._moments.read(self.module).items():
            for name, value in self.gather(local).items():
                moments.setdefault(name, {})[slot] = value
        step = self._moments.step()
        for found in moments.values():
            found["step"] = step.clone()
        return EngineState(module=self.gather(self.module.state_dict()), optimizer=moments)

    def load_state_dict(self, state: EngineState) -> None:
        """See the protocol."""
        expected = set(self._plain.state_dict())
        unknown = [name for name in state.optimizer if name not in expected]
        if unknown:
            raise CheckpointError(
                f"The checkpoint has optimiser state for {unknown[0]!r}, which this model does not have.",
                "Start the stage afresh (delete its scratch folder) after changing the model.",
            )
        load_strict(self._plain, state.module)
        self.module.load_state_dict(self.scatter(state.module))
        names = self._layout.plain_names
        local = {
            n: {slot: self._layout.part(n, value) for slot, value in state.optimizer.get(names[n], {}).items()}
            for n, p in self.module.named_parameters()
            if p.requires_grad
        }
        steps = [float(found["step"]) for found in state.optimizer.values() if "step" in found]
        self._moments.write(self.module, local, max(steps, default=0.0))

    def barrier(self) -> None:
        """See the protocol."""
        dist.barrier()

    def destroy(self) -> None:
        """See the protocol."""
        self._engine.destroy()


def _expert_group(ep_size: int) -> Any:
    """The process group of the ranks that share one set of experts."""
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(f"ep_size_{ep_size}")


def _check(zero: DeepSpeedOptions, world_size: int, options: OptimizerOptions) -> None:
    if zero.zero_stage not in (0, 1, 2):
        raise SpecError(f"zero_stage is {zero.zero_stage}.", "Use 0, 1 or 2: stage 3 does not support MoE layers.")
    if zero.ep_size < 1 or world_size % zero.ep_size:
        raise SpecError(
            f"ep_size is {zero.ep_size} with {world_size} ranks.", "The number of ranks must be a multiple of ep_size."
        )
    if zero.ep_size > 1 and options.clip is not None:
        raise SpecError(
            f"Gradient clipping (clip={options.clip}) cannot be combined with ep_size={zero.ep_size}.",
            "DeepSpeed averages the norms of ranks that hold different experts: set clip to null or ep_size to 1.",
        )


def _check_experts(zero: DeepSpeedOptions, module: nn.Module) -> None:
    if zero.ep_size > 1 and not any(type(child) in (MoEBlock, MoELayer) for child in module.modules()):
        raise SpecError(
            f"ep_size is {zero.ep_size}, but the network has no experts that ranks could share.", "Set ep_size to 1."
        )


def _replace(
    module: nn.Module, plain: type[nn.Module], parallel: type[Parallel], ep_size: int, ep_rank: int
) -> dict[str, Parallel]:
    """Put parallel layers where the plain ones are; returns them by name. Raises SpecError (sizes)."""
    found = {name: child for name, child in module.named_modules() if type(child) is plain}
    replaced: dict[str, Parallel] = {}
    for name, child in found.items():
        parent, _, last = name.rpartition(".")
        replaced[name] = parallel(child, ep_size, ep_rank)
        setattr(module.get_submodule(parent), last, replaced[name])
    return replaced
