from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from models_ml import item_to_item
from models_ml.item_to_item import ItemToItem, ItemToItemConfig


def _one_reader(loaded, watched, clicked, next_day=()):
    """An export of one reader: what they watched before the log, then clicks a minute apart, the last ones in the test days."""
    notes = [*clicked, *next_day]
    minutes = np.arange(len(notes)) * 60_000_000
    request_us = (
        np.where(np.arange(len(notes)) < len(clicked), loaded.test_start_us - 3_600_000_000, loaded.test_start_us) + minutes
    )
    words = pa.table(
        {"impression_id": [f"i{place}" for place in range(len(notes))], "user_id": ["u"] * len(notes), "note_id": notes}
    )
    return replace(
        loaded,
        values_RF=np.zeros((len(notes), 0)),
        words=words,
        request_us_R=request_us,
        labels={"click": np.ones(len(notes), dtype=np.float32)},
        users=pa.table({"user_id": ["u"], "history_note_ids": [watched]}),
    )


def _scores(examples, **config):
    table = item_to_item.train(examples, ItemToItemConfig(**config))
    return {(row["note_id"], row["neighbour_id"]): row["score"] for row in table.to_pylist()}


def test_pairs_are_directed_decayed_and_limited_to_the_window(loaded):
    examples = _one_reader(loaded, watched=["a", "b"], clicked=["c", "d"])
    scores = _scores(examples, window=2, decay=0.5, normalise_from=0.0, normalise_to=0.0)
    assert scores == {("a", "b"): 1.0, ("a", "c"): 0.5, ("b", "c"): 1.0, ("b", "d"): 0.5, ("c", "d"): 1.0}


def test_scores_are_divided_by_support(loaded):
    # a b a c: (a, b) 1; (a, c) 1 from the second a and 0.25 from the first; support of a is 2, of c 1
    scores = _scores(_one_reader(loaded, ["a", "b"], ["a", "c"]), window=5, decay=0.5, normalise_from=0.5, normalise_to=1.0)
    assert scores["a", "c"] == pytest.approx(1.25 / 2**0.5)
    assert scores["b", "a"] == pytest.approx(1.0 / 2)


def test_clicks_of_the_test_days_are_not_read(loaded):
    with_future = _one_reader(loaded, ["a"], ["b"], next_day=["c"])
    assert _scores(with_future) == _scores(_one_reader(loaded, ["a"], ["b"]))


def test_answers_are_best_first_without_the_notes_asked_with():
    table = pa.table({"note_id": ["a", "a", "b", "b"], "neighbour_id": ["x", "b", "x", "y"], "score": [1.0, 9.0, 1.0, 1.5]})
    model = ItemToItem(table, seed_decay=0.5)
    assert model.neighbours(["a", "b"], 5) == [("x", 1.5), ("y", 1.5)]  # b is newer: x has 0.5 + 1; the tie goes by id
    assert model.neighbours(["b", "a"], 1) == [("x", 1.5)]
    assert model.neighbours(["unknown"], 5) == model.neighbours([], 5) == []


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_many_lists_are_those_of_a_dictionary(seed):
    rng = np.random.default_rng(seed)
    pairs = np.unique(rng.integers(0, 40, (300, 2)), axis=0)
    scores = rng.integers(1, 9, len(pairs)) / 8  # few values, so many ties
    names = {"note_id": [f"n{one:02d}" for one in pairs[:, 0]], "neighbour_id": [f"n{one:02d}" for one in pairs[:, 1]]}
    order = rng.permutation(len(pairs))  # a note's neighbours need not stand together
    model = ItemToItem(pa.table({**names, "score": scores}).take(order), seed_decay=0.5)
    asked = [f"n{one:02d}" for one in rng.integers(0, 45, rng.integers(1, 12))]
    totals, weight = {}, 1.0
    for seed_note in reversed(asked):
        for place in order:
            if names["note_id"][place] == seed_note and names["neighbour_id"][place] not in asked:
                note = names["neighbour_id"][place]
                totals[note] = totals.get(note, 0.0) + weight * scores[place]
        weight *= 0.5
    expected = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    assert model.neighbours(asked, 50) == expected
    assert model.neighbours(asked, 3) == expected[:3]


def test_a_saved_model_answers_the_same(loaded, tmp_path):
    config = ItemToItemConfig(window=3, seed_decay=0.7)
    table = item_to_item.train(loaded, config)
    for name, content in item_to_item.to_files(table, config).items():
        (tmp_path / name).write_bytes(content)
    model, again = ItemToItem(table, 0.7), item_to_item.load(tmp_path)
    assert model.neighbours(["n1", "n2"], 20) == again.neighbours(["n1", "n2"], 20)
    assert item_to_item.train(loaded, config).equals(table)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"decay and seed_decay must be in \(0, 1\], got 0.0"):
        ItemToItemConfig(decay=0.0)
    with pytest.raises(ValueError, match="window and neighbours must be at least 1, got 0"):
        ItemToItemConfig(window=0)
