"""Makes Triton's CPU interpreter right, or loud, about bf16.

The interpreter keeps bf16 as uint16 bit patterns. `tl.dot`, arithmetic, comparisons and reductions work on the patterns:
wrong numbers and no error (Triton 3.6, 3.7 and 3.9). Knows nothing of the kernels; touches nothing but the interpreter.
"""

import functools
from typing import Any


@functools.cache
def guard_bf16() -> None:
    """`tl.dot` upcasts bf16 inputs (as tensor cores do, exactly); any other bf16 arithmetic raises TypeError. Idempotent."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

    create_dot, binary_op = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op
    check_tensor = ReduceScanOpInterface.check_tensor

    def is_bf16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def upcast(handle: Any) -> Any:
        if not is_bf16(handle):
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def refuse(*handles: Any) -> None:
        if any(is_bf16(handle) for handle in handles):
            raise TypeError("bf16 arithmetic is silently wrong in Triton's interpreter: upcast to fp32 right after the load")

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, upcast(a), upcast(b), *rest)

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        refuse(left, right)
        return binary_op(self, left, right, op)

    def reduced(self: Any, values: Any) -> None:
        refuse(*(value.handle for value in values))
        check_tensor(self, values)

    ReduceScanOpInterface.check_tensor = reduced
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.binary_op = binary
