from collections import Counter

import numpy as np
import pytest

from models_ml.trainer.loader import Loader, Place
from models_ml.trainer.order import EpochOrder
from models_ml.trainer.rows import Rows, in_lanes, lanes
from tests.models_ml.trainer import toy


def _ids(order: EpochOrder, sizes) -> np.ndarray:
    first = np.concatenate([[0], np.cumsum(sizes)])
    lane, row = order.place(np.arange(order.num_rows))
    ids = []
    for one, at in zip(lane.tolist(), row.tolist(), strict=True):
        window, place = order.window_of(one, np.array([at]))
        groups, shuffled = order.window(one, int(window[0]))
        rows = np.concatenate([np.arange(first[group], first[group + 1]) for group in groups])
        ids.append(rows[shuffled[place[0]]])
    return np.array(ids)


@pytest.mark.parametrize("sizes", [[5], [7, 7, 3], [4] * 40 + [1], [3, 1, 9] * 30])
@pytest.mark.parametrize("window_rows", [1, 20, 1000])
def test_every_row_has_one_place_in_an_epoch(sizes, window_rows):
    order = EpochOrder(sizes, 3, "files", 0, window_rows)
    assert sorted(_ids(order, sizes)) == list(range(sum(sizes)))


def test_the_order_is_another_one_for_another_seed_epoch_or_file_set():
    sizes = [10] * 20
    orders = [_ids(EpochOrder(sizes, *key), sizes).tolist() for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    assert len({tuple(order) for order in orders}) == 4
    assert _ids(EpochOrder(sizes, 0, "a", 0), sizes).tolist() == orders[0]


def test_the_order_of_a_known_epoch_never_changes():
    # a run that goes on after an upgrade must find its place again
    assert _ids(EpochOrder([3, 3, 2], 7, "files", 2), [3, 3, 2]).tolist() == KNOWN


KNOWN = [0, 3, 7, 5, 6, 1, 2, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 11])
@pytest.mark.parametrize("group_size", [16, 700])
def test_ranks_share_every_batch_and_see_the_rows_one_rank_sees(size, group_size):
    alone = list(Loader(toy.source(group_size), 5, 64, lambda rows: None).iterate(0, 2))
    ranks = [list(Loader(toy.source(group_size), 5, 64, lambda rows: None, Place(r, size)).iterate(0, 2)) for r in range(size)]
    for number, batch in enumerate(alone):
        shared = np.concatenate([own[number].rows.row_id for own in ranks])
        assert Counter(shared.tolist()) == Counter(batch.rows.row_id.tolist())
        assert all((own[number].first, own[number].last) == (batch.first, batch.last) for own in ranks)
    assert Counter(np.concatenate([batch.rows.row_id for batch in alone]).tolist()) == Counter({row: 2 for row in range(700)})


@pytest.mark.parametrize("consumed", [64, 640, 700, 700 + 128])
def test_reading_from_a_position_gives_what_would_have_come(consumed):
    loader = Loader(toy.source(), 5, 64, lambda rows: rows.num_candidates, cache_bytes=0)
    whole = [batch for batch in loader.iterate(0, 2) if batch.first >= consumed]
    rest = list(loader.iterate(consumed, 2))
    assert [batch.rows.row_id.tolist() for batch in rest] == [batch.rows.row_id.tolist() for batch in whole]
    assert [batch.ready for batch in rest] == [batch.ready for batch in whole]


def test_taken_rows_bring_their_candidates():
    rows = toy.rows()
    some = np.array([5, 0, 699, 5])
    taken = rows.take(some)
    for place, row in enumerate(some):
        expected = rows.per_candidate["inputs"][rows.offsets[row] : rows.offsets[row + 1]]
        assert np.array_equal(taken.per_candidate["inputs"][taken.offsets[place] : taken.offsets[place + 1]], expected)
    assert Rows.concat([rows.take(np.arange(300)), rows.take(np.arange(300, 700))]).offsets.tolist() == rows.offsets.tolist()


def test_lanes_hold_every_candidate_once_beside_its_reader():
    offsets = np.array([0, 1, 1, 24, 26])
    row_P, place_PC = lanes(offsets)
    assert sorted(place_PC[place_PC >= 0].tolist()) == list(range(26))
    for row, places in zip(row_P, place_PC, strict=True):
        assert all(offsets[row] <= place < offsets[row + 1] for place in places[places >= 0])
    assert set(row_P) == {0, 1, 2, 3}
    filled = in_lanes(np.arange(26.0), place_PC, np.nan)
    assert np.nansum(filled) == 325


def test_what_the_reading_thread_meets_is_raised_in_the_loop():
    class Broken(type(toy.source())):
        def read(self, group):
            raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        list(Loader(Broken(toy.rows(), "x", 32), 0, 64, lambda rows: None).iterate(0, 1))
