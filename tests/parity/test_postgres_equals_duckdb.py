"""The block rows of every aggregation, as RisingWave's models render them, on a real PostgreSQL beside DuckDB.

Engines without structs in lists store events and entries as JSON, in the order of the cut, and maps and last_distinct_n not yet
combined: here they are, as a reader does it.
"""

import re
from random import Random

import duckdb
import pytest
import sqlglot

from tests.parity.generated_events import event_log
from tests.parity.test_batch_equals_oracle import GROUPS
from tests.streaming_sql.postgres import postgres
from tests.streaming_sql.risingwave_functions import FUNCTIONS, KEYWORDS
from warehouse.features import render
from warehouse.features.declarations import load_groups
from warehouse.features.generated import as_table
from warehouse.features.measures import Measure

NAMES = [name for name in GROUPS if name not in load_groups() and not name.startswith("everything")]  # those divide integers


def combined(measure: Measure, column: str, value: list | None) -> list:
    """A list as DuckDB stores it."""
    if measure.representation == "events":
        entries = sorted((entry["event_ts"], entry["event_id"].encode(), entry["value"]) for entry in value or [])
        of = str if measure.type == "varchar" else float  # of a double, 0 and 0.0 are the same text
        found = [(event_id, of(value)) for _, event_id, value in entries]
        if measure.aggregation == "last_distinct_n":
            last = {text: place for place, (_, text) in enumerate(found)}
            found = [found[place] for place in sorted(last.values())[-(measure.n or 0) :]]
        return found
    totals: dict = {}
    for entry in value or []:
        key, number = entry["entry"], entry["value"]
        if key not in totals:
            totals[key] = number
        elif measure.aggregation in ("min", "max"):
            totals[key] = (min if measure.aggregation == "min" else max)(totals[key], number)
        elif measure.aggregation == "approx_count_distinct":
            totals[key] = max(totals[key], number)
        else:
            totals[key] += number
    return sorted(totals.items())


def rows_of(cursor, group) -> dict:
    names = [column[0] for column in cursor.description]
    rows = {}
    for row in (dict(zip(names, values, strict=True)) for values in cursor.fetchall()):
        for measure in group.measures:
            for column in measure.columns:
                if measure.representation in ("events", "map"):
                    row[column] = combined(measure, column, row[column])
        place = tuple(row.pop(name) for name in (*group.keys, "block_start", "known_at", "is_rebuilt"))
        assert place not in rows
        rows[place] = row
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_the_sql_parses_as_risingwave_and_uses_only_what_it_documents(name):
    sql = render.block_sql(GROUPS[name], "staged", "retracted", dialect="risingwave")
    assert isinstance(sqlglot.parse_one(sql, dialect="risingwave"), sqlglot.exp.Select)
    without_text = re.sub(r"'[^']*'", "''", sql.lower())
    assert set(re.findall(r"([a-z_0-9]+)\s*\(", without_text)) - KEYWORDS <= FUNCTIONS


def stage_on_both(batch, stream, events):
    """Makes `staged` and `retracted` of the events on a DuckDB, and the same tables on a PostgreSQL."""
    batch.execute("set TimeZone = 'UTC'")
    batch.register("events", events)
    batch.execute(f"create table staged as {render.staging_sql('events')}")
    batch.execute(f"create table retractions as {render.retractions_sql('events')}")
    batch.execute(f"create table retracted as {render.retracted_sql('staged', 'retractions')}")
    for table in ("staged", "retracted"):
        columns = [(row[0], row[1]) for row in batch.execute(f"describe {table}").fetchall()]
        types = ", ".join(f"{column} {kind.replace('TIMESTAMP WITH TIME ZONE', 'timestamptz')}" for column, kind in columns)
        stream.execute(f"create table {table} ({types})")
        with stream.cursor().copy(f"copy {table} from stdin") as copy:
            for row in batch.execute(f"from {table}").fetchall():
                copy.write_row(row)


def test_postgres_stores_what_duckdb_stores():
    events = as_table(event_log(Random(7), num_events=200))
    with duckdb.connect() as batch, postgres("dev") as stream:
        stage_on_both(batch, stream, events)
        for name in NAMES:
            group = GROUPS[name]
            expected = rows_of(batch.execute(render.block_sql(group, "staged", "retracted")), group)
            got = rows_of(stream.execute(render.block_sql(group, "staged", "retracted", dialect="risingwave")), group)
            assert got.keys() == expected.keys(), name
            assert len(expected) > 50
            for place, row in expected.items():
                for column, value in row.items():
                    found = got[place][column]
                    if isinstance(value, float):
                        assert found == pytest.approx(value, rel=1e-12), (name, place, column)
                    elif isinstance(value, list) and value and isinstance(value[0][1], float):
                        assert dict(found) == pytest.approx(dict(value), rel=1e-12), (name, place, column)
                    else:
                        assert found == value, (name, place, column)
