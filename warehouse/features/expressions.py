"""Evaluates a declared expression on one row, in plain Python: SQL's three-valued logic, float64 division, x/0 is NULL.

Slow and obvious on purpose: the oracle judges the engines with it. NULL is None.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import sqlglot
from sqlglot import expressions as exp


@cache
def _parsed(text: str) -> exp.Expr:
    return sqlglot.parse_one(text, dialect="duckdb")


def evaluate(text: str, row: Mapping[str, Any]) -> Any:
    """The value of the expression on a row of column values; None for NULL. Raises ValueError on what is not declared."""
    return _value(_parsed(text), row)


_COMPARE: dict[type[exp.Expr], Callable[[Any, Any], bool]] = {
    exp.EQ: lambda a, b: a == b,
    exp.NEQ: lambda a, b: a != b,
    exp.LT: lambda a, b: a < b,
    exp.LTE: lambda a, b: a <= b,
    exp.GT: lambda a, b: a > b,
    exp.GTE: lambda a, b: a >= b,
}
_ARITHMETIC: dict[type[exp.Expr], Callable[[Any, Any], Any]] = {
    exp.Add: lambda a, b: a + b,
    exp.Sub: lambda a, b: a - b,
    exp.Mul: lambda a, b: a * b,
    exp.Div: lambda a, b: None if b == 0 else float(a) / float(b),
}


def _value(node: exp.Expr, row: Mapping[str, Any]) -> Any:
    kind = type(node)
    if kind is exp.Column:
        return row[node.name]
    if kind is exp.Literal:
        return node.this if node.is_string else (int(node.this) if node.is_int else float(node.this))
    if kind is exp.Boolean:
        return bool(node.this)
    if kind is exp.Null:
        return None
    if kind is exp.Paren:
        return _value(node.this, row)
    if kind in _COMPARE or kind in _ARITHMETIC:
        left, right = _value(node.this, row), _value(node.expression, row)
        if left is None or right is None:
            return None
        return (_COMPARE.get(kind) or _ARITHMETIC[kind])(left, right)
    if kind in (exp.And, exp.Or):
        decisive = kind is exp.Or
        sides = [_value(node.this, row), _value(node.expression, row)]
        return decisive if decisive in sides else (None if None in sides else not decisive)
    if kind is exp.Not:
        inner = _value(node.this, row)
        return None if inner is None else not inner
    if kind is exp.Neg:
        inner = _value(node.this, row)
        return None if inner is None else -inner
    if kind is exp.Is:
        return (
            _value(node.this, row) is None
            if isinstance(node.expression, exp.Null)
            else _value(node.this, row) is _value(node.expression, row)
        )
    if kind is exp.In:
        return _any_equal(_value(node.this, row), [_value(item, row) for item in node.expressions])
    if kind is exp.Between:
        value, low, high = (_value(node.args[part], row) for part in ("this", "low", "high"))
        return None if None in (value, low, high) else low <= value <= high
    if kind is exp.Coalesce:
        return next((value for item in [node.this, *node.expressions] if (value := _value(item, row)) is not None), None)
    if kind is exp.Nullif:
        first, second = _value(node.this, row), _value(node.expression, row)
        return None if first == second else first
    if kind in (exp.Least, exp.Greatest):
        values = [value for item in [node.this, *node.expressions] if (value := _value(item, row)) is not None]
        return (min if kind is exp.Least else max)(values, default=None)
    if kind in (exp.Abs, exp.Sqrt, exp.Ln):
        return _function(kind, _value(node.this, row))
    if kind is exp.Case:
        for branch in node.args["ifs"]:
            if _value(branch.this, row) is True:
                return _value(branch.args["true"], row)
        default = node.args.get("default")
        return None if default is None else _value(default, row)
    if kind is exp.Cast:
        return _cast(_value(node.this, row), node.args["to"].this.name)
    raise ValueError(f"{node.sql(dialect='duckdb')} is not in the closed list of expressions")


def _any_equal(value: Any, items: list[Any]) -> bool | None:
    if value is None:
        return None
    if value in [item for item in items if item is not None]:
        return True
    return None if None in items else False


def _function(kind: type[exp.Expr], value: Any) -> Any:
    if value is None:
        return None
    if kind is exp.Abs:
        return abs(value)
    if kind is exp.Sqrt:
        return math.sqrt(value) if value >= 0 else None
    return math.log(value) if value > 0 else None


def _cast(value: Any, type_name: str) -> Any:
    if value is None:
        return None
    if type_name in ("VARCHAR", "TEXT"):
        return str(value)
    return float(value) if type_name in ("DOUBLE", "FLOAT") else int(value)
