"""GLUE's metrics, the choice of a learning rate, early stopping, sets out of domain."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import SpecError
from workers.glue import (
    OUT_OF_DOMAIN,
    TASKS,
    EarlyStopping,
    friedman_ranks,
    glue_metrics,
    map_labels,
    select_lr,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_classification_metrics_are_sklearns(pairs):
    found, true = np.array(pairs).T
    scores = glue_metrics("mrpc", found, true)
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, found))
    assert scores["f1"] == pytest.approx(sklearn.metrics.f1_score(true, found, zero_division=0))
    assert scores["average"] == pytest.approx((scores["accuracy"] + scores["f1"]) / 2)
    assert glue_metrics("cola", found, true)["average"] == pytest.approx(sklearn.metrics.matthews_corrcoef(true, found))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=30))
def test_correlations_are_scipys(pairs):
    found, true = np.array(pairs, float).T
    scores = glue_metrics("stsb", found, true)
    if found.std() == 0 or true.std() == 0:
        assert scores["average"] == 0
        return
    assert scores["pearson"] == pytest.approx(scipy.stats.pearsonr(found, true)[0], abs=1e-9)
    assert scores["spearmanr"] == pytest.approx(scipy.stats.spearmanr(found, true)[0], abs=1e-9)


def test_every_task_scores_a_perfect_answer():
    for name in TASKS:
        assert glue_metrics(name, np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1]))["average"] == pytest.approx(1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: glue_metrics("rtee", [1], [1]), "Did you mean 'rte'"),
        (lambda: glue_metrics("rte", [1, 0], [1]), "2 predictions do not fit 1 references"),
        (lambda: glue_metrics("rte", [], []), "0 predictions"),
        (lambda: glue_metrics("stsb", [np.nan], [1]), "not finite"),
        (lambda: glue_metrics("mrpc", [2, 1], [1, 1]), "not 2"),
        (lambda: glue_metrics("rte", [1], [1], metrics=("auc",)), "no metric 'auc'"),
        (lambda: select_lr(np.zeros((2, 3)), [1e-5]), "do not fit 1 learning rates"),
        (lambda: friedman_ranks({"a": [1.0], "b": [1.0, 2.0]}), "same sets"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(SpecError, match=message):
        call()


def test_the_best_mean_wins_and_the_first_of_equals():
    best = select_lr(np.array([[0.5, 0.7], [0.6, 0.6], [0.8, 0.2]]), [1e-5, 2e-5, 3e-5])
    assert best.value == 1e-5 and best.mean == pytest.approx(60) and best.std == pytest.approx(10)


def test_a_run_that_never_exceeds_zero_has_a_best_epoch():
    stop = EarlyStopping(patience=2)
    assert [stop.update(value) for value in (-0.2, -0.1, -0.1, -0.3)] == [False, False, False, True]
    assert (stop.best, stop.best_epoch) == (-0.1, 1)


def test_labels_of_other_sets():
    sets = {(test.trained_on, test.name): test for test in OUT_OF_DOMAIN}
    assert len(sets) == len(OUT_OF_DOMAIN) and {test.trained_on for test in OUT_OF_DOMAIN} <= TASKS.keys()
    labels, rows = map_labels(sets["mnli", "snli"], [0, -1, 2, 1])
    assert labels.tolist() == [0, 2, 1] and rows.tolist() == [0, 2, 3]
    labels, _ = map_labels(sets["qnli", "qnli_ood"], ["not_entailment", "entailment"])
    assert labels.tolist() == [1, 0]
    with pytest.raises(SpecError, match="has the label 'maybe'"):
        map_labels(sets["rte", "scitail"], ["neutral", "maybe"])


def test_ranks():
    assert friedman_ranks({"a": [0.9, 0.5], "b": [0.8, 0.5], "c": [0.1, 0.1]}) == {"a": 1.25, "b": 1.75, "c": 3.0}
