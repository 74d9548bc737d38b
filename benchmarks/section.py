"""What a section of the GPU report is: a function of the device that gives lines to print and records to write."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .record import Check, Record

Result = tuple[list[str], list[Record | Check]]
Section = Callable[[torch.device], Result]


class CheckFailedError(Exception):
    """A check that did not hold; the message says which and by how much."""


class SectionSkippedError(Exception):
    """A section that cannot run on this device; the message says why."""


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise SectionSkippedError("needs CUDA")


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16", as records have it."""
    return str(dtype).removeprefix("torch.")
