"""Adapters of EMoE's models: converted layers, training runs, DomainBed's ViT, SwiGLU, trainable sets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from moe.conversion.split import split_keys
from moe.keymaps.emoe import from_official, official_name, own_name, vit_from_official
from moe.models.emoe_blocks import converted_layers, update_gates
from moe.models.emoe_convert import balance_loss, convert_layer, convert_layers
from moe.models.emoe_spec import EMoESpec
from moe.models.emoe_tuning import full_tuning_groups, rate_groups, set_trainable
from moe.models.swiglu import BlockMaskedSwiGLU
from moe.models.text import add_lora, build_text_model, text_step
from moe.models.text_spec import TextModelSpec, TuningRules
from tests.golden.registry import check, op
from tests.golden.replay import compare

Case = dict[str, Any]


def spec_of(params: Case, state: Case, **more: Any) -> EMoESpec:
    """The public rules with a case's values; the width of a cosine gate is told by its weights."""
    learned = params.get("gate", params.get("router")) == "cosine_top"
    gate = "cosine" if learned else "avg_k" if params["one_score"] else "linear"
    values = {"num_experts": params["num_experts"], "top_k": min(params["top_k"], params["num_experts"]), "gate": gate}
    if learned:
        values["one_score"] = params["one_score"]
        values["projection"] = next(w.shape[0] for name, w in state.items() if name.endswith("sim_matrix"))
    rules = {"capacity_factor": params["capacity_factor"], "gate_noise": params.get("gate_noise", 1.0), "dropout": 0.0}
    return EMoESpec.official(**values, **rules, **more)


def weights(tensors: Case) -> Case:
    return {name.removeprefix("w."): value for name, value in tensors.items() if name.startswith("w.")}


def load(module: nn.Module, state: Case) -> None:
    """Load what is given; everything must be taken."""
    own = module.state_dict()
    unknown = state.keys() - own.keys()
    assert not unknown, unknown
    module.load_state_dict(own | state, strict=True)


def gate_state(state: Case, prefix: str = "") -> Case:
    """The gate tensors below ``<prefix>mlp.`` under a converted layer's own names."""
    found = {name: value for name, value in state.items() if name.startswith(f"{prefix}mlp.gates.")}
    return {own_name(f"x.{name}").removeprefix(f"x.{prefix}mlp."): value for name, value in found.items()}


def run_layer(case: Case, tensors: Case, layer: nn.Module, call: Any) -> Case:
    """Dense, converted, and the balance loss of one transformer layer."""
    layer.eval()
    state = weights(tensors)
    dense = {name: value for name, value in state.items() if not name.startswith("mlp.gates")}
    load(layer, {vit_from_official(f"x.{name}").removeprefix("x.") if isinstance(layer, VIT()) else name: value
                 for name, value in dense.items()})  # fmt: skip
    with torch.no_grad():
        y_dense = call(layer, tensors["in.hidden"])
        convert_layer(layer, tensors["in.labels"], spec_of(case["params"], state))
        ffn = converted_layers(layer)[0]
        load(ffn, gate_state(state))
        y = call(layer.eval(), tensors["in.hidden"])
    return {"out.y": y, "out.y_dense": y_dense, "out.l_aux": ffn.moe.last.balance.view(1)}


def VIT() -> type:  # noqa: N802
    from transformers.models.vit.modeling_vit import ViTLayer

    return ViTLayer


@op("emoe.layer_bert")
def layer_bert(case: Case, tensors: Case) -> Case:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    neurons, width = tensors["w.intermediate.dense.weight"].shape
    config = BertConfig(
        hidden_size=width, intermediate_size=neurons, num_attention_heads=case["params"]["heads"],
        layer_norm_eps=case["params"]["layernorm_eps"], attn_implementation="eager",
    )  # fmt: skip
    return run_layer(case, tensors, BertLayer(config), lambda layer, x: first(layer(x)))


@op("emoe.layer_gpt2")
def layer_gpt2(case: Case, tensors: Case) -> Case:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    width, neurons = tensors["w.mlp.c_fc.weight"].shape
    config = GPT2Config(
        n_embd=width, n_inner=neurons, n_head=case["params"]["heads"],
        layer_norm_epsilon=case["params"]["layernorm_eps"], attn_implementation="eager",
    )  # fmt: skip

    def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min).triu(1)[None, None]
        return first(layer(x, attention_mask=mask))

    return run_layer(case, tensors, GPT2Block(config, layer_idx=0), call)


@op("emoe.layer_vit")
def layer_vit(case: Case, tensors: Case) -> Case:
    from transformers import ViTConfig

    neurons, width = tensors["w.intermediate.dense.weight"].shape
    config = ViTConfig(
        hidden_size=width, intermediate_size=neurons, num_attention_heads=case["params"]["heads"],
        layer_norm_eps=case["params"]["layernorm_eps"], attn_implementation="eager",
    )  # fmt: skip
    return run_layer(case, tensors, VIT()(config), lambda layer, x: first(layer(x)))


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def train(case: Case, tensors: Case, family: str) -> Case:
    """The project's step over the stored batches."""
    params, state = case["params"], weights(tensors)
    embedding = "bert.embeddings.word_embeddings" if family == "bert" else "transformer.wte"
    positions = "bert.embeddings.position_embeddings" if family == "bert" else "transformer.wpe"
    vocabulary, width = state[f"{embedding}.weight"].shape
    dense_key = next(name for name in state if name.endswith(("layer.0.intermediate.dense.bias", "h.0.mlp.c_fc.bias")))
    head = state["classifier.weight" if family == "bert" else "score.weight"]
    model = build_text_model(
        TextModelSpec(
            family=family, num_outputs=head.shape[0], hidden=width, layers=2, heads=params["heads"],
            ffn=state[dense_key].shape[0], vocabulary=vocabulary, positions=state[f"{positions}.weight"].shape[0],
            dropout=params["dropout"], pad_token=params["pad_token_id"],
        )
    )  # fmt: skip
    # No text of the cases is padded, so no word of theirs may count as padding.
    model.config.pad_token_id = vocabulary
    spec = spec_of(params, state, gate_momentum=params["gate_momentum"], aux_weight=params["aux_weight"])
    keys = next(value for name, value in state.items() if name.endswith("batched_fc1_w"))
    labels = split_keys(torch.empty(keys.shape[0] * keys.shape[1], 1), params["num_experts"], "contiguous")
    convert_layers(model, params["moe_layers"], spec, dict.fromkeys(params["moe_layers"], labels))
    load(model, from_official(state, model.state_dict()))
    dead = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".dense.weight")}
    rules = TuningRules(moe_layers=params["moe_layers"], one_score=params["one_score"])
    names = set_trainable(model, rules)
    by_name = {official_name(name): p for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [by_name[n] for n in group.names], "weight_decay": params["weight_decay"] * group.decay}
            for group in full_tuning_groups(names, params["no_decay"])
        ],
        lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"],
    )  # fmt: skip
    model.train()
    ffn = converted_layers(model)[0]
    losses = []
    for t in range(params["steps"]):
        hook = ffn.moe.register_forward_pre_hook(lambda module, args, t=t: (args[0], tensors["in.noise"][t]))
        task, balance = text_step(model, optimizer, tensors["in.input_ids"][t], tensors["in.labels"][t])
        hook.remove()
        losses.append((task, balance / params["aux_weight"]))
    unused = "encoder.layer.1.intermediate.dense.weight"
    for name, value in dead.items():
        assert unused not in name or torch.equal(value, model.state_dict()[name]), f"{name} changed"
    final = {official_name(name): value for name, value in model.state_dict().items()}
    layer = "bert.encoder.layer.1" if family == "bert" else "transformer.h.1"
    out = {
        f"out.final.{name}": value.transpose(1, 2) if name.endswith("batched_fc2_w") else value
        for name, value in final.items()
        if name.startswith((f"{layer}.mlp.experts", f"{layer}.mlp.gates", "classifier.", "score."))
        or (name.startswith(layer) and ("LayerNorm" in name or ".ln_2" in name))
    }
    out["out.task_loss"], out["out.aux_loss"] = (torch.stack(column) for column in zip(*losses, strict=True))
    return out


@op("emoe.train_bert")
def train_bert(case: Case, tensors: Case) -> Case:
    return train(case, tensors, "bert")


@op("emoe.train_gpt2")
def train_gpt2(case: Case, tensors: Case) -> Case:
    return train(case, tensors, "gpt2")


@op("emoe.vit_domainbed")
def vit_domainbed(case: Case, tensors: Case) -> Case:
    from timm.models.vision_transformer import VisionTransformer

    params, state = case["params"], weights(tensors)
    patch, width = params["patch_size"], state["cls_token"].shape[-1]
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    model = VisionTransformer(
        img_size=side, patch_size=patch, num_classes=state["head.bias"].shape[0], embed_dim=width,
        depth=len(params["layers"]), num_heads=params["heads"],
        mlp_ratio=state["blocks.0.mlp.fc1.bias"].shape[0] / width,
        norm_layer=partial(nn.LayerNorm, eps=params["layernorm_eps"]),
    ).eval()  # fmt: skip
    load(model, {name: value for name, value in state.items() if ".gates." not in name})
    with torch.no_grad():
        dense = model(tensors["in.images"])
        chosen = [number for number, kind in enumerate(params["layers"]) if kind == "S"]
        spec = spec_of(params, state, split="copy" if params["split"] == "copy" else "balanced",
                       aux_weight=params["aux_layer_weight"])  # fmt: skip
        labels = None if params["split"] == "copy" else dict.fromkeys(chosen, tensors["in.labels"])
        convert_layers(model, chosen, spec, labels)
        model.eval()
        load(model, {own_name(name): value for name, value in state.items() if ".gates." in name})
        logits = model(tensors["in.images"])
        aux = torch.stack([ffn.spec.aux_weight * ffn.moe.last.balance for ffn in converted_layers(model)])
        assert torch.allclose(aux.sum(), balance_loss(model))
        out = {"out.logits": logits, "out.logits_dense": dense, "out.aux_loss": aux}
        if params["one_score"]:
            update_gates(model)
            out["out.logits_key_gate"] = model(tensors["in.images"])
    return out


@op("emoe.llama_ffn")
def llama_ffn(case: Case, tensors: Case) -> Case:
    params = case["params"]
    layers = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = tensors[f"w.{name}.weight"]
        layers[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layers[name].weight = nn.Parameter(weight.clone())
    ffn = BlockMaskedSwiGLU(**layers, **{k: params[k] for k in ("num_experts", "top_k", "select")})
    x = tensors["in.x"].clone().requires_grad_()
    y = ffn(x)
    (y * tensors["in.grad_y"]).sum().backward()
    everything = BlockMaskedSwiGLU(**layers, num_experts=params["num_experts"], top_k=params["num_experts"])
    grads = {f"out.grad.{name}.weight": layer.weight.grad for name, layer in layers.items()}
    return {"out.y": y, "out.y_dense": everything(x), "out.grad.x": x.grad, **grads}


@op("emoe.trainable_set")
def trainable_set(case: Case, tensors: Case) -> Case:
    params = case["params"]
    family = params["model"]
    model = build_text_model(
        TextModelSpec(family=family, hidden=8, layers=3, heads=2, ffn=16, vocabulary=20, positions=24)
    )
    if params["lora"]:
        model = add_lora(model, family)
    if params["to_MoE"]:
        spec = EMoESpec.official(num_experts=4, top_k=2, gate="avg_k" if params["one_score"] else "cosine")
        convert_layers(model, params["moe_layers"], spec)
    flags = ("lora", "freeze", "freeze_layer", "tune_moe_layers_only", "tune_gates_only", "tune_layernorm")
    rules = TuningRules(
        moe_layers=params["moe_layers"], one_score=params["one_score"], **{name: params[name] for name in flags}
    )
    names = set_trainable(model, rules)
    groups = [{"lr_factor": group.lr_factor, "names": sorted(group.names)} for group in rate_groups(names)]
    return {"out.count": torch.tensor([len(names)]), "expect": {"trainable": names, "groups": groups}}


@check("emoe.trainable_set")
def groups_as_sets(case: Case, tensors: Case, outputs: Case) -> Iterator[str]:
    groups = [{**group, "names": sorted(group["names"])} for group in case["expect"]["groups"]]
    yield from compare({**case, "expect": {**case["expect"], "groups": groups}}, tensors, outputs)
