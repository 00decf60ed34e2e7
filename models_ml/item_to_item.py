"""Item-to-item: notes that follow a note in people's sequences, counted in SQL. Learns nothing, and is the floor of retrieval.

For each reader, the notes watched before the log began, then the notes clicked, oldest first; how pairs of them are counted and
scored is in `co_occurrence`. Only rows before `test_start` are read.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit, types

from models_ml import co_occurrence
from models_ml.bundle import SETTINGS, read_settings
from models_ml.examples import Examples
from models_ml.ordering import largest_first
from warehouse.compiled import compiled, only_read
from warehouse.connections import plain_connection

NEIGHBOURS = "neighbours.parquet"


@dataclass(frozen=True)
class ItemToItemConfig:
    """window: places; decay: per place, in (0, 1]; normalise_*: 0 none, 0.5 cosine-like, 1 full; neighbours: kept per note."""

    window: int = 20
    decay: float = 0.9
    normalise_from: float = 0.5
    normalise_to: float = 0.5
    neighbours: int = 200
    seed_decay: float = 0.9

    def __post_init__(self) -> None:
        if self.window < 1 or self.neighbours < 1:
            raise ValueError(f"window and neighbours must be at least 1, got {self.window} and {self.neighbours}")
        if not 0 < self.decay <= 1 or not 0 < self.seed_decay <= 1:
            raise ValueError(f"decay and seed_decay must be in (0, 1], got {self.decay} and {self.seed_decay}")


_OCCURRENCES = """
watched as (
    select user_id, unnest(history_note_ids) as note_id, generate_subscripts(history_note_ids, 1) as place, 0 as part
    from users
),

clicked as (
    select user_id, note_id, row_number() over (partition by user_id order by request_us, impression_id) as place, 1 as part
    from impressions
    where label_click = 1
),

occurrences as (
    select user_id, note_id, row_number() over (partition by user_id order by part, place) as place
    from (select * from watched union all select * from clicked)
    where note_id is not null
)
"""


def train(examples: Examples, config: ItemToItemConfig) -> pa.Table:
    """One row per (note_id, neighbour_id): `score` (float32), best first within a note; ties by neighbour_id."""
    impressions = pa.table(
        {
            "impression_id": examples.words["impression_id"],
            "user_id": examples.words["user_id"],
            "note_id": examples.words["note_id"],
            "request_us": examples.request_us_R,
            "label_click": examples.labels["click"],
        }
    ).take(pa.array(examples.train_rows))
    parameters = {name: value for name, value in asdict(config).items() if name != "seed_decay"}
    with plain_connection() as connection:
        connection.register("impressions", impressions)
        connection.register("users", examples.users.select(["user_id", "history_note_ids"]))
        return co_occurrence.neighbours(connection, _OCCURRENCES, parameters)


def to_files(neighbours: pa.Table, config: ItemToItemConfig) -> dict[str, bytes]:
    """The registry's files of this model."""
    buffer = io.BytesIO()
    pq.write_table(neighbours, buffer, compression="zstd")
    return {NEIGHBOURS: buffer.getvalue(), SETTINGS: json.dumps(asdict(config), sort_keys=True).encode()}


class ItemToItem:
    """Neighbour lists in memory; read-only, so any number of threads may ask. names: the notes that are a neighbour, sorted."""

    def __init__(self, neighbours: pa.Table, seed_decay: float = ItemToItemConfig.seed_decay):
        self._seed_decay = seed_decay
        self.names = sorted(set(neighbours["neighbour_id"].to_pylist()))  # so that codes break ties as ids do
        self._code_of = {name: code for code, name in enumerate(self.names)}
        note_ids = neighbours["note_id"].to_pylist()
        place_of = {note_id: place for place, note_id in enumerate(dict.fromkeys(note_ids))}
        place_E = np.array([place_of[note_id] for note_id in note_ids], np.int64)
        order = np.argsort(place_E, kind="stable")  # a note's neighbours together
        self._code_E = np.array([self._code_of[name] for name in neighbours["neighbour_id"].to_pylist()], np.int64)[order]
        self._score_E = neighbours["score"].to_numpy().astype(np.float64)[order]
        ends = np.cumsum(np.bincount(place_E)).tolist()
        self._range_of = dict(zip(place_of, zip([0, *ends], ends, strict=False), strict=True))

    def neighbours(self, note_ids: Sequence[str], k: int) -> list[tuple[str, float]]:
        """The k best neighbours of all `note_ids` together, best first, as (note_id, score); ties by note_id.

        note_ids: oldest first; each earlier one counts `seed_decay` times the next. Notes asked with are never answered;
        unknown ones add nothing.
        """
        code_K, total_K = self.nearest(note_ids, k)
        return [(self.names[code], total) for code, total in zip(code_K.tolist(), total_K.tolist(), strict=True)]

    def nearest(self, note_ids: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """`neighbours` as (int64 places in `names`, float64 scores), at most k of each. Raises ValueError if k is below 1."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        ranges, weights, weight = [], [], 1.0
        for note_id in reversed(note_ids):
            if note_id in self._range_of:
                ranges.append(self._range_of[note_id])
                weights.append(weight)
            weight *= self._seed_decay
        asked = [self._code_of[note_id] for note_id in note_ids if note_id in self._code_of]
        code_C, total_C = _add_up(
            np.array(ranges, np.int64).reshape(-1, 2), np.array(weights), self._code_E, self._score_E, np.array(asked, np.int64)
        )
        best = largest_first(total_C, code_C)[:k]
        return code_C[best], total_C[best]


@njit
def _slot(code_H, code):
    """Where a code stands in the table, or may be put."""
    at = (code * 0x9E3779B1) & (len(code_H) - 1)
    while code_H[at] >= 0 and code_H[at] != code:
        at = (at + 1) & (len(code_H) - 1)
    return at


@compiled(
    types.Tuple((types.int64[::1], types.float64[::1]))(
        *(only_read(types.int64, 2), only_read(types.float64)),
        *(only_read(types.int64), only_read(types.float64), only_read(types.int64)),
    )
)
def _add_up(range_L2, weight_L, code_E, score_E, asked_A):
    """(codes, each once, in the order in which they come first; the weighted sum of each one's scores) of L lists, which are
    ranges of code_E and score_E, without those asked with."""
    most = len(asked_A)
    for start, end in range_L2:
        most += end - start
    size = 8
    while size < 2 * most:
        size *= 2
    code_H, place_H = np.full(size, -1), np.empty(size, np.int64)  # by the code's hash
    code_C, total_C, count = np.empty(most, np.int64), np.empty(most), 0
    for asked in asked_A:
        at = _slot(code_H, asked)
        code_H[at], place_H[at] = asked, -1
    for item in range(len(weight_L)):
        for entry in range(range_L2[item, 0], range_L2[item, 1]):
            code = code_E[entry]
            at = _slot(code_H, code)
            if code_H[at] < 0:
                code_H[at], place_H[at] = code, count
                code_C[count], total_C[count] = code, 0.0
                count += 1
            if place_H[at] >= 0:
                total_C[place_H[at]] += weight_L[item] * score_E[entry]
    return code_C[:count], total_C[:count]


def load(path: Path) -> ItemToItem:
    """path: a version's folder, as `Registry.path` gives it."""
    return ItemToItem(pq.read_table(Path(path) / NEIGHBOURS), read_settings(path)["seed_decay"])
