"""bf16 in Triton's interpreter: right in `tl.dot`, refused everywhere else."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import Kernel, interpreting

if not interpreting():
    pytest.skip("kernels run compiled here", allow_module_level=True)

import triton.language as tl


@Kernel
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)))


@Kernel
def add_kernel(a_ptr, out_ptr, SIZE: tl.constexpr):
    value = tl.load(a_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), value + value)


@Kernel
def less_kernel(a_ptr, out_ptr, SIZE: tl.constexpr):
    value = tl.load(a_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), (value < value).to(tl.float32))


@Kernel
def sum_kernel(a_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(a_ptr + tl.arange(0, SIZE)), 0))


def test_a_dot_of_bf16_equals_the_same_dot_of_its_values():
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.full((16, 16), float("nan"))
    dot_kernel[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [add_kernel, less_kernel, sum_kernel], ids=lambda k: k.__name__)
def test_any_other_bf16_arithmetic_raises(kernel):
    with pytest.raises(Exception, match="upcast to fp32 right after the load"):
        kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.bfloat16), SIZE=16)


def test_the_same_arithmetic_in_fp32_passes():
    out = torch.zeros(16)
    add_kernel[(1,)](torch.ones(16), out, SIZE=16)
    assert out.tolist() == [2.0] * 16
