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

from models_ml import co_occurrence
from models_ml.bundle import SETTINGS, read_settings
from models_ml.examples import Examples
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
        codes = np.array([self._code_of[name] for name in neighbours["neighbour_id"].to_pylist()], dtype=np.int64)
        scores = neighbours["score"].to_numpy().astype(np.float64)
        rows_of: dict[str, list[int]] = {}
        for row, note_id in enumerate(neighbours["note_id"].to_pylist()):
            rows_of.setdefault(note_id, []).append(row)
        self._lists = {note_id: (codes[rows], scores[rows]) for note_id, rows in rows_of.items()}

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
        codes, scores, weight = [np.empty(0, np.int64)], [np.empty(0)], 1.0
        for note_id in reversed(note_ids):
            if note_id in self._lists:
                codes.append(self._lists[note_id][0])
                scores.append(weight * self._lists[note_id][1])
            weight *= self._seed_decay
        code_C, place = np.unique(np.concatenate(codes), return_inverse=True)
        total_C = np.bincount(place, np.concatenate(scores), len(code_C))
        asked = [self._code_of[note_id] for note_id in note_ids if note_id in self._code_of]
        kept = np.flatnonzero(~np.isin(code_C, asked))
        best = kept[np.argsort(-total_C[kept], kind="stable")[:k]]
        return code_C[best], total_C[best]


def load(path: Path) -> ItemToItem:
    """path: a version's folder, as `Registry.path` gives it."""
    return ItemToItem(pq.read_table(Path(path) / NEIGHBOURS), read_settings(path)["seed_decay"])
