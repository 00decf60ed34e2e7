import numpy as np
import pyarrow as pa
import pytest

from models_ml.tower_inputs import BINS, LIST_PLACES, NoteContent, ReaderInputs
from warehouse.errors import HeadraceError

NOTES = pa.table(
    {
        "note_id": ["n0", "n1", "n2"],
        "author_id": ["a", "a", "b"],
        "topics": pa.array([["music", "art"], [], None], pa.list_(pa.string())),
        "note_type": ["video", None, "photo"],
        "duration_ms": pa.array([1000, 3000, None], pa.int64()),
        "created_at": pa.array([0, 0, 0], pa.timestamp("us", "UTC")),
    }
)


def test_columns_become_words_of_one_vocabulary():
    content = NoteContent.of(NOTES, ("topics", "note_type"))
    assert (content.texts, content.lists) == ({"note_type": ["photo", "video"]}, {"topics": ["art", "music"]})
    # photo 1, video 2, art 3, music 4
    assert content.encode(NOTES).tolist() == [[2, 4, 3, 0, 0, 0], [0] * 6, [1] + [0] * 5]
    assert (len(content), content.places) == (4, 1 + LIST_PLACES)
    new = NOTES.slice(0, 1).set_column(2, "topics", pa.array([["new", *"abcdef", "art"]]))
    assert content.encode(new).tolist() == [
        [2, 0, 0, 0, 0, 0]
    ]  # a new word is no word, and what comes after the fifth is not read


def test_a_number_is_the_bin_that_it_falls_in():
    notes = pa.table({"length": pa.array([*range(160), None], pa.int64())})
    content = NoteContent.of(notes, ("length",))
    codes = content.encode(notes)[:, 0]
    assert np.bincount(codes).tolist() == [1] + [10] * BINS
    assert (np.diff(codes[:160]) >= 0).all()
    assert content.encode(pa.table({"length": [-5, 10_000]})).tolist() == [[1], [BINS]]
    assert len(NoteContent.of(pa.table({"length": pa.nulls(3, pa.int64())}), ("length",))) == 1


def test_what_is_no_content_is_refused_by_name():
    for name in ("created_at", "note_id", "colour"):
        with pytest.raises(
            HeadraceError, match=f"{name}' is no text, list or number of the notes: topics, note_type, duration_ms"
        ):
            NoteContent.of(NOTES, (name,))


def test_features_of_a_reader_are_chosen_by_name_or_pattern(loaded):
    assert ReaderInputs.of(loaded, ("user_num_*",)).features == ("user_num_views_7d", "user_num_clicks_7d")
    assert ReaderInputs.of(loaded, ("user_ctr_7d", "request_*")) == ReaderInputs(("user_ctr_7d",))
    assert len(ReaderInputs.of(loaded, ())) == 0
    with pytest.raises(HeadraceError, match="has no feature of readers note_ctr_7d; it has attributes, user_num_views_7d"):
        ReaderInputs.of(loaded, ("note_ctr_7d",))


def test_before_the_log_no_feature_is_known_but_attributes_are(loaded):
    reader = ReaderInputs.of(loaded, ("user_ctr_7d", "attributes"))
    before, at_rows = reader.of_users(loaded), reader.of_rows(loaded, np.arange(len(loaded)))
    assert np.isnan(before[:, 0]).all()
    user = loaded.users["user_id"].to_pylist().index(loaded.words["user_id"][7].as_py())
    assert before[user, 1:].tolist() == at_rows[7, 1:].tolist()
    assert at_rows[:, 1:].sum(1).tolist() == [1.0] * len(loaded)  # keen=true or keen=false
    np.testing.assert_array_equal(at_rows[:, 0], loaded.columns(("user_ctr_7d",))[:, 0].astype(np.float32))
