"""The processes that train together: who they are, what they tell each other each step, and which of them is late.

`torchrun` sets the environment; without it there is one rank and nothing is sent. NCCL where each rank has a GPU, gloo
otherwise. What ranks tell each other always goes over gloo, so that a rank that hangs can be named.
"""

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from warehouse.errors import HeadraceError

LATE_TIMES = 2.0
LATE_SECONDS = 0.05
"""A rank is late when its own work took this many times the median, and this much longer."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank in [0, size) and its device."""

    rank: int
    size: int
    device: torch.device
    timeout_s: float
    words: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrap(self, objective: nn.Module, own: Sequence[str] = ()) -> nn.Module:
        """The module whose backward pass adds up gradients over the ranks, in buckets, while it goes on. own: names of
        parameters that are each rank's own."""
        if self.words is None:
            return objective
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, own)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=ids, **_OWN_BUFFERS)

    def meet(self, what: str) -> None:
        """Waits for all ranks. Raises HeadraceError naming the ones that did not come within `timeout_s`."""
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.words, timedelta(seconds=self.timeout_s), wait_all_ranks=True)
        except RuntimeError as error:
            detail = str(error).strip().splitlines()[0]
            raise HeadraceError(
                f"rank {self.rank} waited {self.timeout_s:g} s for the others at {what}: {detail}; "
                "see that rank's own output, then go on with --resume"
            ) from error

    def tell(self, values: list[float], what: str) -> np.ndarray:
        """float64 [W, len(values)]: every rank's values, in the order of the ranks."""
        if self.size == 1:
            return np.array([values])
        self.meet(what)
        mine = torch.tensor(values, dtype=torch.float64)
        all_WV = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_WV, mine, group=self.words)
        return torch.stack(all_WV).numpy()

    def share(self, value: Any) -> Any:
        """The first rank's value, to all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.words)
        return box[0]

    def same_start(self, tensors: list[Tensor]) -> None:
        """The first rank's tensors, to all."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)  # the graph must not know of it


# buffers are each rank's own; versions of torch have two words for it
_WORDS = inspect.signature(DistributedDataParallel.__init__).parameters
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in _WORDS else "broadcast_buffers": False}
ALONE = Ranks(0, 1, torch.device("cpu"), 0.0)


def late_rank(seconds_W: np.ndarray) -> int | None:
    """The rank whose own work (reading and computing, without waiting) took far longer than the others', or None."""
    if len(seconds_W) < 2:
        return None
    slowest = int(seconds_W.argmax())
    others = float(np.median(np.delete(seconds_W, slowest)))
    is_late = seconds_W[slowest] > LATE_TIMES * others and seconds_W[slowest] > others + LATE_SECONDS
    return slowest if is_late else None


def device_of(local: int, local_size: int, num_gpus: int) -> torch.device:
    """A GPU for each of this machine's ranks, or the CPU for all: ranks of different backends would wait for each other."""
    return torch.device("cuda", local) if local_size <= num_gpus else torch.device("cpu")


@contextmanager
def ranks_of_environment(timeout_s: float = 300.0) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, be it one, or this process alone. On the CPU unless HEADRACE_DEVICE is `cuda`."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if os.environ.get("HEADRACE_DEVICE") == "cuda" else 0
    device = device_of(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", size)), num_gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device, timeout_s)
        return
    limit = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=limit, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=limit)
    try:
        words = dist.new_group(backend="gloo", timeout=limit)
        yield Ranks(dist.get_rank(), size, device, timeout_s, words)
    finally:
        dist.destroy_process_group()
