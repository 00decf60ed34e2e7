import copy
import errno
import math
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from models_ml.trainer import checkpoints
from models_ml.trainer import fit as fitting
from models_ml.trainer.checkpoints import Checkpoints, Progress
from models_ml.trainer.fit import Run, Stopped, fit
from models_ml.trainer.ranks import device_of, late_rank
from models_ml.trainer.settings import Plan, TrainerSettings
from tests.models_ml.trainer import toy
from warehouse.errors import HeadraceError

PLAN = Plan(epochs=2, batch_size=64, learning_rate=0.01, warm_up=0.1)
SETTINGS = TrainerSettings(checkpoint_every=4)


def train(folder=None, settings=SETTINGS, plan=PLAN, learning_rate=0.01, **run):
    objective, optimizer = toy.toy_and_optimizer(learning_rate)
    fitted = fit(objective, toy.source(), toy.collate, optimizer, plan, 0, Run(settings, folder=folder, **run))
    return objective, fitted


class HaltError(Exception):
    pass


def stop_at(step):
    def watch(now, row_ids):
        if now == step:
            raise HaltError

    return watch


def same(one, other):
    return all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_each_row_is_seen_once_an_epoch_and_the_loss_falls():
    objective, fitted = train()
    assert objective.seen_R.tolist() == [2] * toy.NUM_ROWS
    assert (fitted.steps, fitted.rows) == (22, 1400)
    assert fitted.loss < math.log(2)


@pytest.mark.parametrize("step", [1, 4, 10, 11, 12, 21])
def test_a_run_cut_off_and_resumed_has_the_weights_of_one_that_was_not(step, tmp_path):
    whole, _ = train()
    with pytest.raises(HaltError):
        train(tmp_path, watch=stop_at(step))
    resumed, fitted = train(tmp_path, resume=True)
    assert same(resumed, whole)
    assert fitted.rows == 1400
    assert resumed.seen_R.tolist() == [2] * toy.NUM_ROWS


def test_asked_to_stop_it_saves_and_says_how_to_go_on(tmp_path):
    whole, _ = train()

    def ask(step, row_ids):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=r"after step 7 of 22: it is saved; go on with --resume"):
        train(tmp_path, watch=ask)
    said = []
    resumed, _ = train(tmp_path, resume=True, say=said.append)
    assert said == ["resumed at step 7 of 22, 448 rows consumed"]
    assert same(resumed, whole)


def test_without_resume_it_begins_again(tmp_path):
    with pytest.raises(HaltError):
        train(tmp_path, watch=stop_at(9))
    objective, _ = train(tmp_path)
    assert objective.seen_R.tolist() == [2] * toy.NUM_ROWS


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    with pytest.raises(HaltError):
        train(tmp_path, watch=stop_at(9))
    with pytest.raises(HeadraceError, match=r"step 8 was made with other settings or rows: batch_size was 64, is 32"):
        train(tmp_path, plan=replace(PLAN, batch_size=32), resume=True)


def test_parts_of_a_step_add_up_to_the_step():
    plan = replace(PLAN, epochs=1)
    objective, optimizer = toy.toy_and_optimizer()
    objective.network[1].p = 0.0
    parts = copy.deepcopy(objective)
    fit(objective, toy.source(), toy.collate, optimizer, plan, 0, Run())
    own = torch.optim.AdamW(parts.parameters(), lr=0.01)
    fit(parts, toy.source(), toy.collate, own, plan, 0, Run(TrainerSettings(accumulate=3)))
    for name, tensor in objective.state_dict().items():
        assert torch.allclose(parts.state_dict()[name].float(), tensor.float(), atol=2e-5), name


def test_gradients_are_clipped_together():
    _, clipped = train(settings=replace(SETTINGS, clip_norm=1e-6), plan=replace(PLAN, epochs=1))
    assert clipped.loss > 0.4  # AdamW divides the scale out again, so weights move; the norm is what is bounded
    objective, optimizer = toy.toy_and_optimizer()
    norms = []
    step = optimizer.step

    def watched():
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in objective.parameters()])))
        step()

    optimizer.step = watched
    fit(objective, toy.source(), toy.collate, optimizer, replace(PLAN, epochs=1), 0, Run(replace(SETTINGS, clip_norm=0.05)))
    assert max(norms) <= 0.0501


def test_bf16_trains_as_well_and_keeps_fp32_weights():
    objective, fitted = train(settings=replace(SETTINGS, precision="bf16"))
    assert fitted.loss == pytest.approx(train()[1].loss, abs=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in objective.parameters())


def test_the_rate_rises_then_falls_to_nothing():
    rates = [fitting.learning_rate(step, 100, Plan(1, 1, 1.0, warm_up=0.1)) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1.0
    assert rates[-1] < 1e-3


def test_early_stopping_ends_with_the_best_weights(tmp_path):
    settings = replace(SETTINGS, validation_share=0.2, validate_every=2, patience=2)
    objective, fitted = train(tmp_path, settings, replace(PLAN, epochs=60, learning_rate=0.5), 0.5)
    assert fitted.stopped_early
    assert fitted.steps < 60 * 9
    best = torch.load(tmp_path / "best" / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(objective.state_dict()[name], tensor) for name, tensor in best.items())


def test_a_loss_that_is_no_number_ends_the_run_and_the_last_checkpoint_is_whole(tmp_path):
    def poison(rows):
        batch = toy.collate(rows)
        return {**batch, "inputs": batch["inputs"] * (math.inf if 650 in rows.row_id else 1.0)}

    objective, optimizer = toy.toy_and_optimizer()
    plan = replace(PLAN, batch_size=16)
    with pytest.raises(HeadraceError, match=r"the loss of step \d+ is nan.* Lower learning_rate or clip_norm"):
        fit(objective, toy.source(), poison, optimizer, plan, 0, Run(SETTINGS, folder=tmp_path))
    assert all(torch.isfinite(parameter).all() for parameter in objective.parameters())
    with_folder = Checkpoints(tmp_path)
    found = with_folder.newest(lambda line: None)
    with_folder.close()
    assert found is None or found[0].step % 4 == 0


def test_losses_read_late_are_the_same_and_one_that_is_no_number_is_told_of_its_own_step(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(fitting, "_READ_AFTER", {"cpu": 1})
    at_once, first = train()
    monkeypatch.setattr(fitting, "_READ_AFTER", {"cpu": 5})
    late, second = train(tmp_path / "late")
    assert same(late, at_once)
    assert second.loss == first.loss

    def poison(rows):
        told.append(rows.row_id)
        batch = toy.collate(rows)
        return {**batch, "inputs": batch["inputs"] * (math.nan if len(told) == 6 else 1.0)}

    objective, optimizer = toy.toy_and_optimizer()
    with pytest.raises(HeadraceError, match=r"the loss of step 6 is nan.*rows 320 to 384 .*step 4 is from before it and whole"):
        fit(objective, toy.source(), poison, optimizer, PLAN, 0, Run(SETTINGS, folder=tmp_path / "poisoned"))


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_whole(tmp_path, monkeypatch):
    write, names = checkpoints.write_durably, []

    def full(path, content):
        names.append(path.parent.name)
        if len(set(names)) > 2:
            path.write_bytes(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_durably", full)
    message = r"step-0000000012 cannot be written .*: no space is left on the disk; the last whole one is step-0000000008"
    with pytest.raises(HeadraceError, match=message):
        train(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".draft-*"))
    resumed, _ = train(tmp_path, resume=True)
    assert same(resumed, train()[0])


def test_the_best_checkpoint_stays_until_the_next_best_is_whole(tmp_path, monkeypatch):
    kept, write = Checkpoints(tmp_path), checkpoints.write_durably
    kept.save(Progress(step=1), {"weight": torch.ones(1)}, best=True)
    kept.wait()

    def torn(path, content):
        if path.parent.name == ".draft-best-0000000002":
            raise OSError(errno.EIO, "Input/output error")
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_durably", torn)
    kept.save(Progress(step=2), {"weight": torch.zeros(1)}, best=True)
    with pytest.raises(HeadraceError, match="step-0000000002 cannot be written"):
        kept.wait()
    assert kept.read("best")[0].step == 1
    monkeypatch.undo()
    for _ in range(2):  # a resumed run may come to the same step again
        kept.save(Progress(step=2), {"weight": torch.zeros(1)}, best=True)
        kept.wait()
        assert kept.read("best")[0].step == 2
    assert [entry.name for entry in tmp_path.glob("best-*")] == ["best-0000000002"]
    kept.clear()
    assert not kept.has("best")
    kept.close()


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path):
    with pytest.raises(HaltError):
        train(tmp_path, watch=stop_at(14))
    path = tmp_path / "step-0000000012" / "state.pt"
    path.write_bytes(path.read_bytes()[:-50] + b"x" * 50)
    said = []
    resumed, _ = train(tmp_path, resume=True, say=said.append)
    assert "step-0000000012" in said[0]
    assert "is damaged" in said[0]
    assert said[1].startswith("resumed at step 8 ")
    assert same(resumed, train()[0])


def test_a_checkpoint_is_read_without_unpickling_objects(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(Progress(step=1), {"model": {"x": torch.ones(1)}, "bad": threading.Event})
    store.wait()
    with pytest.raises(Exception, match=r"weights_only|Unsupported global"):
        store.read("step-0000000001")
    store.close()


def test_one_folder_is_for_one_run(tmp_path):
    store = Checkpoints(tmp_path)
    with pytest.raises(HeadraceError, match="another process trains in"):
        Checkpoints(tmp_path)
    store.close()
    Checkpoints(tmp_path).close()


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(tmp_path, replace(SETTINGS, checkpoint_every=1, keep=3))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:010d}" for step in (20, 21, 22)]


def test_what_cannot_be_exported_is_not_trained(tmp_path):
    def refuse(objective):
        raise HeadraceError("cannot be exported")

    steps = []
    with pytest.raises(HeadraceError, match="cannot be exported"):
        train(before=refuse, watch=lambda step, rows: steps.append(step))
    assert not steps


def test_a_late_rank_is_named_and_an_even_field_is_not():
    assert late_rank(np.array([0.1, 0.1, 0.5])) == 2
    assert late_rank(np.array([0.1, 0.12])) is None
    assert late_rank(np.array([0.001, 0.004])) is None
    assert late_rank(np.array([0.3])) is None


def test_ranks_have_a_gpu_each_or_none_has_one():
    assert [str(device_of(local, 2, num_gpus=2)) for local in range(2)] == ["cuda:0", "cuda:1"]
    assert [str(device_of(local, 2, num_gpus=1)) for local in range(2)] == ["cpu", "cpu"]
