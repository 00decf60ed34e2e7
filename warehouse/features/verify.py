"""`headrace features verify`: the project's own declarations, batch SQL and `compute`, against the oracle on generated events.

The events are late, early, duplicated (also with another payload, also after the duplicate memory), retracted (also before they
arrive, twice, and for nothing), tied, null, out of order, on boundaries and in two log partitions, one of which lags. Keys and
values come from the declared expressions, so that their conditions are met, missed and met by NULL. Nothing of the lake is read
or written.
"""

import argparse
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import duckdb
import pyarrow as pa
import sqlglot
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sqlglot import expressions as exp

from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, RETRACTION, TIMESTAMP
from warehouse.features import render
from warehouse.features.compute_engine import Engine
from warehouse.features.compute_plan import plan
from warehouse.features.compute_source import RETRACTIONS, SHADOWED, STAGING, Relations
from warehouse.features.compute_spine import Spine
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.oracle import Read, values
from warehouse.time_algebra import (
    DAY_US,
    DUPLICATE_MEMORY_US,
    FIVE_MINUTES_US,
    FURTHEST_AHEAD_US,
    GRACE_US,
    HOUR_US,
    MINUTE_US,
    SECOND_US,
    floor_5m,
    newest_tick,
)

STAGED = "stg_engagements"
RETRACTED = f"{STAGING}.stg_retracted_events"
START_US = 1_767_225_600_000_000
"""2026-01-01 00:00 UTC."""
SPREAD_US = 3 * DAY_US
EDGES_US = (0, 0, -1, 1, SECOND_US, 2 * MINUTE_US, FIVE_MINUTES_US - 1)
DELAYS_US = (0, 0, 1, SECOND_US, GRACE_US - 1, GRACE_US, GRACE_US + 1, 4 * MINUTE_US, 70 * MINUTE_US, 26 * HOUR_US, 6 * DAY_US)
AHEAD_US = (MINUTE_US, 8 * MINUTE_US, FURTHEST_AHEAD_US)
RETRACTED_AFTER_US = (0, SECOND_US, 2 * MINUTE_US, HOUR_US, 2 * DAY_US, 9 * DAY_US, -2 * MINUTE_US, -HOUR_US, -8 * DAY_US)
IDS = ("1", "12", "23", "3", "é", "a b", *(f"k{number}" for number in range(10)))
"""Ids that collide when composite keys are concatenated ((1, 23) and (12, 3)), and some that are not plain ASCII."""
READS_PER_GROUP = 30
FIRST_DIFFERENCES = 5


@dataclass
class Verdict:
    """What became of one group: values compared and equal by each execution, and the first that differ."""

    group: str
    compared: dict[str, int] = field(default_factory=dict)
    equal: dict[str, int] = field(default_factory=dict)
    not_empty: int = 0
    differences: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def agrees(self) -> bool:
        return self.compared == self.equal


Answers = Iterator[tuple[str, Read, Mapping[str, Any]]]
"""(group, question, its answer with maps as pairs)."""
Execution = Callable[[Mapping[str, FeatureGroup], Sequence[Mapping[str, Any]], Random], Answers]
"""A way to answer that is not of this room: it is given groups and generated rows, and puts its own questions."""


def main(words: Sequence[str], others: Mapping[str, Execution] | None = None) -> int:
    """Runs `features verify WORDS`: 0 when everything agrees, 1 with the first differences. others: executions by name that are
    held to the oracle besides batch SQL and `compute`."""
    parser = argparse.ArgumentParser(
        prog="headrace features verify",
        description="Computes the declared features on generated events, by "
        f"{', '.join(('batch SQL', '`compute`', *(f'the {name}' for name in others or {})))}, "
        "and compares every value with the oracle: the definition written plainly.",
        epilog="examples:\n  headrace features verify\n  headrace features verify --seed 7 --seeds 1 --events 2000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the first seed (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many event logs (default %(default)s)")
    parser.add_argument("--events", type=int, default=10_000, metavar="N", help="events per log (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    given = parser.parse_args(words)
    if given.seeds < 1 or not 10 <= given.events <= 1_000_000:
        raise HeadraceError(f"--seeds must be at least 1 and --events 10 to 1,000,000, got {given.seeds} and {given.events}")
    groups = load_groups()
    verdicts = {name: Verdict(name) for name in groups}
    with Progress(console=Console(stderr=True), disable=given.json) as progress:
        task = progress.add_task("verifying", total=given.seeds * len(groups))
        for seed in range(given.seed, given.seed + given.seeds):
            for group in verify(groups, seed, given.events, verdicts, others=others):
                progress.update(task, advance=1, description=f"seed {seed}: {group}")
    if given.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts.values()], indent=2, default=str))
    else:
        _print(verdicts.values(), given)
    if not any(verdict.compared for verdict in verdicts.values()):
        raise HeadraceError(
            f"nothing was verified: no group reads {STAGED}, the only event model that events are generated for"
        )
    return 0 if all(verdict.agrees for verdict in verdicts.values()) else 1


def _print(verdicts: Collection[Verdict], given: argparse.Namespace) -> None:
    table = Table("group", "execution", "compared", "equal", box=None)
    for verdict in verdicts:
        if verdict.skipped:
            table.add_row(verdict.group, verdict.skipped, "", "")
        for execution, compared in verdict.compared.items():
            table.add_row(verdict.group, execution, f"{compared:,}", f"{verdict.equal[execution]:,}")
    Console().print(table)
    last = given.seed + given.seeds - 1
    not_empty = sum(verdict.not_empty for verdict in verdicts)
    of = sum(verdict.compared.get("batch SQL", 0) for verdict in verdicts)
    print(f"seeds {given.seed} to {last}, {given.events:,} generated events each; {not_empty:,} of {of:,} values not empty")
    for verdict in verdicts:
        for difference in verdict.differences:
            print(f"differs: {difference}")


def verify(
    groups: Mapping[str, FeatureGroup],
    seed: int,
    num_events: int,
    verdicts: Mapping[str, Verdict],
    num_reads: int = READS_PER_GROUP,
    others: Mapping[str, Execution] | None = None,
) -> Iterator[str]:
    """Adds one seed's comparisons to the verdicts; yields the name of each group as it is done."""
    random = Random(seed)
    ours = {name: group for name, group in groups.items() if group.events == STAGED}
    rows = generated_events(random, list(ours.values()), num_events)
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.register("generated", _as_table(rows))
        for schema in (STAGING, "features"):
            connection.execute(f"create schema {schema}")
        connection.execute(f"create table {STAGING}.{STAGED} as {render.staging_sql('generated')}")
        connection.execute(f"create table {SHADOWED} as {render.shadowed_sql('generated')}")
        connection.execute(f"create table {RETRACTIONS} as {render.retractions_sql('generated')}")
        connection.execute(f"create table {RETRACTED} as {render.retracted_sql(f'{STAGING}.{STAGED}', RETRACTIONS)}")
        for name, group in groups.items():
            verdict = verdicts[name]
            if name in ours:
                _verify_group(connection, group, rows, random, num_reads, verdict, seed)
            else:
                verdict.skipped = f"not verified: it reads {group.events}, and events are generated for {STAGED}"
            yield name
    for execution, answered in (others or {}).items():
        for name, read, answer in answered(ours, rows, random):
            expected = values(ours[name], _related(ours[name], rows, read), read)
            held = {feature: in_float64(value) for feature, value in expected.items()}
            _compare(execution, [answer], [read], [held], verdicts[name], seed)


def _verify_group(
    connection: duckdb.DuckDBPyConnection,
    group: FeatureGroup,
    rows: list[dict[str, Any]],
    random: Random,
    num_reads: int,
    verdict: Verdict,
    seed: int,
) -> None:
    relations = Relations.of(group)
    connection.execute(f"create table {relations.blocks} as {render.block_sql(group, relations.events, RETRACTED)}")
    connection.execute(f"create table {relations.hours} as {render.roll_up_sql(group, relations.blocks, 60)}")
    connection.execute(f"create table {relations.days} as {render.roll_up_sql(group, relations.hours, 1440)}")
    reads = _reads(random, group, rows, num_reads)
    expected = [values(group, _related(group, rows, read), read) for read in reads]
    as_spine = [read.known_position is None and read.tick_us == newest_tick(read.request_us) for read in reads]
    asked = [read for read, fits in zip(reads, as_spine, strict=True) if fits and None not in read.key]
    wanted = [value for read, value, fits in zip(reads, expected, as_spine, strict=True) if fits and None not in read.key]
    _compare("batch SQL", _by_sql(connection, group, relations, reads), reads, expected, verdict, seed)
    _compare("compute", _by_compute(connection, group, relations, asked), asked, wanted, verdict, seed)
    verdict.not_empty += sum(value not in (None, 0, [], {}) for answer in expected for value in answer.values())


def _by_sql(
    connection: duckdb.DuckDBPyConnection, group: FeatureGroup, relations: Relations, reads: Sequence[Read]
) -> list[dict[str, Any]]:
    spine = _spine(
        group, reads, {"feature_watermark": [r.tick_us for r in reads], "known_at": [r.known_tick_us for r in reads]}
    )
    spine = spine.append_column("row_id", pa.array(range(len(reads)), pa.int64()))
    spine = spine.append_column("known_position", pa.array([read.known_position for read in reads], pa.list_(pa.int64())))
    connection.register("verify_spine", spine)
    sql = render.point_in_time_sql(group, "verify_spine", **asdict(relations))
    return connection.execute(f"select * from ({sql}) as answers order by row_id").to_arrow_table().to_pylist()


def _by_compute(
    connection: duckdb.DuckDBPyConnection, group: FeatureGroup, relations: Relations, reads: Sequence[Read]
) -> list[dict[str, Any]]:
    if not reads:
        return []
    spine = Spine(_spine(group, reads, {"known_at": [read.known_tick_us for read in reads]}), "the generated spine")
    what = plan({group.name: group}, spine.schema.names, None)
    engine = Engine(connection, {group.name: relations}, what, spine.span(what.keys, "known_at"))
    return [
        row
        for chunk in spine.chunks(rows=len(reads) // 2 + 1)
        for row in pa.table(engine.columns(spine.reads(chunk, what.keys, "known_at"))).to_pylist()
    ]


def _spine(group: FeatureGroup, reads: Sequence[Read], times: Mapping[str, list[int]]) -> pa.Table:
    columns = {key: pa.array([read.key[at] for read in reads], pa.string()) for at, key in enumerate(group.entity_keys)}
    instants = {"request_ts": [read.request_us for read in reads], **times}
    return pa.table({**columns, **{name: pa.array(found, pa.int64()).cast(TIMESTAMP) for name, found in instants.items()}})


def _compare(
    execution: str,
    answers: Sequence[Mapping[str, Any]],
    reads: Sequence[Read],
    expected: Sequence[Mapping[str, Any]],
    verdict: Verdict,
    seed: int,
) -> None:
    assert len(answers) == len(reads)
    for read, answer, wanted in zip(reads, answers, expected, strict=True):
        for feature, value in wanted.items():
            verdict.compared[execution] = verdict.compared.get(execution, 0) + 1
            same = _is_same(answer[feature], value)
            verdict.equal[execution] = verdict.equal.get(execution, 0) + same
            if not same and len(verdict.differences) < FIRST_DIFFERENCES:
                verdict.differences.append(
                    f"seed {seed}, {execution}, {feature} of {read.key}: {answer[feature]!r}, the oracle says {value!r}; {read}"
                )


def _is_same(got: Any, expected: Any) -> bool:
    """Integers and lists exactly, doubles within 1e-9 relative, NULL as NULL; maps have the same entries in the same order."""
    if isinstance(expected, list):
        return (got or []) == expected
    if isinstance(expected, dict):
        same = [entry for entry, _ in got] == list(expected)
        return same and all(map(_is_same, (number for _, number in got), expected.values()))
    if isinstance(expected, float) and got is not None:
        return math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12)
    return got == expected


def in_float64(value: Any) -> Any:
    """As a feature is held in memory: integers beyond 2^53 are rounded."""
    if isinstance(value, dict):
        return {entry: in_float64(number) for entry, number in value.items()}
    return float(value) if isinstance(value, int) and abs(value) > 2**53 else value


def _related(group: FeatureGroup, rows: list[dict[str, Any]], read: Read) -> list[dict[str, Any]]:
    """The rows that can bear on a key: every arrival of each event_id that ever came with it, and of each that retracts one.
    The oracle looks at each row for each value, and duplicates are a matter of one id, so the others change nothing."""
    ids = {row["event_id"] for row in rows if tuple(row[key] for key in group.entity_keys) == read.key}
    ids |= {row["event_id"] for row in rows if row["retracts"] in ids}
    return [row for row in rows if row["event_id"] in ids]


def generated_events(random: Random, groups: Collection[FeatureGroup], number: int) -> list[dict[str, Any]]:
    """Rows of `lake.events` with times in microseconds, in order of landing, and the typed columns that expressions read."""
    pools = _pools(groups)
    typed = [column for column in pools if column not in EVENTS_SCHEMA.names]
    lag_us = random.choice((0, 3 * MINUTE_US, HOUR_US))
    rows = []
    for at in range(number - number // 10):
        event_us = START_US + random.randrange(SPREAD_US // FIVE_MINUTES_US) * FIVE_MINUTES_US + random.choice(EDGES_US)
        delay_us = random.choice(DELAYS_US) if random.random() < 0.9 else -random.choice(AHEAD_US)
        partition = random.randrange(2)
        row: dict[str, Any] = dict.fromkeys(EVENTS_SCHEMA.names)
        row |= {column: random.choice(pool) for column, pool in pools.items()}
        properties = {column: row[column] for column in typed if row[column] is not None}
        row |= {
            "event_id": f"e{at if random.random() < 0.8 else random.randrange(number)}",
            "event_ts": event_us,
            "landed_at": max(event_us + delay_us + (lag_us if partition else 0), 0),
            "log_partition": partition,
            "landing": "log",
            "retracts": None,
            "properties": json.dumps(properties) if properties or random.random() < 0.5 else None,
        }
        rows.append(row)
    for row in random.sample(rows, number // 10):  # the same id again: just within the duplicate memory, and just after it
        ago_us = random.choice((SECOND_US, HOUR_US, DUPLICATE_MEMORY_US, DUPLICATE_MEMORY_US + 1))
        rows.append({**row, "event_ts": row["event_ts"] + ago_us - MINUTE_US, "landed_at": row["landed_at"] + ago_us})
    rows += _retractions(random, rows, number // 100)
    rows.sort(key=lambda row: row["landed_at"])
    next_offset = [0, 0]
    for row in rows:
        row["log_offset"] = next_offset[row["log_partition"]]
        next_offset[row["log_partition"]] += 1
    return rows


def _retractions(random: Random, rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Events that take others back, of a few ids only, so that other keys stay untouched."""
    few = [row for row in rows if all(row[key] in IDS[:4] for key in ("user_id", "note_id", "author_id"))]
    found = []
    for at in range(number if few else 0):
        target = random.choice(few)
        landed_at = max(target["landed_at"] + random.choice(RETRACTED_AFTER_US), 0)
        found.append(
            {
                **target,
                "event_id": f"r{at if random.random() < 0.9 else random.randrange(number)}",
                "event_type": RETRACTION,
                "event_ts": landed_at - SECOND_US,
                "landed_at": landed_at,
                "log_partition": random.randrange(2),
                "retracts": target["event_id"] if random.random() < 0.95 else "nobody",
            }
        )
    return found


def _pools(groups: Collection[FeatureGroup]) -> dict[str, list[Any]]:
    """Values per column: ids for keys, what expressions compare a column with and its neighbours, others, and NULL."""
    keys = {key for group in groups for key in group.entity_keys} | {"user_id", "note_id", "author_id"}
    compared: dict[str, list[Any]] = {"event_type": [], **{key: list(IDS) for key in sorted(keys)}}
    for text in (text for group in groups for m in group.measures for text in (m.where, m.of, m.bucket_by) if text):
        for column in sqlglot.parse_one(text, dialect="duckdb").find_all(exp.Column):
            pool = compared.setdefault(column.name, [])
            pool += [value for literal in _compared_with(column) for value in _around(literal)]
    pools = {}
    for name, values_near in compared.items():
        if name == "event_type":  # never NULL
            others: list[Any] = ["other"]
        elif name in EVENTS_SCHEMA.names:
            others = ["other", "é", "Z", "a b", None]
        else:  # an integer out of `properties`
            others = [None, -3, 0, 1, 2, 5, 2**52]
        pools[name] = list(dict.fromkeys([*values_near, *others]))
    return pools


def _compared_with(column: exp.Column) -> list[exp.Literal]:
    """The literals of the comparison that a column stands in."""
    around = column.find_ancestor(exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE, exp.In, exp.Between)
    return [] if around is None else list(around.find_all(exp.Literal))


def _around(literal: exp.Literal) -> list[Any]:
    if literal.is_string:
        return [literal.this]
    number = round(float(literal.this))
    return [number - 1, number, number + 1]


def _reads(random: Random, group: FeatureGroup, rows: list[dict[str, Any]], number: int) -> list[Read]:
    """Questions whose edges fall on and beside events; half of them as a spine asks, the rest at any T, K and position."""
    lengths = [window.length_us for measure in group.measures for window in measure.windows]
    reads = []
    for at in range(number):
        event = random.choice(rows)
        key = tuple(
            random.choice((*IDS, "nobody", None)) if random.random() < 0.1 else event[name] for name in group.entity_keys
        )
        aim = random.choice((event["event_ts"], event["landed_at"], floor_5m(event["event_ts"])))
        aim += random.choice((0, 0, *lengths)) + random.choice((0, 0, FIVE_MINUTES_US, 2 * FIVE_MINUTES_US))
        request_us = aim + random.choice((-1, 0, 1, GRACE_US, GRACE_US - 1))
        tick_us = newest_tick(request_us)
        if at % 2:
            known_us = tick_us + random.choice((0, 0, -1, 1, 300, 3000)) * FIVE_MINUTES_US
            reads.append(Read(key, request_us, tick_us, known_us, None))
            continue
        tick_us -= random.choice((0, 0, 1, 12)) * FIVE_MINUTES_US
        known_us = tick_us + random.choice((0, 0, -1, 1, 300)) * FIVE_MINUTES_US
        reads.append(Read(key, request_us, tick_us, known_us, _position(random, rows, tick_us, request_us)))
    return reads


def _position(random: Random, rows: list[dict[str, Any]], tick_us: int, request_us: int) -> tuple[int, ...]:
    """A log position at or past the one that closed the tick; the partitions need not be equally far."""
    position = []
    for partition in (0, 1):
        landings = [row["landed_at"] for row in rows if row["log_partition"] == partition]
        must = sum(landed < tick_us + GRACE_US for landed in landings)
        position.append(random.randint(must, max(must, sum(landed < request_us + HOUR_US for landed in landings))))
    return tuple(position)


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    columns = {
        item.name: pa.array([row[item.name] for row in rows], pa.int64() if pa.types.is_timestamp(item.type) else item.type)
        for item in EVENTS_SCHEMA
    }
    return pa.table(columns).cast(EVENTS_SCHEMA)
