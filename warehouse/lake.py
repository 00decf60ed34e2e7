"""The Iceberg lake: one SQLite catalogue, local files, atomic appends and overwrites, and DuckDB views to read them.

Knows nothing of features. Any Iceberg engine can read the same tables: the catalogue is pyiceberg's own and each table is
described by its metadata file (docs/decisions/0002-reading-the-lake.md).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, TableAlreadyExistsError, ValidationError
from pyiceberg.expressions import AlwaysTrue, BooleanExpression
from pyiceberg.manifest import DataFile
from pyiceberg.schema import Schema
from pyiceberg.table import Table, Transaction
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.update import TableUpdate
from pyiceberg.transforms import parse_transform
from sqlalchemy.exc import IntegrityError, OperationalError

from warehouse.connections import duckdb_connection, plain_connection, prepare_connection
from warehouse.data_files import DataFiles
from warehouse.errors import HeadraceError
from warehouse.file_writer import FileWriter
from warehouse.home import Home

CATALOGUE = "headrace"
CATALOGUE_TABLES = 2
"""Tables that pyiceberg makes on first use, so how often another process can be the first at one."""
BUILT_UNTIL = "headrace.built_until"
"""Table property: the end (exclusive) of the event time that dbt has built into the table."""


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def parquet_sql(paths: Sequence[str] | None) -> str | None:
    """`select` of Parquet files; None where there are none, or a name that DuckDB would take for a pattern."""
    if not paths or any(set(path) & set("*?[") for path in paths):
        return None
    return f"select * from read_parquet([{', '.join(map(quoted, paths))}])"


@dataclass(frozen=True)
class Lake:
    """The tables of one warehouse folder. Cheap to make; every call reads the catalogue afresh."""

    catalogue: SqlCatalog
    folder: Path

    @classmethod
    def open(cls, home: Home) -> "Lake":
        """Opens the warehouse under `home`, making it on first use."""
        folder = home.lake
        failed = 0
        while True:
            try:
                catalogue = SqlCatalog(
                    CATALOGUE,
                    uri=f"sqlite:///{folder / 'catalogue.db'}?timeout=60",
                    warehouse=f"file://{folder / 'warehouse'}",
                )
                return cls(catalogue, folder)
            except Exception as error:
                failed += 1
                if isinstance(error, OperationalError) and "already exists" in str(error) and failed <= CATALOGUE_TABLES:
                    continue  # another process made this table between our look and our own making of it
                raise HeadraceError(f"cannot open the lake's catalogue in {folder}: {error}") from error

    @property
    def scratch(self) -> Path:
        """The home's folder for files that live as long as a command."""
        return Home(self.folder.parent).tmp

    def tables(self) -> list[str]:
        """Names of all tables, `namespace.table`, sorted."""
        names = [
            ".".join(identifier)
            for namespace in self.catalogue.list_namespaces()
            for identifier in self.catalogue.list_tables(namespace)
        ]
        return sorted(names)

    def exists(self, name: str) -> bool:
        return self.catalogue.table_exists(name)

    def table(self, name: str) -> Table:
        """The table at its current snapshot. Raises HeadraceError if there is none."""
        try:
            return self.catalogue.load_table(name)
        except NoSuchTableError:
            raise HeadraceError(f"the lake has no table {name}; it has {', '.join(self.tables()) or 'none yet'}") from None

    def create(self, name: str, schema: pa.Schema | Schema, partition_by: Mapping[str, str] | None = None) -> Table:
        """Creates the table if it is not there. `partition_by` maps a column to a transform: `{"landed_at": "hour"}`."""
        if self.exists(name):
            return self.table(name)
        with contextlib.suppress(IntegrityError):  # another thread or process made the namespace at the same moment
            self.catalogue.create_namespace_if_not_exists(name.rpartition(".")[0])
        try:
            with self.catalogue.create_table_transaction(name, schema=schema) as transaction:
                if partition_by:
                    with transaction.update_spec() as spec:
                        for column, transform in partition_by.items():
                            spec.add_field(
                                column, parse_transform(transform), f"{column}_{transform.replace('[', '_').rstrip(']')}"
                            )
        except (CommitFailedException, TableAlreadyExistsError):
            if not self.exists(name):  # else another thread or process made the table at the same moment
                raise
        return self.table(name)

    def evolve(self, name: str, schema: pa.Schema) -> bool:
        """Adds the columns of `schema` that the table lacks (null in rows before) and widens types that `schema` has wider
        (int to long, float to double), in one metadata commit: no file is rewritten. Returns whether anything changed.

        Raises HeadraceError if a column's type can only be reached by a rewrite. Columns that only the table has stay.
        """
        table = self.table(name)
        there = {field.name: field.type for field in table.schema().as_arrow()}
        wanted = [field for field in schema if not _same_type(there.get(field.name), field.type)]
        if not wanted:
            return False
        try:
            with table.update_schema() as update:
                update.union_by_name(pa.schema([field.with_nullable(True) for field in wanted]))
        except ValidationError as error:
            raise HeadraceError(f"{name} cannot take its new columns without a rewrite: {error}") from error
        return True

    def set_properties(self, name: str, properties: Mapping[str, str]) -> None:
        """Gives the table these properties, in one commit, unless it has them: how its files are written, say."""
        table = self.table(name)
        if properties.items() - table.properties.items():
            with table.transaction() as transaction:
                transaction.set_properties(dict(properties))

    def append(self, name: str, rows: pa.Table, properties: Mapping[str, str] | None = None) -> None:
        """Adds the rows in one commit; `properties` go into the same snapshot's summary."""
        table = self.table(name)
        with _Transaction(table) as transaction:
            append_files(transaction, write_chunks(transaction, table, [rows]), properties or {})

    def write_files(self, name: str, rows: pa.Table) -> list[DataFile]:
        """The first half of `append`: data files of the rows, which no snapshot names before `add_files` does."""
        table = self.table(name)
        return write_chunks(_Transaction(table), table, [rows])

    def file_writer(self, name: str) -> FileWriter:
        """`write_files` of rows that come part by part."""
        table = self.table(name)
        return FileWriter(table.metadata, table.io)

    def add_files(self, name: str, files: Iterable[DataFile], properties: Mapping[str, str] | None = None) -> None:
        """The second half: one commit. If it fails nobody can say whether the files are in the table."""
        with self.transaction(name) as transaction:
            append_files(transaction, files, properties or {})

    def replace(self, name: str, rows: pa.Table) -> None:
        """The table becomes these rows, in one commit."""
        table = self.table(name)
        if table.current_snapshot() is None:
            table.append(rows)
        else:
            table.overwrite(rows)

    @contextlib.contextmanager
    def transaction(self, name: str) -> Iterator[Transaction]:
        """One commit of several steps; nothing is kept if the block raises."""
        with _Transaction(self.table(name)) as transaction:
            yield transaction

    def scan(self, name: str, row_filter: str | BooleanExpression | None = None, columns: tuple[str, ...] = ("*",)) -> pa.Table:
        """The rows as Arrow, by pyiceberg (prunes files by partition and statistics)."""
        return (
            self.table(name)
            .scan(row_filter=AlwaysTrue() if row_filter is None else row_filter, selected_fields=columns)
            .to_arrow()
        )

    def properties(self, name: str) -> dict[str, str]:
        """The summary of the current snapshot (what a commit wrote beside its rows); empty if there is none."""
        snapshot = self.table(name).current_snapshot() if self.exists(name) else None
        return dict(snapshot.summary.additional_properties) if snapshot and snapshot.summary else {}

    def view_sql(self, name: str) -> str:
        """`select` that reads the table at its current snapshot, for DuckDB."""
        table = self.table(name)
        if table.current_snapshot() is None:
            columns = ", ".join(f'null::{_duckdb_type(field)} as "{field.name}"' for field in table.schema().as_arrow())
            return f"select {columns} where false"
        return f"select * from iceberg_scan({quoted(table.metadata_location.removeprefix('file://'))})"

    def create_views(self, connection: duckdb.DuckDBPyConnection) -> None:
        """One view per table, `namespace.table`, pinned to the current snapshot; events first, as what they refer to was there
        before them."""
        for name in sorted(self.tables(), key="lake.events".__ne__):
            self.create_view(connection, name)

    def create_view(self, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        _create_view(connection, name, self.view_sql(name))

    def reader(self, names: Iterable[str], more: bool = False) -> duckdb.DuckDBPyConnection:
        """An in-memory DuckDB with a view of each of these tables at its current snapshot. Loads the Iceberg extension (a third
        of a second, to check 80 MB of signatures) only where a table is not just its Parquet files, or `more` views follow."""
        connection = plain_connection()
        views = {name: self.files_sql(name) for name in names}
        if more or not all(views.values()):
            prepare_connection(connection)
        for name, sql in views.items():
            _create_view(connection, name, sql or self.view_sql(name))
        return connection

    def files_sql(self, name: str) -> str | None:
        """`select` of the table's Parquet files; None where they are not the table: rows deleted apart, changed columns."""
        table = self.table(name)
        if table.current_snapshot() is None:
            return self.view_sql(name)
        return parquet_sql(DataFiles().of(table))

    def duckdb(self, read_only: bool = False) -> duckdb.DuckDBPyConnection:
        """An in-memory DuckDB with one view per table. `read_only` locks it down for SQL that a user wrote: no files
        outside the lake, no extensions, no settings."""
        connection = duckdb_connection(always_check=read_only)
        self.create_views(connection)
        if read_only:
            connection.execute(f"set allowed_directories = [{quoted(str(self.folder))}]")
            connection.execute("set enable_external_access = false")
            connection.execute("set lock_configuration = true")
        return connection


class _Transaction(Transaction):
    """One that copies the table's metadata once per change instead of at each look: pyiceberg looks fifteen times in a commit,
    and a copy holds every snapshot that the table ever had."""

    _seen: tuple[TableMetadata, tuple[TableUpdate, ...], TableMetadata] | None = None

    @property
    def table_metadata(self) -> TableMetadata:
        base, updates = self._table.metadata, self._updates
        if self._seen is None or self._seen[0] is not base or self._seen[1] is not updates:
            self._seen = (base, updates, super().table_metadata)
        return self._seen[2]


def _create_view(connection: duckdb.DuckDBPyConnection, name: str, sql: str) -> None:
    namespace, _, table = name.rpartition(".")
    connection.execute(f'create schema if not exists "{namespace}"')
    connection.execute(f'create or replace view "{namespace}"."{table}" as {sql}')


def write_chunks(transaction: Transaction, table: Table, chunks: Iterable[pa.Table]) -> list[DataFile]:
    """Writes the files of rows that the commit under way will add; of the chunks one is in memory at a time.

    (pyiceberg appends a stream to unpartitioned tables only: apache/iceberg-python#2152.)
    """
    writer = FileWriter(transaction.table_metadata, table.io)
    for chunk in chunks:
        writer.write(chunk)
    return writer.close()


def append_files(transaction: Transaction, files: Iterable[DataFile], properties: Mapping[str, str]) -> None:
    """Adds files in one snapshot of the commit under way; `properties` go into its summary."""
    with transaction.update_snapshot(snapshot_properties=dict(properties)).fast_append() as append:
        for file in files:
            append.append_data_file(file)


def _duckdb_type(field: Any) -> str:
    """The DuckDB type of an Arrow field, asked of DuckDB itself."""
    empty = pa.table({field.name: pa.array([], field.type)})
    return str(duckdb.from_arrow(empty).types[0])


def stored_bytes(folder: Path) -> int:
    """Bytes on disk under a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and not os.path.islink(path))


def _same_parts(there: pa.DataType, wanted: pa.DataType) -> bool:
    """Of lists, maps and structs; a struct may have more than what is wanted."""
    if pa.types.is_struct(there) and pa.types.is_struct(wanted):
        parts = {field.name: field.type for field in there.fields}
        return all(_same_type(parts.get(field.name), field.type) for field in wanted.fields)
    if pa.types.is_map(there) and pa.types.is_map(wanted):
        return _same_type(there.key_type, wanted.key_type) and _same_type(there.item_type, wanted.item_type)
    if pa.types.is_map(there) or pa.types.is_map(wanted) or pa.types.is_struct(there) or pa.types.is_struct(wanted):
        return False
    return _same_type(there.value_type, wanted.value_type)


def _same_type(there: pa.DataType | None, wanted: pa.DataType) -> bool:
    """Iceberg has one string, one binary and one list type, whatever the width of Arrow's offsets; a wider number is enough."""
    if there is None:
        return False
    if pa.types.is_nested(there) and pa.types.is_nested(wanted):
        return _same_parts(there, wanted)
    kinds = (pa.types.is_string, pa.types.is_large_string)
    if any(kind(there) for kind in kinds) and any(kind(wanted) for kind in kinds):
        return True
    for number in (pa.types.is_integer, pa.types.is_floating):
        if number(there) and number(wanted):
            return there.bit_width >= wanted.bit_width
    return there == wanted
