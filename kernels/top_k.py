"""Exact top-k by inner product over all items, without ever holding all scores.

    score[b, n] = (queries[b] . items[n]) * scale[n], -inf where bit n of excluded[b] is set; the k best, ties by lower row

Pass one: scores in tiles, only the maximum of each bucket of 32 items is kept; then that of each group of 32 buckets. The
bound is the k-th best group's (maximum, lower group). An item of a bucket below it has k groups before it, each with an item
of a better or equal score, and where equal, of a lower row: it is not among the k best. Pass two: items of the buckets that
reach the bound, about k of them, are scored again, and those that reach it listed. Lists that come out long (of ties, or where
groups are few) are cut to their k best, which makes a sharper bound. Last, each listed item's place is the number of larger
ones, by a 64-bit key of (score, row): the order is total and nothing depends on chance or on the launch.

Scores are sums of products in fp32 (int8: exact integers, then fp32). The passes add floating products in different orders:
among scores that differ by less than such a sum's rounding, either may be taken for the k-th.

Shape letters: B queries, N items, D width. Bytes: N*D*size once for up to 64 queries, 3*B*N/32*4 of maxima, then B*k*32*D*size.
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

GROUP = 1024
"""Items whose maximum is kept as well as those of their 32 buckets."""
WIDEST = 256
SMALLEST_PROBLEM = 1 << 22
"""Fewest scores for which two passes are worth their launches; below, one matrix product and one selection are."""
ITEM_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
PROGRAMS = 3
"""Per multiprocessor, of pass one; each walks the items in steps of all of them."""
MOST_ITEMS = (1 << 31) - GROUP
MOST_GROUPS = 1 << 14
"""Whose maxima one program can hold in registers; the best of more are found by torch.topk."""
ITEMS_PER_FOUND = 128
"""Fewest items for each one wanted with which most of them are never looked at twice."""
RESCORING_PROGRAMS = 64
"""Per multiprocessor, of pass two."""
APART = 32
"""Steps between the counters of two lists: in one line of the cache they would wait for each other."""
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
def _sortable(score, row):
    """int64 that sort like (score, then lower row), as `_keys` makes them."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - row.to(tl.int64))


@Kernel
def _score_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@Kernel
def _bucket_maxima_kernel(
    queries_ptr, items_ptr, scale_ptr, excluded_ptr, maxima_ptr, B, N, NUM_GROUPS, EXCLUDED_STRIDE,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, EXCLUDING: tl.constexpr,
):  # fmt: skip
    """Maxima of all buckets of all groups: -inf where each item is excluded, NaN or past the end."""
    d = tl.arange(0, BLOCK_D)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_d, in_q = d < D, query < B
    buckets: tl.constexpr = BLOCK_N // 32
    q = tl.load(queries_ptr + query[:, None].to(tl.int64) * D + d[None, :], mask=in_q[:, None] & in_d[None, :], other=0)
    for tile in tl.range(tl.program_id(0), NUM_GROUPS * (32 // buckets), tl.num_programs(0), num_stages=STAGES):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < N
        item = tl.load(items_ptr + n[:, None].to(tl.int64) * D + d[None, :], mask=in_n[:, None] & in_d[None, :], other=0)
        score = tl.dot(q, tl.trans(item)).to(tl.float32)  # a query's scores lie in one warp, so that buckets are reduced there
        if SCALED:
            score = score * tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
        score = tl.where(in_n[None, :] & (score == score), score, float("-inf"))
        score = tl.reshape(score, (BLOCK_Q, buckets, 32))
        bucket = tile * buckets + tl.arange(0, buckets)
        if EXCLUDING:
            word = tl.load(
                excluded_ptr + query[:, None].to(tl.int64) * EXCLUDED_STRIDE + bucket[None, :],
                mask=in_q[:, None] & (bucket * 32 < N)[None, :], other=0,
            )  # fmt: skip
            bit = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            score = tl.where(bit != 0, float("-inf"), score)
        tl.store(maxima_ptr + bucket[None, :].to(tl.int64) * B + query[:, None], tl.max(score, 2), mask=in_q[:, None])


@Kernel
def _group_maxima_kernel(maxima_ptr, groups_ptr, B, NUM_GROUPS, BLOCK_B: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    bucket = group * 32 + tl.arange(0, 32)
    score = tl.load(maxima_ptr + bucket[:, None] * B + query[None, :], mask=(query < B)[None, :], other=float("-inf"))
    tl.store(groups_ptr + query.to(tl.int64) * NUM_GROUPS + group, tl.max(score, 0), mask=query < B)


@Kernel
def _first_step(most, least, bit):
    """(the bits that all of most >= x >= least begin with, the next bit), of unsigned numbers of which `bit` is the first."""
    while (bit > (most ^ least)) & (bit > 1):
        bit = bit >> 1
    return most - (most & (bit | (bit - 1))), bit


@Kernel
def _nth_largest(x, there, K):
    """A bound that K of `there` in uint32 [n] reach, and more only if they equal it: bit by bit, until no more than K do.
    0 where there are fewer than K."""
    most = tl.max(tl.where(there, x, 0), 0)
    least = tl.min(tl.where(there, x, most), 0)
    bound, bit = _first_step(most, least, tl.full((), 1 << 31, tl.uint32))
    reaching = tl.sum(there.to(tl.int32), 0)
    bound = tl.where(reaching < K, 0, bound)
    while (reaching > K) & (bit > 0):
        now = tl.sum((there & (x >= bound + bit)).to(tl.int32), 0)
        bound += tl.where(now >= K, bit, 0)
        reaching = tl.where(now >= K, now, reaching)
        bit = bit >> 1
    return bound


@Kernel
def _bound_kernel(groups_ptr, bound_ptr, NUM_GROUPS, K, BLOCK: tl.constexpr):
    """A key that exactly K groups of each query reach; all of them where there are no more."""
    query = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    there = i < NUM_GROUPS
    score = tl.load(groups_ptr + query * NUM_GROUPS + i, mask=there, other=float("-inf"))
    x = (_sortable(score, i) >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000
    bound = _nth_largest(x, there, K)
    tied = tl.sum((there & (x >= bound)).to(tl.int32), 0) > K  # only then do the rows decide
    still = K - tl.sum((there & (x > bound)).to(tl.int32), 0)
    row_bound = _nth_largest(0xFFFFFFFF - i.to(tl.uint32), there & (x == bound) & tied, still)
    upper = (bound ^ 0x80000000).to(tl.int32, bitcast=True)
    tl.store(bound_ptr + query, (upper.to(tl.int64) << 32) | row_bound.to(tl.int64))


@Kernel
def _list_buckets_kernel(maxima_ptr, bound_ptr, count_ptr, list_ptr, B, CAPACITY, BLOCK_B: tl.constexpr, APART: tl.constexpr):
    """Keys of a group's buckets that reach their query's bound, in any order."""
    group = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_q = query < B
    bucket = group * 32 + tl.arange(0, 32)
    bound = tl.load(bound_ptr + query, mask=in_q, other=0)
    score = tl.load(maxima_ptr + bucket[:, None] * B + query[None, :], mask=in_q[None, :], other=float("-inf"))
    listed = (_sortable(score, group + 0 * bucket[:, None]) >= bound[None, :]) & (score > float("-inf"))
    place = tl.atomic_add(count_ptr + query[None, :] * APART + 0 * bucket[:, None], 1, mask=listed, sem="relaxed")
    tl.store(list_ptr + query[None, :] * CAPACITY + place, _sortable(score, bucket[:, None]), mask=listed)


@Kernel
def _list_items_kernel(
    queries_ptr, items_ptr, scale_ptr, excluded_ptr, bound_ptr, bucket_count_ptr, buckets_ptr, count_ptr, list_ptr,
    N, BUCKET_CAPACITY, CAPACITY, EXCLUDED_STRIDE,
    D: tl.constexpr, BLOCK_D: tl.constexpr, INTEGER: tl.constexpr, SCALED: tl.constexpr, EXCLUDING: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Keys of the items in a query's listed buckets, in any order: of each the best, and those that may reach the bound."""
    b = tl.program_id(1).to(tl.int64)
    i, d = tl.arange(0, 32), tl.arange(0, BLOCK_D)
    in_d = d < D
    q = tl.load(queries_ptr + b * D + d, mask=in_d, other=0)
    bound = _score_of(tl.load(bound_ptr + b))
    bound -= tl.abs(bound) * 2.0**-16  # pass one has added up in another order
    for place in range(tl.program_id(0), tl.load(bucket_count_ptr + b * APART), tl.num_programs(0)):
        bucket = 0xFFFFFFFF - (tl.load(buckets_ptr + b * BUCKET_CAPACITY + place) & 0xFFFFFFFF)
        n = bucket * 32 + i
        in_n = n < N
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
        score = tl.where(usable, score, float("-inf"))
        missed = (score < bound) & (score < tl.max(score, 0))
        listed = (score > float("-inf")) & ~missed
        stored = tl.atomic_add(count_ptr + b * APART + 0 * i, 1, mask=listed, sem="relaxed")
        tl.store(list_ptr + b * CAPACITY + stored, _sortable(score, n), mask=listed)


@Kernel
def _trim_kernel(list_ptr, count_ptr, bound_ptr, CAPACITY, MOST, K, BLOCK: tl.constexpr, APART: tl.constexpr):
    """Leaves the K largest in a list of more than MOST different keys, where it stands; they are the query's new bound."""
    query = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + query * APART)
    first = list_ptr + query * CAPACITY
    i = tl.arange(0, BLOCK)
    if count > MOST:
        any_key = tl.load(first).to(tl.uint64, bitcast=True) ^ (1 << 63)
        most, least = any_key, any_key
        for begin in range(0, count, BLOCK):
            there = begin + i < count
            x = tl.load(first + begin + i, mask=there, other=0).to(tl.uint64, bitcast=True) ^ (1 << 63)
            x = tl.where(there, x, any_key)
            most, least = tl.maximum(most, tl.max(x, 0)), tl.minimum(least, tl.min(x, 0))
        bound, bit = _first_step(most, least, tl.full((), 1 << 63, tl.uint64))
        reaching = count
        while reaching > K:
            enough = tl.zeros((BLOCK,), tl.int32)
            for begin in range(0, count, BLOCK):
                there = begin + i < count
                x = tl.load(first + begin + i, mask=there, other=0).to(tl.uint64, bitcast=True) ^ (1 << 63)
                enough += (there & (x >= bound + bit)).to(tl.int32)
            now = tl.sum(enough, 0)
            bound += tl.where(now >= K, bit, 0)
            reaching = tl.where(now >= K, now, reaching)
            bit = bit >> 1
        kept = 0
        for begin in range(0, count, BLOCK):
            there = begin + i < count
            key = tl.load(first + begin + i, mask=there, other=0)
            chosen = there & ((key.to(tl.uint64, bitcast=True) ^ (1 << 63)) >= bound)
            place = kept + tl.cumsum(chosen.to(tl.int32), 0) - 1  # never past what all threads have read
            tl.store(first + place, key, mask=chosen)
            kept += tl.sum(chosen.to(tl.int32), 0)
        tl.store(count_ptr + query * APART, K)
        tl.store(bound_ptr + query, (bound ^ (1 << 63)).to(tl.int64, bitcast=True))


@Kernel
def _rank_kernel(
    list_ptr, count_ptr, scores_ptr, rows_ptr, CAPACITY, K, BLOCK: tl.constexpr, CHUNK: tl.constexpr, APART: tl.constexpr
):
    """Each key of a list to the place that as many larger ones give it, if that is below K; -inf and -1 where none is."""
    b = tl.program_id(1).to(tl.int64)
    count = tl.load(count_ptr + b * APART)
    first = list_ptr + b * CAPACITY
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = mine < count
    key = tl.load(first + mine, mask=there, other=0)
    larger = tl.zeros((BLOCK, CHUNK), tl.int32)
    for begin in range(0, tl.where(tl.program_id(0) * BLOCK < count, count, 0), CHUNK):
        other = begin + tl.arange(0, CHUNK)
        than = tl.load(first + other, mask=other < count, other=-1 << 63)
        larger += (than[None, :] > key[:, None]).to(tl.int32)
    score = _score_of(key)
    place = tl.where(there, tl.sum(larger, 1), mine)
    tl.store(scores_ptr + b * K + place, tl.where(there, score, float("-inf")), mask=place < K)
    tl.store(rows_ptr + b * K + place, tl.where(there, 0xFFFFFFFF - (key & 0xFFFFFFFF), -1), mask=place < K)


def configuration(B: int, D: int, capability: int) -> dict[str, int]:
    """Tiles of pass one: 64 items against up to 64 queries. Hopper's tensor cores take no fewer."""
    return {
        "BLOCK_Q": 64 if capability >= 90 else min(64, max(16, next_power_of_2(B))),
        "D": D, "BLOCK_N": 64, "BLOCK_D": max(32, next_power_of_2(D)), "STAGES": 3, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def _rescoring_warps(D: int) -> int:
    return 2 if D > 128 else 1


def _bound_tile(num_groups: int) -> dict[str, int]:
    block = next_power_of_2(max(num_groups, 256))
    return {"BLOCK": block, "num_warps": min(32, max(4, block // 512))}


def _query_tile(B: int) -> dict[str, int]:
    return {"BLOCK_B": min(64, max(16, next_power_of_2(B))), "num_warps": 4}


LISTING = {"BLOCK_B": 16, "APART": APART, "num_warps": 1}
TRIMMING = {"BLOCK": 8192, "APART": APART, "num_warps": 16}
RANKING = {"BLOCK": 16, "CHUNK": 256, "APART": APART, "num_warps": 4}


def kernel_fits(items: Tensor) -> bool:
    return items.dtype in (torch.bfloat16, torch.float16, torch.int8) and items.shape[1] <= WIDEST


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time: both passes, one query and many, plain and with everything on."""
    cases = []
    pointers = {"scale_ptr": "*fp32", "excluded_ptr": "*i32", "maxima_ptr": "*fp32", "groups_ptr": "*fp32", "bound_ptr": "*i64"}
    pointers |= {"bucket_count_ptr": "*i32", "buckets_ptr": "*i64", "count_ptr": "*i32", "list_ptr": "*i64"}
    pointers |= {"scores_ptr": "*fp32", "rows_ptr": "*i64"}
    for name, number in (("bf16", "*bf16"), ("int8", "*i8")):
        types = {"queries_ptr": number, "items_ptr": number, **pointers}
        for B, D, on in ((1, 64, False), (64, 128, True), (64, 256, True)):
            switches = {"SCALED": on, "EXCLUDING": on}
            label = f"{name} B{B} D{D}{' scaled, excluding' if on else ''}"
            one = configuration(B, D, capability)
            cases.append(Case(f"maxima {label}", _bucket_maxima_kernel, types, {**one, **switches}, uses_tensor_cores=True))
            two = {"D": D, "BLOCK_D": one["BLOCK_D"], "INTEGER": name == "int8", "num_warps": _rescoring_warps(D), **switches}
            two["APART"] = APART
            cases.append(Case(f"items {label}", _list_items_kernel, types, two))
    cases += [Case(f"bound of {n}", _bound_kernel, pointers, _bound_tile(n)) for n in (1000, MOST_GROUPS)]
    for B in (1, 64):
        cases.append(Case(f"group maxima B{B}", _group_maxima_kernel, pointers, _query_tile(B)))
    cases.append(Case("list buckets", _list_buckets_kernel, pointers, LISTING))
    cases.append(Case("trim", _trim_kernel, pointers, TRIMMING))
    cases.append(Case("rank", _rank_kernel, pointers, RANKING))
    return cases


def launch(
    queries: Tensor, items: Tensor, k: int, scale: Tensor | None, excluded: Tensor | None, capability: int
) -> tuple[Tensor, Tensor]:
    """Both passes and all selections. Contiguous tensors, N > 0 and k > 0; nothing is checked here."""
    B, (N, D) = queries.shape[0], items.shape
    device, num_groups = items.device, ceil_div(N, GROUP)
    config = configuration(B, D, capability)
    switches = {"SCALED": scale is not None, "EXCLUDING": excluded is not None}
    scale_or_nothing = items if scale is None else scale
    words = items if excluded is None else excluded
    stride = 0 if excluded is None or excluded.shape[0] == 1 else excluded.shape[1]
    processors = torch.cuda.get_device_properties(device).multi_processor_count if items.is_cuda else 1
    maxima = torch.empty(num_groups * 32, B, dtype=torch.float32, device=device)
    bucket_count, item_count = torch.zeros(2, B, APART, dtype=torch.int32, device=device)
    most = 2 * k
    buckets = torch.empty(B, min(num_groups, k) * 32, dtype=torch.int64, device=device)
    listed = torch.empty(B, min(buckets.shape[1], most) * 32, dtype=torch.int64, device=device)
    scores = torch.empty(B, k, dtype=torch.float32, device=device)
    rows = torch.empty(B, k, dtype=torch.int64, device=device)
    with device_of(items):
        tiles = num_groups * GROUP // config["BLOCK_N"]
        _bucket_maxima_kernel[(min(tiles, PROGRAMS * processors), ceil_div(B, config["BLOCK_Q"]))](
            queries, items, scale_or_nothing, words, maxima, B, N, num_groups, stride, **config, **switches
        )
        bound = _bound(maxima, k)
        _list_buckets_kernel[(num_groups, ceil_div(B, LISTING["BLOCK_B"]))](
            maxima, bound, bucket_count, buckets, B, buckets.shape[1], **LISTING
        )
        _trim(buckets, bucket_count, bound, k, most)
        _list_items_kernel[(ceil_div(RESCORING_PROGRAMS * processors, B), B)](
            queries, items, scale_or_nothing, words, bound, bucket_count, buckets, item_count, listed,
            N, buckets.shape[1], listed.shape[1], stride, D=D, BLOCK_D=config["BLOCK_D"],
            INTEGER=items.dtype == torch.int8, APART=APART, num_warps=_rescoring_warps(D), **switches,
        )  # fmt: skip
        _trim(listed, item_count, bound, k, most)
        _rank_kernel[(ceil_div(max(k, min(most, listed.shape[1])), RANKING["BLOCK"]), B)](
            listed, item_count, scores, rows, listed.shape[1], k, **RANKING
        )
    return scores, rows


def _bound(maxima: Tensor, k: int) -> Tensor:
    """i64 [B]: a key that the best k groups of each query reach, and no other. maxima: fp32 [groups * 32, B]."""
    num_groups, B = maxima.shape[0] // 32, maxima.shape[1]
    groups = torch.empty(B, num_groups, dtype=torch.float32, device=maxima.device)
    tile = _query_tile(B)
    _group_maxima_kernel[(num_groups, ceil_div(B, tile["BLOCK_B"]))](maxima, groups, B, num_groups, **tile)
    if num_groups > MOST_GROUPS:
        return _keys(groups, torch.arange(num_groups, device=groups.device)).topk(k, dim=1).values[:, -1].contiguous()
    bound = torch.empty(B, dtype=torch.int64, device=groups.device)
    _bound_kernel[(B,)](groups, bound, num_groups, k, **_bound_tile(num_groups))
    return bound


def _trim(keys: Tensor, count: Tensor, bound: Tensor, k: int, most: int) -> None:
    """Lists that hold more than `most` keys to their best k."""
    if keys.shape[1] > most:
        _trim_kernel[(keys.shape[0],)](keys, count, bound, keys.shape[1], most, k, **TRIMMING)


def _run(queries: Tensor, items: Tensor, k: int, scale: Tensor | None, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N = queries.shape[0], items.shape[0]
    large = (B * N >= SMALLEST_PROBLEM and ITEMS_PER_FOUND * k <= N) or choice() == "triton"
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
    if N > MOST_ITEMS:
        raise ValueError(f"items must have at most {MOST_ITEMS:,} rows, got {N:,}")
    if scale is not None:
        check_tensor("scale", scale, torch.float32, (N,))
    if excluded is not None:
        check_tensor("excluded", excluded, torch.int32, ("B or 1", ceil_div(N, 32)))
        if excluded.shape[0] != 1:
            check_tensor("excluded", excluded, torch.int32, (queries.shape[0], ceil_div(N, 32)))
    check_same_device(queries=queries, items=items, scale=scale, excluded=excluded)
    arguments = (queries.detach(), items.detach(), k, scale, excluded)
    return (_run if eager(*arguments) else _operator)(*arguments)
