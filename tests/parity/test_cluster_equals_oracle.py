"""What a server beside RisingWave reads equals the oracle: blocks of the views' own text on PostgreSQL, the head of the log.

The views lag behind the log, or run ahead of what this process has read of it; the store then stays where both have been.
"""

import contextlib
import itertools

import duckdb
import pytest

from streaming_sql.cluster import Cluster
from streaming_sql.feed import Feed
from tests.parity.test_batch_equals_oracle import GROUPS as EVERY_GROUP
from tests.parity.test_postgres_equals_duckdb import NAMES as NAMES_OF_EVERY_AGGREGATION
from tests.parity.test_postgres_equals_duckdb import stage_on_both
from tests.streaming_sql.generated import ListHistory, alive, as_table, typed
from tests.streaming_sql.postgres import Server
from tests.streaming_sql.test_live_store import assert_equals_oracle
from tests.streaming_sql.test_risingwave_models import (
    GROUPS,
    a_log,
    compiled,
    copy_into_log,
    create_log_events,
    create_views,
    manifest,
)
from warehouse.errors import HeadraceError
from warehouse.features.render import block_sql
from warehouse.time_algebra import MINUTE_US, closed_tick

__all__ = ["compiled", "manifest"]  # the fixtures

NAMES = {"user_id": ["u1", "ü3", "nobody"], "note_id": ["n1", "N1", "?"], "author_id": ["a1", "a2"]}


@contextlib.contextmanager
def cluster_over(compiled, num_readers=100):
    """(a cluster whose views hold nothing yet, what puts records into its log)."""
    with Server.started("dev") as server, server.connected() as connection:
        create_log_events(connection)
        create_views(connection, compiled)
        cluster = Cluster(server.dsn, GROUPS, timeout_s=20.0, connections=1, num_readers=num_readers)
        try:
            yield cluster, lambda records: copy_into_log(connection, as_table(records))
        finally:
            cluster.stop()


def end_of(records):
    return tuple(max((r["log_offset"] + 1 for r in records if r["log_partition"] == p), default=0) for p in (0, 1))


def assert_each_reader_equals_oracle(cluster, events, t_us, groups=GROUPS):
    for user_id in NAMES["user_id"]:
        view, said = cluster.view_of(user_id)
        assert said == []
        of_user = {**NAMES, "user_id": [user_id]}
        assert_equals_oracle(
            view,
            events,
            t_us,
            groups,
            lambda group: list(itertools.product(*(of_user[key] for key in group.entity_keys))),  # noqa: B023
        )


def itself(cluster):
    return cluster


class LookedAtMeanwhile:
    """A cluster whose own thread looks while a tick that was taken of it is not the store's yet."""

    def __init__(self, cluster):
        self._cluster = cluster

    def take(self, closed_us):
        taken = self._cluster.take(closed_us)
        self._cluster.look()
        return taken


@pytest.mark.parametrize(
    ("seed", "lag", "seen_as"), [(21, 0, itself), (22, 90, itself), (23, -90, itself), (21, 0, LookedAtMeanwhile)]
)
def test_every_value_equals_the_oracle_at_each_tick_and_between(compiled, seed, lag, seen_as):
    """lag: how many records the views are behind what this process has read; below 0, ahead."""
    records = a_log(seed, 560)
    events = [typed(record) for record in alive(records)]
    with cluster_over(compiled, num_readers=2) as (cluster, arrive):
        begin = 250
        arrive(records[:begin])
        store = cluster.open_store(lambda: end_of(records[:begin]))
        history = ListHistory()
        feed = Feed(store, GROUPS, (0, 0), history, elsewhere=seen_as(cluster))
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


def test_every_aggregation_is_read_as_the_views_store_it():
    """Lists and maps are JSON there, entry by entry. Here the views stand on the batch side's staging."""
    groups = {name: EVERY_GROUP[name] for name in NAMES_OF_EVERY_AGGREGATION}
    records = a_log(41, 400)
    with duckdb.connect() as batch, Server.started("dev") as server, server.connected() as stream:
        stage_on_both(batch, stream, as_table(alive(records)))
        for name, group in groups.items():
            stream.execute(f"create view {name} as {block_sql(group, 'staged', 'retracted', dialect='risingwave')}")
        newest = [max(r["landed_at"] for r in records if r["log_partition"] == partition) for partition in (0, 1)]
        stream.execute(f"create view closed_tick as select to_timestamp({closed_tick(newest)} / 1000000.0) as closed_tick")
        cluster = Cluster(server.dsn, groups, timeout_s=20.0, connections=1, num_readers=10)
        try:
            store, history = cluster.open_store(lambda: end_of(records)), ListHistory()
            history.records += records
            Feed(store, groups, (0, 0), history, elsewhere=cluster).take(as_table(records), is_history=True)
            events = [typed(record) for record in alive(records)]
            assert_each_reader_equals_oracle(cluster, events, records[-1]["landed_at"] + MINUTE_US, groups)
            view, _ = cluster.view_of("u1")
            assert all(state.layers for state in view.groups.values())
        finally:
            cluster.stop()
