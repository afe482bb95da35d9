"""The m2mKD algorithm: presets, phases, split to assembly, parameter groups, rates, mixing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from moe.algorithms._m2mkd_phases import rates_after_step
from moe.algorithms.m2mkd import Method
from moe.conversion.modules import split_state
from moe.errors import CheckpointError, DataError, SpecError
from moe.mixup import MixDraw, box, draw_mix, mix
from moe.models.nac.circuit import Circuit
from moe.models.nac.students import build_student
from moe.models.vit_stages import ViTStages
from moe.param_groups import decay_groups, layer_decay_groups


def run(phase, **changes):
    torch.manual_seed(0)
    return Method(Method.preset("rotated14", phase=phase, **changes))


def batch(rows=6, classes=10):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 1, 14, 14, generator=generator), torch.randint(0, classes, (rows,), generator=generator)


def test_published_constants():
    vmoe = Method.preset("imagenet1k")
    phases = (vmoe.pt, vmoe.mt, vmoe.ft, vmoe.student, vmoe.e2e)
    assert [phase.batch_size for phase in phases] == [2048, 2048, 1024, 2048, 1024]
    assert [phase.epochs for phase in phases] == [300, 100, 100, 100, 100]
    assert [phase.scaled_lr for phase in phases] == pytest.approx([2e-3, 2e-3, 1e-3, 2e-3, 1e-3])
    assert [phase.warmup_epochs for phase in phases] == [20, 20, 0, 20, 0]
    assert [phase.clip for phase in phases] == [None, None, 1.0, None, 1.0]
    assert [phase.drop_path for phase in phases] == [0, 0.1, 0.1, 0.1, 0.1]
    assert vmoe.fs.scaled_lr == 2e-3 and vmoe.fs.only == "head" and not vmoe.fs.amp
    assert vmoe.teacher.depths == (6, 6, 6, 6) and vmoe.vmoe.moe_blocks == tuple(range(12))
    tiny, large = (Method.preset(f"{name}_nac_scale_free") for name in ("tiny_imagenet", "imagenet1k"))
    assert [c.e2e.scaled_lr for c in (tiny, large)] == pytest.approx([2.4e-3, 6e-4])
    assert [c.e2e.scaled_min_lr for c in (tiny, large)] == pytest.approx([8e-5, 2e-5])
    assert sum(tiny.teacher.depths) == 32 and len(tiny.meta.depths) == 10 and not tiny.meta.qkv_bias
    assert tiny.loss.model_dump() == {"kind": "soft", "alpha": 0.5, "tau": 1.0, "reduction": "official"}


@pytest.mark.parametrize(
    "name, total, mediator", [("tiny_imagenet_nac_scale_free", 26.7, 3.5), ("imagenet1k_nac_erdos_renyi", 37.6, None)]
)
def test_circuits_of_the_presets_have_the_published_sizes(name, total, mediator):
    method = Method(Method.preset(name, position=3))
    with torch.device("meta"):
        circuit = Circuit(method.config.circuit)
        student = build_student(method.circuit_student(3, 1000))
    assert round(sum(p.numel() for p in circuit.parameters()) / 1e6, 1) == total
    if mediator:
        assert round(sum(p.numel() for p in student.parameters()) / 1e6, 1) == mediator


@pytest.mark.parametrize("phase", ["pt", "mt", "ft", "student", "e2e"])
def test_every_phase_takes_a_step(phase):
    method = run(phase, position=1 if phase == "mt" else None)
    module = method.build(10)
    losses = method.loss(module, batch())
    losses.total.backward()
    groups = method.param_groups(module)
    grouped = {id(p) for group in groups for p in group.parameters}
    assert grouped == {id(p) for p in module.parameters() if p.requires_grad}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for g in groups for p in g.parameters)
    before = float(losses.total.detach())
    optimizer = torch.optim.AdamW([{"params": g.parameters, "lr": g.lr} for g in groups])
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        method.loss(module, batch()).total.backward()
    assert float(method.loss(module, batch()).total.detach()) < before
    if phase != "student":
        assert method.predict(module.eval(), batch()[0]).shape == (6,)


def test_the_whole_chain_from_meta_model_to_assembled_vmoe():
    meta, teacher = run("pt").build(10), run("ft").build(10)
    method = run("student")
    parts = method.split(teacher.state_dict())
    pairs = method.build_pairs(10, meta.state_dict(), dict(enumerate(parts)))
    hidden = meta(batch()[0], 0, 1)
    torch.testing.assert_close(pairs.members()[1].prefix(batch()[0]), hidden)
    final = run("e2e")
    model = final.build(10)
    students = [pair.student.state_dict() for pair in pairs.members().values()]
    report = final.assemble(model, students)
    assert set(report.loaded_from) == set(model.state_dict()) and len(report.ignored) == 8
    assert torch.equal(model.blocks[1].attn.qkv.weight, students[1]["blocks.0.attn.qkv.weight"])
    kept = run("e2e", assemble={"keep_stitches": True})
    stitched = kept.build(10)
    assert not kept.assemble(stitched, students).ignored
    x = batch()[0]
    torch.testing.assert_close(stitched(x), pairs.members()[1].student(pairs.members()[0].student(x)))


def test_frozen_weights_that_do_not_fit_are_refused():
    method, meta = run("student"), run("pt").build(10).state_dict()
    with pytest.raises(CheckpointError, match=r"fit: head\.weight is \(10, 32\) instead of \(7, 32\)"):
        method.build_pairs(7, meta)
    with pytest.raises(SpecError, match="teacher module 1"):
        method.build_pairs(10, meta, {0: split_state(run("ft").build(10).state_dict(), (2, 2))[0]})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"position": 2}, "position=2 of 2 modules"),
        ({"phase": "mt"}, "give position"),
        ({"phase": "fs"}, "needs the settings fs"),
        ({"vmoe": None}, "either vmoe or circuit"),
        ({"meta": {"dim": 32, "heads": 4, "depths": (1,)}}, "has not the 1 stages"),
        ({"meta": {"dim": 16, "heads": 4, "depths": (1, 1)}}, "teacher.dim=32 must equal meta.dim=16"),
    ],
)
def test_contradictory_settings_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        Method.preset("rotated14", **changes)


def test_few_shot_trains_the_head_alone():
    method = Method(
        Method.preset("rotated14", phase="fs", fs={"batch_size": 8, "epochs": 1, "lr_batch": None, "only": "head"})
    )
    module = method.build(10)
    groups = method.param_groups(module)
    assert [p.shape for group in groups for p in group.parameters] == [(10, 24), (10,)]


def test_official_parity_lags_one_epoch_in_the_vit_trainer_only():
    config = Method.preset("imagenet1k", parity="official", phase="student")
    official, fixed = config.training.rates(), config.student.rates()
    assert official[:2] == [1e-6, 1e-6] and official[2:] == fixed[1:-1]
    nac = Method.preset("tiny_imagenet_nac_scale_free", parity="official", phase="e2e")
    assert not nac.training.scheduler_lag and nac.training.rates()[1] > 1e-6
    assert Method.preset("tiny_imagenet_nac_scale_free", phase="fs").training.rates() == [3e-4] * 500


@settings(max_examples=25, deadline=None)
@given(epochs=st.integers(2, 30), warmup=st.integers(0, 30), low=st.floats(0, 1e-4))
def test_rates_follow_their_formula(epochs, warmup, low):
    rates = rates_after_step(1e-2, epochs, warmup, 1e-6, low)
    assert rates[0] == (1e-6 if warmup else 1e-2) and len(rates) == epochs + 1
    for epoch, rate in enumerate(rates[1:]):
        ramp = 1e-6 + epoch * (1e-2 - 1e-6) / max(warmup, 1)
        cosine = low + (1e-2 - low) * (1 + np.cos(np.pi * epoch / epochs)) / 2
        assert rate == pytest.approx(ramp if epoch < warmup else cosine)


def test_scalars_decay_and_biases_of_experts_do_not():
    module = nn.Module()
    module.gain, module.cls_token = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(1, 1, 2))
    module.experts = nn.Module()
    module.experts.w1, module.experts.b1 = nn.Parameter(torch.zeros(2, 3, 2)), nn.Parameter(torch.zeros(2, 3))
    module.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    decay, spared = decay_groups(module, 0.1, 0.05)
    assert [id(p) for p in decay.parameters] == [id(module.gain), id(module.experts.w1)]
    assert [id(p) for p in spared.parameters] == [id(module.cls_token), id(module.experts.b1)]
    assert (decay.weight_decay, spared.weight_decay) == (0.05, 0.0)
    assert [group.name for group in decay_groups(nn.LayerNorm(2), 0.1, 0.05)] == ["no_decay"]


def test_layerwise_rates_fall_towards_the_input():
    model = run("ft").build(10)
    groups = {group.name: group for group in layer_decay_groups(model, 1.0, 0.05, 0.5, 4)}
    assert groups["layer0/decay"].lr == 0.5**5 and groups["layer5/decay"].lr == 1.0
    assert groups["layer1/no_decay"].lr == 0.5**4 and groups["layer1/no_decay"].weight_decay == 0
    assert sum(len(group.parameters) for group in groups.values()) == len(list(model.parameters()))
    with pytest.raises(SpecError, match="block 3 of a network said to have 3"):
        layer_decay_groups(model, 1.0, 0.05, 0.5, 3)
    with pytest.raises(SpecError, match="layer_decay is 0"):
        layer_decay_groups(model, 1.0, 0.05, 0, 4)
    tuned = run("ft", ft={"batch_size": 8, "epochs": 1, "layer_decay": 0.7})
    assert len(tuned.param_groups(tuned.build(10))) == 12


@settings(max_examples=40, deadline=None)
@given(
    lam=st.floats(0, 1), cutmix=st.booleans(), cy=st.integers(0, 8), cx=st.integers(0, 6), smoothing=st.floats(0, 0.9)
)
def test_mixing_keeps_shares_of_images_and_labels(lam, cutmix, cy, cx, smoothing):
    images, labels = torch.randn(4, 2, 9, 7), torch.tensor([0, 2, 1, 2])
    given_images = images.clone()
    draw = MixDraw(lam, cutmix, (cy, cx) if cutmix else None)
    mixed, target = mix(images, labels, draw, 3, smoothing)
    torch.testing.assert_close(images, given_images)
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    share = lam
    if cutmix:
        rows, columns = box(9, 7, draw)
        pasted = torch.zeros(9, 7, dtype=torch.bool)
        pasted[rows, columns] = True
        share = 1 - float(pasted.sum()) / 63
        torch.testing.assert_close(mixed, torch.where(pasted, images.flip(0), images))
    else:
        torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.flip(0))
    own = torch.nn.functional.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    torch.testing.assert_close(target, share * own + (1 - share) * own.flip(0), check_dtype=False, atol=1e-6, rtol=1e-5)


def test_draws_of_mixing_follow_the_switches():
    def draws(**changes):
        generator = np.random.default_rng(0)
        return [draw_mix(generator, (8, 6), **changes) for _ in range(200)]

    assert 60 < sum(draw.cutmix for draw in draws()) < 140
    assert not any(draw.cutmix for draw in draws(cutmix_alpha=0)) and all(d.cutmix for d in draws(mixup_alpha=0))
    assert all(draw.lam == 1 for draw in draws(prob=0)) and all(
        d.lam == 1 for d in draws(mixup_alpha=0, cutmix_alpha=0)
    )
    assert all(0 <= d.centre[0] < 8 and 0 <= d.centre[1] < 6 for d in draws() if d.cutmix)
    with pytest.raises(SpecError, match="prob=2"):
        draws(prob=2)
    with pytest.raises(DataError, match="from 0 to 3"):
        mix(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]), MixDraw(0.5), 3)
    with pytest.raises(DataError, match="for images"):
        mix(torch.zeros(2, 1, 4, 4), torch.tensor([0]), MixDraw(0.5), 3)
    with pytest.raises(SpecError, match="centre"):
        mix(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), MixDraw(0.5, True), 3)


def test_phases_build_the_networks_they_say():
    assert isinstance(run("pt").build(3), ViTStages) and run("pt").build(3).depth == 2
    assert run("ft").build(3).depth == 4 and run("mt", position=-1).build(3).depth == 3
    assert list(run("student", position=-1).build(3).members()) == [1]
