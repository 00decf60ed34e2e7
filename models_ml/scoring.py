"""What L1 and L2 share at their edge: a request, the check of what comes in, and the surface to assume when a request names
none."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np


class Notes(Protocol):
    """Features of C candidates, copied when they are asked for."""

    def __len__(self) -> int: ...

    def pick(self, names: Sequence[str]) -> np.ndarray:
        """float32 [C, len(names)], contiguous, in the order asked for; NaN for NULL."""

    def take(self, places: np.ndarray) -> "Notes":
        """Those at these places."""

    def stamps(self, names: Sequence[str]) -> np.ndarray:
        """int64 [C]: wherever one above 0 comes again with the same row, as `RankingRequest.rows` names it, these features have
        the same bits. 0 where that is not known."""


@dataclass(frozen=True)
class Given:
    """Features as a matrix: [C, the names]."""

    values_CF: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values_CF)

    def pick(self, names: Sequence[str]) -> np.ndarray:
        return np.ascontiguousarray(self.values_CF.take(columns_of(self.names, tuple(names)), axis=1), dtype=np.float32)

    def take(self, places: np.ndarray) -> "Given":
        return Given(self.values_CF[places], self.names)

    def stamps(self, names: Sequence[str]) -> np.ndarray:
        return np.zeros(len(self.values_CF), dtype=np.int64)


@dataclass(frozen=True)
class RankingRequest:
    """One reader and their candidates, as `L1.score` and `L2.score` take them by argument; L1 reads no more than it is given
    there."""

    user: np.ndarray
    notes: np.ndarray | Notes
    surface: str | None = None
    history_note_ids: Sequence[str] = ()
    note_ids: Sequence[str] = ()
    user_attributes: str | None = None
    rows: np.ndarray | None = None
    codes: np.ndarray | None = None


@lru_cache(maxsize=64)
def columns_of(have: tuple[str, ...], want: tuple[str, ...]) -> np.ndarray:
    """int64: the places of these names. Raises KeyError for an unknown one."""
    place = {name: column for column, name in enumerate(have)}
    return np.array([place[name] for name in want], dtype=np.int64)


def together(values: Sequence[np.ndarray]) -> np.ndarray:
    """All rows of matrices of the same columns: float32, contiguous; itself where there is one that is."""
    if len(values) == 1:
        return np.ascontiguousarray(values[0], dtype=np.float32)
    return np.concatenate(values, dtype=np.float32)


def rows_of(requests: Sequence[RankingRequest]) -> np.ndarray:
    """int64 [N]: the rows of all candidates, -1 where a request names none."""
    return np.concatenate([np.full(len(one.notes), -1) if one.rows is None else one.rows for one in requests])


def notes_of(name: str, request: RankingRequest, user_features: Sequence[str], note_features: Sequence[str]) -> Notes:
    """The request's candidates. Raises ValueError unless there is one value per feature, one of each number per candidate."""
    user, notes = request.user, request.notes
    given = notes.shape if isinstance(notes, np.ndarray) else (len(notes), len(note_features))
    if user.shape != (len(user_features),) or len(given) != 2 or given[1] != len(note_features):
        raise ValueError(
            f"{name} takes user [{len(user_features)}] and notes [N, {len(note_features)}], got {user.shape} and {given}"
        )
    for what, numbers in (("rows", request.rows), ("codes", request.codes)):
        if numbers is not None and (numbers.shape != (len(notes),) or numbers.dtype != np.int64):
            raise ValueError(f"{name} takes {what} int64 [{len(notes)}], got {numbers.dtype} {numbers.shape}")
    return Given(notes, tuple(note_features)) if isinstance(notes, np.ndarray) else notes


def default_surface(train_codes: np.ndarray, surfaces: Sequence[str]) -> str | None:
    """The surface of most training rows; codes are 1 + place in `surfaces`, 0 = none."""
    most_seen = int(np.bincount(train_codes, minlength=1).argmax()) if len(train_codes) else 0
    return surfaces[most_seen - 1] if most_seen else None
