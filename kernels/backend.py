"""Which implementation runs, and Triton kernels that import Triton only when they are launched.

Knows nothing of any single operation. Settings, read at every call:

    HEADRACE_KERNELS        auto (default): CUDA tensors and Triton importable -> Triton, else the PyTorch reference
                            triton: always Triton; on CPU tensors only under TRITON_INTERPRET=1
                            torch: always the PyTorch reference
    HEADRACE_KERNELS_DEBUG  1: also check what is inside index tensors (on a GPU that waits for the device)
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


class Kernel:
    """A Triton kernel written as a plain function; `@Kernel` compiles it at its first launch, `kernel[grid](...)`.

    The function's module gets `tl` at that moment, so it imports `triton.language as tl` under TYPE_CHECKING only and begins
    with `from __future__ import annotations`.
    Kernels may call each other: each is loaded with the first that names it.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    @functools.cached_property
    def jit(self) -> Any:
        """The `triton.jit` function (or its interpreted twin)."""
        import triton
        import triton.language

        if interpreting():
            from kernels.interpreter import guard_bf16

            guard_bf16()
        names = self.function.__globals__
        names["tl"] = triton.language
        for name in self.function.__code__.co_names:
            if isinstance(names.get(name), Kernel):
                names[name] = names[name].jit
        # Sizes are not compiled in: a batch of 16, or of 1, must not stop a request for a second of compiling.
        sizes = [name for name, kind in self.parameters.items() if kind == "size"]
        return triton.jit(self.function, do_not_specialize=sizes)

    @functools.cached_property
    def parameters(self) -> dict[str, str]:
        """Each parameter's kind: `constexpr`, `pointer` (named `…_ptr`) or `size`."""
        kinds = {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            kinds[name] = (
                "constexpr" if "constexpr" in str(parameter.annotation) else "pointer" if name.endswith("_ptr") else "size"
            )
        return kinds

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError(
            f"{self.__name__} is a kernel: launch it with {self.__name__}[grid](...), or call it from another kernel"
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jit[grid]


def choice() -> str:
    """HEADRACE_KERNELS. Raises ValueError on a value that is none of auto, triton, torch."""
    value = os.environ.get("HEADRACE_KERNELS") or "auto"
    if value not in BACKENDS:
        raise ValueError(f"HEADRACE_KERNELS must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def debug() -> bool:
    return os.environ.get("HEADRACE_KERNELS_DEBUG", "") not in ("", "0")


def interpreting() -> bool:
    """True where Triton kernels run in Triton's CPU interpreter."""
    if "triton" in sys.modules:
        return bool(importlib.import_module("triton").knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")


@functools.cache
def triton_importable() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor runs its Triton kernel. Raises RuntimeError where it was asked for and cannot."""
    chosen = choice()
    if chosen == "torch":
        return False
    if chosen == "auto":
        return tensor.is_cuda and triton_importable() and not interpreting()
    if not triton_importable():
        raise RuntimeError("HEADRACE_KERNELS=triton, but triton is not installed; use auto or torch")
    if not tensor.is_cuda and not interpreting():
        raise RuntimeError(
            f"HEADRACE_KERNELS=triton needs CUDA tensors (or TRITON_INTERPRET=1), got a tensor on {tensor.device}"
        )
    return True


def eager(*arguments: Any) -> bool:
    """Whether to run an operation straight, past PyTorch's dispatcher: real tensors, nobody is tracing, and no gradient is
    wanted from a Triton kernel (PyTorch differentiates the reference by itself).

    The first call of any `torch.library.custom_op` imports torch._dynamo and with it Triton (4 s on two cores), every
    further one costs 36 us: no request should pay that for nothing.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if torch.compiler.is_compiling() or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not (differentiated and use_triton(tensors[0]))


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's own GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability_of(tensor: Tensor) -> int:
    """80 for an A100, 90 for an H100 or H200, and so on; 80 for a tensor on the CPU, whose kernels are interpreted."""
    major, minor = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)
    return 10 * major + minor


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
