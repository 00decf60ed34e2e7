"""Events into `lake.events`, exactly once: imported history, files, and records of the live event log.

Every path ends in one Iceberg commit that holds the rows, the log position they reach and the source they came from, so a
crash anywhere leaves either all of it or nothing. Rows that break a rule go to `lake.dead_letters` with the reason.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.table import Table

from warehouse.clock import Clock
from warehouse.connections import plain_connection
from warehouse.datasets.base import NOTES_SCHEMA, USERS_SCHEMA, Dataset
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, HEARTBEAT, NUM_PARTITIONS, TIMESTAMP, partition_of
from warehouse.lake import Lake
from warehouse.locks import in_turn
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, FURTHEST_AHEAD_US

EVENTS = "lake.events"
DEAD_LETTERS = "lake.dead_letters"
NOTES = "lake.notes"
USERS = "lake.users"
POSITION = "headrace.position"

DEAD_LETTERS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("payload", pa.string(), nullable=False),
        pa.field("landed_at", TIMESTAMP, nullable=False),
    ]
)

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""


@dataclass(frozen=True)
class Landed:
    """What one landing did. `already` is true when this very source had landed before: nothing was added."""

    source: str
    num_events: int
    num_dead_letters: int
    already: bool


def create_tables(lake: Lake) -> None:
    """Makes the tables that every room expects, empty, where they are missing; those of an older version get what is new."""
    lake.create(EVENTS, EVENTS_SCHEMA, {"landed_at": "hour"})
    lake.create(DEAD_LETTERS, DEAD_LETTERS_SCHEMA)
    lake.create(NOTES, NOTES_SCHEMA)
    lake.create(USERS, USERS_SCHEMA)
    for name, schema in (
        (EVENTS, EVENTS_SCHEMA),
        (DEAD_LETTERS, DEAD_LETTERS_SCHEMA),
        (NOTES, NOTES_SCHEMA),
        (USERS, USERS_SCHEMA),
    ):
        lake.evolve(name, schema)


def landed_position(lake: Lake) -> tuple[int, ...]:
    """The next offset of each log partition: events below it are in the lake."""
    if not lake.exists(EVENTS):
        return (0,) * NUM_PARTITIONS
    return position_of(lake.table(EVENTS))


def position_of(table: Table) -> tuple[int, ...]:
    """`landed_position` of the table `lake.events` as it is here. Raises HeadraceError as `landed_position_of` does."""
    text = landed_position_of(table)
    return tuple(json.loads(text)) if text else (0,) * NUM_PARTITIONS


def landed_position_of(table: Table) -> str | None:
    """As the newest snapshot that has it says it, JSON; None if none does. Raises HeadraceError if snapshots that may have said
    it are gone: to land from the start again would land everything twice."""
    snapshot = table.current_snapshot()
    while snapshot is not None:
        if snapshot.summary and (text := snapshot.summary.additional_properties.get(POSITION)):
            return text
        parent = table.snapshot_by_id(snapshot.parent_snapshot_id) if snapshot.parent_snapshot_id else None
        if parent is None and (snapshot.sequence_number or 0) > 1 and ".".join(table.name()) == EVENTS:
            raise HeadraceError(
                f"{EVENTS} does not say how far the log has landed: the snapshots before {snapshot.snapshot_id} are gone. "
                "Restore the table's metadata; expire snapshots with `headrace lake expire`, which keeps the one that says it"
            )
        snapshot = parent
    return None


def land_records(lake: Lake, records: pa.Table, position: tuple[int, ...]) -> int:
    """Appends records of the event log that are not in the lake yet, and the position they reach; returns how many.

    records: EVENTS_SCHEMA. Offsets below the landed position are skipped, so a repeated call adds nothing.
    """
    with only_writer(lake):
        create_tables(lake)
        landed = landed_position(lake)
        if len(landed) != len(position):
            raise HeadraceError(
                f"the lake holds {len(landed)} log partitions, the log has {len(position)}; they must be the same"
            )
        known = pa.array(landed, pa.int64()).take(records["log_partition"])
        fresh = records.filter(pc.greater_equal(records["log_offset"], known))
        reached = tuple(max(a, b) for a, b in zip(landed, position, strict=True))
        if fresh.num_rows == 0 and reached == landed:
            return 0
        lake.append(EVENTS, fresh.cast(EVENTS_SCHEMA), {POSITION: json.dumps(reached)})
        return fresh.num_rows


def land_dataset(lake: Lake, dataset: Dataset, progress: Progress | None = None, clock: Clock | None = None) -> Landed:
    """Imported history with its declared landing times, and its dimensions. A second run adds nothing."""
    create_tables(lake)
    fingerprint = _fingerprint(dataset.events)
    landed = land_events(lake, dataset.name, fingerprint, dataset.events, progress, clock)
    _merge_dimension(lake, NOTES, dataset.notes.cast(NOTES_SCHEMA), "note_id")
    _merge_dimension(lake, USERS, dataset.users.cast(USERS_SCHEMA), "user_id")
    return landed


def land_events(
    lake: Lake, source: str, fingerprint: str, events: pa.Table, progress: Progress | None = None, clock: Clock | None = None
) -> Landed:
    """Lands events whose `landed_at` is declared (null: now), in order of landing, as one commit.

    events: EVENTS_SCHEMA less the log columns; ids and times may be null and are then dead letters.
    Declared times hold only while they do not run behind what the lake already holds: a tick that was served must not change,
    so such events land now instead.
    """
    with only_writer(lake):
        create_tables(lake)
        property_name = f"headrace.landed.{fingerprint}"
        if property_name in lake.table(EVENTS).properties:
            return Landed(source, 0, 0, already=True)
        now_us = (clock or Clock()).now_us()
        stamped, dead = _stamp(events, source, _last_landed(lake), landed_position(lake), now_us)
        if dead.num_rows and property_name not in lake.table(DEAD_LETTERS).properties:
            with lake.transaction(DEAD_LETTERS) as transaction:
                transaction.append(dead)
                transaction.set_properties({property_name: str(dead.num_rows)})
        num_events = stamped.num_rows
        if num_events:
            heartbeats = _heartbeats(stamped, fingerprint, landed_position(lake))
            position = tuple(pc.add(heartbeats["log_offset"], 1).to_pylist())
            with lake.transaction(EVENTS) as transaction:
                done = 0
                for piece in _days(stamped):
                    transaction.append(piece, snapshot_properties={"headrace.source": source})
                    done += piece.num_rows
                    if progress:
                        progress(done, num_events)
                transaction.append(heartbeats, snapshot_properties={"headrace.source": source, POSITION: json.dumps(position)})
                transaction.set_properties({property_name: str(num_events)})
        return Landed(source, num_events, dead.num_rows, already=False)


def only_writer(lake: Lake) -> contextlib.AbstractContextManager[None]:
    """One process lands at a time: the position that a landing starts from must still hold when it commits."""
    return in_turn(lake.folder / "landing.lock")


def _fingerprint(events: pa.Table) -> str:
    """SHA-256 over the columns' IPC bytes: the same rows in the same order are the same source."""
    digest = hashlib.sha256()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, events.schema) as writer:
        writer.write_table(events.combine_chunks())
    digest.update(sink.getvalue())
    return digest.hexdigest()[:32]


def _last_landed(lake: Lake) -> int | None:
    """The largest landed_at in the lake, microseconds; None while it is empty."""
    if lake.table(EVENTS).current_snapshot() is None:
        return None
    with lake.duckdb() as connection:
        return connection.execute("select max(epoch_us(landed_at)) from lake.events").fetchall()[0][0]


_STAMP = """
with numbered as (
    select *, row_number() over () as row_in_source from events
),

judged as (
    select
        *,
        coalesce(landed_at, make_timestamptz($now_us)) as declared_at,
        case
            when event_id is null or event_id = '' then 'event_id is missing'
            when event_type is null or event_type = '' then 'event_type is missing'
            when event_ts is null then 'event_ts is missing or not a time with a zone'
            when event_type in ('heartbeat', 'dead_letter') then 'event_type ' || event_type || ' is reserved for the log'
            when event_type = 'retraction' and (retracts is null or retracts = '')
                then 'retracts is missing: a retraction names the event_id that it takes back'
            when event_type <> 'retraction' and retracts is not null then 'retracts belongs to event_type retraction'
            when properties is not null and json_valid(properties) is not true then 'properties is not valid JSON'
            when properties is not null and json_type(properties) <> 'OBJECT' then 'properties is not a JSON object'
        end as broken
    from numbered
),

landing_times as (
    select *, case when $land_now then make_timestamptz(greatest($now_us, $last_us)) else declared_at end as stamped_at
    from judged
)

select
    * exclude (broken),
    coalesce(
        broken,
        case
            when epoch_us(stamped_at) - epoch_us(event_ts) > $memory_us
                then 'event is older on arrival than the duplicate memory of ' || ($memory_us // 86400000000) || ' days'
            when epoch_us(event_ts) - epoch_us(stamped_at) > $ahead_us
                then 'event is stamped more than ' || ($ahead_us // 60000000) || ' minutes ahead of the clock'
        end
    ) as reason
from landing_times
order by stamped_at, row_in_source
"""


def _stamp(
    events: pa.Table, source: str, last_us: int | None, position: tuple[int, ...], now_us: int
) -> tuple[pa.Table, pa.Table]:
    """Splits events into rows of `lake.events` with landing time and log position, and dead letters."""
    if events.num_rows == 0:
        return EVENTS_SCHEMA.empty_table(), DEAD_LETTERS_SCHEMA.empty_table()
    first = pc.min(events["landed_at"]).cast(pa.int64()).as_py()
    land_now = last_us is not None and (first is None or first < last_us)
    connection = plain_connection()
    connection.register("events", events)
    judged = connection.execute(
        _STAMP,
        {
            "now_us": now_us,
            "last_us": last_us or 0,
            "land_now": land_now,
            "memory_us": DUPLICATE_MEMORY_US,
            "ahead_us": FURTHEST_AHEAD_US,
        },
    ).to_arrow_table()
    broken = pc.is_valid(judged["reason"])
    return (
        _placed_in_log(judged.filter(pc.invert(broken)), position, "log" if land_now or first is None else "declared"),
        _dead_letters(judged.filter(broken), source, events.schema.names),
    )


def _placed_in_log(judged: pa.Table, position: tuple[int, ...], landing: str) -> pa.Table:
    """Gives each row its log partition and the next offset there."""
    users = pc.dictionary_encode(judged["user_id"], null_encoding="encode").combine_chunks()
    partitions_of_users = pa.array([partition_of(user, len(position)) for user in users.dictionary.to_pylist()], pa.int32())
    connection = plain_connection()
    rows = judged.drop(["landed_at"]).append_column("log_partition", partitions_of_users.take(users.indices))
    starts = pa.table(
        {"log_partition": pa.array(range(len(position)), pa.int32()), "first_offset": pa.array(position, pa.int64())}
    )
    connection.register("rows", rows)
    connection.register("starts", starts)
    placed = connection.execute(
        """
        select
            rows.*,
            rows.stamped_at as landed_at,
            starts.first_offset - 1
                + row_number() over (partition by rows.log_partition order by stamped_at, row_in_source) as log_offset,
            $landing as landing
        from rows
        inner join starts on rows.log_partition = starts.log_partition
        order by rows.stamped_at, rows.row_in_source
        """,
        {"landing": landing},
    ).to_arrow_table()
    return placed.select(EVENTS_SCHEMA.names).cast(EVENTS_SCHEMA)


def _dead_letters(judged: pa.Table, source: str, columns: list[str]) -> pa.Table:
    payloads = [json.dumps(row, default=str, ensure_ascii=False) for row in judged.select(columns).to_pylist()]
    return pa.table(
        {
            "source": pa.array([source] * judged.num_rows, pa.string()),
            "position": pc.cast(judged["row_in_source"], pa.string()),
            "reason": judged["reason"],
            "payload": pa.array(payloads, pa.string()),
            "landed_at": judged["stamped_at"],
        }
    ).cast(DEAD_LETTERS_SCHEMA)


def _heartbeats(stamped: pa.Table, fingerprint: str, start: tuple[int, ...]) -> pa.Table:
    """One row per partition that carries the source's last landing time: everything up to it has been read."""
    last = pc.max(stamped["landed_at"]).as_py()
    ends = stamped.group_by("log_partition").aggregate([("log_offset", "max")]).to_pylist()
    after = {row["log_partition"]: row["log_offset_max"] + 1 for row in ends}
    rows = [
        {
            "event_id": f"{HEARTBEAT}:{fingerprint}:{partition}",
            "event_type": HEARTBEAT,
            "event_ts": last,
            "landed_at": last,
            "log_partition": partition,
            "log_offset": after.get(partition, offset),
            "landing": stamped["landing"][0].as_py(),
        }
        for partition, offset in enumerate(start)
    ]
    return pa.Table.from_pylist(rows, schema=EVENTS_SCHEMA)


def _days(rows: pa.Table) -> Iterator[pa.Table]:
    """Slices of one arrival day each: bounded memory, and something for a progress bar to show."""
    days = pc.divide(rows["landed_at"].cast(pa.int64()), DAY_US)
    runs = pc.run_end_encode(days.combine_chunks()).run_ends.to_pylist() if rows.num_rows else []
    start = 0
    for end in runs:
        yield rows.slice(start, end - start)
        start = end


def _merge_dimension(lake: Lake, name: str, rows: pa.Table, key: str) -> None:
    """Rows of the same key are replaced, others kept; one commit, and none if nothing differs."""
    if rows.num_rows == 0:
        return
    existing = lake.scan(name)
    kept = existing.filter(pc.invert(pc.is_in(existing[key], value_set=rows[key].combine_chunks())))
    merged = pa.concat_tables([kept.cast(rows.schema), rows]).sort_by(key)
    if not existing.sort_by(key).cast(rows.schema).equals(merged):
        lake.replace(name, merged)
