"""The portable 8-bit attention kernel: int8 scores on sm80 and later, and in the Triton interpreter.

Its input is what `quantize_int8` writes. Values are e4m3 where the tensor cores have it (sm89 and later); elsewhere
they are float16, as are the weights. One program per (batch, head, block of queries) and an online softmax over blocks
of keys, as in `attention`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .format8 import HIGHEST_E4M3, LARGEST_KEYS
from .launch import Launcher
from .quantize_int8 import K_BLOCK, Keys8, Queries8
from .quantize_int8_kernels import _length

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_OF_WEIGHTS = tl.constexpr(8.0)
_HIGHEST_WEIGHT = tl.constexpr(HIGHEST_E4M3)
_K_BLOCK = tl.constexpr(K_BLOCK)
_BLOCKS_OF_LARGEST = tl.constexpr(LARGEST_KEYS // K_BLOCK)


@triton.jit
def _scores(q, q_factor, keys, first, k, k_scales, BLOCK_D: tl.constexpr):
    """Of a block of keys, in exponents of two."""
    k_tile = tl.load(k + keys[:, None].to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
    factor = q_factor * tl.load(k_scales + first // _K_BLOCK)
    return tl.dot(q, k_tile.T, out_dtype=tl.int32).to(tl.float32) * factor[:, None]


@triton.jit
def _attend_block(
    acc, l_i, m_i, q, q_factor, first, kv_len, k, v, k_scales, padded_k,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one block of keys through the online softmax. `m_i` is in exponents of two."""
    keys = first + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    scaled = _scores(q, q_factor, keys, first, k, k_scales, BLOCK_D)
    if MASKED:
        scaled = tl.where((keys < kv_len)[None, :], scaled, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scaled, 1))
    p = tl.math.exp2(scaled - (m_new - _LOG2_OF_WEIGHTS)[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    v_tile = tl.load(v + channels[:, None].to(tl.int64) * padded_k + keys[None, :])
    # The sums of e4m3 products have fewer bits on some chips: a block's own, added in float32.
    acc = acc * alpha[:, None] + tl.dot(p.to(v_tile.dtype), v_tile.T)
    return acc, l_i, m_new


@triton.jit
def _add_lacking(
    acc, m_i, q, q_factor, first, k, v, k_scales, padded_k, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Add what the values of some of the largest keys lack, which have been attended before."""
    keys = first + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    scaled = _scores(q, q_factor, keys, first, k, k_scales, BLOCK_D)
    # Rounded in another block than before, a score may exceed the maximum a little: up to 448 / 256.
    p = tl.minimum(tl.math.exp2(scaled - (m_i - _LOG2_OF_WEIGHTS)[:, None]), _HIGHEST_WEIGHT)
    v_tile = tl.load(v + channels[:, None].to(tl.int64) * padded_k + keys[None, :])
    return acc + tl.dot(p.to(v_tile.dtype), v_tile.T)


_RUNTIME_INTEGERS = ("rows_q", "rows_k", "heads", "heads_per_kv", "padded_q", "padded_k")


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=("q_lens", "kv_lens"))
def _attention_int8_fwd(
    q_ptr, k_ptr, v_ptr, q_scales, k_scales, v_scales, means_of_scores, out_ptr, lse_ptr, q_lens, kv_lens, scale_log2,
    rows_q, rows_k, heads, heads_per_kv, padded_q, padded_k,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    padded_q = tl.multiple_of(padded_q, 64)
    padded_k = tl.multiple_of(padded_k, 64)
    blocks_m = tl.cdiv(rows_q, BLOCK_M)
    pid = tl.program_id(0)
    first_m = (pid % blocks_m) * BLOCK_M
    head = (pid // blocks_m) % heads
    batch = pid // (blocks_m * heads)
    of_head = batch * heads + head
    of_kv_head = of_head // heads_per_kv
    q_len = _length(q_lens, batch, rows_q)
    kv_len = tl.where(first_m < q_len, _length(kv_lens, batch, rows_k), 0)

    rows = first_m + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    alive = rows < tl.where(kv_len > 0, q_len, 0)
    q_rows = of_head.to(tl.int64) * padded_q + rows
    q = tl.load(q_ptr + q_rows[:, None] * BLOCK_D + channels[None, :], mask=alive[:, None], other=0)
    q_factor = tl.load(q_scales + q_rows, mask=alive, other=0.0) * scale_log2
    k = k_ptr + of_kv_head.to(tl.int64) * padded_k * BLOCK_D
    v = v_ptr + of_kv_head.to(tl.int64) * padded_k * BLOCK_D
    k_scales += of_kv_head * (padded_k // _K_BLOCK)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = kv_len // BLOCK_N * BLOCK_N
    for first in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        acc, l_i, m_i = _attend_block(
            acc, l_i, m_i, q, q_factor, first, kv_len, k, v, k_scales, padded_k, BLOCK_N, BLOCK_D, False
        )
    if full < kv_len:
        acc, l_i, m_i = _attend_block(
            acc, l_i, m_i, q, q_factor, full, kv_len, k, v, k_scales, padded_k, BLOCK_N, BLOCK_D, True
        )

    behind = tl.cdiv(rows_k, _K_BLOCK) * _K_BLOCK
    largest = tl.minimum(tl.cdiv(kv_len, _K_BLOCK), _BLOCKS_OF_LARGEST) * _K_BLOCK
    for first in range(behind, behind + largest, BLOCK_N):
        acc = _add_lacking(acc, m_i, q, q_factor, first, k, v, k_scales, padded_k, BLOCK_N, BLOCK_D)

    safe_l = tl.where(alive, l_i, 1.0)
    left_out = tl.load(means_of_scores + q_rows, mask=alive, other=0.0)
    lse = (m_i - _LOG2_OF_WEIGHTS + tl.math.log2(safe_l)) * _LN_2 + left_out
    v_scale = tl.load(v_scales + of_kv_head * 2 * BLOCK_D + channels)
    v_mean = tl.load(v_scales + (of_kv_head * 2 + 1) * BLOCK_D + channels)
    out = acc * (1.0 / safe_l)[:, None] * v_scale[None, :] + v_mean[None, :]
    stored = rows < rows_q
    tl.store(lse_ptr + of_head.to(tl.int64) * rows_q + rows, tl.where(alive, lse, float("-inf")), mask=stored)
    offsets = (batch.to(tl.int64) * rows_q + rows)[:, None] * (heads * D) + head * D + channels[None, :]
    tl.store(
        out_ptr + offsets,
        tl.where(alive[:, None], out, 0.0).to(out_ptr.dtype.element_ty),
        mask=stored[:, None] & (channels < D)[None, :],
    )


@dataclass(frozen=True)
class Int8Config:
    """Tile sizes and launch options of one compiled variant."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By whether values are e4m3, and padded head dim. Shared memory limits the choice: 163 KiB on sm80, 99 KiB on sm86,
# sm89 and sm120. Not measured.
_CONFIGS: dict[tuple[bool, int], Int8Config] = {
    (False, 64): Int8Config(128, 64, 8, 3),
    (False, 128): Int8Config(128, 32, 8, 4),
    (False, 256): Int8Config(64, 32, 8, 2),
    (True, 64): Int8Config(128, 64, 8, 3),
    (True, 128): Int8Config(128, 64, 8, 3),
    (True, 256): Int8Config(64, 32, 8, 2),
}


def value_type(capability: tuple[int, int]) -> torch.dtype:
    """Of the values on this chip: what its tensor cores multiply."""
    return torch.float8_e4m3fn if capability >= (8, 9) else torch.float16


def int8_config(values: torch.dtype, block_d: int) -> Int8Config:
    """The configuration of a launch, for a padded head dim."""
    return _CONFIGS[values == torch.float8_e4m3fn, block_d]


@functools.cache
def _launcher(
    device: torch.device, values: torch.dtype, dtype: torch.dtype, head_dim: int, block_d: int, q_lens: bool,
    kv_lens: bool,
) -> Launcher:  # fmt: skip
    """The launches of one compiled variant; `q_lens` and `kv_lens` tell whether they are given."""
    config = int8_config(values, block_d)
    return Launcher(
        _attention_int8_fwd, device, D=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d,
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip


def attention_int8_forward(
    queries: Queries8,
    keys: Keys8,
    rows_k: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
) -> None:
    """Launch the kernel; writes `out` (B, Sq, H, D) and `lse` (B, H, Sq) float32, both contiguous.

    `rows_k` is Sk; the values' keys are not permuted.
    """
    batch, rows_q, heads, head_dim = out.shape
    block_d = queries.q.shape[3]
    config = int8_config(keys.v.dtype, block_d)
    launcher = _launcher(
        out.device, keys.v.dtype, out.dtype, head_dim, block_d, q_lens is not None, kv_lens is not None
    )
    launcher(
        (triton.cdiv(rows_q, config.block_m) * heads * batch, 1, 1), queries.q, keys.k, keys.v, queries.q_scales,
        keys.k_scales, keys.v_scales, queries.means_of_scores, out, lse, q_lens, kv_lens, scale * _LOG2_E.value, rows_q,
        rows_k, heads, heads // keys.k.shape[1], queries.q.shape[2], keys.k.shape[2],
    )  # fmt: skip


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: new lengths must not add any."""
    return sum(len(caches[0]) for caches in _attention_int8_fwd.device_caches.values())
