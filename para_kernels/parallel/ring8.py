"""Ring attention in 8 bits: keys and values are rounded where they are, and travel as bytes, half of bfloat16's.

Every piece has means and scales of its own, which travel with it; partial results are weighed by their log-sum-exp, in
which the mean of a piece's keys is made good (`flash_attention_int8`). One launch for each piece: while it runs, the
next one travels, on all transports alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from para_kernels.attention import softmax_scale
from para_kernels.ops8 import Piece, attend_piece, piece_tensors, round_piece
from para_kernels.parallel.parts import Parts
from para_kernels.parallel.sharding import Shards
from para_kernels.parallel.transport import Transport

_ALIGNMENT = 256  # bytes: a tensor's start, which descriptors of tensor copies want at a multiple of 16


@dataclass(frozen=True)
class PieceLayout:
    """How the tensors of a piece lie in bytes.

    Attributes:
        tensors: shape and dtype of each.
        starts: where each begins.
        size: bytes of all.
    """

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    starts: tuple[int, ...]
    size: int

    def piece(self, memory: Tensor) -> Piece:
        """The tensors in `memory`, uint8 (size,)."""
        views = []
        for (shape, dtype), start in zip(self.tensors, self.starts, strict=True):
            stop = start + math.prod(shape) * dtype.itemsize
            views.append(memory[start:stop].view(dtype).view(shape))
        return Piece(*views)


@functools.lru_cache(maxsize=256)
def piece_layout(k_shape: tuple[int, ...], device: torch.device) -> PieceLayout:
    """Of keys and values (B, S, Hk, D); of no bytes where there are no rows."""
    return laid_out(piece_tensors(k_shape, device) if math.prod(k_shape) else ())


def laid_out(tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> PieceLayout:
    """Tensors one after the other."""
    starts, size = [], 0
    for shape, kind in tensors:
        starts.append(size)
        size += -(-math.prod(shape) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
    return PieceLayout(tensors, tuple(starts), size)


def ring_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    transport: Transport,
    rank: int,
    lengths: Sequence[int],
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """As `Transport.ring`, in 8 bits; `rank` is this rank's in the transport's group."""
    shards = Shards(tuple(lengths))
    batch, _, kv_heads, dim = k.shape
    layouts = [piece_layout((batch, rows, kv_heads, dim), k.device) for rows in lengths]
    own_q_lens = None if q_lens is None else shards.local_lens(q_lens, rank)
    factor = softmax_scale(scale, dim)
    parts = Parts(q, shards)

    def lens_of(owner: int) -> Tensor | None:
        return None if kv_lens is None else shards.local_lens(kv_lens, owner)

    def fill(memory: Tensor) -> None:
        round_piece(k, v, lens_of(rank), layouts[rank].piece(memory))

    def use(owner: int, memory: Tensor) -> None:
        piece = layouts[owner].piece(memory)
        parts.add(lambda: attend_piece(q, piece, lengths[owner], lens_of(owner), own_q_lens, factor))

    transport.circulate([layout.size for layout in layouts], fill, use)
    return parts.result()
