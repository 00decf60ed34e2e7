"""A small objective whose buffer counts, row by row, what the weights have seen: part of the model, so part of a checkpoint."""

import numpy as np
import torch
from torch import Tensor, nn

from models_ml.trainer.rows import ArraySource, Rows

NUM_ROWS = 700


def rows(num_rows: int = NUM_ROWS) -> Rows:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, num_rows)
    counts[0] = 40
    offsets = np.concatenate([[0], np.cumsum(counts)])
    inputs = rng.normal(size=(offsets[-1], 6)).astype(np.float32)
    target = (inputs.sum(1) > 0).astype(np.float32)
    return Rows(np.arange(num_rows), {"row_id": np.arange(num_rows)}, {"inputs": inputs, "target": target}, offsets)


def source(group_size: int = 32) -> ArraySource:
    return ArraySource(rows(), "toy", group_size)


def collate(part: Rows) -> dict[str, Tensor]:
    return {
        "row_id": torch.from_numpy(part.per_row["row_id"]),
        "inputs": torch.from_numpy(part.per_candidate["inputs"]),
        "target": torch.from_numpy(part.per_candidate["target"]),
    }


class Toy(nn.Module):
    seen_R: Tensor

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))
        self.register_buffer("seen_R", torch.zeros(NUM_ROWS, dtype=torch.int64))

    def forward(self, batch) -> Tensor:
        if self.training:
            self.seen_R.index_add_(0, batch["row_id"], torch.ones_like(batch["row_id"]))
        logits = self.network(batch["inputs"]).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["target"], reduction="sum")


def toy_and_optimizer(learning_rate: float = 0.01) -> tuple[Toy, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = Toy()
    return toy, torch.optim.AdamW(toy.parameters(), lr=learning_rate)
