"""Sketches, moments and calendar keys: SQL against its Python twin, estimates against the truth."""

import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from random import Random

import duckdb
import pyarrow as pa
import pytest

from warehouse.features import sketches
from warehouse.features.measures import CALENDAR_PARTS, CalendarKey
from warehouse.features.render import calendar_sql, render_macro

MEASURE = {
    "name": "m", "aggregation": "approx_count_distinct", "of": "text", "type": "varchar", "bucket_by": None, "where": None,
    "windows": ["1d"],
}  # fmt: skip


def sql(query: str, **tables: pa.Table) -> list[tuple]:
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        for name, table in tables.items():
            connection.register(name, table)
        return connection.execute(query).fetchall()


@pytest.mark.parametrize("relative_error", [0.001, 0.01, 0.037, 0.1])
def test_the_sql_knows_the_same_edges_to_the_bit(relative_error):
    [(edges,)] = sql(f"select {render_macro('sketch_edges', relative_error)}")
    assert tuple(edges) == sketches.bounds(relative_error)
    assert edges[-2] < sketches.LARGEST <= edges[-1]


@pytest.mark.parametrize("relative_error", [0.001, 0.01, 0.1])
def test_a_number_on_or_beside_an_edge_falls_into_the_same_bucket_in_sql(relative_error):
    edges = sketches.bounds(relative_error)
    beside = [near for edge in edges for near in (edge, math.nextafter(edge, 0), math.nextafter(edge, math.inf))]
    random = Random(1)
    others = [0.0, -0.0, 5e-324, 1e300, 1.7e308, *(10 ** random.uniform(-12, 20) for _ in range(2000))]
    numbers = [sign * number for number in (*beside, *others) for sign in (1, -1)]
    found = sql(
        f"select {render_macro('sketch_bucket', 'number', relative_error)} from numbers", numbers=pa.table({"number": numbers})
    )
    assert [row[0] for row in found] == [sketches.bucket_of(number, edges) for number in numbers]


def test_a_text_falls_into_the_same_register_with_the_same_rank_in_sql():
    texts = ["", "é", "a b", "漢字", *(str(number) for number in range(20_000))]
    items = render_macro("map_entry", MEASURE) + ", " + render_macro("map_value", MEASURE, "m")
    found = sql(f"select {items} from texts", texts=pa.table({"text": texts}))
    assert found == [sketches.register_and_rank(text) for text in texts]
    assert max(rank for _, rank in found) > 12


@pytest.mark.parametrize("relative_error", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.9, 0.999, 1.0])
def test_a_quantile_is_within_its_relative_error_of_the_true_one(relative_error, q):
    random = Random(2)
    edges = sketches.bounds(relative_error)
    for numbers in (
        [random.lognormvariate(0, 3) for _ in range(2000)],
        [random.gauss(0, 1e6) for _ in range(2001)],
        [0.0] * 10 + [-1e-6, 7e17, -3.0],
    ):
        true = sorted(numbers)[math.floor(q * (len(numbers) - 1))]
        estimate = sketches.quantile(Counter(sketches.bucket_of(n, edges) for n in numbers), q, edges, relative_error)
        assert estimate is not None
        assert abs(estimate - true) <= relative_error * abs(true) * (1 + 1e-9)


@pytest.mark.parametrize("number", [1, 10, 1_000, 9_000, 12_000, 100_000])
def test_a_distinct_count_is_within_five_standard_errors(number):
    ranks: dict[int, int] = {}
    for n in range(number):
        register, rank = sketches.register_and_rank(f"reader {n}")
        ranks[register] = max(rank, ranks.get(register, 0))
    assert abs(sketches.count_distinct(ranks) - number) <= 5 * 1.04 / math.sqrt(sketches.REGISTERS) * number
    estimate = render_macro("distinct_estimate", "count(*)", "sum(pow(2.0, -rank))")
    rows = pa.table({"rank": list(ranks.values())})
    assert sql(f"select {estimate} from rows", rows=rows) == [(sketches.count_distinct(ranks),)]


def test_nothing_has_no_distinct_values_and_no_quantile():
    assert sketches.count_distinct({}) == 0
    assert sketches.quantile({}, 0.5, sketches.bounds(0.01), 0.01) is None


def test_the_variance_of_close_numbers_far_from_zero_does_not_cancel():
    """10^15 + {1, 2, 3, 4} in two blocks: the variance is 5/3, where sums of squares would leave nothing of it."""
    measure = {**MEASURE, "aggregation": "var", "of": "number", "type": "double"}
    stored = f"select block, {render_macro('mapped', measure)} from numbers group by block"
    together = f"select {render_macro('combined', measure)} from ({stored})"
    numbers = pa.table({"block": [1, 1, 1, 2], "number": [1e15 + n for n in (1, 2, 3, 4)]})
    [(n, mean, m2)] = sql(together, numbers=numbers)
    assert (n, mean) == (4, pytest.approx(1e15 + 2.5))
    assert m2 / (n - 1) == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    "zone", ["UTC", "America/New_York", "Europe/London", "Asia/Kolkata", "Pacific/Chatham", "Australia/Lord_Howe"]
)
def test_parts_of_the_calendar_are_the_same_in_sql_over_every_change_of_the_clocks(zone):
    instants = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=30 * step) for step in range(2 * 24 * 366)]
    table = pa.table({"instant": pa.array(instants, pa.timestamp("us", "UTC"))})
    for part in CALENDAR_PARTS:
        key = CalendarKey("part", part, zone)
        found = sql(f"select {calendar_sql(key, 'instant')} from instants", instants=table)
        assert [row[0] for row in found] == [key.of(round(at.timestamp() * 1_000_000)) for at in instants]
