"""A store fed from the views of a PostgreSQL that runs the RisingWave models' own text answers as one fed from the log."""

import contextlib
import datetime

import numpy as np
import pytest

from streaming_sql.block_views import BlockViews
from streaming_sql.feed import Feed
from streaming_sql.online_store import OnlineStore
from streaming_sql.postgres_reader import PostgresReader
from streaming_sql.replica import Replica
from tests.streaming_sql.generated import ListHistory, as_table
from tests.streaming_sql.postgres import postgres
from tests.streaming_sql.test_risingwave_models import GROUPS, a_log, compiled, create_views, load_into_postgres, manifest
from warehouse.errors import HeadraceError

__all__ = ["compiled", "manifest"]  # the fixtures

KEYS = {
    "note_engagement": [("n1",), ("n2",), ("N1",), ("?",)],
    "author_engagement": [("a1",), ("a2",)],
    "user_activity": [("u1",), ("u2",), ("ü3",)],
    "user_author_affinity": [("u1", "a1"), ("u2", "a2"), ("ü3", "a1")],
}


def address(connection):
    return f"host={connection.info.host} user=postgres dbname=dev"


def fed(records):
    """What the embedded runner's feed makes of the records, each partition read to its end; the head is then left out."""
    store, history = OnlineStore(GROUPS), ListHistory()
    history.records += records
    feed = Feed(store, GROUPS, (0, 0), history)
    feed.take(as_table(records))
    return store


def assert_same_at_the_tick(replica, store):
    view, other = replica.store.view(), store.view()
    assert view.tick_us == other.tick_us
    for name, keys in KEYS.items():
        mine, theirs = view.assemble(name, keys, view.tick_us), other.assemble(name, keys, view.tick_us)
        if any(measure.freshness == "event" for measure in GROUPS[name].measures):
            continue  # their head is not empty: what is late and known since counts at once
        assert np.array_equal(mine.values, theirs.values, equal_nan=True), name
        assert np.nansum(mine.values) > 0


def test_a_replica_moves_tick_by_tick_and_equals_the_embedded_store(compiled):
    records = a_log(5, 1500)
    half = [record for record in records if record["landed_at"] < records[700]["landed_at"]]
    with postgres("dev") as connection:
        load_into_postgres(connection, as_table(half))
        create_views(connection, compiled)
        reader = PostgresReader(address(connection))
        replica = Replica(reader, GROUPS)
        assert replica.refresh()
        assert not replica.refresh()
        assert_same_at_the_tick(replica, fed(half))
        before = replica.store.tick_us
        fields = [column.name for column in connection.execute("select * from log_events limit 0").description]
        held = {"kafka_timestamp": "landed_at", "kafka_partition": "log_partition", "kafka_offset": "log_offset"}
        with connection.cursor().copy(f"copy log_events ({', '.join(fields)}) from stdin") as copy:
            for row in as_table(records[len(half) :]).to_pylist():
                copy.write_row([row[held.get(name, name)] for name in fields])
        assert replica.refresh()
        assert replica.store.tick_us > before
        assert_same_at_the_tick(replica, fed(records))
        (sequence,) = replica.store.view().assemble("user_activity", [("u1",)], replica.store.tick_us).sequences.values()
        tick = datetime.datetime.fromtimestamp(replica.store.tick_us / 1e6, datetime.UTC)
        expected = connection.execute(
            "select came.note_id from stg_engagements as came left join stg_retracted_events as gone "
            "using (log_partition, log_offset) where came.user_id = 'u1' and came.event_type = 'click' "
            "and came.note_id is not null and came.known_at <= %s and (gone.retracted_at is null or gone.retracted_at > %s) "
            "order by came.event_ts, came.event_id",
            [tick, tick],
        ).fetchall()
        assert sequence[0] == [note_id for (note_id,) in expected][-50:]
        assert len(sequence[0]) == 50
        reader.close()


def test_a_silent_partition_leaves_the_store_where_it_is(compiled):
    records = [record for record in a_log(3, 60) if record["log_partition"] == 0]
    with postgres("dev") as connection:
        load_into_postgres(connection, as_table(records))
        create_views(connection, compiled)
        with contextlib.closing(PostgresReader(address(connection))) as reader:
            replica = Replica(reader, GROUPS)
            assert not replica.refresh()
            assert replica.store.tick_us == 0


def test_a_view_of_other_rows_is_said_by_its_name():
    with postgres("dev") as connection:
        views = BlockViews(GROUPS)
        columns = views.columns("note_engagement") | {"num_clicks": "varchar"}
        connection.execute(f"create table note_engagement ({', '.join(f'{name} {kind}' for name, kind in columns.items())})")
        connection.execute(
            "insert into note_engagement (note_id, block_start, known_at, num_clicks) values ('n', now(), now(), 'many')"
        )
        with (
            contextlib.closing(PostgresReader(address(connection))) as reader,
            pytest.raises(HeadraceError, match="the view note_engagement holds other rows than blocks"),
        ):
            views.rows(reader, "note_engagement", 0, 4 * 10**15, 0)
