"""Features for any spine: the same rows in the same order, one more column per feature, each at the row's own t, T and K.

T is the newest tick at `request_ts`; K of block-fresh features is T, or a column of the spine (as corrected); fresh features
know what landed before t. Values equal the oracle's; two ways lead there and agree: the SQL of `point_in_time`, and arrays
(`compute_arrays`) for the measures where those are faster. See docs/features.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import pyarrow as pa

from warehouse.errors import HeadraceError
from warehouse.features.compute_plan import Plan, plan
from warehouse.features.compute_source import Relations
from warehouse.features.compute_spill import answers
from warehouse.features.compute_spine import REQUEST_TS, Reads, Span, Spine, as_text
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.kinds.declared import Kinds, load_kinds
from warehouse.features.kinds.table_compute import TableReader, check_table
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US, floor_5m


def compute(
    lake: Lake,
    spine: pa.Table,
    features: Sequence[str] | None = None,
    known_at: str | None = None,
    groups: Mapping[str, FeatureGroup] | None = None,
    kinds: Kinds | None = None,
) -> pa.Table:
    """The spine's rows in their order, extra columns and duplicates kept, and one column per feature.

    spine: key columns (text or integers), `request_ts` (timestamp with a zone), anything else. features: names, in the order of
    the output; None means every feature whose keys the spine has. known_at: the column that holds K of block-fresh features, a
    tick; None means K = T. Types: int64 for counts and integer measures, float64 (NULL where undefined), list<string>, oldest
    first. Raises HeadraceError for bad input and for times beyond what the lake has built.
    """
    checked = Spine(spine, "the spine")
    declared = load_groups() if groups is None else groups
    what = plan(declared, checked.schema.names, features, load_kinds() if kinds is None else kinds)
    return pa.concat_tables(computed_chunks(lake, checked, what, known_at))


def computed_chunks(lake: Lake, spine: Spine, what: Plan, known_at: str | None) -> Iterator[pa.Table]:
    """As `compute`, chunk by chunk: the spine is never whole in memory. Bad input is refused before the first chunk."""
    spine.check_columns(what.keys, known_at, what.features)
    span = spine.span(what.keys, known_at)
    _check_built(lake, what, span)
    relations = {group.name: Relations.of(group) for group in what.groups}
    names = dict.fromkeys(name for places in relations.values() for name in places.names())
    for table in what.tables:
        check_table(lake, table)
    with lake.reader((*names, *(table.relation for table in what.tables))) as connection:
        tables = [TableReader(lake, connection, table, span) for table in what.tables]

        def reads() -> Iterator[Reads]:
            return (spine.reads(chunk, what.keys, known_at) for chunk in spine.chunks())

        found = answers(connection, relations, what.without_tables(), span, reads, lake.scratch)
        for chunk, columns in zip(spine.chunks(), found, strict=True):
            for reader in tables:
                columns |= reader.columns(spine.reads(chunk, what.keys, known_at))
            made = {name: columns[name] for name in what.features}
            yield pa.table({**dict(zip(chunk.column_names, chunk.columns, strict=True)), **made})


def _check_built(lake: Lake, what: Plan, span: Span) -> None:
    """Raises HeadraceError where a table is missing or does not reach as far as the spine asks."""
    for group in what.groups:
        relations = Relations.of(group)
        fresh = any(measure.freshness == "event" for measure in group.measures)
        until_us = {}
        for name in relations.names():
            if not lake.exists(name):
                raise HeadraceError(f"the lake has no {name} yet; run `dbt build` first")
            text = lake.table(name).properties.get(BUILT_UNTIL)
            if text is None:
                raise HeadraceError(f"{name} has not been built by dbt; run `dbt build` first")
            until_us[name] = round(datetime.fromisoformat(text).timestamp() * 1_000_000)
        built_us = min(until_us.values()) - FIVE_MINUTES_US  # rows known at this tick are there
        if span.last_known_us > built_us:
            raise HeadraceError(
                f"the spine asks for what was known at {as_text(span.last_known_us)}; features.{group.name} is built until "
                f"{as_text(built_us)}: ask for {REQUEST_TS} before {as_text(built_us + FIVE_MINUTES_US + GRACE_US)}, "
                "or run `dbt build` when the log has come that far"
            )
        if fresh and floor_5m(span.last_request_us - 1) + FIVE_MINUTES_US > built_us:
            raise HeadraceError(
                f"the spine asks for fresh features of {group.name} at {as_text(span.last_request_us)}; events are built until "
                f"{as_text(built_us)}: ask for {REQUEST_TS} up to then, or run `dbt build` when the log has come that far"
            )
