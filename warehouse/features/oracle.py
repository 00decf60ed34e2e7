"""The oracle: the design's equation over raw events, written as plainly as possible. Every execution is judged by it.

    value(k, t, T, K) = finalize( combine over { map(e) : key(e) = k, p(e), lower <= event_ts(e) < upper, known(e) <= K } )

A retraction is an event of type `retraction` that is in no feature's set itself. It takes its target out of the set for every
reader that knows it, by the very rule by which that reader knows an event: for block freshness from the tick of its arrival,
for event freshness from its position (or landing time) on, whether or not the blocks of T still hold the target. A target that
is not known yet is not in the set anyway, so a retraction takes effect when both are known. It may come before its target and
is remembered for H: a target that lands later than that counts again. Which retractions there are is decided as for any event:
the first arrival of an id wins with its whole row. Nothing takes a retraction back.

It shares no code with the executions beyond the clock arithmetic and the definition of the sketches, and it is slow: one pass
over all events per value.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import variance
from typing import Any

from warehouse.events import RETRACTION
from warehouse.features import sketches
from warehouse.features.declarations import FeatureGroup
from warehouse.features.expressions import evaluate
from warehouse.features.measures import Measure
from warehouse.time_algebra import DUPLICATE_MEMORY_US, GRACE_US, floor_5m, known_at, session_start

Event = Mapping[str, Any]
"""A row of the event log with `event_ts` and `landed_at` in microseconds, plus the staging model's typed columns."""


@dataclass(frozen=True)
class Read:
    """One question: a key, a request time t, a tick T and what was known.

    known_tick: K of block-fresh measures. known_position: next offset per log partition, K of event-fresh measures; None
    means "landed before t", the rule for a spine without a log.
    """

    key: tuple[str | None, ...]
    request_us: int
    tick_us: int
    known_tick_us: int
    known_position: tuple[int, ...] | None = None


def values(group: FeatureGroup, events: Iterable[Event], read: Read) -> dict[str, Any]:
    """All features of the group for one read: name → int, float, list of str, dict of str to number, or None for NULL."""
    arrivals = sorted(events, key=lambda event: (event["landed_at"], event["log_partition"], event["log_offset"]))
    key = group.block_key(read.key, read.request_us)
    result: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for measure in group.measures:
        first = standing(first_arrivals([event for event in arrivals if _arrived(event, measure, read)]))
        mine = [
            event
            for event in first
            if None not in key
            and group.block_key(tuple(event[column] for column in group.entity_keys), event["event_ts"]) == key
            and (measure.where is None or evaluate(measure.where, event) is True)
            and (measure.of is None or evaluate(measure.of, event) is not None)
            and (measure.bucket_by is None or evaluate(measure.bucket_by, event) is not None)
            and (measure.freshness == "event" or known_at(event["event_ts"], event["landed_at"]) <= read.known_tick_us)
        ]
        for window in measure.windows:
            lower, upper = _bounds(measure, window.length_us, read)
            chosen = [event for event in mine if lower <= event["event_ts"] < upper]
            if window.session_gap_us:
                began = session_start({floor_5m(event["event_ts"]) for event in chosen}, upper, window.session_gap_us)
                chosen = [event for event in chosen if began is not None and event["event_ts"] >= began]
            value = _aggregate(measure, chosen)
            if value is None:
                value = measure.empty
            plain[f"{measure.name}_{window.name}"] = value
            result[f"{group.entity}_{measure.name}_{window.name}"] = value
    for derived in group.derived:
        result[f"{group.entity}_{derived.name}"] = evaluate(derived.expression, plain)
    return result


def first_arrivals(arrivals: Sequence[Event]) -> list[Event]:
    """Each event_id once: the first arrival wins with its whole row and is remembered for H after the id's last arrival.

    arrivals: in the order (landed_at, log_partition, log_offset). Heartbeats are no events.
    """
    last_seen: dict[str, int] = {}
    kept = []
    for event in arrivals:
        if event["event_type"] == "heartbeat":
            continue
        previous = last_seen.get(event["event_id"])
        if previous is None or event["landed_at"] > previous + DUPLICATE_MEMORY_US:
            kept.append(event)
        last_seen[event["event_id"]] = event["landed_at"]
    return kept


def standing(accepted: Sequence[Event]) -> list[Event]:
    """What is left of accepted events once the retractions among them have taken their targets out, and are out themselves.

    A retraction holds for every arrival of its target's id up to H after its own landing, however old.
    """
    landed_of: dict[str, list[int]] = {}
    for event in accepted:
        if event["event_type"] == RETRACTION and event["retracts"] is not None:
            landed_of.setdefault(event["retracts"], []).append(event["landed_at"])
    return [
        event
        for event in accepted
        if event["event_type"] != RETRACTION
        and not any(event["landed_at"] <= landed + DUPLICATE_MEMORY_US for landed in landed_of.get(event["event_id"], []))
    ]


def _arrived(event: Event, measure: Measure, read: Read) -> bool:
    """Whether the log held the event at K, whatever its event_ts."""
    if measure.freshness == "block":
        return floor_5m(event["landed_at"] - GRACE_US) + 5 * 60_000_000 <= read.known_tick_us
    in_blocks = floor_5m(event["landed_at"] - GRACE_US) + 5 * 60_000_000 <= read.tick_us
    if read.known_position is None:
        return in_blocks or event["landed_at"] < read.request_us
    return event["log_offset"] < read.known_position[event["log_partition"]]


def _bounds(measure: Measure, length_us: int, read: Read) -> tuple[int, int]:
    """[lower, upper) in event time."""
    if measure.freshness == "event":
        upper = read.request_us
        lower = floor_5m(read.request_us) - length_us
    else:
        upper = min(read.tick_us, read.known_tick_us)
        lower = (floor_5m(read.request_us) if measure.anchor == "request" else read.tick_us) - length_us
    return min(lower, upper), upper


def _aggregate(measure: Measure, events: list[Event]) -> Any:
    """Of events that are all in the measure's set."""
    if measure.bucket_by:
        buckets: dict[str, list[Event]] = {}
        for event in events:
            buckets.setdefault(_as_text(evaluate(measure.bucket_by, event)), []).append(event)
        return {bucket: _of_set(measure, buckets[bucket]) for bucket in sorted(buckets)}
    return _of_set(measure, events)


def _of_set(measure: Measure, events: list[Event]) -> Any:
    if measure.aggregation == "count":
        return len(events)
    assert measure.of is not None
    n = measure.n or 0
    pairs = sorted((event["event_ts"], event["event_id"].encode(), evaluate(measure.of, event)) for event in events)
    found = [value for _, _, value in pairs]
    match measure.aggregation:
        case "sum":
            return sum(found)
        case "avg":
            return sum(found) / len(found) if found else None
        case "var":
            return float(variance(map(Fraction, found))) if len(found) > 1 else None
        case "stddev":
            return math.sqrt(variance(map(Fraction, found))) if len(found) > 1 else None
        case "min":
            return min(found, default=None)
        case "max":
            return max(found, default=None)
        case "first":
            return found[0] if found else None
        case "last":
            return found[-1] if found else None
        case "first_n":
            return [_as_text(value) for value in found[:n]]
        case "last_n":
            return [_as_text(value) for value in found[-n:]]
        case "last_distinct_n":
            newest_first = list(dict.fromkeys(_as_text(value) for value in reversed(found)))
            return newest_first[:n][::-1]
        case "top_k":
            counts = Counter(map(_as_text, found))
            return sorted(counts, key=lambda text: (-counts[text], text.encode()))[: measure.k]
        case "approx_quantile":
            assert measure.q is not None
            assert measure.relative_error is not None
            buckets = Counter(sketches.bucket_of(float(value), measure.bounds) for value in found)
            return sketches.quantile(buckets, measure.q, measure.bounds, measure.relative_error)
        case "approx_count_distinct":
            ranks: dict[int, int] = {}
            for value in found:
                register, rank = sketches.register_and_rank(_as_text(value))
                ranks[register] = max(rank, ranks.get(register, 0))
            return sketches.count_distinct(ranks)
    raise AssertionError(measure.aggregation)


def _as_text(value: Any) -> str:
    """As SQL casts it to varchar."""
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
