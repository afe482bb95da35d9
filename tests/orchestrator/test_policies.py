import pytest

from moe.errors import EnvironmentProblem, Interrupted
from orchestrator.policies import RetryPolicy, backoff_s, classify, enough
from orchestrator.spec import Retry


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("x"), "user"),
        (EnvironmentProblem("disk full"), "user"),
        (Interrupted("stop"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (OSError(12, "Cannot allocate memory"), "out_of_memory"),
        (RuntimeError("shape mismatch"), "user"),
        (type("OutOfMemoryError", (RuntimeError,), {})("boom"), "out_of_memory"),
    ],
)
def test_classification(error, cause):
    assert classify(error) == cause


@pytest.mark.parametrize(
    ("cause", "retries"), [("user", 0), ("out_of_memory", 1), ("infrastructure", 3), ("timeout", 0)]
)
def test_each_cause_has_its_own_budget(cause, retries):
    policy = RetryPolicy(Retry())
    policy.decide("preemption", "elsewhere")  # does not use up another budget
    assert [policy.decide(cause, "e").action for _ in range(retries + 1)] == ["retry"] * retries + ["fail"]


def test_preemptions_are_not_counted_against_anybody():
    policy = RetryPolicy(Retry())
    assert {policy.decide("preemption", "spot").action for _ in range(100)} == {"retry"}


def test_the_decision_is_one_line_of_a_fixed_form():
    policy = RetryPolicy(Retry(infrastructure=1))
    assert policy.decide("infrastructure", "it died\nat home").line == (
        "retry: cause=infrastructure count=1 limit=1 error=it died"
    )
    assert policy.decide("infrastructure", "again").line == "fail: cause=infrastructure count=2 limit=1 error=again"
    assert policy.decide("preemption", "x").line == "retry: cause=preemption count=1 limit=unlimited error=x"
    assert policy.decide("interrupted", "x").action == "stop"


@pytest.mark.parametrize(
    ("succeeded", "members", "fraction", "done"),
    [(4, 4, 1.0, True), (3, 4, 1.0, False), (3, 4, 0.75, True), (0, 4, 0.1, False), (1, 10, 0.1, True)],
)
def test_enough(succeeded, members, fraction, done):
    assert enough(succeeded, members, fraction) is done


def test_backoff_grows_to_a_limit():
    assert [backoff_s(attempt) for attempt in (1, 2, 3, 50)] == [0.5, 1.0, 2.0, 30.0]
