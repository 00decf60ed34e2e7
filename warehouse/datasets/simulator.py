"""A note feed that does not exist: seeded readers, authors and notes, in the same shape as imported history.

Stands in where the real data is absent, and feeds the tests. Readers have tastes over topics and notes have a quality; both
decide what is clicked, so models have something to learn. A request shows several notes, some picked by popularity, some by
taste. Nothing here imitates a measured feed: read no product figure from it.

Shape letters: U users, N notes, A authors, K topics, R requests, S notes per request.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warehouse.datasets.base import NOTES_SCHEMA, USERS_SCHEMA, Dataset
from warehouse.datasets.impressions import IMPRESSIONS_SCHEMA, events_from_impressions
from warehouse.events import TIMESTAMP
from warehouse.time_algebra import DAY_US, HOUR_US

TOPICS = (
    "animals", "art", "books", "cars", "comedy", "cooking", "dance", "diy", "family", "fashion",
    "fitness", "games", "gardens", "music", "news", "photography", "science", "sport", "tech", "travel",
)  # fmt: skip
CITIES = ("u33db2", "u09tvw", "gcpvj0", "dr5reg", "9q8yyk", "xn76ur", "wx4g0b", "6gyf4b", "r3gx2f", "ezjmgt")
"""Where authors live: cells about a kilometre wide."""
NOTES_PER_REQUEST = 12
FEWEST_NOTES = 4 * NOTES_PER_REQUEST
LONGEST_HISTORY = 3 * NOTES_PER_REQUEST
SHARE_SENT_AGAIN = 0.02
SHARE_BORN_DURING = 0.2
DEFAULT_START = datetime(2022, 4, 25, tzinfo=UTC)
HOUR_WEIGHTS = np.array([3, 2, 1, 1, 1, 2, 3, 5, 6, 6, 6, 7, 9, 8, 7, 7, 7, 8, 9, 11, 13, 14, 11, 6], dtype=np.float64)
"""Relative number of requests per hour of the day, UTC."""


@dataclass(frozen=True)
class _World:
    """affinity is how well a topic suits a reader, in logits; notes are numbered by falling popularity."""

    affinity_UK: np.ndarray
    mood_U: np.ndarray
    activity_U: np.ndarray
    topic_N: np.ndarray
    second_topic_N: np.ndarray
    author_N: np.ndarray
    quality_N: np.ndarray
    popularity_N: np.ndarray
    duration_ms_N: np.ndarray
    created_us_N: np.ndarray


def simulate(
    seed: int = 7,
    num_users: int = 4000,
    num_notes: int = 3000,
    days: int = 8,
    start: datetime = DEFAULT_START,
    requests_per_user_day: float = 0.5,
    notes_per_request: int = NOTES_PER_REQUEST,
) -> Dataset:
    """A simulated history; the defaults give about 190,000 impressions. The same arguments give the same data set.

    start: first instant, with a zone. requests_per_user_day: mean; a few readers make many requests and most make few.
    Raises ValueError when an argument is out of range (num_notes must be at least 48: four requests' worth).
    """
    return simulate_with_truth(seed, num_users, num_notes, days, start, requests_per_user_day, notes_per_request)[0]


def simulate_with_truth(
    seed: int,
    num_users: int,
    num_notes: int,
    days: int,
    start: datetime,
    requests_per_user_day: float = 0.5,
    notes_per_request: int = NOTES_PER_REQUEST,
) -> tuple[Dataset, pa.Table]:
    """As `simulate`, and what no model may see: `impression_id`, `click_probability` of every distinct impression."""
    _check(num_users, num_notes, days, start, requests_per_user_day, notes_per_request)
    rng = np.random.default_rng(seed)
    start_us = round(start.timestamp() * 1_000_000)
    world = _draw_world(rng, num_users, num_notes, start_us, days)
    asked = days, requests_per_user_day, notes_per_request
    impressions, click_probability = _draw_impressions(rng, world, seed, start_us, *asked)
    truth = pa.table({"impression_id": impressions["impression_id"], "click_probability": click_probability})
    log = _send_some_again(rng, impressions)
    dataset = Dataset(
        name="simulator",
        events=events_from_impressions(log, seed),
        notes=_notes(world),
        users=_users(rng, world, start_us),
        description=(
            f"Simulated note feed (seed {seed}): {len(log):,} impressions of {num_notes:,} notes shown to {num_users:,} "
            f"readers over {days} days; nothing in it is real"
        ),
    )
    return dataset, truth


def _check(
    num_users: int, num_notes: int, days: int, start: datetime, requests_per_user_day: float, notes_per_request: int
) -> None:
    if num_users < 1 or days < 1 or requests_per_user_day <= 0 or notes_per_request < 1:
        raise ValueError(
            "num_users, days and notes_per_request must be at least 1 and requests_per_user_day positive, "
            f"got {num_users}, {days}, {notes_per_request} and {requests_per_user_day}"
        )
    fewest = max(FEWEST_NOTES, 4 * notes_per_request)
    if num_notes < fewest:
        raise ValueError(f"num_notes must be at least {fewest}, got {num_notes}")
    if start.tzinfo is None:
        raise ValueError(f"start needs a zone, got {start.isoformat()}; use datetime(..., tzinfo=UTC)")


def _draw_world(rng: np.random.Generator, num_users: int, num_notes: int, start_us: int, days: int) -> _World:
    num_topics, num_authors = len(TOPICS), max(8, num_notes // 4)
    topic_A = rng.choice(num_topics, num_authors, p=_zipf(num_topics, 0.5))
    author_N = rng.choice(num_authors, num_notes, p=_zipf(num_authors, 0.6))
    off_topic_N = rng.random(num_notes) < 0.2
    created_us_N = start_us - rng.integers(1, 20 * DAY_US, num_notes)
    born_during_N = rng.random(num_notes) < SHARE_BORN_DURING
    born_during_N[:FEWEST_NOTES] = False  # so that the first request finds enough notes
    created_us_N[born_during_N] = start_us + rng.integers(0, days * DAY_US, int(born_during_N.sum()))
    return _World(
        affinity_UK=rng.normal(0, 1.2, (num_users, num_topics)),
        mood_U=rng.normal(0, 0.5, num_users),
        activity_U=rng.lognormal(0, 1.0, num_users),
        topic_N=np.where(off_topic_N, rng.integers(0, num_topics, num_notes), topic_A[author_N]),
        second_topic_N=np.where(rng.random(num_notes) < 0.3, rng.integers(0, num_topics, num_notes), -1),
        author_N=author_N,
        quality_N=rng.normal(0, 0.8, num_notes) + rng.normal(0, 0.4, num_authors)[author_N],
        popularity_N=_zipf(num_notes, 0.8),
        duration_ms_N=rng.lognormal(np.log(45_000), 0.9, num_notes).clip(5_000, 900_000).astype(np.int64),
        created_us_N=created_us_N,
    )


def _draw_impressions(
    rng: np.random.Generator,
    world: _World,
    seed: int,
    start_us: int,
    days: int,
    requests_per_user_day: float,
    notes_per_request: int,
) -> tuple[pa.Table, np.ndarray]:
    """IMPRESSIONS_SCHEMA [R*S] in order of the view, and each row's click probability."""
    request_us, user_R = _draw_requests(rng, world, start_us, days, requests_per_user_day)
    note_RS = _draw_notes(rng, world, user_R, request_us, notes_per_request)
    num_requests, num_slots = note_RS.shape
    note, user = note_RS.ravel(), np.repeat(user_R, num_slots)
    slot = np.tile(np.arange(num_slots), num_requests)
    scroll_us_RS = np.cumsum(rng.lognormal(np.log(4_000_000), 0.8, note_RS.shape), axis=1).astype(np.int64)
    view_us = np.repeat(request_us, num_slots) + scroll_us_RS.ravel()

    interest = world.affinity_UK[user, world.topic_N[note]] + world.quality_N[note]
    click_probability = _sigmoid(-0.5 + interest + world.mood_U[user] - 0.04 * slot)
    clicked = rng.random(len(note)) < click_probability
    engaged_share = rng.lognormal(-0.6 + 0.3 * interest, 0.8)
    glance_ms = rng.exponential(1_500, len(note)) * (rng.random(len(note)) < 0.8)
    play_ms = np.where(clicked, world.duration_ms_N[note] * engaged_share.clip(0, 3), glance_ms).astype(np.int64)
    flags = {
        "click": clicked,
        # the rule of KuaiRand: the whole of a short video, 18 seconds of a longer one
        "long_view": clicked & (play_ms >= np.minimum(world.duration_ms_N[note], 18_000)),
        "like": clicked & (rng.random(len(note)) < _sigmoid(-3.8 + interest)),
        "comment": clicked & (rng.random(len(note)) < _sigmoid(-5.6 + interest)),
        "share": clicked & (rng.random(len(note)) < _sigmoid(-6.6 + interest)),
        "follow": clicked & (rng.random(len(note)) < _sigmoid(-6.4 + interest)),
        "hide": ~clicked & (rng.random(len(note)) < _sigmoid(-6.0 - interest)),
    }
    request_id = pc.binary_join_element_wise(f"sim{seed}", _text(np.repeat(np.arange(num_requests), num_slots)), "-")
    columns = {
        "impression_id": pc.binary_join_element_wise(request_id, _text(slot), "-"),
        "user_id": _ids("u", user),
        "note_id": _ids("n", note),
        "author_id": _ids("a", world.author_N[note]),
        "surface": pa.array(np.array(["tab_0", "tab_1", "tab_4"])[np.repeat(_surfaces(rng, num_requests), num_slots)]),
        "request_id": request_id,
        "view_us": view_us,
        "play_ms": play_ms,
        **flags,
    }
    order = np.argsort(view_us, kind="stable")
    impressions = pa.table(columns).select(IMPRESSIONS_SCHEMA.names).cast(IMPRESSIONS_SCHEMA)
    return impressions.take(order).combine_chunks(), click_probability[order]


def _surfaces(rng: np.random.Generator, num_requests: int) -> np.ndarray:
    return rng.choice(3, num_requests, p=[0.12, 0.8, 0.08])


def _draw_requests(
    rng: np.random.Generator, world: _World, start_us: int, days: int, requests_per_user_day: float
) -> tuple[np.ndarray, np.ndarray]:
    """(request_us [R] ascending, user [R]); at least one request."""
    num_users = len(world.activity_U)
    num_requests = max(1, rng.poisson(requests_per_user_day * days * num_users))
    user_R = rng.choice(num_users, num_requests, p=world.activity_U / world.activity_U.sum())
    hour_R = rng.choice(24, num_requests, p=HOUR_WEIGHTS / HOUR_WEIGHTS.sum())
    day_R = rng.integers(0, days, num_requests)
    request_us = start_us + day_R * DAY_US + hour_R * HOUR_US + rng.integers(0, HOUR_US, num_requests)
    return np.sort(request_us), user_R


def _draw_notes(
    rng: np.random.Generator, world: _World, user_R: np.ndarray, request_us: np.ndarray, num_slots: int
) -> np.ndarray:
    """int64 [R, S]: half by popularity, half by popularity within a topic of the reader's taste; distinct within a request,
    and only notes that exist by then."""
    shape = (len(user_R), num_slots)
    by_popularity = np.searchsorted(np.cumsum(world.popularity_N), rng.random(shape), side="right")
    by_taste = _notes_of_topics(rng, world, _topics_of_taste(rng, world, user_R, num_slots))
    note_RS = np.where(rng.random(shape) < 0.5, by_popularity, by_taste).clip(0, len(world.topic_N) - 1)
    while np.any(unfit_RS := _repeated(note_RS) | (world.created_us_N[note_RS] > request_us[:, None])):
        note_RS[unfit_RS] = rng.integers(0, len(world.topic_N), int(unfit_RS.sum()))
    return note_RS


def _topics_of_taste(rng: np.random.Generator, world: _World, user_R: np.ndarray, num_slots: int) -> np.ndarray:
    taste_UK = np.exp(world.affinity_UK)
    cumulative_UK = np.cumsum(taste_UK / taste_UK.sum(axis=1, keepdims=True), axis=1)
    cumulative_UK[:, -1] = 1.0
    draws_RS = rng.random((len(user_R), num_slots))
    return np.stack([(cumulative_UK[user_R] <= draws_RS[:, [s]]).sum(axis=1) for s in range(num_slots)], axis=1)


def _notes_of_topics(rng: np.random.Generator, world: _World, topic_RS: np.ndarray) -> np.ndarray:
    """One note per topic asked for, by popularity within it; a topic without notes falls to a neighbouring one."""
    order = np.argsort(world.topic_N, kind="stable")
    cumulative = np.concatenate([[0.0], np.cumsum(world.popularity_N[order])])
    edges = np.searchsorted(world.topic_N[order], np.arange(len(TOPICS) + 1))
    low, high = cumulative[edges[topic_RS]], cumulative[edges[topic_RS + 1]]
    drawn = np.searchsorted(cumulative, low + rng.random(topic_RS.shape) * (high - low), side="right") - 1
    return order[drawn.clip(0, len(order) - 1)]


def _repeated(note_RS: np.ndarray) -> np.ndarray:
    """bool [R, S]: true where the same note stands earlier in the row."""
    order = np.argsort(note_RS, axis=1, kind="stable")
    in_order = np.take_along_axis(note_RS, order, axis=1)
    again = np.zeros(note_RS.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
    return again


def _send_some_again(rng: np.random.Generator, impressions: pa.Table) -> pa.Table:
    """A phone that got no answer sends again, and one time in five with a longer play: the same ids, another payload."""
    rows = np.flatnonzero(rng.random(len(impressions)) < SHARE_SENT_AGAIN)
    again = impressions.take(rows)
    longer = np.where(rng.random(len(rows)) < 0.2, rng.integers(100, 5_000, len(rows)), 0)
    play_ms = pc.add(again["play_ms"], pa.array(longer * (again["play_ms"].to_numpy() > 0)))
    again = again.set_column(again.schema.get_field_index("play_ms"), IMPRESSIONS_SCHEMA.field("play_ms"), play_ms)
    return pa.concat_tables([impressions, again]).combine_chunks()


def _notes(world: _World) -> pa.Table:
    names = np.array(TOPICS)
    topics = [
        [names[first]] if second in (-1, first) else [names[first], names[second]]
        for first, second in zip(world.topic_N, world.second_topic_N, strict=True)
    ]
    columns = {
        "note_id": _ids("n", np.arange(len(topics))),
        "author_id": _ids("a", world.author_N),
        "topics": topics,
        "note_type": pa.repeat("NORMAL", len(topics)),
        "duration_ms": world.duration_ms_N,
        "created_at": pa.array(world.created_us_N, TIMESTAMP),
        "geohash": np.array(CITIES)[world.author_N % len(CITIES)],
    }
    return pa.table(columns, schema=NOTES_SCHEMA)


def _users(rng: np.random.Generator, world: _World, start_us: int) -> pa.Table:
    """Readers with what they watched before the log starts; `user_active_degree` is a third of the readers each."""
    num_users = len(world.mood_U)
    old_enough = np.full(num_users, start_us)
    watched_UH = _draw_notes(rng, world, np.arange(num_users), old_enough, LONGEST_HISTORY)
    interest_UH = world.affinity_UK[np.arange(num_users)[:, None], world.topic_N[watched_UH]] + world.quality_N[watched_UH]
    liked_UH = rng.random(watched_UH.shape) < _sigmoid(-3.5 + interest_UH)
    kept_UH = np.arange(watched_UH.shape[1])[None, :] < rng.integers(0, watched_UH.shape[1] + 1, num_users)[:, None]
    degree = np.array(["low_active", "middle_active", "full_active"])
    rank = np.argsort(np.argsort(world.activity_U, kind="stable"), kind="stable")
    attributes = pc.binary_join_element_wise(
        '{"user_active_degree":"', pa.array(degree[rank * len(degree) // num_users]), '"}', ""
    )
    columns = {
        "user_id": _ids("u", np.arange(num_users)),
        "created_at": pa.array(start_us - rng.integers(1, 1500 * DAY_US, num_users), TIMESTAMP),
        "attributes": attributes,
        "history_note_ids": _lists(_ids("n", watched_UH[kept_UH]), kept_UH),
        "history_liked_note_ids": _lists(_ids("n", watched_UH[kept_UH & liked_UH]), kept_UH & liked_UH),
    }
    return pa.table(columns, schema=USERS_SCHEMA)


def _lists(values: pa.Array, chosen: np.ndarray) -> pa.Array:
    """The chosen cells of each row of a bool matrix, row after row, as one list per row."""
    ends = np.cumsum(chosen.sum(axis=1), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), values)


def _ids(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, _text(numbers), "")


def _text(numbers: np.ndarray) -> pa.Array:
    return pa.array(numbers).cast(pa.string())


def _zipf(size: int, exponent: float) -> np.ndarray:
    weights = 1.0 / np.arange(1, size + 1) ** exponent
    return weights / weights.sum()


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logit))
