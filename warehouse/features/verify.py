"""`headrace features verify`: the project's own declarations, batch SQL and `compute`, against the oracle on generated events.

What the events are like says `warehouse.features.generated`. Nothing of the lake is read or written.
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
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from warehouse.connections import plain_connection
from warehouse.errors import HeadraceError
from warehouse.events import TIMESTAMP
from warehouse.features import render
from warehouse.features.attributes_oracle import hydrated
from warehouse.features.compute_engine import Engine
from warehouse.features.compute_plan import plan
from warehouse.features.compute_source import RETRACTIONS, SHADOWED, STAGING, Relations
from warehouse.features.compute_spine import Spine
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.generated import (
    as_table,
    attribute_tables,
    attributes_of,
    generated_events,
    generated_reads,
    generated_tables,
)
from warehouse.features.oracle import Read, values
from warehouse.time_algebra import newest_tick

STAGED = "stg_engagements"
RETRACTED = f"{STAGING}.stg_retracted_events"
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
Execution = Callable[[Mapping[str, FeatureGroup], Sequence[Mapping[str, Any]], Random, Mapping[str, pa.Table]], Answers]
"""A way to answer that is not of this room: it is given groups, generated rows and the tables that add to events, and puts its
own questions."""


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
    sent = generated_events(random, list(ours.values()), num_events)
    attributes = attributes_of(ours.values())
    versions = generated_tables(random, ours.values(), sent)
    rows = hydrated(sent, attributes, versions)
    tables = attribute_tables(attributes, versions)
    with plain_connection() as connection:
        connection.register("generated", as_table(sent))
        create_tables(connection, tables)
        for schema in (STAGING, "features"):
            connection.execute(f"create schema {schema}")
        connection.execute(f"create table {STAGING}.{STAGED} as {render.staging_sql('generated', attributes=attributes)}")
        connection.execute(f"create table {SHADOWED} as {render.shadowed_sql('generated', attributes)}")
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
        for name, read, answer in answered(ours, sent, random, tables):
            expected = values(ours[name], _related(ours[name], rows, read), read)
            held = {feature: in_float64(value) for feature, value in expected.items()}
            _compare(execution, [answer], [read], [held], verdicts[name], seed)


def create_tables(connection: duckdb.DuckDBPyConnection, tables: Mapping[str, pa.Table]) -> None:
    """Tables that add to events, by `namespace.table`."""
    for relation, rows in tables.items():
        connection.execute(f"create schema if not exists {relation.partition('.')[0]}")
        connection.register("rows_of_table", rows)
        connection.execute(f"create table {relation} as select * from rows_of_table")
        connection.unregister("rows_of_table")


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
    reads = generated_reads(random, group, rows, num_reads)
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
