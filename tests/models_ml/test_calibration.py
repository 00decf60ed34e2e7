import numpy as np
import pytest

from models_ml import calibration, l2, metrics
from models_ml.l2_network import L2Config


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


def test_a_rehearsal_reads_nothing_of_the_test_days_and_rescaling_changes_what_the_files_say(loaded, other_future, tmp_path):
    config = L2Config(epochs=1, width=8, hidden=16)
    lines = [
        calibration.rehearsed(some, lambda earlier: l2.train(earlier, config, 0, lambda done, total: None))
        for some in (loaded, other_future)
    ]
    assert lines[0] == lines[1]
    assert lines[0].keys() == {"click", "long_view"}
    model = l2.train(loaded, config, 0, lambda done, total: None)
    rows = loaded.test_rows[:50]
    before_KRT = model.logits_rows(loaded, rows).numpy()
    model.rescale({"long_view": (0.5, 0.25)})
    for name, content in model.to_files().items():
        (tmp_path / name).write_bytes(content)
    read_again = l2.load(tmp_path)
    after_KRT = read_again.logits_rows(loaded, rows).numpy()
    asked = np.zeros(len(model.user_features)), [], ["n0", "n1"], np.zeros((2, len(model.note_features)))
    for head, scores_N in read_again.score(*asked).items():
        np.testing.assert_array_equal(model.score(*asked)[head], scores_N)
    np.testing.assert_allclose(after_KRT[..., 0], before_KRT[..., 0], atol=1e-5)
    np.testing.assert_allclose(after_KRT[..., 1], 0.5 * before_KRT[..., 1] + 0.25, atol=1e-5)


def test_without_both_classes_nothing_changes():
    assert calibration.fit(np.zeros((2, 5)), np.ones(5)) == (1.0, 0.0)
