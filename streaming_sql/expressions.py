"""Derived features at request time: a DuckDB expression compiled to numpy, over float64 columns with NaN for NULL.

The list of operations is closed; anything else is refused when compiled. x/0, the logarithm of a number that is not positive
and the root of a negative one are NULL, as in every execution. Truth values are 1, 0 and NaN (unknown) with Kleene's logic.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import sqlglot
from numba import types
from sqlglot import expressions as exp

from warehouse.compiled import compiled as in_machine_code
from warehouse.compiled import only_read
from warehouse.errors import HeadraceError

Columns = Mapping[str, np.ndarray]
Node = Callable[[Columns], Any]
"""Columns of N float64 each → float64 [N], or one number where the expression is constant."""

SUPPORTED = "+ - * / coalesce nullif least greatest abs sqrt ln cast case and or not = <> < <= > >= is null in between"


@dataclass(frozen=True, eq=False)
class Compiled:
    """An expression that takes the columns it names and returns float64 [N], NaN for NULL."""

    node: Node
    ratio: tuple[str, str] | None
    """(dividend, divisor) where it is one column by another."""

    def __call__(self, values: Columns) -> np.ndarray:
        with np.errstate(all="ignore"):
            return _null_unless_finite(self.node(values))


def write_derived(derived: tuple[Compiled, ...], place_of: Mapping[str, int], matrix_NF: np.ndarray) -> None:
    """Writes the derived features into the columns after those that they are made of: place_of says where each of these is, in
    ascending order. Ratios, which most of them are, take one loop."""
    ratios, rest = _arranged(derived, tuple(place_of))
    _write_ratios(ratios, matrix_NF)
    if rest:
        values = {name: matrix_NF[:, place] for name, place in place_of.items()}
        for place, expression in rest:
            matrix_NF[:, place] = expression(values)


@lru_cache(maxsize=256)
def _arranged(derived: tuple[Compiled, ...], names: tuple[str, ...]) -> tuple[np.ndarray, list[tuple[int, Compiled]]]:
    """(int64 [Q, 3]: the columns of dividend, divisor and ratio, the columns of the rest)."""
    placed = list(enumerate(derived, len(names)))
    ratios = [(*map(names.index, one.ratio), place) for place, one in placed if one.ratio]
    return np.array(ratios, dtype=np.int64).reshape(-1, 3), [(place, one) for place, one in placed if not one.ratio]


@in_machine_code(types.void(only_read(types.int64, 2), types.float64[:, ::1]))
def _write_ratios(ratios: np.ndarray, matrix_NF: np.ndarray) -> None:
    """NULL where the divisor is 0, and where a ratio is not finite."""
    for n in range(len(matrix_NF)):
        for q in range(len(ratios)):
            dividend, divisor, ratio = matrix_NF[n, ratios[q, 0]], matrix_NF[n, ratios[q, 1]], np.nan
            if divisor != 0 and np.isfinite(dividend / divisor):
                ratio = dividend / divisor
            matrix_NF[n, ratios[q, 2]] = ratio


def compile_expression(text: str, columns: frozenset[str], what: str) -> Compiled:
    """Compiles `text` over `columns`.

    what: named in messages, for example `derived feature note_ctr_1d`. Raises HeadraceError if it cannot be parsed, names
    no column, is a truth value, or uses anything outside the closed list.
    """
    try:
        tree = sqlglot.parse_one(text, dialect="duckdb")
    except sqlglot.errors.ParseError as error:
        raise HeadraceError(f"{what}: {text!r} cannot be parsed: {str(error).splitlines()[0]}") from None
    compiled, is_truth = _compile(tree, columns, what)
    if is_truth:
        raise HeadraceError(f"{what}: {text!r} is a truth value; write case when … then 1 else 0 end")
    is_ratio = type(tree) is exp.Div and isinstance(tree.this, exp.Column) and isinstance(tree.expression, exp.Column)
    return Compiled(compiled, (tree.this.name, tree.expression.name) if is_ratio else None)


def _compile(node: exp.Expr, columns: frozenset[str], what: str) -> tuple[Node, bool]:
    """The compiled node, and whether it is a truth value."""

    def refuse(problem: str) -> HeadraceError:
        return HeadraceError(f"{what}: {problem}; supported are {SUPPORTED}")

    def number(child: exp.Expr) -> Node:
        compiled, is_truth = _compile(child, columns, what)
        if is_truth:
            raise refuse(f"{child.sql('duckdb')} is a truth value where a number is needed")
        return compiled

    def truth(child: exp.Expr) -> Node:
        compiled, is_truth = _compile(child, columns, what)
        if not is_truth and not isinstance(child, exp.Null):
            raise refuse(f"{child.sql('duckdb')} is a number where a condition is needed")
        return compiled

    if isinstance(node, exp.Paren):
        return _compile(node.this, columns, what)
    if isinstance(node, exp.Column):
        name = node.name
        if name not in columns:
            raise HeadraceError(f"{what}: there is no {name}; there are {', '.join(sorted(columns))}")
        return (lambda values: values[name]), False
    if isinstance(node, exp.Literal):
        if node.is_string:
            raise refuse(f"text {node.sql('duckdb')} in a number's place")
        constant = np.float64(node.this)
        return (lambda values: constant), False
    if isinstance(node, exp.Null):
        return (lambda values: np.float64("nan")), False
    if isinstance(node, exp.Boolean):
        constant = np.float64(bool(node.this))
        return (lambda values: constant), True
    if isinstance(node, exp.Cast):
        return _cast(node, number(node.this), refuse), False
    if type(node) in _ARITHMETIC:
        left, right, operation = number(node.this), number(node.expression), _ARITHMETIC[type(node)]
        return (lambda values: operation(left(values), right(values))), False
    if type(node) in _ONE_NUMBER:
        inner, function = number(node.this), _ONE_NUMBER[type(node)]
        return (lambda values: function(inner(values))), False
    if type(node) in _MANY_NUMBERS:
        parts = [number(child) for child in (node.this, *node.expressions)]
        combine = _MANY_NUMBERS[type(node)]

        def reduce(values: Columns) -> Any:
            result = parts[0](values)
            for part in parts[1:]:
                result = combine(result, part(values))
            return result

        return reduce, False
    if isinstance(node, exp.Case):
        return _case(node, number, truth), False
    if type(node) in _COMPARISONS:
        left, right, compare = number(node.this), number(node.expression), _COMPARISONS[type(node)]
        return (lambda values: _compared(compare, left(values), right(values))), True
    if isinstance(node, exp.And | exp.Or):
        left, right = truth(node.this), truth(node.expression)
        combine = _and if isinstance(node, exp.And) else _or
        return (lambda values: combine(left(values), right(values))), True
    if isinstance(node, exp.Not):
        inner = truth(node.this)
        return (lambda values: 1.0 - inner(values)), True
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        inner = number(node.this)
        return (lambda values: np.isnan(inner(values)).astype(np.float64)), True
    if isinstance(node, exp.Between):
        inner, low, high = number(node.this), number(node.args["low"]), number(node.args["high"])
        return (
            lambda values: _and(
                _compared(np.greater_equal, inner(values), low(values)), _compared(np.less_equal, inner(values), high(values))
            )
        ), True
    if isinstance(node, exp.In) and node.expressions:
        inner, options = number(node.this), [number(option) for option in node.expressions]

        def among(values: Columns) -> Any:
            found: Any = np.float64(0.0)
            for option in options:
                found = _or(found, _compared(np.equal, inner(values), option(values)))
            return found

        return among, True
    raise refuse(f"{node.sql('duckdb')} is not supported")


def _null_unless_finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _divide(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where(right == 0, np.nan, np.divide(left, right))


def _compared(compare: Callable, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(left) | np.isnan(right), np.nan, compare(left, right).astype(np.float64))


def _and(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where((left == 0) | (right == 0), 0.0, left * right)


def _or(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where((left == 1) | (right == 1), 1.0, left + right)


def _round_to_bigint(values: np.ndarray) -> np.ndarray:
    """DuckDB rounds halves away from zero when it casts."""
    return np.trunc(values + np.copysign(0.5, values))


def _cast(node: exp.Cast, inner: Node, refuse: Callable[[str], HeadraceError]) -> Node:
    if node.to.is_type(exp.DataType.Type.DOUBLE):
        return inner
    if node.to.is_type(exp.DataType.Type.BIGINT):
        return lambda values: _round_to_bigint(inner(values))
    raise refuse(f"{node.sql('duckdb')} casts to neither double nor bigint")


def _case(node: exp.Case, number: Callable, truth: Callable) -> Node:
    """First branch whose condition is true; `case x when y` compares x with y."""
    branches = [
        (
            truth(exp.EQ(this=node.this.copy(), expression=branch.this) if node.this else branch.this),
            number(branch.args["true"]),
        )
        for branch in node.args["ifs"]
    ]
    otherwise = number(node.args.get("default") or exp.Null())

    def choose(values: Columns) -> Any:
        result = otherwise(values)
        for condition, value in reversed(branches):
            result = np.where(condition(values) == 1, value(values), result)
        return result

    return choose


_ARITHMETIC: dict[type, Callable] = {
    exp.Add: np.add,
    exp.Sub: np.subtract,
    exp.Mul: np.multiply,
    exp.Div: _divide,
    exp.Nullif: lambda left, right: np.where(left == right, np.nan, left),
}
_ONE_NUMBER: dict[type, Callable] = {
    exp.Neg: np.negative,
    exp.Abs: np.abs,
    exp.Sqrt: lambda values: np.where(values >= 0, np.sqrt(values), np.nan),
    exp.Ln: lambda values: np.where(values > 0, np.log(values), np.nan),
}
_MANY_NUMBERS: dict[type, Callable] = {
    exp.Coalesce: lambda left, right: np.where(np.isnan(left), right, left),
    exp.Least: np.fmin,  # NULLs are passed over, as in DuckDB and PostgreSQL
    exp.Greatest: np.fmax,
}
_COMPARISONS: dict[type, Callable] = {
    exp.EQ: np.equal,
    exp.NEQ: np.not_equal,
    exp.LT: np.less,
    exp.LTE: np.less_equal,
    exp.GT: np.greater,
    exp.GTE: np.greater_equal,
}
