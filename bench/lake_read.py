"""Three ways for DuckDB to read an Iceberg table, timed in one run: its metadata file, Arrow from pyiceberg, a REST catalogue.

Makes a table of events, partitioned by hour, in a temporary folder. The REST catalogue is the smallest that DuckDB's ATTACH
accepts: FastAPI over the same SQLite catalogue, in this process, on a free port. Knows nothing of features.
See docs/decisions/0002-reading-the-lake.md.

    python -m bench.lake_read --events 1000000 --repeats 7
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import CommitFailedException, NoSuchNamespaceError, NoSuchTableError
from pyiceberg.table import CommitTableRequest

from warehouse.connections import duckdb_connection
from warehouse.events import EVENTS_SCHEMA, TIMESTAMP
from warehouse.home import Home
from warehouse.lake import Lake, quoted
from warehouse.landing import EVENTS

START_US = 1_767_225_600_000_000
HOUR_US = 3_600_000_000
WAYS = ("metadata file", "arrow", "rest")
FULL = "select event_type, count(*), count(distinct user_id), max(event_ts) from {events} group by all order by all"
FIRST = "select count(*) from {events}"
ONE_HOUR = "select count(*), count(distinct user_id) from {events} where landed_at >= {start} and landed_at < {end}"


def events_of_hour(hour: int, num_events: int) -> pa.Table:
    """One hour of arrivals, seeded by the hour."""
    random = np.random.default_rng(hour)
    landed = START_US + hour * HOUR_US + np.sort(random.integers(0, HOUR_US, num_events))
    columns = {
        "event_id": [f"{hour}-{number}" for number in range(num_events)],
        "event_type": np.array(["view", "click", "like", "watch"])[random.integers(0, 4, num_events)],
        "user_id": [f"u{number}" for number in random.integers(0, 20_000, num_events)],
        "note_id": [f"n{number}" for number in random.integers(0, 5_000, num_events)],
        "event_ts": pa.array(landed - random.integers(0, 5_000_000, num_events), TIMESTAMP),
        "landed_at": pa.array(landed, TIMESTAMP),
        "log_partition": random.integers(0, 2, num_events).astype(np.int32),
        "log_offset": np.arange(num_events) + hour * num_events,
        "landing": ["log"] * num_events,
    }
    missing = {field.name: pa.nulls(num_events, field.type) for field in EVENTS_SCHEMA if field.name not in columns}
    return pa.table({**columns, **missing}).select(EVENTS_SCHEMA.names).cast(EVENTS_SCHEMA)


def make_table(lake: Lake, num_events: int, hours: int) -> int:
    """Fills the table in one commit; returns the number of files."""
    lake.create(EVENTS, EVENTS_SCHEMA, {"landed_at": "hour"})
    lake.append(EVENTS, pa.concat_tables([events_of_hour(hour, num_events // hours) for hour in range(hours)]))
    return len(list(lake.table(EVENTS).scan().plan_files()))


# The REST catalogue: what DuckDB asks of one to list, read and insert.


def rest_catalogue(catalogue: SqlCatalog) -> FastAPI:
    """The part of the Iceberg REST specification that DuckDB 1.5 uses for tables that exist already."""
    app = FastAPI()
    commits = threading.Lock()

    def refuse(status: int, kind: str) -> Any:
        async def answer(_: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"error": {"message": str(error), "type": kind, "code": status}}, status)

        return answer

    app.add_exception_handler(NoSuchTableError, refuse(404, "NoSuchTableException"))
    app.add_exception_handler(NoSuchNamespaceError, refuse(404, "NoSuchNamespaceException"))
    app.add_exception_handler(CommitFailedException, refuse(409, "CommitFailedException"))

    def as_json(model: Any) -> Any:
        return json.loads(model.model_dump_json(by_alias=True, exclude_none=True))

    def commit(namespace: str, name: str, body: dict[str, Any]) -> Any:
        change = CommitTableRequest.model_validate({"identifier": {"namespace": [namespace], "name": name}, **body})
        with commits:
            return catalogue.commit_table(catalogue.load_table((namespace, name)), change.requirements, change.updates)

    @app.get("/v1/config")
    def config() -> dict[str, Any]:
        tables = "/v1/{prefix}/namespaces/{namespace}/tables"
        verbs = [f"GET {tables}", f"GET {tables}/{{table}}", f"HEAD {tables}/{{table}}", f"POST {tables}/{{table}}"]
        spaces = [
            "GET /v1/{prefix}/namespaces",
            "GET /v1/{prefix}/namespaces/{namespace}",
            "POST /v1/{prefix}/transactions/commit",
        ]
        return {"defaults": {}, "overrides": {"prefix": "lake"}, "endpoints": verbs + spaces}

    @app.get("/v1/lake/namespaces")
    def namespaces(parent: str | None = None) -> dict[str, Any]:
        return {"namespaces": [] if parent else [list(namespace) for namespace in catalogue.list_namespaces()]}

    @app.api_route("/v1/lake/namespaces/{namespace}", methods=["GET", "HEAD"])
    def namespace_properties(namespace: str) -> dict[str, Any]:
        return {"namespace": [namespace], "properties": catalogue.load_namespace_properties(namespace)}

    @app.get("/v1/lake/namespaces/{namespace}/tables")
    def tables_of(namespace: str) -> dict[str, Any]:
        return {"identifiers": [{"namespace": [namespace], "name": table[-1]} for table in catalogue.list_tables(namespace)]}

    @app.api_route("/v1/lake/namespaces/{namespace}/tables/{name}", methods=["GET", "HEAD"])
    def table(namespace: str, name: str) -> dict[str, Any]:
        found = catalogue.load_table((namespace, name))
        return {"metadata-location": found.metadata_location, "metadata": as_json(found.metadata), "config": {}}

    @app.post("/v1/lake/namespaces/{namespace}/tables/{name}")
    def change(namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        done = commit(namespace, name, body)
        return {"metadata-location": done.metadata_location, "metadata": as_json(done.metadata)}

    @app.post("/v1/lake/transactions/commit")
    def change_many(body: dict[str, Any]) -> Response:
        for one in body["table-changes"]:  # one after the other: not atomic over tables
            commit(one["identifier"]["namespace"][0], one["identifier"]["name"], one)
        return Response(status_code=204)

    return app


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """Serves in a thread of this process on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class Way:
    """`relation` gives the text that stands for the table on a connection that `open` made; `append` writes rows."""

    open: Callable[[], duckdb.DuckDBPyConnection]
    relation: Callable[[duckdb.DuckDBPyConnection, str | None], str]
    append: Callable[[pa.Table], None]


def ways(lake: Lake, port: int) -> dict[str, Way]:
    def metadata_file(connection: duckdb.DuckDBPyConnection, row_filter: str | None) -> str:
        return f"iceberg_scan({quoted(lake.table(EVENTS).metadata_location.removeprefix('file://'))})"

    def arrow(connection: duckdb.DuckDBPyConnection, row_filter: str | None) -> str:
        connection.register("events", lake.scan(EVENTS, row_filter))
        return "events"

    def attached() -> duckdb.DuckDBPyConnection:
        connection = duckdb_connection()
        connection.execute(
            f"attach 'lake' as rest (type iceberg, endpoint 'http://127.0.0.1:{port}', authorization_type 'none', "
            "access_delegation_mode 'none')"
        )
        return connection

    def insert(rows: pa.Table) -> None:
        with attached() as connection:
            connection.register("fresh", rows)
            connection.execute("insert into rest.lake.events select * from fresh")

    return {
        "metadata file": Way(duckdb_connection, metadata_file, lambda rows: lake.append(EVENTS, rows)),
        "arrow": Way(duckdb_connection, arrow, lambda rows: lake.append(EVENTS, rows)),
        "rest": Way(attached, lambda connection, row_filter: "rest.lake.events", insert),
    }


def interleaved(repeats: int, works: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, Any]]:
    """Per way, the median time of its work and its last answer. In turns, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    answers = {name: work() for name, work in works.items()}  # warms up
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            answers[name] = work()
            seconds[name].append(time.perf_counter() - began)
    return {name: (statistics.median(seconds[name]), answers[name]) for name in works}


def answer(way: Way, connection: duckdb.DuckDBPyConnection, text: str, hour: tuple[int, int] | None = None) -> list[Any]:
    """The rows of a query; `hour` is [start, end) in microseconds, for ways that filter before DuckDB sees a row."""
    start_us, end_us = hour or (0, 0)
    row_filter = f"landed_at >= '{np.datetime64(start_us, 'us')}+00:00' and landed_at < '{np.datetime64(end_us, 'us')}+00:00'"
    events = way.relation(connection, row_filter if hour else None)
    filled = text.format(events=events, start=f"make_timestamptz({start_us})", end=f"make_timestamptz({end_us})")
    return connection.execute(filled).fetchall()


def first_answer(way: Way) -> list[Any]:
    with way.open() as connection:
        return answer(way, connection, FIRST)


def write_and_read(way: Way, hours: Iterator[int], num_events: int) -> bool:
    """Writes one more hour; whether a new reader counts it."""
    hour = next(hours)
    way.append(events_of_hour(hour, num_events))
    return first_answer(way) == [((hour + 1) * num_events,)]


def run(num_events: int, hours: int, repeats: int) -> dict[str, Any]:
    """All ways on one table: first the reads, then the writes. Raises ValueError if their answers differ."""
    with tempfile.TemporaryDirectory(prefix="lake_read_") as folder, contextlib.ExitStack() as stack:
        lake = Lake.open(Home(Path(folder)))
        num_files = make_table(lake, num_events, hours)
        three = ways(lake, stack.enter_context(serving(rest_catalogue(lake.catalogue))))
        opened = {name: stack.enter_context(way.open()) for name, way in three.items()}
        hour = (START_US + hours // 2 * HOUR_US, START_US + (hours // 2 + 1) * HOUR_US)
        fresh = itertools.count(hours)
        works: dict[str, Callable[[str, Way], Any]] = {
            "open, first query": lambda name, way: first_answer(way),
            "full aggregate": lambda name, way: answer(way, opened[name], FULL),
            "one hour": lambda name, way: answer(way, opened[name], ONE_HOUR, hour),
            "write, read an hour": lambda name, way: write_and_read(way, fresh, num_events // hours),
        }
        results = {
            step: interleaved(repeats, {name: functools.partial(work, name, way) for name, way in three.items()})
            for step, work in works.items()
        }
    for step, result in results.items():
        answers = [found for _, found in result.values()]
        if answers.count(answers[0]) != len(answers) or answers[0] is False:
            raise ValueError(f"{step}: the ways disagree: {answers}")
    return {
        "num_events": num_events,
        "num_files": num_files,
        "repeats": repeats,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "duckdb": duckdb.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "median_s": {step: {name: median for name, (median, _) in result.items()} for step, result in results.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--hours", type=int, default=48, help="hours, and so partitions and files, that the events lie in")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args()
    report = run(given.events, given.hours, given.repeats)
    if given.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['num_events']:,} events in {report['num_files']} files; medians of {report['repeats']}")
    print(f"{report['machine']}, DuckDB {report['duckdb']}, load average {report['load_average']}")
    print(f"{'':<22}" + "".join(f"{name:>20}" for name in WAYS))
    for step, medians in report["median_s"].items():
        cells = [f"{medians[name]:.3f} s ({medians[name] / medians[WAYS[0]]:.2f}x)" for name in WAYS]
        print(f"{step:<22}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
