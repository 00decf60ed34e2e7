"""Scores and vectors of many rows at once, equal to those the server gives."""

from typing import Any

import numpy as np
import pyarrow as pa

from models_ml.examples import CLICKS, Examples, encode, require_columns
from models_ml.two_tower import TwoTower
from warehouse.errors import HeadraceError
from warehouse.lake import Lake

NOTE_VECTORS, USER_VECTORS = "lake.note_vectors", "lake.user_vectors"


def score(name: str, model: Any, examples: Examples, table: pa.Table) -> pa.Table:
    """The table with `l1_score`, `l2_<head>` for each head, or `two_tower_score`: float32, a row's depends on no other row.

    Raises HeadraceError when the rows lack a feature or the readers' clicks, or have such a column already.
    """
    rows = np.arange(len(examples))
    if name != "l1" and CLICKS not in table.column_names:
        raise HeadraceError(
            f"{examples.manifest['dataset']} lacks {CLICKS}, which {name} reads; `headrace features compute` adds it"
        )
    if isinstance(model, TwoTower):
        require_columns(examples, model.user_features)
        histories, readers = examples.histories(model.note_ids, model.history_length), model.reader.of_rows(examples, rows)
        vectors = np.concatenate([np.zeros((1, model.note_vectors.shape[1]), np.float32), model.note_vectors])
        notes = vectors[encode(examples.words["note_id"], model.note_ids)]
        scores = {"two_tower_score": (model.user_vectors(histories, readers) * notes).sum(1)}
    else:
        require_columns(examples, (*model.user_features, *model.note_features))
        heads = model.score_rows(examples, rows)
        if name == "l1":
            scores = {"l1_score": np.column_stack([heads[head] for head in model.heads]) @ model.weights_T.numpy()}
        else:
            scores = {f"{name}_{head}": values for head, values in heads.items()}
    for column, values in scores.items():
        if column in table.column_names:
            raise HeadraceError(f"{examples.manifest['dataset']} has a column {column} already; rename it")
        table = table.append_column(column, pa.array(values, pa.float32()))
    return table


def embed(lake: Lake, version: str, model: TwoTower, examples: Examples) -> dict[str, int]:
    """Appends the vectors of one model version to `lake.note_vectors` and `lake.user_vectors`: rows of (model_version,
    event_ts, id, vector), event_ts being the last instant the readers' histories know of; a reader's features are those of
    their last row. Rows that are there already are not written again. Table -> rows written."""
    require_columns(examples, model.user_features)
    last = np.full(len(examples.users), -1)
    user_ids = examples.users["user_id"].to_pylist()
    user_R = encode(examples.words["user_id"], user_ids) - 1
    last[user_R[user_R >= 0]] = np.flatnonzero(user_R >= 0)  # rows are in order of time, the last one stays
    has_row = last >= 0
    histories = examples.histories(model.note_ids, model.history_length)[last[has_row]]
    event_us = int(examples.request_us_R.max())
    parts = {
        NOTE_VECTORS: ("note_id", model.note_ids, model.note_vectors),
        USER_VECTORS: (
            "user_id",
            [user_id for user_id, has in zip(user_ids, has_row, strict=True) if has],
            model.user_vectors(histories, model.reader.of_rows(examples, last[has_row])),
        ),
    }
    return {name: _append(lake, name, version, event_us, *part) for name, part in parts.items()}


def _append(lake: Lake, name: str, version: str, event_us: int, key: str, ids: list[str], vectors: np.ndarray) -> int:
    offsets = pa.array(np.arange(len(ids) + 1) * vectors.shape[1], pa.int32())
    rows = pa.table(
        {
            "model_version": pa.array([version] * len(ids), pa.string()),
            "event_ts": pa.array(np.full(len(ids), event_us), pa.timestamp("us", "UTC")),
            key: pa.array(ids, pa.string()),
            "vector": pa.ListArray.from_arrays(offsets, pa.array(vectors.astype(np.float32).ravel())),
        }
    )
    if not lake.exists(name):
        lake.create(name, rows.schema)
    there = lake.scan(name, f"model_version = '{version}'", ("event_ts",))
    if event_us in there["event_ts"].cast(pa.int64()).to_pylist():
        return 0
    lake.append(name, rows)
    return len(rows)
