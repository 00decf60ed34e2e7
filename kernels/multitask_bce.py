"""Weighted binary cross entropy over the heads of a ranker, in one pass.

    loss = sum_t weight[t] * mean_b BCE(logits[b, t], labels[b, t]),   0 where a label is NaN (not observed)

Shape letters: B examples, T heads. Bytes: B*T*8 read, one number per tile written: launch bound below a million logits. Every
tile's sum goes to a place of its own and they are added in order, so the result does not depend on the launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.ahead_of_time import Case
from kernels.autograd import recompute_backward
from kernels.backend import Kernel, ceil_div, device_of, eager, use_triton
from kernels.checks import check_same_device, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def multitask_bce_reference(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Plain PyTorch, any device: softplus(x) - x*y is the cross entropy without a logarithm of a probability."""
    x = logits.to(weight.dtype)
    observed = ~labels.isnan()
    loss = softplus(x) - x * torch.where(observed, labels.to(weight.dtype), 0)
    return (torch.where(observed, loss, 0).sum(0) * weight).sum() / max(logits.shape[0], 1)


@Kernel
def _multitask_bce_kernel(logits_ptr, labels_ptr, weight_ptr, partial_ptr, TOTAL, T, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < TOTAL
    x = tl.load(logits_ptr + i, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(labels_ptr + i, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + i % T, mask=inside, other=0.0).to(tl.float32)
    observed = inside & (y == y)
    loss = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))) - x * tl.where(observed, y, 0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(observed, loss * weight, 0.0), 0))


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time."""
    others = {"labels_ptr": "*fp32", "weight_ptr": "*fp32", "partial_ptr": "*fp32"}
    return [
        Case(number, _multitask_bce_kernel, {"logits_ptr": f"*{number}", **others}, {"BLOCK": BLOCK, "num_warps": 4})
        for number in ("fp32", "bf16")
    ]


def launch(logits: Tensor, labels: Tensor, weight: Tensor, partial: Tensor) -> None:
    """The Triton kernel into `partial` fp32 [tiles]. Contiguous tensors; nothing is checked here."""
    with device_of(logits):
        _multitask_bce_kernel[(partial.shape[0],)](
            logits, labels, weight, partial, logits.numel(), logits.shape[1], BLOCK=BLOCK, num_warps=4
        )


def _run(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    if logits.numel() == 0 or weight.dtype == torch.float64 or not use_triton(logits):
        return multitask_bce_reference(logits, labels, weight)
    partial = weight.new_empty(ceil_div(logits.numel(), BLOCK))
    launch(logits.contiguous(), labels.contiguous(), weight.contiguous(), partial)
    return partial.sum() / logits.shape[0]


_operator = torch.library.custom_op("headrace::multitask_bce", _run, mutates_args=(), device_types=("cpu", "cuda"))
recompute_backward(_operator, multitask_bce_reference)


@_operator.register_fake
def _(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(())


def multitask_bce(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The loss, a scalar in nats of weight's type; 0 for an empty batch.

    logits [B, T]: any floating type. labels [B, T] fp32 (or fp64, as weight): 0 .. 1, NaN where not observed. weight [T] fp32
    or fp64. Differentiable in logits. Raises TypeError or ValueError, naming the argument.
    """
    check_tensor("logits", logits, FLOATS, ("B", "T"))
    check_tensor("weight", weight, (torch.float32, torch.float64), (logits.shape[1],))
    check_tensor("labels", labels, weight.dtype, tuple(logits.shape))
    check_same_device(logits=logits, labels=labels, weight=weight)
    return (_run if eager(logits, labels, weight) else _operator)(logits, labels, weight)
