"""Tables that more than one command prints."""

import math
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from models_ml.evaluation import RECALL_AT


def retrieval(recalls: Mapping[str, Mapping[str, float | None]]) -> Table:
    """recalls: generator -> `recall@k` and its interval -> value."""
    table = Table(title="Retrieval of the notes clicked on the test days", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("generator", *(f"recall@{k}" for k in RECALL_AT)):
        table.add_column(name, justify="left" if name == "generator" else "right")
    for generator, values in recalls.items():
        names = [f"recall@{k}" for k in RECALL_AT]
        table.add_row(generator, *(f"{number(values[name])} {half_width(name, values)}" for name in names))
    return table


def index_recall(recalls: Mapping[str, Mapping[str, float]]) -> Table:
    """recalls: index -> `recall@k` -> share of what an exact search in fp32 finds."""
    columns = list(next(iter(recalls.values())))
    table = Table(title="Search among the two-tower's vectors, against exact fp32", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("index", *columns):
        table.add_column(name, justify="left" if name == "index" else "right")
    for index, values in recalls.items():
        table.add_row(index, *(number(values[column]) for column in columns))
    return table


def with_interval(metric: str, values: Mapping[str, float | None]) -> str:
    """The value, and its interval where there is one."""
    value, low, high = (values.get(name) for name in (metric, f"{metric}_low", f"{metric}_high"))
    if value is None or not math.isfinite(value):
        return number(None)
    has_interval = low is not None and high is not None and math.isfinite(low)
    return number(value) + (f" ({low:.4f} to {high:.4f})" if has_interval else "")


def half_width(metric: str, values: Mapping[str, float | None]) -> str:
    """Half of the interval, where a line has no room for both ends."""
    low, high = values.get(f"{metric}_low"), values.get(f"{metric}_high")
    return "–" if low is None or high is None else f"±{(high - low) / 2:.4f}"


def number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)
