"""`headrace features document`: what each feature means and where it comes from, on the pages of `dbt docs`.

Writes the properties of the models that hold a group's features of training rows: dbt shows a column only as a properties file
describes it, and such a file cannot be computed while dbt runs. Commit what it writes; `--check` says whether it is current.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from warehouse.durable import replace_file
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.lineage import described
from warehouse.home import REPOSITORY

FOLDER = Path("warehouse") / "models" / "training"
PROPERTIES = FOLDER / "_features.yml"
_HEAD = "# Written by `headrace features document` from the declarations: change those, and run it again.\n"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="headrace features document",
        description=f"Writes {PROPERTIES}: the meaning, sources and error bound of every feature, for `dbt docs`.",
        epilog="  headrace features document && dbt docs generate\n  headrace features document --check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if it is not up to date")
    given = parser.parse_args(words)
    path, text = REPOSITORY / PROPERTIES, properties(load_groups(), REPOSITORY)
    is_current = path.exists() and path.read_text() == text
    if given.check:
        print(f"{PROPERTIES} is up to date" if is_current else f"{PROPERTIES} is not up to date: headrace features document")
        return 0 if is_current else 1
    if not is_current:
        try:
            replace_file(path, text.encode())
        except OSError as error:
            raise HeadraceError(f"{PROPERTIES} cannot be written: {error}") from None
    print(f"{PROPERTIES} {'was up to date' if is_current else 'written'}")
    return 0


def properties(groups: Mapping[str, FeatureGroup], project: Path) -> str:
    """The YAML of every model `impression_<group>` of the project that has features of its group."""
    features: dict[str, list[dict[str, Any]]] = {}
    for row in described(groups):
        features.setdefault(row["group"], []).append(row)
    models = [
        _model(groups[name], rows) for name, rows in features.items() if (project / FOLDER / f"impression_{name}.sql").exists()
    ]
    text: str = yaml.safe_dump({"version": 2, "models": models}, sort_keys=False, width=126, allow_unicode=True)
    return _HEAD + text


def _model(group: FeatureGroup, rows: list[dict[str, Any]]) -> dict[str, Any]:
    fresh = any(measure.freshness == "event" for measure in group.measures)
    times = "t, T and K" if fresh else "T and K"
    impression = {"name": "impression_id", "description": "The impression.", "data_tests": ["not_null", "unique"]}
    known = {"name": "labels_known_at", "description": "The tick at which its outcomes are final."}
    return {
        "name": f"impression_{group.name}",
        "description": f"Features of {group.name} at each impression's own {times}. One row per impression.",
        "config": {"event_time": "labels_known_at", "partition_by": {"labels_known_at": "day"}},
        "columns": [impression, known, *map(_column, rows)],
    }


def _column(row: dict[str, Any]) -> dict[str, Any]:
    first, last = row["steps"][0], row["steps"][-1]
    if last.startswith(f"{row['feature']} = "):
        meaning = last
    else:
        meaning = first.partition(": ")[2].partition(", per (")[0] + last.partition(": combined")[2]
    sentences = [row["description"].rstrip(".")] if row["description"] else []
    return {
        "name": row["feature"],
        "description": ". ".join([*sentences, meaning]) + ".",
        "config": {
            "meta": {
                "lineage": row["steps"],
                "source_columns": row["source_columns"],
                "error_bound": row["error_bound"],
                "declared_in": row["declared_in"].rpartition(":")[0],
            }
        },
    }
