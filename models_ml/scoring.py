"""What L1 and L2 share at their edge: a request, the check of what comes in, and the surface to assume when a request names
none."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RankingRequest:
    """One reader and their candidates, as `L1.score` and `L2.score` take them by argument; L1 reads the first three."""

    user: np.ndarray
    notes: np.ndarray
    surface: str | None = None
    history_note_ids: Sequence[str] = ()
    note_ids: Sequence[str] = ()
    user_attributes: str | None = None


def check_shapes(
    name: str, user: np.ndarray, notes: np.ndarray, user_features: Sequence[str], note_features: Sequence[str]
) -> None:
    """Raises ValueError unless there is one value per feature."""
    if user.shape != (len(user_features),) or notes.ndim != 2 or notes.shape[1] != len(note_features):
        raise ValueError(
            f"{name} takes user [{len(user_features)}] and notes [N, {len(note_features)}], got {user.shape} and {notes.shape}"
        )


def default_surface(train_codes: np.ndarray, surfaces: Sequence[str]) -> str | None:
    """The surface of most training rows; codes are 1 + place in `surfaces`, 0 = none."""
    most_seen = int(np.bincount(train_codes, minlength=1).argmax()) if len(train_codes) else 0
    return surfaces[most_seen - 1] if most_seen else None
