"""What a measure is: an aggregation over a group's events, how its representation is stored, and what shape its features have.

Knows nothing of YAML, SQL or arrays: the table of aggregations below is what every execution is written against.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from warehouse.features import sketches
from warehouse.time_algebra import Window


@dataclass(frozen=True)
class Aggregation:
    """One row of the design's table "Aggregations".

    representation: how blocks store it. `number`: columns that add up; `extreme`: a least or largest value; `moments`:
    (n, mean, M2); `events`: a list of (event_ts, event_id, value) in that order; `map`: a list of (entry, value), by entry.
    shape: what a reader gets: a `number`, or a `list` of text. types: declared types of `of`, the default first.
    """

    representation: str
    shape: str
    types: tuple[str, ...]
    setting: str | None = None
    """The number that it needs in its declaration: `n`, `k` or `q`."""


_NUMBERS = ("bigint", "double")
AGGREGATIONS = {
    "count": Aggregation("number", "number", ("bigint",)),
    "sum": Aggregation("number", "number", _NUMBERS),
    "avg": Aggregation("number", "number", _NUMBERS),
    "var": Aggregation("moments", "number", ("double",)),
    "stddev": Aggregation("moments", "number", ("double",)),
    "min": Aggregation("extreme", "number", _NUMBERS),
    "max": Aggregation("extreme", "number", _NUMBERS),
    "first": Aggregation("events", "number", _NUMBERS),
    "last": Aggregation("events", "number", _NUMBERS),
    "first_n": Aggregation("events", "list", ("varchar",), "n"),
    "last_n": Aggregation("events", "list", ("varchar",), "n"),
    "last_distinct_n": Aggregation("events", "list", ("varchar",), "n"),
    "top_k": Aggregation("map", "list", ("varchar",), "k"),
    "approx_quantile": Aggregation("map", "number", ("double",), "q"),
    "approx_count_distinct": Aggregation("map", "number", ("varchar",)),
}
BUCKETED = ("count", "sum", "avg", "min", "max")
"""Aggregations that `bucket_by` splits into one per bucket."""
INVERTIBLE = ("count", "sum", "avg")
"""Aggregations whose representation can be subtracted: windows are differences of prefix sums (exact for integers)."""
CALENDAR_PARTS = {"hour": "hour", "day_of_week": "isodow", "day_of_month": "day", "month": "month"}
"""Declared part → the field that SQL extracts; Monday is day 1 of the week."""


@dataclass(frozen=True)
class Measure:
    """One aggregation over a group's events; one feature per window."""

    name: str
    aggregation: str
    where: str | None
    of: str | None
    type: str
    n: int | None
    """How many values a list keeps (first_n, last_n, last_distinct_n; 1 for first and last)."""
    k: int | None
    """How many entries top_k gives."""
    q: float | None
    """Which quantile, 0 to 1."""
    relative_error: float | None
    """Of approx_quantile: the value is within this share of a true quantile's."""
    bucket_by: str | None
    """An expression; the feature is a map from its text to the aggregate of the events that have it."""
    empty: float | None
    """Instead of NULL, where the set is empty (numbers only)."""
    windows: tuple[Window, ...]
    freshness: str
    anchor: str
    description: str

    @property
    def representation(self) -> str:
        return "map" if self.bucket_by else AGGREGATIONS[self.aggregation].representation

    @property
    def shape(self) -> str:
        """`number`, `list` (of text) or `map` (text to number)."""
        return "map" if self.bucket_by else AGGREGATIONS[self.aggregation].shape

    @property
    def is_sequence(self) -> bool:
        """Whether a reader gets a list of text."""
        return self.shape == "list"

    @property
    def is_invertible(self) -> bool:
        return self.aggregation in INVERTIBLE and self.type == "bigint" and not self.bucket_by

    @property
    def has_sessions(self) -> bool:
        return any(window.session_gap_us for window in self.windows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The block columns that hold the representation: what `representation_columns` of the macros gives."""
        if self.aggregation == "avg":
            return (f"{self.name}__sum", f"{self.name}__n")
        if self.aggregation in ("var", "stddev"):
            return (f"{self.name}__n", f"{self.name}__mean", f"{self.name}__m2")
        if self.aggregation == "sum" and self.has_sessions and not self.bucket_by:
            return (self.name, f"{self.name}__n")  # a session is cut where nothing was, not where the sum is 0
        return (self.name,)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Edges of the buckets of approx_quantile, ascending; none of the other aggregations."""
        return sketches.bounds(self.relative_error) if self.relative_error else ()


@dataclass(frozen=True)
class CalendarKey:
    """A key column that is a part of `event_ts` in a zone; a reader's is that part of t."""

    name: str
    part: str
    zone: str

    def of(self, instant_us: int) -> str:
        """`"7"` for hour 7. instant_us: microseconds since 1970, UTC."""
        local = datetime.fromtimestamp(instant_us // 1_000_000, UTC).astimezone(ZoneInfo(self.zone))
        parts = {"hour": local.hour, "day_of_week": local.isoweekday(), "day_of_month": local.day, "month": local.month}
        return str(parts[self.part])
