"""The residual of a transformer block and how far it moved, in one pass over memory.

The metric is that of First Block Cache (ParaAttention, after TeaCache, Liu et al. 2024, arXiv 2411.19108, section
3.2): the relative L1 distance between the residuals of two denoising steps. Three tensors are read and one is written,
once; the sums are reduced in a fixed order (within a program, then over programs), so that two runs agree to the bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launcher

# Elements per tile, its widest row, tiles per program, and warps. Of 12 combinations measured on an H100 at
# (1, 119056, 3072) bfloat16, by a script that is not kept, this one was the fastest; the others lay within 6 % of it.
_TILE = 8192
_MAX_COLS = 1024
_TILES_PER_PROGRAM = 4
_NUM_WARPS = 16

_RUNTIME_INTEGERS = (
    "rows", "cols", "row_blocks", "col_blocks", "in_stride_b", "in_stride_r", "out_stride_b", "out_stride_r",
    "previous_stride_b", "previous_stride_r",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS)
def _residual_diff(
    hidden_in, hidden_out, previous, residual, partial_sums, rows, cols, row_blocks, col_blocks,
    in_stride_b, in_stride_r, out_stride_b, out_stride_r, previous_stride_b, previous_stride_r,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """TILES tiles of (BLOCK_R, BLOCK_C), one below the other. Strides and `cols` arrive divided by VEC."""
    cols = cols * VEC
    pid = tl.program_id(0)
    col_block = pid % col_blocks
    row_block = (pid // col_blocks) % row_blocks
    batch = (pid // (col_blocks * row_blocks)).to(tl.int64)
    c = col_block * BLOCK_C + tl.arange(0, BLOCK_C)
    # Each thread keeps sums of its own, and they meet once, in the end. With a reduction per tile two sources that mean
    # the same ran at 82 and at 100 % of a copy's bandwidth, by the order in which the compiler put the loads.
    moved = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in tl.range(TILES, num_stages=1):
        r = (row_block * TILES + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        wide_r = r.to(tl.int64)[:, None]
        in_offsets = batch * in_stride_b * VEC + wide_r * in_stride_r * VEC + c[None, :]
        out_offsets = batch * out_stride_b * VEC + wide_r * out_stride_r * VEC + c[None, :]
        before = tl.load(hidden_in + in_offsets, mask=mask, other=0.0)
        after = tl.load(hidden_out + out_offsets, mask=mask, other=0.0)
        change = (after.to(tl.float32) - before.to(tl.float32)).to(residual.dtype.element_ty)
        reference = change
        if previous is not None:
            # Before the store, past which the compiler may not move a load: 101 instead of 92 % of a copy's bandwidth.
            previous_offsets = batch * previous_stride_b * VEC + wide_r * previous_stride_r * VEC + c[None, :]
            reference = tl.load(previous + previous_offsets, mask=mask, other=0.0)
        tl.store(residual + (batch * rows + wide_r) * cols + c[None, :], change, mask=mask)
        if previous is not None:
            moved += tl.abs(reference.to(tl.float32) - change.to(tl.float32))
            total += tl.abs(reference.to(tl.float32))
    if previous is not None:
        tl.store(partial_sums + pid * 2, tl.sum(tl.sum(moved, 1), 0))
        tl.store(partial_sums + pid * 2 + 1, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=("count",))
def _add_partial_sums(partial_sums, sums, count, BLOCK: tl.constexpr):
    """Add the programs' sums in a fixed order, in float64: there may be tens of thousands of them."""
    moved = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        moved += tl.load(partial_sums + i * 2, mask=i < count, other=0.0).to(tl.float64)
        total += tl.load(partial_sums + i * 2 + 1, mask=i < count, other=0.0).to(tl.float64)
    tl.store(sums, tl.sum(moved, 0).to(tl.float32))
    tl.store(sums + 1, tl.sum(total, 0).to(tl.float32))


def _as_batched_rows(tensor: torch.Tensor) -> torch.Tensor:
    """View `tensor` (..., C) as (B, R, C); a copy only where C is strided or leading dimensions do not collapse."""
    if tensor.dim() == 0 or tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.dim() == 3:
        return tensor
    if tensor.dim() < 3:
        return tensor.reshape(1, -1, tensor.shape[-1] if tensor.dim() else 1)
    return tensor.reshape(-1, *tensor.shape[-2:])


def _vector_width(dtype: torch.dtype, cols: int, strides: tuple[tuple[int, ...], ...]) -> int:
    """Elements of a 16-byte access if every stride and the row length are multiples of it, else 1."""
    width = 16 // dtype.itemsize
    sizes = [cols, *(size for stride in strides for size in stride[:-1])]
    return width if all(size % width == 0 for size in sizes) else 1


class _Plan(NamedTuple):
    """What a launch needs besides its tensors."""

    launcher: Launcher
    programs: int
    integers: tuple[int, ...]


# Nothing but shapes, strides and types goes in, so that a call like an earlier one finds its launch ready.
@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, int, int], strides: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> _Plan:
    """For tensors (B, R, C); strides of what went in, of what came out, and of the earlier residual if there is one."""
    batch, rows, cols = shape
    vec = _vector_width(dtype, cols, strides)
    block_c = min(triton.next_power_of_2(cols), _MAX_COLS)
    # Not fewer where there are fewer rows: a new number of rows would compile another variant.
    block_r = max(1, _TILE // block_c)
    row_blocks, col_blocks = triton.cdiv(rows, block_r * _TILES_PER_PROGRAM), triton.cdiv(cols, block_c)
    of_views = [size // vec for stride in strides for size in stride[:2]]
    without_previous = [0, 0] if len(strides) == 2 else []
    integers = (rows, cols // vec, row_blocks, col_blocks, *of_views, *without_previous)
    launcher = _launcher(device, dtype, len(strides) == 2, block_r, block_c, _TILES_PER_PROGRAM, vec)
    return _Plan(launcher, batch * row_blocks * col_blocks, integers)


def residual_diff_forward(
    hidden_in: torch.Tensor, hidden_out: torch.Tensor, previous: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden_out - hidden_in, float32 (sum |previous - residual|, sum |previous|)); zeros with no `previous`.

    The tensors have one shape (..., C), one dtype (float16, bfloat16, float32) and any strides; strided rows are read
    in place.
    """
    residual = torch.empty_like(hidden_in, memory_format=torch.contiguous_format)
    if residual.numel() == 0 or previous is None:
        sums = torch.zeros(2, dtype=torch.float32, device=hidden_in.device)
    else:
        sums = torch.empty(2, dtype=torch.float32, device=hidden_in.device)
    if residual.numel() == 0:
        return residual, sums
    hidden_in, hidden_out = _as_batched_rows(hidden_in), _as_batched_rows(hidden_out)
    strides = (hidden_in.stride(), hidden_out.stride())
    if previous is None:
        launcher, programs, integers = _plan(hidden_in.shape, strides, residual.dtype, residual.device)
        launcher((programs, 1, 1), hidden_in, hidden_out, None, residual, None, *integers)
        return residual, sums
    previous = _as_batched_rows(previous)
    strides += (previous.stride(),)
    launcher, programs, integers = _plan(hidden_in.shape, strides, residual.dtype, residual.device)
    partial_sums = torch.empty((programs, 2), dtype=torch.float32, device=sums.device)
    launcher((programs, 1, 1), hidden_in, hidden_out, previous, residual, partial_sums, *integers)
    _sums_launcher(residual.device)((1, 1, 1), partial_sums, sums, programs)
    return residual, sums


@functools.cache
def _launcher(
    device: torch.device, dtype: torch.dtype, first: bool, block_r: int, block_c: int, tiles: int, vec: int
) -> Launcher:  # fmt: skip
    """The launches of one compiled variant; `first` without an earlier residual."""
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c, "TILES": tiles, "VEC": vec}
    return Launcher(_residual_diff, device, **constants, num_warps=_NUM_WARPS)


@functools.cache
def _sums_launcher(device: torch.device) -> Launcher:
    return Launcher(_add_partial_sums, device, BLOCK=2048, num_warps=8)
