import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from models_ml import two_tower
from models_ml.evaluation import RetrievalQueries, mean_places, recall_at
from models_ml.notes import NoteWords
from models_ml.tower_inputs import NoteContent, ReaderInputs
from models_ml.two_tower import TwoTowerConfig, TwoTowerNetwork, TwoTowerObjective, mixed_softmax_loss

SMALL = TwoTowerConfig(
    width=16,
    history_length=10,
    epochs=4,
    batch_size=128,
    user_features=("user_*", "attributes"),
    note_features=("duration_ms", "note_type", "topics"),
)
BEFORE = dataclasses.replace(SMALL, user_features=(), note_features=(), epochs=1)


def _train(examples, seed=0, config=SMALL):
    return two_tower.train(examples, config, seed, lambda done, total: None)


@pytest.fixture(scope="module")
def model(loaded):
    return _train(loaded)


def test_the_loss_of_two_pairs_by_hand():
    # logits: 1 / 0.5 = 2 on the diagonal, 0 beside it; q = 1/2 for both shifts all alike
    eye, log_q = torch.eye(2), torch.full((2,), math.log(0.5))
    expected = math.log(1 + math.exp(-2))
    assert mixed_softmax_loss(eye, eye, torch.tensor([1, 2]), log_q, 0.5).item() == pytest.approx(expected)


def test_a_popular_note_is_a_lighter_negative():
    # the second note has q = 0.8: its logit as a negative is 0 - ln 0.8
    log_q = torch.tensor([0.2, 0.8]).log()
    expected = (math.log(1 + math.exp(-2) * 0.2 / 0.8) + math.log(1 + math.exp(-2) * 0.8 / 0.2)) / 2
    assert mixed_softmax_loss(torch.eye(2), torch.eye(2), torch.tensor([1, 2]), log_q, 0.5).item() == pytest.approx(expected)


def test_the_same_note_twice_is_not_its_own_negative():
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert mixed_softmax_loss(same, same, torch.tensor([3, 3]), torch.zeros(2), 1.0).item() == 0.0


def test_the_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="must share one size"):
        mixed_softmax_loss(torch.eye(2), torch.eye(2), torch.tensor([1]), torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        mixed_softmax_loss(torch.eye(2), torch.eye(2), torch.tensor([1, 2]), torch.zeros(2), 0.0)


def test_uniform_draws_are_negatives_and_count_by_the_chance_of_the_mixture(loaded):
    network = TwoTowerNetwork(SMALL, NoteWords.of(loaded), ReaderInputs(), NoteContent())
    num_notes = len(loaded.notes)
    chance_N = torch.rand(num_notes + 1)
    objective = TwoTowerObjective(network, chance_N.log(), 0.1, uniform_negatives=1000)
    item_C, log_q_C = objective._candidates(torch.tensor([1, 2, 2]))
    assert item_C[:3].tolist() == [1, 2, 2]
    assert item_C[3:].unique().numel() > 0.8 * num_notes
    assert item_C.min() > 0
    assert torch.allclose(log_q_C.exp(), (3 * chance_N[item_C] + 1000 / num_notes) / 1003, rtol=1e-4)
    assert objective.eval()._candidates(torch.tensor([1, 2]))[0].tolist() == [1, 2]
    # one reader, two candidates of which the second is a draw: logits 2 and 0, as by hand above
    loss = mixed_softmax_loss(torch.eye(2)[:1], torch.eye(2), torch.tensor([1, 2]), torch.full((2,), math.log(0.5)), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_the_same_seed_gives_the_same_weights(loaded, model):
    again, other = _train(loaded), _train(loaded, seed=1)
    assert again.to_files() == model.to_files()
    assert not np.array_equal(other.note_vectors, model.note_vectors)


def test_training_reads_nothing_of_the_test_days(other_future, model):
    assert _train(other_future).to_files() == model.to_files()


def test_vectors_are_unit_rows_in_the_order_of_the_ids(loaded, model):
    assert model.note_ids == loaded.notes["note_id"].to_pylist()
    assert model.note_vectors.shape == (120, 16)
    assert model.note_vectors.dtype == np.float32
    assert np.linalg.norm(model.note_vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(model.user_vector(["n1", "n2"])) == pytest.approx(1.0, abs=1e-5)


@pytest.fixture(scope="module")
def reads_histories_alone(loaded):
    return _train(loaded, config=BEFORE)


def test_of_an_empty_or_unknown_history_and_nothing_else_the_vector_is_zero(reads_histories_alone, model):
    for history in ([], ["never seen"]):
        assert reads_histories_alone.user_vector(history).tolist() == [0.0] * 16
    newcomer = model.user_vector([], np.zeros(3), '{"keen": "true"}')
    assert np.linalg.norm(newcomer) == pytest.approx(1.0, abs=1e-5)


def test_unknown_notes_of_a_history_are_skipped(model):
    assert np.array_equal(model.user_vector(["x", "n3", "y", "n4", "z"]), model.user_vector(["n3", "n4"]))


def test_one_readers_vector_is_that_of_a_batch(loaded, model):
    rows = np.append(loaded.train_rows[:20], loaded.test_rows[:20])
    histories = loaded.histories(model.note_ids, model.history_length)[rows]
    vectors = model.user_vectors(histories, model.reader.of_rows(loaded, rows))
    user_RF, attributes = loaded.columns(model.user_features), loaded.user_attributes()
    assert np.isnan(user_RF[rows]).any()
    for row, history_L, vector in zip(rows, histories, vectors, strict=True):
        history = [model.note_ids[code - 1] for code in history_L[::-1] if code]
        np.testing.assert_allclose(model.user_vector(history, user_RF[row], attributes[row]), vector, atol=1e-6)


def test_features_and_attributes_move_a_readers_vector(model):
    history, few, many = ["n1", "n2"], np.array([0.0, 0.0, np.nan]), np.array([90.0, 60.0, 0.7])
    assert model.user_features == ("user_num_views_7d", "user_num_clicks_7d", "user_ctr_7d")
    assert model.reader.attributes == ("keen=false", "keen=true")
    vectors = [model.user_vector(history, *known) for known in ((few,), (many,), (few, '{"keen": "true"}'), (None,))]
    assert all(abs(vectors[0] - other).max() > 1e-3 for other in vectors[1:])
    with pytest.raises(ValueError, match=r"user must hold 3 values, as user_features, got \(2,\)"):
        model.user_vector(history, few[:2])


def test_only_the_end_of_a_long_history_counts(model):
    history = [f"n{place}" for place in range(40)]
    assert np.array_equal(model.user_vector(history), model.user_vector(history[-10:]))


def test_a_note_the_model_never_saw_has_a_vector_near_notes_like_it(loaded, model):
    like = loaded.notes.slice(5, 1)
    new = like.set_column(0, "note_id", pa.array(["new"]))
    vector = model.vectors_of(new)[0]
    assert vector @ model.note_vectors[5] > np.median(model.note_vectors @ vector)
    np.testing.assert_array_equal(model.vectors_of(like)[0], model.note_vectors[5])
    longer = new.set_column(new.column_names.index("duration_ms"), "duration_ms", pa.array([60_000]))
    assert abs(model.vectors_of(longer)[0] - vector).max() > 1e-3
    other_author = new.set_column(1, "author_id", pa.array(["new author"]))
    assert model.vectors_of(other_author).any()
    nothing = pa.Table.from_pylist([{"note_id": "new"}], schema=loaded.notes.schema)
    assert model.vectors_of(nothing).tolist() == [[0.0] * 16]


def test_a_saved_model_gives_the_same_vectors(model, tmp_path):
    for name, content in model.to_files().items():
        (tmp_path / name).write_bytes(content)
    again = two_tower.load(tmp_path)
    assert again.note_ids == model.note_ids
    assert np.array_equal(again.note_vectors, model.note_vectors)
    known = ["n7", "n9"], np.array([5.0, 2.0, 0.4]), '{"keen": "true"}'
    assert np.array_equal(again.user_vector(*known), model.user_vector(*known))


def test_a_model_saved_before_there_were_features_still_loads(reads_histories_alone, tmp_path):
    for name, content in reads_histories_alone.to_files().items():
        (tmp_path / name).write_bytes(content)
    settings = json.loads((tmp_path / "model.json").read_text())
    for name in ("reader", "content"):
        del settings[name]
    for name in ("user_features", "note_features"):
        del settings["config"][name]
    (tmp_path / "model.json").write_text(json.dumps(settings))
    again = two_tower.load(tmp_path)
    assert again.user_features == ()
    history = ["n7", "n9"]
    assert np.array_equal(
        again.user_vector(history, np.zeros(0), '{"keen": "true"}'), reads_histories_alone.user_vector(history)
    )


def test_what_pairs_from_before_the_log_have_in_common_is_learned_apart(loaded):
    words, reader = NoteWords.of(loaded), ReaderInputs()
    pairs = two_tower.training_pairs(loaded, words.note_ids, SMALL, reader)
    num_clicks = int(loaded.labels["click"][loaded.train_rows].sum())
    assert 0 < (~pairs.is_before_B).sum() <= num_clicks  # clicks without a history are none
    assert 0 < pairs.is_before_B.sum() <= SMALL.pairs_per_reader * len(loaded.users)
    network, rows = TwoTowerNetwork(SMALL, words, reader, NoteContent()), two_tower.rows_of(pairs)
    network.notes.describe(loaded.notes, words)
    objective = TwoTowerObjective(network, torch.zeros(len(words.note_ids) + 1), 0.1)
    for is_before in (False, True):
        some = rows.take(np.flatnonzero(pairs.is_before_B == is_before)[:50])
        objective.zero_grad()
        objective(two_tower.tensors_of(some)).backward()
        assert bool(objective.before_D.grad.any()) is is_before


def test_it_finds_more_of_the_next_clicks_than_chance(loaded, model):
    queries = RetrievalQueries(loaded)
    # chance is 50 of at most 120 notes, a little more as the history is masked
    assert queries.two_tower(model)["recall@50"] > 50 / 105


def test_places_by_hand():
    scores = np.array([[5.0, 4.0, 4.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.0, 9.0, 0.0, 0.0]])
    history = np.array([[1, 0], [0, 0], [2, 0]])  # codes: the first query has seen note 0, the third its own target
    places = mean_places(scores, history, np.array([2, 3, 1]))
    assert places.tolist() == [0.5, 1.5, np.inf]
    assert recall_at(places, (1, 2)) == {"recall@1": pytest.approx(1 / 3), "recall@2": pytest.approx(2 / 3)}


def test_a_batch_among_many_notes_costs_its_own_notes_and_has_the_same_loss():
    words = NoteWords([f"n{number}" for number in range(500)], ["a", "b"], ["t"])
    config = TwoTowerConfig(width=8, history_length=4, id_dropout=0.0)
    network = TwoTowerNetwork(config, words, ReaderInputs(), NoteContent())
    with torch.no_grad():
        network.notes.note.weight[1:] = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        network.notes.author_of_note[1:] = 1 + torch.arange(500) % 2
    history = torch.tensor([[7, 400, 0, 0], [3, 7, 12, 0], [1, 2, 3, 4]])
    batch = {"history": history, "target": torch.tensor([400, 9, 7]), "is_before": torch.tensor([True, False, False])}
    batch["num_pairs"] = torch.tensor(3)
    table_CD, places_BL, place_B = network.table_of_batch(batch["history"], batch["target"])
    assert len(table_CD) == 9  # 0, 1, 2, 3, 4, 7, 9, 12, 400
    assert torch.equal(places_BL == 0, history == 0)
    torch.testing.assert_close(table_CD[places_BL], network.note_table()[history])
    torch.testing.assert_close(table_CD[place_B], network.note_table()[batch["target"]])
    objective = TwoTowerObjective(network, torch.zeros(501), 0.07)
    few = objective(batch)
    network.table_of_batch = lambda history_BL, item_B: (network.note_table(), history_BL, item_B)
    torch.testing.assert_close(few, objective(batch))
