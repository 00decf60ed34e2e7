"""A reader's attributes (the JSON of `lake.users.attributes`) as inputs: one column per `key=value` that enough readers share.

Known before the log begins, so they leak nothing. Every value is a word, numbers too: encoded attributes have no order to
trust. R rows, A columns.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

LEAST_READERS = 50
"""A value fewer readers have says more about those readers than about the next one."""


class AttributeInputs:
    """`words`: the `key=value` of each column, saved with the model."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self._column = {word: column for column, word in enumerate(self.words)}
        self._encoded = lru_cache(maxsize=4096)(lambda text: self.encode([text])[0])

    @staticmethod
    def of(attributes: Sequence[str | None], least_readers: int = LEAST_READERS) -> "AttributeInputs":
        """attributes: one JSON object per reader, or None."""
        counts = Counter(word for text in attributes for word in _words(text))
        return AttributeInputs(sorted(word for word, readers in counts.items() if readers >= least_readers))

    def encode(self, attributes: Sequence[str | None]) -> np.ndarray:
        """float32 [R, A] of 0 and 1; a reader without attributes, or with none known here, is a row of zeros."""
        rows_RA = np.zeros((len(attributes), len(self.words)), dtype=np.float32)
        for row, text in enumerate(attributes):
            columns = [self._column[word] for word in _words(text) if word in self._column]
            rows_RA[row, columns] = 1.0
        return rows_RA

    def encode_one(self, attributes: str | None) -> np.ndarray:
        """float32 [A], to be read only: what was made for one of the last few thousand texts comes again."""
        return self._encoded(attributes)


def _words(text: str | None) -> list[str]:
    return [f"{key}={value}" for key, value in json.loads(text or "{}").items() if value is not None]
