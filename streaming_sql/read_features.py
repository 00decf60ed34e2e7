"""Features of one entity, read as a request would read them: now, from lake and log; or at a past instant, from the lake alone.

Reads only: nothing lands, no heartbeat is written, and a server may run beside it.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa

from streaming_sql.explain import Explanation
from streaming_sql.head import key_sql
from streaming_sql.online_store import OnlineStore
from streaming_sql.open_log import open_log
from streaming_sql.plan import GroupPlan
from streaming_sql.records import to_us
from streaming_sql.runner import Runner
from streaming_sql.settings import StreamSettings
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.events import TIMESTAMP
from warehouse.features.declarations import FeatureGroup
from warehouse.features.recompute import STAGING, recompute
from warehouse.features.render import standing_sql
from warehouse.home import Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.time_algebra import FIVE_MINUTES_US, newest_tick


def groups_of(entity: Mapping[str, str], groups: Mapping[str, FeatureGroup]) -> dict[str, FeatureGroup]:
    """The groups whose entity keys are exactly those of the entity. Raises HeadraceError with the entities there are."""
    found = {name: group for name, group in groups.items() if set(group.entity_keys) == set(entity)}
    if not found:
        known = sorted({",".join(f"{key.removesuffix('_id')}=…" for key in group.entity_keys) for group in groups.values()})
        raise HeadraceError(f"no feature group has the keys {', '.join(sorted(entity))}; there are {'; '.join(known)}")
    return found


def read_now(
    home: Home, clock: Clock, settings: StreamSettings, groups: Mapping[str, FeatureGroup], entity: Mapping[str, str]
) -> list[Explanation]:
    """What a request arriving now would read of the groups with the entity's keys: lake, then everything in the log."""
    lake = Lake.open(home)
    wanted = groups_of(entity, groups)
    with contextlib.closing(open_log(home, lake, clock, settings)) as log:
        store = OnlineStore.from_lake(lake, groups)
        Runner(lake, log, store, groups, clock, settings.runner(), only_reads=True).catch_up()
        view = store.view()
    t_us = max(clock.now_us(), view.tick_us)
    return [view.explain(name, tuple(entity[key] for key in group.entity_keys), t_us) for name, group in wanted.items()]


def read_at(lake: Lake, groups: Mapping[str, FeatureGroup], entity: Mapping[str, str], t_us: int) -> list[Explanation]:
    """The same at an instant of the past: blocks of the newest tick before t_us, fresh events that had landed before it.

    Raises HeadraceError if features are not built up to that tick.
    """
    return [
        _read_at(lake, group, tuple(entity[key] for key in group.entity_keys), t_us)
        for group in groups_of(entity, groups).values()
    ]


def _read_at(lake: Lake, group: FeatureGroup, key: tuple[str, ...], t_us: int) -> Explanation:
    tick_us = newest_tick(t_us)
    _check_built(lake, group, tick_us)
    spine = {"row_id": pa.array([0], pa.int64())} | {
        name: pa.array([value]) for name, value in zip(group.entity_keys, key, strict=True)
    }
    spine |= {"request_ts": pa.array([t_us], TIMESTAMP), "feature_watermark": pa.array([tick_us], TIMESTAMP)}
    spine["known_position"] = pa.array([None], pa.list_(pa.int64()))
    (row,) = recompute(lake, group, pa.table(spine)).to_pylist()
    return Explanation(
        group.name,
        key,
        t_us,
        tick_us,
        tick_us,
        (),
        {name: None if row[name] is None else float(row[name]) for name in group.feature_names},
        {name: list(row[name] or ()) for name in group.sequence_names},
        {name: dict(row[name] or ()) for name in group.map_names},
        *_sources(lake, group, key, t_us, tick_us),
    )


def _check_built(lake: Lake, group: FeatureGroup, tick_us: int) -> None:
    name = f"features.{group.name}"
    until = lake.table(name).properties.get(BUILT_UNTIL) if lake.exists(name) else None
    if until is None or to_us(until) - FIVE_MINUTES_US < tick_us:
        raise HeadraceError(
            f"{name} is built until {until or 'never'}, which does not hold the tick asked for: run `dbt build`"
        )


def _sources(
    lake: Lake, group: FeatureGroup, key: tuple[str, ...], t_us: int, tick_us: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The block rows that stand at the tick and a window reaches, and the events that only fresh measures saw."""
    is_key = " and ".join(f"{name} = ?" for name in group.keys)
    is_event = " and ".join(f"{of_event} = ?" for of_event in key_sql(group).values())
    block_key = list(group.block_key(key, t_us))
    with lake.duckdb() as connection:
        connection.execute(f"create temp table own as select * from features.{group.name} where {is_key}", block_key)
        standing = standing_sql(group, "own", f"make_timestamptz({tick_us})")
        blocks = connection.execute(
            f"select * exclude ({', '.join(group.keys)}, is_rebuilt) from ({standing}) as standing "
            f"where block_start >= make_timestamptz({GroupPlan.of(group).keep_from_us(tick_us)}) order by block_start, known_at"
        ).to_arrow_table()
        if not any(measure.freshness == "event" for measure in group.measures):
            return _in_us(blocks.to_pylist()), []
        head = connection.execute(
            "select event_id, event_type, event_ts, known_at, log_partition, log_offset "
            f"from {STAGING}.{group.events} where {is_event} and known_at > make_timestamptz({tick_us}) "
            f"and landed_at < make_timestamptz({t_us}) and event_ts < make_timestamptz({t_us}) order by event_ts, event_id",
            block_key,
        ).to_arrow_table()
    return _in_us(blocks.to_pylist()), _in_us(head.to_pylist())


def _in_us(value: Any) -> Any:
    """Instants at any depth as microseconds, as `Explanation` has them."""
    if isinstance(value, dict):
        return {name: _in_us(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_in_us(part) for part in value]
    return to_us(value) if isinstance(value, datetime) else value


def as_json(explanation: Explanation, with_sources: bool) -> dict[str, Any]:
    """An explanation as plain data; `with_sources` keeps blocks and head events."""
    told = dataclasses.asdict(explanation)
    return told if with_sources else {name: value for name, value in told.items() if name not in ("blocks", "head")}
