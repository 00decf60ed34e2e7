"""Each network trained, and asked, in bf16 (autocast on a CPU) keeps 99 % of its metric in fp32: MLPerf's rule."""

import pytest
import torch

from models_ml import l1, l2, metrics, two_tower
from models_ml.evaluation import RetrievalQueries
from models_ml.l1 import L1Config
from models_ml.l2_network import L2Config
from models_ml.trainer.fit import Run
from models_ml.trainer.settings import TrainerSettings
from models_ml.two_tower import TwoTowerConfig

CONFIGS = {
    "two_tower": (two_tower, TwoTowerConfig(width=16, history_length=10, epochs=2, batch_size=128)),
    "l1": (l1, L1Config(hidden=16, epochs=4, batch_size=256)),
    "l2": (l2, L2Config(history_length=10, width=8, hidden=32, members=2, bins=4, epochs=2, batch_size=256)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_keeps_99_percent_of_the_metric(name, loaded):
    room, config = CONFIGS[name]

    def trained(precision):
        run = Run(TrainerSettings(precision=precision))
        return room.train(loaded, config, 0, lambda done, total: None, run=run)

    def metric(model):
        if name == "two_tower":
            return RetrievalQueries(loaded, num_samples=0).two_tower(model)["recall@50"]
        clicks = loaded.labels["click"][loaded.test_rows]
        return metrics.auc(clicks, model.score_rows(loaded, loaded.test_rows)["click"])

    reference, reduced = trained("fp32"), trained("bf16")
    assert reduced.to_files() != reference.to_files()  # the switch does something
    assert all(weight.dtype == torch.float32 for weight in reduced.network.parameters())
    exact = metric(reference)
    assert metric(reduced) >= 0.99 * exact
    with torch.autocast("cpu", torch.bfloat16):
        assert metric(reference) >= 0.99 * exact
