"""L1 and L2: what holds for both, then what only L2 has."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from models_ml import l1, l2, metrics
from models_ml.l1 import L1Config
from models_ml.l2_network import L2Config
from models_ml.scoring import Given, RankingRequest
from warehouse.errors import HeadraceError

SMALL_L1 = L1Config(hidden=16, epochs=10, batch_size=256)
SMALL_L2 = L2Config(history_length=10, width=8, hidden=32, members=2, bins=4, epochs=3, batch_size=256)
HISTORY = ["n1", "n5", "n9"]


def _train(name, examples, seed=0):
    room, config = {"l1": (l1, SMALL_L1), "l2": (l2, SMALL_L2)}[name]
    return room.train(examples, config, seed, lambda done, total: None)


@pytest.fixture(scope="module")
def models(loaded):
    return {name: _train(name, loaded) for name in ("l1", "l2")}


@pytest.fixture(params=["l1", "l2"])
def name(request):
    return request.param


def _score(model, user, notes, note_ids=None, history=HISTORY, **request):
    """float32 [N, heads]."""
    if isinstance(model, l1.L1):
        return model.score(user, notes, surface=request.get("surface"))[:, None]
    note_ids = note_ids if note_ids is not None else [f"n{place % 120}" for place in range(len(notes))]
    scores = model.score(user, history, note_ids, notes, **request)
    return np.column_stack([scores[head] for head in model.heads])


def _request(loaded, num_notes=40, row=3000):
    """One reader's features and those of `num_notes` other rows' notes."""
    rows = np.arange(row, row + num_notes)
    return loaded.columns(loaded.user_features)[row], loaded.columns(loaded.note_features)[rows]


def test_the_same_seed_gives_the_same_weights(name, loaded, models):
    assert _train(name, loaded).to_files() == models[name].to_files()
    assert _train(name, loaded, seed=1).to_files() != models[name].to_files()


def test_training_reads_nothing_of_the_test_days(name, other_future, models):
    assert _train(name, other_future).to_files() == models[name].to_files()


def test_it_ranks_the_test_days_better_than_chance(name, loaded, models):
    predictions = models[name].score_rows(loaded, loaded.test_rows)
    for head in ("click", "long_view"):
        assert metrics.auc(loaded.labels[head][loaded.test_rows], predictions[head]) > 0.6


def test_a_score_does_not_depend_on_the_other_candidates(name, loaded, models):
    user, notes = _request(loaded)
    together = _score(models[name], user, notes)
    alone = np.concatenate([_score(models[name], user, notes[[place]], [f"n{place}"]) for place in range(len(notes))])
    assert np.abs(together - alone).max() <= 2e-6
    others = notes.copy()
    others[1:] = 1e9
    assert np.abs(_score(models[name], user, others)[0] - together[0]).max() <= 2e-6


def test_a_request_scores_its_rows_as_evaluation_does(name, loaded, models):
    row = 3500
    user, notes = loaded.columns(loaded.user_features)[row], loaded.columns(loaded.note_features)[[row]]
    watched = dict(zip(loaded.users["user_id"].to_pylist(), loaded.users["history_note_ids"].to_pylist(), strict=True))
    history = watched[loaded.words["user_id"][row].as_py()] + loaded.clicks_R[row].as_py()
    surface, attributes = loaded.words["surface"][row].as_py(), loaded.user_attributes()[row]
    note_ids = [loaded.words["note_id"][row].as_py()]
    evaluated = models[name].score_rows(loaded, np.array([row]))
    if name == "l1":
        expected = (evaluated["click"] + evaluated["long_view"]) / 2
        assert models[name].score(user, notes, surface=surface) == pytest.approx(expected, abs=2e-6)
    else:
        served = models[name].score(user, history, note_ids, notes, surface=surface, user_attributes=attributes)
        for head in models[name].heads:
            assert served[head] == pytest.approx(evaluated[head], abs=2e-6)


def test_a_saved_model_scores_the_same(name, loaded, models, tmp_path):
    for file_name, content in models[name].to_files().items():
        (tmp_path / file_name).write_bytes(content)
    again = {"l1": l1, "l2": l2}[name].load(tmp_path)
    user, notes = _request(loaded)
    assert np.array_equal(_score(again, user, notes), _score(models[name], user, notes))
    assert (again.user_features, again.note_features) == (models[name].user_features, models[name].note_features)


def test_null_features_give_a_probability(name, loaded, models):
    user, notes = _request(loaded, num_notes=5)
    scores = _score(models[name], np.full_like(user, np.nan), np.full_like(notes, np.nan))
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert ((scores > 0) & (scores < 1)).all()


def test_no_candidates_give_no_scores(name, loaded, models):
    user, notes = _request(loaded, num_notes=0)
    assert _score(models[name], user, notes).shape[0] == 0


def test_an_unknown_surface_counts_as_the_usual_one(name, loaded, models):
    user, notes = _request(loaded)
    usual = _score(models[name], user, notes, surface="tab_1")
    assert np.array_equal(_score(models[name], user, notes), usual)
    assert np.array_equal(_score(models[name], user, notes, surface="never seen"), usual)
    assert not np.array_equal(_score(models[name], user, notes, surface="tab_0"), usual)


def test_values_of_the_wrong_shape_are_refused(name, loaded, models):
    user, notes = _request(loaded)
    with pytest.raises(ValueError, match=rf"{name} takes user \[3\] and notes \[N, 11\], got \(2,\)"):
        _score(models[name], user[:2], notes)


def test_threads_get_the_scores_that_one_thread_gets(name, loaded, models):
    requests = [_request(loaded, row=row) for row in range(3000, 3040, 4)]
    alone = [_score(models[name], user, notes) for user, notes in requests]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda request: _score(models[name], *request), requests * 3))
    for place, scores in enumerate(together):
        assert np.array_equal(scores, alone[place % len(alone)])


def test_the_fused_score_of_l1_is_that_of_the_network_that_was_trained(loaded, models):
    user, notes = _request(loaded)
    model = models["l1"]
    surface = torch.tensor([model.code_of_surface("tab_0")])
    with torch.inference_mode():
        logits_1NT = model.network(torch.from_numpy(user)[None], surface, torch.from_numpy(notes)[None])
    expected = torch.sigmoid(logits_1NT[0]) @ model.weights_T
    assert np.abs(model.score(user, notes, surface="tab_0") - expected.numpy()).max() <= 1e-6


@pytest.mark.parametrize("history", [[], ["never seen"], HISTORY, ["n3", "never seen", "n3", "n7"] * 5])
def test_a_request_to_l2_gets_what_the_network_that_was_trained_says(history, loaded, models):
    user, notes = _request(loaded)
    user[:2], notes[3:5], notes[6] = np.nan, np.nan, 1e9
    model, note_ids = models["l2"], [f"n{place * 7}" for place in range(len(notes))]
    codes = {note_id: row + 1 for row, note_id in enumerate(model.shape.words.note_ids)}
    attributes = loaded.user_attributes()[0]
    newest = [codes.get(note_id, 0) for note_id in history[-model.history_length :]][::-1]
    history_1L = torch.tensor([newest + [0] * (model.history_length - len(newest))])
    with torch.inference_mode():
        reader = model.network.read(
            torch.from_numpy(user.astype(np.float32))[None], torch.tensor([model.code_of_surface("tab_0")]),
            torch.from_numpy(model.encoded_attributes(attributes))[None], history_1L, model.table_ND,
        )  # fmt: skip
        note_1N = torch.tensor([[codes.get(note_id, 0) for note_id in note_ids]])
        logits_KNT = model.network.logits(reader, note_1N, torch.from_numpy(notes.astype(np.float32))[None], model.table_ND)[
            :, 0
        ]
    expected_NT = torch.sigmoid(logits_KNT).mean(0).numpy()
    served = _score(model, user, notes, note_ids, history, surface="tab_0", user_attributes=attributes)
    assert np.abs(served - expected_NT).max() <= 1e-6


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_fused_history_of_l2_is_that_of_the_network_that_was_trained(layers, loaded):
    config = replace(SMALL_L2, layers=layers, epochs=1)
    model = l2.train(loaded, config, 0, lambda done, total: None)
    inputs = l2.inputs_of(loaded, model.shape, config.history_length)
    inputs.history_RL[::2, ::3] = 0  # unknown notes leave holes
    inputs.history_RL[::5] = 0
    rows = torch.arange(400)
    network = copy.deepcopy(model.network)
    network.config = replace(config, dropout=0.0, id_dropout=0.0, attribute_dropout=0.0)
    with torch.inference_mode():
        logits = [l2._logits_of_rows(network.train(training), inputs, rows, model.table_ND) for training in (True, False)]
    assert not torch.equal(*logits) or layers == 0
    assert (torch.sigmoid(logits[0]) - torch.sigmoid(logits[1])).abs().max() <= 1e-5


def test_l2_takes_an_empty_history_and_unknown_notes(loaded, models):
    user, notes = _request(loaded, num_notes=3)
    for history in ([], ["unknown"], ["unknown"] * 200):
        assert np.isfinite(_score(models["l2"], user, notes, ["n1", "unknown", "n2"], history)).all()


def test_l2_reads_the_end_of_the_history_and_its_order(loaded, models):
    user, notes = _request(loaded)
    long = [f"n{place}" for place in range(60)]
    assert np.array_equal(
        _score(models["l2"], user, notes, history=long), _score(models["l2"], user, notes, history=long[-10:])
    )
    assert not np.array_equal(
        _score(models["l2"], user, notes, history=long[:5]), _score(models["l2"], user, notes, history=long[4::-1])
    )


def test_l2_reads_the_readers_attributes(loaded, models):
    user, notes = _request(loaded)
    keen = _score(models["l2"], user, notes, user_attributes='{"keen": "true"}')
    assert keen.mean() > _score(models["l2"], user, notes, user_attributes='{"keen": "false"}').mean()


def test_another_head_is_a_matter_of_configuration(loaded):
    config = L2Config(heads=("long_view",), history_length=5, width=8, hidden=16, members=1, layers=0, bins=0, epochs=1)
    model = l2.train(loaded, config, 0, lambda done, total: None)
    assert list(model.score_rows(loaded, loaded.test_rows)) == ["long_view"]
    with pytest.raises(HeadraceError, match=r"no label for the head\(s\) like; it has click, long_view"):
        l2.train(loaded, L2Config(heads=("click", "like")), 0, lambda done, total: None)
    with pytest.raises(HeadraceError, match=r"history_length must be at most 100, what request rows hold; got 200"):
        l2.train(loaded, L2Config(history_length=200), 0, lambda done, total: None)


def test_l2_refuses_ids_that_do_not_match_their_features(loaded, models):
    user, notes = _request(loaded, num_notes=2)
    with pytest.raises(ValueError, match="one row per candidate, got 1 and 2"):
        models["l2"].score(user, [], ["n1"], notes)


def test_l2_takes_the_codes_of_notes_instead_of_their_names(loaded, models):
    model = models["l2"]
    user, notes = _request(loaded)
    note_ids = ["never seen" if place % 7 == 3 else f"n{place}" for place in range(40)]
    codes = model.encoded_notes(note_ids)
    assert (codes == 0).sum() == 6
    assert np.array_equal(_score(model, user, notes, (), codes=codes), _score(model, user, notes, note_ids))
    with pytest.raises(ValueError, match=r"l2 takes codes int64 \[40\], got int64 \(39,\)"):
        _score(model, user, notes, (), codes=codes[1:])


def _asked_of_many(loaded, sizes):
    requests = []
    for place, num_notes in enumerate(sizes):
        user, notes = _request(loaded, num_notes, row=3000 + 40 * place)
        history = [f"n{(7 * place + step) % 120}" for step in range(place + 1)]
        note_ids = [f"n{(place + step) % 130}" for step in range(num_notes)]
        requests.append(RankingRequest(user, notes, ("tab_1", None, "tab_0")[place % 3], history, note_ids, None))
    return requests


def _scores_of_many(model, requests):
    if isinstance(model, l1.L1):
        return [scores[:, None] for scores in model.score_many(requests)]
    return [np.column_stack([scores[head] for head in model.heads]) for scores in model.score_many(requests)]


def test_requests_together_get_the_scores_that_each_gets_alone(name, loaded, models):
    requests = _asked_of_many(loaded, [40, 1, 0, 33, 64, 100, 7, 30, 12])
    together = _scores_of_many(models[name], requests)
    assert [len(scores) for scores in together] == [40, 1, 0, 33, 64, 100, 7, 30, 12]
    for request, scores in zip(requests, together, strict=True):
        (alone,) = _scores_of_many(models[name], [request])
        assert np.array_equal(alone, scores)
    assert _scores_of_many(models[name], []) == []


def test_scores_are_the_same_bit_for_bit_wherever_a_request_stands_among_others(name, loaded, models):
    first, second, third, fourth = _asked_of_many(loaded, [20, 5, 4, 3])
    (alone,) = _scores_of_many(models[name], [first])
    for others in ([second], [third, second], [fourth, third, second]):
        assert np.array_equal(_scores_of_many(models[name], [first, *others])[0], alone)
        assert np.array_equal(_scores_of_many(models[name], [*others, first])[-1], alone)


def test_what_l2_keeps_of_the_notes_changes_no_bit(loaded, models):
    model = models["l2"]
    requests = _asked_of_many(loaded, [40, 33, 64])
    kept = [_scores_of_many(model, [request])[0] for request in requests]
    changed = replace(requests[0], notes=requests[0].notes + 1)
    assert not np.array_equal(_scores_of_many(model, [changed])[0], kept[0])
    for request, scores in zip(requests, kept, strict=True):
        assert np.array_equal(_scores_of_many(model, [request])[0], scores)
        model.forget()
        assert np.array_equal(_scores_of_many(model, [request])[0], scores)


class _OfOneTick(Given):
    def stamps(self, names):
        return np.ones(len(self), dtype=np.int64)


def test_notes_that_share_a_place_are_not_taken_for_each_other(loaded, models):
    model = models["l1"]
    user, notes = _request(loaded, 2)
    alone = [model.score(user, notes[[row]]) for row in range(2)]
    rows = np.array([3, 3 + model.memo.num_places])
    for _ in range(2):
        for row in range(2):
            scores = model.score(user, _OfOneTick(notes[[row]], model.note_features), rows=rows[[row]])
            assert np.array_equal(scores, alone[row])
