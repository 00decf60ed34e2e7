"""The device path on a CPU: the arena, the hash tables and a stand-in for captured graphs, against the models alone."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.graphed import Recording
from models_ml import l1, l2, two_tower
from models_ml.l1 import L1Config
from models_ml.l2_network import L2Config
from models_ml.on_device import L1OnDevice, L2OnDevice, VectorsOnDevice, device_from_env, moved
from models_ml.scoring import RankingRequest
from models_ml.two_tower import TwoTowerConfig
from warehouse.errors import HeadraceError

CPU = torch.device("cpu")
HISTORIES = (["n1", "never seen", "n5", "n9"], [], ["never seen"], [f"n{place}" for place in range(60)])


class Repeating:
    """A recording without a GPU: the function again, from the same tensors into the same tensors. captured: their rows."""

    def __init__(self):
        self.captured = []

    def __call__(self, function, inputs, pool):
        self.captured.append(len(inputs[-1]))
        output = function(*inputs)
        return Recording(inputs, (output,), lambda: output.copy_(function(*inputs)))


@pytest.fixture(scope="module")
def models(loaded):
    def quiet(done, total):
        pass

    return {
        "l1": l1.train(loaded, L1Config(hidden=16, epochs=2, batch_size=256), 0, quiet),
        "l2": l2.train(loaded, L2Config(history_length=10, width=8, hidden=32, members=2, bins=4, epochs=1), 0, quiet),
        "two_tower": two_tower.train(loaded, TwoTowerConfig(width=16, history_length=10, epochs=1), 0, quiet),
    }


def values(loaded, num_notes, row=3000):
    rows = np.arange(row, row + num_notes)
    note_ids = ["never seen" if place % 7 == 3 else f"n{place % 120}" for place in range(num_notes)]
    return loaded.columns(loaded.user_features)[row], note_ids, loaded.columns(loaded.note_features)[rows]


def scores(model, loaded, num_notes, history=HISTORIES[0], row=3000):
    """float32 [N, heads]."""
    user, note_ids, notes = values(loaded, num_notes, row)
    if isinstance(model, l1.L1 | L1OnDevice):
        return model.score(user, notes, surface="tab_0")[:, None]
    by_head = model.score(user, history, note_ids, notes, surface="tab_0", user_attributes='{"keen": "true"}')
    return np.column_stack([by_head[head] for head in model.heads])


@pytest.mark.parametrize("num_notes", [0, 1, 40, 200])
@pytest.mark.parametrize("device_class", [L1OnDevice, L2OnDevice])
def test_it_scores_as_the_model_does_with_one_copy_a_request(device_class, num_notes, loaded, models):
    model = models["l1" if device_class is L1OnDevice else "l2"]
    on_device = device_class(model, CPU, 200)
    for number, history in enumerate(HISTORIES, start=1):
        expected = scores(model, loaded, num_notes, history)
        assert np.abs(scores(on_device, loaded, num_notes, history) - expected).max(initial=0.0) <= 1e-6
        assert on_device.ranker.arena.copies == number


@pytest.mark.parametrize("device_class", [L1OnDevice, L2OnDevice])
def test_replays_at_bucketed_sizes_score_the_same_whatever_was_there_before(device_class, loaded, models):
    model = models["l1" if device_class is L1OnDevice else "l2"]
    record = Repeating()
    on_device = device_class(model, CPU, 200, record)
    for num_notes, row in ((200, 3000), (40, 3100), (33, 3200), (64, 3300)):
        expected = scores(model, loaded, num_notes, row=row)
        assert np.abs(scores(on_device, loaded, num_notes, row=row) - expected).max() <= 1e-6
    assert record.captured == [256, 64]


@pytest.mark.parametrize("device_class", [L1OnDevice, L2OnDevice])
def test_several_requests_get_what_each_gets_from_the_model(device_class, loaded, models):
    model = models["l1" if device_class is L1OnDevice else "l2"]
    asked = []
    for history, num_notes in zip(HISTORIES, (40, 0, 7, 33), strict=True):
        user, note_ids, notes = values(loaded, num_notes, 3000 + num_notes)
        asked.append(RankingRequest(user, notes, "tab_0", history, note_ids, '{"keen": "true"}'))
        if isinstance(model, l2.L2) and num_notes == 7:
            asked[-1] = replace(asked[-1], note_ids=(), codes=model.encoded_notes(note_ids))
    expected, found = model.score_many(asked), device_class(model, CPU, 200).score_many(asked)
    for wanted, got in zip(expected, found, strict=True):
        for head in model.heads if isinstance(model, l2.L2) else (slice(None),):
            assert np.abs(wanted[head] - got[head]).max(initial=0.0) <= 1e-6


def test_a_ranker_that_cannot_be_captured_is_called_plainly(loaded, models, caplog):
    def refuse(function, inputs, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    on_device = L2OnDevice(models["l2"], CPU, 200, refuse)
    for _ in range(2):
        assert np.abs(scores(on_device, loaded, 40) - scores(models["l2"], loaded, 40)).max() <= 1e-6
    assert "not permitted" in on_device.ranker.graphed.failure
    assert caplog.text.count("calling the function plainly") == 1


def test_half_precision_of_the_history_moves_no_score_by_more_than_one_in_a_hundred(loaded, models):
    on_device = L2OnDevice(models["l2"], CPU, 200, history_type=torch.bfloat16)
    difference = np.abs(scores(on_device, loaded, 200) - scores(models["l2"], loaded, 200))
    assert 0 < difference.max() <= 0.01


def test_threads_take_turns(loaded, models):
    on_device = L2OnDevice(models["l2"], CPU, 200, Repeating())
    sizes = [(30 + place, 3000 + 10 * place) for place in range(12)]
    expected = [scores(models["l2"], loaded, size, row=row) for size, row in sizes]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda size: scores(on_device, loaded, size[0], row=size[1]), sizes))
    for ours, theirs in zip(together, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-6


def test_what_does_not_fit_is_refused(loaded, models):
    user, note_ids, notes = values(loaded, 200)
    with pytest.raises(ValueError, match="layout must fit into"):
        L1OnDevice(models["l1"], CPU, 20).score(user, notes)
    with pytest.raises(ValueError, match=r"l1 takes user \[3\] and notes \[N, 11\], got \(2,\)"):
        L1OnDevice(models["l1"], CPU, 200).score(user[:2], notes)
    with pytest.raises(ValueError, match="one row per candidate, got 1 and 200"):
        L2OnDevice(models["l2"], CPU, 200).score(user, [], note_ids[:1], notes)


def test_the_search_gives_the_best_usable_vectors_ties_by_row():
    vectors = VectorsOnDevice(np.array([[1, 0], [0, 1], [2, 0], [1, 0], [3, 0]], dtype=np.float32), CPU)
    query, usable = np.array([1.0, 0.0], dtype=np.float32), np.array([True, True, True, True, False])
    assert vectors.best(query, usable, 3).tolist() == [2, 0, 3]
    assert vectors.best(query, usable, 9).tolist() == [2, 0, 3, 1]
    assert vectors.best(query, usable, 0).tolist() == vectors.best(query, usable & False, 3).tolist() == []


def test_a_cpu_keeps_the_models_as_they_are(models):
    assert moved(models, models["two_tower"].note_vectors, CPU, 200) == (models, None)


def test_the_device_is_named_by_the_environment(monkeypatch):
    monkeypatch.delenv("HEADRACE_DEVICE", raising=False)
    assert device_from_env() == CPU
    monkeypatch.setenv("HEADRACE_DEVICE", "abacus")
    with pytest.raises(HeadraceError, match="HEADRACE_DEVICE must be cpu, cuda or cuda:<number>, got 'abacus'"):
        device_from_env()
    monkeypatch.setenv("HEADRACE_DEVICE", "cuda:99")
    with pytest.raises(HeadraceError, match=r"HEADRACE_DEVICE=cuda:99, but PyTorch finds \d+ GPUs"):
        device_from_env()
