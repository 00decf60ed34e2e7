"""First-stage ranker, fused: a two-layer network over (user, item) pairs, its heads, and their utility.

    hidden1[n] = relu(first_user @ user[user_of_item[n]] + first_item @ item[n] + first_bias)
    hidden2[n] = relu(second @ hidden1[n] + second_bias)
    logits[n]  = heads @ hidden2[n] + heads_bias
    utility[n] = sum_t mix[t] * sigmoid(logits[n, t])

The first layer of [user ; item] is split, so the user's part is computed once per request and never copied per item.

Shape letters: N items, U users (requests), D user features, F item features, H first and G second hidden width, T heads.
FLOP: 2*N*(F*H + H*G + G*T), where the unsplit layer needs 2*N*D*H more. Bytes: N*F read, N*(1 + T) written, the weights once
per L2. At N = 2,000 it is one launch long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.ahead_of_time import Case
from kernels.autograd import recompute_backward
from kernels.backend import Kernel, ceil_div, debug, device_of, eager, next_power_of_2, use_triton
from kernels.checks import check_indices, check_same_device, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

MOST_HEADS, WIDEST_SECOND_LAYER, WIDEST_FP32_SECOND_LAYER = 16, 256, 128
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def l1_score_reference(
    user: Tensor, item: Tensor, user_of_item: Tensor,
    first_user: Tensor, first_item: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor,
    heads: Tensor, heads_bias: Tensor, mix: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, any device and floating type."""
    user_part = linear(user, first_user, first_bias)
    # One column per item: a product that gives but a few rows is many times faster than one that gives a few columns.
    hidden1 = first_item @ item.T
    hidden1 += user_part.T if user.shape[0] == 1 else user_part.T.index_select(1, user_of_item)
    hidden2 = torch.addmm(second_bias[:, None], second, hidden1.relu_()).relu_()
    logits = torch.addmm(heads_bias[:, None], heads, hidden2).to(_result_dtype(item))
    return mix.to(logits.dtype) @ torch.sigmoid(logits), logits.T.contiguous()


@Kernel
def _l1_score_kernel(
    item_ptr, user_part_ptr, user_of_item_ptr, first_item_ptr, second_ptr, second_bias_ptr, heads_ptr, heads_bias_ptr, mix_ptr,
    utility_ptr, logits_ptr, N, U,
    F: tl.constexpr, H: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G)
    t = tl.arange(0, 16)
    in_n, in_g, in_t = n < N, g < G, t < T
    dtype = item_ptr.dtype.element_ty

    user = tl.load(user_of_item_ptr + n, mask=in_n, other=-1)
    has_user = (user >= 0) & (user < U)

    # The first layer in slices of H, each fed to the second layer at once: its whole width never exists.
    hidden2 = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for first_h in range(0, H, BLOCK_H):
        h = first_h + tl.arange(0, BLOCK_H)
        in_h = h < H
        hidden1 = tl.load(
            user_part_ptr + user[:, None] * H + h[None, :], mask=has_user[:, None] & in_h[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        for first_f in range(0, F, BLOCK_F):
            f = first_f + tl.arange(0, BLOCK_F)
            in_f = f < F
            item = tl.load(item_ptr + n[:, None] * F + f[None, :], mask=in_n[:, None] & in_f[None, :], other=0.0)
            weight = tl.load(first_item_ptr + h[None, :] * F + f[:, None], mask=in_h[None, :] & in_f[:, None], other=0.0)
            hidden1 = tl.dot(item, weight, hidden1, input_precision=PRECISION)
        hidden1 = tl.maximum(hidden1, 0.0).to(dtype)
        weight = tl.load(second_ptr + g[None, :] * H + h[:, None], mask=in_g[None, :] & in_h[:, None], other=0.0)
        hidden2 = tl.dot(hidden1, weight, hidden2, input_precision=PRECISION)

    hidden2 += tl.load(second_bias_ptr + g, mask=in_g, other=0.0).to(tl.float32)[None, :]
    hidden2 = tl.maximum(hidden2, 0.0).to(dtype)
    weight = tl.load(heads_ptr + t[None, :] * G + g[:, None], mask=in_t[None, :] & in_g[:, None], other=0.0)
    logits = tl.dot(hidden2, weight, input_precision=PRECISION)
    logits += tl.load(heads_bias_ptr + t, mask=in_t, other=0.0).to(tl.float32)[None, :]
    mix = tl.load(mix_ptr + t, mask=in_t, other=0.0).to(tl.float32)
    utility = tl.sum(mix[None, :] / (1.0 + tl.exp(-logits)), 1)
    tl.store(utility_ptr + n, utility, mask=in_n)
    tl.store(logits_ptr + n[:, None] * T + t[None, :], logits, mask=in_n[:, None] & in_t[None, :])


def configuration(F: int, H: int, G: int, T: int, dtype: torch.dtype) -> dict[str, object]:
    """Tiles for one model: 64 items a program, slices of the other widths that fit the registers."""
    full = dtype == torch.float32
    block_g = max(16, next_power_of_2(G))
    widest_f, widest_h = (32, 32) if full else (64, 64)
    return {
        "F": F, "H": H, "G": G, "T": T, "BLOCK_N": 64, "BLOCK_G": block_g,
        "BLOCK_F": max(16, min(widest_f, next_power_of_2(F))), "BLOCK_H": max(16, min(widest_h, next_power_of_2(H))),
        "PRECISION": "tf32x3" if full else "ieee", "num_warps": 8 if full else 4, "num_stages": 2 if full else 3,
    }  # fmt: skip


def kernel_fits(dtype: torch.dtype, G: int) -> bool:
    """Whether there is a configuration that spills nothing. Full precision keeps three products per tile, so it is narrower."""
    return dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and G <= WIDEST_FP32_SECOND_LAYER)


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time: the demo's width, larger ones, the widest."""
    cases = []
    for F, H, G, T in ((48, 64, 32, 1), (64, 128, 64, 4), (256, 256, 128, 8), (256, 512, 256, 16)):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            if not kernel_fits(dtype, G):
                continue
            types = {p: f"*{name}" for p, kind in _l1_score_kernel.parameters.items() if kind == "pointer"}
            types |= {"user_of_item_ptr": "*i64", "utility_ptr": "*fp32", "logits_ptr": "*fp32"}
            label = f"{name} F{F} H{H} G{G} T{T}"
            cases.append(Case(label, _l1_score_kernel, types, configuration(F, H, G, T, dtype), uses_tensor_cores=True))
    return cases


def launch(
    item: Tensor, user_part: Tensor, user_of_item: Tensor, first_item: Tensor, second: Tensor, second_bias: Tensor,
    heads: Tensor, heads_bias: Tensor, mix: Tensor, utility: Tensor, logits: Tensor,
) -> None:  # fmt: skip
    """The Triton kernel into `utility` fp32 [N] and `logits` fp32 [N, T]. Contiguous tensors; nothing is checked here."""
    N, F = item.shape
    if N == 0:
        return
    config = configuration(F, second.shape[1], second.shape[0], heads.shape[0], item.dtype)
    tile = config["BLOCK_N"]
    assert isinstance(tile, int)
    with device_of(item):
        _l1_score_kernel[(ceil_div(N, tile),)](
            item, user_part, user_of_item, first_item, second, second_bias, heads, heads_bias, mix, utility, logits,
            N, user_part.shape[0], **config
        )  # fmt: skip


def _result_dtype(item: Tensor) -> torch.dtype:
    return torch.float64 if item.dtype == torch.float64 else torch.float32


def _run(
    user: Tensor, item: Tensor, user_of_item: Tensor,
    first_user: Tensor, first_item: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor,
    heads: Tensor, heads_bias: Tensor, mix: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if debug() or not item.is_cuda:
        check_indices("user_of_item", user_of_item, 0, user.shape[0])
    if not kernel_fits(item.dtype, second.shape[0]) or not use_triton(item):
        return l1_score_reference(
            user, item, user_of_item, first_user, first_item, first_bias, second, second_bias, heads, heads_bias, mix
        )
    user_part = linear(user, first_user, first_bias)
    utility = item.new_empty(item.shape[0], dtype=torch.float32)
    logits = item.new_empty(item.shape[0], heads.shape[0], dtype=torch.float32)
    inputs = (item, user_part, user_of_item, first_item, second, second_bias, heads, heads_bias, mix, utility, logits)
    launch(*(tensor.contiguous() for tensor in inputs))
    return utility, logits


_operator = torch.library.custom_op("headrace::l1_score", _run, mutates_args=(), device_types=("cpu", "cuda"))
recompute_backward(_operator, l1_score_reference)


@_operator.register_fake
def _(
    user: Tensor, item: Tensor, user_of_item: Tensor,
    first_user: Tensor, first_item: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor,
    heads: Tensor, heads_bias: Tensor, mix: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = _result_dtype(item)
    return item.new_empty(item.shape[0], dtype=dtype), item.new_empty(item.shape[0], heads.shape[0], dtype=dtype)


def l1_score(
    user: Tensor, item: Tensor, user_of_item: Tensor,
    first_user: Tensor, first_item: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor,
    heads: Tensor, heads_bias: Tensor, mix: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Utility [N] and logits [N, T] of N items, each for its own user. fp32 results (fp64 if the input is).

    user [U, D], item [N, F]: normalised features. user_of_item i64 [N]: row of `user`. Weights as nn.Linear keeps them:
    first_user [H, D], first_item [H, F], first_bias [H], second [G, H], second_bias [G], heads [T, G], heads_bias [T];
    mix [T] weighs the probabilities. All floating tensors share one type (fp32, bf16, fp16, fp64); T <= 16, G <= 256; fp64, and
    fp32 with G > 128, take the reference on every device. Differentiable in all of them.

    Raises TypeError, ValueError or IndexError, naming the argument. On a GPU user_of_item is checked in debug mode only; a
    bad index then reads nothing and gets the score of an all-zero user part.
    """
    check_tensor("item", item, FLOATS, ("N", "F"))
    check_tensor("user", user, item.dtype, ("U", "D"))
    check_tensor("user_of_item", user_of_item, torch.int64, (item.shape[0],))
    check_tensor("second", second, item.dtype, ("G", "H"))
    check_tensor("heads", heads, item.dtype, ("T", second.shape[0]))
    G, H, T = second.shape[0], second.shape[1], heads.shape[0]
    check_tensor("first_user", first_user, item.dtype, (H, user.shape[1]))
    check_tensor("first_item", first_item, item.dtype, (H, item.shape[1]))
    check_tensor("first_bias", first_bias, item.dtype, (H,))
    check_tensor("second_bias", second_bias, item.dtype, (G,))
    check_tensor("heads_bias", heads_bias, item.dtype, (T,))
    check_tensor("mix", mix, item.dtype, (T,))
    if T > MOST_HEADS or G > WIDEST_SECOND_LAYER:
        raise ValueError(f"heads must be at most {MOST_HEADS} x {WIDEST_SECOND_LAYER}, got {T} x {G}")
    arguments = (user, item, user_of_item, first_user, first_item, first_bias, second, second_bias, heads, heads_bias, mix)
    check_same_device(
        user=user, item=item, user_of_item=user_of_item, first_user=first_user, first_item=first_item, first_bias=first_bias,
        second=second, second_bias=second_bias, heads=heads, heads_bias=heads_bias, mix=mix,
    )  # fmt: skip
    return (_run if eager(*arguments) else _operator)(*arguments)
