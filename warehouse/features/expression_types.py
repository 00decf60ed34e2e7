"""Types of declared expressions, as far as the columns' declared types tell, and refusals of what engines do not write alike.

Knows only what `declarations` allows in an expression. A type is one of `integer`, `decimal`, `double`, `text`, `boolean`,
`timestamp`, or None where it is not known; unknown types are never refused.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import sqlglot
from sqlglot import expressions as exp

_FAMILIES = {
    "integer": exp.DataType.INTEGER_TYPES,
    "decimal": {exp.DataType.Type.DECIMAL},
    "double": {exp.DataType.Type.DOUBLE, exp.DataType.Type.FLOAT},
    "text": exp.DataType.TEXT_TYPES,
    "boolean": {exp.DataType.Type.BOOLEAN},
    "timestamp": exp.DataType.TEMPORAL_TYPES,
}
_ROUNDED = ("decimal", "double")
_PREDICATES = (
    exp.Boolean,
    exp.And,
    exp.Or,
    exp.Not,
    exp.Is,
    exp.In,
    exp.Between,
    exp.EQ,
    exp.NEQ,
    exp.LT,
    exp.LTE,
    exp.GT,
    exp.GTE,
)


def column_type(data_type: str | None) -> str | None:
    """The type of a column declared as `data_type`, in DuckDB's words."""
    try:
        return _family(exp.DataType.build(data_type, dialect="duckdb")) if data_type else None
    except sqlglot.errors.ParseError:
        return None


def _family(found: exp.DataType) -> str | None:
    return next((name for name, members in _FAMILIES.items() if found.this in members), None)


def type_of(node: exp.Expr | None, columns: Mapping[str, str | None]) -> str | None:
    """The type of an expression over columns of these types."""
    if isinstance(node, exp.Column):
        return columns.get(node.name)
    if isinstance(node, exp.Literal):
        return "text" if node.is_string else "integer" if node.is_int else "double" if "e" in node.this.lower() else "decimal"
    if isinstance(node, exp.Cast):
        return _family(node.to)
    if isinstance(node, exp.Paren | exp.Neg | exp.Abs | exp.Nullif):
        return type_of(node.this, columns)
    if isinstance(node, exp.Div | exp.Sqrt | exp.Ln):
        return "double"
    if isinstance(node, _PREDICATES):
        return "boolean"
    if isinstance(node, exp.Add | exp.Sub | exp.Mul):
        return _widest((node.this, node.expression), columns)
    if isinstance(node, exp.Coalesce | exp.Least | exp.Greatest):
        return _widest((node.this, *node.expressions), columns)
    if isinstance(node, exp.Case):
        return _widest((*(branch.args["true"] for branch in node.args["ifs"]), node.args.get("default")), columns)
    return None


def _widest(nodes: Iterable[exp.Expr | None], columns: Mapping[str, str | None]) -> str | None:
    found = {type_of(node, columns) for node in nodes if node is not None and not isinstance(node, exp.Null)}
    if len(found) == 1:
        return found.pop()
    if "double" in found:
        return "double"
    return "decimal" if "decimal" in found and found <= {"decimal", "integer"} else None


def check_division(tree: exp.Expr, columns: Mapping[str, str | None], fail: Any) -> None:
    """Refuses divisions that engines do not do alike: of two integers (DuckDB divides as doubles, PostgreSQL and RisingWave cut
    the rest off), and by what may be 0 (NULL, infinity or an error). Derived expressions have rules of their own for both."""
    for node in tree.find_all(exp.Div):
        text = node.sql(dialect="duckdb")
        if type_of(node.this, columns) != "double":
            raise fail(f"{text} divides integers, which engines do not do alike; write cast(… as double precision) / …")
        divisor = node.expression.unnest()
        is_number = isinstance(divisor, exp.Literal) and not divisor.is_string and float(divisor.this) != 0
        is_guarded = isinstance(divisor, exp.Nullif) and divisor.expression.sql() == "0"
        if not is_number and not is_guarded:
            raise fail(f"{text} may divide by 0, which engines do not do alike; write … / nullif(…, 0)")


def check_text(tree: exp.Expr, is_read_as_text: bool, columns: Mapping[str, str | None], fail: Any) -> None:
    """Refuses the text of numbers that are no integers: engines write the digits of one double in different ways."""
    texts = [node.this for node in tree.find_all(exp.Cast) if _family(node.to) == "text"] + [tree] * is_read_as_text
    for node in texts:
        if (found := type_of(node, columns)) in _ROUNDED:
            text = node.sql(dialect="duckdb")
            raise fail(f"{text} is {found} and read as text, which engines do not write alike; write cast(… as bigint)")


def check_integers(tree: exp.Expr, columns: Mapping[str, str | None], fail: Any) -> None:
    """Refuses numbers with digits after the point where the measure is declared bigint."""
    if (found := type_of(tree, columns)) in _ROUNDED:
        raise fail(
            f"{tree.sql(dialect='duckdb')} is {found}, declared bigint; sums of rounded values differ from rounded sums: "
            "declare type: double, or write cast(… as bigint)"
        )
