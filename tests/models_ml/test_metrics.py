import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from models_ml import metrics


def test_auc_counts_a_tied_pair_as_half():
    # positives 0.9 and 0.5, negatives 0.5 and 0.1: pairs won 1, 1, half, 1 of 4
    assert metrics.auc(np.array([1, 1, 0, 0]), np.array([0.9, 0.5, 0.5, 0.1])) == pytest.approx(3.5 / 4)


def test_auc_with_weights_equals_auc_of_repeated_rows():
    labels, scores, weights = np.array([1, 0, 1, 0]), np.array([0.8, 0.7, 0.7, 0.2]), np.array([2, 1, 0, 3])
    repeated = metrics.auc(np.repeat(labels, weights), np.repeat(scores, weights))
    assert metrics.auc(labels, scores, weights) == pytest.approx(repeated)


def test_auc_without_both_classes_is_not_a_number():
    assert math.isnan(metrics.auc(np.ones(3), np.arange(3.0)))


def test_auc_and_log_loss_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 500), np.round(rng.random(500), 2)
    assert metrics.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert metrics.log_loss(labels, scores.clip(0.01, 0.99)) == pytest.approx(log_loss(labels, scores.clip(0.01, 0.99)))


def test_nce_is_one_minus_the_ratio_of_cross_entropies():
    # model: -ln(0.8) on both rows; baseline 0.5: ln(2)
    labels, probabilities = np.array([1, 0]), np.array([0.8, 0.2])
    assert metrics.normalised_cross_entropy(labels, probabilities, 0.5) == pytest.approx(1 - math.log(1 / 0.8) / math.log(2))
    assert metrics.normalised_cross_entropy(labels, np.array([0.5, 0.5]), 0.5) == 0.0


def test_one_sure_mistake_costs_a_finite_log_loss():
    assert metrics.log_loss(np.array([1]), np.array([0.0])) == pytest.approx(-math.log(1e-7))


def test_ndcg_of_two_readers_by_hand():
    # reader a: the positive row is second: 1/log2(3); reader b: both positives first: 1; reader c has no positive: left out
    labels = np.array([0, 1, 1, 1, 0, 0])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.1, 0.5])
    readers = np.array(["a", "a", "b", "b", "b", "c"])
    assert metrics.ndcg(labels, scores, readers, k=10) == pytest.approx((1 / math.log2(3) + 1) / 2)


def test_ndcg_at_k_forgets_what_is_below_k():
    labels, scores, readers = np.array([0, 1]), np.array([0.9, 0.1]), np.array([1, 1])
    assert metrics.ndcg(labels, scores, readers, k=1) == 0.0


def test_tied_rows_share_the_mean_discount_of_their_places():
    labels, readers = np.array([1, 0]), np.array([1, 1])
    expected = (1 + 1 / math.log2(3)) / 2
    assert metrics.ndcg(labels, np.array([0.5, 0.5]), readers, k=2) == pytest.approx(expected)
    assert metrics.ndcg(labels[::-1], np.array([0.5, 0.5]), readers, k=2) == pytest.approx(expected)


def test_calibration_error_of_a_constant_answer():
    labels = np.array([1, 0, 1, 0] * 10)
    assert metrics.expected_calibration_error(labels, np.full(40, 0.7), num_bins=1) == pytest.approx(0.2)


def test_metrics_refuse_rows_that_do_not_match():
    with pytest.raises(ValueError, match="same number of rows, got 2 and 3"):
        metrics.auc(np.array([0, 1]), np.array([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="k must be at least 1"):
        metrics.ndcg(np.array([1]), np.array([0.1]), np.array([1]), k=0)


def test_grouped_auc_weighs_readers_by_their_rows_and_leaves_out_the_one_sided():
    labels, scores = np.array([1, 0, 1, 0, 0, 1]), np.array([0.9, 0.1, 0.5, 0.5, 0.1, 0.3])
    # a: 2 rows, AUC 1; b: 3 rows, one pair tied and one won, AUC 3/4; c has no negative row
    found = metrics.grouped_auc(labels, scores, np.array(["a", "a", "b", "b", "b", "c"]))
    assert found == pytest.approx((2 * 1 + 3 * 0.75) / 5)


def test_grouped_auc_is_the_weighted_mean_of_aucs():
    rng = np.random.default_rng(0)
    labels, scores, groups = rng.integers(0, 2, 300), np.round(rng.random(300), 1), rng.integers(0, 40, 300)
    parts = [(metrics.auc(labels[groups == group], scores[groups == group]), (groups == group).sum()) for group in range(40)]
    values, weights = zip(*((value, weight) for value, weight in parts if not math.isnan(value)), strict=True)
    assert metrics.grouped_auc(labels, scores, groups) == pytest.approx(np.average(values, weights=weights))


def test_average_precision_agrees_with_scikit_learn_also_with_ties():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 300), np.round(rng.random(300), 1)
    assert metrics.average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores))


def test_lists_by_hand_a_negative_stands_before_a_positive_of_the_same_score():
    # a in order: 0 1 1 (the tie puts the negative first); b: 1 0; c has no positive row
    labels = np.array([1, 0, 1, 1, 0, 0])
    scores = np.array([0.9, 0.9, 0.5, 0.8, 0.1, 0.7])
    found = metrics.ranked_lists(labels, scores, np.array(["a", "a", "a", "b", "b", "c"]), k=2)
    assert found == {"mrr": (1 / 2 + 1) / 2, "map@2": (1 / 2 / 2 + 1) / 2, "recall@2": (1 / 2 + 1) / 2}


def test_coverage_is_the_share_of_items_that_reach_a_first_k():
    scores, groups, items = np.array([0.9, 0.5, 0.9, 0.5]), np.array([1, 1, 2, 2]), np.array(["x", "y", "x", "z"])
    assert metrics.coverage(scores, groups, items, 1) == pytest.approx(1 / 3)
    assert metrics.coverage(scores, groups, items, 2) == 1.0


def test_relative_calibration_is_promised_over_observed():
    assert metrics.relative_calibration(np.array([1, 0, 0]), np.array([0.5, 0.75, 0.75])) == pytest.approx(2.0)
    assert math.isnan(metrics.relative_calibration(np.zeros(2), np.array([0.1, 0.1])))


def test_reliability_gives_mean_prediction_observed_rate_and_rows_of_each_bin():
    found = metrics.reliability(np.array([0, 1, 1, 1]), np.array([0.1, 0.3, 0.8, 0.6]), num_bins=2)
    assert found == pytest.approx(np.array([[0.2, 0.5, 2], [0.7, 1.0, 2]]))
