"""What hydration copies, counted in bytes, and that every way to a candidate's features comes to the same values."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from serving.cascade import hydrate
from serving.request import begin
from streaming_sql.assembled import Assembled


def one_by_one(request):
    """The request where no tick has been assembled."""
    world = dataclasses.replace(request.world, assembled=Assembled(request.world.store.plans, {}))
    return dataclasses.replace(request, world=world)


@pytest.fixture
def request_of(server, readers):
    return lambda user_id=None: begin(server.engine.world, user_id or readers[0])


def test_a_candidates_values_are_copied_twice_and_the_readers_never(request_of):
    request = request_of()
    row_C = np.random.default_rng(0).integers(0, len(request.world.catalogue), 4_000)
    hydrate(request, row_C)  # what is made once per server is made
    tracemalloc.start()
    try:
        features = hydrate(request, row_C)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    of_reader = set(request.user.names)
    assert not of_reader & set(features.names)
    assert request.user.pick(request.world.models.l2.user_features).ndim == 1
    # gathered by group, then put beside each other; beside that some numbers for each candidate
    assert 1.0 < peak / features.values_CF.nbytes < 2.5


def test_gathered_assembled_and_named_candidates_have_the_same_values(request_of):
    for user_id in (None, "never met"):
        request = request_of(user_id)
        row_C = np.random.default_rng(1).permutation(len(request.world.catalogue))[:300]
        note_ids = [request.world.catalogue.note_ids[row] for row in row_C.tolist()]
        gathered = hydrate(request, row_C)
        with_strangers = hydrate(request, np.append(row_C, -1), note_ids=[*note_ids, "unheard-of"])
        apart = hydrate(one_by_one(request), row_C)
        for other in (apart, with_strangers.take(np.arange(300))):
            assert other.names == gathered.names
            np.testing.assert_array_equal(other.values_CF, gathered.values_CF)


def test_authors_that_the_reader_met_are_found_among_all(request_of):
    request = request_of()
    affinity = hydrate(request, np.arange(len(request.world.catalogue))).pick(["user_author_num_clicks_7d"])[:, 0]
    by_key = request.view.assemble(
        "user_author_affinity",
        [(request.user_id, author_id) for author_id in request.world.catalogue.author_ids],
        request.t_us,
    )
    np.testing.assert_array_equal(affinity, by_key.values[:, by_key.names.index("user_author_num_clicks_7d")])
    assert affinity.max() > 0
    assert dataclasses.asdict(request.steps)["degraded"] == []
