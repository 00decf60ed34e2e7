"""The loop on a GPU: `python -m pytest tests/models_ml/trainer/test_fit_on_a_gpu.py` where there is one."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from models_ml.trainer.fit import Run, fit
from models_ml.trainer.ranks import ALONE, Ranks, ranks_of_environment
from models_ml.trainer.settings import Plan, TrainerSettings
from tests.models_ml.trainer import toy
from warehouse.errors import HeadraceError

# NCCL and the compiler warn of what they would do on other machines
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore"),
]
PLAN = Plan(epochs=2, batch_size=64, learning_rate=0.01, warm_up=0.1)
SETTINGS = TrainerSettings(checkpoint_every=4)
ON_GPU = Ranks(0, 1, torch.device("cuda", 0), 60.0)


def train(ranks, settings=SETTINGS, folder=None, resume=False, collate=toy.collate):
    objective, optimizer = toy.toy_and_optimizer()
    objective.network[1].p = 0.0  # a GPU drops others than a CPU does
    return objective, fit(objective, toy.source(), collate, optimizer, PLAN, 0, Run(settings, ranks, folder, resume))


def test_it_learns_what_a_cpu_does_and_the_same_twice():
    on_cpu, _ = train(ALONE)
    objective, _ = train(ON_GPU)
    again, _ = train(ON_GPU)
    assert objective.seen_R.tolist() == [2] * toy.NUM_ROWS
    for name, tensor in on_cpu.state_dict().items():
        torch.testing.assert_close(objective.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
        assert torch.equal(objective.state_dict()[name], again.state_dict()[name])


def test_bf16_and_compiled_it_learns_as_well():
    loss = train(ON_GPU)[1].loss
    for settings in (replace(SETTINGS, precision="bf16"), replace(SETTINGS, precision="bf16", compiled=True)):
        assert train(ON_GPU, settings)[1].loss == pytest.approx(loss, abs=0.01)


def test_a_checkpoint_is_from_before_a_loss_that_is_no_number(tmp_path):
    made = []

    def poison(rows):
        made.append(rows)
        batch = toy.collate(rows)
        return {**batch, "inputs": batch["inputs"] * (math.nan if len(made) == 6 else 1.0)}

    with pytest.raises(HeadraceError, match=r"the loss of step 6 is nan.*step 4 is from before it and whole"):
        train(ON_GPU, folder=tmp_path, collate=poison)
    [state] = tmp_path.glob("step-*/state.json")
    assert json.loads(state.read_bytes())["step"] == 4


def test_a_group_of_one_rank_goes_over_nccl(monkeypatch):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    for name, value in (variables | {"HEADRACE_DEVICE": "cuda"}).items():
        monkeypatch.setitem(os.environ, name, value)
    alone, _ = train(ON_GPU)
    with ranks_of_environment(60.0) as ranks:
        assert dist.get_backend() == "nccl"
        assert isinstance(ranks.wrap(torch.nn.Linear(1, 1).to(ranks.device)), DistributedDataParallel)
        group, _ = train(ranks)
    assert all(torch.equal(group.state_dict()[name], tensor) for name, tensor in alone.state_dict().items())
