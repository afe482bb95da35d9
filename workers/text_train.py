"""One run of a text search: a method, a rate, a seed. Resumable at any step, bit-equal.

Source: EMoE (arXiv 2310.10908), section 4, and its public search scripts: AdamW, linear decay without warm-up, early
stopping by the average of the task's metrics, gates moved after every step.

Differs: the task's head, the order of the rows and dropout depend on the user's seed alone, so that the methods of one
seed start alike; the best score starts at minus infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.losses import Losses
from moe.models.emoe_blocks import converted_layers
from workers.batches import chunks
from workers.checkpoints import CheckpointDir
from workers.context import Context, run_seed
from workers.device import setup
from workers.engines.base import OptimizerOptions, ParamGroup
from workers.glue import glue_metrics
from workers.loop import Evaluation, FitResult, LoopSpec, every, fit, mix
from workers.sampling import EpochSampler
from workers.text_engine import TextEngine
from workers.text_models import adapt_and_convert, build_base, kept_names, load_kept, save_tuned, source_digest
from workers.text_settings import Job, Phase, SearchSettings, tuning_rules
from workers.text_split import labels_for, layers_of, shared_split
from workers.text_tokens import Batch, TokenRows, read_tokens

ROUTING = "routing.npz"
EVAL_BATCH = 32


def search_member(settings: SearchSettings, job: Job, context: Context) -> dict[str, Any]:
    """Train one run and write a ``text_model`` artifact; returns its ``meta``."""
    from moe.models.emoe_tuning import add_noise, set_trainable

    tokens = context.inputs["tokens"][0]
    device, seed = setup(context.threads, "auto").device, run_seed(context.member)
    splits = read_tokens(tokens.path, tokens.meta)
    torch.manual_seed(mix(seed, 4))
    model, family, fresh = build_base(settings.model, context.data_root, tokens.meta)
    spec = settings.emoe_spec(job.method, job.num_experts, job.top_k)
    layers = layers_of(settings, model)
    lora = settings.adapter if job.tuning == "lora" else None
    torch.manual_seed(mix(seed, 5))
    labels = labels_for(shared_split(settings, context), spec, layers)
    model, used = adapt_and_convert(model, family, lora, spec, layers, labels)
    if job.method == "noisy":
        add_noise(model, torch.Generator().manual_seed(mix(seed, 6)), settings.noise)
    rules = tuning_rules(settings, job, spec, layers)
    trained = set_trainable(model, rules)
    everything = settings.model.weights is None or job.method == "noisy"
    kept = kept_names(model, everything, fresh)
    result = _fit(model, settings, job, tokens.meta, splits, kept, context, device, seed)
    load_kept(model, result.selected, "all" if everything else "changed", "the selected state")
    save_tuned(context.output, model, result.selected, used, int(tokens.meta["special"]["pad"]))
    _write_routing(result.evaluations, context)
    best = next((e for e in reversed(result.evaluations) if e.step == result.best_step), result.evaluations[-1])
    context.metrics({f"selection/{name}": value for name, value in best.scores.items()}, step=best.step)
    return {
        "form": "text",
        "family": family,
        "source": settings.model.model_dump(mode="json"),
        "source_digest": source_digest(settings.model, context.data_root),
        "kept": "all" if everything else "changed",
        "outputs": tokens.meta["outputs"],
        "dataset": tokens.meta["dataset"],
        "tokens": tokens.digest,
        **job.model_dump(mode="json"),
        "seed": seed,
        "lora": None if lora is None else lora.model_dump(mode="json"),
        "emoe": None if spec is None else spec.model_dump(mode="json"),
        "layers": list(layers),
        "rules": settings.rules,
        "steps": result.steps,
        "best_step": best.step,
        "selection": best.scores,
        "history": [{"step": e.step, **e.scores} for e in result.evaluations],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "trained_tensors": len(trained),
        "fresh": fresh,
    }


def _fit(
    model: nn.Module,
    settings: SearchSettings,
    job: Job,
    meta: Mapping[str, Any],
    splits: Mapping[str, TokenRows],
    kept: set[str],
    context: Context,
    device: torch.device,
    seed: int,
) -> FitResult:
    """The loop of one run."""
    phase, pad, train = settings.phase(job.tuning), int(meta["special"]["pad"]), splits["train"]
    sampler = EpochSampler(np.arange(len(train)), phase.batch_size, mix(seed, 1))
    steps = total_steps(phase, sampler.steps_per_epoch)
    spec = settings.emoe_spec(job.method, job.num_experts, job.top_k)
    rules = tuning_rules(settings, job, spec, layers_of(settings, model))
    engine = TextEngine(
        model,
        parameter_groups(model, job, phase, rules),
        OptimizerOptions("adamw", clip=phase.clip, precision=phase.precision),
        kept,
        device,
    )
    return fit(
        engine,
        lambda step: [train.batch(sampler.batch(step), pad).to(device)],
        LoopSpec(
            steps=steps,
            seed=mix(seed, 3),
            schedules={"*": lambda step: 1.0 - step / steps},
            checkpoint_every=phase.checkpoint_every,
            evaluate_after=every(phase.evaluate_every or sampler.steps_per_epoch),
            metric="average",
            patience=phase.patience,
        ),
        context,
        CheckpointDir(context.scratch / "checkpoints", log=context.log),
        evaluate=_evaluator(splits["selection"], pad, context.scratch / "routing", device),
        loss_fn=batch_losses,
    )


def batch_losses(module: nn.Module, batch: Batch) -> Losses:
    """Task and balance loss of a batch; padding is left out of the experts."""
    from moe.models.text import classify, text_losses

    return text_losses(module, classify(module, batch.ids, batch.mask, batch.types), batch.labels)


def parameter_groups(model: nn.Module, job: Job, phase: Phase, rules: Any) -> list[ParamGroup]:
    """The trainable parameters by rate and decay: one rate in full runs, the public four groups in low-rank ones."""
    from moe.keymaps.emoe import official_name
    from moe.models.emoe_tuning import full_tuning_groups, rate_groups

    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    official: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        official.setdefault(official_name(name), []).append(parameter)
    groups = full_tuning_groups(official) if job.tuning == "full" else rate_groups(official, rules)
    return [
        ParamGroup(
            f"{'decay' if g.decay else 'plain'}-{g.lr_factor:g}",
            [p for name in g.names for p in official[name]],
            job.lr * g.lr_factor,
            phase.weight_decay if g.decay else 0.0,
        )
        for g in groups
        if g.names
    ]


def total_steps(phase: Phase, per_epoch: int) -> int:
    """Updates of a run: epochs or steps, whichever ends first."""
    limits = (None if phase.epochs is None else phase.epochs * per_epoch, phase.steps)
    return min(limit for limit in limits if limit is not None)


def predict_rows(
    module: nn.Module,
    rows: TokenRows,
    pad: int,
    device: torch.device,
    batch_size: int = EVAL_BATCH,
    check: Callable[[], None] | None = None,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Outputs ``[N, outputs]`` of all rows, in their order; the module is in evaluation mode."""
    from moe.models.text import classify

    parts = []
    with torch.inference_mode():
        for piece in chunks(np.arange(len(rows)), batch_size):
            batch = rows.batch(piece, pad).to(device)
            parts.append(classify(module, batch.ids, batch.mask, batch.types).float().cpu().numpy())
            if check is not None:
                check()
    return np.concatenate(parts)


def score_rows(outputs: np.ndarray[Any, Any], rows: TokenRows) -> dict[str, float]:
    """The split's metrics and their ``average``."""
    found = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return glue_metrics("", found, rows.labels, rows.metrics)


class RoutingCount:
    """Choices of each expert, added up over passes; empty for networks without a gate."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = converted_layers(module)
        self.counts: list[Tensor] = [torch.zeros(layer.spec.num_experts) for layer in self._layers]

    def add(self) -> None:
        """Take in the last pass."""
        for total, layer in zip(self.counts, self._layers, strict=True):
            record = layer.moe.last
            if record is not None:
                total += record.routing.counts_E.detach().cpu()


def _evaluator(
    rows: TokenRows, pad: int, folder: Path, device: torch.device
) -> Callable[[nn.Module, int], Mapping[str, float]]:
    """Scores on the selection rows; the experts' loads on them go into a file a step, which survives a resume."""

    def evaluate(module: nn.Module, step: int) -> Mapping[str, float]:
        count = RoutingCount(module)
        scores = score_rows(predict_rows(module, rows, pad, device, check=count.add), rows)
        if count.counts:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{step:08d}.npy", torch.stack(count.counts).numpy())
        return scores

    return evaluate


def _write_routing(evaluations: list[Evaluation], context: Context) -> None:
    """``routing.npz``: steps ``[R]`` and counts ``[R, layers, E]`` of the evaluations, where there are gates."""
    files = [(e.step, context.scratch / "routing" / f"{e.step:08d}.npy") for e in evaluations]
    found = [(step, np.load(file)) for step, file in files if file.is_file()]
    if found:
        steps, counts = zip(*found, strict=True)
        np.savez(context.output / ROUTING, steps=np.asarray(steps), counts=np.stack(counts))
