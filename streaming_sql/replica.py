"""The online store of a process beside a RisingWave cluster: its views' blocks, tick by tick, over PostgreSQL's protocol.

Rows of a closed tick never change, so a refresh reads the tick, then of each group what the ticks since the last one brought. A
cluster that is away leaves the store where it is. Event-fresh measures are read as of the tick: the views hold no head, which a
server adds from the log (`cluster.py`).
"""

from collections.abc import Mapping

from streaming_sql.block_views import BlockViews
from streaming_sql.online_store import AddedBlocks, OnlineStore
from streaming_sql.postgres_reader import PostgresReader
from warehouse.features.declarations import FeatureGroup


class Replica:
    """`store` answers like the embedded runner's. One thread refreshes."""

    def __init__(self, reader: PostgresReader, groups: Mapping[str, FeatureGroup]):
        self._reader, self._groups = reader, dict(groups)
        self.store, self.views = OnlineStore(groups), BlockViews(groups)

    def refresh(self) -> bool:
        """Moves to the cluster's closed tick; whether there was a newer one. Raises HeadraceError if the cluster does not
        answer; the store is then as before, whole."""
        tick_us, after_us = self.views.closed_tick(self._reader), self.store.tick_us
        if tick_us <= after_us:
            return False
        from_us = {name: self.store.plans[name].keep_from_us(tick_us) for name in self._groups}
        blocks = {name: self.views.rows(self._reader, name, after_us, tick_us, from_us[name]) for name in self._groups}
        self.store.advance(self.store.position, {}, tick=AddedBlocks(tick_us, blocks))
        return True
