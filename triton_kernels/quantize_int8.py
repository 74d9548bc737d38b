"""From attention's input to 8 bits, in two passes over keys and values and one over queries.

The first pass takes, for each head and channel, the keys' and values' means and the values' range; the second writes
int8 and e4m3. Formats and scales are those of `para_kernels.ops8`, from whose expressions these kernels differ by the
order of float32 sums. Rows are padded with zeros to whole blocks, and the head dim to a power of two, so that what
reads them needs no mask for memory; what lies past a sample's lengths is not read.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launcher

Q_BLOCK = 64
K_BLOCK = 128
LEAST_HEAD_DIM = 64
# Queries are padded to whole tiles of the kernels that read them.
_PAD_Q = 128
_WARPS = 4
# Rows of a program of the first pass: at most so many partial sums of a head, which every program of `_finish` adds up.
_MOST_CHUNKS = 64

_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float of this size has no fraction
_ROUNDING_BITS = tl.constexpr(0x4B400000)
_HIGHEST_INT8 = tl.constexpr(127.0)
_HIGHEST_VALUE = tl.constexpr(448.0)
_Q_BLOCK = tl.constexpr(Q_BLOCK)
_K_BLOCK = tl.constexpr(K_BLOCK)


class Quantised(NamedTuple):
    """What the attention kernels read. S' and D' are padded; blocks that lie past a sample's length are not written.

    Attributes:
        q, k: int8 (B, H, Sq', D') and (B, Hk, Sk', D').
        v: (B, Hk, D', Sk'), e4m3, or float16 for chips whose tensor cores have no e4m3; keys perhaps permuted.
        q_scales, k_scales: float32 (B, H, Sq') and (B, Hk, Sk' / 128).
        v_scales: float32 (B, Hk, 2, D'): scale and mean of each channel.
        means_of_scores: float32 (B, H, Sq'): softmax's scale times query times the keys' mean, which the scores lack.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scales: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    means_of_scores: torch.Tensor


@triton.jit
def _length(lens, batch, rows):
    """The sample's length, clamped: what lies on the device cannot be refused on the host."""
    length = rows
    if lens is not None:
        length = tl.minimum(tl.maximum(tl.load(lens + batch), 0), rows)
    return length


@triton.jit
def _whole(stride, VEC: tl.constexpr):
    """A stride that came divided by VEC, which tells the compiler what it is a multiple of."""
    return tl.cast(stride, tl.int64) * VEC


@triton.jit
def _rows(source, batch, head, rows, end, stride_b, stride_s, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """These rows of a head as float32, zeros at or past `end`."""
    cols = tl.arange(0, BLOCK_D)
    start = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    offsets = rows.to(tl.int64)[:, None] * stride_s + cols[None, :]
    mask = (rows < end)[:, None]
    if D != BLOCK_D:
        mask = mask & (cols < D)[None, :]
    return tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=(
        "rows_k",
        "kv_heads",
        "chunks",
        "blocks_of_chunk",
        "stride_kb",
        "stride_ks",
        "stride_kh",
        "stride_vb",
        "stride_vs",
        "stride_vh",
    ),
    do_not_specialize_on_alignment=("kv_lens",),
)
def _sums(
    k, v, kv_lens, partial, rows_k, kv_heads, chunks, blocks_of_chunk,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """`partial` (B, Hk, chunks, 4, D'): of a chunk of rows the sums of keys and values, and the values' range."""
    stride_kb, stride_ks, stride_kh = _whole(stride_kb, VEC), _whole(stride_ks, VEC), _whole(stride_kh, VEC)
    stride_vb, stride_vs, stride_vh = _whole(stride_vb, VEC), _whole(stride_vs, VEC), _whole(stride_vh, VEC)
    chunk = tl.program_id(0)
    batch = tl.program_id(1) // kv_heads
    head = tl.program_id(1) % kv_heads
    kv_len = _length(kv_lens, batch, rows_k)
    cols = tl.arange(0, BLOCK_D)
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_D], tl.float32)
    lowest = tl.full([BLOCK_D], float("inf"), tl.float32)
    highest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    first = chunk * blocks_of_chunk * _K_BLOCK
    end = tl.minimum(first + blocks_of_chunk * _K_BLOCK, kv_len)
    for row in range(first, end, _Q_BLOCK):
        rows = row + tl.arange(0, _Q_BLOCK)
        k_sum += tl.sum(_rows(k, batch, head, rows, end, stride_kb, stride_ks, stride_kh, D, BLOCK_D), 0)
        values = _rows(v, batch, head, rows, end, stride_vb, stride_vs, stride_vh, D, BLOCK_D)
        v_sum += tl.sum(values, 0)
        exists = (rows < end)[:, None]
        lowest = tl.minimum(lowest, tl.min(tl.where(exists, values, float("inf")), 0))
        highest = tl.maximum(highest, tl.max(tl.where(exists, values, float("-inf")), 0))
    out = partial + (tl.program_id(1) * chunks + chunk) * 4 * BLOCK_D + cols
    tl.store(out, k_sum)
    tl.store(out + BLOCK_D, v_sum)
    tl.store(out + 2 * BLOCK_D, lowest)
    tl.store(out + 3 * BLOCK_D, highest)


@triton.jit(do_not_specialize=("rows_k", "kv_heads", "chunks"), do_not_specialize_on_alignment=("kv_lens",))
def _finish(
    partial, k_means, v_scales, kv_lens, rows_k, kv_heads, chunks, BLOCK_D: tl.constexpr, MOST_CHUNKS: tl.constexpr
):
    """A head's `partial` to the keys' mean (B, Hk, D') and the values' scale and mean (B, Hk, 2, D')."""
    of_head = tl.program_id(0)
    count = tl.maximum(_length(kv_lens, of_head // kv_heads, rows_k), 1).to(tl.float32)
    cols = tl.arange(0, BLOCK_D)[None, :]
    chunk = tl.arange(0, MOST_CHUNKS)[:, None]
    source = partial + (of_head * chunks + chunk) * 4 * BLOCK_D + cols
    exists = chunk < chunks
    k_mean = tl.sum(tl.load(source, mask=exists, other=0.0), 0) / count
    v_mean = tl.sum(tl.load(source + BLOCK_D, mask=exists, other=0.0), 0) / count
    lowest = tl.min(tl.load(source + 2 * BLOCK_D, mask=exists, other=float("inf")), 0)
    highest = tl.max(tl.load(source + 3 * BLOCK_D, mask=exists, other=float("-inf")), 0)
    largest = tl.maximum(highest - v_mean, v_mean - lowest)
    out = tl.arange(0, BLOCK_D)
    tl.store(k_means + of_head * BLOCK_D + out, k_mean)
    tl.store(v_scales + of_head * 2 * BLOCK_D + out, tl.where(largest > 0.0, largest / _HIGHEST_VALUE, 1.0))
    tl.store(v_scales + (of_head * 2 + 1) * BLOCK_D + out, v_mean)


@triton.jit
def _largest_of_rows(x):
    """The largest magnitude in each row. A NaN becomes the row's, so that it is not lost."""
    return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)


@triton.jit
def _scale_of(largest):
    return tl.where(largest == 0.0, 1.0, largest / _HIGHEST_INT8)


@triton.jit
def _store_int8(x, scale, out, BLOCK_D: tl.constexpr):
    """A block of rows as int8; `scale` broadcasts."""
    rounded = x * (1.0 / scale) + _ROUNDING
    values = (rounded.to(tl.int32, bitcast=True) - _ROUNDING_BITS).to(tl.int8)
    rows = tl.arange(0, x.shape[0])
    tl.store(out + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], values)


@triton.jit(
    do_not_specialize=(
        "scale", "rows_q", "rows_k", "heads", "kv_heads", "padded_q", "padded_k", "stride_qb", "stride_qs", "stride_qh",
        "stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh",
    ),
    do_not_specialize_on_alignment=("q_lens", "kv_lens"),
)  # fmt: skip
def _quantise(
    q, k, v, q_lens, kv_lens, k_means, v_scales, q_out, k_out, v_out, q_scales, k_scales, means_of_scores, scale,
    rows_q, rows_k, heads, kv_heads, padded_q, padded_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """One block of queries, of keys or of values: blocks of a head, first all queries', then the keys' and values'."""
    stride_qb, stride_qs, stride_qh = _whole(stride_qb, VEC), _whole(stride_qs, VEC), _whole(stride_qh, VEC)
    stride_kb, stride_ks, stride_kh = _whole(stride_kb, VEC), _whole(stride_ks, VEC), _whole(stride_kh, VEC)
    stride_vb, stride_vs, stride_vh = _whole(stride_vb, VEC), _whole(stride_vs, VEC), _whole(stride_vh, VEC)
    batch = tl.program_id(1)
    q_blocks = padded_q // _Q_BLOCK
    k_blocks = padded_k // _K_BLOCK
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    if pid < q_blocks * heads:
        head = pid // q_blocks
        block = pid % q_blocks
        q_len = _length(q_lens, batch, rows_q)
        if block * _Q_BLOCK < q_len:
            rows = block * _Q_BLOCK + tl.arange(0, _Q_BLOCK)
            x = _rows(q, batch, head, rows, q_len, stride_qb, stride_qs, stride_qh, D, BLOCK_D)
            k_mean = tl.load(k_means + (batch * kv_heads + head // (heads // kv_heads)) * BLOCK_D + cols)
            at = (batch * heads + head).to(tl.int64) * padded_q + block * _Q_BLOCK
            own = tl.arange(0, _Q_BLOCK)
            tl.store(means_of_scores + at + own, tl.sum(x * k_mean[None, :], 1) * scale)
            q_scale = _scale_of(_largest_of_rows(x))
            tl.store(q_scales + at + own, q_scale)
            _store_int8(x, q_scale[:, None], q_out + at * BLOCK_D, BLOCK_D)
    else:
        rest = pid - q_blocks * heads
        is_value = rest >= k_blocks * kv_heads
        rest = tl.where(is_value, rest - k_blocks * kv_heads, rest)
        head = rest // k_blocks
        block = rest % k_blocks
        of_head = batch * kv_heads + head
        kv_len = _length(kv_lens, batch, rows_k)
        if block * _K_BLOCK < kv_len:
            own = tl.arange(0, _K_BLOCK)
            if is_value:
                if PERMUTED:  # in each 16: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15
                    own = own // 16 * 16 + own // 2 % 2 * 8 + own % 16 // 4 * 2 + own % 2
                rows = block * _K_BLOCK + own
                x = _rows(v, batch, head, rows, kv_len, stride_vb, stride_vs, stride_vh, D, BLOCK_D)
                v_scale = tl.load(v_scales + of_head * 2 * BLOCK_D + cols)
                v_mean = tl.load(v_scales + (of_head * 2 + 1) * BLOCK_D + cols)
                x = (x - v_mean[None, :]) * (1.0 / v_scale)[None, :]
                x = tl.where((rows < kv_len)[:, None], tl.clamp(x, -_HIGHEST_VALUE, _HIGHEST_VALUE), 0.0)
                out = v_out + of_head.to(tl.int64) * BLOCK_D * padded_k + block * _K_BLOCK
                offsets = cols.to(tl.int64)[:, None] * padded_k + tl.arange(0, _K_BLOCK)[None, :]
                tl.store(out + offsets, tl.trans(x).to(v_out.dtype.element_ty))
            else:
                rows = block * _K_BLOCK + own
                x = _rows(k, batch, head, rows, kv_len, stride_kb, stride_ks, stride_kh, D, BLOCK_D)
                k_mean = tl.load(k_means + of_head * BLOCK_D + cols)
                x = tl.where((rows < kv_len)[:, None], x - k_mean[None, :], 0.0)
                at = of_head.to(tl.int64) * padded_k + block * _K_BLOCK
                largest = _largest_of_rows(x)
                # The sum is 0, or NaN where a row's is.
                k_scale = _scale_of(tl.max(largest, 0) + tl.sum(largest * 0.0, 0))
                tl.store(k_scales + of_head * k_blocks + block, k_scale)
                _store_int8(x, k_scale, k_out + at * BLOCK_D, BLOCK_D)


class _Plan(NamedTuple):
    """The launches' constants and numbers."""

    sums: Launcher
    finish: Launcher
    quantise: Launcher
    chunks: int
    blocks_of_chunk: int
    padded_q: int
    padded_k: int
    block_d: int
    q_strides: tuple[int, ...]
    kv_strides: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _plan(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    permuted: bool,
    q_lens: bool,
    kv_lens: bool,
) -> _Plan:
    """`q_lens` and `kv_lens` tell whether they are given, `permuted` whether values' keys are."""
    head_dim = q_shape[3]
    block_d = max(LEAST_HEAD_DIM, triton.next_power_of_2(head_dim))
    strides = [*q_stride[:3], *k_stride[:3], *v_stride[:3]]
    vec = 16 // dtype.itemsize
    if any(stride % vec for stride in strides):
        vec = 1
    padded_q = triton.cdiv(q_shape[1], _PAD_Q) * _PAD_Q
    padded_k = triton.cdiv(k_shape[1], K_BLOCK) * K_BLOCK
    blocks_of_chunk = max(2, triton.cdiv(padded_k // K_BLOCK, _MOST_CHUNKS))
    chunks = triton.cdiv(padded_k // K_BLOCK, blocks_of_chunk)
    shorter = tuple(stride // vec for stride in strides)
    return _Plan(
        *_launchers(device, head_dim, block_d, vec, permuted, dtype, q_lens, kv_lens), chunks, blocks_of_chunk,
        padded_q, padded_k, block_d, shorter[:3], shorter[3:],
    )  # fmt: skip


@functools.cache
def _launchers(
    device: torch.device, head_dim: int, block_d: int, vec: int, permuted: bool, dtype: torch.dtype, q_lens: bool,
    kv_lens: bool,
) -> tuple[Launcher, Launcher, Launcher]:  # fmt: skip
    """The launches of one compiled variant of each kernel."""
    shape = {"D": head_dim, "BLOCK_D": block_d, "VEC": vec, "num_warps": _WARPS}
    return (
        Launcher(_sums, device, **shape),
        Launcher(_finish, device, BLOCK_D=block_d, MOST_CHUNKS=_MOST_CHUNKS, num_warps=_WARPS),
        Launcher(_quantise, device, PERMUTED=permuted, **shape),
    )


def quantise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    *,
    values: torch.dtype,
    permuted: bool,
) -> Quantised:
    """q (B, Sq, H, D) and k, v (B, Sk, Hk, D) in 8 bits; lengths int32 (B,) or None; none of the sizes is 0.

    `values` is torch.float8_e4m3fn or torch.float16; `permuted` tells whether the keys of each 16 values are stored as
    the Hopper kernel's weights need them.
    """
    batch, rows_q, heads, _ = q.shape
    rows_k, kv_heads = k.shape[1:3]
    plan = _plan(
        q.shape, k.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device, permuted, q_lens is not None,
        kv_lens is not None,
    )  # fmt: skip
    d = plan.block_d
    new = functools.partial(torch.empty, device=q.device)
    result = Quantised(
        new((batch, heads, plan.padded_q, d), dtype=torch.int8),
        new((batch, kv_heads, plan.padded_k, d), dtype=torch.int8),
        new((batch, kv_heads, d, plan.padded_k), dtype=values),
        new((batch, heads, plan.padded_q), dtype=torch.float32),
        new((batch, kv_heads, plan.padded_k // K_BLOCK), dtype=torch.float32),
        new((batch, kv_heads, 2, d), dtype=torch.float32),
        new((batch, heads, plan.padded_q), dtype=torch.float32),
    )
    partial = new((batch, kv_heads, plan.chunks, 4, d), dtype=torch.float32)
    k_means = new((batch, kv_heads, d), dtype=torch.float32)
    plan.sums(
        (plan.chunks, batch * kv_heads, 1), k, v, kv_lens, partial, rows_k, kv_heads, plan.chunks,
        plan.blocks_of_chunk, *plan.kv_strides,
    )  # fmt: skip
    plan.finish((batch * kv_heads, 1, 1), partial, k_means, result.v_scales, kv_lens, rows_k, kv_heads, plan.chunks)
    blocks = plan.padded_q // Q_BLOCK * heads + 2 * (plan.padded_k // K_BLOCK) * kv_heads
    plan.quantise(
        (blocks, batch, 1), q, k, v, q_lens, kv_lens, k_means, result.v_scales, result.q, result.k, result.v,
        result.q_scales, result.k_scales, result.means_of_scores, scale, rows_q, rows_k, heads, kv_heads,
        plan.padded_q, plan.padded_k, *plan.q_strides, *plan.kv_strides,
    )  # fmt: skip
    return result
