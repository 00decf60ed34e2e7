import math

import numpy as np
import pytest
import torch

from models_ml import two_tower
from models_ml.evaluation import RetrievalQueries, mean_places, recall_at
from models_ml.notes import NoteWords
from models_ml.two_tower import TwoTowerConfig, TwoTowerNetwork, TwoTowerObjective, mixed_softmax_loss

SMALL = TwoTowerConfig(width=16, history_length=10, epochs=4, batch_size=128)


def _train(examples, seed=0):
    return two_tower.train(examples, SMALL, seed, lambda done, total: None)


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
    network = TwoTowerNetwork(SMALL, NoteWords.of(loaded))
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


def test_an_empty_or_unknown_history_is_a_zero_vector(model):
    assert model.user_vector([]).tolist() == [0.0] * 16
    assert model.user_vector(["never seen"]).tolist() == [0.0] * 16


def test_unknown_notes_of_a_history_are_skipped(model):
    assert np.array_equal(model.user_vector(["x", "n3", "y", "n4", "z"]), model.user_vector(["n3", "n4"]))


def test_one_readers_vector_is_that_of_a_batch(model):
    for length in (1, 3, 10):
        history_1L = torch.zeros(1, model.history_length, dtype=torch.int64)
        history_1L[0, :length] = torch.arange(length, 0, -1)  # codes, newest first
        history = model.note_ids[:length]
        np.testing.assert_allclose(model.user_vector(history), model.user_vectors(history_1L)[0], atol=1e-6)


def test_only_the_end_of_a_long_history_counts(model):
    history = [f"n{place}" for place in range(40)]
    assert np.array_equal(model.user_vector(history), model.user_vector(history[-10:]))


def test_a_note_the_model_never_saw_has_a_vector_near_its_authors_notes(loaded, model):
    author, topic = loaded.notes["author_id"][5].as_py(), loaded.notes["topics"][5].as_py()[0]
    vector = model.note_vector(author, topic)
    assert vector @ model.note_vectors[5] > np.median(model.note_vectors @ vector)
    assert model.note_vector(None, None).tolist() == [0.0] * 16
    assert model.note_vector("new author", topic).any()


def test_a_saved_model_gives_the_same_vectors(model, tmp_path):
    for name, content in model.to_files().items():
        (tmp_path / name).write_bytes(content)
    again = two_tower.load(tmp_path)
    assert again.note_ids == model.note_ids
    assert np.array_equal(again.note_vectors, model.note_vectors)
    assert np.array_equal(again.user_vector(["n7", "n9"]), model.user_vector(["n7", "n9"]))


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
    network = TwoTowerNetwork(config, words)
    with torch.no_grad():
        network.notes.note.weight[1:] = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        network.notes.author_of_note[1:] = 1 + torch.arange(500) % 2
    history = torch.tensor([[7, 400, 0, 0], [3, 7, 12, 0], [1, 2, 3, 4]])
    batch = {"history": history, "target": torch.tensor([400, 9, 7]), "num_pairs": torch.tensor(3)}
    table_CD, places_BL, place_B = network.table_of_batch(batch["history"], batch["target"])
    assert len(table_CD) == 9  # 0, 1, 2, 3, 4, 7, 9, 12, 400
    assert torch.equal(places_BL == 0, history == 0)
    torch.testing.assert_close(table_CD[places_BL], network.note_table()[history])
    torch.testing.assert_close(table_CD[place_B], network.note_table()[batch["target"]])
    objective = TwoTowerObjective(network, torch.zeros(501), 0.07)
    few = objective(batch)
    network.table_of_batch = lambda history_BL, item_B: (network.note_table(), history_BL, item_B)
    torch.testing.assert_close(few, objective(batch))
