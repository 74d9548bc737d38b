"""Attention over keys in pieces, some of which are still on their way when the kernel starts: one launch.

Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691) as in `attention`, with the pieces of Ring Attention (Liu et al.
2023, arXiv 2310.01889) taken one after the other by the same program: accumulator, row maximum and row sum stay in
registers, nothing is merged. Copy engines bring the pieces head by head and write a flag behind each group of heads;
a program looks at its head's flag before it reads a piece. Arrivals need no multiprocessor, so waiting programs cannot
keep from running what they wait for.

All pieces lie in one tensor of rows, so that one TMA descriptor and no pointer per piece covers them. A piece of `n`
rows per sample and head starts at some row of it and is stored as (Hk, B, 2, n, D): for each head its samples, for each
sample keys, then values. A group of heads is thus one contiguous range, and one copy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention import (
    _LN_2,
    _LOG2_E,
    _LONG_STRIDE,
    AttentionConfig,
    _attend_block,
    _origin,
    _vector_width,
    attention_config,
    uses_tma,
)
from .launch import Launcher

PIECE_FIELDS = 3  # of a row of the table of pieces: first row in memory, place in the sequence, length
ERROR_WORDS = 4  # what a program that waited in vain writes: 1 + number of the piece, epoch, flag's value, head
# One look at a flag takes about a microsecond: a read-modify-write at system scope and a pause.
_LOOKS_PER_SECOND = 1_000_000


@triton.jit
def _has_arrived(flag, epoch, looks, ASM: tl.constexpr):
    """Look at a flag until it has reached `epoch`, at most `looks` times more; (whether it has, its value).

    The read is an atomic one since its result comes to all threads from one of them: they agree on when the loop ends.
    It acquires at system scope, for the flag is written by a copy engine's stream, after a fence over the whole system.
    """
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    left = looks
    while (seen - epoch < 0) & (left > 0):
        left -= 1
        if ASM:
            tl.inline_asm_elementwise(
                "nanosleep.u32 100; mov.u32 $0, $1;", "=r,r", [left], dtype=tl.int32, is_pure=False, pack=1
            )
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    return seen - epoch >= 0, seen


@triton.jit
def _fence(row, ASM: tl.constexpr, USE_TMA: tl.constexpr):
    """`row`, known only after a fence between the acquire and the reads of the copy engine (TMA).

    TMA reads through another proxy than loads do; without the fence, the acquire orders loads only (PTX ISA, async
    proxy). That the row passes through the instruction keeps compilers from moving reads of that row before it. Plain
    loads and cp.async need none: all threads have passed the barrier behind which they learnt of the flag.
    """
    if ASM and USE_TMA:
        row = tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [row], dtype=tl.int32, is_pure=False, pack=1
        )
    return row


_RUNTIME_INTEGERS = (
    "pieces", "epoch", "looks", "heads_per_flag", "flag_stride", "own_start", "rows_q", "batches", "heads",
    "heads_per_kv", "stride_qb", "stride_qm", "stride_qh",
)  # fmt: skip


@triton.jit(
    do_not_specialize=_RUNTIME_INTEGERS,
    do_not_specialize_on_alignment=("table", "flags", "error", "lse_ptr", "q_lens", "kv_lens"),
)
def _ring_attention_fwd(
    q_ptr, memory, out_ptr, lse_ptr, q_lens, kv_lens, table, flags, error, scale_log2, pieces, epoch, looks,
    heads_per_flag, flag_stride, own_start, rows_q, batches, heads, heads_per_kv, stride_qb, stride_qm, stride_qh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    VEC: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # Strides arrive divided by VEC, as for `attention`.
    stride_qm = stride_qm * VEC
    stride_qb, stride_qh = tl.cast(stride_qb, tl.int64) * VEC, tl.cast(stride_qh, tl.int64) * VEC

    # Heads run slowest: programs are started in order, so those of heads that arrive late start late, and never hold
    # the multiprocessors that those of heads which have arrived could use.
    blocks_m = tl.cdiv(rows_q, BLOCK_M)
    pid = tl.program_id(0)
    first_m = (pid % blocks_m) * BLOCK_M
    batch = (pid // blocks_m) % batches
    head = pid // (blocks_m * batches)
    kv_head = head // heads_per_kv

    q_len = rows_q
    if q_lens is not None:
        q_len = tl.minimum(tl.maximum(tl.load(q_lens + batch) - own_start, 0), rows_q)
    kv_total = 0x7FFFFFFF
    if kv_lens is not None:
        kv_total = tl.maximum(tl.load(kv_lens + batch), 0)
    kv_total = tl.where(first_m < q_len, kv_total, 0)

    rows = first_m + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    q_tile_ptr, _, _ = _origin(q_ptr, first_m, batch, head, stride_qb, stride_qm, stride_qh, False)
    q_mask = (rows < q_len)[:, None] & (cols < D)[None, :]
    q = tl.load(q_tile_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_qm + cols[None, :], mask=q_mask, other=0.0)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    failed = 0
    for piece in range(pieces):
        first_row = tl.load(table + piece * 3)
        start = tl.load(table + piece * 3 + 1)
        length = tl.load(table + piece * 3 + 2)
        kv_len = tl.minimum(tl.maximum(kv_total - start, 0), length)
        k_row = first_row + (kv_head * batches + batch) * 2 * length
        # The first piece is this rank's own, written before the launch. Keys that do not exist are not waited for.
        if (piece > 0) & (kv_len > 0):
            flag = flags + piece * flag_stride + kv_head // heads_per_flag
            arrived, seen = _has_arrived(flag, epoch, tl.where(failed > 0, 0, looks), ASM)
            if arrived == 0:
                failed = 1
                tl.store(error + 1, epoch)
                tl.store(error + 2, seen)
                tl.store(error + 3, kv_head)
                tl.store(error, 1 + piece)
            k_row = _fence(k_row, ASM, USE_TMA)
        v_row = k_row + length
        if USE_TMA:
            k, v = memory, memory
        else:
            k, v = memory + k_row.to(tl.int64) * D, memory + v_row.to(tl.int64) * D
        full = kv_len // BLOCK_N * BLOCK_N
        for first in tl.range(0, full, BLOCK_N, num_stages=STAGES):
            acc, l_i, m_i = _attend_block(
                acc, l_i, m_i, q, first, kv_len, scale_log2, k, k_row, 0, D, v, v_row, 0, D,
                D, BLOCK_N, BLOCK_D, USE_TMA, False, PRECISION,
            )  # fmt: skip
        if full < kv_len:
            acc, l_i, m_i = _attend_block(
                acc, l_i, m_i, q, full, kv_len, scale_log2, k, k_row, 0, D, v, v_row, 0, D,
                D, BLOCK_N, BLOCK_D, USE_TMA, True, PRECISION,
            )  # fmt: skip

    alive = (rows < q_len) & (kv_total > 0)
    safe_l = tl.where(alive, l_i, 1.0)
    # What a program that waited in vain has read is no result: it must not look like one.
    safe_l = tl.where(failed > 0, float("nan"), safe_l)
    lse = tl.where(alive, (m_i + tl.math.log2(safe_l)) * _LN_2, float("-inf"))
    out = tl.where(alive[:, None], acc * (1.0 / safe_l)[:, None], 0.0)
    lse_row = lse_ptr + (batch * heads + head).to(tl.int64) * rows_q
    out_tile_ptr, _, _ = _origin(
        out_ptr, first_m, batch, head, tl.cast(rows_q, tl.int64) * heads * D, heads * D, D, False
    )
    out_offsets = tl.arange(0, BLOCK_M)[:, None] * (heads * D) + cols[None, :]
    tl.store(lse_row + rows, lse, mask=rows < rows_q)
    tl.store(
        out_tile_ptr + out_offsets,
        out.to(out_ptr.dtype.element_ty),
        mask=(rows < rows_q)[:, None] & (cols < D)[None, :],
    )


@dataclass(frozen=True)
class Pieces:
    """The keys and values of a sequence in pieces, as a kernel consumes them; which kernel does not matter.

    Attributes:
        memory: (rows, D), q's dtype: all pieces, each stored as this module's text says; starts at a multiple of 16
            bytes.
        table: int32 (pieces, PIECE_FIELDS), in the order of consumption, this rank's own piece first: the piece's first
            row in `memory`, the place of its first key in the sequence, its length n.
        flags: int32 (pieces, groups): the keys and values of heads g * heads_per_flag ... of a piece are there once
            flags[piece, g] has reached `epoch`, counted modulo 2**32. Those of the first piece are not looked at.
        heads_per_flag: key heads in a group.
        epoch: of this launch.
        error: int32 (ERROR_WORDS,), zeros, written by programs that waited in vain; in the host's memory or the
            device's.
        timeout: seconds that a program waits for one flag, more or less.
    """

    memory: torch.Tensor
    table: torch.Tensor
    flags: torch.Tensor
    heads_per_flag: int
    epoch: int
    error: torch.Tensor
    timeout: float


@functools.cache
def _launcher(
    device: torch.device,
    config: AttentionConfig,
    dtype: torch.dtype,
    head_dim: int,
    vec: int,
    tma: bool,
    q_lens: bool,
    kv_lens: bool,
) -> Launcher:
    """The launches of one compiled variant; `q_lens` and `kv_lens` tell whether they are given."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    descriptor = functools.partial(TensorDescriptor, block_shape=[config.block_n, block_d])
    return Launcher(
        _ring_attention_fwd, device, {"memory": descriptor} if tma else {},
        D=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, STAGES=config.num_stages, VEC=vec,
        USE_TMA=tma, PRECISION="ieee" if dtype == torch.float32 else "tf32", ASM=device.type == "cuda",
        num_warps=config.num_warps,
    )  # fmt: skip


class _Plan(NamedTuple):
    """What a launch needs besides its tensors and the epoch."""

    launcher: Launcher
    grid: tuple[int, int, int]
    tma: bool
    integers: tuple[int, ...]


# Nothing but shapes, strides and types goes in, so that a call like an earlier one finds its launch ready.
@functools.lru_cache(maxsize=4096)
def _plan(
    q_shape: tuple[int, ...],
    q_stride: tuple[int, ...],
    kv_heads: int,
    q_lens: bool,
    kv_lens: bool,
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int],
) -> _Plan:
    batches, rows, heads, head_dim = q_shape
    vec = _vector_width(dtype, q_stride)
    tma = uses_tma(capability, dtype, head_dim)
    config = attention_config(capability, head_dim, dtype, tma)
    blocks = triton.cdiv(rows, config.block_m) * heads * batches
    integers = (rows, batches, heads, heads // kv_heads, *(stride // vec for stride in q_stride[:-1]))
    launcher = _launcher(device, config, dtype, head_dim, vec, tma, q_lens, kv_lens)
    return _Plan(launcher, (blocks, 1, 1), tma, integers)


def ring_attention_forward(
    q: torch.Tensor,
    pieces: Pieces,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    *,
    kv_heads: int,
    own_start: int,
    capability: tuple[int, int],
) -> None:
    """Launch the kernel; writes `out` (as q) and `lse` (B, H, S_r) float32, both contiguous.

    q is (B, S_r, H, D), D contiguous, any other strides: rows own_start ... own_start + S_r of the sequence. `q_lens`
    and `kv_lens` are int32 (B,), of the whole sequence, or None. The caller has checked all of this.
    """
    if q.stride(-3) >= _LONG_STRIDE:
        q = q.contiguous()
    launcher, grid, tma, integers = _plan(
        q.shape, q.stride(), kv_heads, q_lens is not None, kv_lens is not None, q.dtype, q.device, capability
    )
    if grid[0] == 0:
        return
    memory = pieces.memory
    launcher(
        grid, q, (memory, tuple(memory.shape), (memory.shape[1], 1)) if tma else memory, out, lse, q_lens, kv_lens,
        pieces.table, pieces.flags, pieces.error, scale * _LOG2_E.value, pieces.table.shape[0], _signed(pieces.epoch),
        _looks(pieces.timeout), pieces.heads_per_flag, pieces.flags.stride(0), own_start, *integers,
    )  # fmt: skip


def _looks(seconds: float) -> int:
    return min(int(seconds * _LOOKS_PER_SECOND), 2**31 - 1)


def _signed(word: int) -> int:
    """A word as the int32 that has its bits."""
    return (word + 2**31) % 2**32 - 2**31


# --- into pieces ------------------------------------------------------------------------------------------------------

_PACK_INTEGERS = (
    "first_row", "rows", "batches", "kv_heads", "stride_kb", "stride_kn", "stride_kh",
    "stride_vb", "stride_vn", "stride_vh",
)  # fmt: skip
_PACK_ROWS = 64


@triton.jit(do_not_specialize=_PACK_INTEGERS)
def _pack(
    k_ptr, v_ptr, memory, first_row, rows, batches, kv_heads, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    # Heads run fastest: programs in flight at one time read whole rows of (Hk, D), which lie together as a rule.
    pid = tl.program_id(0)
    head = pid % kv_heads
    is_value = (pid // kv_heads) % 2
    batch = (pid // (2 * kv_heads)) % batches
    first = (pid // (2 * kv_heads * batches)) * BLOCK_R
    source, stride_b, stride_n, stride_h = k_ptr, stride_kb, stride_kn, stride_kh
    if is_value == 1:
        source, stride_b, stride_n, stride_h = v_ptr, stride_vb, stride_vn, stride_vh
    source += (tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h) * VEC
    row = first + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (cols < D)[None, :]
    tile = tl.load(source + (row.to(tl.int64) * stride_n * VEC)[:, None] + cols[None, :], mask=mask)
    target = tl.cast(first_row, tl.int64) + ((tl.cast(head, tl.int64) * batches + batch) * 2 + is_value) * rows
    tl.store(memory + (target + row)[:, None] * D + cols[None, :], tile, mask=mask)


@functools.cache
def _packer(device: torch.device, dtype: torch.dtype, head_dim: int, vec: int) -> Launcher:
    block_d = max(16, triton.next_power_of_2(head_dim))
    return Launcher(_pack, device, D=head_dim, BLOCK_R=_PACK_ROWS, BLOCK_D=block_d, VEC=vec, num_warps=4)


def pack_piece(k: torch.Tensor, v: torch.Tensor, memory: torch.Tensor, first_row: int) -> None:
    """Store k and v (B, n, Hk, D), D contiguous, any other strides, as a piece that starts at `first_row`."""
    batches, rows, kv_heads, head_dim = k.shape
    grid = (triton.cdiv(rows, _PACK_ROWS) * batches * 2 * kv_heads, 1, 1)
    if not grid[0]:
        return
    vec = _vector_width(k.dtype, k.stride(), v.stride())
    strides = [stride // vec for x in (k, v) for stride in x.stride()[:-1]]
    _packer(k.device, k.dtype, head_dim, vec)(grid, k, v, memory, first_row, rows, batches, kv_heads, *strides)


def compile_count() -> int:
    """How many variants of the kernels this process holds, over all devices: new lengths must not add any."""
    return sum(len(caches[0]) for kernel in (_ring_attention_fwd, _pack) for caches in kernel.device_caches.values())
