"""Split, assembly, incubation, teaching pairs and their loss."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.conversion.incubation import hybrid_module
from moe.conversion.kd import kd_loss
from moe.conversion.kd_specs import KDSpec
from moe.conversion.modules import (
    assemble_hybrids,
    assemble_stages,
    load_assembled,
    split_state,
    stage_module,
)
from moe.conversion.teaching import TeachingPair, TeachingPairs, prefixes
from moe.errors import CheckpointError, RunFailed, SpecError
from moe.keymaps.m2mkd import read_module_file, read_trainer_file, to_official, write_module_files
from moe.models.nac.specs import StudentSpec
from moe.models.nac.students import build_student
from moe.models.vit_specs import ViTSpec, VMoESpec, stitched, student_specs
from moe.models.vit_stages import ViTStages
from moe.models.vmoe import VMoE

TINY = {"image_size": 8, "patch_size": 4, "dim": 8, "heads": 2, "mlp_ratio": 2.0, "num_classes": 5}
SMALL = {**TINY, "dim": 4, "moe_blocks": (0, 1, 3), "num_experts": 3, "expert_init": "linear"}


def vit(*depths, seed=0, **changes):
    torch.manual_seed(seed)
    return ViTStages(ViTSpec(**{**TINY, **changes}, depths=depths))


def images(count=3, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def pairs_of(loss=None, meta=None):
    """Three pairs with V-MoE students of half the width."""
    meta = meta or vit(1, 1, 1)
    teacher = vit(2, 1, 2, seed=1)
    students = [VMoE(spec) for spec in student_specs(VMoESpec(**SMALL, depths=(1, 2, 1)), 8)]
    return TeachingPairs([TeachingPair(meta, stage_module(teacher, i), s, i, loss) for i, s in enumerate(students)])


@settings(max_examples=25, deadline=None)
@given(depths=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_split_and_assembly_are_inverse(depths):
    state = vit(*depths).state_dict()
    stages = split_state(state, depths)
    joined = assemble_stages(stages, depths)
    assert not joined.ignored and joined.state.keys() == state.keys()
    assert all(joined.state[name] is state[name] for name in state)
    files = write_module_files(state, "tiny", depths)
    spec = ViTSpec(**TINY, depths=tuple(depths))
    for index, file in enumerate(files):
        assert read_module_file(file, spec, index).keys() == stages[index].keys()
    assert read_trainer_file({"model": to_official(state, depths), "epoch": 1}).keys() == state.keys()


def test_the_stages_of_a_teacher_chain_to_the_teacher():
    teacher, x = vit(2, 1, 2).eval(), images()
    expected = teacher(x)
    for index in range(3):
        stage = stage_module(teacher, index)
        assert not stage.training
        x = stage(x)
    assert torch.equal(x, expected)
    with pytest.raises(SpecError, match="no dense ViT"):
        stage_module(VMoE(VMoESpec(**TINY, depths=(1,))), 0)


def test_splits_that_do_not_fit_are_refused():
    state = vit(2, 1).state_dict()
    with pytest.raises(CheckpointError, match=r"missing \[3\]"):
        split_state(state, (2, 2))
    with pytest.raises(CheckpointError, match=r"beyond them \[2\]"):
        split_state(state, (1, 1))
    with pytest.raises(SpecError, match="at least one block"):
        split_state(state, (3, 0))
    with pytest.raises(CheckpointError, match=r"'fc_norm\.weight' belongs to no stage"):
        split_state({**state, "fc_norm.weight": torch.zeros(8)}, (2, 1))
    spec = ViTSpec(**TINY, depths=(2, 1))
    file = write_module_files(state, "tiny", (2, 1))[0]
    with pytest.raises(CheckpointError, match=r"module 0 .* wanted is module 1"):
        read_module_file(file, spec, 1)
    with pytest.raises(CheckpointError, match="no teacher module file"):
        read_module_file({"model": state}, spec)
    with pytest.raises(CheckpointError, match="no trainer file"):
        read_trainer_file({"epoch": 3})


@pytest.mark.parametrize("keep", [False, True])
def test_vmoe_assembly_with_and_without_stitches(keep):
    final = VMoESpec(**SMALL, depths=(1, 2, 1))
    target = stitched(final, 8) if keep else final
    torch.manual_seed(0)
    students = [VMoE(spec) for spec in student_specs(final, 8)]
    states = [student.state_dict() for student in students]
    assembled = assemble_stages(states, target.depths, target.pre_stitch, target.post_stitch)
    model = VMoE(target)
    assert load_assembled(model, assembled) == []
    assert len(assembled.ignored) == (0 if keep else 16)
    assert assembled.loaded_from["blocks.2.norm1.weight"] == "1:blocks.1.norm1.weight"
    if keep:
        x = images()
        for student in students:
            x = student(x)
        torch.testing.assert_close(model(images()), x)


def test_assembly_errors_name_tensors_and_stages():
    final = VMoESpec(**SMALL, depths=(1, 2, 1))
    states = [VMoE(spec).state_dict() for spec in student_specs(final, 8)]
    with pytest.raises(SpecError, match="2 stages of weights and 3 depths"):
        assemble_stages(states[:2], final.depths)
    with pytest.raises(SpecError, match=r"blocks \[4\]"):
        assemble_stages(states, final.depths, pre_stitch=[4])
    with pytest.raises(CheckpointError, match=r"Stage 0 brings no weights for blocks \[1\]"):
        assemble_stages(states, (2, 2, 1))
    wide = VMoE(VMoESpec(**{**SMALL, "num_experts": 4}, depths=(1, 2, 1)))
    with pytest.raises(
        CheckpointError, match=r"blocks.0.mlp.gate.weight \(from 0:blocks.0.mlp.gate.weight\) is \(3, 4\)"
    ):
        load_assembled(wide, assemble_stages(states, final.depths))
    del states[2]["head.bias"]
    with pytest.raises(CheckpointError, match=r"head\.bias is missing"):
        load_assembled(VMoE(final), assemble_stages(states, final.depths))
    assert load_assembled(VMoE(final), assemble_stages(states, final.depths), ["head."]) == ["head.bias"]


def test_hybrids_train_one_stage_and_assemble_to_a_teacher():
    meta, spec = vit(1, 1, 1), ViTSpec(**TINY, depths=(2, 1, 2))
    hybrids = [hybrid_module(meta.spec, spec, i, meta.state_dict()) for i in range(3)]
    assert [hybrid.depth for hybrid in hybrids] == [4, 3, 4]
    middle = hybrids[1]
    trained = {name for name, p in middle.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("blocks.1.") for name in trained)
    assert torch.equal(middle.blocks[2].norm1.weight, meta.blocks[2].norm1.weight)
    assert torch.equal(middle.patch_embed.proj.weight, meta.patch_embed.proj.weight)
    middle(images()).sum().backward()
    assert middle.blocks[1].mlp.fc1.weight.grad.any() and middle.blocks[2].mlp.fc1.weight.grad is None
    assert hybrids[0].patch_embed.proj.weight.requires_grad and hybrids[-1].head.weight.requires_grad
    stages = [split_state(hybrid.state_dict(), hybrid.spec.depths) for hybrid in hybrids]
    teacher = ViTStages(spec)
    load_assembled(teacher, assemble_hybrids(stages, spec.depths))
    assert torch.equal(teacher.blocks[2].norm1.weight, middle.blocks[1].norm1.weight)
    with pytest.raises(SpecError, match="Hybrid 1 has 2 stages"):
        assemble_hybrids([stages[0], stages[1][:2], stages[2]], spec.depths)
    with pytest.raises(SpecError, match="2 stages of width 8, the teacher 3"):
        hybrid_module(vit(1, 1).spec, spec, 0)


def test_pairs_together_equal_pairs_alone():
    pairs, x, y = pairs_of(), images(), torch.tensor([0, 4, 2])
    total = 0.0
    for pair in pairs.members().values():
        loss = pair.losses(pair(x), y).total
        loss.backward()
        total += float(loss.detach())
    alone = {name: p.grad.clone() for name, p in pairs.named_parameters()}
    pairs.zero_grad()
    losses = pairs.losses(pairs(x), y)
    losses.total.backward()
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-6)
    assert all(torch.equal(alone[name], p.grad) for name, p in pairs.named_parameters())
    assert {"pair0/label", "pair2/distil", "pair1/agreement"} <= losses.parts.keys()


def test_prefixes_run_every_block_once(monkeypatch):
    meta = vit(1, 2, 1, 1).eval()
    seen = []
    for index, block in enumerate(meta.blocks):
        block.register_forward_hook(lambda module, args, out, index=index: seen.append(index))
    found = prefixes(meta, images(), [0, 2, 3])
    assert seen == [0, 1, 2, 3] and found[0] is None and sorted(found) == [0, 2, 3]
    torch.testing.assert_close(found[2], meta(images(), 0, 3))
    assert not found[3].requires_grad


def test_only_the_student_is_stored_trained_and_in_training_mode():
    pairs = pairs_of().train()
    assert all(name.startswith("pairs.") and ".student." in name for name in pairs.state_dict())
    pair = pairs.members()[1]
    assert pair.student.training and not pair.meta.training
    pairs.losses(pairs(images()), torch.tensor([0, 1, 2])).total.backward()
    assert all(p.grad is None for p in pair.meta.parameters())
    assert all(p.grad is not None for p in pairs.parameters())
    double = copy.deepcopy(pairs).double()
    assert double.members()[0].meta.head.weight.dtype == torch.float64
    assert double.members()[0].meta is double.members()[1].meta
    torch.testing.assert_close(double(images().double())[2].student_BK.float(), pairs(images())[2].student_BK)
    again = pickle.loads(pickle.dumps(pairs))
    torch.testing.assert_close(again(images())[1].teacher_BK, pairs(images())[1].teacher_BK)


def test_a_perfect_student_has_no_distillation_loss():
    meta, teacher = vit(1, 1, 1), vit(2, 1, 2, seed=1)
    for position in (0, 1, -1):
        student = stage_module(teacher, position)
        pair = TeachingPair(meta, stage_module(teacher, position), student, position)
        losses = pair.losses(pair(images()), torch.tensor([0, 1, 2]))
        assert float(losses.parts["distil"]) == pytest.approx(0, abs=1e-7) and float(losses.parts["agreement"]) == 1
    whole = TeachingPair(vit(1), stage_module(vit(2), 0), stage_module(vit(2), 0), 0)
    torch.testing.assert_close(whole(images()).student_BK, whole(images()).teacher_BK)


def test_known_teacher_logits_replace_the_teacher():
    pairs, x = pairs_of(), images()
    outputs = pairs(x)
    known = {position: output.teacher_BK for position, output in outputs.items()}
    bare = TeachingPair(pairs.members()[1].meta, None, pairs.members()[1].student, 1)
    torch.testing.assert_close(bare(x, teacher_BK=known[1]).student_BK, outputs[1].student_BK)
    assert pairs(x, known)[2].teacher_BK is known[2]
    with pytest.raises(SpecError, match="no teacher module"):
        bare(x)


def test_the_tail_starts_after_the_replaced_blocks_of_a_deep_meta_stage():
    meta, teacher = vit(1, 2, 2).eval(), vit(2, 3, 2, seed=1).eval()
    pair = TeachingPair(meta, stage_module(teacher, 1), stage_module(teacher, 1), 1)
    x = images()
    expected = meta(teacher(meta(x, 0, 1), 2, 5), 3)
    torch.testing.assert_close(pair(x).teacher_BK, expected)


def nac(student, **fields):
    base = {"stitch_dim": 8, "state_dim": 8, "code_dim": 4, "num_heads": 2, "head_dim": 3}
    return build_student(StudentSpec(student=student, **{**base, **fields}), 0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m, t: TeachingPair(m, stage_module(t, 0), nac("mediator"), 1), "teacher module is a first part"),
        (lambda m, t: TeachingPair(m, stage_module(t, 1), nac("readout"), 1), "student module is a last part"),
        (
            lambda m, t: TeachingPair(m, stage_module(t, 1), nac("mediator", stitch_dim=6), 1),
            "width 6, the meta model 8",
        ),
        (lambda m, t: TeachingPair(m, stage_module(vit(1, 1, 1, dim=4), 1), nac("mediator"), 1), "width 4 and 5"),
        (lambda m, t: TeachingPair(m, stage_module(vit(1, 1, 1, num_classes=7), 2), nac("readout"), 2), "7 classes"),
        (lambda m, t: TeachingPair(m, stage_module(t, 1), nac("mediator"), 3), "no position 3"),
        (lambda m, t: TeachingPair(stage_module(m, 0), stage_module(t, 0), nac("mediator"), 0), "whole meta model"),
        (lambda m, t: TeachingPairs([]), "at least one pair"),
        (
            lambda m, t: TeachingPairs(
                [TeachingPair(x, stage_module(t, i), nac("mediator"), i) for i, x in ((1, m), (1, m))]
            ),
            "each position once",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused(make, words):
    with pytest.raises(SpecError, match=words):
        make(vit(1, 1, 1), vit(2, 1, 2, seed=1))


def test_a_student_of_the_wrong_width_is_named_with_its_position():
    pair = TeachingPair(vit(1, 1, 1), None, torch.nn.Linear(8, 6), 1)
    with pytest.raises(SpecError, match=r"student at position 1 gives \(3, 5, 6\), the meta model needs \[B, T, 8\]"):
        pair(images(), teacher_BK=torch.zeros(3, 5))
    with pytest.raises(SpecError, match="different meta models"):
        TeachingPairs(
            [TeachingPair(vit(1, 1, 1), None, torch.nn.Identity(), i) for i in (1, 2)],
        )


def test_attentive_students_learn_in_pairs():
    meta = vit(1, 1, 1)
    pair = TeachingPair(meta, stage_module(vit(2, 1, 2, seed=1), 1), nac("mediator"), 1)
    pair.losses(pair(images()), torch.tensor([0, 1, 2])).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in pair.parameters())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    classes=st.integers(1, 6),
    alpha=st.floats(0, 1),
    tau=st.floats(0.25, 8),
    seed=st.integers(0, 99),
)
def test_kd_loss_follows_its_formula(rows, classes, alpha, tau, seed):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
    base = -(y * s.log_softmax(1)).sum(1).mean()
    q = (t / tau).softmax(1)
    kl = (q * (q.log() - (s / tau).log_softmax(1))).sum()
    for reduction, size in (("official", rows * classes), ("batchmean", rows)):
        got = kd_loss(s, t, y, KDSpec(alpha=alpha, tau=tau, reduction=reduction)).total
        torch.testing.assert_close(got, (1 - alpha) * base + alpha * tau**2 * kl / size, rtol=1e-9, atol=1e-12)
    hard = kd_loss(s, t, y, KDSpec(kind="hard", alpha=alpha)).total
    chosen = -s.log_softmax(1)[torch.arange(rows), t.argmax(1)].mean()
    torch.testing.assert_close(hard, (1 - alpha) * base + alpha * chosen)
    torch.testing.assert_close(kd_loss(s, None, y, KDSpec(kind="none")).total, base)


def test_pairs_under_bf16_autocast_stay_near_float32():
    pairs, x, y = pairs_of(), images(), torch.tensor([0, 4, 2])
    expected = pairs.losses(pairs(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = pairs.losses(pairs(x), y)
    assert low.total.dtype == torch.float32
    torch.testing.assert_close(low.total, expected.total, rtol=2e-2, atol=2e-2)
    low.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in pairs.parameters())


def test_kd_loss_in_low_precision_ties_and_errors():
    s, t, y = torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([[1.0, 1.0, 0.0]] * 2), torch.tensor([0, 1])
    assert kd_loss(s, t, y).total.dtype == torch.float32
    tied = kd_loss(torch.tensor([[2.0, 0.0, 0.0]] * 2), t, y, KDSpec(kind="hard", alpha=1.0)).total
    assert float(tied) == pytest.approx(-float(torch.tensor([2.0, 0.0, 0.0]).log_softmax(0)[0]))
    with pytest.raises(SpecError, match=r"Teacher logits are \(2, 2\), student logits \(2, 3\)"):
        kd_loss(s, t[:, :2], y)
    with pytest.raises(RunFailed, match="not finite"):
        kd_loss(s, t / 0, y)
