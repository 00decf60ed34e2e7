"""Features of one request: the reader's once, the candidates' by gathering each distinct key once, all from one StoreView.

Shape letters: C candidates, F features. One view means one tick T and one log position K for every value. Knows nothing of
models: they ask for columns by name.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
from numba import types

from models_ml.scoring import columns_of
from serving.cache import Same
from serving.catalogue import REQUEST_FEATURES, Catalogue
from streaming_sql.assembled import Assembled, can_be_assembled
from streaming_sql.feature_rows import FeatureRows
from streaming_sql.group_state import FeatureMatrix
from streaming_sql.key_index import Key
from streaming_sql.online_store import StoreView
from streaming_sql.table_store import TableStore
from warehouse.compiled import compiled, only_read
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.kinds.declared import Kinds
from warehouse.time_algebra import floor_5m

KEY_COLUMNS = ("user_id", "note_id", "author_id")
USER = ("user_id",)
_AGE = "note_age_min"


@dataclass(frozen=True)
class UserFeatures:
    """The groups keyed by the reader alone. sequences: each a list of strings; maps: each from strings to numbers."""

    names: tuple[str, ...]
    values_F: np.ndarray
    sequences: Mapping[str, list[str]]
    maps: Mapping[str, dict[str, float]] = field(default_factory=dict)

    def pick(self, names: Sequence[str]) -> np.ndarray:
        """float64 [len(names)], in the order asked for; NaN for NULL."""
        return self.values_F[columns_of(self.names, tuple(names))]

    def as_dict(self) -> dict[str, float | None]:
        return _nullable(self.names, self.values_F)


@dataclass(frozen=True)
class CandidateFeatures:
    """Every feature of some candidates, copied, for the log. sequences and maps: C of each."""

    names: tuple[str, ...]
    values_CF: np.ndarray
    sequences: Mapping[str, list[list[str]]] = field(default_factory=dict)
    maps: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)

    def take(self, order: np.ndarray) -> "CandidateFeatures":
        return CandidateFeatures(
            self.names, self.values_CF.take(order, axis=0), _gathered(self.sequences, order), _gathered(self.maps, order)
        )

    def row(self, position: int) -> dict[str, float | None]:
        return _nullable(self.names, self.values_CF[position])

    def sequences_of(self, position: int) -> dict[str, list[str]]:
        return {name: rows[position] for name, rows in self.sequences.items()}

    def maps_of(self, position: int) -> dict[str, dict[str, float]]:
        return {name: rows[position] for name, rows in self.maps.items()}


@dataclass(frozen=True, eq=False)
class _Names:
    """Of each part, in order. Equal to itself alone: many names are long to compare."""

    of_parts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Hydrated:
    """Where every feature of every candidate is: note, author, reader × author, and request-time ones. Models are given the
    numbers that they ask for. row_C: the notes' rows of the catalogue, -1 for unknown ones; parts: REQUEST_FEATURES last;
    n_C: which of the parts' rows the candidates are."""

    row_C: np.ndarray
    parts: tuple[FeatureRows, ...]
    names: _Names
    n_C: np.ndarray

    @classmethod
    def of(cls, row_C: np.ndarray, parts: Sequence[FeatureRows]) -> "Hydrated":
        """The parts' rows as they are."""
        return cls(row_C, tuple(parts), _names_of(tuple(part.names for part in parts)), np.arange(len(row_C)))

    def __len__(self) -> int:
        return len(self.row_C)

    def pick(self, names: Sequence[str]) -> np.ndarray:
        """float32 [C, len(names)], contiguous, in the order asked for; NaN for NULL. Raises KeyError for an unknown name."""
        picked_CF = np.empty((len(self.row_C), len(names)), dtype=np.float32)
        for part, from_columns, to_columns in _columns_of_parts(self.names, tuple(names)):
            self.parts[part].write(self.n_C, picked_CF, from_columns, to_columns)
        return picked_CF

    def stamps(self, names: Sequence[str]) -> np.ndarray:
        """int64 [C]: above 0 where these features are those of the row of the catalogue wherever the number comes again: held
        until they change, all of them, and of the request itself no more than what stands once a note is created."""
        of_request = len(self.parts) - 1
        held = [self.parts[part] for part, _, _ in _columns_of_parts(self.names, tuple(names)) if part != of_request]
        if not held or _AGE in names:
            return np.zeros(len(self.row_C), dtype=np.int64)
        age_C = self.parts[of_request].held.values[self.n_C, REQUEST_FEATURES.index(_AGE)]
        is_unknown_C = np.isnan(age_C)
        newest_C = np.zeros(len(self.row_C), dtype=np.int64)
        for part in held:  # later changes have higher stamps: the highest says that no part has changed since
            stamp_C = part.stamps(self.n_C)
            is_unknown_C |= stamp_C == 0
            np.maximum(newest_C, stamp_C, out=newest_C)
        newest_C[is_unknown_C] = 0
        return newest_C

    def take(self, order: np.ndarray) -> "Hydrated":
        return Hydrated(self.row_C[order], self.parts, self.names, self.n_C[order])

    def copied(self) -> CandidateFeatures:
        names = tuple(chain.from_iterable(self.names.of_parts))
        values_CF = np.empty((len(self.row_C), len(names)))
        sequences: dict[str, list[list[str]]] = {}
        maps: dict[str, list[dict[str, float]]] = {}
        start = 0
        for part in self.parts:
            from_columns = np.arange(len(part.names))
            part.write(self.n_C, values_CF, from_columns, start + from_columns)
            start += len(part.names)
            sequences.update(part.sequences(self.n_C))
            maps.update(part.maps(self.n_C))
        return CandidateFeatures(names, values_CF, sequences, maps)


def check_groups(groups: Mapping[str, FeatureGroup], kinds: Kinds) -> None:
    """Raises HeadraceError if a group or a batch table has a key that a request cannot supply."""
    keyed = [(f"feature group {group.name}", group.entity_keys) for group in groups.values()]
    for name, keys in [*keyed, *((f"batch table {table.name}", table.keys) for table in kinds.tables)]:
        if unknown := set(keys) - set(KEY_COLUMNS):
            raise HeadraceError(
                f"{name} is keyed by {', '.join(sorted(unknown))}, which a feed request does not know; "
                f"served groups are keyed by {', '.join(KEY_COLUMNS)}"
            )


def available_names(groups: Mapping[str, FeatureGroup], kinds: Kinds) -> tuple[set[str], set[str]]:
    """(names a model may ask for of the reader, of a candidate)."""
    of_user, of_candidate = set(kinds.served_inputs), set(REQUEST_FEATURES)
    for keys, names in [(group.entity_keys, group.feature_names) for group in groups.values()] + [
        (table.keys, table.feature_names) for table in kinds.tables
    ]:
        (of_user if keys == USER else of_candidate).update(names)
    return of_user, of_candidate


def hydrate_user(
    view: StoreView, groups: Mapping[str, FeatureGroup], user_id: str, t_us: int, tables: TableStore
) -> UserFeatures:
    """The reader's own features, as of this view and t."""
    names: list[str] = []
    values: list[np.ndarray] = []
    sequences: dict[str, list[str]] = {}
    maps: dict[str, dict[str, float]] = {}
    for group in groups.values():
        if group.entity_keys == USER:
            matrix = view.assemble(group.name, [(user_id,)], t_us)
            names.extend(matrix.names)
            values.append(matrix.values[0])
            sequences.update({name: rows[0] for name, rows in matrix.sequences.items()})
            maps.update({name: rows[0] for name, rows in matrix.maps.items()})
    for table in tables.tables:
        if table.keys == USER:
            matrix = tables.assemble(table, [(user_id,)], view.tick_us)
            names.extend(matrix.names)
            values.append(matrix.values[0])
    return UserFeatures(tuple(names), np.concatenate(values) if values else np.empty(0), sequences, maps)


def user_depends_on(
    view: StoreView, groups: Mapping[str, FeatureGroup], user_id: str, t_us: int, tables: TableStore
) -> tuple[Hashable, ...] | None:
    """All that `hydrate_user` is a function of, beside the reader: where it is equal the features are, bit for bit. None where
    they hang from t itself (calendar keys) or on a batch table, which may be loaded again at any time."""
    if any(table.keys == USER for table in tables.tables):
        return None
    parts: list[Hashable] = [floor_5m(t_us)]
    for group in groups.values():
        if group.entity_keys == USER:
            if group.calendar:
                return None
            state = view.groups[group.name]
            parts.append(tuple(map(Same, state.layers)))
            parts.append(None if state.fresh_layers is None else tuple(map(Same, state.fresh_layers)))
            if state.plan.fresh:
                parts.append(tuple(map(Same, state.head.visible((user_id,), view.position, t_us))))
    return (view.tick_us, *parts)


def hydrate_candidates(
    view: StoreView,
    groups: Mapping[str, FeatureGroup],
    catalogue: Catalogue,
    user_id: str,
    row_C: np.ndarray,
    t_us: int,
    tables: TableStore,
    assembled: Assembled,
    note_ids: Sequence[str] | None = None,
) -> Hydrated:
    """All candidates' features in one call per group: of rows that are held where the tick is assembled, else a key that many
    candidates share is assembled once. row_C: the notes' rows of the catalogue, -1 for unknown ones, and then note_ids names
    them all."""
    row_C = np.ascontiguousarray(row_C)
    author_row_C = catalogue.author_rows(row_C)
    held: dict[tuple[str, ...], np.ndarray] = {("note_id",): row_C, ("author_id",): author_row_C}
    row_of: dict[tuple[str, ...], Mapping[str, int]] = {
        ("user_id", "note_id"): catalogue.row_of,
        ("user_id", "author_id"): catalogue.author_row_of,
    }
    num_rows = {"note_id": len(catalogue), "author_id": len(catalogue.authors)}
    authors = catalogue.authors
    key_of: dict[str, Callable[[int], Any]] = {
        "user_id": lambda place: user_id,
        "note_id": lambda place: note_ids[place] if note_ids else catalogue.note_ids[row_C[place]],
        # a note without author has no key, and reads like an author never met
        "author_id": lambda place: None if author_row_C[place] < 0 else authors[author_row_C[place]],
    }

    def key_at(key_columns: tuple[str, ...], place: int) -> Key:
        return tuple(key_of[column](place) for column in key_columns)

    def gather(key_columns: tuple[str, ...], assemble: Callable[[list[Key]], FeatureMatrix]) -> FeatureRows:
        """Each distinct key once. Candidates of one author differ in no key but their own."""
        if "note_id" in key_columns:
            keys = [key_at(key_columns, place) for place in range(len(row_C))]
            distinct = dict.fromkeys(keys)
            place_of = {key: place for place, key in enumerate(distinct)}
            places = np.array([place_of[key] for key in keys], dtype=np.int64)
        else:
            _, first, places = np.unique(author_row_C, return_index=True, return_inverse=True)
            distinct = dict.fromkeys(key_at(key_columns, place) for place in first.tolist())
        return FeatureRows(assemble(list(distinct)), places)

    parts: list[FeatureRows] = []
    for group in groups.values():
        columns = group.entity_keys
        if columns == USER:
            continue
        rows = None
        if columns in held:
            rows = assembled.gather(view, group.name, held[columns], partial(key_at, columns), t_us)
        elif columns in row_of and can_be_assembled(view.groups[group.name].plan) and (row_C >= 0).all():
            other = columns[1]
            rows = _of_reader_and(view, group.name, user_id, row_of[columns], num_rows[other], held[(other,)], t_us)
        parts.append(rows or gather(columns, partial(_assemble_known, view, group.name, t_us=t_us)))
    for table in tables.tables:
        if table.keys != USER:
            parts.append(gather(table.keys, partial(tables.assemble, table, tick_us=view.tick_us)))
    of_request = FeatureMatrix(REQUEST_FEATURES, catalogue.request_features(row_C, t_us), {})
    parts.append(FeatureRows(of_request, np.arange(len(row_C))))
    return Hydrated.of(row_C, parts)


def _of_reader_and(
    view: StoreView, group_name: str, user_id: str, row_of: Mapping[str, int], num_rows: int, row_C: np.ndarray, t_us: int
) -> FeatureRows:
    """`view.assemble` of (reader, what the candidate's row names), of a group in which unknown keys read alike. From the
    few that the reader has met, not from the many candidates.

    row_of: row of what the reader met, out of num_rows; row_C: int64, -1 for a candidate that has none.
    """
    met = [key for key, _ in view.groups[group_name].index.under(user_id)]
    row_M = np.array([row_of.get(key[1], -1) for key in met], dtype=np.int64)
    number_C, asked_M = np.empty(len(row_C), dtype=np.int64), np.zeros(len(met), dtype=bool)
    _find_met(row_C, row_M, num_rows, number_C, asked_M)
    stranger: Any = (user_id, None)
    asked = [met[m] for m in np.flatnonzero(asked_M).tolist()]
    return FeatureRows(view.assemble(group_name, [stranger, *asked], t_us), number_C)


@compiled(types.void(*(only_read(types.int64),) * 2, types.int64, types.int64[::1], types.boolean[::1]))
def _find_met(row_C: np.ndarray, row_M: np.ndarray, num_rows: int, number_C: np.ndarray, asked_M: np.ndarray) -> None:
    """Marks those of M rows that are among row_C, and numbers them from 1 on; a candidate with another row has number 0. Rows
    are below num_rows, -1 is no row; no other comes twice among the M."""
    place_R = np.zeros(num_rows, np.int32)
    for m in range(len(row_M)):
        if row_M[m] >= 0:
            place_R[row_M[m]] = m + 1
    for c in range(len(row_C)):
        number_C[c] = place_R[row_C[c]] if row_C[c] >= 0 else 0
        if number_C[c] > 0:
            asked_M[number_C[c] - 1] = True
    number_M = np.zeros(len(row_M) + 1, np.int64)
    for m in range(len(row_M)):
        number_M[m + 1] = number_M[m] + asked_M[m]
    for c in range(len(row_C)):
        number_C[c] = number_M[number_C[c]]


def _assemble_known(view: StoreView, group_name: str, keys: list[Key], t_us: int) -> FeatureMatrix:
    """`view.assemble`, where keys that the store has never seen, which all read alike, are assembled as one."""
    state = view.groups[group_name]
    if len(keys) < 2 or not can_be_assembled(state.plan):
        return view.assemble(group_name, keys, t_us)
    known = np.flatnonzero(state.index.find(keys) >= 0)
    if len(known) == len(keys):
        return view.assemble(group_name, keys, t_us)
    place_N = np.full(len(keys), len(known), dtype=np.int64)
    place_N[known] = np.arange(len(known))
    stranger = keys[int(np.argmax(place_N == len(known)))]
    matrix = view.assemble(group_name, [*(keys[place] for place in known.tolist()), stranger], t_us)
    gathered = _gathered(matrix.sequences, place_N), _gathered(matrix.maps, place_N)
    return FeatureMatrix(matrix.names, matrix.values[place_N], *gathered)


def _gathered(rows: Mapping[str, list[Any]], places: np.ndarray) -> dict[str, list[Any]]:
    return {name: [column[place] for place in places.tolist()] for name, column in rows.items()}


@lru_cache(maxsize=8)
def _names_of(parts: tuple[tuple[str, ...], ...]) -> _Names:
    return _Names(parts)


@lru_cache(maxsize=64)
def _columns_of_parts(have: _Names, want: tuple[str, ...]) -> tuple[tuple[int, np.ndarray, np.ndarray], ...]:
    """(part, its columns, where they are wanted) of each part of which some are."""
    part_of = {name: part for part, names in enumerate(have.of_parts) for name in names}
    wanted: dict[int, list[tuple[int, int]]] = {}
    for place, name in enumerate(want):
        part = part_of[name]
        wanted.setdefault(part, []).append((have.of_parts[part].index(name), place))
    columns = ((part, np.array(pairs, dtype=np.int64).T) for part, pairs in sorted(wanted.items()))
    return tuple((part, of_part[0].copy(), of_part[1].copy()) for part, of_part in columns)


def _nullable(names: tuple[str, ...], values_F: np.ndarray) -> dict[str, float | None]:
    return {name: (float(value) if np.isfinite(value) else None) for name, value in zip(names, values_F, strict=True)}
