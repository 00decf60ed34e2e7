"""Sampled softmax loss of a retriever, with logQ correction and accidental hits masked, never holding all logits.

    s[b]    = query[b] . positive[b] / temperature - log_q_positive[b]
    s[b, n] = query[b] . negative[n] / temperature - log_q_negative[n],   -inf where negative_id[n] = positive_id[b]
    loss[b] = log(exp(s[b]) + sum_n exp(s[b, n])) - s[b]

Shape letters: B queries, N negatives (shared by all queries), D width. FLOP: 2*B*N*D forward, 8*B*N*D backward, which computes
the logits again, twice, from the kept log-sum (as flash attention does). Memory: B*D + N*D; plain PyTorch keeps B*N logits.
Source of the correction: Yi et al., RecSys 2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.ahead_of_time import Case
from kernels.backend import Kernel, ceil_div, device_of, eager, next_power_of_2, use_triton
from kernels.checks import check_same_device, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDEST = 128


def _logits(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = log_q_positive.dtype
    of_positive = (query.to(wide) * positive.to(wide)).sum(1) / temperature - log_q_positive
    if query.dtype == wide:  # one pass over the logits in place of three
        of_negative = torch.addmm(-log_q_negative, query, negative.T, alpha=1 / temperature)
    else:
        of_negative = (query @ negative.T).to(wide) / temperature - log_q_negative
    return of_positive, of_negative.masked_fill_(positive_id[:, None] == negative_id, -torch.inf)


def sampled_softmax_reference(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, any device: loss [B] and log-sum [B]."""
    of_positive, of_negative = _logits(
        query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id, temperature
    )
    log_sum = torch.logsumexp(torch.cat([of_positive[:, None], of_negative], dim=1), dim=1)
    return log_sum - of_positive, log_sum


def sampled_softmax_backward_reference(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, log_sum: Tensor, gradient: Tensor, temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, positive and negative, in plain PyTorch."""
    of_positive, of_negative = _logits(
        query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id, temperature
    )
    share = torch.exp(of_negative - log_sum[:, None]) * (gradient / temperature)[:, None]
    pull = ((torch.exp(of_positive - log_sum) - 1) * gradient / temperature)[:, None]
    of_query = share @ negative.to(share.dtype) + pull * positive
    return of_query.to(query.dtype), (pull * query).to(query.dtype), (share.T @ query.to(share.dtype)).to(query.dtype)


@Kernel
def _tile(vectors_ptr, row, ROWS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    place = row.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(vectors_ptr + place, mask=(row < ROWS)[:, None] & (d < D)[None, :], other=0.0)


@Kernel
def _forward_kernel(
    query_ptr, positive_ptr, negative_ptr, log_q_positive_ptr, log_q_negative_ptr, positive_id_ptr, negative_id_ptr,
    loss_ptr, log_sum_ptr, B, N, inverse_temperature,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = b < B
    query = _tile(query_ptr, b, B, D, BLOCK_D)
    positive = _tile(positive_ptr, b, B, D, BLOCK_D)
    of_positive = tl.sum(query.to(tl.float32) * positive.to(tl.float32), 1) * inverse_temperature
    of_positive -= tl.load(log_q_positive_ptr + b, mask=in_b, other=0.0)
    positive_id = tl.load(positive_id_ptr + b, mask=in_b, other=0)
    largest = of_positive
    total = tl.full((BLOCK_B,), 1.0, tl.float32)
    for first_n in range(0, N, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N)
        negative = _tile(negative_ptr, n, N, D, BLOCK_D)
        s = tl.dot(query, tl.trans(negative)) * inverse_temperature
        s -= tl.load(log_q_negative_ptr + n, mask=n < N, other=0.0)[None, :]
        negative_id = tl.load(negative_id_ptr + n, mask=n < N, other=0)
        s = tl.where((n < N)[None, :] & (negative_id[None, :] != positive_id[:, None]), s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1))  # finite: the positive is
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(s - larger[:, None]), 1)
        largest = larger
    log_sum = largest + tl.log(total)
    tl.store(loss_ptr + b, log_sum - of_positive, mask=in_b)
    tl.store(log_sum_ptr + b, log_sum, mask=in_b)


@Kernel
def _query_gradient_kernel(
    query_ptr, positive_ptr, negative_ptr, log_q_positive_ptr, log_q_negative_ptr, positive_id_ptr, negative_id_ptr,
    log_sum_ptr, gradient_ptr, of_query_ptr, of_positive_ptr, B, N, inverse_temperature,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    in_b = b < B
    query = _tile(query_ptr, b, B, D, BLOCK_D)
    positive_id = tl.load(positive_id_ptr + b, mask=in_b, other=0)
    log_sum = tl.load(log_sum_ptr + b, mask=in_b, other=0.0)
    gradient = tl.load(gradient_ptr + b, mask=in_b, other=0.0) * inverse_temperature
    of_query = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N)
        negative = _tile(negative_ptr, n, N, D, BLOCK_D)
        s = tl.dot(query, tl.trans(negative)) * inverse_temperature
        s -= tl.load(log_q_negative_ptr + n, mask=n < N, other=0.0)[None, :]
        negative_id = tl.load(negative_id_ptr + n, mask=n < N, other=0)
        s = tl.where((n < N)[None, :] & (negative_id[None, :] != positive_id[:, None]), s, float("-inf"))
        share = tl.exp(s - log_sum[:, None]) * gradient[:, None]
        of_query = tl.dot(share.to(query.dtype), negative, of_query)
    positive = _tile(positive_ptr, b, B, D, BLOCK_D).to(tl.float32)
    query = query.to(tl.float32)
    s = tl.sum(query * positive, 1) * inverse_temperature - tl.load(log_q_positive_ptr + b, mask=in_b, other=0.0)
    pull = ((tl.exp(s - log_sum) - 1.0) * gradient)[:, None]
    place = b.to(tl.int64)[:, None] * D + d[None, :]
    inside = in_b[:, None] & (d < D)[None, :]
    tl.store(of_query_ptr + place, of_query + pull * positive, mask=inside)
    tl.store(of_positive_ptr + place, pull * query, mask=inside)


@Kernel
def _negative_gradient_kernel(
    query_ptr, negative_ptr, log_q_negative_ptr, positive_id_ptr, negative_id_ptr, log_sum_ptr, gradient_ptr, of_negative_ptr,
    B, N, inverse_temperature,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_n = n < N
    negative = _tile(negative_ptr, n, N, D, BLOCK_D)
    negative_id = tl.load(negative_id_ptr + n, mask=in_n, other=0)
    log_q = tl.load(log_q_negative_ptr + n, mask=in_n, other=0.0)
    of_negative = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first_b in range(0, B, BLOCK_B):
        b = first_b + tl.arange(0, BLOCK_B)
        query = _tile(query_ptr, b, B, D, BLOCK_D)
        s = tl.dot(negative, tl.trans(query)) * inverse_temperature - log_q[:, None]
        positive_id = tl.load(positive_id_ptr + b, mask=b < B, other=0)
        log_sum = tl.load(log_sum_ptr + b, mask=b < B, other=0.0)
        gradient = tl.load(gradient_ptr + b, mask=b < B, other=0.0) * inverse_temperature
        s = tl.where((b < B)[None, :] & (negative_id[:, None] != positive_id[None, :]), s, float("-inf"))
        share = tl.exp(s - log_sum[None, :]) * gradient[None, :]
        of_negative = tl.dot(share.to(query.dtype), query, of_negative)
    place = n.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(of_negative_ptr + place, of_negative, mask=in_n[:, None] & (d < D)[None, :])


def configuration(D: int, of_negatives: bool = False) -> dict[str, int]:
    """Tiles: 64 queries stay while 32 negatives at a time pass; for the gradient of negatives, 64 negatives and 32 queries."""
    block_b, block_n = (32, 64) if of_negatives else (64, 32)
    return {
        "D": D, "BLOCK_B": block_b, "BLOCK_N": block_n, "BLOCK_D": max(16, next_power_of_2(D)),
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def kernel_fits(query: Tensor) -> bool:
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[1] <= WIDEST and query.shape[0] > 0


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time: the three kernels at two widths."""
    cases = []
    for kernel in (_forward_kernel, _query_gradient_kernel, _negative_gradient_kernel):
        vectors = ("query_ptr", "positive_ptr", "negative_ptr", "of_query_ptr", "of_positive_ptr", "of_negative_ptr")
        types = {name: "*bf16" if name in vectors else "*fp32" for name, kind in kernel.parameters.items() if kind == "pointer"}
        types |= {"positive_id_ptr": "*i64", "negative_id_ptr": "*i64", "inverse_temperature": "fp32"}
        for D in (64, 128):
            tiles = configuration(D, of_negatives=kernel is _negative_gradient_kernel)
            label = f"{kernel.__name__.strip('_').removesuffix('_kernel')} D{D}"
            cases.append(Case(label, kernel, types, tiles, uses_tensor_cores=True))
    return cases


def _run(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = (query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id)
    if not kernel_fits(query) or not use_triton(query):
        return sampled_softmax_reference(*inputs, temperature)
    config = configuration(query.shape[1])
    loss, log_sum = torch.empty_like(log_q_positive), torch.empty_like(log_q_positive)
    with device_of(query):
        _forward_kernel[(ceil_div(query.shape[0], config["BLOCK_B"]),)](
            *(t.contiguous() for t in inputs), loss, log_sum, query.shape[0], negative.shape[0], 1 / temperature, **config
        )
    return loss, log_sum


def _run_backward(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, log_sum: Tensor, gradient: Tensor, temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id, log_sum, gradient)
    if not kernel_fits(query) or not use_triton(query):
        return sampled_softmax_backward_reference(*inputs, temperature)
    query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id, log_sum, gradient = (
        t.contiguous() for t in inputs
    )
    B, N, config = query.shape[0], negative.shape[0], configuration(query.shape[1])
    of_query, of_positive, of_negative = torch.empty_like(query), torch.empty_like(positive), torch.empty_like(negative)
    with device_of(query):
        _query_gradient_kernel[(ceil_div(B, config["BLOCK_B"]),)](
            query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id, log_sum, gradient,
            of_query, of_positive, B, N, 1 / temperature, **config,
        )  # fmt: skip
        if N:
            config = configuration(query.shape[1], of_negatives=True)
            _negative_gradient_kernel[(ceil_div(N, config["BLOCK_N"]),)](
                query, negative, log_q_negative, positive_id, negative_id, log_sum, gradient, of_negative,
                B, N, 1 / temperature, **config,
            )  # fmt: skip
    return of_query, of_positive, of_negative


_operator = torch.library.custom_op("headrace::sampled_softmax", _run, mutates_args=(), device_types=("cpu", "cuda"))
_backward_operator = torch.library.custom_op(
    "headrace::sampled_softmax_backward", _run_backward, mutates_args=(), device_types=("cpu", "cuda")
)


@_operator.register_fake
def _(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(log_q_positive), torch.empty_like(log_q_positive)


@_backward_operator.register_fake
def _(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, log_sum: Tensor, gradient: Tensor, temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(positive), torch.empty_like(negative)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.temperature = inputs[7]
    ctx.mark_non_differentiable(output[1])


def _pull_back(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    of_query, of_positive, of_negative = _backward_operator(*ctx.saved_tensors, gradient, ctx.temperature)
    return of_query, of_positive, of_negative, None, None, None, None, None


_operator.register_autograd(_pull_back, setup_context=_keep)


def sampled_softmax(
    query: Tensor, positive: Tensor, negative: Tensor, log_q_positive: Tensor, log_q_negative: Tensor,
    positive_id: Tensor, negative_id: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """Loss [B] in nats, in log_q's type.

    query, positive [B, D], negative [N, D]: one floating type. log_q_positive [B], log_q_negative [N]: natural log of the
    chance that an item is drawn (fp32; fp64 with fp64 vectors). positive_id [B], negative_id [N] i64: a negative that is the
    query's own positive does not count. Differentiable in the three vectors. The kernels take bf16 and fp16 up to D = 128; all
    else takes the reference, which holds B * N logits. Raises TypeError or ValueError, naming the argument.
    """
    check_tensor("query", query, FLOATS, ("B", "D"))
    B, D = query.shape
    check_tensor("positive", positive, query.dtype, (B, D))
    check_tensor("negative", negative, query.dtype, ("N", D))
    N, wide = negative.shape[0], torch.float64 if query.dtype == torch.float64 else torch.float32
    check_tensor("log_q_positive", log_q_positive, wide, (B,))
    check_tensor("log_q_negative", log_q_negative, wide, (N,))
    check_tensor("positive_id", positive_id, torch.int64, (B,))
    check_tensor("negative_id", negative_id, torch.int64, (N,))
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    arguments = (query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id)
    check_same_device(
        query=query, positive=positive, negative=negative, log_q_positive=log_q_positive, log_q_negative=log_q_negative,
        positive_id=positive_id, negative_id=negative_id,
    )  # fmt: skip
    return (_run if eager(*arguments) else _operator)(*arguments, temperature)[0]
