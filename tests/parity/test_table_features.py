"""`kind: table` in every execution against its oracle, on generated tables with ties, nulls and rows that come late."""

import json
import math
import os
import random
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from streaming_sql.table_store import TableStore
from tests import forked
from tests.warehouse.dbt_command import dbt
from tests.warehouse.test_dbt_project import copied  # noqa: F401
from warehouse.events import EVENTS_SCHEMA, TIMESTAMP
from warehouse.features.compute import compute
from warehouse.features.kinds.declared import Kinds, TableFeatures
from warehouse.features.kinds.table_oracle import table_values
from warehouse.features.kinds.values import Typed
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US, newest_tick

NOON_US = 1_767_268_800_000_000
KEYS = [("1", "23"), ("12", "3"), ("ü", "☃"), ("1", "2")]
RELATION = "outside.affinity"


def declared(available_at: str = "loaded_at", tie: tuple[str, ...] = ("version",)) -> TableFeatures:
    columns = (
        ("score", Typed("user_author_score", "double", 0.5, (), "")),
        ("num_days", Typed("user_author_num_days", "bigint", None, (), "")),
        ("is_close", Typed("user_author_is_close", "boolean", False, (), "")),
    )
    order = (*tie, *(column for column, _ in columns))
    return TableFeatures(
        "affinity", "user_author", ("user_id", "author_id"), RELATION, "scored_at", available_at, order, columns, "here"
    )


def generated(seed: int, num_rows: int = 120) -> list[dict]:
    """Rows within two hours: few distinct times, so that they tie; some without a time, a key, a value or an arrival."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        key = draw.choice(KEYS)
        scored = NOON_US + draw.randrange(24) * FIVE_MINUTES_US + draw.choice((0, 0, 1, 90_000_000, FIVE_MINUTES_US - 1))
        late = draw.choice((0, 0, 1_000_000, 31_000_000, 20 * MINUTE_US, 70 * MINUTE_US))
        rows.append(
            {
                "user_id": None if draw.random() < 0.03 else key[0],
                "author_id": key[1],
                "scored_at": None if draw.random() < 0.03 else scored,
                "loaded_at": None if draw.random() < 0.1 else scored + late,
                "version": draw.choice((None, 1, 2)),
                "score": draw.choice((None, 0.0, 0.25, -1.5)),
                "num_days": draw.choice((None, 0, 7)),
                "is_close": draw.choice((None, True, False)),
            }
        )
    return rows


SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("author_id", pa.string()),
        ("scored_at", TIMESTAMP),
        ("loaded_at", TIMESTAMP),
        ("version", pa.int64()),
        ("score", pa.float64()),
        ("num_days", pa.int64()),
        ("is_close", pa.bool_()),
    ]
)


def as_instants(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def spine_of(seed: int, num_rows: int = 300) -> tuple[pa.Table, list[tuple]]:
    """(spine with K in `known`, (key, t, K) per row): t on boundaries and off them, K = T, before and long after."""
    draw = random.Random(1000 + seed)
    reads = []
    for _ in range(num_rows):
        t = NOON_US + draw.randrange(30) * FIVE_MINUTES_US + draw.choice((0, 1, 29_999_999, 30_000_000, 90_000_000, 90_000_001))
        tick = newest_tick(t)
        reads.append((draw.choice([*KEYS, ("nobody", "23")]), t, tick + draw.choice((0, 0, 0, -2, 6, 40)) * FIVE_MINUTES_US))
    spine = pa.table(
        {
            "user_id": [key[0] for key, _, _ in reads],
            "author_id": [key[1] for key, _, _ in reads],
            "request_ts": pa.array([t for _, t, _ in reads], TIMESTAMP),
            "known": pa.array([known for _, _, known in reads], TIMESTAMP),
        }
    )
    return spine, reads


@pytest.fixture
def lake(tmp_path) -> Lake:
    lake = Lake.open(Home(tmp_path / "home"))
    lake.create(RELATION, SCHEMA)
    return lake


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", [{}, {"available_at": "scored_at"}, {"tie": ()}])
def test_compute_equals_the_oracle_as_served_and_as_corrected(lake, seed, variant):
    table, rows = declared(**variant), generated(seed)
    lake.append(RELATION, as_instants(rows))
    spine, reads = spine_of(seed)
    for known_at in (None, "known"):
        found = compute(lake, spine, None, known_at, groups={}, kinds=Kinds(tables=(table,)))
        assert found.column_names[:4] == spine.column_names
        for row, (key, t, known) in enumerate(reads):
            expected = table_values(table, rows, key, t, newest_tick(t) if known_at is None else known)
            got = {name: found[name][row].as_py() for name in table.feature_names}
            assert got == expected, (seed, key, t, known_at)


@pytest.mark.parametrize("seed", range(6))
def test_one_column_alone_is_told_apart_as_all_are(lake, seed):
    table, rows = declared(tie=()), generated(seed)
    lake.append(RELATION, as_instants(rows))
    spine, _ = spine_of(seed)
    kinds = Kinds(tables=(table,))
    together = compute(lake, spine, None, "known", groups={}, kinds=kinds)
    alone = compute(lake, spine, ["user_author_is_close"], "known", groups={}, kinds=kinds)
    assert alone["user_author_is_close"].equals(together["user_author_is_close"])


@pytest.mark.parametrize("seed", range(6))
def test_the_store_equals_the_oracle_at_every_tick_it_holds_and_after_a_load(lake, seed):
    table, rows = declared(), generated(seed)
    early = [row for row in rows if (row["loaded_at"] or row["scored_at"] or 0) < NOON_US + 60 * MINUTE_US]
    lake.append(RELATION, as_instants(early))
    store = TableStore(lake, [table])
    tick = NOON_US + 30 * MINUTE_US
    store.refresh(tick)
    keys = [*KEYS, ("nobody", "23")]

    def check(at: int, known: list[dict]) -> None:
        matrix = store.assemble(table, keys, at)
        for place, key in enumerate(keys):
            expected = table_values(table, known, key, at + FIVE_MINUTES_US, at)
            got = matrix.values[place].tolist()
            assert [None if math.isnan(value) else value for value in got] == [
                None if value is None else float(value) for value in expected.values()
            ], (seed, at, key)

    for at in range(tick - FIVE_MINUTES_US, tick + 8 * FIVE_MINUTES_US, FIVE_MINUTES_US):
        check(at, early)
    lake.append(RELATION, as_instants([row for row in rows if row not in early]))
    later = NOON_US + 60 * MINUTE_US
    store.refresh(later)
    for at in range(later - FIVE_MINUTES_US, later + 20 * FIVE_MINUTES_US, FIVE_MINUTES_US):
        check(at, rows)


def test_a_worked_example(lake):
    """Scored at 12:00 and loaded at once; corrected at 12:07, for 12:00, which is known from the tick 12:10 on."""
    table = declared()
    base = {"user_id": "1", "author_id": "23", "version": 1, "num_days": 1, "is_close": True}
    first = base | {"scored_at": NOON_US, "loaded_at": NOON_US, "score": 1.0}
    second = base | {"scored_at": NOON_US, "loaded_at": NOON_US + 7 * MINUTE_US, "score": 2.0}
    lake.append(RELATION, as_instants([second, first]))
    minutes = [0, 5, 6, 10, 11]
    times = [datetime.fromtimestamp((NOON_US + minute * MINUTE_US) / 1e6, UTC) for minute in minutes]
    spine = pa.table(
        {
            "user_id": ["1"] * 5,
            "author_id": ["23"] * 5,
            "request_ts": pa.array(times, TIMESTAMP),
        }
    )
    found = compute(lake, spine, ["user_author_score"], groups={}, kinds=Kinds(tables=(table,)))
    assert found["user_author_score"].to_pylist() == [0.5, 0.5, 1.0, 1.0, 2.0]  # 12:05 and 12:10 still read the tick before


SOURCE = """version: 2
sources:
  - name: outside
    tables:
      - name: affinity
        config:
          meta:
            features:
              kind: table
              entity: user_author
              keys: [user_id, author_id]
              event_time: scored_at
              available_at: loaded_at
              tie: [version]
              columns:
                - {name: score, type: double, empty: 0.5}
                - {name: num_days, type: bigint}
                - {name: is_close, type: boolean, empty: false}
        columns:
          [{name: user_id}, {name: author_id}, {name: scored_at}, {name: loaded_at}, {name: version}, {name: score},
           {name: num_days}, {name: is_close}]
"""
MODEL = """{{ config(materialized='lake_incremental', event_time='known_at') }}
with spine as (
    select row_id, user_id, author_id, request_ts, known_at
    from {{ source('outside', 'spine') }}
    where {{ in_build_range('known_at') }}
)

select found.*, spine.known_at
from ({{ features_of_table('affinity', 'spine', source('outside', 'affinity')) }}) as found
inner join spine on found.row_id = spine.row_id
"""


def test_dbt_builds_what_the_oracle_says(tmp_path, lake, copied):  # noqa: F811
    table, rows = declared(), generated(7)
    lake.append(RELATION, as_instants(rows))
    spine, reads = spine_of(7)
    spine = spine.rename_columns(["user_id", "author_id", "request_ts", "known_at"])
    spine = spine.append_column("row_id", pa.array(range(spine.num_rows), pa.int64()))
    lake.create("outside.spine", spine.schema)
    lake.append("outside.spine", spine)
    lake.create(EVENTS, EVENTS_SCHEMA, {"landed_at": "hour"})
    last = NOON_US + 30 * 60 * MINUTE_US
    beats = [{"event_id": f"h{part}", "event_type": "heartbeat", "log_partition": part} for part in (0, 1)]
    common = {"event_ts": last, "landed_at": last, "log_offset": 0, "landing": "log"}
    lake.append(EVENTS, pa.Table.from_pylist([common | beat for beat in beats], schema=EVENTS_SCHEMA))
    models = copied / "warehouse" / "models" / "training"
    (models / "_affinity.yml").write_text(SOURCE + "      - name: spine\n")
    (models / "impression_affinity.sql").write_text(MODEL)
    dbt(Home(tmp_path / "home"), "run", "--select", "impression_affinity", project=copied)
    built = {row["row_id"]: row for row in lake.scan("training.impression_affinity").to_pylist()}
    assert len(built) == len(reads)
    for row, (key, t, known) in enumerate(reads):
        expected = table_values(table, rows, key, t, known)
        assert {name: built[row][name] for name in table.feature_names} == expected, (key, t, known)
    shown = json.loads(listed(copied, Home(tmp_path / "home")))
    assert {"user_author_score", "user_author_num_days"} <= {row["feature"] for row in shown}


def listed(project: Path, home: Home) -> str:
    """What `headrace features list --json` prints in a project folder."""
    code = "import sys; from warehouse.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "HEADRACE_HOME": str(home.path), "PYTHONPATH": str(project)}
    finished = forked.python(code, "features", "list", "--json", cwd=project, environment=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
