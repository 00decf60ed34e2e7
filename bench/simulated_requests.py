"""The simulator's requests as request rows, with the features that were known when each was made.

Requests of 20 to 60 candidates: the simulator shows 60 notes and the reader leaves after some. Features are counts of what had
happened by the request's 5-minute tick, in windows, of the reader, the note, its author and the reader with that author; a
history is what the reader had watched before the log began and then clicked. E events, R requests, N candidates.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models_ml import request_rows
from models_ml.l2_network import Shape
from models_ml.notes import NoteWords
from models_ml.request_rows import HISTORY, HISTORY_PLACES
from warehouse.datasets.simulator import simulate
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, HOUR_US

WINDOWS = {"1h": HOUR_US, "1d": DAY_US, "7d": 7 * DAY_US}
USER_FEATURES = tuple(f"user_{what}_{window}" for what in ("num_views", "num_clicks", "num_likes") for window in WINDOWS)
HEADS = ("click", "long_view")
NOTE_FEATURES = tuple(
    f"{entity}_{what}_{window}"
    for entity in ("note", "author", "user_author")
    for what in ("num_views", "num_clicks")
    for window in WINDOWS
)
NUM_NOTES, NUM_AUTHORS, DAYS, MOST_SHOWN, REQUESTS_OF_A_READER = 3000, 1024, 8, 60, 10
ATTRIBUTES = tuple(f"user_active_degree={degree}" for degree in ("low_active", "middle_active", "full_active"))


def requests(num: int, seed: int = 0) -> pa.Table:
    """About `num` requests, in order of time, as `request_rows.requests_of` gives them."""
    num_users = max(num // REQUESTS_OF_A_READER, 20)
    world = simulate(
        seed, num_users, NUM_NOTES, DAYS, requests_per_user_day=num / num_users / DAYS, notes_per_request=MOST_SHOWN
    )
    events = world.events.take(_firsts(world.events["event_id"]))
    views = _shown(events.filter(pc.equal(events["event_type"], "view")), seed)
    events = events.filter(pc.is_in(events["impression_id"], views["impression_id"].combine_chunks()))
    first = np.flatnonzero(np.diff(_numbers(views["request"], ""), prepend=-1))
    offsets = np.append(first, len(views))
    counts = np.diff(offsets)
    view_us = _us(views["event_ts"])
    tick_R = view_us[first] // FIVE_MINUTES_US * FIVE_MINUTES_US
    tick_N = np.repeat(tick_R, counts)
    user_N, note_N, author_N = (_numbers(views[name], name[0]) for name in ("user_id", "note_id", "author_id"))

    def nested(values: pa.Array | pa.ChunkedArray) -> pa.Array:
        whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), whole)

    columns: dict[str, pa.Array] = {
        "user_id": views["user_id"].take(pa.array(first)),
        "surface": views["surface"].take(pa.array(first)),
        "request_ts": views["event_ts"].take(pa.array(first)),
        "user_attributes": world.users["attributes"].take(pa.array(user_N[first])),
        HISTORY: _histories(world.users[HISTORY].combine_chunks(), events, user_N[first], tick_R),
    }
    for name in USER_FEATURES:
        columns[name] = pa.array(_counts(events, name, {"user": user_N[first]}, tick_R))
    for name in ("impression_id", "note_id", "author_id"):
        columns[name] = nested(views[name])
    entities = {"note": note_N, "author": author_N, "user_author": user_N * NUM_AUTHORS + author_N}
    for name in NOTE_FEATURES:
        columns[name] = nested(pa.array(_counts(events, name, entities, tick_N)))
    for head in HEADS:
        done = events.filter(pc.equal(events["event_type"], head))["impression_id"].combine_chunks()
        columns[f"label_{head}"] = nested(pc.is_in(views["impression_id"], done).cast(pa.int8()))
    return pa.table(columns)


def shape() -> Shape:
    """The vocabularies of `requests`."""
    notes, authors = (
        [f"{letter}{number}" for number in range(size)] for letter, size in (("n", NUM_NOTES), ("a", NUM_AUTHORS))
    )
    return Shape(NoteWords(notes, authors, ["topic"]), USER_FEATURES, NOTE_FEATURES, ("tab_0", "tab_1", "tab_4"), ATTRIBUTES)


def impressions(table: pa.Table) -> pa.Table:
    """One row for each candidate, everything of the request repeated on it; lists of one keep the columns' names and types."""
    offsets = request_rows.offsets_of(table)
    row = pa.array(np.repeat(np.arange(len(table)), np.diff(offsets)))
    one = pa.array(np.arange(offsets[-1] + 1), pa.int32())
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        is_candidate = pa.types.is_list(column.type) and name != HISTORY
        columns[name] = pa.ListArray.from_arrays(one, column.flatten()) if is_candidate else column.take(row)
    return pa.table(columns)


def _firsts(ids: pa.ChunkedArray) -> pa.Array:
    """The rows in which an id comes for the first time: some events are sent again."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    return pa.array(np.sort(np.unique(codes, return_index=True)[1]))


def _shown(views: pa.Table, seed: int) -> pa.Table:
    """The first 20 to 60 views of each request, in order of the requests' times, with a `request` number."""
    words = pc.split_pattern(views["impression_id"], "-").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    request, place = (words.reshape(-1, 3)[:, column].astype(np.int64) for column in (1, 2))
    most = np.random.default_rng(seed).integers(20, MOST_SHOWN + 1, int(request.max()) + 1)
    order = np.lexsort((place, request))
    order = order[place[order] < most[request[order]]]
    return views.take(pa.array(order)).append_column("request", pa.array(request[order]))


def _counts(events: pa.Table, feature: str, entities: Mapping[str, np.ndarray], tick: np.ndarray) -> np.ndarray:
    """float64, one for each of `tick`: events of the feature's kind of its entity in [tick - window, tick)."""
    entity, _, rest = feature.partition("_num_")
    what, window = rest.split("_")
    mine = events.filter(pc.equal(events["event_type"], what.removesuffix("s")))
    keys = {name: _numbers(mine[f"{name}_id"], name[0]) for name in ("user", "note", "author")}
    keys["user_author"] = keys["user"] * NUM_AUTHORS + keys["author"]
    epoch = int(tick.min()) - WINDOWS["7d"]
    # entity and millisecond in one number: ticks are whole milliseconds, so what is before one stays before it
    happened = np.sort(keys[entity] << 32 | (_us(mine["event_ts"]) - epoch) // 1000)
    high, low = (entities[entity] << 32 | (at - epoch) // 1000 for at in (tick, tick - WINDOWS[window]))
    return (np.searchsorted(happened, high) - np.searchsorted(happened, low)).astype(np.float64)


def _histories(before: pa.ListArray, events: pa.Table, user_R: np.ndarray, tick_R: np.ndarray) -> pa.ListArray:
    clicks = events.filter(pc.equal(events["event_type"], "click")).sort_by("event_ts")
    user, at, notes = _numbers(clicks["user_id"], "u"), _us(clicks["event_ts"]), clicks["note_id"].to_numpy()
    order = np.lexsort((at, user))
    keys = user[order] << 41 | (at[order] - at.min())
    low, high = np.searchsorted(keys, user_R << 41), np.searchsorted(keys, user_R << 41 | np.maximum(tick_R - at.min(), 0))
    watched = before.to_pylist()
    return pa.array(
        [
            [*watched[one], *notes[order[start:end]]][-HISTORY_PLACES:]
            for one, start, end in zip(user_R.tolist(), low.tolist(), high.tolist(), strict=True)
        ],
        pa.list_(pa.string()),
    )


def _numbers(ids: pa.ChunkedArray, prefix: str) -> np.ndarray:
    """int64 of `n12` and its like."""
    return (pc.utf8_slice_codeunits(ids, len(prefix)).cast(pa.int64()) if prefix else ids).to_numpy()


def _us(times: pa.ChunkedArray) -> np.ndarray:
    return times.cast(pa.int64()).to_numpy()
