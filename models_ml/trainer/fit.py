"""The loop: from rows and an objective to trained weights, resumable at any moment, the same on one rank or several.

An objective is a module whose forward takes a batch as collated and returns the loss summed over its candidates. Every step
is a pure function of the weights before it, the rows of its positions and (seed, step, rank), so a run that was killed and
resumed ends, on a CPU, with the bits of one that was not.

A GPU is not waited for: its losses are read some steps late, and always before anything is saved or judged.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models_ml.seeding import deterministic
from models_ml.trainer.checkpoints import BEST, Checkpoints, Progress
from models_ml.trainer.loader import Batch, Loader, Place
from models_ml.trainer.ranks import ALONE, Ranks, late_rank
from models_ml.trainer.rows import Rows, Source, split_off_the_end
from models_ml.trainer.settings import Plan, TrainerSettings
from models_ml.trainer.sharded import ShardedTables
from models_ml.trainer.speed import Speed
from warehouse.errors import HeadraceError

Collate = Callable[[Rows], Mapping[str, Tensor]]


class Stopped(HeadraceError):  # noqa: N818  (being asked to stop is no error)
    """Asked to stop (SIGTERM), and the checkpoint is on the disk."""


@dataclass(frozen=True)
class Run:
    """Where and how one training runs. folder: of the checkpoints; None keeps none. progress: (steps done, steps in all).
    say: one line for a person. watch: (step, ids of this rank's rows) of every step, before its weights change. measure: work
    out the MFU at the end. before: called with the objective before the first step; what it raises ends the run."""

    settings: TrainerSettings = field(default_factory=TrainerSettings)
    ranks: Ranks = ALONE
    folder: Path | None = None
    resume: bool = False
    progress: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda line: None
    watch: Callable[[int, np.ndarray], None] | None = None
    measure: bool = False
    before: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True)
class Fitted:
    """What a run did. stopped_early: the step of the best validation when patience ran out."""

    steps: int
    rows: int
    loss: float
    rows_per_s: float
    mfu: float | None
    validation_loss: float | None = None
    stopped_early: bool = False


def fit(
    objective: nn.Module, source: Source, collate: Collate, optimizer: torch.optim.Optimizer, plan: Plan, seed: int, run: Run
) -> Fitted:
    """Trains `objective` in place. The parameters of `optimizer` are the objective's.

    Raises HeadraceError for a loss that is not finite (the last checkpoint is from before it), a source that cannot be read, a
    disk that refuses a checkpoint, a rank that does not come, a checkpoint of other settings; Stopped after SIGTERM.
    """
    with deterministic(), contextlib.ExitStack() as closing:
        loop = _Loop(objective, source, collate, optimizer, plan, seed, run)
        closing.callback(loop.close)
        closing.enter_context(_asked_to_stop(loop.stop))
        return loop.run_all()


@dataclass(frozen=True)
class _Taken:
    """A step whose loss and norm may still be on the GPU."""

    step: int
    rows: int
    loss: Tensor
    norm: Tensor


class _Loop:
    def __init__(self, objective, source, collate, optimizer, plan: Plan, seed: int, run: Run):
        self.plan, self.seed, self.run, self.settings, self.ranks = plan, seed, run, run.settings, run.ranks
        self.objective, self.optimizer, self.collate = objective.to(run.ranks.device), optimizer, collate
        self.validation: Source | None = None
        if self.settings.validation_share:
            try:
                source, self.validation = split_off_the_end(source, self.settings.validation_share)
            except ValueError as error:
                raise HeadraceError(f"validation_share {self.settings.validation_share}: {error}") from error
        self.stop = threading.Event()
        place = Place(self.ranks.rank, self.ranks.size)
        cache_bytes = self.settings.cache_mb << 20
        self.loader = Loader(
            source, seed, plan.batch_size, self._parts, place, self.settings.workers, self.settings.prefetch, cache_bytes
        )
        self.num_steps = plan.epochs * self.loader.batches_per_epoch
        settings = asdict(plan) | {name: getattr(self.settings, name) for name in _DECIDING} | {"seed": seed}
        self.state = Progress(fingerprint={**settings, "rows": source.fingerprint})
        self.checkpoints: Checkpoints | None = None
        if run.folder is not None and self.ranks.is_first:
            self.checkpoints = Checkpoints(run.folder, self.settings.keep)
        self.tables = ShardedTables(self.objective, optimizer, self.ranks, self.settings.shard_rows)
        self.speed = Speed(self.ranks.device)
        self._unread: list[_Taken] = []
        self._log_file: Any = None

    def run_all(self) -> Fitted:
        found = self._found_or_cleared()
        self.ranks.same_start([*self.objective.parameters(), *self.objective.buffers()])
        if self.run.before is not None and found is None and self.ranks.is_first:
            self.run.before(self.objective)
        self.tables.split()
        if found is not None:
            self._resume(*found)
        self.module: nn.Module = self.ranks.wrap(self._compiled(), self.tables.names)
        self.module.train()
        seconds, late_said, stopped_early = 0.0, 0, False
        waiting = time.perf_counter()
        for batch in self.loader.iterate(self.state.consumed, self.plan.epochs):
            step = self.state.step
            seconds += time.perf_counter() - waiting  # the wait for rows is this rank's own
            what = f"step {step + 1}"
            heard = self.ranks.tell([batch.rows.num_candidates, float(self.stop.is_set()), seconds], what)
            if heard[:, 1].any():
                self._stop_here()
            if (late := late_rank(heard[:, 2])) is not None and self.ranks.is_first and step - late_said >= _SAY_AGAIN:
                times = heard[late, 2] / max(float(np.median(heard[:, 2])), 1e-9)
                self.run.say(f"rank {late} is late: its step {step} took {heard[late, 2]:.2f} s, {times:.1f} times the median")
                late_said = step
            started = time.perf_counter()
            if self.run.watch is not None:
                self.run.watch(step, batch.rows.row_id)
            candidates = int(heard[:, 0].sum())
            self._step(step, batch, candidates)
            self.state.step, self.state.consumed = step + 1, batch.last
            self.state.metrics["candidates"] = self.state.metrics.get("candidates", 0) + candidates
            seconds = time.perf_counter() - started
            self.run.progress(self.state.step, self.num_steps)
            at_end = self.state.step == self.num_steps
            is_best = False
            if self.validation is not None and (self.state.step % self.settings.validate_every == 0 or at_end):
                is_best, stopped_early = self._validate()
            if self.state.step % self.settings.checkpoint_every == 0 or is_best or at_end or stopped_early:
                self._save(is_best)
            if stopped_early:
                break
            waiting = time.perf_counter()
        return self._finish(stopped_early)

    def _step(self, step: int, batch: Batch, candidates: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.num_steps, self.plan)
        torch.manual_seed(_step_seed(self.seed, step, self.ranks.rank))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.ranks.device, dtype=torch.float64)
        for number, part in enumerate(batch.ready):
            last = number == len(batch.ready) - 1
            with self._quiet(last), self._autocast():
                loss = self.module(self._moved(part)) * (self.ranks.size / max(candidates, 1))
            with self._quiet(last):
                loss.backward()
            total += loss.detach()
        norm = self._clip()
        self._unread.append(_Taken(step, batch.last - batch.first, total, norm))
        if step == 0 or len(self._unread) >= _READ_AFTER[self.ranks.device.type]:
            self._read_losses()
        self.optimizer.step()

    def _clip(self) -> Tensor:
        """The norm of all gradients, before they are cut to `clip_norm`."""
        parameters = list(self.objective.parameters())
        if not self.tables.tables:
            return nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        own = {id(sharded.weight) for sharded in self.tables.tables.values()}
        shared = [one.grad for one in parameters if one.grad is not None and id(one) not in own]
        norm = torch.hypot(nn.utils.get_total_norm(shared), self.tables.norm())
        nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
        return norm

    def _read_losses(self) -> None:
        """Waits for the steps taken so far. Raises HeadraceError for the first whose loss or gradients are not finite."""
        taken, self._unread = self._unread, []
        metrics = self.state.metrics
        for one in taken:
            loss, norm = float(one.loss), float(one.norm)
            if not (math.isfinite(norm) and (math.isfinite(loss) or self.ranks.size > 1)):
                raise HeadraceError(self._not_finite(one.step, loss, norm))
            metrics["loss"] = loss if one.step == 0 else 0.98 * metrics["loss"] + 0.02 * loss
            if self.settings.tensorboard and self.ranks.is_first:
                self._log(one.step, loss)
        if taken:
            self.speed.count(sum(one.rows for one in taken))

    def _compiled(self) -> nn.Module:
        if not self.settings.compiled:
            return self.objective
        return torch.compile(self.objective, dynamic=True)  # type: ignore[return-value]

    def _parts(self, rows: Rows) -> list[Mapping[str, Tensor]]:
        count = self.settings.accumulate
        if count == 1:
            parts = [self.collate(rows)]
        else:
            parts = [self.collate(rows.take(part)) for part in np.array_split(np.arange(len(rows)), count)]
        if self.ranks.device.type == "cpu":
            return parts
        # pinned here, in the thread that makes batches, so that copying them to the GPU makes nobody wait
        return [{name: tensor.pin_memory() for name, tensor in part.items()} for part in parts]

    def _quiet(self, last: bool) -> contextlib.AbstractContextManager:
        """Only the last part of a step adds gradients up over the ranks."""
        return (
            contextlib.nullcontext() if last or not isinstance(self.module, DistributedDataParallel) else self.module.no_sync()
        )

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _moved(self, part: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.ranks.device.type == "cpu":
            return part
        return {name: tensor.to(self.ranks.device, non_blocking=True) for name, tensor in part.items()}

    def _log(self, step: int, loss: float) -> None:
        if self._log_file is None:
            self._log_file = _summary_writer(self.run.folder)
        self._log_file.add_scalar("loss", loss, step + 1)
        self._log_file.add_scalar("learning_rate", learning_rate(step, self.num_steps, self.plan), step + 1)
        self._log_file.add_scalar("rows_per_s", self.speed.rows_per_s, step + 1)

    def _validate(self) -> tuple[bool, bool]:
        """(this is the best so far, patience has run out)"""
        self._read_losses()
        # a split table is read by all ranks or none
        asked = self.ranks.is_first or self.tables.tables
        loss = self.ranks.share(self._validation_loss() if asked else None)
        metrics = self.state.metrics
        is_best = loss < metrics.get("best", math.inf)
        metrics["validation"] = loss
        metrics["since_best"] = 0 if is_best else metrics.get("since_best", 0) + 1
        if is_best:
            metrics["best"] = loss
        return is_best, bool(self.settings.patience) and metrics["since_best"] >= self.settings.patience

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.objective.eval()
        total, candidates = 0.0, 0
        assert self.validation is not None
        for group in range(len(self.validation.group_sizes)):
            rows = self.validation.read(group)
            for places in np.array_split(np.arange(len(rows)), -(-len(rows) // self.plan.batch_size)):
                some = rows.take(places)
                total += float(self.objective(self._moved(self.collate(some))))
                candidates += some.num_candidates
        self.objective.train()
        return total / max(candidates, 1)

    def _found_or_cleared(self) -> tuple[Progress, dict[str, Any]] | None:
        """The checkpoint to go on from, the same on all ranks."""
        found = None
        if self.checkpoints is not None:
            if self.run.resume:
                found = self.checkpoints.newest(self.run.say)
            else:
                self.checkpoints.clear()
        if self.ranks.size > 1:
            found = self.ranks.share(found)
        return found

    def _resume(self, progress: Progress, tensors: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.state.fingerprint))
        differing = [name for name in now if progress.fingerprint.get(name) != now[name]]
        if differing:
            detail = ", ".join(f"{name} was {progress.fingerprint.get(name)}, is {now[name]}" for name in differing)
            raise HeadraceError(f"the checkpoint at step {progress.step} was made with other settings or rows: {detail}; "
                                "train without --resume to begin again")  # fmt: skip
        self.tables.load(tensors["model"], tensors["optimizer"])
        self.state = progress
        self.run.say(f"resumed at step {progress.step} of {self.num_steps}, {progress.consumed:,} rows consumed")

    def _save(self, is_best: bool = False) -> None:
        self._read_losses()
        if self.checkpoints is not None or self.tables.tables:
            state = self.tables.whole_state()
        if self.checkpoints is not None:
            self.checkpoints.save(self.state, state, is_best)

    def _stop_here(self) -> None:
        self._save()
        if self.checkpoints is not None:
            self.checkpoints.wait()
        saved = "nothing is kept of it" if self.run.folder is None else "it is saved; go on with --resume"
        raise Stopped(f"asked to stop after step {self.state.step} of {self.num_steps}: {saved}")

    def _finish(self, stopped_early: bool) -> Fitted:
        self._read_losses()
        self.tables.join()
        metrics = self.state.metrics
        if self.checkpoints is not None:
            self.checkpoints.wait()
            if self.validation is not None and self.checkpoints.has(BEST):
                self.objective.load_state_dict(self.checkpoints.read(BEST)[1]["model"])
        if self.validation is not None:
            self.ranks.same_start([*self.objective.parameters(), *self.objective.buffers()])
        steps, rows, loss = self.state.step, self.state.consumed, metrics.get("loss", math.nan)
        mfu = None
        if self.run.measure and self.ranks.is_first:
            # a whole batch where it costs nothing: with in-batch negatives a row's work grows with it
            some = self.loader.some_rows(64 if self.ranks.device.type == "cpu" else self.plan.batch_size)
            mfu = self.speed.mfu(lambda: self.objective(self._moved(self.collate(some))), len(some))
        self.objective.to("cpu")  # models are published from, and evaluated on, the CPU
        if self.run.measure and self.ranks.is_first:
            share = "" if mfu is None else f", MFU {mfu:.1%} of this machine's measured peak"
            self.run.say(f"{rows:,} rows in {steps} steps: {self.speed.rows_per_s:,.0f} rows/s{share}")
        return Fitted(steps, rows, loss, self.speed.rows_per_s, mfu, metrics.get("best"), stopped_early)

    def _not_finite(self, step: int, loss: float, norm: float) -> str:
        last = "no checkpoint was made before it"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            if (found := self.checkpoints.newest(self.run.say)) is not None:
                last = f"the checkpoint of step {found[0].step} is from before it and whole"
        epoch, batch = divmod(step, self.loader.batches_per_epoch)
        first = epoch * self.loader.num_rows + batch * self.plan.batch_size
        rows = f"rows {first:,} to {first + self.plan.batch_size:,} of the order"
        return (
            f"the loss of step {step + 1} is {loss:g}, the norm of its gradients {norm:g} ({rows}); {last}. "
            "Lower learning_rate or clip_norm, or look for infinite features, and train again"
        )

    def close(self) -> None:
        if self._log_file is not None:
            self._log_file.close()
        if self.checkpoints is not None:
            self.checkpoints.close()


_SAY_AGAIN = 100
_READ_AFTER = {"cpu": 1, "cuda": 16}
"""Steps after which losses are read."""
_DECIDING = ("accumulate", "precision", "clip_norm", "validation_share")
"""Settings that change the weights; ranks, cadence and reading do not."""


def learning_rate(step: int, num_steps: int, plan: Plan) -> float:
    """Of step `step`, counted from 0: linear warm-up, then a cosine that ends at nothing."""
    warm = int(plan.warm_up * num_steps)
    if step < warm:
        return plan.learning_rate * (step + 1) / (warm + 1)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(num_steps - warm, 1)))


def _step_seed(seed: int, step: int, rank: int) -> int:
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) & (2**63 - 1)


@contextlib.contextmanager
def _asked_to_stop(stop: threading.Event) -> Iterator[None]:
    """SIGTERM sets `stop`; only the main thread may listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary_writer(folder: Path | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise HeadraceError("trainer.tensorboard needs TensorBoard: pip install 'headrace[tensorboard]'") from error
    if folder is None:
        raise HeadraceError("trainer.tensorboard needs a folder for the run")
    return SummaryWriter(str(folder / "tensorboard"))
