"""Our executions of the same reads: `compute`, the SQL of `point_in_time`, and a real dbt run of a training model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import yaml

from bench.features.declared import DAYS, GROUP, START_US
from bench.features.lakes import replace, ticks_sql
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.compute import computed_chunks
from warehouse.features.compute_plan import plan
from warehouse.features.compute_source import Relations
from warehouse.features.compute_spine import Spine
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import point_in_time_sql
from warehouse.home import REPOSITORY, Home
from warehouse.lake import Lake
from warehouse.landing import create_tables
from warehouse.time_algebra import DAY_US

IMPRESSIONS, MODEL = "training.impressions", f"impression_{GROUP.name}"


def by_compute(lake: Lake, spine: pa.Table) -> pa.Table:
    return pa.concat_tables(compute_chunks(lake, spine, GROUP))


def compute_chunks(lake: Lake, spine: pa.Table, group: FeatureGroup) -> Iterator[pa.Table]:
    return computed_chunks(lake, Spine(spine, "the spine"), plan({group.name: group}, spine.column_names, None), None)


def by_sql(lake: Lake, spine: pa.Table, spill: Path) -> pa.Table:
    """The portable SQL, over Iceberg."""
    with lake.duckdb() as connection:
        connection.execute(f"set temp_directory = '{spill}'")
        connection.register("given", spine)
        connection.execute(
            f"create temp table spine as select impression_id as row_id, note_id, request_ts, {ticks_sql('request_ts')} "
            "as feature_watermark, feature_watermark as known_at, null::bigint[] as known_position from given"
        )
        sql = point_in_time_sql(GROUP, "spine", **asdict(Relations.of(GROUP)))
        return connection.execute(f"select * from ({sql}) as answers order by row_id").to_arrow_table()


class DbtProject:
    """A dbt project of its own with the group's blocks and one training model, over a lake that is built up to that model.

    Macros, staging models, materialization and plugin are the repository's; only the declaration is the bench's.
    """

    def __init__(self, lake: Lake, home: Home, spine: pa.Table, folder: Path):
        self._lake, self._home, self._folder = lake, home, folder
        warehouse = folder / "warehouse"
        for name in ("macros", "tests", "models/staging"):
            shutil.copytree(REPOSITORY / "warehouse" / name, warehouse / name)
        settings = yaml.safe_load((REPOSITORY / "dbt_project.yml").read_text())
        settings |= {"model-paths": ["warehouse/models"], "macro-paths": ["warehouse/macros"]}
        (folder / "dbt_project.yml").write_text(yaml.safe_dump(settings))
        blocks, training = warehouse / "models" / "blocks", warehouse / "models" / "training"
        blocks.mkdir(parents=True)
        training.mkdir()
        (blocks / f"{GROUP.name}.sql").write_text(f"{{{{ feature_blocks('{GROUP.name}') }}}}\n")
        for name, child, minutes in (("1h", "", 60), ("1d", "_1h", 1440)):
            sql = f"{{{{ feature_roll_up('{GROUP.name}', ref('{GROUP.name}{child}'), {minutes}) }}}}\n"
            (blocks / f"{GROUP.name}_{name}.sql").write_text(sql)
        shutil.copy(REPOSITORY / "warehouse" / "models" / "training" / "impressions.sql", training)
        (training / f"{MODEL}.sql").write_text(f"{{{{ impression_features('{GROUP.name}') }}}}\n")
        meta = GROUP.as_meta()
        settings = ("name", "aggregation", "where", "of", "windows")
        measures = [{key: measure[key] for key in settings if measure[key]} for measure in meta["measures"]]
        declared = {key: meta[key] for key in ("entity", "events", "keys")} | {"measures": measures}
        of_blocks = {"name": GROUP.name, "config": {"meta": {"features": declared}}}
        of_model = {"name": MODEL, "config": {"event_time": "labels_known_at", "partition_by": {"labels_known_at": "day"}}}
        (blocks / "bench.yml").write_text(yaml.safe_dump({"version": 2, "models": [of_blocks, of_model]}))
        self._land(spine)

    def _land(self, spine: pa.Table) -> None:
        """The impressions, and a heartbeat per partition of the log: everything is read."""
        create_tables(self._lake)
        end_us = START_US + (DAYS + 2) * DAY_US
        beats = [
            dict.fromkeys(EVENTS_SCHEMA.names)
            | {"event_id": f"heartbeat:{number}", "event_type": "heartbeat", "event_ts": end_us, "landed_at": end_us}
            | {"log_partition": number, "log_offset": 0, "landing": "log"}
            for number in (0, 1)
        ]
        self._lake.append("lake.events", pa.Table.from_pylist(beats, schema=EVENTS_SCHEMA))
        with self._lake.duckdb() as connection:
            connection.register("given", spine)
            rows = connection.execute(
                f"select *, {ticks_sql('request_ts')} as feature_watermark, known_at as labels_known_at from "
                f"(select *, {ticks_sql('request_ts')} + interval 80 minute as known_at from given)"
            ).to_arrow_table()
        replace(self._lake, IMPRESSIONS, rows)

    def run(self) -> float:
        """`dbt run` of the model, whole; returns the seconds that dbt counts for the model alone."""
        environment = os.environ | {"HEADRACE_HOME": str(self._home.path), "PYTHONPATH": str(REPOSITORY)}
        command = [str(Path(sys.executable).with_name("dbt")), "--quiet", "--no-use-colors", "run", "--full-refresh"]
        command += ["--select", MODEL, "--project-dir", str(self._folder), "--profiles-dir", str(REPOSITORY)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=self._folder)
        if done.returncode:
            raise SystemExit(f"dbt run failed:\n{done.stdout}{done.stderr}")
        results = json.loads((self._home.dbt / "target" / "run_results.json").read_text())["results"]
        return sum(result["execution_time"] for result in results)

    def rows(self) -> pa.Table:
        with self._lake.duckdb() as connection:
            return connection.execute(f"from training.{MODEL} order by impression_id").to_arrow_table()
