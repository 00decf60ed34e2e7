from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models_ml import examples
from models_ml.examples import Examples
from tests.models_ml.synthetic import write_export


@pytest.fixture(scope="session")
def export(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def loaded(export) -> Examples:
    return examples.load(export)


@pytest.fixture(scope="session")
def other_future(loaded) -> Examples:
    """The same past, another future: every feature, label and click list of the test rows is different."""
    rng = np.random.default_rng(1)
    rows = loaded.test_rows
    values_RF, labels = loaded.values_RF.copy(), {}
    values_RF[rows] = rng.random((len(rows), values_RF.shape[1])) * 1e6
    for name, label_R in loaded.labels.items():
        labels[name] = label_R.copy()
        labels[name][rows] = 1 - label_R[rows]
    return replace(loaded, values_RF=values_RF, labels=labels)
