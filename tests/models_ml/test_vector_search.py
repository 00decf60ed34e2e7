import numpy as np
import pytest

from models_ml import vector_search
from models_ml.vector_search import recall_of_indexes


def unit_rows(number, width, seed):
    rows = np.random.default_rng(seed).normal(size=(number, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_what_each_index_finds_of_the_exact_search():
    vectors, queries = unit_rows(3000, 24, 0), unit_rows(60, 24, 1)
    found = recall_of_indexes(vectors, queries, (10, 100, 5000))
    assert {tuple(values) for values in found.values()} == {("recall@10", "recall@100")}  # there are no 5,000 vectors
    exact = np.argsort(-queries @ vectors.T, axis=1)
    graph = vector_search.graph_of(vectors)
    shares = []
    for query, best in zip(queries, exact, strict=True):
        asked = graph.search(query, 20).keys
        kept = sorted(asked, key=lambda row: -(vectors[row] @ query))[:10]
        shares.append(len(set(kept) & set(best[:10].tolist())) / 10)
    assert found["HNSW bf16"]["recall@10"] == pytest.approx(np.mean(shares))
    assert 0.97 < found["exact int8"]["recall@100"] < found["exact bf16"]["recall@100"] <= 1.0
    assert found["HNSW int8"]["recall@100"] > 0.9


def test_a_graph_of_few_neighbours_finds_less(monkeypatch):
    vectors, queries = unit_rows(3000, 24, 0), unit_rows(60, 24, 1)
    monkeypatch.setattr(vector_search, "CONNECTIVITY", 2)
    monkeypatch.setattr(vector_search, "EXPANSION_SEARCH", 8)
    found = recall_of_indexes(vectors, queries, (10,))
    assert found["HNSW bf16"]["recall@10"] < 0.9 * found["exact bf16"]["recall@10"]


def test_without_queries_or_enough_vectors_there_is_nothing_to_say():
    assert recall_of_indexes(unit_rows(5, 4, 0), unit_rows(3, 4, 1), (50,)) == {}
    assert recall_of_indexes(unit_rows(60, 4, 0), np.zeros((0, 4), np.float32), (50,)) == {}
