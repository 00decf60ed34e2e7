"""The training export as arrays: one row per impression, cut into train and test by time.

Everything is found by column name, so a feature added to a declaration arrives here without a change. R rows, F features,
L places of a history (place 0 is the newest). Source of the columns: docs/reference/contracts.md, "Training export".
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models_ml.shards import Cache, Changed, Shard, Shards, told
from warehouse.errors import HeadraceError

LABELS = ("click", "long_view", "like", "comment", "share", "follow", "hide")
CLICKS = "user_last_clicks_30d"
REQUEST_FEATURES = ("note_duration_ms", "note_age_min")
"""Numbers of the note known only at request time; they follow no measure but are features like the others."""

_IDS = ("impression_id", "user_id", "note_id", "author_id", "surface")
_WORDS = ("note_type", "note_topic")
_AGAIN = "run `headrace export-training` again"
_OF_SPINE = "rows to score have user_id, note_id and the model's features by name, as `headrace features compute` writes them"


@dataclass(frozen=True)
class Examples:
    """The export in memory, in the order of (request_ts, impression_id). Arrow for words and lists, numpy for numbers.

    values_RF: float64, NaN for NULL, columns as in `feature_names`. labels: name -> float32 [R], 0 or 1.
    """

    manifest: dict[str, Any]
    feature_names: tuple[str, ...]
    values_RF: np.ndarray
    labels: dict[str, np.ndarray]
    request_us_R: np.ndarray
    test_start_us: int
    words: pa.Table
    clicks_R: pa.ListArray
    notes: pa.Table
    users: pa.Table

    def __len__(self) -> int:
        return len(self.values_RF)

    @cached_property
    def is_train(self) -> np.ndarray:
        return self.request_us_R < self.test_start_us

    @property
    def train_rows(self) -> np.ndarray:
        """int64: positions of the rows before `test_start`."""
        return np.flatnonzero(self.is_train)

    @property
    def test_rows(self) -> np.ndarray:
        """int64: positions of the rows from `test_start` on."""
        return np.flatnonzero(~self.is_train)

    @cached_property
    def user_features(self) -> tuple[str, ...]:
        """Features of the reader alone and of the request: one value per request."""
        return tuple(
            name
            for name in self.feature_names
            if name.startswith(("user_", "request_")) and not name.startswith("user_author_")
        )

    @cached_property
    def note_features(self) -> tuple[str, ...]:
        """Features of a candidate: note, author, reader x author, request time."""
        return tuple(name for name in self.feature_names if name not in self.user_features)

    def columns(self, names: Sequence[str]) -> np.ndarray:
        """float64 [R, len(names)]."""
        place = {name: column for column, name in enumerate(self.feature_names)}
        return self.values_RF[:, [place[name] for name in names]]

    def codes(self, column: str, vocabulary: Sequence[str]) -> np.ndarray:
        """int64 [R]: 1 + the place of the row's word in the vocabulary, 0 where it is NULL or not in it."""
        return encode(self.words[column], vocabulary)

    def histories(self, note_ids: Sequence[str], length: int) -> np.ndarray:
        """int64 [R, L]: codes (1 + place in note_ids, 0 = padding or unknown note), newest first: what the reader clicked
        before the request, then what they had watched before the log began."""
        clicks = self.clicks_R
        click_codes = encode(clicks.values, note_ids)
        click_ends_R, num_clicks_R = clicks.offsets.to_numpy()[1:], clicks.value_lengths().to_numpy()
        before = self.users["history_note_ids"].combine_chunks()
        before_codes = encode(before.values, note_ids)
        user_R = pc.index_in(self.words["user_id"], self.users["user_id"].combine_chunks())
        user_R = pc.fill_null(user_R, -1).to_numpy()
        before_ends_R = np.where(user_R >= 0, before.offsets.to_numpy()[1:][user_R], 0)
        num_before_R = np.where(user_R >= 0, pc.fill_null(before.value_lengths(), 0).to_numpy()[user_R], 0)

        codes_RL = np.zeros((len(self), length), dtype=np.int64)
        for place in range(length):
            clicked_R = place < num_clicks_R
            watched_R = ~clicked_R & (place < num_clicks_R + num_before_R)
            codes_RL[clicked_R, place] = click_codes[click_ends_R[clicked_R] - 1 - place]
            earlier_R = before_ends_R[watched_R] - 1 - (place - num_clicks_R[watched_R])
            codes_RL[watched_R, place] = before_codes[earlier_R]
        return codes_RL

    def user_attributes(self) -> list[str | None]:
        """The JSON text of `lake.users.attributes` of each row's reader; None for a reader without any."""
        user_R = pc.index_in(self.words["user_id"], self.users["user_id"].combine_chunks())
        return self.users["attributes"].combine_chunks().take(user_R.combine_chunks()).to_pylist()

    def fingerprint(self) -> str:
        """SHA-256 of what the export's manifest says of the data: its files, their split, what their columns mean. Snapshots
        are left out: the same events, landed again elsewhere, are the same data and train the same models."""
        of_data = {name: value for name, value in self.manifest.items() if name != "snapshots"}
        return hashlib.sha256(json.dumps(of_data, sort_keys=True).encode()).hexdigest()

    def protocol(self) -> str:
        """One sentence that says what was measured on what."""
        name, start = self.manifest.get("dataset", "unknown data"), self.manifest["test_start"]
        return (
            f"{name}: train on the {len(self.train_rows):,} impressions before {start}, "
            f"test on the {len(self.test_rows):,} from then on; features as served (point in time)"
        )


def encode(words: pa.Array | pa.ChunkedArray, vocabulary: Sequence[str]) -> np.ndarray:
    """int64: 1 + place in the vocabulary; 0 for NULL and for words that are not in it."""
    places = pc.index_in(words, pa.array(vocabulary, pa.string()))
    return np.array(pc.fill_null(pc.add(pc.cast(places, pa.int64()), 1), 0).to_numpy())


def distinct(words: pa.Array | pa.ChunkedArray) -> list[str]:
    """The distinct words without NULL, sorted: a vocabulary that does not depend on the order of the rows."""
    return sorted(pc.unique(words.drop_null()).to_pylist())


def first_topics(notes: pa.Table) -> pa.Array:
    """string: the first topic of each note of the dimension, NULL where there is none; what the export calls `note_topic`."""
    return pa.array([topics[0] if topics else None for topics in notes["topics"].to_pylist()], pa.string())


def load(where: Path | str, cache: Cache | None = None) -> Examples:
    """Reads `examples.parquet`, `notes.parquet`, `users.parquet` and `manifest.json` of a folder or URL; through the cache
    where there is one, through the home's for a URL.

    Raises HeadraceError when a file or column is missing, a file or its number of rows is not what the manifest says, or a
    side of the split is empty.
    """
    manifest, (table, notes, users) = _read(where, cache, ("examples", "notes", "users"))
    folder = told(where)
    needed = (*_IDS, "request_ts", *_WORDS, CLICKS, "label_click", "label_long_view")
    _require(table, needed, f"{folder}/examples.parquet")
    _require(notes, ("note_id", "author_id", "topics", "note_type"), f"{folder}/notes.parquet")
    _require(users, ("user_id", "attributes", "history_note_ids"), f"{folder}/users.parquet")
    if len(table) != manifest["num_rows"]:
        raise HeadraceError(f"{folder} holds {len(table)} rows, its manifest says {manifest['num_rows']}; {_AGAIN}")

    # the contract: every feature is a double and nothing else is; labels are integers, instants and words have their own types
    names = tuple(field.name for field in table.schema if pa.types.is_floating(field.type))
    _require(table.select(names), REQUEST_FEATURES, f"{folder}/examples.parquet")
    values_RF = np.column_stack([_as_float(table[name]) for name in names])
    examples = Examples(
        manifest=manifest,
        feature_names=names,
        values_RF=values_RF,
        labels={
            name: _as_float(table[f"label_{name}"]).astype(np.float32)
            for name in LABELS
            if f"label_{name}" in table.column_names
        },
        request_us_R=table["request_ts"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy(),
        test_start_us=_instant_us(manifest["test_start"], f"{folder}/manifest.json"),
        words=table.select([*_IDS, *_WORDS]).combine_chunks(),
        clicks_R=pc.fill_null(table[CLICKS].combine_chunks(), []),
        notes=notes,
        users=users,
    )
    for rows, side in ((examples.train_rows, "before"), (examples.test_rows, "at or after")):
        if len(rows) == 0:
            raise HeadraceError(
                f"{folder} has no rows {side} its test_start {manifest['test_start']}; land more days and {_AGAIN}"
            )
    return examples


def load_spine(path: Path, where: Path | str) -> tuple[Examples, pa.Table]:
    """(rows of any Parquet file with `user_id`, `note_id` and features by their names, as examples; the file's own table).
    Dimensions come from the export at `where`. There are no labels, and every row counts as one after `test_start`.

    Raises HeadraceError when a file or column is missing.
    """
    table = _read_parquet(path, _OF_SPINE)
    _require(table, ("user_id", "note_id"), path, _OF_SPINE)
    _, (notes, users) = _read(where, None, ("notes", "users"))
    nothing = pa.nulls(len(table))
    words = {name: (table[name] if name in table.column_names else nothing).cast(pa.string()) for name in (*_IDS, *_WORDS)}
    clicks = table[CLICKS] if CLICKS in table.column_names else nothing.cast(pa.list_(pa.string()))
    names = tuple(field.name for field in table.schema if pa.types.is_floating(field.type))
    examples = Examples(
        manifest={"dataset": str(path), "test_start": 0, "num_rows": len(table)},
        feature_names=names,
        values_RF=np.column_stack([_as_float(table[name]) for name in names]) if names else np.zeros((len(table), 0)),
        labels={},
        request_us_R=np.zeros(len(table), dtype=np.int64),
        test_start_us=0,
        words=pa.table(words).combine_chunks(),
        clicks_R=pc.fill_null(
            pa.chunked_array(clicks.chunks if isinstance(clicks, pa.ChunkedArray) else [clicks]).combine_chunks(), []
        ),
        notes=notes,
        users=users,
    )
    return examples, table


def require_columns(examples: Examples, names: Iterable[str]) -> None:
    """Raises HeadraceError naming the features that the rows lack."""
    missing = [name for name in names if name not in examples.feature_names]
    if missing:
        raise HeadraceError(
            f"{examples.manifest['dataset']} lacks the feature(s) {', '.join(missing)}; `headrace features compute` adds them"
        )


def _read(where: Path | str, cache: Cache | None, names: Sequence[str]) -> tuple[dict[str, Any], list[pa.Table]]:
    """(the manifest, these tables of an export), their files as the manifest describes them."""
    shards = Shards(where, cache)
    manifest = _read_manifest(shards)
    files, known = [f"{name}.parquet" for name in names], manifest.get("files", {})
    for file in files:
        if file not in known and shards.is_cached:
            raise HeadraceError(f"{shards.path('manifest.json')} has no SHA-256 of {file}, so it cannot be copied; {_AGAIN}")
    try:
        sizes = shards.sizes()
        described = [Shard(file, known[file], sizes.get(file, 0)) for file in files if file in known]
        shards.require_room(described)
        shards.fetch_ahead(described)
        paths = {shard.name: shards.local(shard) for shard in described}
    except Changed as error:
        raise HeadraceError(f"{error}; {_AGAIN}") from error
    except OSError as error:
        raise HeadraceError(f"{shards.told} cannot be read: {error}; {_AGAIN}") from error
    return manifest, [_read_parquet(paths.get(file, Path(shards.path(file)))) for file in files]


def _read_manifest(shards: Shards) -> dict[str, Any]:
    path = shards.path("manifest.json")
    try:
        manifest = json.loads(shards.read("manifest.json"))
    except FileNotFoundError:
        raise HeadraceError(f"no training export at {shards.told}; run `headrace export-training` first") from None
    except (OSError, ValueError) as error:
        raise HeadraceError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    for name in ("test_start", "num_rows"):
        if name not in manifest:
            raise HeadraceError(f"{path} lacks {name!r}; {_AGAIN}")
    return manifest


def _read_parquet(path: Path, way_out: str = _AGAIN) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise HeadraceError(f"{path} cannot be read as Parquet: {error}; {way_out}") from error


def _require(table: pa.Table, names: Iterable[str], path: Path | str, way_out: str = _AGAIN) -> None:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise HeadraceError(f"{path} lacks the column(s) {', '.join(missing)}; {way_out}")


def _as_float(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(float("nan")).to_numpy()


def _instant_us(value: Any, path: str) -> int:
    """ISO 8601 with a zone, or microseconds."""
    if isinstance(value, int):
        return value
    try:
        instant = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        instant = None
    if instant is None or instant.tzinfo is None:
        raise HeadraceError(
            f"{path}: test_start must be an instant with a zone such as 2022-05-03T16:00:00Z, got {value!r}; {_AGAIN}"
        )
    return round(instant.timestamp() * 1_000_000)
