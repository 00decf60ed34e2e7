"""All inputs of a request in one host-to-device copy.

    views = arena.reserve({"user": (torch.float32, (1, 40)), "row": (torch.int64, (2000,))})  # writable, on the host
    views["row"][:] = ...
    on_device = arena.send()  # one copy, the same names

Every copy to a GPU costs microseconds of driver time whatever its size, and a copy from pageable memory also waits. Here
tensors lie one after the other, at multiples of 256 bytes, in pinned memory and in one device buffer; the same layout always
has the same addresses, so a CUDA graph may read them. Two host buffers take turns: one is filled while the other is being read.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

ALIGNMENT_BYTES = 256
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class FeatureArena:
    """Room for `capacity_bytes` of one request's tensors. Not for several threads at once: give each its own.

    copies: host-to-device copies so far, for tests and metrics.
    """

    def __init__(self, capacity_bytes: int, device: torch.device | str):
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, got {capacity_bytes}")
        self.device = torch.device(device)
        self.copies = 0
        pinned = self.device.type == "cuda"
        self._hosts = [torch.empty(capacity_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._on_device = torch.empty(capacity_bytes, dtype=torch.uint8, device=self.device)
        self._turn = 0
        self._layout: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] | None = None
        self._used_bytes = 0

    def reserve(self, layout: Layout) -> dict[str, Tensor]:
        """Writable host tensors, with whatever was there before. Raises ValueError, with the bytes, where they do not fit."""
        placed, used = {}, 0
        for name, (dtype, shape) in layout.items():
            placed[name] = (used, dtype, shape)
            used += -(-prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        capacity = self._on_device.numel()
        if used > capacity:
            raise ValueError(f"layout must fit into {capacity} bytes, got {used} in {len(placed)} tensors")
        self._turn = 1 - self._turn
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()  # the copy before last still reads this buffer
        self._layout, self._used_bytes = placed, used
        return self._views(self._hosts[self._turn])

    def send(self) -> dict[str, Tensor]:
        """The reserved tensors on the device, valid until the next `send`. The copy is ordered with the current stream.

        Raises RuntimeError without a `reserve` before it.
        """
        if self._layout is None:
            raise RuntimeError("send needs a reserve before it")
        if self._used_bytes:
            self._on_device[: self._used_bytes].copy_(self._hosts[self._turn][: self._used_bytes], non_blocking=True)
            self.copies += 1
        if self.device.type == "cuda":
            event = self._sent[self._turn] or torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._sent[self._turn] = event
        views = self._views(self._on_device)
        self._layout = None
        return views

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        assert self._layout is not None
        return {
            name: buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (start, dtype, shape) in self._layout.items()
        }
