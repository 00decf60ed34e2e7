"""Argument checks shared by the operations. An error names the argument, the rule and what came, never the values."""

import torch
from torch import Tensor


def check_tensor(name: str, value: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | str, ...]) -> None:
    """Raises TypeError unless `value` is a strided tensor of (one of) `dtype`; ValueError unless it has `shape`.

    In `shape` a number is required, a word names a free size for the message: `("N", 3)`.
    """
    wanted = f"[{', '.join(map(str, shape))}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {wanted}, got {type(value).__name__}")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor {wanted}, got one of layout {str(value.layout).removeprefix('torch.')}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors (None is skipped) are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {places}")


def check_indices(name: str, index: Tensor, low: int, high: int) -> None:
    """Raises IndexError unless every index is in low .. high - 1. Waits for the device: CPU tensors and debug mode only."""
    if index.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(index))
    if smallest < low or largest >= high:
        raise IndexError(f"{name} must lie in {low} .. {high - 1}, got {smallest} .. {largest}")
