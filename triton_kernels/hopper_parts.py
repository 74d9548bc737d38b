"""What the Hopper kernels are made of: parked parameters, barriers and tiles, the softmax's steps, writing of rows.

How they work together is told in `hopper_attention`; `hopper_ring_attention` puts them together in another way.
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools

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

from .hopper_choice import KEYS, ROWS
from .launch import MakeDescriptor

# Names that changed after Triton 3.6.
_thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
_reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret

_LN_2 = gl.constexpr(0.6931471805599453)
_LOG2_E = 1.4426950408889634
# What a scale of 0 becomes: masked scores are -inf, and 0 * -inf is NaN.
_LEAST_SCALE = gl.constexpr(1e-30)
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ROWS = gl.constexpr(ROWS)
_KEYS = gl.constexpr(KEYS)

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
_ITEMS = gl.constexpr(10)
_ACTIVE = gl.constexpr(11)
_OWN_START = gl.constexpr(12)
_WHOLE = gl.constexpr(13)
_CUTS = gl.constexpr(14)
_SCRATCH = gl.constexpr(15)
_PARAMETERS = gl.constexpr(16)


@gluon.constexpr_function
def _one(num_warps):
    """The layout of one element, which every thread holds."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@gluon.jit
def _park(
    parameters, out, lse, scratch, q_lens, kv_lens, heads_per_kv, rows_q, rows_k, flags, heads, blocks, items, whole,
    cuts, active, own_start,
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
    values = gl.where(index == _ITEMS, items.to(gl.int64), values)
    values = gl.where(index == _WHOLE, whole.to(gl.int64), values)
    values = gl.where(index == _CUTS, cuts.to(gl.int64), values)
    values = gl.where(index == _SCRATCH, scratch.to(gl.int64), values)
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
    """How many items of work this program takes: every so many programs, from its own number on."""
    return (_integer(parameters, _ITEMS) - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


# An item of work is a whole tile, or one of the parts into which the last tiles are cut along their keys, so that they
# fill the multiprocessors (`tail` tells more). Parts are counted from 0 over all tiles; a whole tile's is negative.
@gluon.jit
def _part(parameters, i):
    """The part that is the program's i-th item, negative where that is a whole tile."""
    return gl.program_id(0) + i * gl.num_programs(0) - _integer(parameters, _WHOLE)


@gluon.jit
def _tile_of(parameters, part):
    return _integer(parameters, _WHOLE) + gl.where(part < 0, part, part // _integer(parameters, _CUTS))


@gluon.jit
def _own_keys(parameters, part, kv_len, KEYS: gl.constexpr):
    """(first, how many) of `kv_len` keys an item of work takes: whole blocks, but for the last one of them all."""
    cuts = _integer(parameters, _CUTS)
    size = (kv_len + KEYS * cuts - 1) // (KEYS * cuts) * KEYS
    first = gl.minimum(part % cuts * size, kv_len)
    return gl.where(part < 0, 0, first), gl.where(part < 0, kv_len, gl.minimum(size, kv_len - first))


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
def _await_free_queries(barriers, fed, STAGES: gl.constexpr, Q_STAGES: gl.constexpr):
    """Wait until no consumer needs what stands in a tile's slot of queries."""
    mbarrier.wait(_queries_empty(barriers, fed, STAGES, Q_STAGES), (fed // Q_STAGES + 1) & 1, pred=fed >= Q_STAGES)


# What the producer tells the consumers of a tile, in a slot beside that of its queries: derived once, and not by every
# consumer twice, which took 270 of a tile's 1,100 instructions in three chains of divisions.
_TOLD_KEYS = gl.constexpr(0)
_TOLD_QUERIES = gl.constexpr(1)
_TOLD_STORED = gl.constexpr(2)
_TOLD_ROW = gl.constexpr(3)
_TOLD_HEAD = gl.constexpr(4)
_TOLD_BATCH = gl.constexpr(5)
_TOLD_UNCLEAN = gl.constexpr(6)
_TOLD_PART = gl.constexpr(7)
_TOLD = gl.constexpr(8)


@gluon.jit
def _tell(slot, keys, queries, stored, row, head, batch, unclean, part):
    """For an item: its number of keys, its rows with queries, its rows to store, the first of them, whether what stands
    before its keys is another sample's, and which part of a tile it is."""
    index = gl.arange(0, _TOLD, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    values = gl.where(index == _TOLD_KEYS, keys, unclean)
    values = gl.where(index == _TOLD_PART, part, values)
    values = gl.where(index == _TOLD_QUERIES, queries, values)
    values = gl.where(index == _TOLD_STORED, stored, values)
    values = gl.where(index == _TOLD_ROW, row, values)
    values = gl.where(index == _TOLD_HEAD, head, values)
    slot.store(gl.where(index == _TOLD_BATCH, batch, values))
    _thread_barrier()


@gluon.jit
def _told(slot, index: gl.constexpr):
    return gl.max(slot.slice(index, 1).load(_one(gl.num_warps())), 0)


@gluon.jit
def _load_queries(
    q, queries, barriers, fed, batch, head, row, active, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):  # fmt: skip
    slot = fed % Q_STAGES
    full = _queries_full(barriers, fed, STAGES, Q_STAGES)
    for consumer in gl.static_range(CONSUMERS):
        place = queries.index(slot * CONSUMERS + consumer)
        mbarrier.arrive(full, pred=consumer >= active)
        mbarrier.expect(full, q.block_type.nbytes, pred=consumer < active)
        _async_load(q, [batch, head, row + consumer * _ROWS, 0], full, place, pred=consumer < active)


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
def _added_scores(q, k, scores, D: gl.constexpr):
    """scores + q k^T of a block."""
    return warpgroup_mma(q, k.reshape([_KEYS, D]).permute((1, 0)), scores)


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
    """The softmax's first step, on the window of the last keys, without those that a full block will bring.

    What the product is added to masks it: a third fewer instructions than a choice for each score and each weight, and
    it is done while the keys are on their way. Keys that are masked must be finite.
    """
    masked = gl.where(_in_window(kv_len, scores_layout), 0.0, float("-inf"))
    scores = gl.zeros([_ROWS, _KEYS], gl.float32, scores_layout) + masked
    _wait_full(barriers, turn, STAGES)
    scores = _added_scores(q, _tile(ring, _K, turn, STAGES), scores, D)
    m_i = gl.max(scores, 1) * scale_log2
    weights = gl.exp2(gl.fma(scores, scale_log2, -gl.expand_dims(m_i, 1)))
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
        # The next weights are named so that they are computed before the wait: else the assembler moves most of the
        # exponentials behind it, where they run beside no product of this warpgroup.
        acc, _, weights_next = warpgroup_mma_wait(0, deps=(acc_next, weights, weights_next))
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
def _clean(ring, barriers, turn, kv_len, CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Zeros over what stands before the first of fewer than 64 keys: it is none of this sample's, and may be NaN. Every
    consumer writes the same zeros, and none goes on before all have."""
    _wait_full(barriers, turn, STAGES)
    _keep_last_rows(_tile(ring, _K, turn, STAGES).reshape([_KEYS, D]), kv_len, D)
    _keep_last_rows(_tile(ring, _V, turn, STAGES).reshape([_KEYS, D]), kv_len, D)
    _meet(CONSUMERS)


@gluon.jit
def _pointers(parameters, row, head, batch, dtype: gl.constexpr, D: gl.constexpr):
    """Where out and lse of a row begin, and the pitch of out's rows."""
    heads = _integer(parameters, _HEADS)
    rows_q = _integer(parameters, _ROWS_Q)
    pitch = heads * D
    out = _pointer(parameters, _OUT, dtype) + (batch.to(gl.int64) * rows_q + row) * pitch + head * D
    lse = _pointer(parameters, _LSE, gl.float32) + (batch.to(gl.int64) * heads + head) * rows_q + row
    return out, lse, pitch


@gluon.jit
def _pointers_of_part(parameters, part, consumer: gl.constexpr, D: gl.constexpr):
    """Where out and lse of a consumer's rows begin in the scratch memory, whose rows of out come before all lse."""
    active = _integer(parameters, _ACTIVE)
    rows = (_integer(parameters, _ITEMS) - _integer(parameters, _WHOLE)).to(gl.int64) * active * _ROWS
    first = (part.to(gl.int64) * active + consumer) * _ROWS
    scratch = _pointer(parameters, _SCRATCH, gl.float32)
    return scratch + first * D, scratch + rows * D + first


@gluon.jit
def _write_rows(
    parameters, row, head, batch, part, alive_rows, stored_rows, stage, acc, m_i, l_i, consumer: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Write out and lse of a consumer's rows from `row` on; those past the queries become zeros, their lse -inf. What
    is only a part goes to the scratch memory, in float32."""
    own = gl.arange(0, _ROWS, layout=m_i.type.layout)
    alive = own < alive_rows
    l_i = gl.where(alive, l_i, 1.0)
    lse_of_rows = gl.where(alive, (m_i + gl.log2(l_i)) * _LN_2, float("-inf"))
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, acc.type.layout)), 1)
    if part < 0:
        out, lse, pitch = _pointers(parameters, row, head, batch, stage.dtype, D)
        gl.store(lse + own, lse_of_rows, mask=own < stored_rows)
        # Through shared memory, for 16-byte stores.
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        stage.store(acc.to(stage.dtype))
        _thread_barrier()
        _store_rows(out, pitch, stage.load(layout), 0, gl.minimum(alive_rows, stored_rows), D)
        if alive_rows < stored_rows:
            _store_rows(out, pitch, gl.full([_ROWS, D], 0.0, stage.dtype, layout), alive_rows, stored_rows, D)
    else:
        part_out, part_lse = _pointers_of_part(parameters, part, consumer, D)
        gl.store(part_lse + own, lse_of_rows)
        # As they lie in the registers: the other way takes more of these than there are.
        rows = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, acc.type.layout))
        cols = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))
        gl.store(part_out + (gl.expand_dims(rows * D, 1) + gl.expand_dims(cols, 0)), acc)


@gluon.jit
def _store_rows(out, pitch, values, first, end, D: gl.constexpr):
    """Store the rows first ... end of 64. Offsets have 32 bits: so many rows span less than 2^31 elements."""
    rows = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, values.type.layout))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, values.type.layout))
    offsets = gl.expand_dims(rows * pitch, 1) + gl.expand_dims(cols, 0)
    gl.store(out + offsets, values, mask=gl.expand_dims((rows >= first) & (rows < end), 1))


@gluon.jit
def _write_empty_rows(
    parameters, row, head, batch, part, stored_rows, dtype: gl.constexpr, value: gl.constexpr,
    lse_value: gl.constexpr, consumer: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Rows that are not computed: one value everywhere, and one in lse, which is all that counts of a part's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    own = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    lse_of_rows = gl.full([_ROWS], lse_value, gl.float32, own.type.layout)
    if part < 0:
        out, lse, pitch = _pointers(parameters, row, head, batch, dtype, D)
        _store_rows(out, pitch, gl.full([_ROWS, D], value, dtype, layout), 0, stored_rows, D)
        gl.store(lse + own, lse_of_rows, mask=own < stored_rows)
    else:
        _, part_lse = _pointers_of_part(parameters, part, consumer, D)
        gl.store(part_lse + own, lse_of_rows, mask=own < stored_rows)


@gluon.jit
def _write_told_rows(parameters, slot, rows, stage, acc, m_i, l_i, consumer: gl.constexpr, D: gl.constexpr):
    """As `_write_rows`, of the item that `slot` tells of."""
    row = _told(slot, _TOLD_ROW) + consumer * _ROWS
    stored = _told(slot, _TOLD_STORED) - consumer * _ROWS
    head, batch, part = _told(slot, _TOLD_HEAD), _told(slot, _TOLD_BATCH), _told(slot, _TOLD_PART)
    _write_rows(parameters, row, head, batch, part, rows, stored, stage, acc, m_i, l_i, consumer, D)


@gluon.jit
def _write_told_empty_rows(parameters, slot, dtype: gl.constexpr, consumer: gl.constexpr, D: gl.constexpr):
    """Zeros, and an lse of -inf, for a consumer's rows of the item that `slot` tells of."""
    stored = _told(slot, _TOLD_STORED) - consumer * _ROWS
    if stored > 0:
        row = _told(slot, _TOLD_ROW) + consumer * _ROWS
        head, batch, part = _told(slot, _TOLD_HEAD), _told(slot, _TOLD_BATCH), _told(slot, _TOLD_PART)
        _write_empty_rows(parameters, row, head, batch, part, stored, dtype, 0.0, float("-inf"), consumer, D)


@gluon.jit
def _note_overflow(notes, acc, l_i, alive_rows):
    """Set a warp's note if a sum of its rows is not finite: 0 * x is 0 for finite x only. Rows past the queries do not
    count."""
    probe = gl.convert_layout(gl.sum(_sum_in_thread(acc * 0.0), 1), l_i.type.layout) + l_i * 0.0
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


def _make_descriptor(rows: int, head_dim: int, dtype: torch.dtype) -> MakeDescriptor:
    block = [1, 1, rows, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])
    return functools.partial(TensorDescriptor, block_shape=block, layout=layout)


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
