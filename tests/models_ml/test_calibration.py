import numpy as np
import pytest

from models_ml import calibration, metrics


def drawn(slope: float, intercept: float, members: int = 3, rows: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a network whose true probabilities have this slope and intercept."""
    rng = np.random.default_rng(0)
    logits_KR = rng.normal(0, 1.5, rows) + rng.normal(0, 0.2, (members, rows))
    truth_R = (1 / (1 + np.exp(-(slope * logits_KR + intercept)))).mean(0)
    return logits_KR, (rng.random(rows) < truth_R).astype(np.float32)


def test_slope_and_intercept_are_found_again_and_calibrate():
    logits_KR, labels_R = drawn(0.7, -0.4)
    slope, intercept = calibration.fit(logits_KR, labels_R)
    assert (slope, intercept) == (pytest.approx(0.7, abs=0.05), pytest.approx(-0.4, abs=0.05))
    before, after = ((1 / (1 + np.exp(-(a * logits_KR + b)))).mean(0) for a, b in ((1.0, 0.0), (slope, intercept)))
    assert metrics.expected_calibration_error(labels_R, after) < 0.01 < metrics.expected_calibration_error(labels_R, before)


def test_a_head_that_is_right_is_left_alone():
    slope, intercept = calibration.fit(*drawn(1.0, 0.0))
    assert (slope, intercept) == (pytest.approx(1, abs=0.05), pytest.approx(0, abs=0.05))


def test_a_few_positives_move_the_intercept_and_hardly_the_slope():
    logits_KR = np.full((1, 1000), -3.0) + np.random.default_rng(0).normal(0, 0.5, (1, 1000))
    labels_R = np.zeros(1000)
    labels_R[:5] = 1
    slope, intercept = calibration.fit(logits_KR, labels_R)
    assert slope == pytest.approx(1, abs=0.2)
    assert (1 / (1 + np.exp(-(slope * logits_KR[0] + intercept)))).sum() == pytest.approx(5, rel=0.05)


def test_without_both_classes_nothing_changes():
    assert calibration.fit(np.zeros((2, 5)), np.ones(5)) == (1.0, 0.0)
