"""Adaptation on request: reports, publication, refusals, idempotency, jobs, turns, streams; the base never changes."""

import pickle
import threading
import time

import numpy as np
import pytest
import torch

from moe.adaptation.base import make
from moe.errors import DataError, NotFoundError, SpecError
from serve.adapting import Adapter, AdaptReport, AdaptRequest
from serve.catalogue import Catalogue
from serve.delta import Delta
from serve.http.problems import Refused
from serve.jobs import Turns
from serve.model import ServedModel


@pytest.fixture
def catalogue(tmp_path, served_model):
    return Catalogue(tmp_path / "states", model_version=served_model.info.version)


@pytest.fixture
def adapter(served_model, catalogue):
    found = Adapter(served_model, catalogue)
    yield found
    found.close()


@pytest.fixture(scope="module")
def support(domain_images):
    return domain_images(45, 32)[0]


def request(images, method="bn", name="site", options=None, **others):
    return AdaptRequest("tenant", name, method, options or {}, images, **others)


MAD = {"method": "tent", "options": {"lr": 1.0, "steps": 60}}


@pytest.mark.parametrize("method", ["distill", "bn", "tent", "eata", "none"])
def test_every_method_publishes_what_bare_python_computes(adapter, served_model, support, method):
    before = {name: value.clone() for name, value in served_model.state_dict().items()}
    report = adapter.adapt(request(support, method))
    images = served_model.preprocess(support)
    bare = make(method, served_model.defaults.get(method), served_model.info.task)
    tokens = served_model.tokens(images).clone()
    expected = bare.adapt(served_model.private_base(), images, tokens, served_model.aggregator)
    state = adapter.catalogue.resident("tenant", "site")
    assert state == Delta.changed(served_model.state_dict(), expected.delta)
    assert report.kept and not report.collapsed and report.support == 32 and report.record.method == method
    assert (report.loss_before is None) == (method in ("bn", "none"))
    assert len(report.expert_weights) == (3 if method == "distill" else 0)
    assert report.record.collapse["collapsed"] is False and report.bytes == state.nbytes
    after = served_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = not torch.equal(served_model.predict(images, state), served_model.predict(images))
    assert changed == (method != "none")
    assert AdaptReport.from_json(report.to_json()).record == report.record
    assert pickle.loads(pickle.dumps(report)) == report


def test_bn_helps_on_a_far_domain(adapter, served_model, domain_images):
    unlabelled, _ = domain_images(90, 64)
    held, labels = domain_images(90, 300, 1464)
    adapter.adapt(request(unlabelled))
    images = served_model.preprocess(held)
    state = adapter.catalogue.resident("tenant", "site")

    def accuracy(delta):
        return float((served_model.predict(images, delta).argmax(1).numpy() == labels).mean())

    assert accuracy(state) > accuracy(None)


def test_a_dry_run_publishes_nothing(adapter, support):
    report = adapter.adapt(request(support, dry_run=True))
    assert report.dry_run and not report.kept and report.bytes > 0
    with pytest.raises(NotFoundError):
        adapter.catalogue.get("tenant", "site")


def test_a_collapse_never_touches_the_served_state(adapter, support):
    good = adapter.adapt(request(support)).record
    bits = adapter.catalogue.resident("tenant", "site").to_bytes()
    report = adapter.adapt(request(support, **MAD))
    assert report.collapsed and report.record is None and report.bytes == 0 and report.collapse["reason"]
    assert adapter.catalogue.get("tenant", "site") == good
    assert adapter.catalogue.resident("tenant", "site").to_bytes() == bits
    blown = adapter.adapt(request(support, "distill", options={"inner_lr": 10.0, "steps": 5}))
    assert blown.collapse["criterion"] == "not-finite" and blown.to_json()["loss_after"] is None
    assert [record.version for record in adapter.catalogue.versions("tenant", "site")] == [1]


def test_an_option_that_learned_rates_replace_is_refused(adapter, served_model, support, monkeypatch):
    names = [name for name, _ in served_model.base.features.named_parameters(prefix="features")]
    learned = {**served_model.defaults["distill"], "rates": dict.fromkeys(names, 1e-4)}
    monkeypatch.setitem(served_model.defaults, "distill", learned)
    for options in ({"inner_lr": 0.5}, {"adapt": "norm"}):
        with pytest.raises(SpecError, match="has no effect: this model learned a rate for each tensor"):
            adapter.adapt(request(support, "distill", options=options))
    first = adapter.adapt(request(support, "distill", dry_run=True))
    same = adapter.adapt(request(support, "distill", options={"inner_lr": learned["inner_lr"]}, dry_run=True))
    other = adapter.adapt(request(support, "distill", options={"inner_lr": 0.01, "rates": {}}, dry_run=True))
    assert first.loss_after == same.loss_after != other.loss_after


def test_what_fails_while_it_runs_leaves_no_trace(adapter, support):
    adapter.adapt(request(support))

    def give_up(done, total):
        if done > 60:
            raise SpecError("enough")

    with pytest.raises(SpecError, match="enough"):
        adapter.adapt(request(support, "tent"), give_up)
    assert adapter.catalogue.get("tenant", "site").version == 1 and adapter.turns.taken == 0
    assert adapter.adapt(request(support, "tent")).record.version == 2


def test_progress_rises_to_the_end(adapter, support):
    seen = []
    adapter.adapt(request(support, "distill"), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[0] == (0, 100) and seen[-1] == (100, 100) and len(set(seen)) >= 4


def test_the_step_cap_is_kept(adapter, support):
    report = adapter.adapt(request(support, "tent", options={"steps": 9}, step_cap=2))
    assert report.steps == 2 and report.record.options["steps"] == 2
    limited = Adapter(adapter.model, adapter.catalogue, max_steps=3)
    assert limited.adapt(request(support, "tent", options={"steps": 9})).steps == 3
    with pytest.raises(SpecError, match="step cap is 4"):
        limited.adapt(request(support, "tent", step_cap=4))


def test_a_request_may_begin_at_the_state_that_is_there(adapter, support, domain_images):
    options = {"steps": 2, "statistics": False}
    adapter.adapt(request(support, "bn"))
    following = adapter.adapt(request(support, "tent", options={**options, "reset": "follow"}))
    state = adapter.catalogue.resident("tenant", "site")
    assert any("running_mean" in name for name in state.tensors) and following.record.version == 2
    fresh = adapter.adapt(request(support, "tent", name="other", options=options))
    assert not any("running_mean" in name for name in adapter.catalogue.resident("tenant", "other").tensors)
    assert fresh.loss_before != following.loss_before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "tennt"}, "no adaptation method named 'tennt'.*tent"),
        ({"name": "../../etc"}, "not allowed as the name"),
        ({"images": []}, "no image"),
        ({"options": {"stepz": 3}}, "options of bn do not fit: stepz"),
        ({"method": "tent", "options": {"steps": "many"}}, "steps"),
        ({"method": "tent", "options": {3: 4}}, "options of tent"),
        ({"step_cap": 0}, "step cap is 0"),
        ({"idempotency_key": ""}, "Idempotency-Key"),
        ({"idempotency_key": "x" * 300}, "Idempotency-Key"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(adapter, support, change, message):
    asked = request(**{"images": support, **change})
    for call in (adapter.adapt, adapter.start, adapter.stream):
        with pytest.raises(SpecError, match=message):
            call(asked)
    assert adapter.turns.taken == 0


def test_too_many_images_and_unreadable_ones(served_model, catalogue, support):
    small = Adapter(served_model, catalogue, max_images=8)
    with pytest.raises(Refused) as caught:
        small.adapt(request(support))
    assert caught.value.status == 413 and "32 images" in str(caught.value)
    with pytest.raises((DataError, SpecError)):
        small.adapt(request([np.zeros((2, 3, 4, 5), np.uint8)]))


def test_a_method_that_makes_no_sense_is_refused_with_the_reason(served_model, catalogue, support):
    from dataclasses import replace

    why = {**served_model.info.methods, "distill": "the run kept no experts"}
    alone = ServedModel(replace(served_model.info, methods=why), served_model.private_base())
    with pytest.raises(SpecError, match=r"distill cannot be used here: the run kept no experts.*bn"):
        Adapter(alone, catalogue).adapt(request(support, "distill"))


# ---- idempotency ---------------------------------------------------------------------------------------------------


def test_the_same_key_is_carried_out_once_also_after_a_restart(adapter, served_model, support):
    first = adapter.adapt(request(support, idempotency_key="k"))
    assert adapter.adapt(request(support, idempotency_key="k")) == first
    other = Adapter(served_model, Catalogue(adapter.catalogue.folder))
    assert other.adapt(request(support, idempotency_key="k")).record == first.record
    assert adapter.adapt(request(support)).record.version == 2
    elsewhere = AdaptRequest("somebody", "site", "bn", {}, support, idempotency_key="k")
    assert adapter.adapt(elsewhere).record.version == 1


@pytest.mark.parametrize("change", [{"method": "tent"}, {"name": "b"}, {"images": 3}, {"dry_run": True}])
def test_another_request_under_the_same_key_is_a_conflict(adapter, support, change):
    adapter.adapt(request(support, idempotency_key="k"))
    if "images" in change:
        change = {"images": support[: change["images"]]}
    with pytest.raises(Refused) as caught:
        adapter.adapt(request(**{"images": support, "idempotency_key": "k", **change}))
    assert caught.value.status == 409 and caught.value.reason == "idempotency-conflict"


def test_an_attempt_that_died_after_publishing_is_not_repeated(adapter, support, monkeypatch):
    from serve.once import Claim

    def die(self, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Claim, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            adapter.adapt(request(support, idempotency_key="k"))
    report = adapter.adapt(request(support, idempotency_key="k"))
    assert report.record.version == 1 and len(adapter.catalogue.versions("tenant", "site")) == 1


def test_simultaneous_requests_under_one_key_publish_once(adapter, support):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(adapter.adapt(request(support, "tent", idempotency_key="k"))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and {report.record.version for report in found} == {1}


# ---- jobs and turns ------------------------------------------------------------------------------------------------


def wait_for(adapter, job):
    deadline = time.monotonic() + 60
    while (status := adapter.job(job)).status not in ("done", "failed"):
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    return status


def test_a_job_ends_with_the_report(adapter, support):
    job = adapter.start(request(support, "distill"))
    status = wait_for(adapter, job)
    assert status.status == "done" and status.done == status.total == 100
    assert status.report.record == adapter.catalogue.get("tenant", "site")
    assert pickle.loads(pickle.dumps(status)) == status
    with pytest.raises(NotFoundError):
        adapter.job(job, "somebody")
    with pytest.raises(NotFoundError):
        adapter.job("no-such-job")


def test_a_failed_job_tells_why_and_a_repeated_start_is_the_same_job(adapter, support):
    failed = wait_for(adapter, adapter.start(request([np.zeros((2, 3, 4, 5), np.uint8)])))
    assert failed.status == "failed" and failed.error is not None and failed.report is None
    asked = request(support, idempotency_key="k")
    assert adapter.start(asked) == adapter.start(asked)
    wait_for(adapter, adapter.start(asked))
    assert adapter.catalogue.get("tenant", "site").version == 1


def test_more_than_may_wait_are_refused_and_room_comes_back(served_model, catalogue, support):
    adapter = Adapter(served_model, catalogue, at_once=1, queue=1)
    entered, leave = threading.Event(), threading.Event()

    def hold(done, total):
        entered.set()
        leave.wait(120)

    first = threading.Thread(target=lambda: adapter.adapt(request(support), hold))
    first.start()
    assert entered.wait(60)
    waiting = adapter.start(request(support, name="second"))
    for call in (adapter.adapt, adapter.start, adapter.stream):
        with pytest.raises(Refused) as caught:
            call(request(support, name="third"))
        assert caught.value.status == 429 and caught.value.retry_after > 0
    leave.set()
    first.join()
    assert wait_for(adapter, waiting).status == "done"
    assert adapter.adapt(request(support, name="third")).kept and adapter.turns.taken == 0


def test_one_computes_at_a_time():
    turns, inside, most = Turns(1, 9), [], []

    def work():
        turns.reserve()
        with turns.turn():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
        turns.release()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6 and turns.taken == 0


def test_nobody_is_overtaken():
    turns, order, threads = Turns(1, 9), [], []

    def work(number):
        with turns.turn():
            order.append(number)

    with turns.turn():
        for number in range(6):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            while len(turns._line) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(6))


def test_concurrent_adaptations_do_not_mix(served_model, catalogue, domain_images):
    adapter = Adapter(served_model, catalogue, at_once=3)
    sets = {f"a{angle}": domain_images(angle, 24)[0] for angle in (0, 20, 45, 70, 90, 120)}
    threads = [
        threading.Thread(target=adapter.adapt, args=(request(images, "distill", name),))
        for name, images in sets.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, images in sets.items():
        alone = adapter.adapt(request(images, "distill", "alone")).record.digest
        assert adapter.catalogue.get("tenant", name).digest == alone


# ---- support -------------------------------------------------------------------------------------------------------


def test_experts_run_once_for_the_same_images_within_the_bytes(served_model, catalogue, support):
    adapter = Adapter(served_model, catalogue, cache_bytes=2 * 32 * 3 * 64 * 4)
    first = adapter.adapt(request(support, "distill")).record
    assert adapter.adapt(request(support, "distill")).record.digest == first.digest
    assert (adapter.support.hits, adapter.support.misses) == (1, 1)
    for end in range(26, 32):
        adapter.adapt(request(support[:end], "distill"))
    assert adapter.support.nbytes <= 2 * 32 * 3 * 64 * 4


def test_chunks_bound_passes_without_changing_the_outcome(served_model, catalogue, support):
    whole = Adapter(served_model, catalogue).adapt(request(support, "distill", "whole"))
    parts = Adapter(served_model, catalogue, chunk=10).adapt(request(support, "distill", "parts"))
    assert parts.loss_after == pytest.approx(whole.loss_after, rel=1e-4)
    one, other = (catalogue.resident("tenant", name).tensors for name in ("whole", "parts"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_state_kept_as_its_support_comes_back_bit_by_bit(served_model, catalogue, support):
    adapter = Adapter(served_model, catalogue, keep_support=True)
    record = adapter.adapt(request(support[:2], "distill")).record
    assert record.kind == "features" and record.stored_bytes < record.bytes
    bits = catalogue.resident("tenant", "site").to_bytes()
    catalogue.evict()
    assert catalogue.resident("tenant", "site").to_bytes() == bits
    assert adapter.adapt(request(support, "bn")).record.kind == "delta"  # the statistics are smaller than the images


# ---- streams -------------------------------------------------------------------------------------------------------

GENTLE = {"steps": 1, "lr": 1e-3}


def test_a_stream_publishes_what_it_follows(adapter, served_model, domain_images):
    batches = [domain_images(45, 16, 1400 + 16 * n)[0] for n in range(3)]
    answers = [adapter.stream(request(images, "tent", options=GENTLE)) for images in batches]
    assert [answer.report.record.version for answer in answers] == [1, 2, 3]
    assert [answer.report.facts["batches"] for answer in answers] == [1, 2, 3]
    state = adapter.catalogue.resident("tenant", "site")
    logits = served_model.predict(served_model.preprocess(batches[-1]), state)
    np.testing.assert_allclose(answers[-1].logits_BK, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert answers[-1].logits_BK.dtype == np.float32


def test_a_collapsed_batch_of_a_stream_publishes_nothing(adapter, support):
    adapter.stream(request(support, "tent", options=GENTLE))
    answer = adapter.stream(request(support, **MAD))
    assert answer.report.collapsed and answer.report.record is None and not answer.report.facts["moved"]
    assert adapter.catalogue.get("tenant", "site").version == 1 and np.isfinite(answer.logits_BK).all()


def test_a_stream_goes_on_from_the_catalogue(adapter, served_model, support):
    for _ in range(2):
        adapter.stream(request(support, "tent", options=GENTLE))
    adapter.catalogue.rollback("tenant", "site")
    rolled = adapter.stream(request(support, "tent", options=GENTLE))
    assert rolled.report.facts["batches"] == 1 and rolled.report.record.version == 3
    adapter.catalogue.delete("tenant", "site")
    anew = adapter.stream(request(support, "tent", options=GENTLE))
    assert anew.report.facts["batches"] == 1 and anew.report.kept
    other = Adapter(served_model, adapter.catalogue)
    taken_up = other.stream(request(support, "tent", options=GENTLE))
    assert taken_up.report.loss_before < anew.report.loss_before  # it begins where the first process was


def test_a_repeated_batch_of_a_stream_counts_once(adapter, support):
    asked = request(support, "tent", options=GENTLE, idempotency_key="k")
    first, second = adapter.stream(asked), adapter.stream(asked)
    assert first.report == second.report and np.array_equal(first.logits_BK, second.logits_BK)
    assert adapter.catalogue.get("tenant", "site").version == 1
    restarted = Adapter(adapter.model, adapter.catalogue)
    assert restarted.stream(asked).report == first.report
    with pytest.raises(Refused, match="another request"):
        restarted.stream(request(support[:-1], "tent", options=GENTLE, idempotency_key="k"))
    with pytest.raises(SpecError, match="dry run"):
        adapter.stream(request(support, dry_run=True))


def test_a_batch_whose_process_died_after_publishing_is_not_followed_twice(adapter, support, monkeypatch):
    from serve.once import Claim

    def die(self, report):
        raise KeyboardInterrupt

    asked = request(support, "tent", options=GENTLE, idempotency_key="k")
    adapter.stream(request(support, "tent", options=GENTLE))
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            adapter.stream(asked)
    record = adapter.catalogue.get("tenant", "site")
    answer = Adapter(adapter.model, adapter.catalogue).stream(asked)
    assert record.version == 2 and answer.report.record == record
    logits = adapter.model.predict(adapter.model.preprocess(support), adapter.catalogue.resident("tenant", "site"))
    np.testing.assert_allclose(answer.logits_BK, logits.numpy(), rtol=1e-4, atol=1e-5)
