"""Geohashes and the notes around a place, against a plain search of all cells."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.nearby import ALPHABET, COARSEST, EARTH_KM, FINEST, Places, around, centre, encode

LATITUDES, LONGITUDES = st.floats(-90, 90), st.floats(-180, 180, exclude_max=True)
HASHES = st.text(ALPHABET, min_size=1, max_size=12)


def km(one: str, other: str) -> float:
    """Between the centres of two cells, by their chord."""
    points = []
    for geohash in (one, other):
        lat, lon = np.radians(centre(geohash)[:2])
        points.append(np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)]))
    return float(2 * EARTH_KM * np.arcsin(np.linalg.norm(points[0] - points[1]) / 2))


@pytest.mark.parametrize(
    ("latitude", "longitude", "geohash"),
    [(57.64911, 10.40744, "u4pruydqqvj"), (-25.382708, -49.265506, "6gkzwgjzn820"), (0, 0, "s")],
)
def test_published_examples(latitude, longitude, geohash):
    assert encode(latitude, longitude, len(geohash)) == geohash


@given(LATITUDES, LONGITUDES, st.integers(1, 12))
def test_a_point_lies_in_its_cell(latitude, longitude, length):
    north, east, half_height, half_width = centre(encode(latitude, longitude, length))
    assert abs(latitude - north) <= half_height * (1 + 1e-9)
    assert abs(longitude - east) <= half_width * (1 + 1e-9)


@given(HASHES)
def test_neighbours_touch_the_cell(geohash):
    latitude, longitude, half_height, half_width = centre(geohash)
    cells = around(geohash)
    assert cells[0] == geohash
    assert len(set(cells)) == len(cells)
    for cell in cells:
        north, east, _, _ = centre(cell)
        assert abs(north - latitude) <= 2.01 * half_height
        assert min(abs(east - longitude), 360 - abs(east - longitude)) <= 2.01 * half_width
    if abs(latitude) + 2 * half_height < 90 and half_width < 45:
        assert len(cells) == 9


def test_what_is_no_geohash_is_refused():
    with pytest.raises(ValueError, match="is no geohash"):
        centre("u4pa")


def drawn(count: int) -> list[str | None]:
    """Notes in a town and its country, some without a place or with nonsense for one."""
    rng = np.random.default_rng(3)
    spread = rng.choice([0.01, 0.3, 5.0], count)
    hashes = [encode(*(np.array([52.5, 13.4]) + rng.normal(0, one, 2)), int(rng.integers(5, 9))) for one in spread]
    return [(None, "", "aaa")[row % 3] if rng.random() < 0.1 else geohash for row, geohash in enumerate(hashes)]


@pytest.mark.parametrize("limit", [1, 5, 40, 1000])
def test_the_nearest_are_those_that_a_search_of_all_cells_finds(limit):
    hashes = drawn(400)
    eligible_N = np.random.default_rng(4).random(400) < 0.7
    here = encode(52.5, 13.4, 7)
    found = Places(hashes).nearest(here, eligible_N, limit)
    assert len(set(found.tolist())) == len(found)
    assert eligible_N[found].all()
    for length in range(FINEST, COARSEST - 1, -1):  # the smallest size around which there are enough
        cells = set(around(here[:length]))
        rows = [row for row, one in enumerate(hashes) if one and one[:length] in cells and eligible_N[row]]
        if len(rows) >= limit:
            break
    assert [km(here, hashes[row]) for row in found] == pytest.approx(sorted(km(here, hashes[row]) for row in rows)[:limit])


def test_without_places_nothing_is_near():
    places = Places([None, None])
    assert len(places) == 0
    assert len(places.nearest("u33d", np.ones(2, bool), 5)) == 0


def test_the_line_of_the_date_is_no_wall():
    places = Places([encode(-17.8, -179.9, 6), encode(-17.8, 178.0, 6)])
    assert places.nearest(encode(-17.8, 179.95, 6), np.ones(2, bool), 1).tolist() == [0]
