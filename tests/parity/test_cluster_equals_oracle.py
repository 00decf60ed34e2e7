"""What a server beside RisingWave reads equals the oracle: blocks of the views' own text on PostgreSQL, the head of the log.

The views lag behind the log, or run ahead of what this process has read of it; the store then stays where both have been.
"""

import contextlib
import itertools

import pytest

from streaming_sql.cluster import Cluster
from streaming_sql.feed import Feed
from tests.streaming_sql.generated import ListHistory, alive, as_table, typed
from tests.streaming_sql.postgres import Server
from tests.streaming_sql.test_live_store import assert_equals_oracle
from tests.streaming_sql.test_risingwave_models import (
    GROUPS,
    a_log,
    compiled,
    create_log_events,
    create_views,
    manifest,
)
from warehouse.errors import HeadraceError
from warehouse.time_algebra import MINUTE_US

__all__ = ["compiled", "manifest"]  # the fixtures

NAMES = {"user_id": ["u1", "ü3", "nobody"], "note_id": ["n1", "N1", "?"], "author_id": ["a1", "a2"]}


@contextlib.contextmanager
def cluster_over(compiled, num_readers=100):
    """(a cluster whose views hold nothing yet, what puts records into its log)."""
    with Server.started("dev") as server, server.connected() as connection:
        given = create_log_events(connection)
        create_views(connection, compiled)

        def arrive(records):
            with connection.cursor().copy("copy log_events from stdin") as copy:
                for row in as_table(records).select(given).to_pylist():
                    copy.write_row([str(row[name]) if name.startswith("log_") else row[name] for name in given])

        cluster = Cluster(server.dsn, GROUPS, timeout_s=20.0, connections=1, num_readers=num_readers)
        try:
            yield cluster, arrive
        finally:
            cluster.stop()


def end_of(records):
    return tuple(max((r["log_offset"] + 1 for r in records if r["log_partition"] == p), default=0) for p in (0, 1))


def assert_each_reader_equals_oracle(cluster, events, t_us):
    for user_id in NAMES["user_id"]:
        view, said = cluster.view_of(user_id)
        assert said == []
        of_user = {**NAMES, "user_id": [user_id]}
        assert_equals_oracle(
            view,
            events,
            t_us,
            GROUPS,
            lambda group: list(itertools.product(*(of_user[key] for key in group.entity_keys))),  # noqa: B023
        )


@pytest.mark.parametrize(("seed", "lag"), [(21, 0), (22, 90), (23, -90)])
def test_every_value_equals_the_oracle_at_each_tick_and_between(compiled, seed, lag):
    """lag: how many records the views are behind what this process has read; below 0, ahead."""
    records = a_log(seed, 560)
    events = [typed(record) for record in alive(records)]
    with cluster_over(compiled, num_readers=2) as (cluster, arrive):
        begin = 250
        arrive(records[:begin])
        store = cluster.open_store(lambda: end_of(records[:begin]))
        history = ListHistory()
        feed = Feed(store, GROUPS, (0, 0), history, elsewhere=cluster)
        there, ticks, held_back = begin, set(), 0
        for read in range(begin, len(records), 57):
            piece = records[read - 57 : read] if read > begin else records[:read]
            if there < (now := min(read - lag, len(records))):
                arrive(records[there:now])
                there = now
            history.records += piece
            cluster.look()
            feed.take(as_table(piece), is_history=read == begin)
            newest = cluster._views.closed_tick(cluster._quick)
            held_back += newest > store.tick_us
            ticks.add(store.tick_us)
            assert_each_reader_equals_oracle(cluster, events, records[read - 1]["landed_at"] + 3 * MINUTE_US)
        assert len(ticks) > 2
        assert (held_back > 0) == (lag < 0)


def test_a_cluster_that_has_closed_no_tick_is_said(compiled):
    with cluster_over(compiled) as (cluster, arrive):
        arrive([record for record in a_log(3, 50) if record["log_partition"] == 0])
        with pytest.raises(HeadraceError, match="closed no tick yet: a partition of the log is silent"):
            cluster.open_store(lambda: (0, 0))
