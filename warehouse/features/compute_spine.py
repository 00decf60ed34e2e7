"""Spines: the rows that a user wants features for, read in chunks and checked before anything is computed.

A spine is an Arrow table or a Parquet file; CSV files and queries become a Parquet file first. Knows nothing of features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warehouse.connections import plain_connection
from warehouse.errors import HeadraceError
from warehouse.events import TIMESTAMP
from warehouse.lake import Lake, quoted
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US

REQUEST_TS = "request_ts"
CHUNK_ROWS = 250_000
_ZONED = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"


@dataclass(frozen=True)
class Reads:
    """A chunk of a spine as questions: keys (string arrays by column; NULL asks about nothing), t, T and K in microseconds
    (int64 [N])."""

    keys: dict[str, pa.Array]
    request_us: np.ndarray
    tick_us: np.ndarray
    known_us: np.ndarray
    known_position: pa.Array | None = None
    """list<int64>, K of fresh features: next offset per log partition; NULL, or no column: what landed before t."""

    def __len__(self) -> int:
        return len(self.request_us)

    def take(self, rows: np.ndarray) -> "Reads":
        """Some of the questions; rows: int64."""
        keys = {name: values.take(pa.array(rows)) for name, values in self.keys.items()}
        position = None if self.known_position is None else self.known_position.take(pa.array(rows))
        return Reads(keys, self.request_us[rows], self.tick_us[rows], self.known_us[rows], position)


@dataclass(frozen=True)
class Span:
    """The least and largest times that a spine asks about, microseconds."""

    first_us: int
    last_request_us: int
    last_known_us: int


class Spine:
    """Rows in order, in chunks: of a table in memory, or of a Parquet file."""

    def __init__(self, source: pa.Table | Path, name: str):
        self.name = name
        self._source = source
        if isinstance(source, Path):
            try:
                self.schema, self.num_rows = pq.read_schema(source), pq.read_metadata(source).num_rows
            except (pa.ArrowInvalid, OSError) as error:
                raise HeadraceError(
                    f"{name} cannot be read as Parquet, perhaps it is half-written: {_first_line(error)}"
                ) from None
        else:
            self.schema, self.num_rows = source.schema, source.num_rows
        names = self.schema.names
        if repeated := sorted({column for column in names if names.count(column) > 1}):
            raise HeadraceError(f"{name} has two columns named {', '.join(repeated)}; name each column once")
        if self.num_rows == 0:
            raise HeadraceError(f"{name} has no rows; give at least one key and {REQUEST_TS}")

    def chunks(self, columns: Sequence[str] | None = None, rows: int = CHUNK_ROWS) -> Iterator[pa.Table]:
        if isinstance(self._source, pa.Table):
            table = self._source if columns is None else self._source.select(list(columns))
            for start in range(0, table.num_rows, rows):
                yield table.slice(start, rows)
            return
        try:
            with pq.ParquetFile(self._source) as file:
                for batch in file.iter_batches(rows, columns=columns):
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowInvalid, OSError) as error:
            raise HeadraceError(
                f"{self.name} cannot be read as Parquet, perhaps it is half-written: {_first_line(error)}"
            ) from None

    def check_columns(self, keys: Sequence[str], known_at: str | None, made: Sequence[str]) -> None:
        """Raises HeadraceError where a column is missing, of a type that is no key or time, or would be overwritten."""
        names = self.schema.names
        wanted = dict.fromkeys((*keys, REQUEST_TS, *([known_at] if known_at else [])))
        if missing := [column for column in wanted if column not in names]:
            raise HeadraceError(f"{self.name} has no column {', '.join(missing)}; it has {', '.join(names)}")
        if taken := [name for name in made if name in names]:
            raise HeadraceError(
                f"{self.name} already has a column {', '.join(taken)}; rename it, or do not ask for that feature"
            )
        for column in keys:
            of = self.schema.field(column).type
            of = of.value_type if pa.types.is_dictionary(of) else of
            if not (pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_integer(of) or _is_view(of)):
                raise HeadraceError(f"{self.name}: key {column} is {of}; keys are text (integers are read as text)")
        for column in (REQUEST_TS, *([known_at] if known_at else [])):
            of = self.schema.field(column).type
            if not pa.types.is_timestamp(of):
                raise HeadraceError(f"{self.name}: {column} is {of}; write it as a timestamp with a zone, UTC for instance")
            if of.tz is None:
                raise HeadraceError(f"{self.name}: {column} is a timestamp without a zone; write it with one, UTC for instance")

    def reads(self, chunk: pa.Table, keys: Sequence[str], known_at: str | None, first_row: int = 0) -> Reads:
        """The chunk's questions. Raises HeadraceError for null keys and times, and a K that is no tick."""
        request_us = self._instants(chunk, REQUEST_TS, first_row)
        tick_us = (request_us - GRACE_US) // FIVE_MINUTES_US * FIVE_MINUTES_US
        known_us = tick_us
        if known_at is not None:
            known_us = self._instants(chunk, known_at, first_row)
            if (between := known_us % FIVE_MINUTES_US != 0).any():
                bad = int(known_us[between][0])
                raise HeadraceError(
                    f"{self.name}: {known_at} {as_text(bad)} is no tick; ticks are whole 5 minutes, "
                    f"for instance {as_text(bad // FIVE_MINUTES_US * FIVE_MINUTES_US)}"
                )
        return Reads({key: self._key(chunk, key, first_row) for key in keys}, request_us, tick_us, known_us)

    def span(self, keys: Sequence[str], known_at: str | None) -> Span:
        """Reads the questions of the whole spine once: nothing is computed for a spine with a bad row."""
        columns = list(dict.fromkeys((*keys, REQUEST_TS, *([known_at] if known_at else []))))
        edges = []
        first_row = 0
        for chunk in self.chunks(columns):
            reads = self.reads(chunk, keys, known_at, first_row)
            first_row += chunk.num_rows
            edges.append((reads.request_us.min(), reads.request_us.max(), reads.tick_us.min(), reads.known_us.max()))
        return Span(min(edge[2] for edge in edges), max(edge[1] for edge in edges), max(edge[3] for edge in edges))

    def _key(self, chunk: pa.Table, column: str, first_row: int) -> pa.Array:
        values = self._no_nulls(chunk, column, first_row)
        return pa.concat_arrays(values.cast(pa.string()).chunks) if values.num_chunks else pa.array([], pa.string())

    def _instants(self, chunk: pa.Table, column: str, first_row: int) -> np.ndarray:
        values = self._no_nulls(chunk, column, first_row)
        try:
            return values.cast(TIMESTAMP).cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid as error:
            raise HeadraceError(f"{self.name}: {column} does not fit whole microseconds: {_first_line(error)}") from None

    def _no_nulls(self, chunk: pa.Table, column: str, first_row: int) -> pa.ChunkedArray:
        values = chunk[column]
        if values.null_count:
            row = first_row + pc.index(values.is_null(), True).as_py() + 1
            raise HeadraceError(f"{self.name}, row {row:,}: {column} is null; leave out rows without keys or {REQUEST_TS}")
        return values


def spool_csv(path: Path, keys: Sequence[str], times: Sequence[str], into: Path) -> None:
    """A CSV file as Parquet: keys stay text (`007`), times must carry a zone. Raises HeadraceError naming the line."""
    with plain_connection() as connection:
        try:
            as_read = f"read_csv({quoted(str(path))}, header = true, delim = ',', quote = '\"', escape = '\"', sample_size = -1"
            header = [row[0] for row in connection.execute(f"describe select * from {as_read})").fetchall()]
            texts = [f"{quoted(column)}: 'VARCHAR'" for column in (*keys, *times) if column in header]
            source = as_read + (f", types = {{{', '.join(texts)}}})" if texts else ")")
            items = [f"{_quoted_name(c)}::timestamptz as {_quoted_name(c)}" if c in times else _quoted_name(c) for c in header]
            for column in (column for column in times if column in header):
                bad = connection.execute(
                    f"select line, value from (select row_number() over () + 1 as line, {_quoted_name(column)} as value "
                    f"from {source}) where value is not null and (try_cast(value as timestamptz) is null "
                    f"or not regexp_matches(value, '{_ZONED}')) limit 1"
                ).fetchone()
                if bad:
                    raise HeadraceError(
                        f"{path}, line {bad[0]}: {column} {bad[1]!r} is no time with a zone; write 2026-01-01T10:00:00Z"
                    )
            connection.execute(
                f"copy (select {', '.join(items)} from {source}) to {quoted(str(into))} "
                f"(format parquet, row_group_size {CHUNK_ROWS})"
            )
        except duckdb.Error as error:
            raise HeadraceError(f"{path} cannot be read as CSV: {_first_line(error)}") from None


def spool_sql(lake: Lake, query: str, into: Path) -> None:
    """The rows of a select over the lake, as Parquet, in the query's order. Read-only."""
    with lake.duckdb(read_only=True) as connection:
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise HeadraceError("--spine-sql takes one select")
            rows = connection.execute(statements[0].query).to_arrow_reader(CHUNK_ROWS)
            with pq.ParquetWriter(into, rows.schema) as writer:
                for batch in rows:
                    writer.write_batch(batch)
        except duckdb.Error as error:
            raise HeadraceError(f"--spine-sql: {error}") from None


def as_text(instant_us: int) -> str:
    """`2026-01-01T10:00:00Z`."""
    return str(np.datetime64(int(instant_us), "us")).removesuffix(".000000") + "Z"


def _is_view(of: pa.DataType) -> bool:
    return of == pa.string_view()


def _quoted_name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
