"""What the two towers read beside ids and histories: numbers and attributes of a reader, and what a note is from its first
instant on, so that one without a single event has a vector.

R rows, F features and A attributes of a reader; N notes, P places for what is known of a note.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models_ml.attributes import AttributeInputs
from models_ml.examples import Examples, distinct, encode
from warehouse.errors import HeadraceError

ATTRIBUTES = "attributes"
"""Among the names of a reader's features: the JSON of `lake.users.attributes`."""
LIST_PLACES = 5
"""Of a list (the topics), the first words count."""
BINS = 16


@dataclass(frozen=True)
class ReaderInputs:
    """features: names, in order. attributes: `key=value` of each column. Saved with a model."""

    features: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    @staticmethod
    def of(examples: Examples, names: Sequence[str]) -> "ReaderInputs":
        """names: features of the reader, patterns such as `user_*`, or `attributes`. Raises HeadraceError for a name, not a
        pattern, that the export lacks."""
        chosen = [name for name in examples.user_features if any(fnmatchcase(name, pattern) for pattern in names)]
        if missing := [name for name in names if name not in (*chosen, ATTRIBUTES) and not set("*?[") & set(name)]:
            raise HeadraceError(
                f"two_tower.user_features: the export has no feature of readers {', '.join(missing)}; it has "
                f"{', '.join((ATTRIBUTES, *examples.user_features))}"
            )
        words = AttributeInputs.of(examples.users["attributes"].to_pylist()).words if ATTRIBUTES in names else []
        return ReaderInputs(tuple(chosen), tuple(words))

    def __len__(self) -> int:
        return len(self.features) + len(self.attributes)

    def of_rows(self, examples: Examples, rows: np.ndarray) -> np.ndarray:
        """float32 [R, F + A]: raw values, NaN for NULL, then 0 and 1 for the attributes."""
        texts, text_R = np.unique([text or "" for text in examples.user_attributes()], return_inverse=True)
        attributes_SA = AttributeInputs(self.attributes).encode([str(text) for text in texts])
        return np.hstack([examples.columns(self.features)[rows].astype(np.float32), attributes_SA[text_R[rows]]])

    def of_users(self, examples: Examples) -> np.ndarray:
        """float32 [users, F + A], before the log: no feature is known (NaN)."""
        attributes_UA = AttributeInputs(self.attributes).encode(examples.users["attributes"].to_pylist())
        return np.hstack([np.full((len(attributes_UA), len(self.features)), np.nan, np.float32), attributes_UA])


@dataclass(frozen=True)
class NoteContent:
    """Columns of the dimension of notes as words of one vocabulary, by name: the words of a text or of lists, and the inner
    bounds of a number's bins, which hold about as many notes each. Saved with a model."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def of(notes: pa.Table, names: Sequence[str]) -> "NoteContent":
        """Raises HeadraceError for a column that is not there, or is neither text, a list of texts nor a number."""
        kinds = {field.name: _kind_of(field.type) for field in notes.schema if field.name not in ("note_id", "author_id")}
        content = NoteContent()
        for name in sorted(set(names)):  # the order in which JSON keeps them
            match kinds.get(name):
                case "text":
                    content.texts[name] = distinct(notes[name])
                case "list":
                    content.lists[name] = distinct(pc.list_flatten(notes[name]))
                case "number":
                    known = notes[name].drop_null().cast(pa.float64()).to_numpy()
                    content.numbers[name] = (
                        np.unique(np.quantile(known, np.arange(1, BINS) / BINS)).tolist() if len(known) else []
                    )
                case _:
                    usable = ", ".join(name for name, kind in kinds.items() if kind)
                    raise HeadraceError(f"two_tower.note_features: {name!r} is no text, list or number of the notes: {usable}")
        return content

    def __len__(self) -> int:
        """Words in all."""
        words = sum(len(words) for words in (*self.texts.values(), *self.lists.values()))
        return words + sum(len(bounds) + 1 for bounds in self.numbers.values())

    @property
    def places(self) -> int:
        """P."""
        return len(self.texts) + LIST_PLACES * len(self.lists) + len(self.numbers)

    def encode(self, notes: pa.Table) -> np.ndarray:
        """int64 [N, P]: codes from 1 to the number of words, 0 for what is NULL or new."""
        parts = [(encode(notes[name], words)[:, None], len(words)) for name, words in self.texts.items()]
        parts += [(_first_of(notes[name], words), len(words)) for name, words in self.lists.items()]
        for name, bounds in self.numbers.items():
            values = notes[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
            bins = np.where(np.isnan(values), 0, 1 + np.searchsorted(np.array(bounds), values, side="right"))
            parts.append((bins[:, None], len(bounds) + 1))
        codes_NP, start = np.zeros((len(notes), self.places), dtype=np.int64), 0
        place = 0
        for codes, num_words in parts:
            codes_NP[:, place : place + codes.shape[1]] = np.where(codes > 0, codes + start, 0)
            place, start = place + codes.shape[1], start + num_words
        return codes_NP


def _first_of(lists: pa.ChunkedArray, words: Sequence[str]) -> np.ndarray:
    """int64 [N, LIST_PLACES]: codes of the first words of each list."""
    whole = lists.combine_chunks()
    note, codes = pc.list_parent_indices(whole).to_numpy(), encode(pc.list_flatten(whole), words)
    place = np.arange(len(note)) - np.searchsorted(note, note)
    codes_NP = np.zeros((len(lists), LIST_PLACES), dtype=np.int64)
    is_kept = place < LIST_PLACES
    codes_NP[note[is_kept], place[is_kept]] = codes[is_kept]
    return codes_NP


def _kind_of(kind: pa.DataType) -> str | None:
    if pa.types.is_string(kind):
        return "text"
    if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
        return "list"
    return "number" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else None
