"""Ticks, arrival and windows: integer arithmetic on microseconds since 1970-01-01 UTC, and nothing else.

Knows nothing of tables, engines or features. The SQL twin of each function is in `warehouse/macros/time_algebra.sql`;
`tests/warehouse/test_time_algebra.py` holds the two together.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
FIVE_MINUTES_US = 5 * MINUTE_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US

GRACE_US = 30 * SECOND_US
"""How long after a tick an event may still arrive and count in it. One value per log, at most five minutes."""
DUPLICATE_MEMORY_US = 7 * DAY_US
"""H: an event_id is remembered this long after its last arrival; an event older than this on arrival is a dead letter."""
FURTHEST_AHEAD_US = 10 * MINUTE_US
"""F: an event stamped further ahead of the log's clock than this is a dead letter."""

_WINDOW = re.compile(r"^([1-9][0-9]*)([mhd])$")
_UNIT_US = {"m": MINUTE_US, "h": HOUR_US, "d": DAY_US}
LONGEST_WINDOW_US = 30 * DAY_US
LIFETIME_US = 54_750 * DAY_US
"""150 years: longer than any log, and still an interval that every engine can subtract."""
LONGEST_SESSION_US = DAY_US
"""A session reaches back no further than this."""


@dataclass(frozen=True)
class Window:
    """A look-back length: `name` as declared (`6h`, `lifetime`), `length_us` in microseconds.

    Of a session window (`session_30m`), session_gap_us ends it and length_us is the longest that it can be.
    """

    name: str
    length_us: int
    session_gap_us: int | None = None


def parse_window(text: str) -> Window:
    """`"5m"`, `"6h"`, `"30d"`, `"lifetime"` → Window. Raises ValueError unless a multiple of 5 minutes between 5m and 30d."""
    if text == "lifetime":
        return Window("lifetime", LIFETIME_US)
    return Window(str(text), _length_us(text, LONGEST_WINDOW_US, "30d", "window"))


def session_window(gap: str) -> Window:
    """The window `session_<gap>`. Raises ValueError unless the gap is a multiple of 5 minutes below a day."""
    gap_us = _length_us(gap, LONGEST_SESSION_US - FIVE_MINUTES_US, "23h", "gap")
    return Window(f"session_{gap}", LONGEST_SESSION_US, gap_us)


def session_start(block_starts_us: Iterable[int], upper_us: int, gap_us: int) -> int | None:
    """Where the session that is on at `upper_us` began; None where none is.

    Sessions are cut on the grid of 5-minute blocks: going back from floor_5m(upper), a session is over where at least `gap_us`
    of whole blocks hold no event of the measure's set. block_starts_us: the blocks that hold one.
    """
    start_us, edge_us = None, floor_5m(upper_us)
    for block_us in sorted(block_starts_us, reverse=True):
        if edge_us - (block_us + FIVE_MINUTES_US) >= gap_us:
            break
        start_us = edge_us = block_us
    return start_us


def _length_us(text: str, longest_us: int, longest: str, what: str) -> int:
    match = _WINDOW.match(str(text))
    if match is None:
        raise ValueError(f"{what} must look like 5m, 6h or 7d, got {text!r}")
    length_us = int(match[1]) * _UNIT_US[match[2]]
    if length_us % FIVE_MINUTES_US or length_us > longest_us:
        raise ValueError(f"{what} must be a multiple of 5m and at most {longest}, got {text!r}")
    return length_us


def floor_5m(t_us: int) -> int:
    """The 5-minute boundary at or before t."""
    return t_us // FIVE_MINUTES_US * FIVE_MINUTES_US


def block_start(t_us: int, minutes: int) -> int:
    """Start of the aligned block of `minutes` (5, 60 or 1440) that holds t. Intervals are half-open: an event on an edge
    belongs to the block that it opens."""
    return t_us // (minutes * MINUTE_US) * (minutes * MINUTE_US)


def arrival_tick(landed_at_us: int, grace_us: int = GRACE_US) -> int:
    """The first tick that can know an event which landed then."""
    return floor_5m(landed_at_us - grace_us) + FIVE_MINUTES_US


def known_at(event_ts_us: int, landed_at_us: int, grace_us: int = GRACE_US) -> int:
    """The first tick whose block-fresh values hold the event: its block has ended and it has arrived."""
    return max(floor_5m(event_ts_us) + FIVE_MINUTES_US, arrival_tick(landed_at_us, grace_us))


def newest_tick(t_us: int, grace_us: int = GRACE_US) -> int:
    """The newest tick that a request at t may read: floor_5m(t − grace). It must also be closed."""
    return floor_5m(t_us - grace_us)


def closed_tick(read_through_us: Sequence[int], grace_us: int = GRACE_US) -> int | None:
    """The last closed tick, given the largest landed_at read from each partition; None while a partition is silent.

    A tick T is closed when every partition has been read past landed_at >= T + grace.
    """
    if not read_through_us:
        return None
    return floor_5m(min(read_through_us) - grace_us)
