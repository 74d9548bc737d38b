"""The portable attention kernel: exact softmax attention on sm80 and later, and in the Triton interpreter.

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1): one program per (batch, head, block of queries), an
online softmax over blocks of keys, one division at the end. Lengths are read on the device, once per program; they are
never constexpr and never specialised on, so a new length compiles nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launcher

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sample_span(lens, batch, rows, PACKED: tl.constexpr):
    """(first row, length) of a sample within `rows`: from `cu_seqlens`, from its entry in `lens`, or all rows.

    Clamped, since what lies on the device cannot be refused on the host without a synchronisation.
    """
    start = 0
    length = rows
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(lens + batch), 0), rows)
        length = tl.minimum(tl.maximum(tl.load(lens + batch + 1), start), rows) - start
    elif lens is not None:
        length = tl.minimum(tl.maximum(tl.load(lens + batch), 0), rows)
    return start, length


@triton.jit
def _origin(source, start, batch, head, stride_b, stride_n, stride_h, USE_TMA: tl.constexpr):
    """Where a head starts: (pointer, 0, 0), or (descriptor, row, column) in the matrix with row pitch `stride_n`."""
    if USE_TMA:
        row = start + batch * (stride_b // stride_n) + head * (stride_h // stride_n)
        col = batch * (stride_b % stride_n) + head * (stride_h % stride_n)
        return source, row.to(tl.int32), col.to(tl.int32)
    else:
        offset = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(start, tl.int64) * stride_n
        return source + offset, 0, 0


@triton.jit
def _load_rows(
    source, row, col, first, length, stride_n,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows `first ... first + BLOCK` of a head as (BLOCK, BLOCK_D). With MASKED, rows at or past `length` are zeros."""
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    if USE_TMA:
        tile = source.load([row + first, col])
        if MASKED:
            # What lies past the length may be anything, NaN included, and 0 * NaN is not 0.
            tile = tl.where((first + rows < length)[:, None], tile, 0.0)
    else:
        pointers = source + tl.cast(first, tl.int64) * stride_n + (rows[:, None] * stride_n + cols[None, :])
        if MASKED:
            tile = tl.load(pointers, mask=(first + rows < length)[:, None] & (cols < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(cols < D)[None, :], other=0.0)
    return tile


@triton.jit
def _attend_block(
    acc, l_i, m_i, q, first, kv_len, scale_log2, k, k_row, k_col, stride_kn, v, v_row, v_col, stride_vn,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one block of keys through the online softmax. `m_i` is the row maximum of the scores times `scale_log2`."""
    k_tile = _load_rows(k, k_row, k_col, first, kv_len, stride_kn, D, BLOCK_N, BLOCK_D, USE_TMA, MASKED)
    scores = tl.dot(q, k_tile.T, input_precision=PRECISION)
    if MASKED:
        # Scaled before they are masked: -inf * 0 is not -inf.
        valid = (first + tl.arange(0, BLOCK_N) < kv_len)[None, :]
        scaled = tl.where(valid, scores * scale_log2, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scaled, 1))
        p = tl.math.exp2(scaled - m_new[:, None])
    else:
        # Scaled inside the exponent: each score reaches exp2 through one fused multiply-add.
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v_tile = _load_rows(v, v_row, v_col, first, kv_len, stride_vn, D, BLOCK_N, BLOCK_D, USE_TMA, MASKED)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, l_i, m_new


# No length is specialised on; what alignment the loads may rely on comes from VEC and from the pointers.
_RUNTIME_INTEGERS = (
    "max_q", "rows_q", "rows_k", "heads", "heads_per_kv", "lse_stride_b", "lse_stride_h",
    "stride_qb", "stride_qm", "stride_qh", "stride_kb", "stride_kn", "stride_kh",
    "stride_vb", "stride_vn", "stride_vh", "stride_ob", "stride_om",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=("q_lens", "kv_lens"))
def _attention_fwd(
    q_ptr, k, v, out_ptr, lse_ptr, q_lens, kv_lens, scale_log2, max_q, rows_q, rows_k, heads, heads_per_kv,
    lse_stride_b, lse_stride_h, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_ob, stride_om,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    VEC: tl.constexpr, USE_TMA: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Strides arrive divided by VEC. Multiplying here tells the compiler that they are multiples of a 16-byte load.
    # Those of samples and heads may need 64 bits; those of rows are kept short by the launcher.
    stride_qm, stride_kn, stride_vn = stride_qm * VEC, stride_kn * VEC, stride_vn * VEC
    stride_qb, stride_qh = tl.cast(stride_qb, tl.int64) * VEC, tl.cast(stride_qh, tl.int64) * VEC
    stride_kb, stride_kh = tl.cast(stride_kb, tl.int64) * VEC, tl.cast(stride_kh, tl.int64) * VEC
    stride_vb, stride_vh = tl.cast(stride_vb, tl.int64) * VEC, tl.cast(stride_vh, tl.int64) * VEC

    # Query blocks run fastest, so that programs in flight at one time share one head's keys and values in L2.
    blocks_m = tl.cdiv(max_q, BLOCK_M)
    pid = tl.program_id(0)
    first_m = (pid % blocks_m) * BLOCK_M
    head = (pid // blocks_m) % heads
    batch = pid // (blocks_m * heads)
    kv_head = head // heads_per_kv

    q_start, q_len = _sample_span(q_lens, batch, rows_q, PACKED)
    k_start, kv_len = _sample_span(kv_lens, batch, rows_k, PACKED)
    rows = first_m + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    if PACKED:
        if first_m >= q_len:
            return
        stored_rows = q_len
        batch = batch * 0  # The samples lie in one batch, told apart by where they start.
    else:
        # Rows past the length exist in the output: they are written as zeros.
        stored_rows = rows_q
        kv_len = tl.where(first_m < q_len, kv_len, 0)

    q_tile_ptr, _, _ = _origin(q_ptr, q_start + first_m, batch, head, stride_qb, stride_qm, stride_qh, False)
    q_mask = (rows < q_len)[:, None] & (cols < D)[None, :]
    q = tl.load(q_tile_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_qm + cols[None, :], mask=q_mask, other=0.0)
    k, k_row, k_col = _origin(k, k_start, batch, kv_head, stride_kb, stride_kn, stride_kh, USE_TMA)
    v, v_row, v_col = _origin(v, k_start, batch, kv_head, stride_vb, stride_vn, stride_vh, USE_TMA)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = kv_len // BLOCK_N * BLOCK_N
    for first in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        acc, l_i, m_i = _attend_block(
            acc, l_i, m_i, q, first, kv_len, scale_log2, k, k_row, k_col, stride_kn, v, v_row, v_col, stride_vn,
            D, BLOCK_N, BLOCK_D, USE_TMA, False, PRECISION,
        )  # fmt: skip
    if full < kv_len:
        acc, l_i, m_i = _attend_block(
            acc, l_i, m_i, q, full, kv_len, scale_log2, k, k_row, k_col, stride_kn, v, v_row, v_col, stride_vn,
            D, BLOCK_N, BLOCK_D, USE_TMA, True, PRECISION,
        )  # fmt: skip

    # Not `l_i > 0`: a NaN among the keys must come out as NaN, not as a row without keys.
    alive = (rows < q_len) & (kv_len > 0)
    safe_l = tl.where(alive, l_i, 1.0)
    lse = tl.where(alive, (m_i + tl.math.log2(safe_l)) * _LN_2, float("-inf"))
    out = tl.where(alive[:, None], acc * (1.0 / safe_l)[:, None], 0.0)
    lse_row = lse_ptr + batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + q_start
    out_tile_ptr, _, _ = _origin(out_ptr, q_start + first_m, batch, head, stride_ob, stride_om, D, False)
    out_offsets = tl.arange(0, BLOCK_M)[:, None] * stride_om + cols[None, :]
    tl.store(lse_row + rows, lse, mask=rows < stored_rows)
    tl.store(
        out_tile_ptr + out_offsets,
        out.to(out_ptr.dtype.element_ty),
        mask=(rows < stored_rows)[:, None] & (cols < D)[None, :],
    )


@dataclass(frozen=True)
class AttentionConfig:
    """Tile sizes and launch options of one compiled variant."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (architecture, padded head dim) -> configuration for 16-bit tensors. Nothing is tuned at run time. Shared memory per
# program limits the choice: 227 KiB on sm90, 163 KiB on sm80, 99 KiB on sm86, sm89 and sm120.
# sm90 with TMA, measured on an H100 at S = 16,384 (TFLOP/s, bfloat16, 24 heads): 4 warps and 64-key tiles let two
# programs share a multiprocessor, and the softmax of one runs under the matrix products of the other. D = 128: 535,
# against 497 for 128 x 128 on 8 warps, whose barriers probably keep both warpgroups in step; D = 64: 435 against 375.
_CONFIGS: dict[tuple[str, int], AttentionConfig] = {
    ("sm90 tma", 64): AttentionConfig(128, 64, 4, 3),
    ("sm90 tma", 128): AttentionConfig(128, 64, 4, 2),
    ("sm90 tma", 256): AttentionConfig(128, 64, 8, 2),
    ("sm90", 64): AttentionConfig(128, 128, 8, 3),
    ("sm90", 128): AttentionConfig(128, 128, 8, 3),
    ("sm90", 256): AttentionConfig(128, 64, 8, 2),
    ("sm80", 64): AttentionConfig(128, 64, 4, 3),
    ("sm80", 128): AttentionConfig(128, 64, 8, 3),
    ("sm80", 256): AttentionConfig(64, 64, 8, 2),
    ("sm89", 64): AttentionConfig(128, 64, 8, 3),
    ("sm89", 128): AttentionConfig(128, 64, 8, 2),
    ("sm89", 256): AttentionConfig(64, 32, 8, 2),
}
# float32 runs on the FMA units: one small tile for all, exact rather than fast, and small enough to compile in seconds.
_CONFIG_FLOAT32 = AttentionConfig(16, 16, 4, 1)


def _architecture(capability: tuple[int, int], tma: bool) -> str:
    """The rows of `_CONFIGS` for a compute capability: what its shared memory allows."""
    if capability in ((9, 0), (10, 0), (10, 3)):
        return "sm90 tma" if tma else "sm90"
    return "sm80" if capability in ((8, 0), (8, 7)) else "sm89"


def attention_config(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, tma: bool) -> AttentionConfig:
    """The configuration of a launch, with or without descriptors."""
    if dtype == torch.float32:
        return _CONFIG_FLOAT32
    return _CONFIGS[_architecture(capability, tma), max(64, triton.next_power_of_2(head_dim))]


def uses_tma(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> bool:
    """Whether keys and values may come through TMA descriptors: the chip has them, 16-bit elements, no padding of D."""
    return (
        capability >= (9, 0) and dtype.itemsize == 2 and head_dim >= 16 and head_dim == triton.next_power_of_2(head_dim)
    )


def _vector_width(dtype: torch.dtype, *strides: tuple[int, ...]) -> int:
    """Elements of the widest load (16 bytes) that every stride but the last is a multiple of, or 1."""
    width = 16 // dtype.itemsize
    return width if all(stride % width == 0 for row in strides for stride in row[:-1]) else 1


def _matrix_shape(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows, columns) of a tensor (B, S, H, D) as a matrix whose row pitch is the stride of S; None where TMA cannot.

    Head (b, h) starts at row (stride_b // pitch) * b + (stride_h // pitch) * h and at the column that the remainders
    give, which covers token-major and head-major storage and slices of a fused projection. The last row and column are
    those of the last element, so the copy engine never reads past the view.
    """
    batch, length, heads, head_dim = shape
    stride_b, pitch, stride_h, _ = stride
    if 0 in shape or pitch <= 0:
        return None
    (row_b, col_b), (row_h, col_h) = divmod(stride_b, pitch), divmod(stride_h, pitch)
    rows = (batch - 1) * row_b + (heads - 1) * row_h + length
    cols = (batch - 1) * col_b + (heads - 1) * col_h + head_dim
    return None if cols > pitch or rows >= 2**31 else (rows, cols)


# From here on the multiples of a row stride within a tile no longer fit 32 bits.
_LONG_STRIDE = 2**31 // 128


@functools.cache
def _launcher(
    device: torch.device,
    config: AttentionConfig,
    dtype: torch.dtype,
    head_dim: int,
    vec: int,
    tma: bool,
    packed: bool,
    q_lens: bool,
    kv_lens: bool,
) -> Launcher:
    """The launches of one compiled variant; `q_lens` and `kv_lens` tell whether they are given."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    descriptor = functools.partial(TensorDescriptor, block_shape=[config.block_n, block_d])
    return Launcher(
        _attention_fwd, device, {"k": descriptor, "v": descriptor} if tma else {},
        D=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, STAGES=config.num_stages,
        VEC=vec, USE_TMA=tma, PACKED=packed, PRECISION="ieee" if dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
    )  # fmt: skip


class _Plan(NamedTuple):
    """What a launch needs besides its tensors."""

    launcher: Launcher
    grid: tuple[int, int, int]
    matrices: tuple[tuple[int, int], tuple[int, int]] | None  # of k and v, where they come through descriptors
    integers: tuple[int, ...]


# Nothing but shapes, strides and types goes in, so that a call like an earlier one finds its launch ready.
@functools.lru_cache(maxsize=4096)
def _plan(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    aligned: bool,
    samples: int,
    packed_max_q: int | None,
    q_lens: bool,
    kv_lens: bool,
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int],
) -> _Plan:
    """`samples` is the number of lengths; `aligned` tells whether k and v start at a multiple of 16 bytes."""
    packed = packed_max_q is not None
    if packed:
        q_shape, k_shape = (1, *q_shape), (1, *k_shape)
        q_stride, k_stride, v_stride = ((0, *stride) for stride in (q_stride, k_stride, v_stride))
    _, rows_q, heads, head_dim = q_shape
    rows_k, kv_heads = k_shape[1:3]
    vec = _vector_width(dtype, q_stride, k_stride, v_stride)
    matrices = None
    if aligned and uses_tma(capability, dtype, head_dim) and _vector_width(dtype, k_stride, v_stride) > 1:
        k_matrix, v_matrix = _matrix_shape(k_shape, k_stride), _matrix_shape(k_shape, v_stride)
        matrices = (k_matrix, v_matrix) if k_matrix and v_matrix else None
    tma = matrices is not None
    config = attention_config(capability, head_dim, dtype, tma)
    max_q = rows_q if packed_max_q is None else min(packed_max_q, rows_q)
    blocks = triton.cdiv(max_q, config.block_m) * heads * samples
    strides = [stride // vec for tensor in (q_stride, k_stride, v_stride) for stride in tensor[:-1]]
    integers = (
        max_q, rows_q, rows_k, heads, heads // kv_heads, heads * rows_q, rows_q, *strides,
        rows_q * heads * head_dim, heads * head_dim,
    )  # fmt: skip
    launcher = _launcher(device, config, dtype, head_dim, vec, tma, packed, q_lens, kv_lens)
    return _Plan(launcher, (blocks, 1, 1), matrices, integers)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    *,
    packed_max_q: int | None = None,
    capability: tuple[int, int],
    keep_plan: bool = False,
) -> None:
    """Launch the kernel; writes `out` (as q) and `lse` (B, H, Sq) float32, both contiguous.

    q is (B, Sq, H, D), k and v (B, Sk, Hk, D), D contiguous, any other strides. `q_lens` and `kv_lens` are int32 (B,),
    or None.
    With `packed_max_q`, the longest query, the tensors are packed, q (T, H, D) and so on, lse is (H, T), and `q_lens`
    and `kv_lens` are the `cu_seqlens`, int32 (samples + 1,); rows of no sample are not written. With
    `keep_plan`, calls of the operator like this one are launched like this from now on, by C++ alone. The caller has
    checked all of this.
    """
    q_stride, k_stride, v_stride = q.stride(), k.stride(), v.stride()
    copied = False
    if max(q_stride[-3], k_stride[-3], v_stride[-3]) >= _LONG_STRIDE:
        q, k, v = (x.contiguous() for x in (q, k, v))
        copied = True
        q_stride, k_stride, v_stride = q.stride(), k.stride(), v.stride()
    if packed_max_q is None:
        samples = q.shape[0]
    else:
        assert q_lens is not None
        samples = q_lens.shape[0] - 1
    launcher, grid, matrices, integers = _plan(
        q.shape, k.shape, q_stride, k_stride, v_stride, (k.data_ptr() | v.data_ptr()) % 16 == 0,
        samples, packed_max_q, q_lens is not None, kv_lens is not None, q.dtype, q.device, capability,
    )  # fmt: skip
    if grid[0] == 0:
        return
    k_source, v_source = k, v
    if matrices is not None:
        k_source, v_source = (k, matrices[0], (k_stride[-3], 1)), (v, matrices[1], (v_stride[-3], 1))
    launcher(grid, q, k_source, v_source, out, lse, q_lens, kv_lens, scale * _LOG2_E.value, *integers)
    if not keep_plan or copied:  # of copies, the plan would be one for the copies
        return
    sources = (None, *(source[1:] if isinstance(source, tuple) else None for source in (k_source, v_source)))
    launcher.keep_attention_plan(
        q=q, k=k, v=v, q_lens=q_lens, kv_lens=kv_lens, packed_max_q=packed_max_q, grid=grid, sources=sources,
        has_scratch=False, lens_are_pointers=False, integers=integers,
    )  # fmt: skip


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: new lengths must not add any."""
    return sum(len(caches[0]) for caches in _attention_fwd.device_caches.values())
