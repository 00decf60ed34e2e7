"""Attributes backfilled onto logged sequences: by hand on DuckDB, and the same rows by the same text on PostgreSQL."""

import duckdb
import numpy as np
import pytest

from tests.streaming_sql.postgres import postgres
from warehouse.features.render import render_macro

NAMES = ("logged", "impression_id", "clicks", "request_ts", "attributes", "note_id", "version_b")


def filled(execute, dialect="duckdb", valid_from="valid_from"):
    rows = execute(render_macro("sequence_attribute", *NAMES, valid_from=valid_from, dialect=dialect)).fetchall()
    assert len(rows) == len(dict(rows))
    return dict(rows)


@pytest.fixture
def connection():
    connection = duckdb.connect()
    connection.execute("set TimeZone = 'UTC'")
    connection.execute("create table logged (impression_id varchar, clicks varchar[], request_ts timestamptz)")
    connection.execute("create table attributes (note_id varchar, version_b bigint, valid_from timestamptz)")
    return connection


def test_each_place_gets_the_value_that_held_at_the_request(connection):
    connection.execute("""
        insert into logged values
            ('i1', ['n1', 'n2', 'n1'], '2026-01-02'), ('i2', ['n1'], '2026-01-01'), ('i3', [], '2026-01-02'),
            ('i4', null, '2026-01-02'), ('i5', ['n2', 'gone', 'n1'], '2026-01-05')
    """)
    connection.execute("""
        insert into attributes values
            ('n1', 10, '2026-01-01'), ('n1', 11, '2026-01-03'), ('n1', 12, '2026-01-06'), ('n2', 20, '2026-01-04')
    """)
    assert filled(connection.execute) == {
        "i1": [10, None, 10],
        "i2": [10],
        "i3": [],
        "i4": [],
        "i5": [20, None, 11],
    }


def test_a_value_for_all_times_needs_no_instant(connection):
    connection.execute("insert into logged values ('i1', ['n2', 'n1', 'n3'], '2026-01-02')")
    connection.execute("insert into attributes values ('n1', 1, null), ('n2', 2, null)")
    assert filled(connection.execute, valid_from=None) == {"i1": [2, 1, None]}


def test_postgres_fills_in_the_same(connection):
    rng = np.random.default_rng(3)
    notes = [f"n{i}" for i in range(30)]
    day = [f"2026-01-{number:02}T00:00:00+00:00" for number in range(1, 29)]
    logged = [
        (f"i{i}", [notes[k] for k in rng.integers(0, 30, rng.integers(0, 50))], day[rng.integers(28)]) for i in range(200)
    ]
    values = [(notes[i % 25], i, day[(i * 7) % 28]) for i in range(150)]
    connection.executemany("insert into logged values (?, ?, ?)", logged)
    connection.executemany("insert into attributes values (?, ?, ?)", values)
    expected = filled(connection.execute)
    assert all(len(expected[name]) == len(clicks) for name, clicks, _ in logged)
    assert {None} < {value for listed in expected.values() for value in listed}
    with postgres("dev") as other:
        other.execute("create table logged (impression_id varchar, clicks varchar[], request_ts timestamptz)")
        other.execute("create table attributes (note_id varchar, version_b bigint, valid_from timestamptz)")
        with other.cursor() as cursor:
            cursor.executemany("insert into logged values (%s, %s, %s)", logged)
            cursor.executemany("insert into attributes values (%s, %s, %s)", values)
        assert filled(other.execute, dialect="risingwave") == expected
