import numpy as np
import pytest

from warehouse.datasets.delivery import delivery_delays_us
from warehouse.time_algebra import FURTHEST_AHEAD_US, HOUR_US, MINUTE_US, SECOND_US


@pytest.fixture(scope="module")
def delays_us():
    return delivery_delays_us(np.random.default_rng(1), 1_000_000)


def share(condition) -> float:
    return float(np.mean(condition))


def test_most_events_arrive_within_three_seconds(delays_us):
    assert share((delays_us >= SECOND_US // 5) & (delays_us <= 3 * SECOND_US)) == pytest.approx(0.9885, abs=0.001)


def test_about_one_event_in_a_hundred_is_minutes_late(delays_us):
    assert share((delays_us >= 2 * MINUTE_US) & (delays_us <= 40 * MINUTE_US)) == pytest.approx(0.01, abs=0.0005)


def test_a_very_few_events_are_hours_late_and_none_more_than_thirty(delays_us):
    assert 0 < share(delays_us >= HOUR_US) < 0.001
    assert delays_us.max() <= 30 * HOUR_US


def test_one_phone_in_a_thousand_runs_ahead_but_never_far_enough_for_a_dead_letter(delays_us):
    assert share(delays_us < 0) == pytest.approx(0.001, abs=0.0002)
    assert -delays_us.min() < FURTHEST_AHEAD_US


def test_the_same_seed_gives_the_same_delays():
    first, second = (delivery_delays_us(np.random.default_rng(5), 1000) for _ in range(2))
    assert np.array_equal(first, second)
