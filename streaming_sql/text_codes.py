"""Dense numbers for the texts of map entries: the n-th text ever seen is n. Grows, never forgets.

One thread adds; any number look up.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class TextCodes:
    """Text → code, and back."""

    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._texts: list[str] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, texts: pa.Array) -> np.ndarray:
        """int64 [R]: the code of each text; texts not seen before get the next ones. None must be null."""
        encoded = pc.dictionary_encode(texts)
        codes = np.array([self.code(text) for text in encoded.dictionary.to_pylist()], dtype=np.int64)
        return codes[encoded.indices.to_numpy()] if len(codes) else np.zeros(0, dtype=np.int64)

    def since(self, start: int = 0) -> list[str]:
        """The texts of codes start, start + 1, …"""
        return self._texts[start:]

    def code(self, text: str) -> int:
        """The text's code, a new one if need be."""
        code = self._code_of.get(text)
        if code is None:
            code = len(self._texts)
            self._texts.append(text)
            self._code_of[text] = code
        return code

    def texts(self, codes: Sequence[int]) -> list[str]:
        """The text of each code."""
        return [self._texts[code] for code in codes]
