"""Shared by every room's tests: one hypothesis profile, no wall-clock flakiness, and the dearest files first."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

DEAREST = (
    "end_to_end/test_demo.py",
    "warehouse/test_dbt_project.py",
    "parity/test_compute_equals_oracle.py",
    "parity/test_dbt_equals_oracle.py",
    "serving/test_workers.py",
    "parity/test_http_equals_oracle.py",
    "kernels/test_kernel_ahead_of_time.py",
    "warehouse/test_plan.py",
    "parity/test_light_events.py",
    "streaming_sql/test_runner.py",
    "warehouse/test_compute.py",
    "parity/test_planted_faults.py",
    "serving/test_parity.py",
    "parity/test_dbt_every_aggregation.py",
    "streaming_sql/test_features_cli.py",
    "parity/test_table_features.py",
    "serving/test_operations.py",
)
"""Files of twenty seconds or more, the longest first."""

settings.register_profile(
    "headrace", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], derandomize=True
)
settings.load_profile("headrace")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`--dist loadfile` gives whole files to its workers: with the long ones first they end together."""
    folder = Path(__file__).parent
    if gone := [name for name in DEAREST if not (folder / name).exists()]:
        raise pytest.UsageError(f"tests/conftest.py: DEAREST names {', '.join(gone)}, which is not there")
    places = {folder / name: place for place, name in enumerate(DEAREST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
