"""Attention over pieces of the keys, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from para_kernels.attention import merge_states
from para_kernels.parallel.sharding import Shards


class Parts:
    """Attention of `q` (B, S_r, H, D) over the pieces of `shards`, one after the other: (out, lse) of each are merged.

    Outputs are kept in float32 until the last merge, so that each part is rounded once. Where the last merge is also
    the first it takes both as they are: it is in float32 inside.
    """

    def __init__(self, q: Tensor, shards: Shards) -> None:
        self._q = q
        self._left = sum(size > 0 for size in shards.sizes)
        self._total: tuple[Tensor, Tensor] | None = None

    def add(self, attend: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Attend one of the pieces that have keys, by `attend`: out (B, S_r, H, D) and lse (B, H, S_r)."""
        self._left -= 1
        if not self._q.numel():
            return
        out, lse = attend()
        if self._total is None:
            self._total = out, lse
            return
        total, total_lse = self._total
        if self._left or total.dtype != out.dtype:
            total, out = total.float(), out.float()
        self._total = merge_states(total, total_lse, out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out in q's dtype and lse; zeros and -inf where there were no keys."""
        q = self._q
        if self._total is not None:
            out, lse = self._total
            return out.to(q.dtype), lse
        batch, rows, heads, _ = q.shape
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        return out, q.new_full((batch, heads, rows), float("-inf"), dtype=torch.float32)
