"""Converted networks: equal to the dense one where they must be, exact to undo, faithful to the public names."""

import copy
import pickle
import subprocess
import sys

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moe.algorithms.base import algorithm
from moe.algorithms.emoe import TextConfig
from moe.conversion.split import DenseFFN, split_keys
from moe.errors import CheckpointError, SpecError
from moe.keymaps.emoe import cluster_file, from_official, official_name, own_name, to_official, vit_from_official
from moe.keymaps.emoe import vit_to_official as to_hub
from moe.models.emoe_blocks import ConvertedFFN, converted_layers, token_mask, update_gates
from moe.models.emoe_convert import (
    balance_loss,
    convert_layers,
    ffn_inputs,
    merge_layers,
    transformer_layers,
    unpermute,
)
from moe.models.emoe_forms import activation_name, layers_of
from moe.models.emoe_layers import large_vit_layers, last_even_layers, llama_layers, vision_layers
from moe.models.emoe_spec import EMoESpec
from moe.models.emoe_tuning import add_noise, rate_groups, set_trainable, trains
from moe.models.swiglu import BlockMaskedSwiGLU, permute_swiglu, unpermute_swiglu
from moe.models.text import add_lora, build_text_model, classify, text_step
from moe.models.text_spec import TextModelSpec, TuningRules

SMALL = {"hidden": 16, "layers": 3, "heads": 2, "ffn": 24, "vocabulary": 30, "positions": 16, "dropout": 0.0}
QUIET = {"num_experts": 4, "top_k": 2, "restarts": 1}
FAMILIES = ("bert", "gpt2", "llama", "timm", "hf_vit")


def network(family):
    torch.manual_seed(0)
    if family == "timm":
        size = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5}
        return VisionTransformer(num_classes=3, **size).eval()
    if family == "hf_vit":
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return ViTForImageClassification(config).eval()
    model = build_text_model(TextModelSpec(family=family, **SMALL))
    for parameter in model.parameters():  # biases that are zero would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def run(model, rows=slice(None)):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, VisionTransformer) or hasattr(model, "vit"):
        out = model(torch.randn(4, 3, 8, 8, generator=generator)[rows])
        return out if isinstance(out, torch.Tensor) else out.logits
    return model(input_ids=torch.randint(1, 30, (4, 9), generator=generator)[rows]).logits


def ffn(neurons=24, width=6, spec=None, **more):
    generator = torch.Generator().manual_seed(3)
    shapes = ((neurons, width), (neurons,), (width, neurons), (width,))
    dense = DenseFFN(*(torch.randn(shape, generator=generator) for shape in shapes))
    spec = spec or EMoESpec(**{**QUIET, **more})
    return dense, ConvertedFFN(dense, split_keys(dense.keys_FD, spec.num_experts, "random"), spec).eval()


def dense_output(dense, x):
    return nn.functional.gelu(x @ dense.keys_FD.t() + dense.bias_F) @ dense.values_DF.t() + dense.bias_D


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_together_are_the_dense_network(family):
    model = network(family)
    before = run(model)
    convert_layers(model, [0, 2], EMoESpec(num_experts=4, top_k=4, restarts=1))
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts_change_it_and_rows_do_not_see_each_other(family):
    model = network(family)
    before = run(model)
    convert_layers(model, [1], EMoESpec(**QUIET))
    after = run(model)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(run(model, slice(2, 3)), after[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama"])
@pytest.mark.parametrize("gate", ["avg_k", "cosine"])
def test_merging_an_untrained_conversion_is_bit_equal(family, gate):
    model = network(family)
    state, before, kinds = model.state_dict(), run(model), [type(m) for m in model.modules()]
    state = {name: value.clone() for name, value in state.items()}
    convert_layers(model, [0, 2], EMoESpec(num_experts=6, top_k=3, restarts=1, gate=gate))
    assert merge_layers(model) == {0: 0.0, 2: 0.0}
    merged = model.state_dict()
    assert list(merged) == list(state) and [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(merged[name], value) for name, value in state.items())
    assert torch.equal(run(model), before)


def test_a_permuted_llama_is_the_same_function_and_can_be_put_back():
    model = network("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = run(model)
    labels = convert_layers(model, [1], EMoESpec(**QUIET))
    stock = network("llama")
    assert set(model.state_dict()) == set(stock.state_dict())  # readable by stock code
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(stock), before, rtol=1e-4, atol=1e-5)
    unpermute(transformer_layers(model)[1], labels[1])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_permutation_of_tokens_permutes_results(experts, top_k, tokens, seed):
    dense, layer = ffn(neurons=60, num_experts=experts, top_k=min(top_k, experts))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 6, generator=generator)
    order = torch.randperm(tokens, generator=generator)
    torch.testing.assert_close(layer(x)[order], layer(x[order]), rtol=1e-4, atol=1e-5)
    if top_k >= experts:
        torch.testing.assert_close(layer(x), dense_output(dense, x), rtol=1e-4, atol=1e-4)


def test_worst_and_other_experts_complement_the_best():
    dense, top = ffn(num_experts=4, top_k=1)
    _, rest = ffn(num_experts=4, top_k=1, choice="not_top")
    _, bottom = ffn(num_experts=4, top_k=1, choice="bottom")
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    # Each adds the output bias once.
    torch.testing.assert_close(top(x) + rest(x) - dense.bias_D, dense_output(dense, x), rtol=1e-4, atol=1e-4)
    chosen = top.moe.last.routing.experts_NK
    assert not bool((chosen == rest.moe.last.routing.experts_NK).any())
    assert torch.equal(bottom.moe.gate(x).argmax(1), top.moe.gate(x).argmin(1))
    for layer in (rest, bottom):
        gate = layer.moe.gate.weight.clone()
        layer.update_gate()
        assert torch.equal(gate, layer.moe.gate.weight)


def test_the_gate_follows_the_keys_with_momentum_and_bias():
    _, layer = ffn(gate="avg_k_bias", gate_momentum=0.75)
    start = layer.moe.gate.weight.clone()
    torch.testing.assert_close(start, layer.moe.experts.w1.mean(1))
    torch.testing.assert_close(layer.moe.gate.bias, layer.moe.experts.b1.mean(1))
    with torch.no_grad():
        layer.moe.experts.w1 += 1
        layer.moe.experts.b1 += 1
    layer.update_gate()
    torch.testing.assert_close(layer.moe.gate.weight, start + 0.25)
    assert not any(parameter.requires_grad for parameter in layer.moe.gate.parameters())
    _, learned = ffn(gate="cosine")
    before = [p.clone() for p in learned.moe.gate.parameters()]
    update_gates(learned)
    assert all(torch.equal(a, b) for a, b in zip(before, learned.moe.gate.parameters(), strict=True))


def test_padding_is_left_out():
    model = network("bert")
    convert_layers(model, [1], EMoESpec(num_experts=4, top_k=2, restarts=1, capacity_factor=1.0, eval_capacity=True))
    ids = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.long)
    short = classify(model, ids, mask)
    padded = nn.functional.pad(ids, (0, 5))
    torch.testing.assert_close(classify(model, padded, nn.functional.pad(mask, (0, 5))), short, rtol=1e-4, atol=1e-5)
    layer = converted_layers(model)[0]
    assert layer.moe.last.scores_NE.shape[0] == 12 and layer._mask_N is None
    with token_mask(model, torch.ones(3, 3)), pytest.raises(SpecError, match="mask has 9 entries, the input 22"):
        model(input_ids=padded)


def test_official_rules_differ_where_they_should():
    spec = EMoESpec.official(num_experts=4, top_k=2)
    assert spec.router().capacity_factor == 1.5 and spec.router().eval_capacity and spec.router().batch_prioritized
    assert EMoESpec(num_experts=4, top_k=2).router().capacity_factor is None
    model = build_text_model(TextModelSpec(family="gpt2", **{**SMALL, "dropout": 0.3}))
    convert_layers(model, [0], EMoESpec(**QUIET))
    convert_layers(model, [1], EMoESpec.official(**QUIET))
    ours, official = converted_layers(model)
    assert (ours.output_dropout.p, ours.moe.experts.dropout) == (0.3, 0.0)
    assert (official.output_dropout.p, official.moe.experts.dropout, official.moe.experts.dropout_first) == (
        0,
        0.1,
        True,
    )


def test_copies_pickles_and_second_derivatives():
    _, layer = ffn()
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    double = copy.deepcopy(layer).double()
    parameters = [double.moe.experts.w1, double.moe.experts.w2]

    def call(*weights):
        names = {"moe.experts.w1": weights[0], "moe.experts.w2": weights[1]}
        return torch.func.functional_call(double, names, (x.detach().double(),))

    assert torch.autograd.gradcheck(call, parameters)
    first = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), layer.moe.experts.w1)[0]
    assert second.abs().sum() > 0


def test_bfloat16_weights_are_kept():
    model = network("timm").bfloat16()
    convert_layers(model, [1], EMoESpec(**QUIET))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert model(images).isfinite().all() and converted_layers(model)[0].moe.experts.w1.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bert", "gpt2", "timm", "hf_vit"])
@pytest.mark.parametrize("gate", ["avg_k", "cosine"])
def test_official_names_there_and_back(family, gate):
    model = network(family)
    convert_layers(model, [1], EMoESpec(**QUIET, gate=gate))
    official = to_official(model.state_dict())
    assert not any(".moe." in name or "labels_F" in name for name in official)
    layer = next(name.removesuffix(".experts.batched_fc2_w") for name in official if name.endswith("batched_fc2_w"))
    assert official[f"{layer}._num_global_experts"] == 4 and layer.endswith(".mlp")
    assert family != "hf_vit" or "vit.encoder.layer.0.attention.attention.query.weight" in official
    twin = network(family)
    convert_layers(twin, [1], EMoESpec(**QUIET, gate=gate, split="contiguous"))
    old = {f"base_model.model.{name}": value for name, value in official.items()}
    bias = f"base_model.model.{layer}.experts.batched_fc1_bias"
    old[bias] = old[bias].unsqueeze(1)  # as very old files have it
    twin.load_state_dict(from_official(old, twin.state_dict()))
    torch.testing.assert_close(run(twin), run(model))
    for name in model.state_dict():
        assert "labels_F" in name or "bias_rest" in name or own_name(official_name(name)) == name


def test_labels_of_a_vit_come_back_from_its_dead_dense_weights():
    model, dense = network("hf_vit"), network("hf_vit")
    labels = convert_layers(model, [1], EMoESpec(**QUIET))[1]
    keys = dense.state_dict()["vit.layers.1.mlp.fc1.weight"]
    official = {**to_official(model.state_dict()), "vit.encoder.layer.1.intermediate.dense.weight": keys}
    assert torch.equal(from_official(official, model.state_dict())["vit.layers.1.mlp.labels_F"], labels)


def test_labels_come_back_from_the_dead_dense_weights():
    model = network("bert")
    labels = convert_layers(model, [1], EMoESpec(**QUIET, keep_dense=True))[1]
    official = to_official(model.state_dict())
    assert "bert.encoder.layer.1.intermediate.dense.weight" in official
    lean = network("bert")
    convert_layers(lean, [1], EMoESpec(**QUIET, split="contiguous"))
    state = from_official(official, lean.state_dict())
    assert torch.equal(state["bert.encoder.layer.1.intermediate.labels_F"], labels)
    lean.load_state_dict(state)
    merge_layers(lean)
    for name, value in network("bert").state_dict().items():
        torch.testing.assert_close(lean.state_dict()[name], value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, k: s.pop(k), "1 missing: bert.encoder.layer.1.mlp.experts.batched_fc1_w"),
        (lambda s, k: s.update({k: s[k].transpose(1, 2)}), r"batched_fc1_w is transposed: \(4, 16, 6\) instead of"),
        (lambda s, k: s.update({k: s[k][:3]}), r"batched_fc1_w is truncated: \(3, 6, 16\) instead of \(4, 6, 16\)"),
        (lambda s, k: s.update({"bert.extra": s[k]}), "1 unexpected: bert.extra"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message):
    model = network("bert")
    convert_layers(model, [1], EMoESpec(**QUIET))
    state = to_official(model.state_dict())
    change(state, "bert.encoder.layer.1.mlp.experts.batched_fc1_w")
    with pytest.raises(CheckpointError, match=message):
        from_official(state, model.state_dict())
    with pytest.raises(CheckpointError, match="missing"):
        from_official(network("gpt2").state_dict(), model.state_dict(), "the file")


def test_names_of_transformers_vit():
    hub = "vit.encoder.layer.3.attention.attention.query.weight"
    assert vit_from_official(hub) == "vit.layers.3.attention.q_proj.weight" and to_hub(vit_from_official(hub)) == hub
    for name in network("hf_vit").state_dict():
        assert vit_from_official(to_hub(name)) == name
    assert cluster_file("deit", 8, 24, 1536, 384) == "cluster_ids/expert24/layer8_1536_384.npy"
    assert cluster_file("bert", 10, 64, 3072, 768) == "cluster_ids/expert64/bert_layer10_3072_768.npy"
    assert (
        cluster_file("llama", 28, 64, 11008, 4096)
        == "model.layers.28.mlp_clusters64_shapetorch.Size([11008, 4096]).pth"
    )


def test_bad_conversions_leave_the_network_alone():
    model = network("bert")
    before = run(model)
    with pytest.raises(SpecError, match="no layer 3: the network has the layers 0 to 2"):
        convert_layers(model, [1, 3], EMoESpec(**QUIET))
    with pytest.raises(SpecError, match="24 neurons cannot be split into 7"):
        convert_layers(model, [1, 2], EMoESpec(num_experts=7, top_k=2))
    assert torch.equal(run(model), before)
    convert_layers(model, [1], EMoESpec(**QUIET))
    with pytest.raises(SpecError, match="converted before"):
        convert_layers(model, [1], EMoESpec(**QUIET))
    with pytest.raises(SpecError, match="SwiGLU layer keeps the K blocks"):
        convert_layers(network("llama"), [1], EMoESpec(**QUIET, gate="cosine"))
    with pytest.raises(SpecError, match=r"capacity_factor=1\.0 has no effect on a SwiGLU layer"):
        convert_layers(network("llama"), [1], EMoESpec(**QUIET, capacity_factor=1.0))
    with pytest.raises(SpecError, match="select=up has no effect here"):
        convert_layers(network("bert"), [1], EMoESpec(**QUIET, select="up"))
    with pytest.raises(SpecError, match="no layers with a feed-forward part"):
        convert_layers(nn.Sequential(nn.Linear(2, 2)), [0], EMoESpec(**QUIET))
    with pytest.raises(SpecError, match="Conv2d cannot be split"):
        DenseFFN.of(nn.Conv2d(1, 1, 1), nn.Linear(1, 1))
    with pytest.raises(SpecError, match="not a feed-forward layer"):
        layers_of(nn.Linear(2, 2))
    with pytest.raises(SpecError, match="is none of gelu"):
        activation_name(torch.tanh)
    with pytest.raises(SpecError, match="no balance loss"):
        balance_loss(model)
    _, copies = ffn(split="copy")
    with pytest.raises(SpecError, match="cannot be merged"):
        copies.merge()
    with pytest.raises(SpecError, match="not a tensor of a SwiGLU layer"):
        permute_swiglu({"fc1.weight": torch.zeros(4, 2)}, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(SpecError, match="axis 0 should have 4 neurons"):
        permute_swiglu({"up_proj.weight": torch.zeros(2, 4)}, torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts": 4, "top_k": 5}, "top_k=5 is more than num_experts=4"),
        ({"num_experts": 4, "top_k": 2, "gate": "cosine", "choice": "bottom"}, "ablation of the avg-k gates"),
        ({"num_experts": 4, "top_k": 4, "choice": "not_top"}, "leaves no expert"),
        ({"num_experts": 4, "top_k": 2, "one_score": False}, "not trained"),
        ({"num_experts": 4, "top_k": 2, "expert_repeat": 5}, "expert_repeat=5 is more"),
        ({"num_experts": 4, "top_k": 2, "split": "copy", "expert_repeat": 2}, "already gives every expert"),
        ({"num_experts": 4, "top_k": 2, "gate": "cosine", "normalize_gate": True}, "normalize_gate has no meaning"),
        ({"num_experts": 4, "top_k": 2, "gate": "linear", "gate_momentum": 0.5}, "gate_momentum has no meaning"),
        ({"num_experts": 4, "top_k": 2, "gate": "cosine", "value_norm_weighted": True}, "does not look at the keys"),
    ],
)
def test_contradictions_are_told(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        EMoESpec(**fields)


def test_layer_rules():
    assert vision_layers(12) == [8, 10] and vision_layers(12, every_other=False) == [10, 11]
    assert large_vit_layers(24, 2) == [20, 22] and large_vit_layers(24, 2, every_other=False) == [22, 23]
    assert llama_layers(32, 28, 2) == [28, 30] and last_even_layers(12) == [10] and last_even_layers(24, 2) == [20, 22]
    for wrong in (lambda: vision_layers(3, 2), lambda: llama_layers(4, 0, 0), lambda: last_even_layers(2, 2)):
        with pytest.raises(SpecError):
            wrong()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_swiglu_permutation_there_and_back(experts, size, seed):
    generator = torch.Generator().manual_seed(seed)
    neurons = experts * size
    weights = {
        "gate_proj.weight": torch.randn(neurons, 3, generator=generator),
        "up_proj.weight": torch.randn(neurons, 3, generator=generator),
        "down_proj.weight": torch.randn(3, neurons, generator=generator),
    }
    labels = torch.randperm(neurons, generator=generator) % experts
    there = permute_swiglu(weights, labels)
    back = unpermute_swiglu(there, labels)
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    with pytest.raises(SpecError, match="no score"):
        linear = nn.Linear(3, neurons)
        BlockMaskedSwiGLU(linear, linear, nn.Linear(neurons, 3), experts, 1, "gates")


def test_low_rank_tuning_touches_only_its_own_and_merges_exactly():
    torch.manual_seed(0)
    model = add_lora(build_text_model(TextModelSpec(family="bert", **SMALL)), "bert")
    convert_layers(model, [1], EMoESpec(**QUIET))
    rules = TuningRules(lora=True, moe_layers=(1,), one_score=True, tune_moe_layers_only=True, tune_gates_only=True)
    names = set_trainable(model, rules)
    assert all("lora_" in n or "classifier" in n or "pooler" in n for n in names)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(1, 30, (4, 9), generator=torch.Generator().manual_seed(1))
    losses = [text_step(model.train(), optimizer, ids, torch.tensor([0, 1, 0, 1]))[0].item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())
    assert merge_layers(model) == {1: 0.0}


def test_fair_rules_treat_methods_alike():
    public, fair = TuningRules(lora=True, moe_layers=(1,)), TuningRules(lora=True, moe_layers=(1,), fair=True)
    assert not trains("bert.pooler.dense.weight", public) and trains("bert.pooler.dense.weight", fair)
    anew = {"freeze": ("embeddings",), "one_score": True, "moe_layers": (1,)}
    gate = "bert.encoder.layer.1.mlp.gates.0.wg.weight"
    assert trains(gate, TuningRules(**anew)) and not trains(gate, TuningRules(**anew, fair=True))
    assert [bool(g.names) for g in rate_groups([gate])] == [False, True, False, False]
    assert [bool(g.names) for g in rate_groups([gate], fair)] == [True, False, False, False]


def test_noisy_tuning_leaves_the_head_alone():
    noisy, plain = network("bert"), network("bert")
    add_noise(noisy, torch.Generator().manual_seed(0))
    for (name, moved), start in zip(noisy.named_parameters(), plain.parameters(), strict=True):
        largest = float((moved - start).abs().max())
        assert largest <= 0.5 * 0.15 * float(start.std()) + 1e-6 and (largest == 0) == name.startswith("classifier"), (
            name
        )


def test_inputs_of_the_layers_are_recorded_and_hooks_removed():
    model = network("gpt2")
    inputs = ffn_inputs(model, lambda: [run(model), run(model)], [0, 2])
    assert {number: tuple(x.shape) for number, x in inputs.items()} == {0: (72, 16), 2: (72, 16)}
    assert not any(module._forward_pre_hooks for module in model.modules())
    labels = convert_layers(model, [2], EMoESpec(**QUIET, split="coactivation"), hidden=inputs)
    assert torch.bincount(labels[2]).tolist() == [6] * 4


def test_the_algorithm_trains_a_vision_transformer():
    method = algorithm("emoe")
    torch.manual_seed(0)
    with pytest.raises(pydantic.ValidationError, match="num_inter=3 has no effect beside layers"):
        method.preset("rotated14", layers=(1, 3), num_inter=3)
    run_ = method(method.preset("rotated14", layers=(1, 3), drop_path=0.0))
    module = run_.build(3)
    assert len(converted_layers(module)) == 2 and run_.layers(12) == [1, 3]
    optimizer = torch.optim.Adam([{"params": g.parameters, "lr": g.lr} for g in run_.param_groups(module)])
    batch = (torch.randn(4, 1, 64, 64), torch.tensor([0, 1, 2, 0]))
    gate = converted_layers(module)[0].moe.gate.weight.clone()

    def step(rows):
        losses = run_.loss(module, rows)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        return losses

    losses = run_.update(module, batch, step)
    assert losses.parts["aux"] > 0 and losses.total > losses.parts["task"]
    layer = converted_layers(module)[0]
    torch.testing.assert_close(layer.moe.gate.weight, layer.moe.experts.w1.mean(1))
    assert not torch.equal(gate, layer.moe.gate.weight)
    assert run_.predict(module.eval(), batch[0]).shape == (4,)


def test_pretrained_networks_are_converted_after_loading():
    method = algorithm("emoe")
    tiny = {"name": "timm:vit_tiny_patch16_224", "channels": 1, "image_size": 64, "pretrained": True}
    run_ = method(method.preset("rotated14", backbone=tiny))
    module = run_.build(2)
    with pytest.raises(SpecError, match="Call convert"):
        run_.loss(module, (torch.randn(2, 1, 64, 64), torch.tensor([0, 1])))
    labels = run_.convert(module, split=False)
    assert list(labels) == [8, 10] and torch.equal(labels[8], torch.arange(768) // 32)
    with pytest.raises(pydantic.ValidationError, match="leave gmoe and emoe out"):
        method.preset("rotated14", backbone={**tiny, "gmoe": {}})


def test_text_presets():
    for task in ("rte", "rte@lora", "stsb", "mnli@lora"):
        config = TextConfig.preset(task)
        assert TextConfig.model_validate_json(config.model_dump_json()) == config
    assert TextConfig.preset("mnli@lora").epochs == 5 and TextConfig.preset("rte").epochs == 10
    small = TextConfig.preset("rte@lora", model={"family": "bert", **SMALL}, layers=(1,), emoe=EMoESpec(**QUIET))
    model = small.build()
    labels = small.convert(model)
    assert list(labels) == [1] and len(converted_layers(model)) == 1
    with pytest.raises(SpecError, match="Did you mean 'rte'"):
        TextConfig.preset("rtee")
    with pytest.raises(pydantic.ValidationError, match="layers 0 to 2"):
        TextConfig.preset("rte", model={"family": "bert", **SMALL})


def test_specs_import_no_torch():
    code = "import sys, moe.algorithms.emoe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
