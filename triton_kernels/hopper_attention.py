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
or NaN in the sums; the program then computes its tiles again, with the online softmax. float16, whose exponent is too
short for this, always takes the online softmax.

A program takes tile after tile of 192 queries, or of 128 or 64 where those fill the multiprocessors better: while the
consumers finish one, the next one's queries and keys are on their way (4,096 tokens: 261 against 285 microseconds with
a program for each tile).
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
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
_HEADS = gl.constexpr(8)
_BLOCKS = gl.constexpr(9)
_TILES = gl.constexpr(10)
_ACTIVE = gl.constexpr(11)
_OWN_START = gl.constexpr(12)
_PARAMETERS = gl.constexpr(16)


@gluon.constexpr_function
def _one(num_warps):
    """The layout of one element, which every thread holds."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@gluon.jit
def _park(
    parameters, out, lse, q_lens, kv_lens, heads_per_kv, rows_q, rows_k, flags, heads, blocks, tiles, active, own_start
):  # fmt: skip
    index = gl.arange(0, _PARAMETERS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    values = gl.where(index == _OUT, out.to(gl.int64), flags.to(gl.int64))
    values = gl.where(index == _LSE, lse.to(gl.int64), values)
    values = gl.where(index == _Q_LENS, q_lens.to(gl.int64), values)
    values = gl.where(index == _KV_LENS, kv_lens.to(gl.int64), values)
    values = gl.where(index == _HEADS_PER_KV, heads_per_kv.to(gl.int64), values)
    values = gl.where(index == _ROWS_Q, rows_q.to(gl.int64), values)
    values = gl.where(index == _ROWS_K, rows_k.to(gl.int64), values)
    values = gl.where(index == _HEADS, heads.to(gl.int64), values)
    values = gl.where(index == _BLOCKS, blocks.to(gl.int64), values)
    values = gl.where(index == _TILES, tiles.to(gl.int64), values)
    values = gl.where(index == _ACTIVE, active.to(gl.int64), values)
    parameters.store(gl.where(index == _OWN_START, own_start.to(gl.int64), values))


@gluon.jit
def _parked(parameters, index: gl.constexpr):
    return gl.max(parameters.slice(index, 1).load(_one(gl.num_warps())), 0)


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
        before = 0
        if given == _HAS_Q_LENS:
            before = _integer(parameters, _OWN_START)
        length = gl.load(_pointer(parameters, lens, gl.int32) + sample) - before
        length = gl.minimum(gl.maximum(length, 0), rows)
    return start, length


@gluon.jit
def _turns(parameters):
    """How many tiles this program computes: every so many programs, from its own number on."""
    return (_integer(parameters, _TILES) - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _place(parameters, i):
    """(first query, head, sample) of the program's i-th tile. Blocks of queries run fastest: programs that run side by
    side share a head's keys in L2."""
    tile = gl.program_id(0) + i * gl.num_programs(0)
    blocks = _integer(parameters, _BLOCKS)
    heads = _integer(parameters, _HEADS)
    rest = tile // blocks
    return tile % blocks * (_integer(parameters, _ACTIVE) * _ROWS), rest % heads, rest // heads


@gluon.jit
def _key_span(parameters, first_m, sample):
    """(first key, number of keys, first query, number of queries) of a sample; no keys for rows past the queries."""
    flags = _integer(parameters, _FLAGS)
    q_start, q_len = _sample_span(parameters, _Q_LENS, _HAS_Q_LENS, _integer(parameters, _ROWS_Q), sample, flags)
    k_start, kv_len = _sample_span(parameters, _KV_LENS, _HAS_KV_LENS, _integer(parameters, _ROWS_K), sample, flags)
    return k_start, gl.where(first_m < q_len, kv_len, 0), q_start, q_len


def _vote(threads: int) -> str:
    """One barrier of the hardware that also tells every thread whether any came with a value that is not 0."""
    return (
        "{ .reg .pred mine, any; setp.ne.s32 mine, $1, 0; "
        f"barrier.red.or.pred any, 9, {threads}, mine; selp.b32 $0, 1, 0, any; }}"
    )


_MEET_1 = gl.constexpr("barrier.sync 8, 128; mov.b32 $0, $1;")
_MEET_3 = gl.constexpr("barrier.sync 8, 384; mov.b32 $0, $1;")
_VOTE_1 = gl.constexpr(_vote(2 * 128))
_VOTE_3 = gl.constexpr(_vote(4 * 128))


# Shared memory: a tile of queries per consumer, then a ring whose slots hold a tile of keys and one of values. The
# barriers share one allocation, since every captured value costs registers. Each slot has a barrier "full", completed
# by the copy engine, and one "empty", at which every consumer arrives. So have the slots of the ring of queries; their
# barriers stand behind the others.
_K = gl.constexpr(0)
_V = gl.constexpr(1)


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
def _queries_full(barriers, fed, STAGES: gl.constexpr, Q_STAGES: gl.constexpr):
    return barriers.index(2 * STAGES + fed % Q_STAGES)


@gluon.jit
def _await_queries(barriers, fed, STAGES: gl.constexpr, Q_STAGES: gl.constexpr):
    """Wait for a tile's queries, or that there are none to load. Every consumer does, also where it has no part in the
    tile: one that ran ahead over tiles without keys would arrive at barriers whose phases the producer has yet to see.
    """
    mbarrier.wait(_queries_full(barriers, fed, STAGES, Q_STAGES), (fed // Q_STAGES) & 1)


@gluon.jit
def _queries_empty(barriers, fed, STAGES: gl.constexpr, Q_STAGES: gl.constexpr):
    return barriers.index(2 * STAGES + Q_STAGES + fed % Q_STAGES)


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
def _load_queries(
    q, queries, barriers, fed, batch, head, row, active, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):  # fmt: skip
    slot = fed % Q_STAGES
    mbarrier.wait(_queries_empty(barriers, fed, STAGES, Q_STAGES), (fed // Q_STAGES + 1) & 1, pred=fed >= Q_STAGES)
    full = _queries_full(barriers, fed, STAGES, Q_STAGES)
    for consumer in gl.static_range(CONSUMERS):
        place = queries.index(slot * CONSUMERS + consumer)
        mbarrier.arrive(full, pred=consumer >= active)
        mbarrier.expect(full, q.block_type.nbytes, pred=consumer < active)
        _async_load(q, [batch, head, row + consumer * _ROWS, 0], full, place, pred=consumer < active)


@gluon.jit
def _feed(
    q, k, v, queries, ring, barriers, parameters, before, turn, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Load what the program's tiles read, as fast as the consumers free the slots; the ring's next turn."""
    for i in range(_turns(parameters)):
        first_m, head, sample = _place(parameters, i)
        k_start, kv_len, q_start, _ = _key_span(parameters, first_m, sample)
        batch = gl.where((_integer(parameters, _FLAGS) & _PACKED) != 0, 0, sample)
        active = gl.where(kv_len > 0, _integer(parameters, _ACTIVE), 0)
        row = q_start + first_m
        _load_queries(q, queries, barriers, before + i, batch, head, row, active, CONSUMERS, STAGES, Q_STAGES)
        kv_head = head // _integer(parameters, _HEADS_PER_KV)
        turn = _load_keys(k, v, ring, barriers, turn, batch, kv_head, k_start, kv_len, STAGES)
    return turn


@gluon.jit
def _producer(
    q, k, v, queries, ring, barriers, parameters, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    first = gl.to_tensor(0)
    turn = _feed(q, k, v, queries, ring, barriers, parameters, first, first, CONSUMERS, STAGES, Q_STAGES)
    if not ONLINE:  # noqa: SIM102, `and` would evaluate both sides
        if _any_overflow(False, CONSUMERS):
            before = _turns(parameters)
            _feed(q, k, v, queries, ring, barriers, parameters, before, turn, CONSUMERS, STAGES, Q_STAGES)


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
def _in_window(kv_len, layout: gl.constexpr):
    """(1, 64): which of the last 64 keys no full block will bring."""
    keys = kv_len - _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, layout))
    return gl.expand_dims(keys >= (kv_len - 1) // _KEYS * _KEYS, 0)


@gluon.jit
def _attend_window(
    q, ring, barriers, turn, kv_len, scale_log2, scores_layout: gl.constexpr, weights_layout: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The softmax's first step, on the window of the last keys, without those that a full block will bring."""
    _wait_full(barriers, turn, STAGES)
    scores = warpgroup_mma_wait(0, deps=(_scores(q, _tile(ring, _K, turn, STAGES), scores_layout, D),))
    valid = _in_window(kv_len, scores_layout)
    m_i = gl.max(gl.where(valid, scores, float("-inf")), 1) * scale_log2
    weights = gl.where(valid, gl.exp2(gl.fma(scores, scale_log2, -gl.expand_dims(m_i, 1))), 0.0)
    return _as_operand(weights, ring.dtype, weights_layout), m_i, _sum_in_thread(weights)


@gluon.jit
def _attend_blocks(
    q, ring, barriers, turn, blocks, weights, acc, m_i, l_i, scale_log2, kv_len, scores_layout: gl.constexpr,
    weights_layout: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ONLINE: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Take full blocks of keys, or with WINDOW the last 64 of `kv_len` keys without those that a full block will bring,
    through the softmax; `weights` of the block before are multiplied on the way."""
    for _ in range(blocks):
        before = turn
        turn += 1
        _wait_full(barriers, turn, STAGES)
        scores = _scores(q, _tile(ring, _K, turn, STAGES), scores_layout, D)
        v = _tile(ring, _V, before, STAGES).reshape([_KEYS, D])
        acc_next = warpgroup_mma(weights, v, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        if WINDOW:
            valid = _in_window(kv_len, scores_layout)
            scores = gl.where(valid, scores, float("-inf") if ONLINE else 0.0)
        if ONLINE:
            m_new = gl.maximum(m_i, gl.max(scores, 1) * scale_log2)
            alpha = gl.exp2(m_i - m_new)
            m_i = m_new
            l_i = l_i * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout)), 1)
        exponentials = gl.exp2(gl.fma(scores, scale_log2, -gl.expand_dims(m_i, 1)))
        if WINDOW:
            exponentials = gl.where(valid, exponentials, 0.0)
        l_i += _sum_in_thread(exponentials)
        weights_next = _as_operand(exponentials, ring.dtype, weights_layout)
        acc, _ = warpgroup_mma_wait(0, deps=(acc_next, weights))
        _release(barriers, before, STAGES)
        if ONLINE:
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout)), 1)
        weights = weights_next
    return weights, acc, m_i, l_i, turn


@gluon.jit
def _meet(CONSUMERS: gl.constexpr):
    """Wait for all consumers, at a barrier of the hardware: an mbarrier would need its phase kept."""
    asm: gl.constexpr = _MEET_3 if CONSUMERS == 3 else _MEET_1
    nothing = gl.full([1], 0, gl.int32, _one(gl.num_warps()))
    gl.inline_asm_elementwise(asm, "=r,r", [nothing], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _any_overflow(own, CONSUMERS: gl.constexpr):
    """Whether `own` is true in any partition of the program; waits for all of them."""
    asm: gl.constexpr = _VOTE_3 if CONSUMERS == 3 else _VOTE_1
    mine = gl.where(own, gl.full([1], 1, gl.int32, _one(gl.num_warps())), 0)
    votes = gl.inline_asm_elementwise(asm, "=r,r", [mine], dtype=gl.int32, is_pure=False, pack=1)
    return gl.max(votes, 0) != 0


@gluon.jit
def _keep_last_rows(values, count, D: gl.constexpr):
    """Write zeros over all but the last `count` rows of a tile of values."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, layout))
    values.store(gl.where(gl.expand_dims(rows >= _KEYS - count, 1), values.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(
    q, ring, barriers, turn, kv_len, packed, scale_log2, CONSUMERS: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A consumer's 64 rows over all keys: (accumulator, m_i, l_i per row, the next turn)."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    weights, m_i, l_i = _attend_window(q, ring, barriers, turn, kv_len, scale_log2, S, P, D, STAGES)
    acc = gl.zeros([_ROWS, D], gl.float32, OUT)
    blocks = (kv_len - 1) // _KEYS
    weights, acc, m_i, l_i, turn = _attend_blocks(
        q, ring, barriers, turn, blocks, weights, acc, m_i, l_i, scale_log2, kv_len, S, P, D, STAGES, ONLINE, False
    )
    v = _tile(ring, _V, turn, STAGES).reshape([_KEYS, D])
    if (packed != 0) & (kv_len < _KEYS):
        # Before a packed sample's first row lies another sample, and 0 * NaN is not 0. (Before one that is not packed
        # the copy engine reads zeros.) Every consumer writes the same zeros, and none goes on before all have.
        _keep_last_rows(v, kv_len, D)
        _meet(CONSUMERS)
    acc = warpgroup_mma(weights, v, acc)
    _release(barriers, turn, STAGES)
    return acc, m_i, gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S)), turn + 1


@gluon.jit
def _output_span(parameters, first_m, sample, consumer: gl.constexpr):
    """(row of the tensor, rows with queries, rows to store, batch) of a consumer's 64 rows."""
    _, _, q_start, q_len = _key_span(parameters, first_m, sample)
    is_packed = (_integer(parameters, _FLAGS) & _PACKED) != 0
    first = first_m + consumer * _ROWS
    stored = gl.where(is_packed, q_len, _integer(parameters, _ROWS_Q))
    stored = gl.where(consumer < _integer(parameters, _ACTIVE), stored - first, 0)
    return q_start + first, q_len - first, stored, gl.where(is_packed, 0, sample)


@gluon.jit
def _pointers(parameters, row, head, batch, dtype: gl.constexpr, D: gl.constexpr):
    """Where out and lse of a row begin, and the pitch of out's rows."""
    heads = _integer(parameters, _HEADS)
    rows_q = _integer(parameters, _ROWS_Q)
    pitch = heads.to(gl.int64) * D
    out = _pointer(parameters, _OUT, dtype) + (batch.to(gl.int64) * rows_q + row) * pitch + head * D
    lse = _pointer(parameters, _LSE, gl.float32) + (batch.to(gl.int64) * heads + head) * rows_q + row
    return out, lse, pitch


@gluon.jit
def _write_rows(parameters, first_m, head, sample, stage, consumer: gl.constexpr, acc, m_i, l_i, D: gl.constexpr):
    """Write out and lse of a consumer's rows; those past the queries become zeros with an lse of -inf."""
    row, alive_rows, stored_rows, batch = _output_span(parameters, first_m, sample, consumer)
    out, lse, pitch = _pointers(parameters, row, head, batch, stage.dtype, D)
    own = gl.arange(0, _ROWS, layout=m_i.type.layout)
    alive = own < alive_rows
    l_i = gl.where(alive, l_i, 1.0)
    gl.store(lse + own, gl.where(alive, (m_i + gl.log2(l_i)) * _LN_2, float("-inf")), mask=own < stored_rows)
    by_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / l_i, by_row), 1)
    if alive_rows < _ROWS:
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
    parameters, first_m, head, sample, consumer: gl.constexpr, dtype: gl.constexpr, value: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Rows without keys: zeros (`value`), and an lse of -inf."""
    row, _, stored_rows, batch = _output_span(parameters, first_m, sample, consumer)
    out, lse, pitch = _pointers(parameters, row, head, batch, dtype, D)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    _store_rows(out, pitch, gl.full([_ROWS, D], value, dtype, layout), stored_rows, D)
    own = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    gl.store(lse + own, gl.full([_ROWS], float("-inf"), gl.float32, own.type.layout), mask=own < stored_rows)


@gluon.jit
def _note_overflow(notes, acc, l_i, alive_rows):
    """Set a warp's note if a sum of its rows is not finite: 0 * x is 0 for finite x only. Rows past the queries do not
    count."""
    probe = gl.convert_layout(gl.sum(acc * 0.0, 1), l_i.type.layout) + l_i * 0.0
    alive = gl.arange(0, _ROWS, layout=l_i.type.layout) < alive_rows
    by_warp = gl.max(gl.where(alive & (probe != 0.0), 1, 0).reshape([4, _ROWS // 4]), 1)
    notes.store(notes.load(by_warp.type.layout) | by_warp)


@gluon.jit
def _stand_aside(barriers, turn, kv_len, STAGES: gl.constexpr):
    """Leave every slot to the others: rows past the queries are not computed."""
    for _ in range((kv_len + _KEYS - 1) // _KEYS):
        _wait_full(barriers, turn, STAGES)
        _release(barriers, turn, STAGES)
        turn += 1
    return turn


@gluon.jit
def _consume(
    queries, ring, barriers, parameters, notes, before, turn, scale_log2, consumer: gl.constexpr,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A consumer's rows of the program's tiles; the ring's next turn."""
    for i in range(_turns(parameters)):
        first_m, _, sample = _place(parameters, i)
        _, kv_len, _, q_len = _key_span(parameters, first_m, sample)
        rows = gl.minimum(q_len - first_m, _integer(parameters, _ACTIVE) * _ROWS)
        fed = before + i
        _await_queries(barriers, fed, STAGES, Q_STAGES)
        if (kv_len > 0) & (rows > consumer * _ROWS):
            packed = _integer(parameters, _FLAGS) & _PACKED
            mine = queries.index(fed % Q_STAGES * CONSUMERS + consumer).reshape([_ROWS, D])
            acc, m_i, l_i, turn = _attend(
                mine, ring, barriers, turn, kv_len, packed, scale_log2, CONSUMERS, D, STAGES, ONLINE
            )
            if not ONLINE:
                _note_overflow(notes.index(consumer), acc, l_i, rows - consumer * _ROWS)
            first_m, head, sample = _place(parameters, i)
            _write_rows(parameters, first_m, head, sample, mine, consumer, acc, m_i, l_i, D)
            fence_async_shared()
        else:
            if (kv_len > 0) & (kv_len < _KEYS) & ((_integer(parameters, _FLAGS) & _PACKED) != 0):
                _meet(CONSUMERS)  # as `_attend` of the others does: were it not all of them, turns would mix
            turn = _stand_aside(barriers, turn, kv_len, STAGES)
            first_m, head, sample = _place(parameters, i)
            _write_empty_rows(parameters, first_m, head, sample, consumer, queries.dtype, 0.0, D)
        mbarrier.arrive(_queries_empty(barriers, before + i, STAGES, Q_STAGES))
    return turn


@gluon.jit
def _consumer(
    queries, ring, barriers, parameters, notes, scale_log2, consumer: gl.constexpr, CONSUMERS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    first = gl.to_tensor(0)
    turn = _consume(
        queries, ring, barriers, parameters, notes, first, first, scale_log2, consumer, CONSUMERS, D, STAGES, Q_STAGES,
        ONLINE,
    )  # fmt: skip
    if not ONLINE:
        in_each_thread: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
        if _any_overflow(gl.max(notes.index(consumer).load(in_each_thread), 0) != 0, CONSUMERS):
            before = _turns(parameters)
            _consume(
                queries, ring, barriers, parameters, notes, before, turn, scale_log2, consumer, CONSUMERS, D, STAGES,
                Q_STAGES, True,
            )  # fmt: skip


_RUNTIME_INTEGERS = ("heads_per_kv", "rows_q", "rows_k", "flags", "heads", "blocks", "tiles", "active")


@gluon.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=("q_lens", "kv_lens"))
def _hopper_attention(
    q, k, v, out, lse, q_lens, kv_lens, scale_log2, heads_per_kv, rows_q, rows_k, flags, heads, blocks, tiles, active,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """q, k, v: descriptors of (B, H, S, D) in blocks of (1, 1, 64, D); lens pointers are read where `flags` says so.

    `tiles` = samples x heads x blocks of `active` x 64 queries; only so many consumers compute.
    """
    queries = gl.allocate_shared_memory(q.dtype, [Q_STAGES * CONSUMERS, 1, 1, _ROWS, D], q.layout)
    ring = gl.allocate_shared_memory(k.dtype, [2 * STAGES, 1, 1, _KEYS, D], k.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [2 * (STAGES + Q_STAGES), 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=1)
        mbarrier.init(barriers.index(STAGES + i), count=CONSUMERS)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(barriers.index(2 * STAGES + i), count=CONSUMERS)
        mbarrier.init(barriers.index(2 * STAGES + Q_STAGES + i), count=CONSUMERS)
    notes = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(CONSUMERS):
        notes.index(i).store(gl.zeros([4], gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
    parameters = gl.allocate_shared_memory(gl.int64, [_PARAMETERS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _park(
        parameters, out, lse, q_lens, kv_lens, heads_per_kv, rows_q, rows_k, flags, heads, blocks, tiles, active,
        gl.to_tensor(0),
    )  # fmt: skip
    _thread_barrier()
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_producer, (q, k, v, queries, ring, barriers, parameters, CONSUMERS, STAGES, Q_STAGES, ONLINE)),
                (_consumer, (
                    queries, ring, barriers, parameters, notes, scale_log2, 0, CONSUMERS, D, STAGES, Q_STAGES, ONLINE
                )),
                (_consumer, (
                    queries, ring, barriers, parameters, notes, scale_log2, 1, CONSUMERS, D, STAGES, Q_STAGES, ONLINE
                )),
                (_consumer, (
                    queries, ring, barriers, parameters, notes, scale_log2, 2, CONSUMERS, D, STAGES, Q_STAGES, ONLINE
                )),
            ],
            [4, 4, 4],
            [160, 160, 160],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_producer, (q, k, v, queries, ring, barriers, parameters, CONSUMERS, STAGES, Q_STAGES, ONLINE)),
                (_consumer, (
                    queries, ring, barriers, parameters, notes, scale_log2, 0, CONSUMERS, D, STAGES, Q_STAGES, ONLINE
                )),
            ],
            [4],
            [160],
        )  # fmt: skip


@dataclass(frozen=True)
class HopperConfig:
    """One compiled variant.

    Attributes:
        consumers: warpgroups of 64 query rows each.
        stages: slots of the ring of keys and values.
        query_stages: slots of the ring of queries. With two, the next tile's loads are under way while this one ends.
        residents: programs that share a multiprocessor.
        max_registers: registers per thread at launch; None: what fits one program.
    """

    consumers: int
    stages: int
    query_stages: int
    residents: int
    max_registers: int | None


# By head dim. Three consumers fill a multiprocessor. Of one consumer's programs two share one: fewer rows at a time,
# but the start and the end of one run beside the other.
_CONFIGS = {64: HopperConfig(3, 8, 2, 1, None), 128: HopperConfig(3, 4, 2, 1, None)}
_CONFIGS_SMALL = {64: HopperConfig(1, 4, 1, 2, 96), 128: HopperConfig(1, 3, 1, 2, 96)}


class _Choice(NamedTuple):
    """How a problem is cut: the variant, the consumers that compute (rows of a tile / 64), and whether a program takes
    tile after tile or each tile is a program's."""

    config: HopperConfig
    active: int
    stays: bool

    def tiles(self, max_q: int, heads: int, samples: int) -> int:
        return -(-max_q // (self.active * _ROWS.value)) * heads * samples


# From so many blocks of keys on, what a tile's start and end cost is less than what the hardware gains by giving a free
# multiprocessor the next tile: 221.7 against 225.8 ms at 119,056 tokens, but 4.105 against 4.081 ms at 16,384.
_BLOCKS_OF_A_PROGRAM = 512


class _Problem(NamedTuple):
    """What the choice depends on."""

    head_dim: int
    max_q: int
    keys: int
    heads: int
    samples: int
    processors: int

    @property
    def blocks(self) -> int:
        return -(-self.keys // _KEYS.value)

    def rounds(self, choice: _Choice) -> int:
        return -(-choice.tiles(self.max_q, self.heads, self.samples) // self.processors)


def _microseconds_of_rows(problem: _Problem, uneven: bool) -> dict[_Choice, float]:
    """What the variant of three consumers should take with tiles of 192 and of 128 rows."""
    large = _CONFIGS[problem.head_dim]
    stays = problem.blocks <= _BLOCKS_OF_A_PROGRAM and not uneven
    rows_192, rows_128 = _Choice(large, 3, stays), _Choice(large, 2, stays)
    return {
        rows_192: 5.0 + problem.rounds(rows_192) * (5.0 + 0.85 * problem.blocks),
        rows_128: 4.0 + problem.rounds(rows_128) * (3.8 + 0.65 * problem.blocks),
    }


def _fastest(microseconds: dict[_Choice, float]) -> _Choice:
    return min(microseconds, key=microseconds.__getitem__)


def _choose_rows(*problem: int, uneven: bool) -> _Choice:
    """As `_choose`, among the tiles of the variant of three consumers alone."""
    return _fastest(_microseconds_of_rows(_Problem(*problem), uneven))


def _choose(*problem: int, uneven: bool = False) -> _Choice:
    """The choice that should take the fewest microseconds: a start, then rounds of a tile's cost and its blocks'.

    `problem`: the fields of `_Problem`. Samples of `uneven` lengths make tiles that take more and less time: there, as
    for long sequences, the hardware hands out the tiles.

    The constants give the fastest choice at each of the 16 shapes of `python -m benchmarks.gpu_tune --only hopper`
    (H100, D = 128, 24 heads), whose times they follow within about 15 %.
    """
    of = _Problem(*problem)
    rows_64 = _Choice(_CONFIGS_SMALL[of.head_dim], 1, False)
    # Two of the small programs share a multiprocessor; one alone is faster than one of two.
    shared, alone = divmod(of.rounds(rows_64), 2)
    small = {rows_64: 1.0 + (shared + 0.6 * alone) * (4.5 + 0.7 * of.blocks)}
    return _fastest(_microseconds_of_rows(of, uneven) | small)


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
def _launchers(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[HopperConfig, Launcher]:
    of_queries, of_keys = (_make_descriptor(rows, head_dim, dtype) for rows in (_ROWS.value, _KEYS.value))
    return {
        config: Launcher(
            _hopper_attention, device, {"q": of_queries, "k": of_keys, "v": of_keys},
            CONSUMERS=config.consumers, D=head_dim, STAGES=config.stages, Q_STAGES=config.query_stages,
            ONLINE=dtype == torch.float16, num_warps=4, maxnreg=config.max_registers,
        )
        for config in (_CONFIGS[head_dim], _CONFIGS_SMALL[head_dim])
    }  # fmt: skip


# What `_compile_all` has been done for.
_compiled: set[tuple[torch.device, torch.dtype, int]] = set()


def _compile_all(q: torch.Tensor, arguments: tuple[object, ...]) -> None:
    """Compile every variant for a device, type and head dim at the first call: no later length waits for one."""
    key = (q.device, q.dtype, q.shape[-1])
    if key not in _compiled:
        for launcher in _launchers(*key).values():
            launcher.compile(*arguments)
        _compiled.add(key)


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
    uneven = samples > 1 and flags != 0
    choice = _choose(head_dim, max_q, rows_k, heads, samples, processors, uneven=uneven)
    tiles = choice.tiles(max_q, heads, samples)
    if None in descriptors or tiles >= 2**31:
        return None
    programs = min(tiles, processors * choice.config.residents) if choice.stays else tiles
    blocks = -(-max_q // (choice.active * _ROWS.value))
    integers = (heads // kv_heads, rows_q, rows_k, flags, heads, blocks, tiles, choice.active)
    return _Plan(_launchers(device, dtype, head_dim)[choice.config], (programs, 1, 1), descriptors, integers)  # pyright: ignore[reportArgumentType]


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
    arguments = (
        (q, *q_map), (k, *k_map), (v, *v_map), out, lse, unused if q_lens is None else q_lens,
        unused if kv_lens is None else kv_lens, scale * _LOG2_E, *integers,
    )  # fmt: skip
    _compile_all(q, arguments)
    launcher(grid, *arguments)
    if keep_plan:
        launcher.keep_attention_plan(
            q=q, k=k, v=v, q_lens=q_lens, kv_lens=kv_lens, packed_max_q=packed_max_q, grid=grid,
            sources=(q_map, k_map, v_map), lens_are_pointers=True, integers=integers,
        )  # fmt: skip
    return True


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: one for each type and head dim."""
    return sum(len(caches[0]) for caches in _hopper_attention.device_caches.values())
