"""How long an event takes from the phone to the log: the delays that a data set without arrival times declares.

Most events take a second; about 1 % minutes (the phone was in a lift), under 0.1 % hours (it was on a plane); 0.1 % come from
phones whose clock runs ahead, so they land before they happened. The shares and ranges are assumptions, not measurements.
"""

import numpy as np

from warehouse.time_algebra import HOUR_US, MINUTE_US, SECOND_US

SHARE_MINUTES_LATE = 0.01
SHARE_HOURS_LATE = 0.0005
SHARE_CLOCK_AHEAD = 0.001

PROMPT_US = (SECOND_US // 5, 3 * SECOND_US)
MINUTES_LATE_US = (2 * MINUTE_US, 40 * MINUTE_US)
HOURS_LATE_US = (1 * HOUR_US, 30 * HOUR_US)
CLOCK_AHEAD_US = (1 * SECOND_US, 4 * MINUTE_US)
"""Stays below `time_algebra.FURTHEST_AHEAD_US`, past which an event is a dead letter."""


def delivery_delays_us(rng: np.random.Generator, num_events: int) -> np.ndarray:
    """int64 [num_events], microseconds to add to `event_ts`; negative for a phone whose clock runs ahead."""
    kind = rng.random(num_events)
    prompt = _log_uniform(rng, PROMPT_US, num_events)
    minutes = _log_uniform(rng, MINUTES_LATE_US, num_events)
    hours = _log_uniform(rng, HOURS_LATE_US, num_events)
    ahead = -_log_uniform(rng, CLOCK_AHEAD_US, num_events)
    bounds = np.cumsum([SHARE_CLOCK_AHEAD, SHARE_HOURS_LATE, SHARE_MINUTES_LATE])
    return np.select([kind < bounds[0], kind < bounds[1], kind < bounds[2]], [ahead, hours, minutes], prompt)


def _log_uniform(rng: np.random.Generator, bounds: tuple[int, int], size: int) -> np.ndarray:
    low, high = np.log(bounds)
    return np.exp(rng.uniform(low, high, size)).astype(np.int64).clip(*bounds)
