"""Dense numbers for the texts of map entries: the n-th text is n, and the number of one that went is given to a later one.

Any number of threads. As with keys, codes are never forgotten here: `kept` gives another table that has.
"""

import threading
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BESIDE = 1 << 30
"""Codes from here on are of texts beside a table."""


class TextCodes:
    """Text → code, and back."""

    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._text_of: list[str] = []
        """By code; what a free one holds is nobody's."""
        self._given = array("q")
        self._free: list[int] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._given)

    def add(self, texts: pa.Array) -> np.ndarray:
        """int64 [R]: the code of each text; texts not seen before get the next ones. None must be null."""
        encoded = pc.dictionary_encode(texts)
        codes = np.array([self.code(text) for text in encoded.dictionary.to_pylist()], dtype=np.int64)
        return codes[encoded.indices.to_numpy()] if len(codes) else np.zeros(0, dtype=np.int64)

    def since(self, start: int = 0) -> tuple[list[str], np.ndarray]:
        """The texts that are here, from the start-th on, in the order in which they came, and their codes (int64)."""
        codes = self._given[start:]
        return [self._text_of[code] for code in codes], np.array(codes, dtype=np.int64)

    def extend(self, texts: Iterable[str], codes: Iterable[int]) -> None:
        """Gives texts that are not here yet the codes that they have elsewhere. Not for a table that adds."""
        for text, code in zip(texts, codes, strict=True):
            self._text_of += [""] * (code + 1 - len(self._text_of))
            self._assign(text, code)

    def kept(self, codes: np.ndarray) -> "TextCodes":
        """Another table with these codes alone (int64, ascending); the others are free."""
        table = TextCodes()
        table._text_of = [""] * len(self._text_of)
        for code in codes.tolist():
            table._assign(self._text_of[code], code)
        table.find_free()
        return table

    def find_free(self) -> None:
        """Codes that no text has are given to new ones from now on."""
        held = set(self._given)
        self._free = [code for code in range(len(self._text_of) - 1, -1, -1) if code not in held]

    def code(self, text: str) -> int:
        """The text's code, a new one if need be."""
        code = self._code_of.get(text)
        return self._added(text) if code is None else code

    def _added(self, text: str) -> int:
        with self._lock:
            code = self._code_of.get(text)
            if code is None:
                code = self._free.pop() if self._free else len(self._text_of)
                if code == len(self._text_of):
                    self._text_of.append("")
                self._assign(text, code)
            return code

    def _assign(self, text: str, code: int) -> None:
        self._text_of[code] = text
        self._code_of[text] = code
        self._given.append(code)

    def texts(self, codes: Sequence[int]) -> list[str]:
        """The text of each code."""
        return [self._text_of[code] for code in codes]


class CodesBeside(TextCodes):
    """The codes of another table, which others extend meanwhile, and more of its own that the other never gives.

    A text that has a code here keeps it, whatever code the other table gives it later.
    """

    def __init__(self, other: TextCodes) -> None:
        super().__init__()
        self._other = other

    def __len__(self) -> int:
        return len(self._other) + len(self._given)

    def code(self, text: str) -> int:
        own = self._code_of.get(text)
        if own is None:
            there = self._other._code_of.get(text)
            if there is not None:
                return there
            own = self._added(text)
        return own + _BESIDE

    def texts(self, codes: Sequence[int]) -> list[str]:
        if not self._given:
            return self._other.texts(codes)
        own, other = self._text_of, self._other._text_of
        return [own[code - _BESIDE] if code >= _BESIDE else other[code] for code in codes]
