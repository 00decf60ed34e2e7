"""Gradients of a fused operation: its reference is computed again and differentiated. Knows nothing of any single operation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recompute_backward(operator: Any, reference: Callable[..., Any]) -> None:
    """Registers on a custom operator the gradient of `reference`, which takes the same arguments.

    Costs one more forward pass, in plain PyTorch, and keeps nothing but the inputs: right where training is rare beside
    serving. Traceable, so that `torch.compile` sees through it. Outputs are a tensor or a tuple of tensors.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def of_wanted(*values: Tensor) -> Any:
            arguments = list(inputs)
            for i, value in zip(wanted, values, strict=True):
                arguments[i] = value
            return reference(*arguments)

        outputs, pull_back = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[:2]
        several = isinstance(outputs, tuple)
        cotangents = tuple(
            torch.zeros_like(output) if gradient is None else gradient
            for output, gradient in zip(outputs if several else (outputs,), gradients, strict=True)
        )
        results: list[Any] = [None] * len(inputs)
        for i, gradient in zip(wanted, pull_back(cotangents if several else cotangents[0]), strict=True):
            results[i] = gradient
        return tuple(results)

    operator.register_autograd(backward, setup_context=setup_context)
