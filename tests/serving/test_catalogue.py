import numpy as np
import pyarrow as pa

from serving.catalogue import Catalogue
from warehouse.landing import NOTES_SCHEMA
from warehouse.time_algebra import HOUR_US, MINUTE_US

NOON = 1_651_752_000_000_000  # 2022-05-05T12:00:00Z


def of(*rows):
    return Catalogue.from_tables(pa.Table.from_pylist(list(rows), schema=NOTES_SCHEMA.with_metadata(None)), {})


def test_request_features_of_a_note_are_null_until_it_exists():
    notes = of(
        {"note_id": "later", "created_at": NOON + 1, "duration_ms": 5},
        {"note_id": "old", "author_id": "a1", "created_at": NOON - HOUR_US, "duration_ms": 1000},
        {"note_id": "timeless", "author_id": "a1", "duration_ms": 7},
    )
    rows = notes.rows(["old", "later", "timeless", "unheard-of"])
    assert rows.tolist() == [1, 0, 2, -1]
    values = notes.request_features(rows, NOON)
    assert values[0].tolist() == [1000.0, HOUR_US / MINUTE_US]
    assert np.isnan(values[1:]).all()
    assert notes.author_rows(rows).tolist() == [0, -1, 0, -1]


def test_a_catalogue_without_notes_knows_none():
    notes = of()
    assert notes.author_rows(notes.rows(["n1"])).tolist() == [-1]
    assert np.isnan(notes.request_features(notes.rows(["n1"]), NOON)).all()
