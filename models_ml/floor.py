"""The floor: gradient-boosted trees (LightGBM) on what the networks read, without ids and sequences. Reported beside them,
never served.

A ranker that does not pass it has learned nothing from its sequence. One model per head, on the point-in-time features as
they are (NULL stays NULL), surface, note type and topic as categories, and the reader's attributes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightgbm
import numpy as np

from models_ml.attributes import AttributeInputs
from models_ml.examples import Examples, distinct


@dataclass(frozen=True)
class FloorConfig:
    """Chosen on the two days before `test_start`, never on the test days. least_rows: per leaf."""

    heads: tuple[str, ...] = ("click", "long_view")
    trees: int = 200
    leaves: int = 31
    learning_rate: float = 0.05
    least_rows: int = 100
    attributes: bool = True


def predict_test(
    examples: Examples, config: FloorConfig, seed: int, progress: Callable[[int, int], None], threads: int = 2
) -> dict[str, np.ndarray]:
    """Trains on the rows before `test_start`; head -> float64 probabilities of the test rows. The same seed gives the same
    values."""
    columns = [examples.values_RF]
    for name in ("surface", "note_type", "note_topic"):
        codes_R = examples.codes(name, distinct(examples.words[name].take(examples.train_rows)))
        columns.append(np.where(codes_R > 0, codes_R - 1, np.nan)[:, None])
    categories = list(range(examples.values_RF.shape[1], examples.values_RF.shape[1] + 3))
    if config.attributes:
        inputs = AttributeInputs.of(examples.users["attributes"].to_pylist())
        columns.append(_by_reader(inputs, examples.user_attributes()))
    inputs_RF = np.concatenate(columns, axis=1)
    train_rows, test_rows = examples.train_rows, examples.test_rows
    parameters = {
        "objective": "binary",
        "learning_rate": config.learning_rate,
        "num_leaves": config.leaves,
        "min_data_in_leaf": config.least_rows,
        "feature_fraction": 0.7,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "lambda_l2": 5.0,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": threads,
        "seed": seed,
        "verbose": -1,
    }
    num_steps, predictions = config.trees * len(config.heads), {}
    for place, head in enumerate(config.heads):
        done = place * config.trees

        def report(environment: lightgbm.callback.CallbackEnv, done: int = done) -> None:
            progress(done + environment.iteration + 1, num_steps)

        data = lightgbm.Dataset(inputs_RF[train_rows], examples.labels[head][train_rows], categorical_feature=categories)
        booster = lightgbm.train(parameters, data, config.trees, callbacks=[report])
        predictions[head] = np.asarray(booster.predict(inputs_RF[test_rows], num_threads=threads))
    return predictions


def _by_reader(inputs: AttributeInputs, attributes: Sequence[str | None]) -> np.ndarray:
    """float32 [R, A]; readers share a row of the encoding."""
    texts, text_of_R = np.unique([text or "" for text in attributes], return_inverse=True)
    return inputs.encode([str(text) for text in texts])[text_of_R]
