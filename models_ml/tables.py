"""Tables that more than one command prints."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from models_ml.evaluation import RECALL_AT


def retrieval(recalls: Mapping[str, Mapping[str, float | None]]) -> Table:
    """recalls: generator -> `recall@k` -> value."""
    table = Table(title="Retrieval of the notes clicked on the test days", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("generator", *(f"recall@{k}" for k in RECALL_AT)):
        table.add_column(name, justify="left" if name == "generator" else "right")
    for generator, values in recalls.items():
        table.add_row(generator, *(number(values[f"recall@{k}"]) for k in RECALL_AT))
    return table


def number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)
