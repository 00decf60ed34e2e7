"""Sequence files of the literature as arrays.

Two forms, plain or gzipped, told apart by their lines: `user item item …`, one line a user, oldest first; or `user item`, one
line an interaction, oldest first within a user. A folder may hold one such file, or MovieLens' `u.data` (user, item, rating,
seconds), which is put in order of its times; equal times keep the order of the file.
U users, I items, P interactions.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from warehouse.errors import HeadraceError

_SUFFIXES = (".txt", ".txt.gz")


@dataclass(frozen=True)
class Sequences:
    """Every user's items, oldest first, one after the other.

    items_P: int64 codes 0 … num_items - 1. starts_U1: int64 [U + 1], user u has items_P[starts_U1[u] : starts_U1[u + 1]].
    item_names, by code, and users are in order of first appearance.
    """

    name: str
    items_P: np.ndarray
    starts_U1: np.ndarray
    item_names: tuple[str, ...]

    @property
    def num_users(self) -> int:
        return len(self.starts_U1) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_names)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts_U1)

    def of(self, user: int) -> np.ndarray:
        return self.items_P[self.starts_U1[user] : self.starts_U1[user + 1]]

    def cut(self, lengths_U: np.ndarray) -> "Sequences":
        """The same users and codes with the first lengths_U[u] items of each."""
        place_P = np.arange(len(self.items_P)) - np.repeat(self.starts_U1[:-1], self.lengths)
        keep_P = place_P < np.repeat(lengths_U, self.lengths)
        return Sequences(self.name, self.items_P[keep_P], np.concatenate([[0], np.cumsum(lengths_U)]), self.item_names)


def read(path: Path, name: str | None = None) -> Sequences:
    """path: a sequence file, or a folder with one. Raises HeadraceError, with the line, for what is neither form."""
    path = Path(path)
    if path.is_dir():
        for file in (path / "u.data", path / "u.data.gz"):
            if file.is_file():
                return _coded(name or path.name, _ratings(file), file)
        files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES) and "license" not in file.name.lower())
        if len(files) != 1:
            held = ", ".join(file.name for file in files) or "none"
            raise HeadraceError(f"{path}: a folder must hold one sequence file (*.txt or *.txt.gz) or u.data, it has {held}")
        path = files[0]
    if not path.is_file():
        raise HeadraceError(f"{path}: there is no such sequence file; one has lines of `user item item …` or `user item`")
    return _coded(name or path.name.removesuffix(".gz").removesuffix(".txt"), _sequences(path), path)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Numbered from 1, cut at blanks."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.split()
    except UnicodeDecodeError as error:
        raise HeadraceError(
            f"{path}:{number + 1}: not UTF-8 text ({error.reason}); a plain gzipped file ends in .gz"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise HeadraceError(f"{path}:{number + 1}: the gzip file is broken or cut short ({error})") from error
    except OSError as error:
        raise HeadraceError(f"{path}: cannot be read ({error})") from error


def _sequences(path: Path) -> dict[str, list[str]]:
    words_of_lines = list(_lines(path))
    for number, words in words_of_lines:
        if len(words) < 2:
            wrong = f"{' '.join(words)!r}" if words else "an empty line"
            raise HeadraceError(f"{path}:{number}: expected `user item item …` or `user item`, got {wrong}")
    is_pairs = all(len(words) == 2 for _, words in words_of_lines)
    first_line: dict[str, int] = {}
    sequences: dict[str, list[str]] = {}
    for number, (user, *items) in words_of_lines:
        if is_pairs:
            sequences.setdefault(user, []).extend(items)
            continue
        if user in sequences:
            raise HeadraceError(
                f"{path}:{number}: user {user} already has a sequence, on line {first_line[user]}; a file of "
                "`user item item …` has one line a user, a file of `user item` exactly two words on every line"
            )
        first_line[user], sequences[user] = number, items
    return sequences


def _ratings(path: Path) -> dict[str, list[str]]:
    rows: list[tuple[int, str, str]] = []
    for number, words in _lines(path):
        if len(words) != 4 or not words[3].lstrip("-").isdigit():
            raise HeadraceError(f"{path}:{number}: expected user, item, rating and whole seconds, got {' '.join(words)!r}")
        rows.append((int(words[3]), words[0], words[1]))
    sequences: dict[str, list[str]] = {}
    for _, user, item in sorted(rows, key=lambda row: row[0]):
        sequences.setdefault(user, []).append(item)
    return sequences


def _coded(name: str, sequences: dict[str, list[str]], path: Path) -> Sequences:
    if not any(len(items) >= 3 for items in sequences.values()):
        raise HeadraceError(f"{path}: no user has three items (one to learn from, one to choose by, one to test)")
    code_of: dict[str, int] = {}
    codes = [code_of.setdefault(item, len(code_of)) for item in _chained(sequences.values())]
    lengths = [len(items) for items in sequences.values()]
    return Sequences(
        name, np.array(codes, dtype=np.int64), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), tuple(code_of)
    )


def _chained(parts: Iterable[list[str]]) -> Iterator[str]:
    for part in parts:
        yield from part
