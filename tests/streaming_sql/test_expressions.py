"""Derived expressions: numpy against DuckDB, the closed list, and NULL where arithmetic has no answer."""

import re

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_sql.expressions import compile_expression, write_derived
from warehouse.errors import HeadraceError

NAN = float("nan")
COLUMNS = ("a", "b", "c")


def evaluate(text, **columns):
    values = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    compiled = compile_expression(text, frozenset(values), "test")
    matrix_NF = np.column_stack([*values.values(), values["a"]])
    write_derived((compiled,), {name: place for place, name in enumerate(values)}, matrix_NF)
    assert np.broadcast_to(compiled(values), len(matrix_NF)).tobytes() == matrix_NF[:, -1].tobytes()
    return matrix_NF[:, -1].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a / b", [0.5, NAN, NAN]),
        ("ln(b)", [pytest.approx(np.log(2)), NAN, NAN]),
        ("ln(1 + a)", [pytest.approx(np.log(2)), pytest.approx(np.log(4)), 0.0]),
        ("sqrt(-a)", [NAN, NAN, 0.0]),
        ("coalesce(a / b, -1)", [0.5, -1.0, -1.0]),
        ("nullif(a, 3)", [1.0, NAN, 0.0]),
        ("greatest(a, b)", [2.0, 3.0, 0.0]),
        ("case when b > 1 then 10 when b = 0 then 20 end", [10.0, 20.0, NAN]),
        ("case when b is null or a > 2 then 1 else 0 end", [0.0, 1.0, 1.0]),
        ("case when not (b > 1) then 1 else 0 end", [0.0, 1.0, 0.0]),
        ("case a when 3 then 7 else 8 end", [8.0, 7.0, 8.0]),
        ("a * 1e308 * 1e308", [NAN, NAN, 0.0]),
        ("cast(a / 2 as bigint)", [1.0, 2.0, 0.0]),
    ],
)
def test_worked_by_hand(text, expected):
    assert evaluate(text, a=[1, 3, 0], b=[2, 0, NAN]) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a +", "cannot be parsed"),
        ("d + 1", "there is no d; there are a, b, c"),
        ("random()", "is not supported; supported are"),
        ("now()", "is not supported"),
        ("a // 2", "is not supported"),
        ("'x'", "text 'x' in a number's place"),
        ("a > b", "is a truth value; write case when"),
        ("a + (b > c)", "truth value where a number is needed"),
        ("case when a then 1 end", "number where a condition is needed"),
        ("cast(a as date)", "neither double nor bigint"),
        ("a in (select 1)", "is not supported"),
    ],
)
def test_what_is_outside_the_closed_list_is_refused_with_the_way_out(text, said):
    with pytest.raises(HeadraceError, match=f"derived note_x: .*{said}"):
        compile_expression(text, frozenset(COLUMNS), "derived note_x")


def test_a_ratio_that_is_written_in_a_loop_is_numpys_bit_for_bit():
    grid = [0.0, -0.0, 1.0, -3.0, 7.0, 1e-320, 1e308, 0.1, np.inf, NAN]
    a, b = (column.ravel() for column in np.meshgrid(grid, grid))
    got = np.array(evaluate("a / b", a=a, b=b))
    assert np.isnan(got[(b == 0) | np.isnan(a) | np.isnan(b)]).all()
    assert got[(a == 7) & (b == -3)].tolist() == [7 / -3]


def numbers():
    leaf = st.sampled_from([*COLUMNS, "null", "0", "1", "2.5", "-3"])
    return st.recursive(leaf, _wider, max_leaves=8)


def _wider(inner):
    two = st.tuples(st.sampled_from(["({} + {})", "({} - {})", "({} * {})", "nullif({}, {})", "least({}, {})"]), inner, inner)
    more = st.tuples(st.sampled_from(["greatest({}, {})", "coalesce({}, {})", "(-abs({}) + {})"]), inner, inner)
    comparison = st.tuples(st.sampled_from(["{} = {}", "{} <> {}", "{} < {}", "{} >= {}", "{} in ({}, 1, null)"]), inner, inner)
    condition = comparison.map(lambda parts: parts[0].format(*parts[1:]))
    joined = st.tuples(st.sampled_from(["({}) and ({})", "({}) or ({})", "not ({}) and ({})"]), condition, condition)
    case = st.tuples(joined.map(lambda parts: parts[0].format(*parts[1:])), inner, inner)
    return st.one_of(
        two.map(lambda parts: parts[0].format(*parts[1:])),
        more.map(lambda parts: parts[0].format(*parts[1:])),
        case.map(lambda parts: "case when {} then {} else {} end".format(*parts)),
    )


@given(numbers())
def test_numpy_equals_duckdb(text):
    grid = [None, 0.0, 1.0, -2.0, 2.5]
    rows = [(a, b, c) for a in grid for b in grid for c in grid]
    typed = re.sub(r"\bnull\b", "cast(null as double)", text)
    connection = duckdb.connect()
    connection.execute("create table t as select unnest($a)::double as a, unnest($b)::double as b, unnest($c)::double as c",
                       dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))  # fmt: skip
    expected = [value for (value,) in connection.execute(f"select ({typed})::double from t").fetchall()]
    columns = {name: np.array(column, dtype=np.float64) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}
    got = evaluate(text, **columns)
    assert got == pytest.approx([NAN if value is None or not np.isfinite(value) else value for value in expected], nan_ok=True)
