"""Writes training examples and dimensions as Parquet with a manifest, for models that know nothing of the lake."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warehouse.errors import HeadraceError
from warehouse.features.declarations import declarations_hash, load_groups
from warehouse.features.kinds.declared import Kinds, load_kinds
from warehouse.home import Home
from warehouse.lake import Lake, quoted

EXAMPLES = "training.training_examples"
EVENTS = "staging.stg_engagements"
FORWARD_LOG = "lake.forward_log"
TEST_DAYS = 2


@dataclass(frozen=True)
class Export:
    folder: Path
    num_rows: int
    test_start: str


def export_training(lake: Lake, home: Home, kinds: Kinds | None = None) -> Export:
    """Replaces `<home>/exports/`: examples.parquet, notes.parquet, users.parquet, manifest.json (written last).

    The test set is the last two days of impressions by request_ts, from a full hour on; those too recent for their outcomes
    to be final are not there yet. kinds: those of the project's declarations when absent; what only the forward log knows is
    taken from there, and is NULL for an impression that no server here has shown.
    """
    if not lake.exists(EXAMPLES):
        raise HeadraceError("the lake has no training examples yet; run `dbt build` first")
    folder = home.exports
    manifest_path = folder / "manifest.json"
    with lake.duckdb() as connection:
        num_rows, test_start = connection.execute(
            f"""
            with last_view as (select max(event_ts) as event_ts from {EVENTS} where event_type = 'view')

            select
                (select count(*) from {EXAMPLES}),
                strftime(date_trunc('hour', event_ts - interval '{TEST_DAYS} days') + interval '1 hour', '%Y-%m-%dT%H:%M:%SZ')
            from last_view
            """
        ).fetchall()[0]
        if num_rows == 0:
            raise HeadraceError("there are no training examples: no impression is old enough for its outcomes to be final")
        manifest_path.unlink(missing_ok=True)
        others = kinds or load_kinds()
        there = {row[0] for row in connection.execute(f"describe {EXAMPLES}").fetchall()}
        features = [name for group in load_groups().values() for name in group.feature_names]
        features += [name for table in others.tables for name in table.feature_names if name in there]
        doubles = ", ".join(f"cast({name} as double) as {name}" for name in [*features, "note_duration_ms", "note_age_min"])
        served = _served(others.served_inputs, lake.exists(FORWARD_LOG))
        queries = {
            "examples": f"select examples.* replace ({doubles}){served} order by request_ts, impression_id",
            "notes": "select * from lake.notes order by note_id",
            "users": "select * from lake.users order by user_id",
        }
        for name, query in queries.items():
            unfinished = folder / f"{name}.parquet.part"
            connection.execute(f"copy ({query}) to {quoted(str(unfinished))} (format parquet, compression zstd)")
            os.replace(unfinished, folder / f"{name}.parquet")
    manifest = {
        "dataset": lake.properties("lake.events").get("headrace.source", "log"),
        "snapshots": {name: lake.table(name).metadata.current_snapshot_id for name in (EXAMPLES, "lake.notes", "lake.users")},
        "declarations_hash": declarations_hash(load_groups()),
        "test_start": test_start,
        "num_rows": num_rows,
        "files": {f"{name}.parquet": _sha256(folder / f"{name}.parquet") for name in queries},
    }
    unfinished = folder / "manifest.json.part"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(unfinished, manifest_path)
    return Export(folder, num_rows, test_start)


def _served(names: Sequence[str], has_log: bool) -> str:
    """The rest of a select over the examples: one double per name, from the request that showed the impression."""
    if not names or not has_log:
        return "".join(f", null::double as {name}" for name in names) + f" from {EXAMPLES} as examples"
    return (
        "".join(f", log.user_features[{quoted(name)}] as {name}" for name in names)
        + f" from {EXAMPLES} as examples left join ("
        "select candidate.impression_id, any_value(user_features) as user_features "
        f"from (select user_features, unnest(candidates) as candidate from {FORWARD_LOG}) "
        "where candidate.impression_id is not null group by candidate.impression_id"
        ") as log on examples.impression_id = log.impression_id"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
