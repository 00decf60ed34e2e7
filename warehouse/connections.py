"""DuckDB as all of Headrace opens it: in UTC, with or without the extensions that read Iceberg. Knows nothing of the lake."""

import threading

import duckdb

_checked = threading.Event()
"""Set once this process has loaded the extensions with their signatures checked: 80 MB, which take half a second of processor
time, for every database anew. What is loaded stays loaded, so that databases after the first take it as it is."""


def duckdb_connection(always_check: bool = False) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that speaks UTC and reads Iceberg. `always_check`: for SQL that a user wrote, which shall find no
    database that takes extensions without a signature."""
    connection = duckdb.connect() if always_check else _connect()
    prepare_connection(connection)
    return connection


def plain_connection() -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with the settings of `_configure` and no extension: for rows that are in memory or in plain files."""
    connection = _connect()
    _configure(connection)
    return connection


def prepare_connection(connection: duckdb.DuckDBPyConnection) -> None:
    """Loads the Iceberg extension from its wheel (no download), and makes the settings of `_configure`."""
    from duckdb_extensions import import_extension

    for extension in ("avro", "httpfs", "iceberg"):
        import_extension(extension, con=connection)
        connection.execute(f"load {extension}")
    _checked.set()
    _configure(connection)


def _connect() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"allow_unsigned_extensions": "true"} if _checked.is_set() else {})


def _configure(connection: duckdb.DuckDBPyConnection) -> None:
    """Times are UTC, and an ASOF join is never a nested loop: DuckDB makes it one where it expects few rows on the left, and it
    expects few of an Arrow table with millions. No progress bar: it would stand amid what a command prints."""
    connection.execute("set global TimeZone = 'UTC'")
    connection.execute("set global asof_loop_join_threshold = 0")
    connection.execute("set enable_progress_bar = false")
