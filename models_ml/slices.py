"""Names for parts of the test rows, so that a mean cannot hide whom a model serves badly. R rows."""

import json

import numpy as np
import pyarrow as pa

from models_ml.examples import Examples
from warehouse.errors import HeadraceError

NEW_READER_PLACES = 5
"""A reader with fewer known places of history than this is new."""
NO_VALUE = "(none)"
_COLUMNS = ("surface", "note_type", "note_topic")


def values_of(examples: Examples, rows: np.ndarray, name: str) -> np.ndarray:
    """Words [R]: which part each row belongs to.

    name: `new_user` (yes, no), a column (surface, note_type, note_topic), or a key of the readers' attributes (`country`).
    Raises HeadraceError with the names there are.
    """
    if name == "new_user":
        history_RL = examples.histories(examples.notes["note_id"].to_pylist(), NEW_READER_PLACES)[rows]
        return np.where((history_RL > 0).sum(1) < NEW_READER_PLACES, "yes", "no")
    if name in _COLUMNS:
        return np.array(examples.words[name].take(pa.array(rows)).fill_null(NO_VALUE).to_pylist())
    attributes = [json.loads(text or "{}") for text in examples.user_attributes()]
    keys = sorted({key for found in attributes for key in found})
    if name not in keys:
        raise HeadraceError(f"no slice {name!r}; there are {', '.join(('new_user', *_COLUMNS, *keys))}")
    return np.array([str(attributes[row].get(name) or NO_VALUE) for row in rows])
