"""A ranker as CUDA graphs, one per batch size it is padded to: a replay costs one launch, whatever the number of operations.

    score = Graphed(model, batched=(False, True), buckets=(64, 128, 256))    # model(user [1, D], notes [N, F]) -> [N, ...]
    score.warm_up(user, notes)                                                # compiles, then captures every bucket
    score(user, notes)                                                        # pads to a bucket, replays, cuts

The function must be capturable: no value read back to the host, no shape that depends on values, and no row of its result may
depend on another row. Rows beyond the batch hold what earlier calls left there. Everything else is called plainly: tensors that
are not on a GPU, batches above the largest bucket, gradients, or a function whose capture failed once (the reason is kept in
`failure`, and logged).
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Steps of at most one half from 64 on, so that padding adds less than half; powers of two would nearly double a batch."""
WARM_UP_CALLS = 3


class Recording:
    """One function at one shape: tensors that stay where they are, and a replay that goes from the first to the second."""

    def __init__(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], replay: Callable[[], None]):
        self.inputs, self.outputs, self.replay = inputs, outputs, replay


def record_cuda_graph(function: Callable[..., Any], inputs: tuple[Tensor, ...], pool: Any) -> Recording:
    """Warms up on a stream of its own (Triton compiles, libraries choose and allocate), then captures into `pool`."""
    stream = torch.cuda.Stream(inputs[0].device)
    stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function(*inputs)
    torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = function(*inputs)
    return Recording(inputs, outputs if isinstance(outputs, tuple) else (outputs,), graph.replay)


class Graphed:
    """`function` with the same arguments and result; `batched` says of each argument whether its rows are the batch.

    Safe to call from several threads that use one stream; replays take turns. Captures share one memory pool, so only one
    result is alive at a time: it is copied out before the next replay.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        batched: tuple[bool, ...],
        buckets: tuple[int, ...] = BUCKETS,
        record: Callable[..., Recording] = record_cuda_graph,
    ):
        if not any(batched):
            raise ValueError(f"batched must be True for at least one argument, got {batched}")
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise ValueError(f"buckets must be positive and rising, got {buckets}")
        self.function, self.batched, self.buckets, self.failure = function, batched, buckets, ""
        self._record = record
        self._recordings: dict[Any, Recording] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    def bucket_of(self, rows: int) -> int | None:
        """The smallest bucket that holds the rows; None if none does."""
        return next((bucket for bucket in self.buckets if bucket >= rows), None)

    def warm_up(self, *arguments: Tensor) -> None:
        """Captures every bucket for arguments of these types and widths, so that no request waits for it."""
        rows = self._rows(arguments)
        for bucket in self.buckets:
            self(*(
                argument[:1].expand(bucket, *argument.shape[1:]) if batched and rows else argument
                for argument, batched in zip(arguments, self.batched, strict=True)
            ))  # fmt: skip

    def __call__(self, *arguments: Tensor) -> Any:
        """Raises ValueError where batched arguments differ in rows."""
        rows = self._rows(arguments)
        bucket = self.bucket_of(rows)
        if self.failure or bucket is None or rows == 0 or not self._capturable(arguments):
            return self.function(*arguments)
        with self._lock, torch.no_grad():
            key = (
                bucket,
                *((t.dtype, t.device, t.shape[1:] if b else t.shape) for t, b in zip(arguments, self.batched, strict=True)),
            )
            recording = self._recordings.get(key) or self._capture(key, bucket, arguments)
            if recording is not None:
                for static, argument, batched in zip(recording.inputs, arguments, self.batched, strict=True):
                    (static[:rows] if batched else static).copy_(argument)
                recording.replay()
                results = tuple(output[:rows].clone() for output in recording.outputs)
                return results if len(results) > 1 else results[0]
        return self.function(*arguments)

    def _rows(self, arguments: tuple[Tensor, ...]) -> int:
        if len(arguments) != len(self.batched):
            raise ValueError(f"expected {len(self.batched)} arguments, got {len(arguments)}")
        rows = {argument.shape[0] for argument, batched in zip(arguments, self.batched, strict=True) if batched}
        if len(rows) != 1:
            raise ValueError(f"batched arguments must have the same number of rows, got {sorted(rows)}")
        return rows.pop()

    def _capturable(self, arguments: tuple[Tensor, ...]) -> bool:
        differentiated = torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)
        on_gpu = self._record is not record_cuda_graph or all(argument.is_cuda for argument in arguments)
        return on_gpu and not differentiated

    def _capture(self, key: Any, bucket: int, arguments: tuple[Tensor, ...]) -> Recording | None:
        inputs = tuple(
            argument.new_zeros(bucket, *argument.shape[1:]) if batched else argument.clone()
            for argument, batched in zip(arguments, self.batched, strict=True)
        )
        try:
            if self._pool is None and inputs[0].is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            self._recordings[key] = self._record(self.function, inputs, self._pool)
        except RuntimeError as error:
            self.failure = f"{type(error).__name__}: {error}"
            log.warning("capture failed at %d rows, calling the function plainly from now on: %s", bucket, self.failure)
            return None
        return self._recordings[key]
