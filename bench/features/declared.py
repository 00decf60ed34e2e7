"""The feature group that is measured: six measures with six windows each, and wider ones of the same kind."""

from typing import Any

from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.time_algebra import parse_window

START_US = 1_767_225_600_000_000
"""2026-01-01 00:00 UTC."""
DAYS = 30
TYPES = ("view", "click", "like", "comment", "share", "watch")
COUNTED = TYPES[:5]
WINDOWS = ("1h", "6h", "1d", "3d", "7d", "30d")
MANY_WINDOWS = ("5m", "15m", "30m", "1h", "3h", "6h", "12h", "1d", "3d", "7d", "14d", "30d")


def _measure(name: str, aggregation: str, where: str | None, of: str | None, windows: tuple[str, ...]) -> Measure:
    settings: dict[str, Any] = dict.fromkeys(("n", "k", "q", "relative_error", "bucket_by", "empty"))
    lengths = tuple(map(parse_window, windows))
    return Measure(
        name,
        aggregation,
        where,
        of,
        type="bigint",
        windows=lengths,
        freshness="block",
        anchor="tick",
        description="",
        **settings,
    )


def _group(measures: list[Measure]) -> FeatureGroup:
    source = "bench/features/declared.py"
    return FeatureGroup("bench_notes", "note", ("note_id",), "stg_engagements", tuple(measures), (), source)


def _counts_and_a_sum() -> FeatureGroup:
    counts = [_measure(f"num_{kind}s", "count", f"event_type = '{kind}'", None, WINDOWS) for kind in COUNTED]
    return _group([*counts, _measure("total_watch_ms", "sum", None, "watch_ms", WINDOWS)])


def many(num_measures: int) -> FeatureGroup:
    """Counts by type and sums of watch time above a bound, twelve windows each: 84 measures are 1,008 features."""
    measures = []
    for number in range(num_measures):
        kind, bound = TYPES[number % len(TYPES)], 1000 * (number // len(TYPES))
        where = f"event_type = '{kind}' and coalesce(watch_ms, {bound}) >= {bound}"
        if kind == "watch":
            measures.append(_measure(f"watch_ms_{number}", "sum", f"watch_ms >= {bound}", "watch_ms", MANY_WINDOWS))
        else:
            measures.append(_measure(f"num_{kind}s_{number}", "count", where, None, MANY_WINDOWS))
    return _group(measures)


GROUP = _counts_and_a_sum()
