"""How fast a run is: rows a second, and the share of the machine's measured peak that its matrix products use."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_PASSES = 3
"""A step is a forward and a backward pass; the second costs about twice the first."""


class Speed:
    """Counts rows from the first step on (that one warms up and is left out)."""

    def __init__(self, device: torch.device):
        self._device, self._rows = device, 0
        self._started: float | None = None
        self._last = 0.0

    def count(self, rows: int) -> None:
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        else:
            self._rows += rows
        self._last = now

    @property
    def rows_per_s(self) -> float:
        seconds = self._last - (self._started or self._last)
        return self._rows / seconds if seconds > 0 else 0.0

    def mfu(self, forward: Callable[[], Tensor], rows: int) -> float | None:
        """Model FLOP utilisation: operations of `forward` on `rows` rows, three times, at the speed seen, over the peak of a
        square product measured now. None before there is a speed."""
        if not self.rows_per_s:
            return None
        from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, which a server must not

        with torch.random.fork_rng(devices=[]), torch.no_grad(), _plain(), FlopCounterMode(display=False) as counter:
            forward()
        per_row = _PASSES * counter.get_total_flops() / rows
        return per_row * self.rows_per_s / peak_flop_per_s(self._device)


@contextmanager
def _plain() -> Iterator[None]:
    """PyTorch in place of Triton kernels, whose operations nobody counts."""
    before = os.environ.get("HEADRACE_KERNELS")
    os.environ["HEADRACE_KERNELS"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HEADRACE_KERNELS"]
        else:
            os.environ["HEADRACE_KERNELS"] = before


def peak_flop_per_s(device: torch.device) -> float:
    """Of an fp32 product of 1024 × 1024 matrices, or a bf16 one of 8192 × 8192 on a GPU; best of a few."""
    is_gpu = device.type == "cuda"
    size, kind = (8192, torch.bfloat16) if is_gpu else (1024, torch.float32)
    one, out = (torch.full((size, size), 0.5, dtype=kind, device=device) for _ in range(2))
    seconds = []
    for _ in range(10 if is_gpu else 3):
        started = time.perf_counter()
        torch.mm(one, one, out=out)
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
