"""Reset policy, step cap, reasons against a method, collapse guard with rollback, and streams."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.adaptation.base import ADAPTATIONS, AdaptResult, fitting, make
from moe.adaptation.guard import GuardSpec, check, guarded, judge
from moe.adaptation.stream import Stream, StreamSpec, overlay
from moe.aggregator import Aggregator
from moe.backbones import build_student
from moe.errors import SpecError
from moe.specs import BackboneSpec
from tests.moe.helpers import MOE, student, wake


def images(count=16, seed=1):
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def spread_student():
    """A student whose base predictions use all classes."""
    model = student()
    with torch.no_grad():
        logits = model(images(64, 9))
        head = model.classifier[0]
        head.weight.mul_(1 / logits.std(0)[:, None])
        head.bias.copy_(head.bias / logits.std(0) - logits.mean(0) / logits.std(0))
    return model


def collapsing(model):
    """A delta that makes every image alike: all norm scales are zero, so one class is left."""
    return {n: torch.zeros_like(p) for n, p in model.named_parameters() if n.startswith("features.3.1")}


def teacher(count=16):
    torch.manual_seed(4)
    return torch.randn(count, 3, 32), Aggregator(32, 3, heads=4).eval()


def test_only_methods_are_listed():
    assert ADAPTATIONS.names() == ["bn", "distill", "eata", "none", "tent"]


@pytest.mark.parametrize("name", ["tent", "eata", "distill"])
def test_the_step_cap_bounds_steps_and_is_reported(name):
    tokens, aggregator = teacher()
    method = make(name, {"steps": 7}).capped(3)
    seen = []
    method.on_step = lambda done, total: seen.append((done, total))
    result = method.adapt(student(), images(), tokens, aggregator)
    assert result.steps <= 3 and seen[-1] == (3, 3)
    assert make(name, {"steps": 2}).capped(3).config.steps == 2 and method.capped(None) is method
    with pytest.raises(SpecError, match="step cap is 0"):
        method.capped(0)


def test_methods_without_steps_take_any_cap():
    assert make("bn").capped(1).adapt(student(), images()).steps == 0


def test_reasons_against_a_method():
    vit = build_student(BackboneSpec(name="timm:test_vit", image_size=32), 3)
    assert fitting(student(MOE), "multiclass", True) == dict.fromkeys(ADAPTATIONS.names())
    reasons = fitting(vit, "multiclass", False)
    assert "BatchNorm" in reasons["bn"] and "experts" in reasons["distill"]
    assert reasons["tent"] is reasons["eata"] is reasons["none"] is None
    regression = fitting(student(outputs=1), "regression", True)
    assert "distribution" in regression["tent"] and "distribution" in regression["eata"] and regression["bn"] is None
    plain = build_student(BackboneSpec(name="mnist_cnn", channels=1), 3)
    bare = fitting(plain, "multiclass", False)
    norms = any("norm" in type(m).__name__.lower() for m in plain.features.modules())
    assert (bare["tent"] is None) == norms


def test_distill_tells_which_experts_were_heard():
    model = wake(student(MOE))
    tokens, aggregator = teacher()
    result = make("distill").adapt(model, images(), tokens, aggregator)
    with torch.no_grad():
        maps = aggregator(tokens, need_attention=True).attention_LBHEE
    assert result.expert_weights == pytest.approx(maps.mean((0, 1, 2, 3)).tolist())
    assert sum(result.expert_weights) == pytest.approx(1)
    flat = Aggregator(32, 3, depth=0).eval()
    assert make("distill").adapt(model, images(), tokens, flat).expert_weights == pytest.approx((1 / 3,) * 3)


def test_chunks_change_memory_not_numbers():
    model = wake(student(MOE, dtype=torch.float64))
    tokens, aggregator = teacher()
    rows, tokens, aggregator = images().double(), tokens.double(), aggregator.double()
    options = {"steps": 3, "inner_lr": 0.2, "measure_after": True}
    whole = make("distill", options).adapt(model, rows, tokens, aggregator)
    parts = make("distill", {**options, "chunk": 5}).adapt(model, rows, tokens, aggregator)
    for name in whole.delta:
        torch.testing.assert_close(parts.delta[name], whole.delta[name])
    assert parts.loss_before == pytest.approx(whole.loss_before) and parts.loss_after == pytest.approx(whole.loss_after)
    torch.testing.assert_close(parts.logits_before, model(rows).detach())
    torch.testing.assert_close(parts.logits_after, whole.logits_after)
    tent = [make("tent", {"steps": 2, "chunk": c}).adapt(model, rows) for c in (None, 3)]
    assert tent[0].loss_after == pytest.approx(tent[1].loss_after)


# ---- guard ---------------------------------------------------------------------------------------------------------


def test_a_collapsed_state_is_rolled_back():
    model, rows = spread_student(), images()
    found = check(model, rows, AdaptResult(model, collapsing(model)), "multiclass")
    assert found.collapsed and found.criterion == "class-entropy" and "entropy" in found.reason
    assert found.entropy_after == 0 and found.entropy_before > 0.5 and found.top_share_after == 1.0
    delta, same = guarded(model, rows, AdaptResult(model, collapsing(model)), "multiclass")
    assert delta == {} and same == found
    off = check(model, rows, AdaptResult(model, collapsing(model)), "multiclass", GuardSpec(enabled=False))
    assert not off.collapsed and off.entropy_after == 0


def test_tent_with_a_mad_rate_is_caught_and_a_sane_one_is_not():
    model, rows = spread_student(), images(32)
    mad = make("tent", {"lr": 1.0, "steps": 60}).adapt(model, rows)
    sane = make("tent", {"lr": 1e-4, "steps": 5}).adapt(model, rows)
    assert check(model, rows, mad, "multiclass").collapsed
    kept, found = guarded(model, rows, sane, "multiclass")
    assert not found.collapsed and kept is sane.delta and found.images == 32


def counted(model):
    """The model, and the sizes of the passes that its features make from now on."""
    passes = []
    model.features.register_forward_pre_hook(lambda module, given: passes.append(len(given[0])))
    return model, passes


def test_a_brief_check_makes_no_pass_that_the_verdict_does_not_need():
    model, rows = spread_student(), images(32)
    result = make("bn").adapt(model, rows)
    full = check(model, rows, result, "multiclass")
    model, passes = counted(model)
    found = check(model, rows, result, "multiclass", brief=True)
    assert not passes and not found.collapsed and found.images == 32
    assert found.entropy_before is None and found.entropy_after == pytest.approx(full.entropy_after, abs=0.2)
    exact = check(model, rows, AdaptResult(model, result.delta), "multiclass", brief=True)
    assert passes == [32] and exact.entropy_after == pytest.approx(full.entropy_after)  # the state's own pass alone
    off = GuardSpec(keep_entropy=1.0)
    assert check(model, rows, result, "multiclass", off, brief=True) == check(model, rows, result, "multiclass", off)


def test_what_the_estimating_pass_predicts_is_the_adapted_model_up_to_rounding():
    model, rows = spread_student(), images(32)
    result = make("bn").adapt(model, rows)
    exact = model.run(rows, result.delta).logits_BK.detach()
    assert (result.logits_near - exact).abs().max() < 0.02 * exact.abs().max()
    for options in ({"prior": 4.0}, {"batch_size": 8}):
        assert make("bn", options).adapt(model, rows).logits_near is None
    assert make("bn").adapt(model, images(2)[..., :8, :8]).logits_near is None  # few values a channel


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.sampled_from(["multiclass", "binary", "regression"]))
def test_a_brief_check_never_publishes_what_the_full_one_refuses(seed, keep, task):
    generator = torch.Generator().manual_seed(seed)
    outputs = 6 if task == "multiclass" else 1
    model, count = student(outputs=outputs), int(torch.randint(2, 40, (), generator=generator))
    rows = images(count, seed)
    sharp = 10 ** float(torch.rand((), generator=generator) * 2)
    biased = torch.randn(1, outputs, generator=generator) * sharp
    after = torch.randn(count, outputs, generator=generator) + biased
    result = AdaptResult(model, {"features.0.0.weight": torch.ones(1)}, 1.0, 1.0, logits_after=after)
    spec = GuardSpec(keep_entropy=keep)
    brief, full = (check(model, rows, result, task, spec, brief=b) for b in (True, False))
    assert brief.collapsed == full.collapsed and brief.criterion == full.criterion
    assert brief.entropy_after == pytest.approx(full.entropy_after)


def test_predictions_up_to_rounding_acquit_but_never_convict():
    model, rows = spread_student(), images(32)
    delta = make("bn").adapt(model, rows).delta
    one_class = torch.zeros(32, 3).index_fill_(1, torch.tensor(0), 1.0)
    wrong = AdaptResult(model, delta, logits_near=one_class)
    brief, full = (check(model, rows, wrong, "multiclass", brief=b) for b in (True, False))
    assert not brief.collapsed and not full.collapsed and brief.entropy_after == full.entropy_after
    lost = AdaptResult(model, delta, logits_near=one_class * math.nan)
    assert not check(model, rows, lost, "multiclass", brief=True).collapsed


@pytest.mark.parametrize("name", ["tent", "eata"])
def test_the_loss_before_comes_from_the_first_step_where_that_sees_every_image(name):
    model, rows = spread_student(), images(16)
    model, passes = counted(model)
    shared = make(name, {"steps": 2, "batch_size": 16}).adapt(model, rows)
    assert passes == [16] * 4  # statistics, two steps, after
    passes.clear()
    apart = make(name, {"steps": 2, "batch_size": 15}).adapt(model, rows)
    assert passes == [16, 16, 15, 15, 16] and shared.loss_before == pytest.approx(apart.loss_before, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_always_refused(value):
    model, rows = student(), images(2)
    name = next(iter(model.state_dict()))
    broken = AdaptResult(model, {name: torch.full_like(model.state_dict()[name], value)})
    loose = GuardSpec(enabled=False)
    assert check(model, rows, broken, "multiclass", loose).criterion == "not-finite"
    lost = AdaptResult(model, {name: model.state_dict()[name]}, 1.0, value)
    assert check(model, rows, lost, "multiclass", loose).criterion == "not-finite"
    huge = AdaptResult(model, {n: torch.full_like(v, 1e38) for n, v in model.named_parameters() if "features" in n})
    assert check(model, rows, huge, "multiclass", loose).criterion == "not-finite"


def test_a_loss_that_grew_is_a_collapse():
    model, rows = spread_student(), images()
    same = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("features.0")}
    found = check(model, rows, AdaptResult(model, same, 1.0, 1.5), "multiclass")
    assert found.criterion == "loss" and found.changed == 0
    assert not check(model, rows, AdaptResult(model, same, 1.0, 1.2), "multiclass").collapsed
    assert not check(model, rows, AdaptResult(model, same, 1.0), "multiclass").collapsed


def test_few_images_and_single_classes_are_not_judged_by_their_classes():
    model = spread_student()
    result = AdaptResult(model, collapsing(model))
    assert not check(model, images(7), result, "multiclass").collapsed
    one = student()
    with torch.no_grad():
        one.classifier[0].bias[1] += 100
    assert not check(one, images(), AdaptResult(one, collapsing(one)), "multiclass").collapsed


def test_regression_is_judged_by_its_spread():
    model = student(outputs=1)
    with torch.no_grad():
        model.classifier[0].weight.mul_(20)
    found = check(model, images(), AdaptResult(model, collapsing(model)), "regression")
    assert found.collapsed and "spread" in found.reason and found.changed is None


def test_the_methods_own_logits_are_used():
    model, rows = spread_student(), images()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.features.register_forward_hook(lambda *_: calls.append(1))
    delta = {name: value for name, value in model.state_dict().items() if name.startswith("features.0")}
    logits = torch.eye(3).repeat(6, 1)[:16]
    found = check(model, rows, AdaptResult(model, delta, logits_before=logits, logits_after=logits), "multiclass")
    assert not calls and found.images == 16 and found.changed == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_an_adaptation_that_changes_no_prediction_is_never_a_collapse(classes, data):
    before = torch.tensor(classes)
    order = data.draw(st.permutations(range(len(classes))))
    after = before[list(order)]  # another order has the same distribution
    found = judge(before, after, AdaptResult(student()), "multiclass", GuardSpec())
    assert not found.collapsed and found.entropy_after == pytest.approx(found.entropy_before)
    constant = judge(before, torch.zeros_like(before), AdaptResult(student()), "multiclass", GuardSpec())
    assert constant.collapsed == (len(classes) >= 8 and found.entropy_before > 0.05)


# ---- streams -------------------------------------------------------------------------------------------------------


def test_overlay_is_the_model_with_the_delta_and_shares_the_rest():
    model, rows = wake(student(MOE)), images()
    delta = make("tent", {"steps": 2}).adapt(model, rows).delta
    laid = overlay(model, delta)
    with torch.no_grad():
        assert torch.equal(laid(rows), model.run(rows, delta).logits_BK)
    assert laid.classifier[0].weight is model.classifier[0].weight
    assert not any(torch.equal(laid.state_dict()[n], model.state_dict()[n]) for n in delta if n.endswith("weight"))
    with pytest.raises(SpecError, match=r"features\.9\.weight"):
        overlay(model, {"features.9.weight": torch.zeros(1)})


def test_a_stream_follows_and_leaves_the_base_alone():
    model = spread_student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = Stream(model, make("tent", {"steps": 2, "lr": 1e-3}))
    batches = [images(16, seed) for seed in range(3)]
    steps = [stream.observe(rows) for rows in batches]
    assert [step.moved for step in steps] == [True] * 3 and stream.state.since_reset == 3
    with torch.no_grad():
        assert torch.equal(steps[-1].logits_SK, model.run(batches[-1], stream.state.delta).logits_BK)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    alone = Stream(model, make("tent", {"steps": 2, "lr": 1e-3})).observe(batches[-1])
    assert not torch.equal(alone.logits_SK, steps[-1].logits_SK)
    again = Stream(model, make("tent", {"steps": 2, "lr": 1e-3}))
    assert all(torch.equal(again.observe(r).logits_SK, s.logits_SK) for r, s in zip(batches, steps, strict=True))


def test_each_batch_begins_at_the_base_where_the_policy_says_so():
    model, rows = spread_student(), images()
    tokens, aggregator = teacher()
    stream = Stream(model, make("distill"), aggregator=aggregator)
    stream.observe(images(16, 5), tokens)
    step = stream.observe(rows, tokens)
    plain = make("distill").adapt(model, rows, tokens, aggregator)
    assert all(torch.equal(stream.state.delta[n], plain.delta[n]) for n in plain.delta)
    assert "begins at the base" in step.reset
    following = Stream(model, make("distill", {"reset": "follow"}), aggregator=aggregator)
    following.observe(images(16, 5), tokens)
    following.observe(rows, tokens)
    assert any(not torch.equal(following.state.delta[n], plain.delta[n]) for n in plain.delta)
    with pytest.raises(SpecError, match="aggregator"):
        following.observe(rows)


def test_statistics_move_with_the_stream_by_their_prior():
    model = student()
    stream = Stream(model, make("bn", {"prior": 48}))
    first, second = images(16, 1), images(16, 2) + 3
    stream.observe(first)
    middle = stream.state.delta["features.0.1.running_mean"]
    stream.observe(second)
    own = model.features[0][0](second).mean((0, 2, 3)).detach()
    torch.testing.assert_close(stream.state.delta["features.0.1.running_mean"], middle.lerp(own, 0.25))


class Saboteur:
    """A method that collapses on demand: images of batch ``bad`` make every image alike."""

    def __new__(cls, bad, reset="follow"):
        method = make("none", {"reset": reset})
        good = {"features.0.1.bias": torch.full((2,), 0.01)}

        def adapt(model, support_images, *rest):
            cls.count += 1
            return AdaptResult(model, collapsing(model) if cls.count in bad else good)

        cls.count = 0
        method.adapt = adapt
        return method


def test_a_collapsed_batch_is_dropped_and_the_last_good_state_stays():
    model = spread_student()
    stream = Stream(model, Saboteur({2}))
    stream.observe(images(16, 1))
    good = stream.state
    step = stream.observe(images(16, 2))
    assert not step.moved and step.check.criterion == "class-entropy" and step.reset is None
    assert stream.state.delta is good.delta and stream.state.dropped == 1
    with torch.no_grad():
        assert torch.equal(step.logits_SK, model.run(images(16, 2), good.delta).logits_BK)
    assert stream.observe(images(16, 3)).moved and stream.state.dropped == 0


def test_a_collapse_leads_back_to_the_base_by_policy_or_after_some_patience():
    model = spread_student()
    strict = Stream(model, Saboteur({2}, "collapse"))
    strict.observe(images(16, 1))
    step = strict.observe(images(16, 2))
    assert step.reset == "the state collapsed" and strict.state.delta == {}
    with torch.no_grad():
        assert torch.equal(step.logits_SK, model(images(16, 2)))
    patient = Stream(model, Saboteur({2, 3}), StreamSpec(patience=2))
    patient.observe(images(16, 1))
    assert patient.observe(images(16, 2)).reset is None and patient.state.delta
    assert "2 batches in a row" in patient.observe(images(16, 3)).reset and patient.state.delta == {}


def test_collapse_is_seen_over_batches_of_few_images():
    model = spread_student()
    stream = Stream(model, Saboteur(set(range(1, 99))), StreamSpec(patience=99))
    rows = images(16, 1)
    found = [stream.observe(rows[n : n + 2]).check for n in range(0, 16, 2)]
    assert not found[0].collapsed  # two images cannot be judged
    assert found[-1].collapsed and found[-1].images >= 8


def test_resets_after_a_number_of_batches():
    stream = Stream(spread_student(), make("tent", {"steps": 1, "lr": 1e-4}), StreamSpec(reset_every=2))
    reasons = [stream.observe(images(16, seed)).reset for seed in range(5)]
    assert [reason is not None for reason in reasons] == [False, False, True, False, True]


def test_batches_that_a_method_refuses_leave_the_state():
    deep = build_student(BackboneSpec(name="torchvision:resnet18"), 3).eval()
    stream = Stream(deep, make("bn"))
    one = stream.observe(torch.randn(1, 3, 32, 32))
    assert not one.moved and "1 image(s)" in one.check.reason and stream.state.delta == {}
    with pytest.raises(SpecError, match="empty"):
        stream.observe(torch.randn(0, 3, 32, 32))
    with pytest.raises(SpecError, match="distribution"):
        make("tent", task="regression").adapt(student(outputs=1), images())
