"""What dbt-duckdb asks of the lake: views to read it at connection time, and one atomic Iceberg commit per model.

A model's rows are a function of stored events, so a build is "rows with event time in [start, end)": appended where the range
is new, overwritten where it is repaired, replaced whole where the definition changed. How far a table is built and what
definition built it are table properties, set in the same commit as the rows: interrupted anywhere, the table is the old or the
new state. See docs/decisions/0003-one-commit-per-model.md.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import time
from collections.abc import Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import duckdb
import pyarrow as pa
from dbt.adapters.duckdb.plugins import BasePlugin
from dbt.adapters.duckdb.utils import TargetConfig
from dbt.flags import get_flags
from dbt_common.events.base_types import EventLevel
from dbt_common.events.event_manager_client import add_logger_to_manager
from dbt_common.events.logger import LineFormat, LoggerConfig
from dbt_common.exceptions import DbtRuntimeError, env_secrets, scrub_secrets
from dbt_common.invocation import get_invocation_id
from pyiceberg.expressions import AlwaysTrue, And, BooleanExpression, GreaterThanOrEqual, LessThan
from pyiceberg.table import Table, Transaction

from warehouse.builds import (
    BUILD_SECONDS,
    DEFINITION,
    MEANINGS,
    built_until_of,
    closed_until,
    known_meanings,
    refuse_changed_meaning,
)
from warehouse.connections import prepare_connection
from warehouse.errors import HeadraceError, disk_full_said
from warehouse.features.compute_model import model_chunks
from warehouse.features.compute_source import Relations
from warehouse.features.declarations import load_attributes, load_groups
from warehouse.features.kinds.declared import load_kinds
from warehouse.features.lineage import described
from warehouse.features.meanings import table_meanings
from warehouse.features.render import macros_digest
from warehouse.home import Home
from warehouse.lake import BUILT_UNTIL, Lake, append_files, write_chunks
from warehouse.landing import create_tables


@contextlib.contextmanager
def _said_by_dbt() -> Iterator[None]:
    """dbt prints its own errors as a message, any other with a stack trace around it."""
    try:
        with disk_full_said(Home.from_env().path):
            yield
    except HeadraceError as error:
        raise DbtRuntimeError(str(error)) from error


class Plugin(BasePlugin):
    """Registered in `profiles.yml` under the alias `lake`."""

    @_said_by_dbt()
    def initialize(self, plugin_config: dict[str, Any]) -> None:
        home = Home.from_env()
        self.lock = _only_build(home)
        _log_to(home.dbt / "logs" / "dbt.log")
        self.lake = Lake.open(home)

    @_said_by_dbt()
    def configure_connection(self, conn: duckdb.DuckDBPyConnection) -> None:
        """Pins every Iceberg table to its current snapshot for this run, and publishes what the macros need to know."""
        self.connection = conn
        prepare_connection(conn)
        create_tables(self.lake)
        self.lake.create_views(conn)
        self.first_arrival = conn.execute("select min(landed_at) from lake.events").fetchall()[0][0]
        conn.execute("create schema if not exists headrace")
        conn.execute("create or replace table headrace.feature_groups (name varchar, meta varchar)")
        self.groups = load_groups(Path(get_flags().PROJECT_DIR))
        for group in self.groups.values():
            conn.execute("insert into headrace.feature_groups values (?, ?)", [group.name, json.dumps(group.as_meta())])
        conn.execute("create or replace table headrace.attributes (meta varchar)")
        attributes = [entry.as_meta() for entry in load_attributes(Path(get_flags().PROJECT_DIR))]
        conn.execute("insert into headrace.attributes values (?)", [json.dumps(attributes)])
        for table in load_kinds(Path(get_flags().PROJECT_DIR)).tables:
            conn.execute("insert into headrace.feature_groups values (?, ?)", [table.name, json.dumps(table.as_meta())])
        target = Home.from_env().dbt / "target"
        target.mkdir(exist_ok=True)
        (target / "features.json").write_text(json.dumps(described(self.groups), indent=2) + "\n")
        conn.execute("create or replace table headrace.builds (name varchar, built_until timestamptz, definition varchar)")
        for name in self.lake.tables():
            self._note_build(conn, self.lake.table(name))
        conn.execute("create or replace table headrace.run (closed_until timestamptz, macros_digest varchar)")
        conn.execute("insert into headrace.run values (?, ?)", [closed_until(conn), macros_digest()])

    @_said_by_dbt()
    def store(self, target_config: TargetConfig) -> None:
        """Commits what the model's SQL gives, or the features of the rows that it gives. `config`: sql, features_of (a group or
        none), event_time, start, end, partition_by, definition."""
        config = target_config.config
        name = f"{target_config.relation.schema}.{target_config.relation.identifier}"
        cursor = self.connection.cursor()
        cursor.execute("set TimeZone = 'UTC'")
        if self.lake.exists(name) and not config["full_refresh"]:
            self._refuse_changed_meaning(name, config["definition"])
        with contextlib.closing(self._chunks(cursor, config)) as chunks:
            self._commit(name, chunks, config)
        self.lake.create_view(cursor, name)
        self._note_build(cursor, self.lake.table(name))

    def _chunks(self, cursor: duckdb.DuckDBPyConnection, config: dict[str, Any]) -> Generator[pa.Table, None, None]:
        """The rows of a model, at least one table; those of a spine with its group's features are never whole in memory."""
        if features_of := config.get("features_of"):
            group = self.groups[features_of]
            relations, scratch = Relations.of(group), self.lake.scratch
            yield from model_chunks(cursor, config["sql"], group, relations, config["event_time"], scratch)
        else:
            yield cursor.execute(config["sql"]).to_arrow_table()

    def _refuse_changed_meaning(self, name: str, definition: str) -> None:
        table = self.lake.table(name)
        if table.properties.get(DEFINITION) != definition:
            before = known_meanings(table)
            refuse_changed_meaning(name, before, table_meanings(name, list(before), self.groups))

    def _commit(self, name: str, chunks: Iterator[pa.Table], config: dict[str, Any]) -> None:
        """One commit of all chunks, of which there is at least one."""
        started = time.perf_counter()
        start, end = datetime.fromisoformat(config["start"]), datetime.fromisoformat(config["end"])
        table = self.lake.table(name) if self.lake.exists(name) else None
        same = table is not None and table.properties.get(DEFINITION) == config["definition"]
        built_until = built_until_of(table) if table is not None and same else None
        self._refuse_gap(name, start, built_until)
        first = next(chunks)
        chunks = itertools.chain([first], chunks)
        if table is None:
            table = self.lake.create(name, first.schema, config["partition_by"])
        with table.transaction() as transaction:
            if built_until is None:
                _becomes(transaction, table, first.schema)
            files = write_chunks(transaction, table, chunks)
            beside = {BUILD_SECONDS: f"{time.perf_counter() - started:.3f}"}
            replaced = AlwaysTrue() if built_until is None else _between(config["event_time"], start, end)
            if table.current_snapshot() is not None and (built_until is None or start < built_until):
                transaction.delete(replaced, snapshot_properties=beside)
            if files or built_until is None or start < built_until:
                append_files(transaction, files, beside)
            reached = max(end, built_until or end)
            meanings = table_meanings(name, first.column_names, self.groups)
            transaction.set_properties(
                {BUILT_UNTIL: reached.isoformat(), DEFINITION: config["definition"], MEANINGS: json.dumps(meanings)}
            )

    def _refuse_gap(self, name: str, start: datetime, built_until: datetime | None) -> None:
        if built_until is not None and start > built_until:
            raise HeadraceError(f"{name} is built until {built_until}; a build from {start} would leave a gap")
        if built_until is None and self.first_arrival is not None and start > self.first_arrival:
            raise HeadraceError(
                f"{name} is not built by this definition yet, and events landed from {self.first_arrival} on; "
                f"a build from {start} would leave a gap: run dbt without --event-time-start first"
            )

    def _note_build(self, cursor: duckdb.DuckDBPyConnection, table: Table) -> None:
        name = ".".join(table.name())
        cursor.execute("delete from headrace.builds where name = ?", [name])
        cursor.execute(
            "insert into headrace.builds values (?, ?, ?)", [name, built_until_of(table), table.properties.get(DEFINITION)]
        )


def _only_build(home: Home) -> TextIO:
    """A lock that this process holds while the answer lives: dbt's scratch file takes one process at a time."""
    path = home.dbt / "build.lock"
    handle = path.open("w")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise HeadraceError(
            f"another dbt command runs on {home.path}; wait for it, or give this one a HEADRACE_HOME of its own"
        ) from None
    return handle


def _log_to(path: Path) -> None:
    """dbt's debug log, rotated by dbt: `log-path` of dbt_project.yml cannot depend on the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # on a full disk every line of the log would print a stack trace over the one that matters
    secrets = env_secrets()  # read once: dbt's own scrubber goes through the whole environment for every line
    add_logger_to_manager(
        LoggerConfig(
            name="headrace_file_log",
            level=EventLevel.DEBUG,
            line_format=LineFormat.DebugText,
            scrubber=lambda message: scrub_secrets(message, secrets),
            invocation_id=get_invocation_id(),
            output_file_name=str(path),
        )
    )


def _between(column: str, start: datetime, end: datetime) -> BooleanExpression:
    return And(GreaterThanOrEqual(column, start.isoformat()), LessThan(column, end.isoformat()))


def _becomes(transaction: Transaction, table: Table, schema: pa.Schema) -> None:
    """The table is of this schema, in the commit under way."""
    gone = {field.name for field in table.schema().fields} - set(schema.names)
    with transaction.update_schema(allow_incompatible_changes=True) as update:
        update.union_by_name(schema)
        for column in sorted(gone):
            update.delete_column(column)
