"""Features of one request: the reader's once, the candidates' by gathering each distinct key once, all from one StoreView.

Shape letters: C candidates, F features. One view means one tick T and one log position K for every value. Knows nothing of
models: they ask for columns by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from serving.catalogue import REQUEST_FEATURES, Catalogue
from streaming_sql.assembled import Assembled
from streaming_sql.group_state import FeatureMatrix
from streaming_sql.key_index import Key
from streaming_sql.online_store import StoreView
from streaming_sql.table_store import TableStore
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.kinds.declared import Kinds

KEY_COLUMNS = ("user_id", "note_id", "author_id")
USER = ("user_id",)


@dataclass(frozen=True)
class UserFeatures:
    """The groups keyed by the reader alone. sequences: each a list of strings; maps: each from strings to numbers."""

    names: tuple[str, ...]
    values_F: np.ndarray
    sequences: Mapping[str, list[str]]
    maps: Mapping[str, dict[str, float]] = field(default_factory=dict)

    def pick(self, names: Sequence[str]) -> np.ndarray:
        """float64 [len(names)], in the order asked for; NaN for NULL."""
        return self.values_F[_columns(self.names, names)]

    def as_dict(self) -> dict[str, float | None]:
        return _nullable(self.names, self.values_F)


@dataclass(frozen=True)
class CandidateFeatures:
    """Every feature of every candidate: note, author, reader × author, and request-time ones. Models are given numbers; the
    sequences and maps, C of each, are for the log."""

    names: tuple[str, ...]
    values_CF: np.ndarray
    sequences: Mapping[str, list[list[str]]] = field(default_factory=dict)
    maps: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)

    def pick(self, names: Sequence[str]) -> np.ndarray:
        """float64 [C, len(names)], in the order asked for; NaN for NULL."""
        return self.values_CF[:, _columns(self.names, names)]

    def take(self, order: np.ndarray) -> "CandidateFeatures":
        places = order.tolist()
        return CandidateFeatures(
            self.names, self.values_CF[order], _gathered(self.sequences, places), _gathered(self.maps, places)
        )

    def row(self, position: int) -> dict[str, float | None]:
        return _nullable(self.names, self.values_CF[position])

    def sequences_of(self, position: int) -> dict[str, list[str]]:
        return {name: rows[position] for name, rows in self.sequences.items()}

    def maps_of(self, position: int) -> dict[str, dict[str, float]]:
        return {name: rows[position] for name, rows in self.maps.items()}


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


def hydrate_candidates(
    view: StoreView,
    groups: Mapping[str, FeatureGroup],
    catalogue: Catalogue,
    user_id: str,
    note_ids: Sequence[str],
    author_ids: Sequence[str | None],
    t_us: int,
    tables: TableStore,
    assembled: Assembled,
) -> CandidateFeatures:
    """All candidates' features in one call per group: gathered where the tick is assembled, else a key that many candidates
    share is assembled once."""
    row_C = catalogue.rows(note_ids)
    rows_C: dict[tuple[str, ...], np.ndarray] = {("note_id",): row_C, ("author_id",): catalogue.author_rows(row_C)}
    columns: dict[str, Sequence[str | None]] = {
        "user_id": [user_id] * len(note_ids),
        "note_id": note_ids,
        "author_id": author_ids,  # a note without author has no key, and reads like an author never met
    }
    names: list[str] = []
    values: list[np.ndarray] = []
    sequences: dict[str, list[list[str]]] = {}
    maps: dict[str, list[dict[str, float]]] = {}

    def gather(key_columns: tuple[str, ...], assemble: Callable[[list[Key]], FeatureMatrix]) -> None:
        keys = list(zip(*(columns[key] for key in key_columns), strict=True))
        distinct = dict.fromkeys(keys)
        matrix = assemble(list(distinct))
        place = {key: row for row, key in enumerate(distinct)}
        names.extend(matrix.names)
        places = [place[key] for key in keys]
        values.append(matrix.values[places])
        sequences.update(_gathered(matrix.sequences, places))
        maps.update(_gathered(matrix.maps, places))

    for group in groups.values():
        if group.entity_keys == USER:
            continue
        matrix = None
        if group.entity_keys in rows_C:
            (column,) = group.entity_keys
            matrix = assembled.gather(view, group.name, rows_C[group.entity_keys], partial(_key_at, columns[column]), t_us)
        if matrix is None:
            gather(group.entity_keys, partial(view.assemble, group.name, t_us=t_us))
            continue
        names.extend(matrix.names)
        values.append(matrix.values)
        sequences.update(matrix.sequences)
        maps.update(matrix.maps)
    for table in tables.tables:
        if table.keys != USER:
            gather(table.keys, partial(tables.assemble, table, tick_us=view.tick_us))
    names.extend(REQUEST_FEATURES)
    values.append(catalogue.request_features(row_C, t_us))
    return CandidateFeatures(tuple(names), np.concatenate(values, axis=1), sequences, maps)


def _key_at(column: Sequence[str | None], place: int) -> Key:
    return (column[place],)  # type: ignore[return-value]  # a note without author reads like an author never met


def _gathered(rows: Mapping[str, list[Any]], places: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [column[place] for place in places] for name, column in rows.items()}


def _columns(have: tuple[str, ...], want: Sequence[str]) -> list[int]:
    place = {name: column for column, name in enumerate(have)}
    return [place[name] for name in want]


def _nullable(names: tuple[str, ...], values_F: np.ndarray) -> dict[str, float | None]:
    return {name: (float(value) if np.isfinite(value) else None) for name, value in zip(names, values_F, strict=True)}
