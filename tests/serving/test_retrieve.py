import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from models_ml.on_device import VectorsOnDevice
from serving.catalogue import Catalogue
from serving.hydrate import UserFeatures
from serving.retrieve import Retrieval, retrieve
from serving.vector_index import ShardedVectors
from warehouse.landing import NOTES_SCHEMA
from warehouse.time_algebra import HOUR_US

NOON = 1_650_000_000_000_000
NOTES = [
    # note, author, hours before noon that it was created (None: unknown), first topic
    ("n0", "a", 5, "music"),
    ("n1", "a", 1, "music"),
    ("n2", "b", None, "books"),
    ("n3", "b", 3, None),
    ("n4", None, -2, "books"),
]


def catalogue():
    rows = [
        {
            "note_id": note_id,
            "author_id": author,
            "topics": [topic, "art"] if topic else [],
            "note_type": "NORMAL",
            "duration_ms": 1000,
            "created_at": None if hours is None else NOON - hours * HOUR_US,
        }
        for note_id, author, hours, topic in NOTES
    ]
    return Catalogue.from_tables(
        pa.Table.from_pylist(rows, schema=NOTES_SCHEMA), {"n2": NOON - 2 * HOUR_US, "n0": NOON - HOUR_US}
    )


class OneNeighbour:
    def nearest(self, note_ids, k):
        return np.array([2, 1, 0])[:k], np.array([9.0, 2.0, 1.0])[:k]  # places in: n0, n3, one unheard of


class TwoVectors:
    note_ids = ("n3", "gone", "n1")
    note_vectors = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32)

    user_features = ()

    def user_vector(self, history, user, user_attributes):
        return np.array([0.0, 1.0] if history else [0.0, 0.0], dtype=np.float32)


def request(seen=(), vectors=None, **changes):
    notes = catalogue()
    eligible_N = notes.exists_at(NOON)
    eligible_N[[notes.row_of[note_id] for note_id in seen]] = False
    rows = np.array([3, -1, 1])
    shards = ShardedVectors(TwoVectors.note_vectors, note_V=rows)
    models = SimpleNamespace(
        item_to_item=OneNeighbour(),
        rows_of_neighbours=np.array([0, 3, -1]),
        two_tower=TwoVectors(),
        rows_of_vectors=rows,
        vectors=vectors,
        shards=shards,
    )
    settings = {
        "trending_rows": np.array([2, 4, 0]),
        "seeds": ["n1"],
        "history": ["n1"],
        "user": UserFeatures((), np.empty(0), {}),
        "user_attributes": None,
        "followed_authors": ["a", "z"],
        "interests": ["n1", "n2", "n0", "n3", "unheard-of"],
    }
    return Retrieval(catalogue=notes, models=models, eligible_N=eligible_N, **(settings | changes))


def found(name, limit=10, **changes):
    candidates, failed, _ = retrieve(request(**changes), {name: limit})
    assert failed == []
    return candidates.note_ids


@pytest.mark.parametrize(
    ("generator", "expected"),
    [
        ("trending", ["n2", "n0"]),  # n4 is not created until two hours after noon
        ("fresh", ["n1", "n2", "n3", "n0"]),  # n2 counts from when it was first seen
        ("item_to_item", ["n3", "n0"]),
        ("two_tower", ["n1", "n3"]),
        ("followed_authors", ["n1", "n0"]),
        ("topics", ["n0", "n2"]),  # two notes of music were read and one of books
    ],
)
def test_each_generator_gives_its_notes_best_first(generator, expected):
    assert found(generator) == expected
    assert found(generator, limit=1) == expected[:1]
    assert found(generator, limit=0) == []
    assert found(generator, seen=["n1", "n2"]) == [note_id for note_id in expected if note_id not in ("n1", "n2")]


@pytest.mark.parametrize("limit", [0, 1, 2, 10])
def test_the_search_on_a_device_finds_what_numpy_finds(limit):
    vectors = VectorsOnDevice(TwoVectors.note_vectors, torch.device("cpu"))
    for seen in ([], ["n1"], ["n1", "n3"]):
        assert found("two_tower", limit, vectors=vectors, seen=seen) == found("two_tower", limit, seen=seen)


def test_a_reader_without_a_past_gets_nothing_from_generators_that_need_one():
    nobody = {"seeds": [], "history": [], "followed_authors": [], "interests": []}
    assert (
        found("topics", **nobody)
        == found("nearby")
        == found("item_to_item", **nobody)
        == found("two_tower", **nobody)
        == found("followed_authors", **nobody)
        == []
    )


def test_generators_are_not_asked_once_it_is_late():
    asked = {"trending": 10, "item_to_item": 10}
    candidates, failed, is_cut = retrieve(request(), asked, lambda num_candidates: num_candidates > 0)
    assert {source for sources in candidates.sources for source in sources} == {"trending"}
    assert (failed, is_cut) == ([], True)
    assert retrieve(request(), asked, lambda num_candidates: num_candidates > 1000)[2] is False


def test_the_union_holds_each_note_once_with_all_its_sources():
    candidates, _, _ = retrieve(request(), {"trending": 10, "item_to_item": 10})
    assert candidates.note_ids == ["n0", "n2", "n3"]
    assert candidates.sources == [("trending", "item_to_item"), ("trending",), ("item_to_item",)]
    assert candidates.recall_score_C.tolist() == pytest.approx([1 / 62 + 1 / 62, 1 / 61, 1 / 61])
    assert candidates.author_ids == ["a", "b", "b"]


def test_a_generator_that_breaks_is_named_and_the_others_go_on(caplog):
    class Broken:
        def nearest(self, note_ids, k):
            raise RuntimeError("index torn")

    models = SimpleNamespace(item_to_item=Broken())
    candidates, failed, _ = retrieve(dataclasses.replace(request(), models=models), {"item_to_item": 5, "trending": 5})
    assert failed == ["item_to_item"]
    assert candidates.note_ids == ["n2", "n0"]
    assert "index torn" in caplog.text


def test_topics_share_the_places_by_how_much_they_are_read():
    rows = [{"note_id": f"{topic}{n}", "topics": [topic]} for topic in ("art", "books", "cars") for n in range(8)]
    notes = Catalogue.from_tables(pa.Table.from_pylist(rows, schema=NOTES_SCHEMA.with_metadata(None)), {})
    everything = np.arange(len(rows))
    asked = dataclasses.replace(
        request(),
        catalogue=notes,
        eligible_N=np.ones(len(rows), bool),
        trending_rows=everything[::-1],
        interests=["art0"] * 3 + ["books0"],
    )
    found = retrieve(asked, {"topics": 8})[0].note_ids
    assert found == ["art7", "books7", "art6", "art5", "art4", "books6", "art3", "art2"]


@pytest.mark.parametrize("seed", range(20))
def test_topics_are_interleaved_as_all_places_sorted_would_be(seed):
    rng = np.random.default_rng(seed)
    topics = [None, "art", "books", "cars", "dance"]
    drawn = [topics[place] for place in rng.choice(5, 120, p=[0.1, 0.5, 0.2, 0.15, 0.05])]
    rows = [{"note_id": f"n{n:03d}", "topics": [topic] if topic else []} for n, topic in enumerate(drawn)]
    notes = Catalogue.from_tables(pa.Table.from_pylist(rows, schema=NOTES_SCHEMA.with_metadata(None)), {})
    eligible_N, trending_rows = rng.random(120) < 0.8, rng.permutation(120)[: rng.integers(0, 121)]
    interests = [f"n{n:03d}" for n in rng.integers(0, 120, 15)]
    weights = Counter(topic for note_id in interests if (topic := notes.topic_of(note_id)) is not None)
    placed, number = [], Counter()
    for at, row in enumerate(trending_rows.tolist()):
        topic = drawn[row]
        if eligible_N[row] and weights.get(topic, 0) > 0:
            placed.append(((number[topic] + 0.5) / weights[topic], at, row))
            number[topic] += 1
    asked = dataclasses.replace(
        request(), catalogue=notes, eligible_N=eligible_N, trending_rows=trending_rows, interests=interests
    )
    for limit in (0, 1, 7, 200):
        found, _, _ = retrieve(asked, {"topics": limit})
        assert found.row_C.tolist() == [row for _, _, row in sorted(placed)][:limit]


def test_a_shard_that_breaks_is_named():
    class Dead:
        def best(self, user_D, eligible_N, limit):
            raise RuntimeError("torn")

    asked = request()
    asked.models.shards.shards[0] = Dead()
    assert retrieve(asked, {"two_tower": 5, "trending": 5})[1] == ["two_tower_shard_0"]
