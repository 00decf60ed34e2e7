"""KuaiRand-Pure (Gao et al., CIKM 2022; CC BY-SA 4.0): a short-video feed as events, notes and users.

A video is a note, its maker an author, its tags the topics, `tab` the surface. The source has the instant of each impression
and what was done with it, but neither the instant of the doing nor that of its arrival: `warehouse.datasets.impressions`
declares those, seeded.
"""

from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warehouse.connections import plain_connection
from warehouse.datasets.base import NOTES_SCHEMA, USERS_SCHEMA, Dataset
from warehouse.datasets.impressions import FLAGS, IMPRESSIONS_SCHEMA, events_from_impressions
from warehouse.errors import HeadraceError

FLAG_COLUMNS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "comment": "is_comment",
    "share": "is_forward",
    "follow": "is_follow",
    "hide": "is_hate",
}
ENCODED_ATTRIBUTES = tuple(f"onehot_feat{number}" for number in range(18))
RANGE_ATTRIBUTES = ("user_active_degree", "follow_user_num_range", "fans_user_num_range", "register_days_range")


def _never_null(name: str) -> pa.Field:
    return pa.field(name, pa.int64(), nullable=False)


SOURCE_SCHEMAS = {
    "impressions.parquet": pa.schema(
        [_never_null(name) for name in ("user_id", "video_id", "time_ms", "play_time_ms", "duration_ms", "tab")]
        + [_never_null(name) for name in FLAG_COLUMNS.values()]
    ),
    "user_history.parquet": pa.schema(
        [_never_null("user_id"), pa.field("watch_seq", pa.list_(pa.int64())), pa.field("like_seq", pa.list_(pa.int64()))]
    ),
    "videos.parquet": pa.schema(
        [
            _never_null("video_id"),
            pa.field("author_id", pa.int64()),
            pa.field("video_type", pa.string()),
            pa.field("upload_dt", pa.date32()),
            pa.field("video_duration", pa.float64()),
            pa.field("tag", pa.string()),
        ]
    ),
    "users.parquet": pa.schema(
        [_never_null("user_id"), pa.field("register_days", pa.int64())]
        + [pa.field(name, pa.string()) for name in RANGE_ATTRIBUTES]
        + [pa.field(name, pa.float64()) for name in ENCODED_ATTRIBUTES]
    ),
}


@dataclass(frozen=True)
class _Source:
    impressions: pa.Table
    history: pa.Table
    videos: pa.Table
    users: pa.Table


def load(folder: str | Path, seed: int = 20220424) -> Dataset:
    """The folder `kuairand/` of the data root → Dataset, in about two seconds; deterministic for a seed.

    Rows that repeat a (user, video, millisecond) stay: their events arrive again under the same `event_id`.
    Raises HeadraceError when the folder, a file or a column is missing, unreadable or of another type.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HeadraceError(
            f"KuaiRand folder {folder} does not exist; "
            "point HEADRACE_DATA at the folder that holds kuairand/, or use the simulator"
        )
    source = _Source(*(_read(folder / name, schema) for name, schema in SOURCE_SCHEMAS.items()))
    if len(source.impressions) == 0:
        raise HeadraceError(f"{folder / 'impressions.parquet'} has no rows; it must hold at least one impression")
    _check_values(source.impressions, folder / "impressions.parquet")
    return Dataset(
        name="kuairand",
        events=events_from_impressions(_impressions(source), seed),
        notes=_notes(source),
        users=_users(source),
        description=(
            f"KuaiRand-Pure (Gao et al., CIKM 2022; CC BY-SA 4.0): {len(source.impressions):,} impressions of a short-video "
            "feed; instants of actions and of arrival are declared, seeded"
        ),
    )


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    if not path.is_file():
        raise HeadraceError(f"{path} does not exist; a KuaiRand folder holds {', '.join(SOURCE_SCHEMAS)}")
    try:
        present = pq.read_schema(path)
        missing = [name for name in schema.names if name not in present.names]
        if missing:
            raise HeadraceError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(present.names) or 'none'}")
        table = pq.read_table(path, columns=schema.names)
    except (pa.ArrowException, OSError) as error:
        raise HeadraceError(f"{path} cannot be read as Parquet: {error}") from error
    for name in schema.names:
        _check_column(path, table[name], schema.field(name))
    return table.select(schema.names).cast(schema)


def _check_column(path: Path, column: pa.ChunkedArray, field: pa.Field) -> None:
    if column.null_count and not field.nullable:
        raise HeadraceError(f"{path}, column {field.name}: {column.null_count} of {len(column)} values are NULL; none may be")
    try:
        column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise HeadraceError(
            f"{path}, column {field.name} must hold {field.type}, got {column.type} that does not convert: {error}"
        ) from error


def _check_values(impressions: pa.Table, path: Path) -> None:
    for name in FLAG_COLUMNS.values():
        limits = pc.min_max(impressions[name])
        if limits["min"].as_py() < 0 or limits["max"].as_py() > 1:
            raise HeadraceError(f"{path}, column {name} must be 0 or 1, got {limits['min']} to {limits['max']}")
    shortest = pc.min(impressions["play_time_ms"]).as_py()
    if shortest < 0:
        raise HeadraceError(f"{path}, column play_time_ms must not be negative, got {shortest}")


def _impressions(source: _Source) -> pa.Table:
    log = source.impressions
    user_id, note_id = log["user_id"].cast(pa.string()), log["video_id"].cast(pa.string())
    video_row = pc.index_in(log["video_id"], source.videos["video_id"])
    columns = {
        "impression_id": pc.binary_join_element_wise(user_id, note_id, log["time_ms"].cast(pa.string()), "-"),
        "user_id": user_id,
        "note_id": note_id,
        "author_id": source.videos["author_id"].cast(pa.string()).take(video_row),
        "surface": pc.binary_join_element_wise("tab", log["tab"].cast(pa.string()), "_"),
        "request_id": pa.nulls(len(log), pa.string()),
        "view_us": pc.multiply(log["time_ms"], 1000),
        "play_ms": log["play_time_ms"],
        **{flag: log[FLAG_COLUMNS[flag]].cast(pa.bool_()) for flag in FLAGS},
    }
    return pa.table(columns).select(IMPRESSIONS_SCHEMA.names).cast(IMPRESSIONS_SCHEMA)


def _connect(source: _Source) -> duckdb.DuckDBPyConnection:
    connection = plain_connection()
    for name, table in vars(source).items():
        connection.register(name, table)
    return connection


def _notes(source: _Source) -> pa.Table:
    """A video without a duration of its own takes the one that its impressions report."""
    with _connect(source) as connection:
        notes = connection.execute("""
            with reported as (
                select video_id, max(duration_ms) as duration_ms
                from impressions
                where duration_ms > 0
                group by video_id
            )

            select
                videos.video_id::varchar as note_id,
                videos.author_id::varchar as author_id,
                list_filter(
                    list_transform(string_split(coalesce(videos.tag, ''), ','), lambda tag: trim(tag)), lambda tag: tag != ''
                ) as topics,
                videos.video_type as note_type,
                coalesce(round(videos.video_duration)::bigint, reported.duration_ms) as duration_ms,
                videos.upload_dt::timestamp as created_at,
                null::varchar as geohash
            from videos
            left join reported on videos.video_id = reported.video_id
            order by videos.video_id
        """).to_arrow_table()
    return notes.cast(NOTES_SCHEMA)


def _users(source: _Source) -> pa.Table:
    """`created_at` counts registration days back from the first instant of the log; an attribute that is NULL is left out."""
    attributes = ", ".join(f"{name} := users.{name}" for name in (*RANGE_ATTRIBUTES, *ENCODED_ATTRIBUTES))
    with _connect(source) as connection:
        users = connection.execute(f"""
            with log_start as (
                select make_timestamp(min(time_ms) * 1000) as started_at
                from impressions
            )

            select
                users.user_id::varchar as user_id,
                log_start.started_at - to_days(users.register_days::integer) as created_at,
                json_merge_patch('{{}}', to_json(struct_pack({attributes})))::varchar as attributes,
                coalesce(history.watch_seq, [])::varchar[] as history_note_ids,
                coalesce(history.like_seq, [])::varchar[] as history_liked_note_ids
            from users
            cross join log_start
            left join history on users.user_id = history.user_id
            order by users.user_id
        """).to_arrow_table()
    return users.cast(USERS_SCHEMA)
