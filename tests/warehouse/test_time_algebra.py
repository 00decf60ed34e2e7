"""The clock arithmetic: numbers from the design, and the SQL twins."""

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warehouse.features.render import render_macro
from warehouse.time_algebra import (
    FIVE_MINUTES_US,
    GRACE_US,
    HOUR_US,
    arrival_tick,
    block_start,
    closed_tick,
    floor_5m,
    known_at,
    newest_tick,
    parse_window,
)

MIDNIGHT_US = 1_767_225_600_000_000


def at(hours: int, minutes: int, seconds: float = 0) -> int:
    return MIDNIGHT_US + hours * HOUR_US + minutes * 60_000_000 + round(seconds * 1_000_000)


def test_the_worked_example_of_the_design():
    assert newest_tick(at(16, 10, 5)) == at(16, 5)
    assert newest_tick(at(16, 10, 30)) == at(16, 10)
    assert newest_tick(at(16, 10, 29.999999)) == at(16, 5)


def test_an_event_on_the_edge_belongs_to_the_block_it_opens():
    assert floor_5m(at(10, 5)) == at(10, 5)
    assert floor_5m(at(10, 5) - 1) == at(10, 0)
    assert block_start(at(10, 59, 59), 60) == at(10, 0)


def test_grace_decides_between_two_ticks():
    assert known_at(at(10, 4), at(10, 5, 29.999999)) == at(10, 5)
    assert known_at(at(10, 4), at(10, 5, 30)) == at(10, 10)


def test_a_tick_is_closed_when_the_slowest_partition_has_passed_it_by_grace():
    assert closed_tick([at(10, 5, 30), at(11, 0)]) == at(10, 5)
    assert closed_tick([at(10, 5, 30) - 1, at(11, 0)]) == at(10, 0)
    assert closed_tick([]) is None


@pytest.mark.parametrize("text", ["", "0m", "7m", "5s", "31d", "-5m", "1w", "5.5h", None])
def test_a_window_off_the_grid_is_refused(text):
    with pytest.raises(ValueError, match="window must"):
        parse_window(text)


@given(
    event_ts=st.integers(0, 2_000_000_000_000_000).map(lambda t: t // 3 * 3),
    edge=st.sampled_from((0, 1, -1, GRACE_US, GRACE_US - 1)),
    delay=st.integers(-10, 100_000_000),
)
def test_sql_and_python_agree_on_every_edge(event_ts, edge, delay):
    event_us = event_ts // FIVE_MINUTES_US * FIVE_MINUTES_US + FIVE_MINUTES_US + edge
    landed_us = event_us + delay
    sql = f"""
        select epoch_us({render_macro("known_at", "e", "l")}), epoch_us({render_macro("arrival_tick", "l")}),
            epoch_us({render_macro("newest_tick", "e")}), epoch_us({render_macro("floor_minutes", "e", 60)})
        from (select make_timestamptz({event_us}) as e, make_timestamptz({landed_us}) as l)
    """
    with duckdb.connect() as connection:
        found = connection.execute(sql).fetchall()[0]
    assert found == (known_at(event_us, landed_us), arrival_tick(landed_us), newest_tick(event_us), block_start(event_us, 60))
