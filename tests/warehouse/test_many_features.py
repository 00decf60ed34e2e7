"""A thousand features of one group: declared, built and computed point in time, in bounded memory."""

import multiprocessing
from datetime import timedelta
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest

from tests.parity.generated_events import event_log
from warehouse.events import TIMESTAMP
from warehouse.features import render, verify
from warehouse.features.compute import compute
from warehouse.features.compute_source import RETRACTIONS, SHADOWED, Relations
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.generated import START_US, as_table
from warehouse.features.oracle import Read, values
from warehouse.home import Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, newest_tick

NUM_MEASURES, WINDOWS, NUM_EVENTS, NUM_READS = 200, "[1h, 6h, 1d, 7d, 30d]", 3_000, 1_000
MOST_BYTES = 3 << 29
"""Twice what is needed with the interpreter and its libraries; the SQL for keys with retractions once took 5.9 GB."""


def declared(folder: Path) -> FeatureGroup:
    """Counts of each type above a bound of watch time, every fourth a sum."""
    lines = []
    for number in range(NUM_MEASURES):
        kind, bound = ("view", "click", "like", "watch")[number % 4], number // 4
        if kind == "watch":
            lines.append(
                f"{{name: ms_{number}, aggregation: sum, of: watch_ms, where: watch_ms > {bound}, windows: {WINDOWS}}}"
            )
        else:
            where = f"event_type = '{kind}' and coalesce(watch_ms, {bound}) >= {bound}"
            lines.append(f'{{name: num_{number}, aggregation: count, where: "{where}", windows: {WINDOWS}}}')
    measures = "".join(f"            - {line}\n" for line in lines)
    models = folder / "warehouse" / "models"
    models.mkdir(parents=True)
    (models / "many.yml").write_text(
        "models:\n  - name: stg_engagements\n"
        "    columns: [{name: event_type}, {name: note_id}, {name: watch_ms, data_type: bigint}]\n"
        "  - name: many\n    config:\n      meta:\n        features:\n          entity: note\n"
        f"          events: stg_engagements\n          keys: [note_id]\n          measures:\n{measures}"
    )
    return load_groups(folder)["many"]


def reads(events: list[dict]) -> list[Read]:
    random, asked = Random(2), []
    for _ in range(NUM_READS):
        event = random.choice([event for event in events if event["note_id"]])
        request_us = max(event["event_ts"], event["landed_at"]) + random.randrange(DAY_US)
        tick_us = newest_tick(request_us)
        asked.append(Read((event["note_id"],), request_us, tick_us, tick_us))
    return asked


def answer(folder: Path) -> tuple[list[dict], int]:
    """The first rows of the answer and the most memory that this process had, in bytes."""
    group, lake = declared(folder), Lake.open(Home(folder / "home"))
    events = event_log(Random(1), NUM_EVENTS, num_retractions=10)
    built_until_us = max(event["landed_at"] for event in events) // FIVE_MINUTES_US * FIVE_MINUTES_US + 2 * DAY_US
    built_until = pa.scalar(built_until_us, pa.int64()).cast(TIMESTAMP).as_py() + timedelta(minutes=5)

    def store(name: str, sql: str) -> None:
        with lake.duckdb() as connection:
            connection.register("log", as_table(events))
            rows = connection.execute(sql).to_arrow_table()
        with lake.create(name, rows.schema).transaction() as transaction:
            transaction.append(rows)
            transaction.set_properties({BUILT_UNTIL: built_until.isoformat()})

    names = Relations.of(group)
    store(names.events, render.staging_sql("log"))
    store(SHADOWED, render.shadowed_sql("log"))
    store(RETRACTIONS, render.retractions_sql("log"))
    store(verify.RETRACTED, render.retracted_sql(names.events, RETRACTIONS))
    store(names.blocks, render.block_sql(group, names.events, verify.RETRACTED))
    store(names.hours, render.roll_up_sql(group, names.blocks, 60))
    store(names.days, render.roll_up_sql(group, names.hours, 1440))
    asked = reads(events)
    spine = pa.table(
        {
            "note_id": [read.key[0] for read in asked],
            "request_ts": pa.array([read.request_us for read in asked], pa.int64()).cast(TIMESTAMP),
        }
    )
    found = compute(lake, spine, groups={group.name: group})
    assert found.num_rows == NUM_READS
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return found.slice(0, 2).to_pylist(), int(status["VmHWM"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc/self/status")
def test_a_thousand_features_are_computed_in_bounded_memory(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: the peak of this one says nothing
        rows, peak_bytes = pool.apply(answer, (tmp_path,))
    group = load_groups(tmp_path)["many"]
    events = event_log(Random(1), NUM_EVENTS, num_retractions=10)
    assert min(event["landed_at"] for event in events) < START_US + DAY_US
    assert len(group.feature_names) == 1_000
    for row, read in zip(rows, reads(events), strict=False):
        expected = values(group, events, read)
        assert {name: row[name] for name in group.feature_names} == expected
        assert sum(value != 0 for value in expected.values()) > 100
    assert peak_bytes < MOST_BYTES, f"{peak_bytes / 2**20:.0f} MiB"
