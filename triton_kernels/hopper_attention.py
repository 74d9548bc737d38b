"""The Hopper attention kernel: exact softmax attention for bfloat16 and float16 on sm90, written in Gluon.

Structure: in each program one producer feeds three consumer warpgroups of 64 query rows from a ring of 64-row tiles of
keys and values in shared memory (TMA, two mbarriers per slot), so that 192 rows share what is read of the keys. QK(j+1)
is issued before PV(j), and the exponentials of j+1 run under PV(j); P never leaves the registers. After
FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, sections 3.1 and 3.2). The softmax is another:

The online softmax follows a running maximum: for each block of keys a maximum over all scores, and a rescaling of the
output accumulator. Softmax does not need the maximum, only some m that keeps exp2(s - m) and its sums inside float32,
whose exponent spans 254 powers of two. bfloat16 has the same exponent, and there the maximum over a row's first 64 keys
serves as m for all of them: the row's maximum may exceed it by about 76 (natural units) before a sum overflows, and
rounding is relative whatever m is. Without maximum and rescaling the main loop has 172 instead of 283 instructions,
which an H100 at its power limit turns into speed (docs/kernels/hopper.md has the measurements). An overflow leaves inf
or NaN in the sums; the program then computes its rows again, with the online softmax. float16, whose exponent is too
short for this, always takes the online softmax.
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import Launcher, MakeDescriptor

# Names that changed after Triton 3.6.
_thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_LN_2 = gl.constexpr(0.6931471805599453)
_LOG2_E = 1.4426950408889634
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_MAX_GRID_YZ = 65535
# Rows of one consumer's queries, and of a block of keys or values.
_ROWS = gl.constexpr(64)
_KEYS = gl.constexpr(64)

# Bits of `flags`: which lengths are given.
_HAS_Q_LENS = gl.constexpr(1)
_HAS_KV_LENS = gl.constexpr(2)
_PACKED = gl.constexpr(4)


# Kernel parameters that are needed only before and after the main loop wait in shared memory: a captured value would
# occupy a register of every thread of its partition in between.
_OUT = gl.constexpr(0)
_LSE = gl.constexpr(1)
_Q_LENS = gl.constexpr(2)
_KV_LENS = gl.constexpr(3)
_HEADS_PER_KV = gl.constexpr(4)
_ROWS_Q = gl.constexpr(5)
_ROWS_K = gl.constexpr(6)
_FLAGS = gl.constexpr(7)
_PARAMETERS = gl.constexpr(8)


@gluon.jit
def _park(parameters, out, lse, q_lens, kv_lens, heads_per_kv, rows_q, rows_k, flags):
    index = gl.arange(0, _PARAMETERS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    values = gl.where(index == _OUT, out.to(gl.int64), flags.to(gl.int64))
    values = gl.where(index == _LSE, lse.to(gl.int64), values)
    values = gl.where(index == _Q_LENS, q_lens.to(gl.int64), values)
    values = gl.where(index == _KV_LENS, kv_lens.to(gl.int64), values)
    values = gl.where(index == _HEADS_PER_KV, heads_per_kv.to(gl.int64), values)
    values = gl.where(index == _ROWS_Q, rows_q.to(gl.int64), values)
    parameters.store(gl.where(index == _ROWS_K, rows_k.to(gl.int64), values))


@gluon.jit
def _parked(parameters, index: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(parameters.slice(index, 1).load(layout), 0)


@gluon.jit
def _integer(parameters, index: gl.constexpr):
    return _parked(parameters, index).to(gl.int32)


@gluon.jit
def _pointer(parameters, index: gl.constexpr, dtype: gl.constexpr):
    return gl.multiple_of(_parked(parameters, index).to(gl.pointer_type(dtype), bitcast=True), 16)


@gluon.jit
def _sample_span(parameters, lens: gl.constexpr, given: gl.constexpr, rows, sample, flags):
    """(first row, length) of a sample within `rows`, clamped: what lies on the device cannot be refused on the host."""
    start = 0
    length = rows
    if (flags & _PACKED) != 0:
        pointer = _pointer(parameters, lens, gl.int32)
        start = gl.minimum(gl.maximum(gl.load(pointer + sample), 0), rows)
        length = gl.minimum(gl.maximum(gl.load(pointer + sample + 1), start), rows) - start
    elif (flags & given) != 0:
        length = gl.minimum(gl.maximum(gl.load(_pointer(parameters, lens, gl.int32) + sample), 0), rows)
    return start, length


@gluon.jit
def _place(CONSUMERS: gl.constexpr):
    """(first query of the block, head, sample). Blocks of queries run fastest: programs share a head's keys in L2."""
    return gl.program_id(0) * (CONSUMERS * _ROWS), gl.program_id(1), gl.program_id(2)


@gluon.jit
def _key_span(parameters, first_m, sample):
    """(first key, number of keys, first query, number of queries) of a sample; no keys for rows past the queries."""
    flags = _integer(parameters, _FLAGS)
    q_start, q_len = _sample_span(parameters, _Q_LENS, _HAS_Q_LENS, _integer(parameters, _ROWS_Q), sample, flags)
    k_start, kv_len = _sample_span(parameters, _KV_LENS, _HAS_KV_LENS, _integer(parameters, _ROWS_K), sample, flags)
    return k_start, gl.where(first_m < q_len, kv_len, 0), q_start, q_len


# Shared memory: a tile of queries per consumer, then a ring whose slots hold a tile of keys and one of values. The
# barriers share one allocation, since every captured value costs registers. Each slot has a barrier "full", completed
# by the copy engine, and one "empty", at which every consumer arrives.
_K = gl.constexpr(0)
_V = gl.constexpr(1)


@gluon.constexpr_function
def _queries_full(stages):
    return 2 * stages


@gluon.constexpr_function
def _all_done(stages):
    return 2 * stages + 1


@gluon.constexpr_function
def _values_clean(stages):
    return 2 * stages + 2


@gluon.jit
def _tile(ring, which: gl.constexpr, turn, STAGES: gl.constexpr):
    return ring.index(2 * (turn % STAGES) + which)


@gluon.jit
def _wait_full(barriers, turn, STAGES: gl.constexpr):
    mbarrier.wait(barriers.index(turn % STAGES), (turn // STAGES) & 1)


@gluon.jit
def _release(barriers, turn, STAGES: gl.constexpr):
    mbarrier.arrive(barriers.index(STAGES + turn % STAGES))


@gluon.jit
def _load_keys(k, v, ring, barriers, turn, batch, head, k_start, kv_len, STAGES: gl.constexpr):
    """Load the window of the last keys, then all full blocks of keys from the start; the next turn."""
    row = k_start + kv_len - _KEYS
    for block in range((kv_len + _KEYS - 1) // _KEYS):
        mbarrier.wait(barriers.index(STAGES + turn % STAGES), (turn // STAGES + 1) & 1, pred=turn >= STAGES)
        full = barriers.index(turn % STAGES)
        mbarrier.expect(full, k.block_type.nbytes + v.block_type.nbytes)
        _async_load(k, [batch, head, row, 0], full, _tile(ring, _K, turn, STAGES))
        _async_load(v, [batch, head, row, 0], full, _tile(ring, _V, turn, STAGES))
        row = k_start + block * _KEYS
        turn += 1
    return turn


@gluon.jit
def _load_queries(q, queries, barriers, batch, head, row, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    full = barriers.index(_queries_full(STAGES))
    mbarrier.expect(full, CONSUMERS * q.block_type.nbytes)
    for consumer in gl.static_range(CONSUMERS):
        _async_load(q, [batch, head, row + consumer * _ROWS, 0], full, queries.index(consumer))


@gluon.jit
def _producer(
    q, k, v, queries, ring, barriers, parameters, probes, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ONLINE: gl.constexpr,
):  # fmt: skip
    first_m, head, sample = _place(CONSUMERS)
    k_start, kv_len, q_start, _ = _key_span(parameters, first_m, sample)
    if kv_len > 0:
        batch = gl.where((_integer(parameters, _FLAGS) & _PACKED) != 0, 0, sample)
        kv_head = head // _integer(parameters, _HEADS_PER_KV)
        _load_queries(q, queries, barriers, batch, head, q_start + first_m, CONSUMERS, STAGES)
        turn = _load_keys(k, v, ring, barriers, gl.to_tensor(0), batch, kv_head, k_start, kv_len, STAGES)
        if not ONLINE and kv_len > _KEYS:  # noqa: SIM102, `and` would evaluate both sides
            if _any_overflow(probes, barriers, CONSUMERS, STAGES):
                _load_keys(k, v, ring, barriers, turn, batch, kv_head, k_start, kv_len, STAGES)


@gluon.jit
def _sum_in_thread(x):
    """(M, N) -> (M, 8): adds what each thread holds, so that the lanes of a row meet once, after the loop."""
    return gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 8]), 1)


@gluon.jit
def _as_operand(x, dtype: gl.constexpr, layout: gl.constexpr):
    """Weights as the left operand of a product. Two at a time: from single conversions the assembler may pack halves in
    the wrong order and swap them once per register and block, a tenth of the loop's instructions."""
    if dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        x = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(x, layout)


@gluon.jit
def _scores(q, k, layout: gl.constexpr, D: gl.constexpr):
    """q k^T of a block, in flight."""
    keys = k.reshape([_KEYS, D]).permute((1, 0))
    return warpgroup_mma(q, keys, gl.zeros([_ROWS, _KEYS], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def _attend_window(
    q, ring, barriers, turn, kv_len, scale_log2, scores_layout: gl.constexpr, weights_layout: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The softmax's first step, on the window of the last keys, without those that a full block will bring."""
    _wait_full(barriers, turn, STAGES)
    scores = warpgroup_mma_wait(0, deps=(_scores(q, _tile(ring, _K, turn, STAGES), scores_layout, D),))
    covered = (kv_len - 1) // _KEYS * _KEYS
    keys = kv_len - _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, scores_layout))
    valid = gl.expand_dims(keys >= covered, 0)
    m_i = gl.max(gl.where(valid, scores, float("-inf")), 1) * scale_log2
    weights = gl.where(valid, gl.exp2(gl.fma(scores, scale_log2, -gl.expand_dims(m_i, 1))), 0.0)
    return _as_operand(weights, ring.dtype, weights_layout), m_i, _sum_in_thread(weights)


@gluon.jit
def _attend_blocks(
    q, ring, barriers, turn, blocks, weights, acc, m_i, l_i, scale_log2, scores_layout: gl.constexpr,
    weights_layout: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """Take full blocks of keys through the softmax; `weights` of the block before are multiplied on the way."""
    for _ in range(blocks):
        before = turn
        turn += 1
        _wait_full(barriers, turn, STAGES)
        scores = _scores(q, _tile(ring, _K, turn, STAGES), scores_layout, D)
        v = _tile(ring, _V, before, STAGES).reshape([_KEYS, D])
        acc_next = warpgroup_mma(weights, v, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        if ONLINE:
            m_new = gl.maximum(m_i, gl.max(scores, 1) * scale_log2)
            alpha = gl.exp2(m_i - m_new)
            m_i = m_new
            l_i = l_i * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout)), 1)
        exponentials = gl.exp2(gl.fma(scores, scale_log2, -gl.expand_dims(m_i, 1)))
        l_i += _sum_in_thread(exponentials)
        weights_next = _as_operand(exponentials, ring.dtype, weights_layout)
        acc, _ = warpgroup_mma_wait(0, deps=(acc_next, weights))
        _release(barriers, before, STAGES)
        if ONLINE:
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout)), 1)
        weights = weights_next
    return weights, acc, m_i, l_i, turn


@gluon.jit
def _keep_last_rows(values, count, D: gl.constexpr):
    """Write zeros over all but the last `count` rows of a tile of values."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, layout))
    values.store(gl.where(gl.expand_dims(rows >= _KEYS - count, 1), values.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(
    queries, ring, barriers, consumer: gl.constexpr, turn, kv_len, packed, scale_log2, D: gl.constexpr,
    STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A consumer's 64 rows over all keys: (accumulator, m_i, l_i per row, the next turn)."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    q = queries.index(consumer).reshape([_ROWS, D])
    weights, m_i, l_i = _attend_window(q, ring, barriers, turn, kv_len, scale_log2, S, P, D, STAGES)
    acc = gl.zeros([_ROWS, D], gl.float32, OUT)
    blocks = (kv_len - 1) // _KEYS
    weights, acc, m_i, l_i, turn = _attend_blocks(
        q, ring, barriers, turn, blocks, weights, acc, m_i, l_i, scale_log2, S, P, D, STAGES, ONLINE
    )
    v = _tile(ring, _V, turn, STAGES).reshape([_KEYS, D])
    if (packed != 0) & (kv_len < _KEYS):
        # Before a packed sample's first row lies another sample, and 0 * NaN is not 0. (Before one that is not packed
        # the copy engine reads zeros.) This is the only tile of the program: one consumer cleans it for all.
        if consumer == 0:
            _keep_last_rows(v, kv_len, D)
            mbarrier.arrive(barriers.index(_values_clean(STAGES)))
        mbarrier.wait(barriers.index(_values_clean(STAGES)), 0)
    acc = warpgroup_mma(weights, v, acc)
    _release(barriers, turn, STAGES)
    return acc, m_i, gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S)), turn + 1


@gluon.jit
def _output_span(parameters, consumer: gl.constexpr, CONSUMERS: gl.constexpr):
    """(row of the tensor, rows with queries, rows to store, head, batch) of a consumer's 64 rows."""
    first_m, head, sample = _place(CONSUMERS)
    _, _, q_start, q_len = _key_span(parameters, first_m, sample)
    is_packed = (_integer(parameters, _FLAGS) & _PACKED) != 0
    first = first_m + consumer * _ROWS
    stored = gl.where(is_packed, q_len, _integer(parameters, _ROWS_Q))
    return q_start + first, q_len - first, stored - first, head, gl.where(is_packed, 0, sample)


@gluon.jit
def _pointers(parameters, row, head, batch, dtype: gl.constexpr, D: gl.constexpr):
    """Where out and lse of a row begin, and the pitch of out's rows."""
    heads = gl.num_programs(1)
    rows_q = _integer(parameters, _ROWS_Q)
    pitch = heads.to(gl.int64) * D
    out = _pointer(parameters, _OUT, dtype) + (batch.to(gl.int64) * rows_q + row) * pitch + head * D
    lse = _pointer(parameters, _LSE, gl.float32) + (batch.to(gl.int64) * heads + head) * rows_q + row
    return out, lse, pitch


@gluon.jit
def _write_rows(
    parameters, stage, consumer: gl.constexpr, acc, m_i, l_i, CONSUMERS: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Write out and lse of a consumer's rows; those past the queries become zeros with an lse of -inf."""
    row, alive_rows, stored_rows, head, batch = _output_span(parameters, consumer, CONSUMERS)
    out, lse, pitch = _pointers(parameters, row, head, batch, stage.dtype, D)
    own = gl.arange(0, _ROWS, layout=m_i.type.layout)
    alive = own < alive_rows
    l_i = gl.where(alive, l_i, 1.0)
    gl.store(lse + own, gl.where(alive, (m_i + gl.log2(l_i)) * _LN_2, float("-inf")), mask=own < stored_rows)
    by_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / l_i, by_row), 1)
    acc = gl.where(gl.expand_dims(gl.arange(0, _ROWS, layout=by_row) < alive_rows, 1), acc, 0.0)
    # Through shared memory, for 16-byte stores.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    stage.store(acc.to(stage.dtype))
    _thread_barrier()
    _store_rows(out, pitch, stage.load(layout), stored_rows, D)


@gluon.jit
def _store_rows(out, pitch, values, count, D: gl.constexpr):
    rows = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, values.type.layout))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, values.type.layout))
    offsets = gl.expand_dims(rows, 1) * pitch + gl.expand_dims(cols, 0)
    gl.store(out + offsets, values, mask=gl.expand_dims(rows < count, 1))


@gluon.jit
def _write_empty_rows(
    parameters, consumer: gl.constexpr, dtype: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Rows without keys: zeros, and an lse of -inf."""
    row, _, stored_rows, head, batch = _output_span(parameters, consumer, CONSUMERS)
    out, lse, pitch = _pointers(parameters, row, head, batch, dtype, D)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    _store_rows(out, pitch, gl.zeros([_ROWS, D], dtype, layout), stored_rows, D)
    own = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    gl.store(lse + own, gl.full([_ROWS], float("-inf"), gl.float32, own.type.layout), mask=own < stored_rows)


@gluon.jit
def _probe(acc, l_i, alive_rows):
    """Per row 0 if no sum overflowed, else NaN: 0 * x is 0 for finite x only. Rows past the queries do not count."""
    probe = gl.convert_layout(gl.sum(acc * 0.0, 1), l_i.type.layout) + l_i * 0.0
    return gl.where(gl.arange(0, _ROWS, layout=l_i.type.layout) < alive_rows, probe, 0.0)


@gluon.jit
def _any_overflow(probes, barriers, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """Wait until every consumer has left its probes, and look at them all."""
    mbarrier.wait(barriers.index(_all_done(STAGES)), 0)
    in_each_warp: gl.constexpr = gl.BlockedLayout([_ROWS // 32], [32], [gl.num_warps()], [0])
    total = probes.index(0).load(in_each_warp)
    for consumer in gl.static_range(1, CONSUMERS):
        total += probes.index(consumer).load(in_each_warp)
    return gl.sum(total, 0) != 0.0


@gluon.jit
def _stand_aside(barriers, turn, kv_len, STAGES: gl.constexpr):
    """Leave every slot to the others: rows past the queries are not computed."""
    for _ in range((kv_len + _KEYS - 1) // _KEYS):
        _wait_full(barriers, turn, STAGES)
        _release(barriers, turn, STAGES)
        turn += 1
    return turn


@gluon.jit
def _consumer(
    queries, ring, barriers, parameters, probes, scale_log2, consumer: gl.constexpr, CONSUMERS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    first_m, _, sample = _place(CONSUMERS)
    _, kv_len, _, q_len = _key_span(parameters, first_m, sample)
    alive_rows = q_len - first_m - consumer * _ROWS
    if (kv_len > 0) & (alive_rows > 0):
        packed = _integer(parameters, _FLAGS) & _PACKED
        mbarrier.wait(barriers.index(_queries_full(STAGES)), 0)
        acc, m_i, l_i, turn = _attend(
            queries, ring, barriers, consumer, gl.to_tensor(0), kv_len, packed, scale_log2, D, STAGES, ONLINE
        )
        if not ONLINE and kv_len > _KEYS:  # one window alone cannot overflow
            probes.index(consumer).store(_probe(acc, l_i, alive_rows))
            mbarrier.arrive(barriers.index(_all_done(STAGES)))
            if _any_overflow(probes, barriers, CONSUMERS, STAGES):
                acc, m_i, l_i, turn = _attend(
                    queries, ring, barriers, consumer, turn, kv_len, packed, scale_log2, D, STAGES, True
                )
        _write_rows(parameters, queries.index(consumer).reshape([_ROWS, D]), consumer, acc, m_i, l_i, CONSUMERS, D)
    else:
        if kv_len > 0:
            turn = _stand_aside(barriers, gl.to_tensor(0), kv_len, STAGES)
            if not ONLINE and kv_len > _KEYS:
                rows: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
                probes.index(consumer).store(gl.zeros([_ROWS], gl.float32, rows))
                mbarrier.arrive(barriers.index(_all_done(STAGES)))
                if _any_overflow(probes, barriers, CONSUMERS, STAGES):
                    _stand_aside(barriers, turn, kv_len, STAGES)
        _write_empty_rows(parameters, consumer, queries.dtype, CONSUMERS, D)


_RUNTIME_INTEGERS = ("heads_per_kv", "rows_q", "rows_k", "flags")


@gluon.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=("q_lens", "kv_lens"))
def _hopper_attention(
    q, k, v, out, lse, q_lens, kv_lens, scale_log2, heads_per_kv, rows_q, rows_k, flags,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """q, k, v: descriptors of (B, H, S, D) in blocks of (1, 1, 64, D); lens pointers are read where `flags` says so."""
    queries = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, _ROWS, D], q.layout)
    ring = gl.allocate_shared_memory(k.dtype, [2 * STAGES, 1, 1, _KEYS, D], k.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=1)
        mbarrier.init(barriers.index(STAGES + i), count=CONSUMERS)
    mbarrier.init(barriers.index(_queries_full(STAGES)), count=1)
    mbarrier.init(barriers.index(_all_done(STAGES)), count=CONSUMERS)
    mbarrier.init(barriers.index(_values_clean(STAGES)), count=1)
    probes = gl.allocate_shared_memory(gl.float32, [CONSUMERS, _ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    parameters = gl.allocate_shared_memory(gl.int64, [_PARAMETERS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _park(parameters, out, lse, q_lens, kv_lens, heads_per_kv, rows_q, rows_k, flags)
    _thread_barrier()
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_producer, (q, k, v, queries, ring, barriers, parameters, probes, CONSUMERS, STAGES, ONLINE)),
                (_consumer, (queries, ring, barriers, parameters, probes, scale_log2, 0, CONSUMERS, D, STAGES, ONLINE)),
                (_consumer, (queries, ring, barriers, parameters, probes, scale_log2, 1, CONSUMERS, D, STAGES, ONLINE)),
                (_consumer, (queries, ring, barriers, parameters, probes, scale_log2, 2, CONSUMERS, D, STAGES, ONLINE)),
            ],
            [4, 4, 4],
            [160, 160, 160],
        )
    else:
        gl.warp_specialize(
            [
                (_producer, (q, k, v, queries, ring, barriers, parameters, probes, CONSUMERS, STAGES, ONLINE)),
                (_consumer, (queries, ring, barriers, parameters, probes, scale_log2, 0, CONSUMERS, D, STAGES, ONLINE)),
            ],
            [4],
            [160],
        )


@dataclass(frozen=True)
class HopperConfig:
    """One compiled variant: consumers, slots of the ring, and registers per thread at launch (None: what fits once)."""

    consumers: int
    stages: int
    max_registers: int | None


# By head dim. Three consumers fill a multiprocessor, with 144 or 128 KiB for the ring. Of one consumer's programs two
# share a multiprocessor: fewer rows at a time, but the start and the end of one run beside the other.
_CONFIGS = {64: HopperConfig(3, 8, None), 128: HopperConfig(3, 4, None)}
_CONFIGS_SMALL = {64: HopperConfig(1, 4, 96), 128: HopperConfig(1, 2, 96)}


def _choose(head_dim: int, max_q: int, keys: int, heads: int, samples: int, processors: int) -> HopperConfig:
    """The configuration with the fewer microseconds: programs at a time, and for each a start and a block's time.

    The four constants were read off times of an H100 at D = 128 and 24 heads that are not kept (docs/kernels/hopper.md
    quotes them), and give the faster one at those shapes; `python -m benchmarks.gpu_tune --only hopper` repeats it.
    """
    large, small = _CONFIGS[head_dim], _CONFIGS_SMALL[head_dim]
    blocks = -(-keys // _KEYS.value)
    programs = [-(-max_q // (config.consumers * _ROWS.value)) * heads * samples for config in (large, small)]
    of_large = -(-programs[0] // processors) * (4.0 + 1.1 * blocks)
    of_small = -(-programs[1] // (2 * processors)) * (3.0 + 1.0 * blocks)
    return small if of_small < of_large else large


class _Plan(NamedTuple):
    """What a launch needs besides its tensors."""

    launcher: Launcher
    grid: tuple[int, int, int]
    descriptors: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # shape and strides of q, k, v
    integers: tuple[int, ...]


def _make_descriptor(rows: int, head_dim: int, dtype: torch.dtype) -> MakeDescriptor:
    block = [1, 1, rows, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])
    return functools.partial(TensorDescriptor, block_shape=block, layout=layout)


@functools.cache
def _launcher(device: torch.device, dtype: torch.dtype, head_dim: int, config: HopperConfig) -> Launcher:
    of_queries, of_keys = (_make_descriptor(rows, head_dim, dtype) for rows in (_ROWS.value, _KEYS.value))
    return Launcher(
        _hopper_attention, device, {"q": of_queries, "k": of_keys, "v": of_keys},
        CONSUMERS=config.consumers, D=head_dim, STAGES=config.stages, ONLINE=dtype == torch.float16, num_warps=4,
        maxnreg=config.max_registers,
    )  # fmt: skip


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel exists for this type and head dim."""
    return dtype in _DTYPES and head_dim in _CONFIGS


def _descriptor(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides (B, H, S, D) for the copy engine of a tensor (B, S, H, D); None where it cannot read that."""
    batch, rows, heads, head_dim = shape
    strides = []
    for size, step in zip((batch, heads, rows), (stride[0], stride[2], stride[1]), strict=True):
        step = step if size > 1 else head_dim  # never used, but it has to be valid
        if step <= 0 or step % 8 or step >= 2**39:
            return None
        strides.append(step)
    return (batch, heads, rows, head_dim), (*strides, 1)


# Nothing but shapes, strides and types goes in, so that a call like an earlier one finds its launch ready.
@functools.lru_cache(maxsize=4096)
def _plan(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    samples: int,
    packed_max_q: int | None,
    flags: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan | None:
    if packed_max_q is not None:
        q_shape, k_shape = (1, *q_shape), (1, *k_shape)
        q_stride, k_stride, v_stride = ((0, *stride) for stride in (q_stride, k_stride, v_stride))
    _, rows_q, heads, head_dim = q_shape
    rows_k, kv_heads = k_shape[1:3]
    if not takes(dtype, head_dim) or 0 in q_shape or 0 in k_shape:
        return None
    descriptors = (_descriptor(q_shape, q_stride), _descriptor(k_shape, k_stride), _descriptor(k_shape, v_stride))
    max_q = rows_q if packed_max_q is None else min(packed_max_q, rows_q)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    config = _choose(head_dim, max_q, rows_k, heads, samples, processors)
    blocks = triton.cdiv(max_q, config.consumers * _ROWS.value)
    if None in descriptors or max(heads, samples) > _MAX_GRID_YZ:
        return None
    integers = (heads // kv_heads, rows_q, rows_k, flags)
    return _Plan(_launcher(device, dtype, head_dim, config), (blocks, heads, samples), descriptors, integers)  # pyright: ignore[reportArgumentType]


def hopper_attention_forward(
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
    keep_plan: bool = False,
) -> bool:
    """Launch the kernel, with the arguments of `attention_forward`; False, and nothing is launched, where it cannot.

    It takes bfloat16 and float16 with D = 64 and 128, starting at a multiple of 16 bytes and with strides that are
    multiples of 16 bytes. With `keep_plan`, calls of the operator like this one are launched like this from now on, by
    C++ alone.
    """
    if packed_max_q is None:
        samples, flags = q.shape[0], 0
    else:
        assert q_lens is not None
        samples, flags = q_lens.shape[0] - 1, _PACKED.value
    flags |= (q_lens is not None) * _HAS_Q_LENS.value | (kv_lens is not None) * _HAS_KV_LENS.value
    plan = _plan(q.shape, k.shape, q.stride(), k.stride(), v.stride(), samples, packed_max_q, flags, q.dtype, q.device)
    if plan is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    launcher, grid, (q_map, k_map, v_map), integers = plan
    if 0 in grid:
        return True
    # A pointer that is not followed stands in for lengths that are not given: None would be another compiled variant.
    unused = out.view(torch.int32) if q_lens is None or kv_lens is None else None
    launcher(
        grid, (q, *q_map), (k, *k_map), (v, *v_map), out, lse, unused if q_lens is None else q_lens,
        unused if kv_lens is None else kv_lens, scale * _LOG2_E, *integers,
    )  # fmt: skip
    if keep_plan:
        launcher.keep_attention_plan(
            q=q, k=k, v=v, q_lens=q_lens, kv_lens=kv_lens, packed_max_q=packed_max_q, grid=grid,
            sources=(q_map, k_map, v_map), lens_are_pointers=True, integers=integers,
        )  # fmt: skip
    return True


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: one for each type and head dim."""
    return sum(len(caches[0]) for caches in _hopper_attention.device_caches.values())
