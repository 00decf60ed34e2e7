"""Exact top-k by inner product over all items, without ever holding all scores.

    score[b, n] = (queries[b] . items[n]) * scale[n], -inf where bit n of excluded[b] is set; the k best, ties by lower row

Two passes. One: scores in tiles, only the maximum of each bucket of 32 items is kept. The k buckets best by (maximum, lower
bucket) hold the k best items: an item outside them has k buckets before it, each with an item of a better or equal score, and
where equal, of a lower row. Two: those k * 32 items are scored again and selected by one 64-bit key of (score, row), so the
order is total and nothing depends on chance or on the launch.

Scores are sums of products in fp32 (int8: exact integers, then fp32). The passes add floating products in different orders:
among scores that differ by less than such a sum's rounding, either may be taken for the k-th.

Shape letters: B queries, N items, D width. Bytes: N*D*size once for up to 64 queries, B*N/32*4 of maxima, B*k*32*D*size again.
FLOP: 2*B*N*D. At N = 10M, D = 128, B = 64, bf16: 2.56 GB and 164 GFLOP, so memory bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.ahead_of_time import Case
from kernels.backend import Kernel, capability_of, ceil_div, choice, device_of, eager, next_power_of_2, use_triton
from kernels.checks import check_same_device, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

BUCKET = 32
WIDEST = 256
SMALLEST_PROBLEM = 1 << 22
"""Fewest scores for which two passes are worth their launches; below, one matrix product and one selection are."""
ITEM_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
PROGRAMS = 3
"""Per multiprocessor, of pass one; each walks the items in steps of all of them."""
MOST_SELECTED = 1 << 15
"""Keys that one program can hold in registers; the largest of more are found by torch.topk."""
GROUPS_A_PROGRAM = 16
_ROWS = (1 << 32) - 1


def pack_excluded(excluded: Tensor) -> Tensor:
    """bool [B, N] -> i32 [B, ceil(N / 32)], bit n % 32 of word n // 32 for item n."""
    check_tensor("excluded", excluded, torch.bool, ("B", "N"))
    B, N = excluded.shape
    bits = pad(excluded, (0, -N % 32)).view(B, ceil_div(N, 32), 32).to(torch.int64)
    words = (bits << torch.arange(32, device=excluded.device)).sum(2)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)


def _unpack(words: Tensor, N: int) -> Tensor:
    return ((words[:, :, None] >> torch.arange(32, device=words.device)) & 1).flatten(1)[:, :N].bool()


def _keys(scores: Tensor, row: Tensor) -> Tensor:
    """fp32 scores and rows -> int64 that sort like (score, then lower row). No NaN; -0 counts as 0."""
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (_ROWS - row)


def _best(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest keys [B, n] as scores fp32 and rows i64 [B, k]; -inf and -1 where there are fewer."""
    best = keys.topk(min(k, keys.shape[1]), dim=1).values
    ordered = (best >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    rows = torch.where(scores == -torch.inf, -1, _ROWS - (best & _ROWS))
    missing = k - best.shape[1]
    return pad(scores, (0, missing), value=-torch.inf), pad(rows, (0, missing), value=-1)


def top_k_reference(
    queries: Tensor, items: Tensor, k: int, scale: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, any device: all scores at once."""
    N = items.shape[0]
    scores = queries.float() @ items.float().T
    if scale is not None:
        scores = scores * scale
    if excluded is not None:
        scores = scores.masked_fill(_unpack(excluded, N), -torch.inf)
    if 0 < k < N and not scores.is_cuda:
        # Selecting floats is quicker than selecting keys, and as good where the cut parts unequal scores and none is NaN (which
        # would come first).
        values, rows = scores.topk(k + 1, dim=1)
        if not bool(((values[:, k - 1] == values[:, k]) | values[:, 0].isnan()).any()):
            return _best(_keys(values[:, :k], rows[:, :k]), k)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    return _best(_keys(scores, torch.arange(N, device=scores.device)), k)


@Kernel
def _bucket_maxima_kernel(
    queries_ptr, items_ptr, scale_ptr, excluded_ptr, maxima_ptr, B, N, NUM_BUCKETS, EXCLUDED_STRIDE,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, EXCLUDING: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_d, in_q = d < D, query < B
    buckets: tl.constexpr = BLOCK_N // 32
    q = tl.load(queries_ptr + query[:, None].to(tl.int64) * D + d[None, :], mask=in_q[:, None] & in_d[None, :], other=0)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < N
        item = tl.load(items_ptr + n[:, None].to(tl.int64) * D + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0)
        score = tl.dot(q, tl.trans(item)).to(tl.float32)  # a query's scores lie in one warp, so that buckets are reduced there
        if SCALED:
            score = score * tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
        score = tl.where(in_n[None, :] & (score == score), score, float("-inf"))
        score = tl.reshape(score, (BLOCK_Q, buckets, 32))
        bucket = tile * buckets + tl.arange(0, buckets)
        in_b = in_q[:, None] & (bucket < NUM_BUCKETS)[None, :]
        if EXCLUDING:
            word = tl.load(
                excluded_ptr + query[:, None].to(tl.int64) * EXCLUDED_STRIDE + bucket[None, :], mask=in_b, other=0
            )  # fmt: skip
            bit = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            score = tl.where(bit != 0, float("-inf"), score)
        maxima = tl.max(score, 2)
        tl.store(maxima_ptr + bucket[None, :].to(tl.int64) * B + query[:, None], maxima, mask=in_b)


@Kernel
def _sortable(score, row):
    """int64 that sort like (score, then lower row), as `_keys` makes them."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - row.to(tl.int64))


@Kernel
def _group_keys_kernel(maxima_ptr, keys_ptr, B, NUM_GROUPS, BLOCK_B: tl.constexpr):
    """The key of one group of 32 buckets for each query."""
    group = tl.program_id(0)
    bucket = group.to(tl.int64) * 32 + tl.arange(0, 32)
    query = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_q = query < B
    score = tl.load(maxima_ptr + bucket[:, None] * B + query[None, :], mask=in_q[None, :], other=float("-inf"))
    best = tl.max(score, 0)
    tl.store(keys_ptr + query.to(tl.int64) * NUM_GROUPS + group, _sortable(best, group + 0 * query), mask=in_q)


@Kernel
def _bucket_keys_kernel(maxima_ptr, groups_ptr, keys_ptr, B, COUNT, BLOCK: tl.constexpr):
    """The keys of the 32 buckets of each of a query's groups, which are given by their keys."""
    query = tl.program_id(1).to(tl.int64)
    chosen = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_count = chosen < COUNT
    group = 0xFFFFFFFF - (tl.load(groups_ptr + query * COUNT + chosen, mask=in_count, other=0xFFFFFFFF) & 0xFFFFFFFF)
    i = tl.arange(0, 32)
    bucket = group[:, None] * 32 + i[None, :]
    score = tl.load(maxima_ptr + bucket * B + query, mask=in_count[:, None], other=float("-inf"))
    place = query * COUNT * 32 + chosen[:, None] * 32 + i[None, :]
    tl.store(keys_ptr + place, _sortable(score, bucket), mask=in_count[:, None])


@Kernel
def _score_buckets_kernel(
    queries_ptr, items_ptr, scale_ptr, excluded_ptr, bucket_ptr, keys_ptr, N, CHOSEN, EXCLUDED_STRIDE,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INTEGER: tl.constexpr, SCALED: tl.constexpr, EXCLUDING: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)  # query b's chosen bucket
    b = place // CHOSEN
    bucket = tl.load(bucket_ptr + place)
    i = tl.arange(0, 32)
    n = bucket * 32 + i
    d = tl.arange(0, BLOCK_D)
    in_n, in_d = n < N, d < D
    q = tl.load(queries_ptr + b * D + d, mask=in_d, other=0)
    item = tl.load(items_ptr + n[:, None] * D + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0)
    if INTEGER:
        score = tl.sum(item.to(tl.int32) * q.to(tl.int32)[None, :], 1).to(tl.float32)
    else:
        score = tl.sum(item.to(tl.float32) * q.to(tl.float32)[None, :], 1)
    if SCALED:
        score = score * tl.load(scale_ptr + n, mask=in_n, other=0.0)
    usable = in_n & (score == score)
    if EXCLUDING:
        word = tl.load(excluded_ptr + b * EXCLUDED_STRIDE + bucket)
        usable = usable & (((word >> i) & 1) == 0)
    tl.store(keys_ptr + place * 32 + i, _sortable(tl.where(usable, score, float("-inf")), n))


@Kernel
def _nth_largest(x, K, BITS):
    """The K-th largest of uint32 [n], bit by bit from the top: are there K with the bits so far and a one? 0 for no BITS."""
    threshold = tl.zeros((), tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(BITS):
        enough = tl.sum((x >= threshold + bit).to(tl.int32), 0) >= K
        threshold += tl.where(enough, bit, 0)
        bit = bit >> 1
    return threshold


@Kernel
def _select_kernel(keys_ptr, halves_ptr, best_ptr, COUNT, K, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The K largest of COUNT different keys, in the order of their places. One half of every key stays in registers."""
    first = tl.program_id(0).to(tl.int64) * COUNT
    i = tl.arange(0, BLOCK)
    high = tl.load(halves_ptr + 2 * (first + i) + 1, mask=i < COUNT, other=-2147483648).to(tl.uint32, bitcast=True) ^ 0x80000000
    high_threshold = _nth_largest(high, K, 32)
    still = K - tl.sum((high > high_threshold).to(tl.int32), 0)
    level = high == high_threshold
    low = tl.load(halves_ptr + 2 * (first + i), mask=level, other=0).to(tl.uint32, bitcast=True)
    equal_at_the_edge = tl.sum(level.to(tl.int32), 0) > still  # only then do the lower halves decide
    low_threshold = _nth_largest(low, still, tl.where(equal_at_the_edge, 32, 0))
    threshold = (high_threshold.to(tl.uint64) << 32) | low_threshold.to(tl.uint64)

    stored = tl.program_id(0).to(tl.int64) * K
    for begin in range(0, COUNT, CHUNK):
        place = begin + tl.arange(0, CHUNK)
        key = tl.load(keys_ptr + first + place, mask=place < COUNT, other=0)
        chosen = (place < COUNT) & ((key.to(tl.uint64, bitcast=True) ^ 0x8000000000000000) >= threshold)
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(best_ptr + stored + rank - 1, key, mask=chosen)
        stored += tl.max(rank, 0)


def configuration(B: int, D: int, capability: int) -> dict[str, int]:
    """Tiles of pass one: 64 items against up to 64 queries. Hopper's tensor cores take no fewer."""
    return {
        "BLOCK_Q": 64 if capability >= 90 else min(64, max(16, next_power_of_2(B))),
        "D": D, "BLOCK_N": 64, "BLOCK_D": max(32, next_power_of_2(D)), "STAGES": 3, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def _rescoring_warps(D: int) -> int:
    return 4 if D > 128 else 2


def _selection(count: int) -> dict[str, int]:
    block = next_power_of_2(max(count, 256))
    return {"BLOCK": block, "CHUNK": min(block, 8192), "num_warps": min(32, max(4, block // 1024))}


def kernel_fits(items: Tensor) -> bool:
    return items.dtype in (torch.bfloat16, torch.float16, torch.int8) and items.shape[1] <= WIDEST


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time: both passes, one query and many, plain and with everything on."""
    cases = []
    for name, number in (("bf16", "*bf16"), ("int8", "*i8")):
        types = {
            "queries_ptr": number,
            "items_ptr": number,
            "scale_ptr": "*fp32",
            "excluded_ptr": "*i32",
            "maxima_ptr": "*fp32",
        }
        types |= {"bucket_ptr": "*i64", "keys_ptr": "*i64"}
        for B, D, on in ((1, 64, False), (64, 128, True), (64, 256, True)):
            switches = {"SCALED": on, "EXCLUDING": on}
            label = f"{name} B{B} D{D}{' scaled, excluding' if on else ''}"
            one = configuration(B, D, capability)
            cases.append(Case(f"maxima {label}", _bucket_maxima_kernel, types, {**one, **switches}, uses_tensor_cores=True))
            two = {"D": D, "BLOCK_D": one["BLOCK_D"], "INTEGER": name == "int8", "num_warps": _rescoring_warps(D), **switches}
            cases.append(Case(f"buckets {label}", _score_buckets_kernel, types, two))
    keys = {"maxima_ptr": "*fp32", "groups_ptr": "*i64", "keys_ptr": "*i64", "halves_ptr": "*i32", "best_ptr": "*i64"}
    cases.append(Case("group keys", _group_keys_kernel, keys, {"BLOCK_B": 64, "num_warps": 4}))
    cases.append(Case("bucket keys", _bucket_keys_kernel, keys, {"BLOCK": GROUPS_A_PROGRAM, "num_warps": 4}))
    return cases + [Case(f"select of {n}", _select_kernel, keys, _selection(n)) for n in (1000, MOST_SELECTED)]


def launch(
    queries: Tensor, items: Tensor, k: int, scale: Tensor | None, excluded: Tensor | None, capability: int
) -> tuple[Tensor, Tensor]:
    """Both passes and all selections. Contiguous tensors, N > 0 and k > 0; nothing is checked here."""
    B, (N, D) = queries.shape[0], items.shape
    num_buckets = ceil_div(N, BUCKET)
    config = configuration(B, D, capability)
    switches = {"SCALED": scale is not None, "EXCLUDING": excluded is not None}
    scale_or_nothing = items if scale is None else scale
    words = items if excluded is None else excluded
    stride = 0 if excluded is None or excluded.shape[0] == 1 else excluded.shape[1]
    tiles = ceil_div(N, config["BLOCK_N"])
    if items.is_cuda:
        tiles = min(tiles, PROGRAMS * torch.cuda.get_device_properties(items.device).multi_processor_count)
    maxima = torch.empty(ceil_div(num_buckets, BUCKET) * BUCKET, B, dtype=torch.float32, device=items.device)
    maxima[num_buckets:] = -torch.inf
    with device_of(items):
        _bucket_maxima_kernel[(tiles, ceil_div(B, config["BLOCK_Q"]))](
            queries, items, scale_or_nothing, words, maxima, B, N, num_buckets, stride, **config, **switches
        )
        bucket = _best_buckets(maxima, min(k, num_buckets))
        chosen = bucket.shape[1]
        keys = torch.empty(B, chosen * BUCKET, dtype=torch.int64, device=items.device)
        _score_buckets_kernel[(B * chosen,)](
            queries, items, scale_or_nothing, words, bucket, keys, N, chosen, stride,
            D=D, BLOCK_D=config["BLOCK_D"], INTEGER=items.dtype == torch.int8, num_warps=_rescoring_warps(D), **switches,
        )  # fmt: skip
        return _best(_largest(keys, min(k, chosen * BUCKET)), k)


def _best_buckets(maxima: Tensor, count: int) -> Tensor:
    """Each query's `count` best buckets, i64 [B, count], from maxima fp32 [a multiple of 32, B]: of the best groups of 32.

    A bucket outside the best groups has as many better or equal, lower buckets before it as there are groups: what holds for
    items and buckets holds again for buckets and groups.
    """
    num_groups, B = maxima.shape[0] // BUCKET, maxima.shape[1]
    groups = torch.empty(B, num_groups, dtype=torch.int64, device=maxima.device)
    tile = {"BLOCK_B": min(64, max(16, next_power_of_2(B))), "num_warps": 4}
    _group_keys_kernel[(num_groups, ceil_div(B, tile["BLOCK_B"]))](maxima, groups, B, num_groups, **tile)
    if num_groups > count:
        groups = _largest(groups, count)
    keys = torch.empty(B, groups.shape[1] * BUCKET, dtype=torch.int64, device=maxima.device)
    _bucket_keys_kernel[(ceil_div(groups.shape[1], GROUPS_A_PROGRAM), B)](
        maxima, groups, keys, B, groups.shape[1], BLOCK=GROUPS_A_PROGRAM, num_warps=4
    )
    return _ROWS - (_largest(keys, count) & _ROWS)


def _largest(keys: Tensor, count: int) -> Tensor:
    """The `count` largest of each row of different keys, in any order."""
    B, n = keys.shape
    if n > MOST_SELECTED:
        return keys.topk(count, dim=1, sorted=False).values
    best = keys.new_empty(B, count)
    _select_kernel[(B,)](keys, keys.view(torch.int32), best, n, count, **_selection(n))
    return best


def _run(queries: Tensor, items: Tensor, k: int, scale: Tensor | None, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N = queries.shape[0], items.shape[0]
    large = B * N >= SMALLEST_PROBLEM or choice() == "triton"
    if not (kernel_fits(items) and large and min(B, N, k) > 0 and use_triton(items)):
        return top_k_reference(queries, items, k, scale, excluded)
    return launch(
        queries.contiguous(), items.contiguous(), k, None if scale is None else scale.contiguous(),
        None if excluded is None else excluded.contiguous(), capability_of(items),
    )  # fmt: skip


_operator = torch.library.custom_op("headrace::top_k", _run, mutates_args=(), device_types=("cpu", "cuda"))


@_operator.register_fake
def _(queries: Tensor, items: Tensor, k: int, scale: Tensor | None, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    B = queries.shape[0]
    return queries.new_empty(B, k, dtype=torch.float32), queries.new_empty(B, k, dtype=torch.int64)


def top_k(
    queries: Tensor, items: Tensor, k: int, *, scale: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores fp32 [B, k], best first, and rows of `items` i64 [B, k]; -inf and -1 where fewer than k items are left.

    queries [B, D], items [N, D]: both fp32, bf16, fp16, or int8. scale fp32 [N]: multiplies item n's scores (the step of an
    int8 row). excluded i32 [B or 1, ceil(N / 32)]: see `pack_excluded`. Equal scores come by lower row; NaN counts as -inf.
    The kernel takes bf16, fp16 and int8 up to D = 256 from four million scores on; all else takes the reference. Not
    differentiable. Raises TypeError or ValueError, naming the argument.
    """
    check_tensor("items", items, ITEM_TYPES, ("N", "D"))
    N, D = items.shape
    check_tensor("queries", queries, items.dtype, ("B", D))
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if N >= 1 << 31:
        raise ValueError(f"items must have fewer than 2**31 rows, got {N}")
    if scale is not None:
        check_tensor("scale", scale, torch.float32, (N,))
    if excluded is not None:
        check_tensor("excluded", excluded, torch.int32, ("B or 1", ceil_div(N, 32)))
        if excluded.shape[0] != 1:
            check_tensor("excluded", excluded, torch.int32, (queries.shape[0], ceil_div(N, 32)))
    check_same_device(queries=queries, items=items, scale=scale, excluded=excluded)
    arguments = (queries.detach(), items.detach(), k, scale, excluded)
    return (_run if eager(*arguments) else _operator)(*arguments)
