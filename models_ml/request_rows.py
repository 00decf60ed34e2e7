"""Request rows: one Parquet row per request, the reader's features and history once, candidates as nested lists.

`<folder>/part-NNNNN.parquet` in order of request time, `manifest.json` with each file's SHA-256 and rows. A column keeps its
name: a feature of the reader is a number, one of a candidate a list of numbers, `label_click` a list of 0 and 1.
R requests, N candidates. What models learn from; evaluation reads the export itself.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models_ml.examples import LABELS, Examples
from models_ml.shards import Changed, Shard, Shards
from models_ml.trainer.rows import Rows
from warehouse.durable import sync_folder, write_durably
from warehouse.errors import HeadraceError, disk_full_said

MANIFEST = "manifest.json"
HISTORY = "history_note_ids"
"""Oldest first: what was watched before the log, then the clicks before the request."""
HISTORY_PLACES = 100
GROUP_ROWS = 4096
FILE_ROWS = 1 << 20
CODEC = "zstd"
_LAYOUT = 2
_PER_REQUEST = ("user_id", "surface", "request_ts", "user_attributes", HISTORY)
_NOT_LEARNED_FROM = ("user_id", "request_ts", "impression_id", "author_id")
_PER_CANDIDATE = ("impression_id", "note_id", "author_id")


def requests_of(examples: Examples, rows: np.ndarray) -> pa.Table:
    """The rows of an export, as requests in order of (request_ts, user_id, surface): impressions of one reader, place and
    instant with the same reader's features are candidates of one request."""
    words = examples.words
    keys = np.column_stack([_codes(words["user_id"]), _codes(words["surface"])])[rows]
    request_us = examples.request_us_R[rows]
    rows = rows[np.lexsort((keys[:, 1], keys[:, 0], request_us))]
    user_RF = examples.columns(examples.user_features)[rows]
    keys_R = np.column_stack([examples.request_us_R, _codes(words["user_id"]), _codes(words["surface"])])[rows]
    is_first = np.ones(len(rows), dtype=bool)
    same_user = ((user_RF[1:] == user_RF[:-1]) | (np.isnan(user_RF[1:]) & np.isnan(user_RF[:-1]))).all(axis=1)
    is_first[1:] = ~((keys_R[1:] == keys_R[:-1]).all(axis=1) & same_user)
    first = np.flatnonzero(is_first)
    offsets = pa.array(np.append(first, len(rows)), pa.int32())

    def once(values: pa.Array | pa.ChunkedArray) -> pa.Array:
        return _whole(values.take(pa.array(rows[first])))

    def nested(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values)

    columns: dict[str, pa.Array] = {
        "user_id": once(words["user_id"]),
        "surface": once(words["surface"]),
        "request_ts": pa.array(examples.request_us_R[rows[first]], pa.timestamp("us", "UTC")),
        "user_attributes": pa.array(examples.user_attributes(), pa.string()).take(pa.array(rows[first])),
        HISTORY: _histories(examples, rows[first]),
    }
    for column, name in enumerate(examples.user_features):
        columns[name] = _numbers(user_RF[first, column])
    for name in _PER_CANDIDATE:
        columns[name] = nested(_whole(words[name].take(pa.array(rows))))
    note_RF = examples.columns(examples.note_features)[rows]
    for column, name in enumerate(examples.note_features):
        columns[name] = nested(_numbers(note_RF[:, column]))
    for name, label_R in examples.labels.items():
        label = label_R[rows]
        is_certain = np.isin(np.nan_to_num(label), (0, 1)).all()  # a teacher's are probabilities
        known = np.nan_to_num(label).astype(np.int8 if is_certain else np.float32)
        columns[f"label_{name}"] = nested(pa.array(known, mask=np.isnan(label)))
    return pa.table(columns)


def group_rows_of(num_rows: int) -> int:
    """Rows of a row group: GROUP_ROWS, fewer in a small set, so that it still has groups to shuffle, share and hold back."""
    return min(GROUP_ROWS, max(64, num_rows // 16))


def write(table: pa.Table, folder: Path, about: dict[str, Any], group_rows: int | None = None) -> None:
    """The files of `RequestRows`, all or nothing: a folder that is there is replaced. about: goes into the manifest."""
    group_rows = group_rows or group_rows_of(len(table))
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        with disk_full_said(folder):
            files = {}
            for number, start in enumerate(range(0, len(table), FILE_ROWS)):
                part = table.slice(start, FILE_ROWS)
                path = draft / f"part-{number:05d}.parquet"
                pq.write_table(part, path, row_group_size=group_rows, **_encodings(part.schema))
                files[path.name] = _described(path)
            manifest = {**about, "layout": _LAYOUT, "files": files}
            write_durably(draft / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
            draft.chmod(0o755)
            sync_folder(draft)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(draft, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """Options of the Parquet writer. Ids and instants of rows in order of time are written as differences: a dictionary of
    what occurs once is as large as the column. All else is dictionaries, which small counts and known words fit."""
    paths = {name: f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name for name in schema.names}
    differences = {"impression_id": "DELTA_BYTE_ARRAY", "request_ts": "DELTA_BINARY_PACKED"}
    differences = {paths[name]: encoding for name, encoding in differences.items() if name in paths}
    dictionaries = [path for path in paths.values() if path not in differences]
    return {"compression": CODEC, "use_dictionary": dictionaries, "column_encoding": differences}


def of_examples(examples: Examples, folder: Path) -> "RequestRows":
    """The training rows of an export as request rows in `folder`, written again when the export is another one."""
    about = {"training_sha256": examples.fingerprint(), "test_start_us": examples.test_start_us}
    try:
        known = json.loads((folder / MANIFEST).read_bytes())
        if known.get("layout") == _LAYOUT and {name: known.get(name) for name in about} == about:
            return RequestRows(folder)
    except (OSError, ValueError, HeadraceError):
        pass  # absent, or cut short by a crash: write it
    write(requests_of(examples, examples.train_rows), folder, about)
    return RequestRows(folder)


class RequestRows:
    """A folder of request rows, here or elsewhere, as a source of row groups. `encode` is the model's: a table of one group ->
    Rows. The first read of a group begins to copy the files of a folder that is elsewhere.

    Opening checks names, sizes and rows of every file against the manifest; the first read of a file checks its SHA-256.
    Raises HeadraceError naming the file that has changed, is missing, is left over or cannot be read.
    """

    def __init__(self, place: Path | Shards):
        self.shards = place if isinstance(place, Shards) else Shards(place)
        path = self.shards.path
        try:
            content = self.shards.read(MANIFEST)
            self.manifest: dict[str, Any] = json.loads(content)
            sizes = self.shards.sizes()
        except FileNotFoundError:
            raise HeadraceError(f"no request rows at {self.shards.told}: {MANIFEST} is missing") from None
        except (OSError, ValueError) as error:
            raise HeadraceError(f"{path(MANIFEST)} cannot be read: {error}") from error
        self.fingerprint = hashlib.sha256(content).hexdigest()
        present = {name for name in sizes if name.endswith(".parquet")}
        described = self.manifest["files"]
        for name in sorted(present ^ set(described)):
            raise HeadraceError(
                f"{path(name)} {'is not in' if name in present else 'is missing but in'} the manifest; {_WAY_OUT}"
            )
        for name, expected in described.items():
            if sizes[name] != expected["bytes"]:
                raise HeadraceError(
                    f"{path(name)} has {sizes[name]:,} bytes, the manifest says {expected['bytes']:,}; {_WAY_OUT}"
                )
        self._shard = {name: Shard(name, described[name]["sha256"], described[name]["bytes"]) for name in sorted(described)}
        self.shards.require_room(list(self._shard.values()))
        self._groups = [(name, group) for name in sorted(described) for group in range(len(described[name]["groups"]))]
        self.group_sizes: list[int] = [described[name]["groups"][group] for name, group in self._groups]
        self._first_row = np.concatenate([[0], np.cumsum(self.group_sizes)])
        self._is_ahead = False

    @property
    def num_rows(self) -> int:
        return int(self._first_row[-1])

    @property
    def num_candidates(self) -> int:
        return sum(file["candidates"] for file in self.manifest["files"].values())

    @property
    def columns(self) -> pa.Schema:
        return pq.read_schema(self._local(self._groups[0][0]))

    def table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group (or some of its columns), its words dictionary-encoded."""
        name, number = self._groups[group]
        path = self._local(name)
        if not self._is_ahead:
            self._is_ahead = True
            self.shards.fetch_ahead(list(self._shard.values()))
        words = ["surface", "user_attributes", f"{HISTORY}.list.element", "note_id.list.element"]
        try:
            with pq.ParquetFile(path, read_dictionary=words) as file:
                table = file.read_row_group(number, columns=columns, use_threads=False).unify_dictionaries()
        except (OSError, pa.ArrowException) as error:
            raise HeadraceError(f"{path}, row group {number}, cannot be read: {error}; {_WAY_OUT}") from error
        if len(table) != self.group_sizes[group]:
            raise HeadraceError(
                f"{path}, row group {number}, has {len(table)} rows, the manifest says {self.group_sizes[group]}"
            )
        return table

    def row_ids(self, group: int) -> np.ndarray:
        return np.arange(self._first_row[group], self._first_row[group + 1])

    def encoded(self, encode: "Encode") -> "EncodedRows":
        """The same as a model reads them. encode: (table of a group, its row ids) -> Rows."""
        return EncodedRows(self, encode)

    def _local(self, name: str) -> Path:
        try:
            return self.shards.local(self._shard[name])
        except Changed as error:
            raise HeadraceError(f"{error}; {_WAY_OUT}") from error


class RequestTable:
    """The same interface over a table in memory. fingerprint: names its content."""

    def __init__(self, table: pa.Table, fingerprint: str, group_rows: int | None = None):
        group_rows = group_rows or group_rows_of(len(table))
        self._table, self._group_rows, self.fingerprint = table, group_rows, fingerprint
        self.group_sizes = [min(group_rows, len(table) - start) for start in range(0, len(table), group_rows)]
        self.columns, self.num_rows = table.schema, len(table)

    @staticmethod
    def of_examples(examples: Examples) -> "RequestTable":
        """The training rows of an export."""
        return RequestTable(requests_of(examples, examples.train_rows), examples.fingerprint())

    def table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        part = self._table.slice(group * self._group_rows, self.group_sizes[group])
        return part if columns is None else part.select(columns)

    def row_ids(self, group: int) -> np.ndarray:
        return group * self._group_rows + np.arange(self.group_sizes[group])

    def encoded(self, encode: "Encode") -> "EncodedRows":
        return EncodedRows(self, encode)


def sample(rows: "AnyRows", columns: Sequence[str], most_rows: int = 1 << 20) -> pa.Table:
    """Some columns of enough row groups to hold `most_rows` rows, spread evenly over time; all of them when they are fewer."""
    step = max(1, -(-rows.num_rows // most_rows))
    return pa.concat_tables(
        [rows.table(group, columns) for group in range(0, len(rows.group_sizes), step)]
    ).unify_dictionaries()


class EncodedRows:
    """A `Source` of the trainer. Ids and instants that no model learns from are not read."""

    def __init__(self, rows: "AnyRows", encode: "Encode"):
        self._rows, self._encode = rows, encode
        self.fingerprint, self.group_sizes = rows.fingerprint, rows.group_sizes
        self._columns = [name for name in rows.columns.names if name not in _NOT_LEARNED_FROM]

    def read(self, group: int) -> Rows:
        return self._encode(self._rows.table(group, self._columns), self._rows.row_ids(group))


AnyRows = RequestRows | RequestTable
Encode = Callable[[pa.Table, np.ndarray], Rows]

_WAY_OUT = "delete the folder and write it again, or train on the files it was made with"


def numbers(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """float32 [R or N, len(names)], NaN for NULL: columns of the request, or all of candidates laid end to end."""
    columns = [_flat(table[name]).cast(pa.float32()).fill_null(float("nan")).to_numpy() for name in names]
    return np.column_stack(columns) if columns else np.zeros((len(table), 0), dtype=np.float32)


def codes(values: pa.ChunkedArray | pa.Array, vocabulary: pa.Array) -> np.ndarray:
    """int64: 1 + place in the vocabulary of each word, 0 for NULL and the unknown. Lists are laid end to end."""
    flat = _flat(values)
    if not pa.types.is_dictionary(flat.type):
        flat = flat.dictionary_encode()
    known = pc.index_in(flat.dictionary, vocabulary).fill_null(-1).to_numpy(zero_copy_only=False) + 1
    places = flat.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.append(known, 0).astype(np.int64)[places]


def newest_first(histories: pa.ChunkedArray, vocabulary: pa.Array, length: int) -> np.ndarray:
    """int32 [R, length]: codes of the last places of each history, newest first, 0 = padding or unknown."""
    whole = _whole(histories)
    ends, counts = whole.offsets.to_numpy()[1:], np.diff(whole.offsets.to_numpy())
    flat = np.append(codes(histories, vocabulary), 0)
    base = whole.offsets[0].as_py()
    at_RL = (ends - base)[:, None] - 1 - np.arange(length)
    return np.where(np.arange(length) < counts[:, None], flat[at_RL], 0).astype(np.int32)


def offsets_of(table: pa.Table, name: str = "note_id") -> np.ndarray:
    """int64 [R + 1]: where the candidates of each request lie in flat columns."""
    offsets = _whole(table[name]).offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def require_labels(rows: "AnyRows", heads: Sequence[str], name: str) -> None:
    """Raises HeadraceError unless every head has its label."""
    missing = [head for head in heads if f"label_{head}" not in rows.columns.names]
    if missing:
        have = ", ".join(labels_of(rows))
        raise HeadraceError(f"{name}: the export has no label for the head(s) {', '.join(missing)}; it has {have}")


def labels_of(rows: "AnyRows") -> tuple[str, ...]:
    """The labels that there are, in the order of `LABELS`."""
    return tuple(label for label in LABELS if f"label_{label}" in rows.columns.names)


def _flat(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    whole = _whole(values)
    return whole.flatten() if pa.types.is_list(whole.type) else whole


def _whole(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _numbers(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _codes(words: pa.ChunkedArray) -> np.ndarray:
    """int64 in the order of the words, so that a sort by code is a sort by word."""
    encoded = _whole(words).dictionary_encode()
    rank = np.argsort(np.argsort(encoded.dictionary.to_numpy(zero_copy_only=False).astype(str), kind="stable"))
    return np.append(rank, -1)[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _histories(examples: Examples, rows: np.ndarray) -> pa.Array:
    """The newest HISTORY_PLACES of each row's history, oldest first."""
    clicks = examples.clicks_R
    before = _whole(examples.users[HISTORY])
    user_R = pc.index_in(_whole(examples.words["user_id"]), _whole(examples.users["user_id"]))
    user_R = user_R.fill_null(-1).to_numpy()[rows]
    no_user = user_R < 0
    before_counts = np.diff(before.offsets.to_numpy())
    clicks_n = np.diff(clicks.offsets.to_numpy())[rows]
    before_n = np.where(no_user, 0, np.append(before_counts, 0)[user_R])
    kept_clicks = np.minimum(clicks_n, HISTORY_PLACES)
    kept_before = np.minimum(before_n, HISTORY_PLACES - kept_clicks)
    kept = kept_before + kept_clicks
    offsets = np.concatenate([[0], np.cumsum(kept)])
    row = np.repeat(np.arange(len(rows)), kept)
    place = np.arange(offsets[-1]) - offsets[row]
    before_end = np.append(before.offsets.to_numpy()[1:], 0)[user_R]
    clicks_end = clicks.offsets.to_numpy()[1:][rows]
    from_before = place < kept_before[row]
    at = np.where(
        from_before,
        (before_end - kept_before)[row] + place,
        len(before.values) + (clicks_end - kept_clicks - kept_before)[row] + place,
    )
    words = pa.concat_arrays([before.values, clicks.values]).take(pa.array(at))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), words)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        candidates = len(_flat(file.read(["note_id"])["note_id"]))
    return {"sha256": sha256, "bytes": path.stat().st_size, "candidates": candidates, "groups": groups}
