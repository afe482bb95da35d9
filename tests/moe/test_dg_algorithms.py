"""Domain-generalisation algorithms: batches by domain, losses, update rules and weight averages."""

import copy

import numpy as np
import pydantic
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.algorithms._domains import domains_of, joined
from moe.algorithms.base import algorithm
from moe.algorithms.coral import coral_distance
from moe.algorithms.irm import irm_penalty
from moe.algorithms.sma import MovingAverage
from moe.algorithms.swad import LossValley
from moe.errors import SpecError
from moe.models.vit import run_vit

TINY = {"name": "tiny_cnn", "channels": 1, "width": 2}
GMOE = {
    "name": "timm:vit_tiny_patch16_224",
    "image_size": 32,
    "gmoe": {"num_experts": 3, "projection": 8, "pattern": "last_two"},
}
NAMES = ("erm", "fish", "irm", "coral", "sma", "swad")


def method(name, backbone=TINY, dataset="pacs", **changes):
    cls = algorithm(name)
    return cls(cls.preset(dataset, backbone=backbone, freeze_bn=False, **changes))


def network(run, outputs=3, dtype=torch.float32):
    torch.manual_seed(0)
    return run.build(outputs).to(dtype)


def domains(sizes=(4, 3, 5), channels=1, side=12, classes=3, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, channels, side, side, generator=g, dtype=dtype) + 0.5 * i,
            torch.randint(classes, (n,), generator=g),
        )
        for i, n in enumerate(sizes)
    ]


# Batches


def test_the_three_forms_of_a_batch():
    batch = domains()
    rows = domains_of(batch)
    column = torch.tensor([0] * 4 + [1] * 3 + [2] * 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).sort(stable=True).indices
    images, labels = joined(rows)
    mixed = domains_of((images[order], labels[order], column[order]))
    assert [len(r.labels) for r in mixed] == [4, 3, 5]
    assert torch.equal(mixed[1].labels.sort().values, rows[1].labels.sort().values)
    (single,) = domains_of((images, labels))
    assert single.images is images
    for wrong in ([], images, (images,)):
        with pytest.raises(SpecError, match="batch"):
            domains_of(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_reduces_to_erm_on_one_domain_without_its_term(name):
    off = {"irm": {"penalty": 0.0, "penalty_anneal_iters": 0}}.get(name, {})
    run, erm = method(name, **off), method("erm")
    module, batch = network(run).eval(), domains((4,))
    ours, plain = run.loss(module, batch), erm.loss(module, batch[0])
    torch.testing.assert_close(ours.total, plain.total)
    torch.testing.assert_close(plain.total, F.cross_entropy(module(batch[0][0]), batch[0][1]))


def test_a_plain_classifier_is_enough_where_no_features_are_needed():
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 3))
    images, labels = joined(domains_of(domains()))
    torch.testing.assert_close(method("erm").loss(plain, domains()).total, F.cross_entropy(plain(images), labels))
    with pytest.raises(SpecError, match="CORAL needs features"):
        method("coral").loss(plain, domains())


# Losses


def test_irm_penalty_is_the_product_of_the_two_slopes():
    logits, labels = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    slopes = []
    for i in (0, 1):
        x, y = logits[i::2], labels[i::2]
        slopes.append((x * (x.softmax(-1) - F.one_hot(y, 3))).sum(-1).mean())
    torch.testing.assert_close(irm_penalty("multiclass", logits, labels), slopes[0] * slopes[1])
    with torch.no_grad():
        irm_penalty("multiclass", logits, labels)
    with pytest.raises(SpecError, match="one has 1"):
        irm_penalty("multiclass", logits[:1], labels[:1])


@pytest.mark.parametrize("name", ["irm", "coral"])
def test_second_order_gradients_agree_with_finite_differences(name):
    run = method(name, **({"penalty": 3.0} if name == "irm" else {"gamma": 2.0}))
    module, batch = network(run, dtype=torch.float64).eval(), domains(dtype=torch.float64)
    # Away from the kinks of ReLU: only the head moves, through which IRM's penalty is second order.
    weight = module.classifier[0].weight
    module.zero_grad()
    run.loss(module, batch).total.backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        values.append(float(run.loss(module, batch).total.detach()))
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    numeric = (values[0] - values[1]) / (2 * step)
    assert float((weight.grad * direction).sum()) == pytest.approx(numeric, rel=1e-5)


def test_irm_anneals_and_restarts_the_optimiser_once():
    run = method("irm", penalty=50.0, penalty_anneal_iters=2)
    module, batch = network(run).eval(), domains()
    weighted = [float(run.loss_at(module, batch, step).parts["penalty"].detach()) for step in range(4)]
    assert weighted[1] == weighted[0] and weighted[2] == weighted[3] == pytest.approx(50 * weighted[0], rel=1e-5)
    assert torch.equal(run.loss(module, batch).total, run.loss_at(module, batch, 2).total)
    assert [run.restarts_optimizer(step) for step in range(4)] == [False, False, True, False]


def test_irm_reaches_the_features_and_takes_binary_tasks():
    cls = algorithm("irm")
    run = cls(cls.preset("pacs", backbone=TINY, freeze_bn=False), "binary")
    module = network(run, 1)
    run.loss(module, domains(classes=2)).total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


def test_coral_distance_is_that_of_numpys_moments():
    x, y = (torch.randn(n, 5, dtype=torch.float64) for n in (6, 9))
    means = np.square(x.numpy().mean(0) - y.numpy().mean(0)).mean()
    covariances = np.square(np.cov(x.numpy().T) - np.cov(y.numpy().T)).mean()
    assert float(coral_distance(x, y)) == pytest.approx(means + covariances)
    assert float(coral_distance(x, x)) == 0.0
    with pytest.raises(SpecError, match="6 and 1 rows"):
        coral_distance(x, y[:1])


def test_coral_averages_over_pairs_of_domains():
    run = method("coral", gamma=2.0)
    module, batch = network(run).eval(), domains()
    features = [module.extract(x) for x, _ in batch]
    pairs = [coral_distance(features[i], features[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    losses = run.loss(module, batch)
    torch.testing.assert_close(losses.parts["distance"], 2 * sum(pairs).detach() / 3)
    task = sum(F.cross_entropy(module(x), y) for x, y in batch) / 3
    torch.testing.assert_close(losses.total, task + 2 * sum(pairs) / 3)
    joint = method("coral", gamma=2.0, joint=True)
    torch.testing.assert_close(joint.loss(module, batch).total, losses.total)
    module.train()
    assert not torch.allclose(joint.loss(module, batch).total, run.loss(module, batch).total, atol=1e-6)


# Update rules


def engine(run, module, lr=1e-2, step=0):
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)

    def take_step(batch):
        losses = run.loss_at(module, batch, step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        return losses

    return take_step


def test_fish_equals_the_explicit_inner_loop_on_a_clone():
    run = method("fish", meta_lr=0.3)
    module = network(run).train()
    reference = copy.deepcopy(module)
    take_step, state = engine(run, module), None
    for update in range(3):
        batch = domains(seed=update)
        run.update(module, batch, take_step)
        inner = copy.deepcopy(reference)
        optimizer = torch.optim.Adam(inner.parameters(), lr=1e-2)
        if state is not None:
            optimizer.load_state_dict(state)
        for x, y in batch:
            optimizer.zero_grad()
            F.cross_entropy(inner(x), y).backward()
            optimizer.step()
        state = optimizer.state_dict()
        with torch.no_grad():
            for p, q in zip(reference.parameters(), inner.parameters(), strict=True):
                p.add_(0.3 * (q - p))
            for p, q in zip(reference.buffers(), inner.buffers(), strict=True):
                p.copy_(p + 0.3 * (q - p) if p.is_floating_point() else q)
    torch.testing.assert_close(module.state_dict(), reference.state_dict())


def test_other_algorithms_make_one_step_on_the_whole_batch():
    seen = []
    for name in ("erm", "irm", "coral", "sma", "swad", "gmoe"):
        run = method(name, backbone=GMOE if name == "gmoe" else TINY)
        assert run.update(torch.nn.Identity(), "batch", lambda part: seen.append(part) or "done") == "done"
        assert not run.restarts_optimizer(0)
    assert seen == ["batch"] * 6


# Weight averages


def weights(step):
    return {"w": torch.tensor([float(step), step**2]), "n": torch.tensor(step)}


def test_sma_copies_and_then_averages():
    average = method("sma", start=4).averaging()
    with pytest.raises(SpecError, match="nothing to average"):
        average.average()
    for step in range(10):
        average.update(weights(step), step)
        first = min(step, 2)  # 0-based update 2 is the last that is only copied
        expected = torch.stack([weights(s)["w"] for s in range(first, step + 1)] if step > 2 else [weights(step)["w"]])
        torch.testing.assert_close(average.average()["w"], expected.mean(0))
        assert int(average.average()["n"]) == step


@pytest.mark.parametrize("make", [lambda: MovingAverage(3), lambda: LossValley(2, 3, 1.2)])
def test_averages_resume(make):
    whole, first, second = make(), make(), make()
    losses = [1.0, 1.1, 0.9, 1.0, 1.05, 5.0, 5.0, 5.0]
    for step in range(16):
        for average in (whole, first if step < 7 else second):
            if step == 7 and average is second:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            average.update(weights(step), step)
            if step % 2:
                average.observe(losses[step // 2])
    torch.testing.assert_close(second.average(), whole.average())


def valley(losses, converge, tolerance, ratio):
    """First and last segment of the average by the paper's rules, or None while nothing has converged."""
    for s in range(converge - 1, len(losses)):
        window = losses[s - converge + 1 : s + 1]
        if min(window) != window[0]:
            continue
        start, limit = s - converge + 1, ratio * sum(window) / converge
        for t in range(s + 1, len(losses)):
            if t - tolerance + 1 > start and min(losses[max(0, t - tolerance + 1) : t + 1]) > limit:
                return start, t - tolerance
        last = max(j for j in range(start, len(losses)) if losses[j] <= limit)
        return start, max(last, s - tolerance + 1)
    return None


@settings(max_examples=200, deadline=None)
@given(
    losses=st.lists(st.floats(0.125, 3.0, width=16), min_size=1, max_size=14),
    converge=st.integers(1, 4),
    tolerance=st.integers(1, 6),
    ratio=st.sampled_from([1.0, 1.2, 1.3, 2.0]),
)
def test_swad_averages_the_valley_of_the_paper(losses, converge, tolerance, ratio):
    average, size = LossValley(converge, tolerance, ratio), 3
    for i, loss in enumerate(losses):
        for step in range(i * size, (i + 1) * size):
            average.update(weights(step), step)
        average.observe(loss)
    found = valley(losses, converge, tolerance, ratio)
    first, last = found if found else (len(losses) - 1, len(losses) - 1)
    steps = range(first * size, (last + 1) * size)
    expected = torch.stack([weights(s)["w"].double() for s in steps]).mean(0)
    torch.testing.assert_close(average.average()["w"].double(), expected, rtol=1e-5, atol=1e-5)


def test_swad_says_when_it_is_finished():
    average = LossValley(2, 2, 1.0)
    told = []
    for step, loss in enumerate([1.0, 2.0, 9.0, 9.0, 0.1]):
        average.update(weights(step), step)
        told.append(average.observe(loss))
    assert told == [False, False, True, True, True]
    assert not LossValley().observe(1.0)
    with pytest.raises(SpecError, match="nothing to average"):
        LossValley().average()


# GMoE


def test_gmoe_adds_the_auxiliary_losses_of_its_blocks():
    run = method("gmoe", backbone=GMOE)
    module, batch = network(run).train(), domains((2, 1), 3, 32)
    torch.manual_seed(5)
    losses = run.loss(module, batch)
    torch.manual_seed(5)
    images, labels = joined(domains_of(batch))
    vit = module.features[0]
    out = run_vit(vit, images)
    task = F.cross_entropy(module.classifier(out.features_BD), labels)
    torch.testing.assert_close(losses.total, task + sum(out.aux.values()))
    assert set(losses.parts) == {"task", "aux"} and list(out.aux) == [8, 10]
    losses.total.backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("name", ["fish", "irm", "coral", "sma"])
def test_every_algorithm_works_on_a_sparse_transformer(name):
    run = method(name, backbone=GMOE)
    module, batch = network(run).train(), domains((2, 2), 3, 32)
    before = module.classifier[0].weight.detach().clone()
    losses = run.update(module, batch, engine(run, module))
    assert float(losses.parts["aux"]) > 0 and torch.isfinite(losses.total)
    assert not torch.equal(before, module.classifier[0].weight)


def test_gmoe_learns_a_small_problem():
    run = method("gmoe", backbone={**GMOE, "channels": 1})
    module = network(run, 2).train()
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (16,), generator=g)
    images = torch.randn(16, 1, 32, 32, generator=g) + 2.0 * labels.view(-1, 1, 1, 1)
    take_step = engine(run, module, lr=1e-3)
    first, *_, last = [float(run.update(module, (images, labels), take_step).parts["task"]) for _ in range(12)]
    assert last < 0.5 * first
    assert run.predict(module.eval(), images).tolist() == labels.tolist()


def test_gmoe_presets_are_the_registered_ones():
    cls = algorithm("gmoe")
    rates = {name: (cls.preset(name).train.lr, cls.preset(name).train.weight_decay) for name in cls.PRESETS}
    assert rates["pacs"] == rates["vlcs"] == (3e-5, 1e-6) and rates["officehome"] == (1e-5, 1e-6)
    assert rates["terraincognita"] == (5e-5, 1e-4) and rates["domainnet"] == rates["cub_dg"] == (5e-5, 0.0)
    assert rates["sviro"] == rates["wilds_camelyon"] == (3e-5, 0.0)
    train = cls.preset("domainnet").train
    assert (train.steps, train.evaluate_every, train.batch_size, train.per_domain) == (15001, 500, 32, True)
    assert (train.optimizer, train.schedule, train.clip) == ("adam", "constant", None)
    with pytest.raises(pydantic.ValidationError, match="no experts"):
        cls.preset("pacs", backbone=TINY)


def test_erm_presets_name_both_protocols():
    cls = algorithm("erm")
    old, new = cls.preset("pacs"), cls.preset("pacs@domainbed_head")
    assert old.backbone.name == "torchvision:resnet50" and old.freeze_bn
    assert new.backbone.name == "timm:resnet50.ram_in1k" and not new.freeze_bn
    assert old.train.lr == new.train.lr == 5e-5 and old.train.steps == 5001
    small = cls.preset("colored_mnist")
    assert small.backbone.channels == 2 and (small.train.lr, small.train.batch_size) == (1e-3, 64)
    assert algorithm("swad").preset("vlcs").ratio == 1.2 and algorithm("swad").preset("pacs").ratio == 1.3


def test_no_decay_spares_vectors_experts_biases_and_tokens():
    run = method("gmoe", backbone=GMOE, no_decay=True)
    module = network(run)
    decay, spared = run.param_groups(module)
    assert (decay.weight_decay, spared.weight_decay) == (1e-6, 0.0)
    names = {id(p): name for name, p in module.named_parameters()}
    kept = {names[id(p)] for p in decay.parameters}
    assert "features.0.blocks.8.mlp.experts.w1" in kept and "features.0.blocks.8.mlp.gate.sim_matrix" in kept
    assert not [n for n in kept if n.endswith(("bias", ".b1", ".b2", "cls_token", "pos_embed", "temperature"))]
    assert len(decay.parameters) + len(spared.parameters) == len(names)
    assert [g.name for g in method("gmoe", backbone=GMOE).param_groups(module)] == ["model"]


def test_frozen_statistics_and_dropout():
    cls = algorithm("erm")
    run = cls(cls.preset("pacs", backbone=TINY, freeze_bn=True, dropout=0.5))
    module = network(run).train()
    plain = network(method("erm"))
    assert module.state_dict().keys() == plain.state_dict().keys()
    before = {n: b.clone() for n, b in module.named_buffers()}
    losses = run.loss(module, domains())
    losses.total.backward()
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    assert module.features[0][1].weight.grad is not None
    assert not torch.equal(module(domains()[0][0]), module(domains()[0][0]))
    torch.testing.assert_close(module.eval()(domains()[0][0]), plain.eval()(domains()[0][0]))
    assert not copy.deepcopy(module).train().features[0][1].training
