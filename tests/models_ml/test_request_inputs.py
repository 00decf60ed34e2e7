"""What one request is given is what the networks were trained on."""

import numpy as np
import pytest
import torch

from models_ml.features import FeatureInputs
from models_ml.request_inputs import LinearShare, PiecewiseTable, add_products, columns_by_owner, part_of

NAMES = ("note_num_views_1d", "note_ctr_1d", "note_num_clicks_1d", "note_age_min", "note_spread", "note_num_hides_1d")


def _values(rows, seed):
    rng = np.random.default_rng(seed)
    values = np.floor(np.exp(rng.normal(1, 2, (rows, len(NAMES)))))
    values[:, 1] = rng.random(rows)
    values[:, 4] = 7.0  # never anything else: no spread, no live bin
    values[:, 5] = rng.random(rows) < 0.02  # nearly always 0: most bins are a point
    values[rng.random(values.shape) < 0.1] = np.nan
    return values


def _fitted(bins):
    return FeatureInputs(NAMES, bins).fit(_values(400, seed=1))


def _asked():
    values = np.concatenate([_values(60, seed=2), np.full((1, len(NAMES)), np.nan), np.full((1, len(NAMES)), 1e9)])
    return np.concatenate([values, np.zeros((1, len(NAMES))), np.full((1, len(NAMES)), -5.0)])


def _added(share, values, width):
    out_NW = np.ones((len(values), width), dtype=np.float32)
    share.add_to(out_NW, np.ascontiguousarray(values, dtype=np.float32))
    return torch.from_numpy(out_NW - 1)


def test_a_linear_share_is_the_linear_layer_it_was_made_of():
    inputs = _fitted(bins=0)
    weight_OI = torch.randn(24, inputs.num_inputs, generator=torch.Generator().manual_seed(3))
    expected = inputs(torch.from_numpy(_asked())).double() @ weight_OI.T.double()
    torch.testing.assert_close(_added(LinearShare(inputs, weight_OI), _asked(), 24).double(), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 5
    with pytest.raises(ValueError, match="without bins, which a PiecewiseTable is for; got 4"):
        LinearShare(_fitted(bins=4), weight_OI)


def test_a_share_of_a_part_reads_only_its_own_columns():
    wider = np.full((len(_asked()), 9), 1e6)
    wider[:, [8, 1, 2, 5, 4, 7]] = _asked()
    for inputs, kind, shape in ((_fitted(0), LinearShare, (5, -1)), (_fitted(4), PiecewiseTable, (1, -1, 5))):
        weight = torch.randn(5 * inputs.num_inputs, generator=torch.Generator().manual_seed(3)).reshape(shape)
        alone, among_others = kind(inputs, weight), kind(inputs, weight, [8, 1, 2, 5, 4, 7])
        assert torch.equal(_added(among_others, wider, 5), _added(alone, _asked(), 5))


def test_features_are_told_apart_by_what_they_belong_to():
    names = ("note_num_views_1d", "user_author_ctr_7d", "note_age_min", "author_ctr_7d", "user_age_min")
    assert columns_by_owner(names) == ([1, 4], [2], [0, 3])


def test_products_are_added_row_by_row():
    rng = np.random.default_rng(0)
    inputs, weight = rng.normal(size=(5, 30)).astype(np.float32), rng.normal(size=(30, 7)).astype(np.float32)
    inputs[rng.random(inputs.shape) < 0.5] = 0
    out = np.ones((5, 7), dtype=np.float32)
    add_products(inputs, weight, out)
    np.testing.assert_allclose(out, 1 + inputs.astype(np.float64) @ weight, rtol=0, atol=5e-6)
    alone = np.ones((1, 7), dtype=np.float32)
    add_products(inputs[3:4], weight, alone)
    assert np.array_equal(alone[0], out[3])
    add_products(np.full((1, 30), np.nan, dtype=np.float32), weight, alone)
    assert np.isnan(alone).all()


@pytest.mark.parametrize("bins", [0, 4])
def test_parts_are_columns_of_the_whole(bins):
    inputs = _fitted(bins)
    whole = inputs(torch.from_numpy(_asked()))
    parts = [part_of(inputs, columns) for columns in ([0, 2, 5], [1, 3, 4], [])]
    assert sorted(torch.cat([places_I for _, places_I in parts]).tolist()) == list(range(inputs.num_inputs))
    for columns, (part, places_I) in zip(([0, 2, 5], [1, 3, 4], []), parts, strict=True):
        assert torch.equal(part(torch.from_numpy(_asked()[:, columns])), whole[:, places_I])
    with pytest.raises(ValueError, match=r"both counts of a rate or none, got one of .*num_clicks_1d"):
        part_of(inputs, [0, 1])


@pytest.mark.parametrize(("kind", "bins", "shape"), [(LinearShare, 0, (24, -1)), (PiecewiseTable, 8, (1, -1, 24))])
def test_the_numbers_of_a_row_do_not_depend_on_how_many_rows_there_are(kind, bins, shape):
    inputs = _fitted(bins)
    weight = torch.randn(24 * inputs.num_inputs, generator=torch.Generator().manual_seed(3)).reshape(shape)
    share, values = kind(inputs, weight), _values(200, seed=4)
    together = _added(share, values, 24)
    for start, rows in ((0, 1), (7, 5), (3, 8), (11, 16), (1, 33), (60, 100)):
        assert torch.equal(_added(share, values[start : start + rows], 24), together[start : start + rows])


def test_a_count_of_any_size_has_its_logarithm():
    inputs = FeatureInputs(("note_num_views_1d",))
    inputs.scale_Z.fill_(0.1)  # so that nothing is cut
    counts = np.concatenate([[0.0], np.geomspace(1e-7, 1e25, 500), [np.inf, np.nan]]).astype(np.float32)
    found = np.zeros((len(counts), 1), dtype=np.float32)
    LinearShare(inputs, torch.tensor([[10.0, 0.0]])).add_to(found, counts[:, None])
    np.testing.assert_allclose(found[:-2, 0], np.log1p(counts[:-2].astype(np.float64)), rtol=5e-7, atol=1e-9)
    assert found[-2:, 0].tolist() == [60.0, 0.0]  # the cut, nothing


@pytest.mark.parametrize("bins", [0, 1, 4, 8])
@pytest.mark.parametrize("members", [1, 3])
def test_a_table_is_the_linear_layers_it_was_made_of(bins, members):
    inputs = _fitted(bins)
    weight_KIO = torch.randn(members, inputs.num_inputs, 5, generator=torch.Generator().manual_seed(3))
    plain_NI = inputs(torch.from_numpy(_asked())).double()
    expected = torch.cat([plain_NI @ weight_KIO[member].double() for member in range(members)], dim=1)
    found = _added(PiecewiseTable(inputs, weight_KIO), _asked(), members * 5)
    assert (found.double() - expected).abs().max() <= 2e-5  # of sums up to some twenty
    assert expected.abs().max() > 5


def test_a_corner_itself_belongs_to_both_its_sides():
    inputs = _fitted(bins=4)
    weight_KIO = torch.randn(1, inputs.num_inputs, 3, generator=torch.Generator().manual_seed(3))
    scaled = inputs.bin_start_ZB[0, 2:3] / inputs.scale_Z[0] + inputs.mean_Z[0]
    values = np.zeros((3, len(NAMES)))
    values[:, 0] = np.expm1(scaled.item()) + np.array([-1e-4, 0.0, 1e-4])
    expected = inputs(torch.from_numpy(values)) @ weight_KIO[0]
    torch.testing.assert_close(_added(PiecewiseTable(inputs, weight_KIO), values, 3), expected, rtol=0, atol=5e-6)


def test_no_rows_and_no_features_add_nothing():
    inputs = _fitted(bins=4)
    table = PiecewiseTable(inputs, torch.ones(2, inputs.num_inputs, 3))
    assert _added(table, np.empty((0, len(NAMES))), 6).shape == (0, 6)
    nothing, _ = part_of(inputs, [])
    assert (_added(PiecewiseTable(nothing, torch.ones(2, 0, 3), []), _asked(), 6) == 0).all()
