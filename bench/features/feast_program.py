"""Feast's half of the last-value join, run by its own Python: rows.parquet and spine.parquet in, feast.parquet out."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import feast
import ibis
import pandas as pd
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Int64


def main(folder: Path, most_bytes: int) -> None:
    ibis.set_backend(ibis.duckdb.connect(memory_limit=f"{most_bytes >> 20}MiB", temp_directory=str(folder / "spilled")))
    config = RepoConfig(
        project="bench",
        registry=str(folder / "registry.db"),
        provider="local",
        offline_store={"type": "duckdb"},
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    store = FeatureStore(config=config)
    note = Entity(name="note", join_keys=["note_id"], value_type=ValueType.STRING)
    view = FeatureView(
        name="notes",
        entities=[note],
        ttl=timedelta(days=31),
        schema=[Field(name="value", dtype=Int64)],
        source=FileSource(path=str(folder / "rows.parquet"), timestamp_field="event_ts"),
    )
    store.apply([note, view])
    spine = pd.read_parquet(folder / "spine.parquet").rename(columns={"request_ts": "event_timestamp"})
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    answer = store.get_historical_features(entity_df=spine, features=["notes:value"]).to_arrow()
    spent = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
    pq.write_table(answer, folder / "feast.parquet")
    print(json.dumps({**spent, "version": feast.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
