"""Every aggregation through dbt and the lake: blocks, hours, days and features of impressions, in steps, against the oracle."""

import shutil
from pathlib import Path
from random import Random

from tests.parity.generated_events import CLOCKS_CHANGE_US, event_log, heartbeats
from tests.parity.test_batch_equals_oracle import GROUPS, assert_equal
from tests.parity.test_dbt_equals_oracle import in_us, land
from tests.warehouse.dbt_command import dbt
from tests.warehouse.test_dbt_project import copied  # noqa: F401
from warehouse.features.oracle import Read, first_arrivals, values
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.time_algebra import DAY_US

DECLARED = Path(__file__).parent / "every_aggregation" / "warehouse" / "models"
BUILT = ("maps", "moments_and_events", "fresh_sessions", "fresh_hours_of_days")


def declare(project: Path) -> None:
    """The groups, and the models of those that are built."""
    models = project / "warehouse" / "models"
    for file in ("maps.yml", "every_kind.yml", "sessions.yml", "calendar.yml"):
        shutil.copy(DECLARED / file, models / "blocks" / file)
    for name in BUILT:
        lines = "-- depends_on: {{ ref('stg_engagements') }}\n"
        (models / "blocks" / f"{name}.sql").write_text(f"{lines}{{{{ feature_blocks('{name}') }}}}\n")
        (models / "blocks" / f"{name}_1h.sql").write_text(f"{{{{ feature_roll_up('{name}', ref('{name}'), 60) }}}}\n")
        (models / "blocks" / f"{name}_1d.sql").write_text(f"{{{{ feature_roll_up('{name}', ref('{name}_1h'), 1440) }}}}\n")
        config = "{{ config(event_time='labels_known_at', partition_by={'labels_known_at': 'day'}) }}\n"
        (models / "training" / f"impression_{name}.sql").write_text(f"{config}{{{{ impression_features('{name}') }}}}\n")


def test_features_of_impressions_equal_the_equation(copied, tmp_path):  # noqa: F811
    declare(copied)
    home = Home(tmp_path / "home")
    lake = Lake.open(home)
    rows = event_log(Random(20260308), num_events=250, start_us=CLOCKS_CHANGE_US)
    rows += heartbeats(rows, max(row["landed_at"] for row in rows) + 2 * DAY_US)
    for first, last in ((0, 150), (150, len(rows))):
        land(lake, rows[first:last])
        selected = [f"+impression_{name}" for name in BUILT]
        dbt(home, "run", "--quiet", "--select", *selected, project=copied)
    views = {row["impression_id"]: row for row in first_arrivals(rows) if row["event_type"] == "view"}
    with lake.duckdb() as connection:
        times = connection.execute("select impression_id, request_ts, feature_watermark from training.impressions").fetchall()
        told = {row[0]: (in_us(row[1]), in_us(row[2])) for row in times}
        for name in BUILT:
            found = connection.execute(f"from training.impression_{name}").to_arrow_table().to_pylist()
            assert len(found) == len(told) > 30
            group = GROUPS[name]
            for answer in found:
                view = views[answer["impression_id"]]
                request_us, tick_us = told[answer["impression_id"]]
                read = Read(tuple(view[key] for key in group.entity_keys), request_us, tick_us, tick_us)
                for feature, value in values(group, rows, read).items():
                    assert_equal(answer[feature], value, (feature, read))
