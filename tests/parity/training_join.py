"""The training join on an in-memory DuckDB: the very text of dbt's models, and the engine that answers them, without dbt.

One build from nothing: ranges of arrival, commits and steps are dbt's own and looked at in `test_dbt_equals_oracle`.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import jinja2
import yaml

from tests.parity.test_compute_equals_oracle import RELATIONS
from warehouse.features.compute_model import model_chunks
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.render import MACROS, TRAINING_MACROS
from warehouse.home import REPOSITORY

MODELS = REPOSITORY / "warehouse" / "models" / "training"
_TABLES = {"stg_engagements": "staged", "stg_retracted_events": "retracted"}


@cache
def model_sql(name: str) -> str:
    """A training model's SQL as dbt compiles it, over the whole history."""
    variables = yaml.safe_load((REPOSITORY / "dbt_project.yml").read_text())["vars"]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, extensions=["jinja2.ext.do"])
    environment.globals.update(
        target={"type": "duckdb"},
        var=variables.__getitem__,
        config=lambda **_: "",
        ref=lambda model: _TABLES.get(model, model),
        in_build_range=lambda column: "true",
        feature_group=lambda group: load_groups()[group].as_meta(),
    )
    macros = [path.read_text() for folder in (MACROS, TRAINING_MACROS) for path in sorted(folder.glob("*.sql"))]
    return environment.from_string("\n".join([*macros, (MODELS / f"{name}.sql").read_text()])).render().strip()


def labels(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """impression_id and labels of every impression. connection: with the tables that `build` makes."""
    for model in ("impressions", "impression_labels"):
        connection.execute(f"create or replace table {model} as {model_sql(model)}")
    return connection.execute("from impression_labels").to_arrow_table().to_pylist()


def features(connection: duckdb.DuckDBPyConnection, group: FeatureGroup, scratch: Path) -> Iterator[dict[str, Any]]:
    """impression_id and features of every impression, after `labels`."""
    spine = model_sql(f"impression_{group.name}")
    for chunk in model_chunks(connection, spine, group, RELATIONS, "labels_known_at", scratch, rows=50):
        yield from chunk.to_pylist()
