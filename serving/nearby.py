"""Places as geohashes: which notes lie nearest to a request.

A geohash (Niemeyer, 2008) names a cell of the globe; cells of one prefix are one range of the sorted hashes, so a cell and its
eight neighbours are nine binary searches. A place is never known more finely than the caller gave it. Distances are between the
centres of cells, on a sphere.
"""

from collections.abc import Iterator, Sequence

import numpy as np

ALPHABET = "0123456789bcdefghjkmnpqrstuvwxyz"
PATTERN = rf"^[{ALPHABET}]{{1,12}}$"
EARTH_KM = 6371.0088
FINEST, COARSEST = 6, 2
"""Characters of the cells that are looked through, one after the other until there is enough: 1.2 km to 1,250 km wide."""
_VALUE = {letter: value for value, letter in enumerate(ALPHABET)}


def centre(geohash: str) -> tuple[float, float, float, float]:
    """Latitude and longitude of the cell's centre, and half its height and width, degrees. Raises ValueError for what is no
    geohash."""
    halves = {"lat": (0.0, 90.0), "lon": (0.0, 180.0)}
    axis, other = "lon", "lat"
    for letter in geohash:
        if letter not in _VALUE:
            raise ValueError(f"{geohash[:20]!r} is no geohash: letters are {ALPHABET}")
        for bit in range(4, -1, -1):
            middle, half = halves[axis]
            halves[axis] = (middle + (half / 2 if _VALUE[letter] >> bit & 1 else -half / 2), half / 2)
            axis, other = other, axis
    return halves["lat"][0], halves["lon"][0], halves["lat"][1], halves["lon"][1]


def encode(latitude: float, longitude: float, length: int) -> str:
    """The geohash of that many characters whose cell holds the point, degrees."""
    middle, half = {"lat": 0.0, "lon": 0.0}, {"lat": 90.0, "lon": 180.0}
    point = {"lat": latitude, "lon": longitude}
    letters = []
    axis, other = "lon", "lat"
    for _ in range(length):
        value = 0
        for _ in range(5):
            upper = point[axis] >= middle[axis]
            half[axis] /= 2
            middle[axis] += half[axis] if upper else -half[axis]
            value = value << 1 | upper
            axis, other = other, axis
        letters.append(ALPHABET[value])
    return "".join(letters)


def around(geohash: str) -> list[str]:
    """The cell and its neighbours, each once: nine, but for cells at a pole. East of 180° comes 180° west."""
    latitude, longitude, half_height, half_width = centre(geohash)
    cells = []
    for north in (0, 1, -1):
        at = latitude + 2 * north * half_height
        if abs(at) < 90:
            for east in (0, 1, -1):
                cells.append(encode(at, (longitude + 2 * east * half_width + 180) % 360 - 180, len(geohash)))
    return list(dict.fromkeys(cells))


class Places:
    """Where notes are. geohashes: one per note, None for a note without a place; what is no geohash counts as none."""

    def __init__(self, geohashes: Sequence[str | None]):
        found = [(row, place) for row, geohash in enumerate(geohashes) for place in _placed(geohash)]
        rows = np.array([row for row, _ in found], np.int64)
        hashes = np.array([geohashes[row] for row in rows], dtype="S12")
        order = np.argsort(hashes, kind="stable")
        self._rows, self._hashes = rows[order], hashes[order]
        self._radians = np.radians(np.array([place for _, place in found], np.float64).reshape(-1, 2)[order])

    def __len__(self) -> int:
        return len(self._rows)

    def nearest(self, geohash: str, eligible_N: np.ndarray, limit: int) -> np.ndarray:
        """Rows of the eligible notes around a place, nearest first, ties by row; at most `limit`. They are those of a cell and
        its neighbours, of the smallest size at which there are enough, else of the largest."""
        latitude, longitude, _, _ = centre(geohash)
        places = np.empty(0, np.int64)
        for length in range(min(FINEST, len(geohash)), min(COARSEST, len(geohash)) - 1, -1):
            ranges = [np.arange(*self._range(cell)) for cell in around(geohash[:length])]
            places = np.concatenate(ranges)
            places = places[eligible_N[self._rows[places]]]
            if len(places) >= limit:
                break
        km = _km(np.radians([latitude, longitude]), self._radians[places])
        rows = self._rows[places]
        return rows[np.lexsort((rows, km))][:limit]

    def _range(self, cell: str) -> tuple[int, int]:
        start, end = np.searchsorted(self._hashes, [cell.encode(), f"{cell}~".encode()])
        return int(start), int(end)


def _placed(geohash: str | None) -> Iterator[tuple[float, float]]:
    """The centre of a geohash; nothing for what is none."""
    if geohash:
        try:
            yield centre(geohash[:12])[:2]
        except ValueError:
            return


def _km(here: np.ndarray, there_P: np.ndarray) -> np.ndarray:
    """Great-circle distances by the haversine formula; radians [2] and [P, 2] as latitude, longitude."""
    half = (there_P - here) / 2
    chord = np.sin(half[:, 0]) ** 2 + np.cos(here[0]) * np.cos(there_P[:, 0]) * np.sin(half[:, 1]) ** 2
    return 2 * EARTH_KM * np.arcsin(np.sqrt(np.clip(chord, 0, 1)))
