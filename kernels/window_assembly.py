"""Windowed sums of many keys at once, from sorted blocks with prefix sums.

    out[n, m*W + w] = sum of measure m over the blocks b of run row[n] with lower[n, w] <= block_start[b] < upper[n]

Each key owns one run of blocks, sorted by start; with inclusive prefix sums a window costs two binary searches and one
subtraction, whatever its length. Integers only, so every backend agrees to the bit (sums wrap modulo 2**64).

Shape letters: R blocks of all runs together, K runs, M measures, N candidates, W windows.
Bytes: N * (8 + 8*(1 + W)) of queries, N * (1 + W) * (log2(run) * 8 + 8*M) gathered, 8*N*M*W written. Latency bound: at
N = 2,000, W = 6, M = 8 about 2.5 MB and 12 dependent loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.ahead_of_time import Case
from kernels.backend import Kernel, ceil_div, debug, device_of, eager, next_power_of_2, use_triton
from kernels.checks import check_indices, check_same_device, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

MOST_WINDOWS = 64


def window_assembly_reference(
    block_start: Tensor, prefix: Tensor, run_offsets: Tensor, row: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """Plain PyTorch, any device: one vectorised binary search over all candidates and bounds."""
    N, W = lower.shape
    R, M = prefix.shape
    K = run_offsets.numel() - 1
    if N == 0 or R == 0 or K <= 0:
        return prefix.new_zeros(N, M * W)
    known = (row >= 0) & (row < K)
    run = torch.where(known, row, 0)
    begin = run_offsets[run].clamp_(0, R)
    end = torch.where(known, run_offsets[run + 1].clamp_(0, R), 0)
    length = (end - begin).clamp_(min=0)

    # How many blocks of the run start before each bound, one binary digit per round from the largest. A step past the end
    # of the run reads its last block instead, and whatever it then overshoots is cut off at the end.
    bound = torch.cat([lower, upper[:, None]], dim=1)
    count = torch.zeros_like(bound)
    last = (begin + length - 1).clamp_(min=0)[:, None]
    probe, start, before = torch.empty_like(bound), torch.empty_like(bound), torch.empty_like(bound, dtype=torch.bool)
    for digit in reversed(range(int(length.max()).bit_length())):
        torch.add(count, (begin + (1 << digit) - 1)[:, None], out=probe)
        torch.minimum(probe, last, out=probe)
        torch.index_select(block_start, 0, probe.view(-1), out=start.view(-1))
        torch.lt(start, bound, out=before)
        count.add_(before, alpha=1 << digit)
    torch.minimum(count, length[:, None], out=count)
    count[:, :W] = torch.minimum(count[:, :W], count[:, W:])  # lower >= upper: an empty window

    total = prefix.index_select(0, (count + (begin - 1)[:, None]).clamp_(min=0).view(-1))
    total.index_fill_(0, (count.view(-1) == 0).nonzero().view(-1), 0)
    total = total.view(N, W + 1, M).transpose(1, 2)
    out = prefix.new_empty(N, M, W)
    torch.sub(total[:, :, W:], total[:, :, :W], out=out)
    return out.view(N, M * W)


@Kernel
def _window_assembly_kernel(
    block_start_ptr, prefix_ptr, run_offsets_ptr, row_ptr, lower_ptr, upper_ptr, out_ptr, R, K, N, M, W,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    in_n = n < N
    in_nw = in_n[:, None] & (w < W)[None, :]

    row = tl.load(row_ptr + n, mask=in_n, other=-1)
    known = in_n & (row >= 0) & (row < K)
    begin = tl.load(run_offsets_ptr + row, mask=known, other=0)
    end = tl.load(run_offsets_ptr + row + 1, mask=known, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), R)
    end = tl.minimum(tl.maximum(end, begin), R)

    upper = tl.load(upper_ptr + n, mask=in_n, other=0)
    lower = tl.load(lower_ptr + n[:, None] * W + w[None, :], mask=in_nw, other=0)

    # Both searches in one loop, so that their loads overlap. A search over `left` blocks leaves at most left // 2.
    high = begin
    high_left = end - begin
    low = begin[:, None] + tl.zeros((BLOCK_N, BLOCK_W), tl.int64)
    low_left = (end - begin)[:, None] + tl.zeros((BLOCK_N, BLOCK_W), tl.int64)
    left = tl.max(end - begin, 0)
    while left > 0:
        half = high_left >> 1
        start = tl.load(block_start_ptr + high + half, mask=high_left > 0, other=0)
        below = (high_left > 0) & (start < upper)
        high = tl.where(below, high + half + 1, high)
        high_left = tl.where(below, high_left - half - 1, half)

        halves = low_left >> 1
        starts = tl.load(block_start_ptr + low + halves, mask=low_left > 0, other=0)
        belows = (low_left > 0) & (starts < lower)
        low = tl.where(belows, low + halves + 1, low)
        low_left = tl.where(belows, low_left - halves - 1, halves)
        left = left >> 1

    some = in_nw & (high[:, None] > low)  # the window holds at least one block
    subtract = some & (low > begin[:, None])
    for first_m in range(0, M, BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        in_m = m < M
        to_high = tl.load(
            prefix_ptr + (high - 1)[:, None] * M + m[None, :], mask=(high > begin)[:, None] & in_m[None, :], other=0
        )
        to_low = tl.load(
            prefix_ptr + (low - 1)[:, :, None] * M + m[None, None, :], mask=subtract[:, :, None] & in_m[None, None, :], other=0
        )
        total = tl.where(some[:, :, None], to_high[:, None, :] - to_low, 0)
        place = n[:, None, None] * (M * W) + m[None, None, :] * W + w[None, :, None]
        tl.store(out_ptr + place, total, mask=in_nw[:, :, None] & in_m[None, None, :])


def configuration(M: int, W: int) -> dict[str, int]:
    """Tile sizes and warps for M measures and W windows: some 256 results in flight per program, which is one warp."""
    block_w, block_m = next_power_of_2(W), min(next_power_of_2(M), 8)
    block_n = max(1, min(16, 256 // (block_w * block_m)))
    return {"BLOCK_N": block_n, "BLOCK_W": block_w, "BLOCK_M": block_m, "num_warps": 1, "num_stages": 1}


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time."""
    types = {name: "*i64" for name, kind in _window_assembly_kernel.parameters.items() if kind == "pointer"}
    return [Case(f"M{M} W{W}", _window_assembly_kernel, types, configuration(M, W)) for M, W in ((1, 1), (8, 6), (16, 12))]


def launch(
    block_start: Tensor, prefix: Tensor, run_offsets: Tensor, row: Tensor, lower: Tensor, upper: Tensor, out: Tensor
) -> None:
    """The Triton kernel into `out` i64 [N, M*W]. Contiguous tensors on one device; nothing is checked here."""
    N, W = lower.shape
    R, M = prefix.shape
    if N == 0 or M * W == 0:
        return
    config = configuration(M, W)
    with device_of(out):
        _window_assembly_kernel[(ceil_div(N, config["BLOCK_N"]),)](
            block_start, prefix, run_offsets, row, lower, upper, out, R, run_offsets.numel() - 1, N, M, W, **config
        )


def _check_contents(block_start: Tensor, run_offsets: Tensor, row: Tensor) -> None:
    R, K = block_start.numel(), run_offsets.numel() - 1
    check_indices("row", row, -1, K)
    check_indices("run_offsets", run_offsets, 0, R + 1)
    if not debug():
        return
    if int(run_offsets[0]) != 0 or int(run_offsets[-1]) != R or bool((run_offsets[1:] < run_offsets[:-1]).any()):
        raise ValueError(f"run_offsets must rise from 0 to {R}, the number of blocks")
    first_of_run = torch.zeros(R + 1, dtype=torch.bool, device=row.device).index_fill_(0, run_offsets, True)[1:-1]
    if bool(((block_start[1:] <= block_start[:-1]) & ~first_of_run).any()):
        raise ValueError("block_start must rise strictly within each run")


def _run(block_start: Tensor, prefix: Tensor, run_offsets: Tensor, row: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    if debug() or not block_start.is_cuda:
        _check_contents(block_start, run_offsets, row)
    if not use_triton(block_start):
        return window_assembly_reference(block_start, prefix, run_offsets, row, lower, upper)
    block_start, prefix, run_offsets, row, lower, upper = (
        t.contiguous() for t in (block_start, prefix, run_offsets, row, lower, upper)
    )
    out = prefix.new_empty(lower.shape[0], prefix.shape[1] * lower.shape[1])
    launch(block_start, prefix, run_offsets, row, lower, upper, out)
    return out


_operator = torch.library.custom_op("headrace::window_assembly", _run, mutates_args=(), device_types=("cpu", "cuda"))


@_operator.register_fake
def _(block_start: Tensor, prefix: Tensor, run_offsets: Tensor, row: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return prefix.new_empty(lower.shape[0], prefix.shape[1] * lower.shape[1])


def window_assembly(
    block_start: Tensor, prefix: Tensor, run_offsets: Tensor, row: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """All windowed sums of N candidates: i64 [N, M*W], column m*W + w is measure m over window w. All tensors are int64.

    block_start [R]: microseconds, rising strictly within each run. prefix [R, M]: inclusive cumulative sums, begun anew in
    each run. run_offsets [K+1]: run k is blocks run_offsets[k] .. run_offsets[k+1] - 1. row [N]: a candidate's run, -1 if
    its key is unknown (all zeros). lower [N, W], upper [N]: half-open bounds; lower >= upper is an empty window, 0.

    Equal to the bit on every backend. Raises TypeError, ValueError or IndexError, naming the argument, on a wrong type,
    shape, device or index. On a GPU the insides of run_offsets and row are checked in debug mode only; otherwise the kernel
    reads nothing outside its inputs: a row out of range is an unknown key, an offset is clamped into 0 .. R.
    """
    check_tensor("block_start", block_start, torch.int64, ("R",))
    check_tensor("prefix", prefix, torch.int64, (block_start.shape[0], "M"))
    check_tensor("run_offsets", run_offsets, torch.int64, ("K+1",))
    check_tensor("row", row, torch.int64, ("N",))
    check_tensor("lower", lower, torch.int64, (row.shape[0], "W"))
    check_tensor("upper", upper, torch.int64, (row.shape[0],))
    check_same_device(block_start=block_start, prefix=prefix, run_offsets=run_offsets, row=row, lower=lower, upper=upper)
    if run_offsets.shape[0] == 0:
        raise ValueError("run_offsets must hold at least one offset (K + 1 of them), got none")
    if lower.shape[1] > MOST_WINDOWS:
        raise ValueError(f"lower must have at most {MOST_WINDOWS} windows, got {lower.shape[1]}")
    arguments = (block_start, prefix, run_offsets, row, lower, upper)
    return (_run if eager(*arguments) else _operator)(*arguments)
