"""MoE Jetpack's networks, recipe and key maps."""

import copy

import numpy as np
import pydantic
import pytest
import timm
import torch

from moe.algorithms._jetpack_recipe import KeyRule, RateSpec, ScheduleSpec, accumulation, parameter_rules
from moe.algorithms.jetpack import Config, Method
from moe.batch_mix import PermutedMix, apply_mix, choose_kind, draw_mix
from moe.errors import CheckpointError, DataError, SpecError
from moe.jetpack_specs import JetViTSpec, SoftMoESpec, SpheroSpec, released_slots, v_jetmoe
from moe.keymaps.jetpack import fit_to_model, flat_state, from_official, official_shapes, to_official
from moe.layers.draws import injected
from moe.models import convnext, sphero_vit
from moe.models.sphero_vit import build_sphero_vit, run_with_records, slot_layers

SLOTS = SpheroSpec(core_experts=2, univ_experts=3, slot_layernorm=True, noise=True, drop=0.2, drop_path=0.3)
TINY = {"image_size": 16, "patch_size": 8, "dim": 12, "depth": 3, "num_heads": 3}


def tiny(**changes):
    torch.manual_seed(0)
    return JetViTSpec(**{**TINY, "moe": SLOTS, "moe_layers": (1, 2), **changes})


@pytest.mark.parametrize("size, parameters", [("tiny", 265_411_636), ("small", 1_058_124_916)])
def test_published_sizes(size, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_sphero_vit(v_jetmoe(size), 1000).parameters()) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"global_pool": "token"},
        {"global_pool": "map"},
        {"reg_tokens": 2, "no_embed_class": True, "qk_norm": True, "init_values": 1e-6},
        {"class_token": False, "fc_norm": False},
        {"moe": SoftMoESpec(num_experts=3)},
        {"moe_layers": (1,), "shared_layers": {"a": (0, 2)}, "shared_queries": {"p": ("a",)}},
        {"moe_layers": (), "shared_layers": {"a": (0, 2)}, "shared_options": "official"},
    ],
)
def test_networks_train_predict_and_round_trip(changes):
    spec = tiny(**changes)
    model = build_sphero_vit(spec, 5)
    images = torch.randn(2, 3, 16, 16)
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert torch.equal(model(images), model(images))
    other = build_sphero_vit(spec, 5).eval()
    for form in ("flat", "nested"):
        other.load_state_dict(from_official(to_official(model, spec, form), spec, 5))
        assert torch.equal(other(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_shared_layers_share_and_keep_their_options():
    spec = tiny(moe_layers=(), shared_layers={"a": (0, 1), "b": (2,)}, shared_queries={"p": ("a", "b")})
    model = build_sphero_vit(spec, 5)
    blocks = model.blocks
    assert blocks[0].mlp is blocks[1].mlp and blocks[0].mlp.phi is blocks[2].mlp.phi
    assert blocks[0].mlp.slot_norm is not None and blocks[2].mlp.spec.drop_path == pytest.approx(0.3)
    official = build_sphero_vit(spec.model_copy(update={"shared_options": "official"}), 5)
    assert official.blocks[0].mlp.slot_norm is None
    assert next(name for name, _ in model.named_parameters() if "phi" in name) == "phi_dict.p"


def test_records_of_a_whole_network():
    model = build_sphero_vit(tiny(shared_layers={"a": (0,)}), 5).eval()
    images = torch.randn(2, 3, 16, 16)
    logits, records = run_with_records(model, images)
    assert sorted(records) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert torch.equal(logits, model(images))


def test_injected_draws_repeat_a_pass():
    model = build_sphero_vit(tiny(drop_path=0.5), 5)
    images, layers = torch.randn(2, 3, 16, 16), slot_layers(model)
    noise = [torch.randn(2, 5, 5, 1) for _ in layers]
    masks = {"blocks.1.drop_path1": torch.tensor([0.0, 1.0]), "blocks.2.drop_path2": torch.tensor([1.0, 0.0])}
    masks |= {f"blocks.{i}.drop_path{j}": torch.ones(2) for i, j in ((1, 2), (2, 1))}
    for name in layers:
        masks[f"{name}.expert_drop"] = torch.ones(2)
        for group, experts, hidden in (("core", 2, 48), ("univ", 3, 12)):
            masks[f"{name}.{group}_experts.drop_1"] = torch.ones(2, experts, 1, hidden)
            masks[f"{name}.{group}_experts.drop_2"] = torch.ones(2, experts, 1, 12)
    results = []
    for _ in range(2):
        with injected(model, layers, noise, masks):
            results.append(model(images))
    assert torch.equal(*results) and not torch.equal(model(images), results[0])
    with pytest.raises(SpecError, match="No module takes"), injected(model, layers, (), {"blocks.9.x": noise[0]}):
        pass
    with pytest.raises(SpecError, match="fewer noise tensors"), injected(model, layers, noise[:1]):
        model(images)


def test_slots_go_into_any_transformer_of_timm():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=4)
    sphero_vit.insert_slots(model, {3: SLOTS, 5: SoftMoESpec(num_experts=2)})
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4) and len(slot_layers(model)) == 2
    for wrong, message in (({3: SLOTS}, "already"), ({40: SLOTS}, "no block 40")):
        with pytest.raises(SpecError, match=message):
            sphero_vit.insert_slots(model, wrong)
    with pytest.raises(SpecError, match="no transformer blocks"):
        sphero_vit.insert_slots(torch.nn.Linear(2, 2), {0: SLOTS})


def test_convnext_with_maps_that_are_not_square():
    model = convnext.build_c_jetmoe(4, {1: SLOTS, 3: SLOTS}, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    model(torch.randn(2, 3, 64, 96)).sum().backward()
    assert model.stages[3].blocks[0].mlp.phi.grad.isfinite().all()
    assert model.stages[3].blocks[0].mlp.spec.drop_path == pytest.approx(0.3)
    slots = convnext.c_jetmoe_slots()
    assert sorted(slots) == list(range(9, 18))
    assert [(slots[i].core_experts, slots[i].univ_experts) for i in (9, 14, 15, 17)] == [(98, 196)] * 2 + [(24, 48)] * 2
    with pytest.raises(SpecError, match="already"):
        convnext.insert_slots(model, {1: SLOTS})
    with pytest.raises(SpecError, match="conv_mlp"):
        convnext.insert_slots(timm.models.ConvNeXt(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), conv_mlp=True), {0: SLOTS})
    with pytest.raises(SpecError, match="not a ConvNeXt"):
        convnext.insert_slots(torch.nn.Linear(2, 2), {0: SLOTS})
    with pytest.raises(SpecError, match="multiple of 32"):
        convnext.c_jetmoe_slots(100)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe": None}, "moe is not given"),
        ({"moe_layers": (3,)}, r"blocks \[3\] do not exist"),
        ({"shared_layers": {"a": (1,)}}, "more than once"),
        ({"shared_queries": {"p": ("x",)}}, "names the layers"),
        ({"patch_size": 5}, "does not divide"),
        ({"num_heads": 5}, "does not divide"),
        ({"class_token": False, "global_pool": "token"}, "class token"),
    ],
)
def test_specs_that_contradict_themselves(changes, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        tiny(**changes)


def test_checkpoints_of_another_network_are_refused_by_name():
    spec = tiny()
    state = build_sphero_vit(spec, 5).state_dict()
    name = "blocks.1.mlp.core_experts.vit_fc1.weight"
    wrong = {
        "missing": {k: v for k, v in state.items() if k != name},
        "unexpected": {**state, "more": torch.zeros(1)},
        "of another shape": {**state, name: state[name].mT},
    }
    for kind, tensors in wrong.items():
        with pytest.raises(CheckpointError, match=f"1 {kind}: {'more' if kind == 'unexpected' else name}"):
            from_official(tensors, spec, 5)
    with pytest.raises(CheckpointError, match="not a state dict"):
        flat_state({"optimizer": [1, 2]})
    with pytest.raises(CheckpointError, match="square grid"):
        fit_to_model({"pos_embed": torch.zeros(1, 8, 4)}, 8, (2, 2))
    with pytest.raises(CheckpointError, match="not of the given spec"):
        to_official(build_sphero_vit(tiny(moe_layers=(1,)), 5), spec)


def test_a_checkpoint_of_another_image_and_patch_size_is_fitted():
    spec = tiny()
    small = build_sphero_vit(spec.model_copy(update={"image_size": 12, "patch_size": 4}), 5).state_dict()
    fitted = from_official(small, spec, 5)
    assert {k: tuple(v.shape) for k, v in fitted.items()} == official_shapes(spec, 5)


def test_rates_of_a_network_are_found_in_the_model():
    model = build_sphero_vit(tiny(), 5)
    keys = {".slot_norm": KeyRule(lr_mult=2.0)}
    rules = {rule.name: rule for rule in parameter_rules(model, RateSpec(lr=1.0, layer_decay=0.5, custom_keys=keys))}
    assert rules["patch_embed.proj.weight"].lr_scale == 0.5**4 and rules["blocks.0.norm2.weight"].layer_id == 1
    assert rules["blocks.1.norm2.weight"].layer_id == rules["head.weight"].layer_id == 4
    assert rules["blocks.1.mlp.slot_norm.weight"].lr == 2.0
    official = RateSpec(lr=1.0, layer_decay=0.5, custom_keys=keys, parity="official")
    rules = {rule.name: rule for rule in parameter_rules(model, official)}
    assert rules["blocks.1.norm2.weight"].layer_id == 2 and rules["blocks.1.mlp.slot_norm.weight"].lr == 1.0


def test_schedule_and_accumulation():
    schedule = ScheduleSpec(warmup_epochs=2, cosine_epochs=4, start_factor=0.1, eta_min_ratio=0.0)
    factors = [schedule.factor(i, 2) for i in range(12)]
    assert factors[0] == 0.1 and factors[3:6] == [1.0, 1.0, 1.0] and factors[6] == factors[7] < 1
    fine = schedule.model_copy(update={"step": "iteration", "hold": True})
    assert fine.factor(7, 2) < fine.factor(6, 2) and fine.factor(99, 2) == pytest.approx(0)
    assert ScheduleSpec(warmup_epochs=0, cosine_epochs=3).factor(0, 5) == 1.0
    assert accumulation(5, 2) == [(0.5, False), (0.5, True), (0.5, False), (0.5, True), (1.0, True)]


def test_mixing_a_batch():
    numbers, generator = np.random.RandomState(1), torch.Generator().manual_seed(1)
    images, scores = torch.rand(4, 3, 8, 6), torch.eye(4)
    for kind in ("mixup", "cutmix"):
        mixed, soft = apply_mix(images, scores, draw_mix(kind, 1.0, images.shape, numbers, generator))
        torch.testing.assert_close(soft.sum(1), torch.ones(4))
        assert mixed.shape == images.shape
    assert {choose_kind(numbers) for _ in range(20)} == {"mixup", "cutmix"}
    with pytest.raises(SpecError, match="no way of mixing"):
        draw_mix("blend", 1.0, images.shape, numbers, generator)
    with pytest.raises(SpecError, match="not positive"):
        draw_mix("mixup", 0.0, images.shape, numbers, generator)
    with pytest.raises(DataError, match="one row per image"):
        apply_mix(images, scores[:2], PermutedMix(0.5, torch.arange(4)))


def method(**changes):
    return Method(Method.preset("cifar100", model=tiny(), **changes))


def test_presets_of_the_released_and_the_papers_recipe():
    released, paper = Method.preset("dtd"), Method.preset("dtd-paper")
    assert (released.batch_size * released.accumulate, released.rates.layer_decay, released.model.drop_path) == (
        4096,
        0.6,
        0.1,
    )
    assert (paper.batch_size, paper.epochs, paper.schedule.warmup_epochs, paper.model.drop_path) == (512, 600, 100, 0.2)
    assert paper.model.init_values == 1e-6 and Method.preset("imagenet1k-scratch").recycle is None
    assert released.model.moe == released_slots() and released_slots().univ_experts == 196
    for name in Method.PRESETS:
        config = Method.preset(name)
        assert Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(pydantic.ValidationError, match="nothing to recycle"):
        Method.preset("dtd", model=JetViTSpec())


def test_the_algorithm_learns_a_batch():
    run = method()
    torch.manual_seed(0)
    module = run.build(4)
    groups = run.param_groups(module)
    assert sorted(id(p) for g in groups for p in g.parameters) == sorted(id(p) for p in module.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    )
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    batch = run.mix(images, labels, 4, np.random.RandomState(0), torch.Generator().manual_seed(0))
    first = run.loss(module, batch).total
    for _ in range(30):
        optimizer.zero_grad()
        loss = run.loss(module, (images, labels)).total
        loss.backward()
        optimizer.step()
    assert loss < first - 0.2
    assert run.predict(module.eval(), images).shape == (8,)
    plain, _ = method(mixup=0.0, cutmix=0.0).mix(images, labels, 4, np.random.RandomState(0), torch.Generator())
    assert plain is images
    with pytest.raises(SpecError, match="several classes"):
        Method(run.config, task="binary").loss(module, batch)


def test_official_parity_switches_the_corrections_off():
    network = method(parity="official").config.network
    assert network.moe.noise_in_eval and network.moe.expert_init == "official" and network.shared_options == "official"
    assert method(parity="official").config.group_rates.parity == "official"
    assert method().config.network == method().config.model


def test_recycling_loads_experts_of_the_predecessor():
    run = method(recycle={"select": "uniform"})
    module = run.build(4)
    wide = {**TINY, "dim": 24}
    predecessor = build_sphero_vit(JetViTSpec(**wide, global_pool="token"), 4).state_dict()
    donor = build_sphero_vit(JetViTSpec(**TINY, global_pool="token"), 4).state_dict()
    made = run.recycle(module, predecessor, torch.Generator().manual_seed(0), donor=donor)
    neurons, channels = made.experts.neuron[1][0], made.experts.channel[1][0]
    expected = predecessor["blocks.1.mlp.fc1.weight"][neurons][:, channels]
    assert torch.equal(module.blocks[1].mlp.core_experts.vit_fc1.weight[0], expected)
    assert torch.equal(module.blocks[0].mlp.fc1.weight, donor["blocks.0.mlp.fc1.weight"])
    with pytest.raises(SpecError, match="from scratch"):
        method(recycle=None).recycle(module, predecessor, torch.Generator())
