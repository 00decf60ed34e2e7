"""Files of events, in whatever shape a team has them, as rows that `land_events` can judge.

The columns of `lake.events` are taken by name; every other column goes into `properties`. Text that is no time, or a time
without a zone, becomes NULL here and a dead letter there.
"""

import hashlib
from pathlib import Path

import duckdb
import pyarrow as pa

from warehouse.clock import Clock
from warehouse.connections import plain_connection
from warehouse.datasets.base import DATASET_EVENTS_SCHEMA
from warehouse.errors import HeadraceError
from warehouse.lake import Lake, quoted
from warehouse.landing import Landed, Progress, land_events

REQUIRED = ("event_id", "event_type", "event_ts")
READERS = {
    ".parquet": "read_parquet({path})",
    ".csv": "read_csv({path}, all_varchar = true, header = true)",
    ".ndjson": "read_ndjson({path}, sample_size = -1, maximum_depth = 1)",
    ".jsonl": "read_ndjson({path}, sample_size = -1, maximum_depth = 1)",
}
_ZONED = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"


def land_file(
    lake: Lake,
    path: Path,
    landed_at: str | None = None,
    delay_seconds: float | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Landed:
    """Lands a Parquet, CSV or NDJSON file, exactly once per content.

    landed_at: the column that holds each event's landing time; delay_seconds: declare landing as event_ts plus this; neither:
    the events land now. Raises HeadraceError for a missing, unreadable or misshapen file; nothing is landed then.
    """
    if landed_at is not None and delay_seconds is not None:
        raise HeadraceError("give --landed-at or --delay, not both")
    if delay_seconds is not None and delay_seconds < 0:
        raise HeadraceError(f"--delay must not be negative, got {delay_seconds}: an event cannot land before it happens")
    if not path.is_file():
        raise HeadraceError(f"no file {path}")
    events = _read(path, landed_at, delay_seconds)
    with path.open("rb") as handle:
        fingerprint = hashlib.file_digest(handle, "sha256").hexdigest()[:32]
    return land_events(lake, path.name, fingerprint, events, progress, clock)


def _read(path: Path, landed_at: str | None, delay_seconds: float | None) -> pa.Table:
    connection = plain_connection()
    source = READERS[path.suffix].format(path=quoted(str(path)))
    try:
        types = dict(row[:2] for row in connection.execute(f"describe select * from {source}").fetchall())
    except duckdb.Error as error:
        why = str(error).splitlines()[0]
        raise HeadraceError(f"{path} cannot be read as {path.suffix[1:]}, perhaps it is half-written: {why}") from None
    wanted = (*REQUIRED, landed_at) if landed_at else REQUIRED
    if missing := [column for column in wanted if column not in types]:
        raise HeadraceError(f"{path} has no column {', '.join(missing)}; it has {', '.join(types)}")
    for column in ("event_ts", landed_at):
        if column and types[column].startswith("TIMESTAMP") and types[column] != "TIMESTAMP WITH TIME ZONE":
            raise HeadraceError(
                f"{path}: column {column} is {types[column]}, a time without a zone; write it as UTC with a zone"
            )
    try:
        return connection.execute(_select(source, types, landed_at, delay_seconds)).to_arrow_table().cast(_loose_schema())
    except duckdb.Error as error:
        raise HeadraceError(f"{path} cannot be read, perhaps it is damaged: {str(error).splitlines()[0]}") from None


def _select(source: str, types: dict[str, str], landed_at: str | None, delay_seconds: float | None) -> str:
    event_ts = _time("event_ts", types["event_ts"])
    landing = "null::timestamptz"
    if landed_at:
        landing = _time(landed_at, types[landed_at])
    elif delay_seconds is not None:
        landing = f"{event_ts} + to_microseconds({round(delay_seconds * 1_000_000)})"
    items = []
    for field in DATASET_EVENTS_SCHEMA:
        if field.name == "event_ts":
            items.append(f"{event_ts} as event_ts")
        elif field.name == "landed_at":
            items.append(f"{landing} as landed_at")
        elif field.name == "properties":
            items.append(f"{_properties(types, landed_at)} as properties")
        else:
            text = _text(field.name, types[field.name]) if field.name in types else "null::varchar"
            items.append(f'{text} as "{field.name}"')
    order = " order by landed_at" if landed_at or delay_seconds is not None else ""
    return f"select {', '.join(items)} from {source}{order}"


def _time(column: str, type_name: str) -> str:
    if type_name == "TIMESTAMP WITH TIME ZONE":
        return f'"{column}"'
    text = _text(column, type_name)
    return f"case when regexp_matches({text}, '{_ZONED}') then try_cast({text} as timestamptz) end"


def _text(column: str, type_name: str) -> str:
    """The column as text; a JSON string loses its quotes."""
    return f"""("{column}" ->> '$')""" if type_name == "JSON" else f'"{column}"::varchar'


def _properties(types: dict[str, str], landed_at: str | None) -> str:
    if "properties" in types:
        if types["properties"] == "JSON":  # an object, or an object written as a string
            return "case json_type(properties) when 'VARCHAR' then properties ->> '$' else properties::varchar end"
        return "properties::varchar" if types["properties"] == "VARCHAR" else "to_json(properties)::varchar"
    taken = {field.name for field in DATASET_EVENTS_SCHEMA} | {landed_at}
    extra = [column for column in types if column not in taken]
    pairs = ", ".join(f"""{quoted(column)}, "{column}\"""" for column in extra)
    return f"json_object({pairs})::varchar" if extra else "null::varchar"


def _loose_schema() -> pa.Schema:
    """The data-set schema with every column nullable: what is missing is judged where it lands."""
    return pa.schema([field.with_nullable(True) for field in DATASET_EVENTS_SCHEMA])
