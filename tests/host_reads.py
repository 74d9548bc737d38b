"""Counting what makes the host wait for a device: every Python-level read of a tensor's values."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {
    Tensor.tolist,
    Tensor.item,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.nonzero,
}


class HostReads(TorchFunctionMode):
    """`with HostReads() as reads:` counts the reads in the block in `reads.count`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))
