import math

import numpy as np
import pytest

from models_ml.benchmark import protocol
from models_ml.benchmark.protocol import Question
from tests.models_ml.benchmark.conftest import of_lists


def test_the_last_item_is_the_test_and_the_one_before_it_validation():
    validation, test = protocol.split(of_lists([[0, 1, 2, 3], [4, 0], [2, 1, 0]], 5))
    assert test.users_Q.tolist() == [0, 2]
    assert (validation.targets_Q.tolist(), test.targets_Q.tolist()) == ([2, 1], [3, 0])
    assert [validation.histories.of(user).tolist() for user in range(3)] == [[0, 1], [4, 0], [2]]
    assert [test.histories.of(user).tolist() for user in range(3)] == [[0, 1, 2], [4, 0], [2, 1]]


def test_items_of_the_history_are_not_ranked():
    question = Question(of_lists([[0, 1]], 4), np.array([0]), np.array([3]))
    assert protocol.places(np.array([[9.0, 8.0, 1.0, 2.0]]), question).tolist() == [0]
    assert protocol.places(np.array([[9.0, 8.0, 7.0, 2.0]]), question).tolist() == [1]


def test_a_tied_item_stands_before_the_target():
    question = Question(of_lists([[0]], 4), np.array([0]), np.array([3]))
    assert protocol.places(np.full((1, 4), 0.5), question).tolist() == [2]


def test_a_target_that_the_history_holds_is_a_miss():
    question = Question(of_lists([[0, 3]], 4), np.array([0]), np.array([3]))
    found = protocol.places(np.array([[0.0, 0.0, 0.0, 1.0]]), question)
    assert protocol.figures(found + 100)["hr@20"] == 0.0
    assert found.tolist() == [4]


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        protocol.places(np.array([[0.0, np.nan]]), Question(of_lists([[0]], 2), np.array([0]), np.array([1])))


def test_figures_by_hand():
    # places 0, 2, 10: the third is within 20 only
    found = protocol.figures(np.array([0, 2, 10]))
    assert found["hr@10"] == pytest.approx(2 / 3)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert found["hr@20"] == 1.0
