"""Each scorer on sets small enough to work out, or against a slow and obvious version of itself."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from models_ml.benchmark import blend, directed, learned, protocol
from models_ml.benchmark.directed import Directed, DirectedConfig
from models_ml.benchmark.linear import Linear, LinearConfig
from models_ml.benchmark.popular import Popular
from models_ml.benchmark.transformer import Transformer, TransformerConfig, rotated, rotations
from tests.models_ml.benchmark.conftest import of_lists
from warehouse.errors import HeadraceError


def test_directed_scores_by_hand():
    # pairs of 0 1 2: (0,1) 1, (1,2) 1, (0,2) 0.5; every support is 1 but item 0's, which is 2
    model = Directed(of_lists([[0, 1, 2], [0]], 3), DirectedConfig(window=5, decay=0.5, seed_decay=0.5))
    scores = model.scores(of_lists([[0, 1]], 3), np.array([0]))
    assert scores[0] == pytest.approx([0, 0.5 / 2**0.5, 0.5 * 0.5 / 2**0.5 + 1])


def test_the_chosen_directed_config_is_no_worse_on_validation_than_the_floors(round_and_round):
    validation, _ = protocol.split(round_and_round)
    values = [
        protocol.figures(protocol.places_of(Directed(validation.histories, config), validation))["ndcg@10"]
        for config in (directed.choose(validation), DirectedConfig())
    ]
    assert values[0] >= values[1]


def test_linear_weights_solve_the_ridge_regression(round_and_round):
    config = LinearConfig(window=2, decay=0.5, ridge=3.0)
    past, following = [], []
    for user in range(round_and_round.num_users):
        items = round_and_round.of(user)
        for place in range(1, len(items)):
            row = np.zeros(40)
            for since in range(min(2, place)):
                row[items[place - 1 - since]] += 0.5**since
            past.append(row)
            following.append(np.eye(40)[items[place]])
    x, y = np.array(past), np.array(following)
    expected = np.linalg.solve(x.T @ x + 3 * np.eye(40), x.T @ y)
    scores = Linear(round_and_round, replace(config, seed_decay=1.0)).scores(of_lists([[7]], 40), np.array([0]))
    np.testing.assert_allclose(scores[0], expected[7], atol=1e-5)


def test_popular_counts():
    assert Popular(of_lists([[0, 1, 1], [2, 1]], 4)).scores(of_lists([[0]], 4), np.array([0])).tolist() == [[1, 3, 1, 0]]


def test_items_that_follow_one_another_start_near_one_another(round_and_round):
    vectors_ID = learned.count_vectors(round_and_round, 8)
    assert np.linalg.norm(vectors_ID, axis=1) == pytest.approx(np.ones(40), abs=1e-5)
    near, far = ((vectors_ID * np.roll(vectors_ID, -steps, axis=0)).sum(1).mean() for steps in (1, 20))
    assert near > far + 0.5


def test_a_batch_holds_every_successor_once_also_of_sequences_longer_than_the_window(round_and_round):
    lists = [[*range(17)], [3, 4], [5]]
    sequences = of_lists(lists, 20)
    for epoch in range(3):
        pairs = []
        for rows_BL, asked_T, target_T in learned.batches(sequences, 5, 12, np.random.default_rng(epoch)):
            assert rows_BL.shape[1] <= 5
            assert rows_BL.numel() <= 12
            assert torch.equal((rows_BL > 0).flatten().nonzero().squeeze(1), asked_T)
            pairs += zip((rows_BL.flatten()[asked_T] - 1).tolist(), target_T.tolist(), strict=True)
        assert sorted(pairs) == sorted([(item, item + 1) for item in range(16)] + [(3, 4)])


def test_a_place_knows_nothing_of_what_comes_after_it():
    torch.manual_seed(0)
    network = Transformer(30, TransformerConfig(length=8, width=16)).eval()
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    rows_BL = torch.randint(1, 31, (2, 8))
    other_BL = rows_BL.clone()
    other_BL[:, 5:] = torch.randint(1, 31, (2, 3))
    with torch.inference_mode():
        torch.testing.assert_close(network(rows_BL)[:, :5], network(other_BL)[:, :5])
        assert not torch.allclose(network(rows_BL)[:, 5:], network(other_BL)[:, 5:])


def test_rotary_products_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 12, 8)
    table = rotations(12, 8)
    products = rotated(query, table)[0, 0] @ rotated(key, table)[0, 0].T
    torch.testing.assert_close(products[3, 1], products[11, 9])
    assert abs(products[3, 1] - products[3, 3]) > 1e-4


def test_the_sampled_softmax_is_near_the_full_one_when_most_items_are_drawn():
    torch.manual_seed(0)
    network = Transformer(40, TransformerConfig(length=4, width=16, temperature=1.0)).eval()
    sampled = Transformer(40, TransformerConfig(length=4, width=16, temperature=1.0, sampled=20_000)).eval()
    sampled.load_state_dict(network.state_dict())
    rows_BL, asked_T, target_T = torch.tensor([[1, 2, 3, 0]]), torch.arange(3), torch.tensor([1, 2, 9])
    losses = [model.loss(rows_BL, asked_T, target_T, torch.Generator().manual_seed(0)).item() for model in (network, sampled)]
    assert losses[1] == pytest.approx(losses[0], abs=0.03)


def trained(round_and_round, checkpoint=None, epochs=12, seed=0, stop_after=None):
    validation, test = protocol.split(round_and_round)
    config = learned.settings(validation.histories)
    network = replace(config.network, width=16, length=8, dropout=0.1)
    config = replace(config, network=network, places=256, epochs=epochs, warm_up_steps=5, learning_rate=0.01, patience=100)
    told = []

    def progress(line: str) -> None:
        told.append(line)
        if stop_after is not None and len(told) == stop_after:
            raise KeyboardInterrupt

    return learned.train(validation, config, seed, progress, checkpoint), test


def test_the_transformer_learns_what_follows_what(round_and_round):
    model, test = trained(round_and_round, epochs=3)
    validation, _ = protocol.split(round_and_round)
    by_count = protocol.figures(protocol.places_of(Popular(validation.histories), test))["hr@10"]
    assert protocol.figures(protocol.places_of(model, test))["hr@10"] > max(0.6, by_count)


def test_a_training_that_was_cut_off_ends_as_one_that_was_not(round_and_round, tmp_path):
    whole, test = trained(round_and_round, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        trained(round_and_round, tmp_path / "state.pt", epochs=3, stop_after=2)
    resumed, _ = trained(round_and_round, tmp_path / "state.pt", epochs=3)
    some = test.users_Q[:10]
    np.testing.assert_array_equal(resumed.scores(test.histories, some), whole.scores(test.histories, some))


def test_a_training_with_little_time_ends_when_it_is_up(round_and_round):
    validation, _ = protocol.split(round_and_round)
    config = learned.changed(
        learned.settings(validation.histories), ["seconds=0.5", "width=16", "epochs=100000", "patience=9999"]
    )
    started, told = time.monotonic(), []
    learned.train(validation, config, 0, told.append)
    assert time.monotonic() - started < 10
    assert told[-1].startswith("epoch ")


def test_the_rate_falls_to_a_twentieth():
    assert [learned.falling(share) for share in (0.0, 0.5, 1.0, 7.0)] == pytest.approx([1.0, 0.525, 0.05, 0.05])


def test_settings_are_changed_by_name(round_and_round):
    config = learned.changed(learned.settings(round_and_round, large=True), ["layers=3", "learning_rate=0.004"])
    assert (config.network.layers, config.learning_rate) == (3, 0.004)
    for word, wrong in (
        ("depth=3", "is not a setting; they are"),
        ("layers=two", "takes a whole number"),
        ("width=30", "must be a multiple of twice heads"),
    ):
        with pytest.raises(HeadraceError, match=wrong):
            learned.changed(config, [word])


def test_a_member_that_does_not_help_has_no_weight(round_and_round):
    validation, _ = protocol.split(round_and_round)

    class Knows:
        def __init__(self, share: float):
            self.right = np.random.default_rng(0).random(len(validation.users_Q)) < share

        def scores(self, histories, users_Q):
            scores_QI = np.random.default_rng(users_Q).random((len(users_Q), 40)).astype(np.float32)
            place = np.searchsorted(validation.users_Q, users_Q)
            scores_QI[np.arange(len(users_Q)), validation.targets_Q[place]] += 5 * self.right[place]
            return scores_QI

    weights = blend.choose_weights({"none": Knows(0.0), "half": Knows(0.5), "all": Knows(1.0)}, validation)
    assert weights == {"none": 0.0, "half": 0.0, "all": 1.0}
