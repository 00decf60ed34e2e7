"""Tables split by rows over ranks learn what whole ones do, and their checkpoints are of any number of ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models_ml.trainer.checkpoints import Checkpoints
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.ranks import ranks_of_environment
from models_ml.trainer.rows import ArraySource, Rows
from models_ml.trainer.settings import Plan, TrainerSettings
from models_ml.trainer.sharded import RowShardedEmbedding
from tests.models_ml.trainer.test_kill import forked

NUM_WORDS, NUM_ROWS = 61, 300
SETTINGS = TrainerSettings(checkpoint_every=3, shard_rows=50, validation_share=0.2, validate_every=4)
PLAN = Plan(epochs=2, batch_size=32, learning_rate=0.05)


class WordsObjective(nn.Module):
    """Whether a candidate's word is liked; word 0 is padding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, 4, padding_idx=0)
        self.kinds = nn.Embedding(5, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, batch):
        word_N = batch["word"]
        logits = self.last(self.words(word_N) + self.kinds(word_N % 5)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["liked"], reduction="sum")


def source() -> ArraySource:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 5, NUM_ROWS))])
    word = rng.integers(0, NUM_WORDS, offsets[-1])
    columns = {"word": word, "liked": (word % 3 == 0).astype(np.float32)}
    return ArraySource(Rows(np.arange(NUM_ROWS), {}, columns, offsets), "words", 20)


def collate(rows):
    return {name: torch.from_numpy(part) for name, part in rows.per_candidate.items()}


def train(folder: Path, epochs: int = 2, shard_rows: int = 50) -> None:
    torch.manual_seed(0)
    objective = WordsObjective()
    tables = [objective.words.weight, objective.kinds.weight]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": objective.last.parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    sizes = []

    def watch(step, row_ids):
        sizes.append(objective.words.weight.shape[0])
        if epochs == 1 and step == 7:  # the checkpoint of step 6 is the last
            raise InterruptedError

    with ranks_of_environment(60.0) as ranks:
        run = Run(replace(SETTINGS, shard_rows=shard_rows), ranks, folder / "run", resume=True, watch=watch)
        try:
            fitted = fit(objective, source(), collate, optimizer, PLAN, 0, run)
        except InterruptedError:
            return
        state = {"loss": fitted.validation_loss, "model": objective.state_dict(), "rows": sizes}
        torch.save(state, folder / f"{ranks.size}.{ranks.rank}.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert forked(train, folder) == [0]
    return torch.load(folder / "1.0.pt", weights_only=True)


def agree(one, other) -> bool:
    names = other["model"]
    return all(torch.allclose(one["model"][name], names[name], atol=2e-5) for name in names)


def test_two_ranks_with_half_a_table_each_learn_what_one_does(whole, tmp_path):
    assert forked(train, tmp_path, ranks=2) == [0, 0]
    first, second = (torch.load(tmp_path / f"2.{rank}.pt", weights_only=True) for rank in range(2))
    assert set(whole["rows"]) == {NUM_WORDS}
    assert set(first["rows"]) == set(second["rows"]) == {31}
    assert agree(first, whole)
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in second["model"].items())
    assert first["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert torch.equal(first["model"]["words.weight"][0], torch.zeros(4))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_is_gone_on_from_by_another_number_of_ranks(before, after, whole, tmp_path):
    assert forked(train, tmp_path, 1, ranks=before) == [0] * before
    store = Checkpoints(tmp_path / "run")
    progress, tensors = store.newest(lambda line: None)
    store.close()
    assert progress.step == 6
    assert tensors["model"]["words.weight"].shape == (NUM_WORDS, 4)
    assert tensors["optimizer"]["state"][0]["exp_avg"].shape == (NUM_WORDS, 4)
    assert forked(train, tmp_path, ranks=after) == [0] * after
    assert agree(torch.load(tmp_path / f"{after}.0.pt", weights_only=True), whole)


def look_up(folder: Path) -> None:
    """Codes that differ from rank to rank, in number too; each rank's gradient counts."""
    torch.manual_seed(0)
    table = nn.Embedding(7, 3, padding_idx=0)
    with ranks_of_environment(60.0) as ranks:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks.size,))
        sharded = RowShardedEmbedding(table, mesh)
        codes = [torch.tensor([[6, 0, 3]]), torch.tensor([[3, 5]])][ranks.rank]
        assert torch.equal(sharded(codes), table(codes))
        assert torch.equal(sharded.whole(sharded.weight), table.weight)
        (sharded(codes) * (1 + ranks.rank)).sum().backward()
        gradient = sharded.whole(sharded.weight.grad)
        assert gradient[:, 0].tolist() == [0, 0, 0, 3, 0, 2, 1]
        (folder / str(ranks.rank)).touch()


def test_ranks_look_up_what_they_want_and_their_gradients_meet(tmp_path):
    assert forked(look_up, tmp_path, ranks=2) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
