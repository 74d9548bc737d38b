"""Checks of arguments, before any work starts: a `ValueError` names the argument, what it was and what is allowed.

Only properties that the host knows are looked at: shapes, dtypes, devices, strides. No device value is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, allowed are {', '.join(str(d) for d in allowed)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, must be {device} like the other tensors")


def check_device_type(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: got device {tensor.device}, allowed are cpu and cuda")


def check_dims(name: str, tensor: Tensor, shape: str) -> None:
    """`shape` names the dimensions, for instance "B, S, H, D"."""
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, must be ({shape})")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, must be {tuple(expected)} = ({meaning})")


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Same shape, dtype and device as another argument."""
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, must be {tuple(like.shape)} like {like_name}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, must be {like.dtype} like {like_name}")
    check_device(name, tensor, like.device)


def check_contiguous_last(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: got strides {tensor.stride()} for shape {tuple(tensor.shape)},"
            " the last dimension must be contiguous (stride 1)"
        )


def check_inference(**tensors: Tensor | None) -> None:
    """The operators have no backward: refuse what autograd would silently cut off."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name}: requires grad, but this is inference only; call it under torch.no_grad()")
