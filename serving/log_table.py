"""One served request as a row of `lake.forward_log`, built by columns: what `rows_to_table([served.as_row()])` gives, in a
fraction of the time, as a request has thousands of candidates.

Shape letters: C candidates, L of them logged with features, F features.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from serving.forward_log import CANDIDATE, FORWARD_LOG_SCHEMA, rows_to_table
from serving.served import Served

_CANDIDATES = FORWARD_LOG_SCHEMA.get_field_index("candidates")


def as_table(served: Served) -> pa.Table:
    """One row in FORWARD_LOG_SCHEMA."""
    head = rows_to_table([{**served.head(), "candidates": []}])
    candidates = pa.ListArray.from_arrays(pa.array([0, len(served.candidates)], pa.int32()), _candidates(served))
    return head.set_column(_CANDIDATES, FORWARD_LOG_SCHEMA.field(_CANDIDATES), candidates)


def _candidates(served: Served) -> pa.StructArray:
    """[C], each as `Served.candidate` tells it."""
    candidates, C = served.candidates, len(served.candidates)
    shown = [placed.candidate for placed in served.page]
    is_shown_C = np.zeros(C, dtype=bool)
    is_shown_C[shown] = True

    place_C = np.zeros(C, dtype=np.int64)
    place_C[shown] = np.arange(len(shown))
    place_or_null_C = pa.array(place_C, mask=~is_shown_C)

    def of_shown(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind).take(place_or_null_C)

    page, row_C = served.page, pa.array(candidates.row_C)
    columns = {
        "impression_id": of_shown([served.impression_id(position) for position in range(len(page))], pa.string()),
        "note_id": candidates.catalogue.note_id_column.take(row_C),
        "author_id": candidates.catalogue.author_id_column.take(row_C),
        "sources": _sources(served),
        "recall_score": _nullable(candidates.recall_score_C),
        "l1_score": _nullable(served.l1_score_C),
        "final_score": _nullable(served.final_score_C),
        "position": of_shown(range(len(page)), pa.int32()),
        "shown": pa.array(is_shown_C),
        "slot": of_shown([placed.slot for placed in page], pa.string()),
        "propensity": of_shown([placed.propensity for placed in page], pa.float64()),
        "features": _features(served),
        "predictions": _predictions(served),
        "sequences": _of_logged(served, served.logged_features.sequences, "sequences"),
        "maps": _of_logged(served, served.logged_features.maps, "maps"),
    }
    return pa.StructArray.from_arrays([columns[field.name] for field in CANDIDATE], fields=list(CANDIDATE))


def _sources(served: Served) -> pa.ListArray:
    share_CG = served.candidates.share_CG
    order_CG = np.argsort(-share_CG, axis=1, kind="stable")
    has_CG = np.take_along_axis(share_CG, order_CG, axis=1) > 0
    offsets = np.concatenate([[0], np.cumsum(has_CG.sum(axis=1))])
    names = pa.array(served.candidates.generators, pa.string()).take(pa.array(order_CG[has_CG]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names)


def _features(served: Served) -> pa.MapArray:
    features = served.logged_features
    num_features = len(features.names)
    keys = _repeated(features.names, len(served.logged))
    sizes_C = np.zeros(len(served.candidates), dtype=np.int64)
    sizes_C[served.logged] = num_features
    return _maps(sizes_C, _is_logged(served), keys, _nullable(features.values_CF.ravel()))


def _predictions(served: Served) -> pa.MapArray:
    heads = list(served.predictions)
    value_CT = np.column_stack([served.predictions[head] for head in heads]) if heads else np.empty((len(served.candidates), 0))
    has_CT = np.isfinite(value_CT)
    number_C = has_CT.sum(axis=1)
    if np.isin(number_C, (0, len(heads))).all():  # L2 scores a candidate by all heads or by none
        keys = _repeated(heads, int((number_C > 0).sum()))
    else:
        head_CT = np.broadcast_to(np.arange(len(heads)), value_CT.shape)
        keys = pa.array(heads, pa.string()).take(pa.array(head_CT[has_CT]))
    return _maps(number_C, np.ones(len(value_CT), dtype=bool), keys, pa.array(value_CT[has_CT]))


def _of_logged(served: Served, columns: Mapping[str, list[Any]], name: str) -> pa.MapArray:
    """The sequences or maps of the logged candidates, null for the others."""
    kind = CANDIDATE.field(name).type
    if not columns:
        nothing = pa.array([], kind.key_type), pa.array([], kind.item_type)
        return _maps(np.zeros(len(served.candidates), dtype=np.int64), _is_logged(served), *nothing)
    value_C: list[Any] = [None] * len(served.candidates)
    for row, candidate in enumerate(served.logged.tolist()):
        of_one = {column: values[row] for column, values in columns.items()}
        value_C[candidate] = [(key, list(value.items()) if isinstance(value, dict) else value) for key, value in of_one.items()]
    return pa.array(value_C, kind)


def _maps(sizes_C: np.ndarray, is_there_C: np.ndarray, keys: pa.Array, values: pa.Array) -> pa.MapArray:
    """Maps of these sizes, null where there is none."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes_C)]), pa.int32(), mask=np.append(~is_there_C, False))
    return pa.MapArray.from_arrays(offsets, keys, values)


def _repeated(names: Sequence[str], times: int) -> pa.Array:
    """The names, over and over: a part of what was made once."""
    return _tiled(tuple(names), 1 << max(times - 1, 0).bit_length()).slice(0, len(names) * times)


@lru_cache(maxsize=32)
def _tiled(names: tuple[str, ...], times: int) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(np.tile(np.arange(len(names)), times)))


def _is_logged(served: Served) -> np.ndarray:
    is_logged_C = np.zeros(len(served.candidates), dtype=bool)
    is_logged_C[served.logged] = True
    return is_logged_C


def _nullable(values: np.ndarray) -> pa.Array:
    """Null for what is no number."""
    return pa.array(values, pa.float64(), mask=~np.isfinite(values))
