"""From attention's input to 8 bits, in two passes over values and one over queries and keys.

The first pass takes, for each head and channel, the values' mean and range, and from samples of rows the keys' mean and
the scale that rounds values best; the second rotates queries and keys and writes int8 and e4m3, after which the values'
means take up what rounding has changed in them. At last the largest keys, and what their values lack, are written
behind the others. Rows are padded with zeros to whole blocks, and the head dim to a power of two, so that what reads
them needs no mask for memory. The kernels stand in `quantize_int8_kernels`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .format8 import (
    K_BLOCK,
    Q_BLOCK,
    SCALES_FROM,
    SCALES_TRIED,
    padded_head_dim,
    rotation,
    rotation_width,
    rows_of_largest,
)
from .launch import Launcher
from .quantize_int8_kernels import (
    _choose_scales,
    _finish,
    _mend_means,
    _quantise_keys,
    _quantise_queries,
    _quantise_values,
    _round_largest,
    _sums,
)

# Queries are padded to whole tiles of the kernels that read them.
_PAD_Q = 128
_WARPS = 4
# Rows of a program of the first pass: at most so many partial sums of a head, which every program of `_finish` adds up.
_MOST_CHUNKS = 64
# Columns of a program of `_finish`.
_FINISHED_COLUMNS = 32
# Columns and rows of a program of `_choose_scales`.
_CHOSEN_COLUMNS = 32
_CHOSEN_ROWS = 32
_CHOSEN_WARPS = 8
# Columns of a program of `_mend_means`, and chunks that it reads at a time.
_MENDED_COLUMNS = 32
_MENDED_CHUNKS = 64
# Keys of each group that `_round_largest` looks at together.
_NORMS = 16
# Blocks that a program of the second pass rounds, one after the other.
BLOCKS_OF_PROGRAM = 4


class Keys8(NamedTuple):
    """Keys and values as the attention kernels read them. S' and D' are padded; blocks past a sample's length are not
    written. Behind the blocks of Sk rows come, in blocks of their own, the largest keys a second time, and what their
    values lack (`format8.LARGEST_KEYS`), zeros where there are fewer.

    Attributes:
        k: int8 (B, Hk, Sk', D').
        v: (B, Hk, D', Sk'), e4m3, or float16 for chips whose tensor cores have no e4m3; keys perhaps permuted.
        k_scales: float32 (B, Hk, Sk' / 128).
        v_scales: float32 (B, Hk, 2, D'): of each channel the scale, and the mean of what `scale * v` lacks.
        k_means: float32 (B, Hk, D'), what the keys, once rotated, have lost.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    k_means: torch.Tensor


class Queries8(NamedTuple):
    """Queries as the attention kernels read them, for certain keys.

    Attributes:
        q: int8 (B, H, Sq', D'), rotated.
        q_scales: float32 (B, H, Sq').
        means_of_scores: float32 (B, H, Sq'): softmax's scale times query times the keys' mean, which the scores lack.
    """

    q: torch.Tensor
    q_scales: torch.Tensor
    means_of_scores: torch.Tensor


def shapes_of_keys(
    batch: int, rows: int, kv_heads: int, head_dim: int, values: torch.dtype
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor of `Keys8`, for keys and values (B, rows, Hk, D)."""
    padded, d = -(-rows // K_BLOCK) * K_BLOCK + rows_of_largest(rows), padded_head_dim(head_dim)
    return (
        ((batch, kv_heads, padded, d), torch.int8),
        ((batch, kv_heads, d, padded), values),
        ((batch, kv_heads, padded // K_BLOCK), torch.float32),
        ((batch, kv_heads, 2, d), torch.float32),
        ((batch, kv_heads, d), torch.float32),
    )


def new_keys(k: torch.Tensor, values: torch.dtype) -> Keys8:
    """Memory for the keys `k` (B, Sk, Hk, D) and their values."""
    return Keys8(*(torch.empty(s, dtype=dtype, device=k.device) for s, dtype in shapes_of_keys(*k.shape, values)))


class _KeysPlan(NamedTuple):
    """The launches' constants and numbers."""

    sums: Launcher
    finish: Launcher
    choose: Launcher
    quantise_keys: Launcher
    quantise_values: Launcher
    mend: Launcher
    round_largest: Launcher
    chunks: int
    blocks_of_chunk: int
    strides: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _keys_plan(
    k_shape: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    permuted: bool,
    kv_lens: bool,
) -> _KeysPlan:
    """`kv_lens` tells whether it is given, `permuted` whether values' keys are."""
    vec, strides = _in_vectors(dtype, *k_stride[:3], *v_stride[:3])
    blocks = triton.cdiv(k_shape[1], K_BLOCK)
    blocks_of_chunk = max(2, triton.cdiv(blocks, _MOST_CHUNKS))
    launchers = _launchers_of_keys(device, k_shape[3], vec, permuted, dtype, kv_lens)
    return _KeysPlan(*launchers, triton.cdiv(blocks, blocks_of_chunk), blocks_of_chunk, strides)


def _in_vectors(dtype: torch.dtype, *strides: int) -> tuple[int, tuple[int, ...]]:
    """How many elements 16 bytes have, and the strides in such vectors; 1 where a stride is no multiple."""
    vec = 16 // dtype.itemsize
    if any(stride % vec for stride in strides):
        vec = 1
    return vec, tuple(stride // vec for stride in strides)


def stages_of_loads(block_d: int) -> int:
    """Two blocks of rows of 256 do not fit the shared memory of sm89."""
    return 2 if block_d <= 128 else 1


def rounding_warps(block_d: int) -> int:
    """Of the values' kernel: more than 32 x 128 numbers would spill."""
    return max(4, block_d // 32)


def rotating_warps(rows: int, block_d: int) -> int:
    """So many that a thread has at most 64 of a block's rotated numbers; a product takes four."""
    return max(4, rows * block_d // (32 * 64))


# `dtype` and whether lengths are given are not read: one launcher for each, since it follows its last compiled variant.
@functools.cache
def _launchers_of_keys(
    device: torch.device, head_dim: int, vec: int, permuted: bool, dtype: torch.dtype, kv_lens: bool
) -> tuple[Launcher, ...]:
    """The launches of one compiled variant of each kernel, in the order of `_KeysPlan`."""
    block_d, width = padded_head_dim(head_dim), rotation_width(head_dim)
    shape = {"D": head_dim, "BLOCK_D": block_d, "VEC": vec, "num_warps": _WARPS}
    loop = {"BLOCKS": BLOCKS_OF_PROGRAM, "STAGES": stages_of_loads(block_d)}
    finishing = {"COLUMNS": _FINISHED_COLUMNS, "MOST_CHUNKS": _MOST_CHUNKS}
    mending = {"COLUMNS": _MENDED_COLUMNS, "CHUNKS": _MENDED_CHUNKS}
    tiles = {"COLUMNS": _CHOSEN_COLUMNS, "ROWS": _CHOSEN_ROWS, "SAMPLE": SCALES_FROM, "TRIED": SCALES_TRIED}
    return (
        Launcher(_sums, device, **shape),
        Launcher(_finish, device, BLOCK_D=block_d, WIDTH=width, **finishing, num_warps=_WARPS),
        Launcher(_choose_scales, device, **tiles, **shape | {"num_warps": _CHOSEN_WARPS}),
        Launcher(
            _quantise_keys, device, WIDTH=width, **loop, **shape | {"num_warps": rotating_warps(K_BLOCK, block_d)}
        ),
        Launcher(_quantise_values, device, PERMUTED=permuted, **loop, **shape | {"num_warps": rounding_warps(block_d)}),
        Launcher(_mend_means, device, BLOCK_D=block_d, BLOCKS=BLOCKS_OF_PROGRAM, **mending, num_warps=_WARPS),
        Launcher(
            _round_largest,
            device,
            WIDTH=width,
            PERMUTED=permuted,
            NORMS=_NORMS,
            **shape | {"num_warps": max(8, rotating_warps(K_BLOCK, block_d))},
        ),
    )


@functools.cache
def _launcher_of_queries(device: torch.device, head_dim: int, vec: int, dtype: torch.dtype, q_lens: bool) -> Launcher:
    block_d = padded_head_dim(head_dim)
    sizes = {"D": head_dim, "BLOCK_D": block_d, "WIDTH": rotation_width(head_dim), "VEC": vec}
    sizes |= {"BLOCKS": BLOCKS_OF_PROGRAM, "STAGES": stages_of_loads(block_d)}
    return Launcher(_quantise_queries, device, **sizes, num_warps=rotating_warps(Q_BLOCK, block_d))


def quantise_keys(
    k: torch.Tensor, v: torch.Tensor, kv_lens: torch.Tensor | None, out: Keys8, *, permuted: bool
) -> None:
    """Write k and v (B, Sk, Hk, D) in 8 bits; lengths int32 (B,) or None; none of the sizes is 0.

    `permuted` tells whether the keys of each 16 values are stored as the Hopper kernel's weights need them. `out` is
    what `new_keys` gives, or other memory of those shapes.
    """
    batch, rows_k, kv_heads, _ = k.shape
    plan = _keys_plan(k.shape, k.stride(), v.stride(), k.dtype, k.device, permuted, kv_lens is not None)
    d, padded = out.k.shape[3], out.k.shape[2]
    partial = torch.empty((batch, kv_heads, plan.chunks, 4, d), dtype=torch.float32, device=k.device)
    plan.sums(
        (plan.chunks, batch * kv_heads, 1), k, v, kv_lens, partial, rows_k, kv_heads, plan.chunks,
        plan.blocks_of_chunk, *plan.strides,
    )  # fmt: skip
    matrix = _matrix_for(k)
    v_means, norms = torch.empty_like(out.k_means), k.new_empty(out.k.shape[:3], dtype=torch.float32)
    plan.finish(
        (batch * kv_heads, d // _FINISHED_COLUMNS, 1),
        partial,
        matrix,
        out.k_means,
        out.v_scales,
        v_means,
        kv_lens,
        rows_k,
        kv_heads,
        plan.chunks,
    )
    if out.v.dtype == torch.float8_e4m3fn:
        plan.choose(
            (batch * kv_heads, d // _CHOSEN_COLUMNS, 1), v, kv_lens, out.v_scales, rows_k, kv_heads, *plan.strides[3:]
        )  # fmt: skip
    chunks = triton.cdiv(padded // K_BLOCK, BLOCKS_OF_PROGRAM)
    grid = (chunks * kv_heads, batch, 1)
    plan.quantise_keys(
        grid, k, kv_lens, matrix, out.k_means, out.k, out.k_scales, norms, rows_k, kv_heads, padded, *plan.strides[:3]
    )
    errors = torch.empty((batch, kv_heads, chunks, d), dtype=torch.float32, device=k.device)
    plan.quantise_values(
        grid, v, kv_lens, out.v_scales, out.v, errors, rows_k, kv_heads, padded // K_BLOCK, *plan.strides[3:]
    )  # fmt: skip
    plan.mend(
        (batch * kv_heads, d // _MENDED_COLUMNS, 1), errors, out.v_scales, kv_lens, rows_k, kv_heads, chunks
    )  # fmt: skip
    plan.round_largest(
        (rows_of_largest(rows_k) // K_BLOCK, batch * kv_heads, 1), k, v, kv_lens, matrix, out.k_means, out.v_scales,
        v_means, norms, out.k, out.v, out.k_scales, rows_k, kv_heads, padded, *plan.strides,
    )  # fmt: skip


def _matrix_for(x: torch.Tensor) -> torch.Tensor | None:
    """What rotates the last dimension of `x`. float32 is left as it is: its tiles do not fit the shared memory."""
    return None if x.dtype == torch.float32 else rotation(rotation_width(x.shape[3]), x.dtype, x.device)


def quantise_queries(q: torch.Tensor, k_means: torch.Tensor, q_lens: torch.Tensor | None, scale: float) -> Queries8:
    """q (B, Sq, H, D) in 8 bits, for keys that have lost `k_means` (B, Hk, D'); lengths int32 (B,) or None."""
    batch, rows_q, heads, head_dim = q.shape
    kv_heads, d = k_means.shape[1:]
    padded = triton.cdiv(rows_q, _PAD_Q) * _PAD_Q
    out = Queries8(
        torch.empty((batch, heads, padded, d), dtype=torch.int8, device=q.device),
        torch.empty((batch, heads, padded), dtype=torch.float32, device=q.device),
        torch.empty((batch, heads, padded), dtype=torch.float32, device=q.device),
    )
    vec, strides = _in_vectors(q.dtype, *q.stride()[:3])
    matrix = _matrix_for(q)
    launcher = _launcher_of_queries(q.device, head_dim, vec, q.dtype, q_lens is not None)
    launcher(
        (triton.cdiv(padded // Q_BLOCK, BLOCKS_OF_PROGRAM) * heads, batch, 1), q, q_lens, matrix, k_means, *out, scale,
        rows_q, heads, kv_heads, padded, *strides,
    )  # fmt: skip
    return out
