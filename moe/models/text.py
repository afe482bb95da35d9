"""Text classifiers through transformers (extra ``text``): building, adapters, a pass with padding left out, one step.

Converting layers is ``moe.models.emoe_convert``. No weights are downloaded: they come in as state dicts.
Source: EMoE (arXiv 2310.10908); BERT (1810.04805), GPT-2, LLaMA (2302.13971) as transformers implements them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import EnvironmentProblem, RunFailed
from moe.losses import Losses
from moe.models.emoe_blocks import converted_layers, token_mask, update_gates
from moe.models.emoe_convert import balance_loss
from moe.models.text_spec import Family, LoraSpec, TextModelSpec

LORA_TARGETS: Mapping[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "v_proj"),
}
"""Linear layers that get low-rank adapters when none are named."""


def build_text_model(spec: TextModelSpec) -> nn.Module:
    """A sequence classifier with random weights; state-dict names are Hugging Face's.

    Raises:
        EnvironmentProblem: the extra ``text`` is not installed.
    """
    hf = _transformers()
    common: dict[str, Any] = {"num_labels": spec.num_outputs, "pad_token_id": spec.pad_token}
    rate = spec.dropout
    if spec.family == "bert":
        config = hf.BertConfig(
            vocab_size=spec.vocabulary, hidden_size=spec.hidden, num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads, intermediate_size=spec.ffn, max_position_embeddings=spec.positions,
            hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, **common,
        )  # fmt: skip
        model: nn.Module = hf.BertForSequenceClassification(config)
    elif spec.family == "gpt2":
        config = hf.GPT2Config(
            vocab_size=spec.vocabulary, n_embd=spec.hidden, n_layer=spec.layers, n_head=spec.heads, n_inner=spec.ffn,
            n_positions=spec.positions, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate, **common,
        )  # fmt: skip
        model = hf.GPT2ForSequenceClassification(config)
    else:
        config = hf.LlamaConfig(
            vocab_size=spec.vocabulary, hidden_size=spec.hidden, num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads, intermediate_size=spec.ffn, max_position_embeddings=spec.positions,
            **common,
        )  # fmt: skip
        model = hf.LlamaForSequenceClassification(config)
    return model


def add_lora(model: nn.Module, family: Family, spec: LoraSpec | None = None) -> nn.Module:
    """Low-rank adapters and a trained head; add them before converting layers.

    Raises:
        EnvironmentProblem: the extra ``text`` is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise EnvironmentProblem(
            "Low-rank adapters need peft.", "Install it with: pip install 'moepipe[text]'"
        ) from error
    lora = spec or LoraSpec()
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets or LORA_TARGETS[family]),
        fan_in_fan_out=family == "gpt2",
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def classify(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, token_types: Tensor | None = None
) -> Tensor:
    """Logits ``[B, outputs]``; converted layers leave out the tokens that ``attention_mask`` ``[B, S]`` marks 0.

    ``token_types`` ``[B, S]`` tells the texts of a pair apart (BERT).

    Differs: the public code routes padding, which takes seats and enters the balance loss; call the model itself for
    that.
    """
    types = {} if token_types is None else {"token_type_ids": token_types}
    with token_mask(model, attention_mask):
        return model(input_ids=input_ids, attention_mask=attention_mask, **types).logits  # type: ignore[no-any-return]


def text_losses(model: nn.Module, logits: Tensor, labels: Tensor) -> Losses:
    """Task loss of ``logits`` plus the weighted balance losses of the pass that made them; parts ``task``, ``balance``.

    Args:
        model: the network that has just run.
        logits: ``[B, outputs]``.
        labels: ``[B]`` classes, or float values with one output.
    """
    if logits.shape[-1] == 1:
        task = nn.functional.mse_loss(logits.squeeze(-1).float(), labels.float())
    else:
        task = nn.functional.cross_entropy(logits.float(), labels)
    balance = balance_loss(model) if converted_layers(model) else task.new_zeros(())
    return Losses(task + balance, {"task": task.detach(), "balance": balance.detach()})


def text_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimiser step on the task loss plus the weighted balance losses; then the avg-k gates follow their experts.

    Args:
        model: classifier in training mode.
        optimizer: over its trainable parameters.
        input_ids: ``[B, S]``.
        labels: ``[B]`` classes, or float values with one output.
        attention_mask: ``[B, S]``.

    Returns:
        Task loss and weighted balance loss (0 without converted layers), detached.

    Raises:
        RunFailed: a loss that is not finite; nothing is updated then.
    """
    losses = text_losses(model, classify(model, input_ids, attention_mask), labels)
    total, task, balance = losses.total, losses.parts["task"], losses.parts["balance"]
    if not bool(torch.isfinite(total)):
        raise RunFailed(
            f"The loss is {float(total)} (task {float(task)}, balance {float(balance)}).", "Lower the rate."
        )
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(total)
    optimizer.step()
    update_gates(model)
    return task, balance


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentProblem(
            "Text models need transformers.", "Install it with: pip install 'moepipe[text]'"
        ) from error
    return transformers
