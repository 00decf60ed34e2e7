"""Which notes may be shown at all, and to one reader: masks over all notes, made once and lent to requests.

N notes of the catalogue. Between two instants at which a note is made the same notes exist, so all requests share one mask; the
few notes of one reader are taken out of a copy, and put back into it after use.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np


class Showable:
    """Safe from several threads. created_us_N: when each note was made; allowed_N: what the settings do not block."""

    def __init__(self, created_us_N: np.ndarray, allowed_N: np.ndarray):
        self._created_us_N, self._allowed_N = created_us_N, allowed_N
        self._idle: deque[_Masks] = deque()

    @contextmanager
    def without(self, t_us: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        """bool [N]: notes that exist at t and are allowed, but for these rows. Only lent: it is another reader's afterwards."""
        masks = self._lent(t_us)
        try:
            masks.lent_N[rows] = False
            yield masks.lent_N
        finally:
            masks.lent_N[rows] = masks.all_N[rows]
            self._idle.append(masks)

    def _lent(self, t_us: int) -> "_Masks":
        number = int(np.searchsorted(self._creations, t_us))
        while self._idle:
            try:
                masks = self._idle.pop()
            except IndexError:  # another thread took the last one
                break
            if masks.number == number:
                return masks
        return _Masks(number, (self._created_us_N < t_us) & self._allowed_N)

    @cached_property
    def _creations(self) -> np.ndarray:
        return np.sort(self._created_us_N)


class _Masks:
    """number: of the notes that exist. lent_N: what is lent, as all_N when it comes back."""

    def __init__(self, number: int, all_N: np.ndarray):
        self.number, self.all_N, self.lent_N = number, all_N, all_N.copy()
