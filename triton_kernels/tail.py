"""The last round of an attention kernel's tiles, cut along their keys so that it fills the multiprocessors.

Tiles are computed a round at a time, one on each multiprocessor, and the last round is seldom full: 288 tiles on 132 of
them take as long as 396. So the tiles of the last round are cut into parts, each of which attends some of the keys
(as in Flash-Decoding, Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; and Osama et al. 2023,
Stream-K, arXiv 2301.03598, for the round). A part leaves its rows in float32 and their lse; the kernel of this module
weighs them. Rows are thus rounded once, as in whole tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launcher, Merge

MOST_CUTS = 8
# What the second launch and its kernel take, and what a part takes more than its share of a tile, in microseconds.
MERGING = 8.0
OF_PART = 3.0
# Where it should gain less than this, tiles stay whole: one launch, and no scratch memory.
_LEAST_GAIN = 0.02
_ROWS = 16  # of a program


class Cut(NamedTuple):
    """How tiles are computed.

    Attributes:
        whole: so many of them in one piece.
        cuts: into so many parts each of the others.
    """

    whole: int
    cuts: int

    def items(self, tiles: int) -> int:
        """Whole tiles and parts."""
        return self.whole + (tiles - self.whole) * self.cuts

    def parts(self, tiles: int) -> int:
        return (tiles - self.whole) * (self.cuts if self.cuts > 1 else 0)


def cheapest_cut(
    tiles: int,
    blocks: int,
    processors: int,
    *,
    of_tile: float,
    of_block: float,
    most: int = MOST_CUTS,
    pieces: int = 1,
) -> tuple[Cut, float]:
    """The cut that should take the fewest microseconds, and those, of tiles with `blocks` blocks of keys each.

    Args:
        of_tile, of_block: what a tile's start and end take, and each block.
        most: parts of a tile.
        pieces: in which keys come, of about the same size; a part has its share of each.
    """
    full, left = divmod(tiles, processors)
    whole = (full + (left > 0)) * (of_tile + of_block * blocks)
    choices = {Cut(tiles, 1): whole * (1 - _LEAST_GAIN)}
    for cuts in range(2, min(most, blocks) + 1) if left else ():
        rounds = -(-left * cuts // processors)
        of_part = pieces * -(-blocks // (pieces * cuts))
        last = rounds * (of_tile + OF_PART + of_block * of_part) + MERGING
        choices[Cut(full * processors, cuts)] = full * (of_tile + of_block * blocks) + last
    best = min(choices, key=choices.__getitem__)
    return best, whole if best.cuts == 1 else choices[best]


@triton.jit(
    do_not_specialize=("plane", "whole", "cuts", "rows_of_tile", "rows_q", "heads", "batches", "blocks"),
    do_not_specialize_on_alignment=("lse",),
)
def _merge_parts(
    scratch, out, lse, plane, whole, cuts, rows_of_tile, rows_q, heads, batches, blocks,
    D: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, HEADS_LAST: tl.constexpr,
):  # fmt: skip
    """Some rows of a tile that was cut. `scratch` holds `plane` rows of D, then as many lse."""
    at = tl.program_id(0) * ROWS
    of_tail = at // rows_of_tile
    row_of_tile = at % rows_of_tile + tl.arange(0, ROWS)
    tile = whole + of_tail
    rest = tile // blocks
    head, batch = rest % heads, rest // heads
    if HEADS_LAST:
        head, batch = rest // batches, rest % batches

    part = tl.arange(0, MOST)[:, None]
    rows = (of_tail * cuts + part).to(tl.int64) * rows_of_tile + row_of_tile[None, :]
    states = tl.load(scratch + tl.cast(plane, tl.int64) * D + rows, mask=part < cuts, other=float("-inf"))
    highest = tl.max(states, 0)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf would be NaN
    weights = tl.exp(states - anchor[None, :])
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)[None, :]

    cols = tl.arange(0, D)
    merged = tl.zeros([ROWS, D], tl.float32)
    for i in range(cuts):
        first = (of_tail * cuts + i).to(tl.int64) * rows_of_tile
        weight = tl.sum(tl.where(part == i, weights, 0.0), 0)
        # The rows of a part without keys have never been written.
        x = tl.load(
            scratch + (first + row_of_tile)[:, None] * D + cols[None, :], mask=(weight != 0.0)[:, None], other=0.0
        )
        merged += x * weight[:, None]
    row = tile % blocks * rows_of_tile + row_of_tile
    exists = row < rows_q
    to = (batch.to(tl.int64) * rows_q + row) * heads + head
    tl.store(out + to[:, None] * D + cols[None, :], merged.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + (batch.to(tl.int64) * heads + head) * rows_q + row, anchor + tl.log(total), mask=exists)


@functools.cache
def _launcher(device: torch.device, dtype: torch.dtype, head_dim: int, heads_last: bool) -> Launcher:
    """`dtype` is the output's: one for each, since a launcher follows its last compiled variant."""
    return Launcher(
        _merge_parts, device, D=head_dim, ROWS=_ROWS, MOST=MOST_CUTS, HEADS_LAST=heads_last, num_warps=4
    )  # fmt: skip


class Tail(NamedTuple):
    """The cut tiles of a launch, and the order of tiles: blocks of queries first, then heads, or with `heads_last` the
    samples.

    Attributes:
        cut: of all tiles.
        parts: how many there are; 0 where no tile is cut.
        rows_of_tile: a multiple of 16.
        blocks: tiles of a head.
    """

    cut: Cut
    parts: int
    rows_of_tile: int
    blocks: int
    heads_last: bool

    def scratch(self, out: torch.Tensor) -> torch.Tensor:
        """Memory for the parts of `out` (B, S, H, D), float32: their rows, then their lse."""
        elements = self.parts * self.rows_of_tile * (out.shape[3] + 1)
        return torch.empty(elements, dtype=torch.float32, device=out.device)

    def compile(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Compile the kernel for outputs like these: no later length waits for it."""
        launcher = _launcher(out.device, out.dtype, out.shape[-1], self.heads_last)
        launcher.compile(lse, out, lse, *(2,) * 8)

    def merge(self, scratch: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write the rows of `out` and `lse`, both contiguous, that the parts in `scratch` make up, if any."""
        if self.parts:
            merge = self.merging(out, scratch.numel())
            merge.launcher(merge.grid, scratch, out, lse, *merge.integers)

    def merging(self, out: torch.Tensor, elements: int) -> Merge:
        """The launch of `merge`, for a scratch memory of so many elements."""
        batches, rows_q, heads, head_dim = out.shape
        plane = self.parts * self.rows_of_tile
        return Merge(
            _launcher(out.device, out.dtype, head_dim, self.heads_last), (plane // self.cut.cuts // _ROWS, 1, 1),
            (plane, *self.cut, self.rows_of_tile, rows_q, heads, batches, self.blocks), elements,
        )  # fmt: skip


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: new lengths must not add any."""
    return sum(len(caches[0]) for caches in _merge_parts.device_caches.values())
