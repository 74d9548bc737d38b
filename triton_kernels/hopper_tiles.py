"""Tiles in shared memory, the barriers around them, and what the producer of a Hopper kernel tells its consumers.

How they work together is told in `hopper_attention`.
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_choice import KEYS, ROWS
from .hopper_items import _one
from .launch import MakeDescriptor

# Names that changed after Triton 3.6.
_thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
_reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ROWS = gl.constexpr(ROWS)
_KEYS = gl.constexpr(KEYS)


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
