"""Sharded and approximate search beside one exact search of everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.vector_index import Exact, Hnsw, ShardedVectors, largest


def vectors(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors in clusters, as the notes of a few topics are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, width))
    drawn = centres[rng.integers(0, 12, count)] + 0.6 * rng.normal(size=(count, width))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


@given(st.integers(0, 60), st.integers(1, 7), st.integers(0, 70), st.integers(0, 1000))
def test_shards_merge_to_what_one_search_finds_ties_included(count, num_shards, limit, seed):
    rng = np.random.default_rng(seed)
    vectors_VD = rng.integers(-1, 2, (count, 3)).astype(np.float32)  # few values, so many ties
    user_D, usable_V = rng.integers(-2, 3, 3).astype(np.float32), rng.random(count) < 0.7
    found, failed = ShardedVectors(vectors_VD, num_shards).best(user_D, usable_V, limit)
    assert failed == []
    assert found.tolist() == Exact(vectors_VD).best(user_D, usable_V, limit)[0].tolist()


def is_best(index: Exact, vectors_VD: np.ndarray, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> None:
    rows, scores = index.best(user_D, usable_V, limit)
    all_V = vectors_VD.astype(np.float64) @ user_D.astype(np.float64)
    rounding = 1e-6 * max(np.abs(vectors_VD).max(initial=0) * np.abs(user_D).max() * len(user_D), 1e-30)
    assert len(set(rows.tolist())) == len(rows) == min(limit, usable_V.sum())
    assert usable_V[rows].all()
    np.testing.assert_allclose(scores, all_V[rows], rtol=0, atol=rounding)
    np.testing.assert_allclose(scores, np.sort(all_V[usable_V])[::-1][: len(rows)], rtol=0, atol=rounding)
    assert rows.tolist() == rows[np.lexsort((rows, -scores))].tolist()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("limit", [1, 60, 700])
def test_the_best_of_many_are_those_of_all_products_sorted(share, limit):
    vectors_VD = vectors(20_011)
    index, usable_V = Exact(vectors_VD), np.random.default_rng(3).random(20_011) < share
    for user_D in vectors(5, seed=4):
        is_best(index, vectors_VD, user_D, usable_V, limit)


@given(
    st.integers(0, 300), st.integers(1, 140), st.integers(0, 60), st.sampled_from([0.0, 1e-3, 1.0, 1e4]), st.integers(0, 1000)
)
def test_codes_of_eight_bits_lose_none_of_the_best(count, width, limit, spread, seed):
    """spread: how far the vectors are from being one and the same."""
    rng = np.random.default_rng(seed)
    vectors_VD = rng.normal(size=width) + spread * rng.normal(size=(count, width)) * rng.random((count, 1)) ** 4
    vectors_VD = vectors_VD.astype(np.float32)
    user_D = (rng.normal(size=width) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
    is_best(Exact(vectors_VD), vectors_VD, user_D, rng.random(count) < 0.8, limit)


@pytest.mark.parametrize("hnsw_from", [1, 10_000])
def test_only_vectors_of_eligible_notes_are_found(hnsw_from):
    rng = np.random.default_rng(8)
    vectors_VD, note_V, eligible_N = vectors(4000), rng.integers(-1, 900, 4000), rng.random(900) < 0.3
    index = ShardedVectors(vectors_VD, 2, hnsw_from, note_V)
    usable_V = (note_V >= 0) & eligible_N[note_V]
    found, _ = index.best(vectors_VD[7], eligible_N, 100)
    assert usable_V[found].all()
    best = np.flatnonzero(usable_V)[largest((vectors_VD @ vectors_VD[7])[usable_V], 100)]
    assert len(np.intersect1d(found, best)) >= 95
    if hnsw_from > 4000:
        assert found.tolist() == best.tolist()


def test_few_products_are_computed_in_full():
    vectors_VD, usable_V = vectors(20_011, width=64), np.ones(20_011, bool)
    index = Exact(vectors_VD)
    for user_D in vectors(5, width=64, seed=4):
        assert 100 <= len(index._promising(user_D, usable_V, 100)) < 400


def test_a_dead_shard_is_named_and_costs_only_its_notes(caplog):
    class Dead:
        def best(self, user_D, eligible_N, limit):
            raise RuntimeError("shard torn")

    vectors_VD, usable_V = vectors(90), np.ones(90, bool)
    index = ShardedVectors(vectors_VD, 3)
    index.shards[1] = Dead()
    found, failed = index.best(vectors_VD[5], usable_V, 90)
    assert failed == ["two_tower_shard_1"]
    assert set(found.tolist()) == {*range(30), *range(60, 90)}
    assert "shard torn" in caplog.text


@pytest.fixture(scope="module")
def graph() -> tuple[Hnsw, np.ndarray]:
    vectors_VD = vectors(4000)
    return Hnsw(vectors_VD), vectors_VD


def test_a_graph_finds_nearly_all_of_the_best_with_exact_scores(graph):
    index, vectors_VD = graph
    users, usable_V = vectors(40, seed=9), np.ones(4000, bool)
    hits = 0
    for user_D in users:
        rows, scores = index.best(user_D, usable_V, 50)
        assert scores == pytest.approx(vectors_VD[rows] @ user_D, abs=1e-6)
        assert np.all(np.diff(scores) <= 0)
        hits += len(np.intersect1d(rows, Exact(vectors_VD).best(user_D, usable_V, 50)[0]))
    assert hits / (40 * 50) > 0.97


@pytest.mark.parametrize("share", [0.5, 0.05, 0.002, 0.0])
def test_a_graph_gives_as_many_as_the_filters_leave(graph, share):
    index, vectors_VD = graph
    usable_V = np.random.default_rng(2).random(4000) < share
    rows, _ = index.best(vectors_VD[7], usable_V, 100)
    assert len(rows) == min(100, usable_V.sum())
    assert usable_V[rows].all()


def test_there_are_graphs_from_the_given_number_on():
    assert isinstance(ShardedVectors(vectors(50), hnsw_from=50).shards[0], Hnsw)
    assert isinstance(ShardedVectors(vectors(49), hnsw_from=50).shards[0], Exact)
    assert ShardedVectors(vectors(0)).best(np.zeros(16, np.float32), np.zeros(0, bool), 5)[0].tolist() == []


def test_largest_breaks_ties_by_place_whatever_the_limit():
    values = np.array([1.0, 3.0, 3.0, 2.0, 3.0])
    for limit in range(7):
        assert largest(values, limit).tolist() == [1, 2, 4, 3, 0][:limit]
