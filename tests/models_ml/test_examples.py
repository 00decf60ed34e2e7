import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models_ml import examples
from tests.models_ml.synthetic import write_export
from warehouse.errors import HeadraceError


def test_the_split_is_by_time_and_loses_no_row(loaded):
    train_rows, test_rows = loaded.train_rows, loaded.test_rows
    assert len(train_rows) + len(test_rows) == len(loaded) == 4000
    assert loaded.request_us_R[train_rows].max() < loaded.test_start_us <= loaded.request_us_R[test_rows].min()


def test_features_are_split_into_the_readers_and_the_candidates(loaded):
    assert loaded.user_features == ("user_num_views_7d", "user_num_clicks_7d", "user_ctr_7d")
    assert "user_author_ctr_7d" in loaded.note_features
    assert {"note_duration_ms", "note_age_min"} <= set(loaded.note_features)
    assert len(loaded.user_features) + len(loaded.note_features) == len(loaded.feature_names)
    assert not any(name.startswith("label") or name.endswith("_id") for name in loaded.feature_names)


def test_a_column_that_is_no_double_is_no_feature(tmp_path):
    write_export(tmp_path, num_rows=200)
    table = pq.read_table(tmp_path / "examples.parquet")
    table = table.append_column("labels_known_at", table["request_ts"])
    pq.write_table(table, tmp_path / "examples.parquet")
    assert "labels_known_at" not in examples.load(tmp_path).feature_names


def test_a_history_is_newest_first_clicks_before_what_was_watched(loaded):
    note_ids = loaded.notes["note_id"].to_pylist()
    history_RL = loaded.histories(note_ids, 8)
    watched = dict(zip(loaded.users["user_id"].to_pylist(), loaded.users["history_note_ids"].to_pylist(), strict=True))
    clicks = loaded.clicks_R.to_pylist()
    for row in (0, 17, 1500, 3999):
        expected = (watched[loaded.words["user_id"][row].as_py()] + clicks[row])[::-1][:8]
        found = [note_ids[code - 1] for code in history_RL[row] if code]
        assert found == expected


def test_a_history_holds_only_clicks_of_earlier_requests(loaded):
    users = np.array(loaded.words["user_id"].to_pylist())
    notes = np.array(loaded.words["note_id"].to_pylist())
    clicks = loaded.clicks_R.to_pylist()
    for row in range(0, len(loaded), 97):
        earlier = (users[:row] == users[row]) & (loaded.labels["click"][:row] == 1)
        assert clicks[row] == notes[:row][earlier].tolist()[-50:]


def test_unknown_words_have_code_zero():
    assert examples.encode(pa.array(["b", None, "x", "a"]), ["a", "b"]).tolist() == [2, 0, 0, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "run `headrace export-training` first"),
        (lambda folder: (folder / "notes.parquet").write_bytes(b"no"), r"notes\.parquet cannot be read as Parquet"),
        (lambda folder: _change_manifest(folder, num_rows=3), "holds 300 rows, its manifest says 3"),
        (lambda folder: _change_manifest(folder, test_start="2099-01-01T00:00:00Z"), "no rows at or after"),
        (lambda folder: _change_manifest(folder, test_start="2022-05-03"), "an instant with a zone"),
        (lambda folder: _drop_column(folder, "label_click"), "lacks the column.* label_click"),
        (
            lambda folder: _change_manifest(folder, files={"users.parquet": "0" * 64}),
            r"users\.parquet has changed: its SHA-256 is .*; run `headrace export-training` again",
        ),
    ],
)
def test_a_damaged_export_is_refused_in_words(tmp_path, damage, message):
    write_export(tmp_path, num_rows=300)
    damage(tmp_path)
    with pytest.raises(HeadraceError, match=message):
        examples.load(tmp_path)


def test_the_same_data_from_another_lake_has_the_same_fingerprint_and_other_data_another(tmp_path):
    write_export(tmp_path, num_rows=300)
    here = examples.load(tmp_path).fingerprint()
    _change_manifest(tmp_path, snapshots={"training.training_examples": 17})
    assert examples.load(tmp_path).fingerprint() == here
    _change_manifest(tmp_path, files={"users.parquet": hashlib.sha256((tmp_path / "users.parquet").read_bytes()).hexdigest()})
    assert examples.load(tmp_path).fingerprint() != here


def _change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop_column(folder, name):
    path = folder / "examples.parquet"
    pq.write_table(pq.read_table(path).drop_columns([name]), path)
