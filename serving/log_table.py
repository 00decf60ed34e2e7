"""Served requests as rows of `lake.forward_log`, built by columns, many requests at once: what `rows_to_table` gives of each
`as_row()`, in a fraction of the time, as a request has thousands of candidates. Texts that repeat stay numbers until they are
written.

Shape letters: R requests, C candidates of all of them, L of those logged with features, F features, G generators, T heads.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa

from serving.forward_log import CODED_CANDIDATE, CODED_SCHEMA, rows_to_table
from serving.served import Served
from warehouse.compiled import compiled

_CANDIDATES = CODED_SCHEMA.get_field_index("candidates")


def as_table(requests: Sequence[Served], pause: Callable[[], None] = lambda: None) -> pa.Table:
    """Their rows in CODED_SCHEMA, in this order. pause: called between parts of the work, a dozen times."""
    return pa.concat_tables([_of_alike(list(some), pause) for _, some in groupby(requests, _kind)])


def _kind(served: Served) -> Hashable:
    """Requests of one kind have the same columns."""
    candidates, features = served.candidates, served.logged_features
    return (
        id(candidates.catalogue),
        candidates.generators,
        features.names,
        tuple(served.predictions),
        tuple(features.sequences),
        tuple(features.maps),
    )


def _of_alike(requests: list[Served], pause: Callable[[], None]) -> pa.Table:
    head = rows_to_table([{**served.head(), "candidates": []} for served in requests])
    start_R = np.concatenate([[0], np.cumsum([len(served.candidates) for served in requests])])
    candidates = pa.ListArray.from_arrays(pa.array(start_R, pa.int32()), _candidates(requests, start_R, pause))
    return head.set_column(_CANDIDATES, CODED_SCHEMA.field(_CANDIDATES), candidates)


def _candidates(requests: list[Served], start_R: np.ndarray, pause: Callable[[], None]) -> pa.StructArray:
    """[C], each as `Served.as_row` tells it."""
    pause()
    first, C = requests[0], int(start_R[-1])
    row_C, catalogue = np.concatenate([served.candidates.row_C for served in requests]), first.candidates.catalogue
    logged_L = np.concatenate([start + served.logged for start, served in zip(start_R, requests, strict=False)])
    is_logged_C = np.zeros(C, dtype=bool)
    is_logged_C[logged_L] = True
    made_by: dict[str, Callable[[], pa.Array]] = {
        "note_id": lambda: _coded(row_C, catalogue.note_id_column),
        "author_id": lambda: _coded(catalogue.author_rows(row_C), catalogue.author_column),
        "sources": lambda: _sources(first.candidates.generators, np.concatenate([one.candidates.share_CG for one in requests])),
        "recall_score": lambda: _nullable(np.concatenate([served.candidates.recall_score_C for served in requests])),
        "l1_score": lambda: _nullable(np.concatenate([served.l1_score_C for served in requests])),
        "final_score": lambda: _nullable(np.concatenate([served.final_score_C for served in requests])),
        "features": lambda: _features(requests, is_logged_C),
        "predictions": lambda: _predictions(requests, C),
        "sequences": lambda: _of_logged(requests, "sequences", logged_L, is_logged_C),
        "maps": lambda: _of_logged(requests, "maps", logged_L, is_logged_C),
    }
    columns = _of_page(requests, start_R)
    for name, make in made_by.items():
        pause()
        columns[name] = make()
    pause()
    return pa.StructArray.from_arrays([columns[field.name] for field in CODED_CANDIDATE], fields=list(CODED_CANDIDATE))


def _of_page(requests: list[Served], start_R: np.ndarray) -> dict[str, pa.Array]:
    """What only candidates that were shown have."""
    C = int(start_R[-1])
    places = sorted(
        (start + placed.candidate, position, served.impression_id(position), placed)
        for start, served in zip(start_R.tolist(), requests, strict=False)
        for position, placed in enumerate(served.page)
    )
    shown = np.array([row for row, *_ in places], dtype=np.int64)
    is_shown_C = np.zeros(C, dtype=bool)
    is_shown_C[shown] = True
    position_C, propensity_C = np.zeros(C, dtype=np.int32), np.zeros(C)
    position_C[shown] = [position for _, position, _, _ in places]
    propensity_C[shown] = [placed.propensity for *_, placed in places]
    return {
        "impression_id": _texts([text for _, _, text, _ in places], is_shown_C),
        "position": pa.Array.from_buffers(pa.int32(), C, [_bits(is_shown_C), pa.py_buffer(position_C)]),
        "shown": pa.array(is_shown_C),
        "slot": _texts([placed.slot for *_, placed in places], is_shown_C),
        "propensity": pa.Array.from_buffers(pa.float64(), C, [_bits(is_shown_C), pa.py_buffer(propensity_C)]),
    }


def _texts(texts: list[str], is_there_C: np.ndarray) -> pa.Array:
    """The texts, in order, at the places where there is one; null elsewhere."""
    encoded = [text.encode() for text in texts]
    sizes_C = np.zeros(len(is_there_C), dtype=np.int64)
    sizes_C[is_there_C] = [len(one) for one in encoded]
    buffers = [_bits(is_there_C), pa.py_buffer(offsets_of(sizes_C)), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(is_there_C), buffers)


def _sources(generators: Sequence[str], share_CG: np.ndarray) -> pa.ListArray:
    offsets, places = ordered_shares(np.ascontiguousarray(share_CG, dtype=np.float32))
    return pa.ListArray.from_arrays(pa.array(offsets), _coded(places, _texts_of(tuple(generators))))


@compiled("Tuple((i4[::1], i4[::1]))(f4[:, ::1])")
def ordered_shares(share_CG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int32 [C + 1], generators int32): of each candidate those with a share above 0, the largest first, of equals the
    one that comes first."""
    C, G = share_CG.shape
    offsets, places, used = np.zeros(C + 1, np.int32), np.empty(C * G, np.int32), 0
    for candidate in range(C):
        start = used
        for generator in range(G):
            share = share_CG[candidate, generator]
            if share > 0:
                at = used
                while at > start and share_CG[candidate, places[at - 1]] < share:
                    places[at] = places[at - 1]
                    at -= 1
                places[at] = generator
                used += 1
        offsets[candidate + 1] = used
    return offsets, places[:used].copy()


def _features(requests: list[Served], is_logged_C: np.ndarray) -> pa.MapArray:
    names = requests[0].logged_features.names
    values = np.concatenate([served.logged_features.values_CF.ravel() for served in requests])
    keys = _repeated(names, sum(len(served.logged) for served in requests))
    return _maps("features", len(names) * is_logged_C, keys, _nullable(values), is_logged_C)


def _predictions(requests: list[Served], C: int) -> pa.MapArray:
    heads = list(requests[0].predictions)
    value_TC = np.empty((len(heads), C))
    for value_C, head in zip(value_TC, heads, strict=True):
        np.concatenate([served.predictions[head] for served in requests], out=value_C)
    has_TC = np.isfinite(value_TC)
    is_scored_C: np.ndarray = np.logical_or.reduce(has_TC)
    if np.array_equal(is_scored_C, has_TC.all(axis=0)):  # L2 scores a candidate by all heads or by none
        scored = np.flatnonzero(is_scored_C)
        values, keys = value_TC[:, scored].T.ravel(), _repeated(heads, len(scored))
        return _maps("predictions", len(heads) * is_scored_C, keys, pa.array(values))
    head_TC = np.broadcast_to(np.arange(len(heads))[:, None], value_TC.shape)
    values, keys = value_TC.T[has_TC.T], _coded(head_TC.T[has_TC.T], _texts_of(tuple(heads)))
    return _maps("predictions", has_TC.sum(axis=0), keys, pa.array(values))


def _of_logged(requests: list[Served], name: str, logged_L: np.ndarray, is_logged_C: np.ndarray) -> pa.MapArray:
    """The sequences or maps of the logged candidates, null for the others."""
    kind = CODED_CANDIDATE.field(name).type
    columns_R: list[Mapping[str, list[Any]]] = [getattr(served.logged_features, name) for served in requests]
    if not columns_R[0]:
        nothing = pa.array([], kind.key_type), pa.array([], kind.item_type)
        return _maps(name, np.zeros(len(is_logged_C), dtype=np.int64), *nothing, is_logged_C)
    rows = chain.from_iterable(zip(*columns.values(), strict=True) for columns in columns_R)
    value_C: list[Any] = [None] * len(is_logged_C)
    for candidate, values in zip(logged_L.tolist(), rows, strict=True):
        of_one = zip(columns_R[0], values, strict=True)
        value_C[candidate] = [(key, list(value.items()) if isinstance(value, dict) else value) for key, value in of_one]
    return pa.array(value_C, kind)


def _maps(
    name: str, sizes_C: np.ndarray, keys: pa.Array, values: pa.Array, is_there_C: np.ndarray | None = None
) -> pa.MapArray:
    """A column of maps of these sizes, null where there is none."""
    kind = CODED_CANDIDATE.field(name).type
    entries = pa.StructArray.from_arrays([keys, values], fields=[kind.key_field, kind.item_field])
    validity = None if is_there_C is None else _bits(is_there_C)
    return pa.Array.from_buffers(kind, len(sizes_C), [validity, pa.py_buffer(offsets_of(sizes_C))], children=[entries])


def _repeated(names: Sequence[str], times: int) -> pa.DictionaryArray:
    """The names, over and over."""
    return _coded(np.tile(np.arange(len(names), dtype=np.int32), times), _texts_of(tuple(names)))


def _coded(codes: np.ndarray, texts: pa.Array) -> pa.DictionaryArray:
    """codes: places among the texts, -1 for NULL. Each text has one place: Parquet's writer makes texts of others."""
    is_there = codes >= 0
    indices = pa.Array.from_buffers(pa.int32(), len(codes), [_bits(is_there), pa.py_buffer(codes.astype(np.int32, copy=False))])
    return pa.DictionaryArray.from_arrays(indices, texts)


@lru_cache(maxsize=32)
def _texts_of(names: tuple[str, ...]) -> pa.Array:
    """The same array each time, which is sent once."""
    return pa.array(names, pa.string())


def _nullable(values: np.ndarray) -> pa.Array:
    """Null for what is no number."""
    values, is_number = np.ascontiguousarray(values, dtype=np.float64), np.isfinite(values)
    return pa.Array.from_buffers(pa.float64(), len(values), [_bits(is_number), pa.py_buffer(values)])


@compiled("i4[::1](i8[::1])")
def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """int32 [len(sizes) + 1]: where each begins and the last ends. NumPy's running sum takes several times as long."""
    offsets = np.empty(len(sizes) + 1, np.int32)
    end = offsets[0] = 0
    for place, size in enumerate(sizes):
        end += size
        offsets[place + 1] = end
    return offsets


def _bits(is_there: np.ndarray) -> pa.Buffer | None:
    """Arrow's bitmap; None where all are there."""
    return None if is_there.all() else pa.py_buffer(np.packbits(is_there, bitorder="little"))
