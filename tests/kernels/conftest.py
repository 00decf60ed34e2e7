"""Kernels run compiled where there is a GPU, else in Triton's interpreter, on the CPU, in this folder's tests only.

The interpreter reads outside its arrays without a word, runs programs one after the other and gets bf16 wrong: hence guard
zones, poisoned outputs and `kernels.interpreter`.
"""

import os

import pytest
import torch

GPU = torch.cuda.is_available()

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read while triton.language is imported ...
    import triton
    import triton.language

    triton.knobs.runtime.interpret = True  # ... and again, from here, as each kernel is first launched
    del os.environ["TRITON_INTERPRET"]  # nothing that a test starts inherits it
    if isinstance(triton.language.sum, triton.runtime.JITFunction):
        raise pytest.UsageError("something imported triton before tests/kernels/conftest.py could ask for its interpreter")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def triton_backend(monkeypatch, device) -> torch.device:
    """Operations run their Triton kernel, whatever the device; returns the device to make tensors on."""
    monkeypatch.setenv("HEADRACE_KERNELS", "triton")
    return device


@pytest.fixture
def guard():
    """`guard(tensor, poison)` copies a tensor between two guard zones full of `poison`, and checks at the end that no kernel
    wrote there. With a poison that would show in the result (huge, NaN), reads outside the tensor are caught as well."""
    zones = []
    width = 512

    def place(tensor: torch.Tensor, poison: float) -> torch.Tensor:
        buffer = torch.full((tensor.numel() + 2 * width,), poison, dtype=tensor.dtype, device=tensor.device)
        view = buffer[width : width + tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        zones.append((buffer, poison))
        return view

    yield place
    for buffer, poison in zones:
        expected = torch.full((width,), poison, dtype=buffer.dtype, device=buffer.device)
        for zone in (buffer[:width], buffer[-width:]):
            torch.testing.assert_close(zone, expected, rtol=0, atol=0, equal_nan=True, msg="a guard zone was written to")


@pytest.fixture
def assert_as_accurate():
    """`assert_as_accurate(kernel, plain, exact, dtype)`: against float64, the kernel's largest error is at most `factor` times
    that of PyTorch in the same type, plus two roundings. The interpreter truncates where it stores bf16: twice the factor."""

    def check(kernel: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, factor: float = 2.0) -> None:
        assert kernel.shape == exact.shape
        assert torch.isfinite(kernel).all(), "the kernel left NaN or infinity behind"
        if exact.numel() == 0:
            return
        if dtype == torch.bfloat16 and not GPU:
            factor *= 2
        exact = exact.cpu()
        scale = exact.abs().max().item() + 1e-12
        errors = [(value.detach().cpu().double() - exact).abs().max().item() / scale for value in (kernel, plain)]
        floor = 2 * torch.finfo(dtype).eps
        assert errors[0] <= factor * errors[1] + floor, f"kernel is off by {errors[0]:.2e}, torch {dtype} by {errors[1]:.2e}"

    return check
