"""Heads for rows: each rank gives its rows of the other ranks' heads and gets all rows of its own heads.

Method: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv 2309.14509. Heads need not divide: ranks hold numbers that differ
by at most one, possibly none. Rows arrive in rank order, so the sequence stays in one piece, padding at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels.parallel.collective import all_to_all
from para_kernels.parallel.sharding import Shards


@dataclass(frozen=True)
class Heads:
    """What one rank attends: query heads, and the key heads that these read.

    `repeats` is empty where query head h reads key head h // (number of query heads / number of key heads) as
    everywhere; else it names the key head, counted from kv.start, of each query head.
    """

    q: slice
    kv: slice
    repeats: tuple[int, ...] = ()

    @property
    def q_heads(self) -> int:
        return self.q.stop - self.q.start

    @property
    def rows(self) -> int:
        """Heads in a row that travels: queries, keys, values."""
        return self.q_heads + 2 * (self.kv.stop - self.kv.start)


@lru_cache(maxsize=256)
def head_shards(heads: int, kv_heads: int, world: int) -> tuple[Heads, ...]:
    """The heads of every rank: query heads as evenly as they go, and the key heads that they need.

    Key heads are sent to every rank that reads them, so fewer key heads than ranks are no obstacle.
    """
    group = heads // kv_heads
    return tuple(_heads(piece.start, piece.stop, group) for piece in map(Shards.of(heads, world).piece, range(world)))


def _heads(start: int, stop: int, group: int) -> Heads:
    if start == stop:
        return Heads(slice(start, stop), slice(0, 0))
    kv = slice(start // group, -(-stop // group))
    count = kv.stop - kv.start
    regular = count == 1 or (start % group == 0 and stop % group == 0)
    repeats = () if regular else tuple(head // group - kv.start for head in range(start, stop))
    return Heads(slice(start, stop), kv, repeats)


def heads_for_rows(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """From this rank's rows of all heads to all rows of this rank's heads: one collective for q, k and v.

    Rows travel as (row, sample, heads of q then k then v, D), so that what arrives from the ranks, one after the other,
    is the sequence: the results are views of the receive buffer, nothing is copied after it.

    Args:
        q: (B, S_r, H, D), any strides.
        k, v: (B, S_r, Hk, D).
        shards: rows of every rank of `group`.

    Returns:
        q (B, S, h, D), k and v (B, S, hk, D), h and hk this rank's heads, D contiguous; h may be 0.
    """
    heads = head_shards(q.shape[2], k.shape[2], group.size())
    batch, rows, _, dim = q.shape
    mine = heads[group.rank()]
    sends = [rows * batch * theirs.rows * dim for theirs in heads]
    receives = [size * batch * mine.rows * dim for size in shards.sizes]
    packed = q.new_empty(sum(sends))
    for theirs, chunk in zip(heads, packed.split(sends), strict=True):
        parts = [x.transpose(0, 1) for x in (q[:, :, theirs.q], k[:, :, theirs.kv], v[:, :, theirs.kv])]
        if chunk.numel():
            torch.cat(parts, 2, out=chunk.view(rows, batch, theirs.rows, dim))
    received = all_to_all(packed, sends, receives, group, "the heads of Q, K and V")
    joint = received.view(shards.total, batch, mine.rows, dim).transpose(0, 1)
    kv_heads = (mine.rows - mine.q_heads) // 2
    queries, keys, values = joint.split([mine.q_heads, kv_heads, kv_heads], 2)
    if mine.repeats:
        keys, values = (_repeated(x, mine.repeats) for x in (keys, values))
    return queries, keys, values


def _repeated(x: Tensor, repeats: tuple[int, ...]) -> Tensor:
    """Key heads repeated for query heads that do not share them evenly."""
    return torch.cat([x[:, :, head : head + 1] for head in repeats], 2)


def rows_for_heads(local: Tensor, heads: int, kv_heads: int, shards: Shards, group: ProcessGroup) -> Tensor:
    """The way back: from all rows of this rank's heads (B, S, h, ...) to this rank's rows of all heads.

    Args:
        local: (B, S, h, D), or (B, S, h) for an lse.
        heads, kv_heads: of the whole.

    Returns:
        (B, S_r, H, ...), contiguous.
    """
    split = head_shards(heads, kv_heads, group.size())
    batch, _, own, *rest = local.shape
    width = rest[0] if rest else 1
    rows = shards.sizes[group.rank()]
    sends = [size * batch * own * width for size in shards.sizes]
    receives = [rows * batch * theirs.q_heads * width for theirs in split]
    packed = local.transpose(0, 1).reshape(-1)
    received = all_to_all(packed, sends, receives, group, "the attended heads")
    out = local.new_empty((batch, rows, heads, *rest))
    for theirs, chunk in zip(split, received.split(receives), strict=True):
        out[:, :, theirs.q] = chunk.view(rows, batch, theirs.q_heads, *rest).transpose(0, 1)
    return out
