"""The duplicate memory: the first arrival that is known wins, in whatever order two partitions deliver."""

from hypothesis import given
from hypothesis import strategies as st

from streaming_sql.arrivals import Arrivals, reasons
from tests.streaming_sql.generated import as_table
from warehouse.features.oracle import first_arrivals
from warehouse.time_algebra import DUPLICATE_MEMORY_US, FURTHEST_AHEAD_US, MINUTE_US

START_US = 1_651_766_400_000_000


def record(event_id, landed_at, partition, offset, **fields):
    common = {"event_type": "click", "event_ts": landed_at, "landing": "log"}
    place = {"landed_at": landed_at, "log_partition": partition, "log_offset": offset}
    return {**common, **place, "event_id": event_id, **fields}


@st.composite
def deliveries(draw):
    """Many arrivals of few ids, and the order in which pieces of two partitions are read."""
    now_us, records = START_US, []
    for _ in range(draw(st.integers(1, 25))):
        now_us += draw(
            st.sampled_from([0, 0, 1, MINUTE_US, DUPLICATE_MEMORY_US // 2, DUPLICATE_MEMORY_US, DUPLICATE_MEMORY_US + 1])
        )
        partition = draw(st.integers(0, 1))
        offset = sum(one["log_partition"] == partition for one in records)
        records.append(record(draw(st.sampled_from("abc")), now_us, partition, offset))
    waiting = [[one for one in records if one["log_partition"] == partition] for partition in (0, 1)]
    pieces = []
    while any(waiting):
        partition = draw(st.integers(0, 1)) if all(waiting) else int(not waiting[0])
        count = draw(st.integers(1, 5))
        pieces.append(waiting[partition][:count])
        waiting[partition] = waiting[partition][count:]
    return pieces


@given(deliveries())
def test_at_every_point_the_admitted_are_the_first_of_what_is_known(pieces):
    arrivals, counted, known = Arrivals(), set(), []
    for piece in pieces:
        admission = arrivals.admit(as_table(piece))
        known += piece
        counted |= {(row["log_partition"], row["log_offset"]) for row in admission.events.to_pylist()}
        counted -= {loser for loser, _ in admission.superseded}
        in_order = sorted(known, key=lambda one: (one["landed_at"], one["log_partition"], one["log_offset"]))
        assert counted == {(one["log_partition"], one["log_offset"]) for one in first_arrivals(in_order)}
        assert admission.num_duplicates == len(piece) - admission.events.num_rows


def test_an_arrival_read_late_takes_the_place_of_the_next_though_it_is_a_duplicate_itself():
    """The other partition was read more than H ahead: there the id seemed new again."""
    half_us = DUPLICATE_MEMORY_US // 2 + 1
    arrivals = Arrivals()
    ahead = [record("a", START_US, 0, 0), record("a", START_US + 2 * half_us, 0, 1)]
    assert arrivals.admit(as_table(ahead)).events.num_rows == 2
    late = arrivals.admit(as_table([record("a", START_US + half_us, 1, 0)]))
    assert late.events.num_rows == 0
    assert late.superseded == [((0, 1), (1, 0))]


def test_an_id_is_new_again_once_it_has_not_been_seen_for_the_duplicate_memory():
    arrivals = Arrivals()

    def is_new(landed_at, offset):
        return arrivals.admit(as_table([record("a", landed_at, 0, offset)])).events.num_rows == 1

    assert is_new(START_US, 0)
    assert not is_new(START_US + DUPLICATE_MEMORY_US, 1)  # remembered, and from now on for as long again
    assert not is_new(START_US + 2 * DUPLICATE_MEMORY_US, 2)
    assert is_new(START_US + 3 * DUPLICATE_MEMORY_US + 1, 3)
    arrivals.forget_before(START_US + 4 * DUPLICATE_MEMORY_US + 1)
    assert len(arrivals) == 1
    arrivals.forget_before(START_US + 4 * DUPLICATE_MEMORY_US + 2)
    assert len(arrivals) == 0


def test_dead_letters_and_heartbeats_are_no_arrivals():
    rows = [
        record("late", START_US, 0, 0, event_ts=START_US - DUPLICATE_MEMORY_US - 1),
        record("just", START_US, 0, 1, event_ts=START_US - DUPLICATE_MEMORY_US),
        record("ahead", START_US, 0, 2, event_ts=START_US + FURTHEST_AHEAD_US + 1),
        record("near", START_US, 0, 3, event_ts=START_US + FURTHEST_AHEAD_US),
        record("beat", START_US, 0, 4, event_type="heartbeat"),
        record("late", START_US, 0, 5),
    ]
    said = reasons(as_table(rows)).to_pylist()
    assert ["older" in said[0], "ahead" in said[2]] == [True, True]
    assert [said[place] for place in (1, 3, 4, 5)] == [None] * 4
    admission = Arrivals().admit(as_table(rows))
    assert admission.events["event_id"].to_pylist() == ["just", "near", "late"]
    assert (admission.num_dead, admission.num_duplicates) == (2, 0)
