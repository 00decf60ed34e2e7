import math

import numpy as np
import pytest

from models_ml import bootstrap, metrics


def rows(num_rows=700, num_users=40, digits=1):
    rng = np.random.default_rng(0)
    probability = np.round(rng.random(num_rows), digits).clip(0.01, 0.99)
    return (rng.random(num_rows) < probability).astype(float), probability, rng.integers(0, num_users, num_rows)


@pytest.mark.parametrize("digits", [1, 8])
def test_a_draw_is_what_the_metrics_say_of_the_rows_drawn(digits):
    labels, probability, users = rows(digits=digits)
    intervals = bootstrap.of_head(labels, probability, users, 0.4, 5, num_samples=1, seed=3)
    times = np.bincount(np.random.default_rng(3).integers(0, 40, 40), minlength=40)[users]
    again = np.repeat(np.arange(len(users)), times)
    copy = np.concatenate([np.arange(time) for time in times])
    # a reader who is drawn twice is two readers
    drawn = labels[again], probability[again], users[again] * 100 + copy
    expected = {
        "auc": metrics.auc(*drawn[:2]),
        "grouped_auc": metrics.grouped_auc(*drawn),
        "pr_auc": metrics.average_precision(*drawn[:2]),
        "nce": metrics.normalised_cross_entropy(*drawn[:2], 0.4),
        "log_loss": metrics.log_loss(*drawn[:2]),
        "ndcg@5": metrics.ndcg(*drawn, 5),
        **metrics.ranked_lists(*drawn, 5),
        "ece": metrics.expected_calibration_error(*drawn[:2]),
        "relative_calibration": metrics.relative_calibration(*drawn[:2]),
    }
    assert intervals.keys() == expected.keys()
    for name, value in expected.items():
        assert intervals[name].low == intervals[name].high == pytest.approx(value, abs=1e-12), name


def test_values_lie_in_their_intervals_and_the_same_seed_gives_the_same():
    labels, probability, users = rows(digits=8)
    found = bootstrap.of_head(labels, probability, users, 0.4, 5)
    assert found == bootstrap.of_head(labels, probability, users, 0.4, 5)
    assert found["auc"].low < metrics.auc(labels, probability) < found["auc"].high
    assert found["nce"].low < metrics.normalised_cross_entropy(labels, probability, 0.4) < found["nce"].high
    assert found["auc"] != bootstrap.of_head(labels, probability, users, 0.4, 5, seed=1)["auc"]


def test_the_interval_is_wider_when_rows_of_a_reader_move_together():
    rng = np.random.default_rng(2)
    labels = np.repeat(rng.integers(0, 2, 60), 20)
    scores = (labels * 0.5 + np.repeat(rng.random(60), 20)) / 2
    together, apart = (
        bootstrap.of_head(labels, scores, users, 0.5, 5)["auc"] for users in (np.repeat(np.arange(60), 20), np.arange(1200))
    )
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_the_paired_interval_sees_a_small_but_steady_gain():
    rng = np.random.default_rng(3)
    labels, noise = rng.integers(0, 2, 4000), rng.normal(size=4000)
    floor, better = labels + 2 * noise, labels * 1.05 + 2 * noise
    assert bootstrap.of_auc_gain(labels, better, floor, np.arange(4000)).low > 0
    assert bootstrap.of_auc_gain(labels, floor, floor, np.arange(4000)) == bootstrap.Interval(0.0, 0.0)


def test_what_no_draw_defines_has_no_interval():
    found = bootstrap.of_head(np.zeros(5), np.linspace(0.1, 0.9, 5), np.arange(5), 0.2, 3)
    assert found["log_loss"].low < found["log_loss"].high
    for name in ("auc", "grouped_auc", "pr_auc", "ndcg@3", "mrr", "relative_calibration"):
        assert math.isnan(found[name].low), name


def test_means_and_bins_are_of_redrawn_readers():
    users = np.repeat(np.arange(30), 4)
    found = bootstrap.of_means({"same": np.ones(120), "split": users % 2}, users)
    assert found["same"] == bootstrap.Interval(1.0, 1.0)
    # 30 readers, half of them 1: a standard error of .09
    assert found["split"].low == pytest.approx(0.5 - 1.96 * 0.0913, abs=0.04)
    labels, probability, users = rows(digits=8)
    bins = bootstrap.of_bins(labels, probability, users)
    observed = metrics.reliability(labels, probability)[:, 1]
    assert bins.shape == (15, 2)
    assert ((bins[:-1, 0] < observed[:-1]) & (observed[:-1] < bins[:-1, 1])).all()
    assert (observed[-1], *bins[-1]) == (1.0, 1.0, 1.0)  # every row of the last bin is positive
