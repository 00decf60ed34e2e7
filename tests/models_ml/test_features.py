import numpy as np
import pytest
import torch

from models_ml.attributes import AttributeInputs
from models_ml.features import STRENGTHS, FeatureInputs

NAMES = ("note_num_clicks_7d", "note_num_views_7d", "note_ctr_7d")


@pytest.fixture
def inputs() -> FeatureInputs:
    return FeatureInputs(NAMES).fit(np.array([[2.0, 8.0, 0.25], [0.0, 0.0, np.nan], [4.0, 4.0, 1.0]]))


def test_counts_are_logged_and_standardised_over_training_rows(inputs):
    logged = np.log1p([2.0, 0.0, 4.0])
    out = inputs(torch.tensor([[2.0, 8.0, 0.25]], dtype=torch.float64))
    assert out[0, 0].item() == pytest.approx((logged[0] - logged.mean()) / logged.std(), rel=1e-5)


def test_null_becomes_the_mean_and_a_mask(inputs):
    known, null = inputs(torch.tensor([[1.0, 2.0, 0.625], [1.0, 2.0, float("nan")]]))
    assert null[2].item() == 0.0
    assert known[2].item() == pytest.approx(0.0, abs=1e-6)  # 0.625 is the mean of the known 0.25 and 1
    masks = slice(3 + len(STRENGTHS), 6 + len(STRENGTHS))
    assert known[masks].tolist() == [0.0, 0.0, 0.0]
    assert null[masks].tolist() == [0.0, 0.0, 1.0]


def test_rates_are_shrunk_towards_the_training_prior(inputs):
    # prior = 6 clicks / 12 views; 2 clicks of 8 views with strength 3: (2 + 1.5) / (8 + 3)
    assert inputs.prior_P.tolist() == [0.5]
    shaped = inputs._unscaled(torch.tensor([[2.0, 8.0, 0.25], [0.0, 0.0, float("nan")]]))
    assert shaped[0, 3].item() == pytest.approx(3.5 / 11)
    assert shaped[1, 3:].tolist() == [0.5, 0.5]


def test_bins_code_a_value_piecewise_linearly():
    values = np.linspace(0, 1, 101)[:, None]
    inputs = FeatureInputs(("note_ctr_1d",), bins=4).fit(values)
    coded = inputs(torch.tensor([[0.625], [-1.0], [2.0]]))[:, 2:]
    assert coded[0].tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0], abs=1e-4)
    assert coded[1].tolist() == [0.0] * 4
    assert coded[2].tolist() == pytest.approx([1.0] * 4, abs=1e-5)


def test_a_feature_that_is_always_null_or_constant_is_zero():
    inputs = FeatureInputs(("note_ctr_1d", "note_num_views_1d"), bins=3).fit(np.array([[np.nan, 5.0], [np.nan, 5.0]]))
    out = inputs(torch.tensor([[float("nan"), 5.0], [0.3, 900.0]]))
    assert torch.isfinite(out).all()
    assert out[:, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_wild_values_stay_in_range(inputs):
    out = inputs(torch.tensor([[1e15, -5.0, 1e9]], dtype=torch.float64))
    assert torch.isfinite(out).all()
    assert out.abs().max() <= 6.0


def test_attributes_shared_by_too_few_readers_have_no_column():
    inputs = AttributeInputs.of(['{"plan": "a", "id": 1}', '{"plan": "a", "id": 2}', '{"plan": null}', None], least_readers=2)
    assert inputs.words == ["plan=a"]
    assert inputs.encode(['{"plan": "a"}', '{"plan": "z"}', None]).tolist() == [[1.0], [0.0], [0.0]]
