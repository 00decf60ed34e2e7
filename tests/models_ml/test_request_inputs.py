"""What one request is given is what the networks were trained on."""

import numpy as np
import pytest
import torch

from models_ml.features import FeatureInputs
from models_ml.request_inputs import FeatureRows, FewRows, PiecewiseTable, part_of

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


def test_rows_are_the_inputs_without_bins():
    inputs = _fitted(bins=0)
    expected = inputs(torch.from_numpy(_asked()))
    rows = FeatureRows(inputs)
    left_out = sorted(set(range(inputs.num_inputs)) - set(rows.columns_I.tolist()))
    assert (expected[:, left_out] == 0).all()
    torch.testing.assert_close(rows.inputs(_asked()), expected[:, rows.columns_I], rtol=1e-6, atol=2e-6)
    filled = rows.inputs(_asked(), 128)
    assert filled.shape == (128, len(rows.columns_I))
    torch.testing.assert_close(filled[: len(expected)], expected[:, rows.columns_I], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("bins", [0, 4])
def test_a_few_rows_are_the_inputs(bins):
    inputs = _fitted(bins)
    expected = inputs(torch.from_numpy(_asked()))
    torch.testing.assert_close(torch.from_numpy(FewRows(inputs)(_asked())), expected, rtol=1e-5, atol=2e-5)
    assert FewRows(inputs)(np.empty((0, len(NAMES)))).shape == (0, inputs.num_inputs)


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


def test_the_numbers_of_a_row_do_not_depend_on_how_many_rows_there_are():
    inputs = _fitted(bins=8)
    table = PiecewiseTable(inputs, torch.randn(1, inputs.num_inputs, 24, generator=torch.Generator().manual_seed(3)))
    values = _values(200, seed=4)
    together = table(values)[0]
    for start, rows in ((0, 1), (7, 5), (3, 8), (11, 16), (1, 33), (60, 100)):
        assert torch.equal(table(values[start : start + rows])[0], together[start : start + rows])


@pytest.mark.parametrize("bins", [0, 1, 4, 8])
@pytest.mark.parametrize("members", [1, 3])
def test_a_table_is_the_linear_layers_it_was_made_of(bins, members):
    inputs = _fitted(bins)
    weight_KIO = torch.randn(members, inputs.num_inputs, 5, generator=torch.Generator().manual_seed(3))
    plain_NI = inputs(torch.from_numpy(_asked())).double()
    table = PiecewiseTable(inputs, weight_KIO)(_asked())
    assert len(table) == members
    for member, found in enumerate(table):
        expected = plain_NI @ weight_KIO[member].double()
        assert (found.double() - expected).abs().max() <= 2e-5  # of sums up to some twenty
        assert expected.abs().max() > 5


def test_a_corner_itself_belongs_to_both_its_sides():
    inputs = _fitted(bins=4)
    weight_KIO = torch.randn(1, inputs.num_inputs, 3, generator=torch.Generator().manual_seed(3))
    scaled = inputs.bin_start_ZB[0, 2:3] / inputs.scale_Z[0] + inputs.mean_Z[0]
    values = np.zeros((3, len(NAMES)))
    values[:, 0] = np.expm1(scaled.item()) + np.array([-1e-4, 0.0, 1e-4])
    expected = inputs(torch.from_numpy(values)) @ weight_KIO[0]
    torch.testing.assert_close(PiecewiseTable(inputs, weight_KIO)(values)[0], expected, rtol=0, atol=5e-6)


def test_no_rows_give_no_rows():
    inputs = _fitted(bins=4)
    assert PiecewiseTable(inputs, torch.ones(2, inputs.num_inputs, 3))(np.empty((0, len(NAMES))))[1].shape == (0, 3)
