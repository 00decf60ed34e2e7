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


def peak_bytes(make):
    """(what is made, the least of three peaks: the server's other threads allocate meanwhile)."""
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        try:
            made = make()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return made, min(peaks)


def test_a_candidates_values_are_copied_once_where_they_are_read_and_the_readers_never(request_of):
    request = request_of()
    row_C = np.random.default_rng(0).integers(0, len(request.world.catalogue), 8_000)
    wanted = request.world.models.l2.note_features
    hydrate(request, row_C).pick(wanted)  # what is made once per server is made
    hydrated, hydrated_bytes = peak_bytes(lambda: hydrate(request, row_C))
    _, bytes_of_half = peak_bytes(lambda: hydrate(request, row_C[:4_000]))
    picked_CF, picked_bytes = peak_bytes(lambda: hydrated.pick(wanted))
    features, copied_bytes = peak_bytes(hydrated.copied)
    assert not set(request.user.names) & set(features.names)
    assert request.user.pick(request.world.models.l2.user_features).ndim == 1
    assert picked_CF.dtype == np.float32
    assert picked_CF.shape == (8_000, len(wanted))
    assert 1.0 <= picked_bytes / picked_CF.nbytes < 1.1
    assert 1.0 <= copied_bytes / features.values_CF.nbytes < 1.1
    # a candidate more costs where its features are, and those of the request itself
    assert (hydrated_bytes - bytes_of_half) / 4_000 < 0.4 * features.values_CF[0].nbytes


def test_what_models_pick_is_in_the_order_asked_for(request_of):
    request = request_of()
    hydrated = hydrate(request, np.arange(50)[::-1])
    features, some = hydrated.copied(), hydrated.take(np.array([7, 7, 3]))
    for names in (request.world.models.l2.note_features, tuple(reversed(features.names)), ("note_age_min",), ()):
        columns = [features.names.index(name) for name in names]
        np.testing.assert_array_equal(hydrated.pick(names), features.values_CF[:, columns].astype(np.float32))
        np.testing.assert_array_equal(some.pick(names), features.values_CF[[7, 7, 3]][:, columns].astype(np.float32))
    assert some.row_C.tolist() == [42, 42, 46]
    with pytest.raises(KeyError, match="note_unheard_of"):
        hydrated.pick(("note_unheard_of",))


def test_gathered_assembled_and_named_candidates_have_the_same_values(request_of):
    for user_id in (None, "never met"):
        request = request_of(user_id)
        row_C = np.random.default_rng(1).permutation(len(request.world.catalogue))[:300]
        note_ids = [request.world.catalogue.note_ids[row] for row in row_C.tolist()]
        gathered = hydrate(request, row_C)
        with_strangers = hydrate(request, np.append(row_C, -1), note_ids=[*note_ids, "unheard-of"])
        apart = hydrate(one_by_one(request), row_C)
        for other in (apart, with_strangers.take(np.arange(300))):
            assert other.copied().names == gathered.copied().names
            np.testing.assert_array_equal(other.copied().values_CF, gathered.copied().values_CF)


def test_a_stamp_stands_for_what_is_held_of_a_note_that_exists(request_of):
    request = request_of()
    world, rows = request.world, np.arange(40)
    world.assembled.assemble(request.view)
    of_notes = [name for name in world.models.l2.note_features if not name.startswith("user_") and name != "note_age_min"]
    stamp_C = hydrate(request, rows).stamps(of_notes)
    assert (stamp_C > 0).all()
    notes, authors = world.catalogue.note_ids, world.catalogue.rows_of_author
    keys = {("note_id",): [(note_id,) for note_id in notes], ("author_id",): [(author_id,) for author_id in authors]}
    at_once = Assembled(world.store.plans, keys)
    at_once.assemble(request.view)
    of_one_tick = dataclasses.replace(request, world=dataclasses.replace(world, assembled=at_once))
    assert len(set(hydrate(of_one_tick, rows).stamps(of_notes).tolist())) == 1
    assert np.array_equal(hydrate(request, rows[::-1]).take(np.arange(7)).stamps(of_notes), stamp_C[::-1][:7])
    for names in ([*of_notes, "note_age_min"], [*of_notes, "user_author_ctr_30d"]):
        assert (hydrate(request, rows).stamps(names) == 0).all()
    assert (hydrate(one_by_one(request), rows).stamps(of_notes) == 0).all()
    note_ids = [world.catalogue.note_ids[3], "unheard-of"]
    assert (hydrate(request, np.array([3, -1]), note_ids).stamps(of_notes) > 0).tolist() == [True, False]
    created_us_N = world.catalogue.created_us_N.copy()
    created_us_N[5] = request.t_us
    catalogue = dataclasses.replace(world.catalogue, created_us_N=created_us_N)
    before_a_note = dataclasses.replace(request, world=dataclasses.replace(world, catalogue=catalogue))
    assert np.flatnonzero(hydrate(before_a_note, rows).stamps(of_notes) == 0).tolist() == [5]


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
