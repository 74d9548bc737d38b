"""The Hopper attention kernel over keys in pieces, some of which are still on their way when it starts: one launch.

`hopper_attention`'s kernel with another producer and a loop over pieces around the consumers' loop. The producer looks
at the flag of a piece's head before it loads from it, and while it waits the consumers work on what it has loaded: the
local piece comes first. Accumulator, m and l stay in registers over all pieces. What a piece is, and how flags,
epochs and errors work, is told in `ring_attention`, whose contract this is.

A piece's keys, too, are the window of its last 64 followed by its full blocks; only the first window sets m.
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_choice import CONFIGS, KEYS, ROWS, choose_rows, takes
from .hopper_items import (
    _ACTIVE,
    _BLOCKS,
    _FLAGS,
    _HAS_KV_LENS,
    _HAS_Q_LENS,
    _HEADS_PER_KV,
    _KV_LENS,
    _Q_LENS,
    _ROWS_Q,
    _integer,
    _one,
    _own_keys,
    _park,
    _part,
    _pointer,
    _sample_span,
    _tile_of,
    _turns,
)
from .hopper_rows import _write_empty_rows, _write_told_empty_rows, _write_told_rows
from .hopper_softmax import _LEAST_SCALE, _LOG2_E, _attend_blocks, _attend_window, _note_overflow
from .hopper_tiles import (
    _DTYPES,
    _K,
    _KEYS,
    _ROWS,
    _TOLD,
    _TOLD_KEYS,
    _TOLD_QUERIES,
    _V,
    _any_overflow,
    _async_load,
    _await_free_queries,
    _await_queries,
    _clean,
    _descriptor,
    _load_queries,
    _make_descriptor,
    _meet,
    _queries_empty,
    _reinterpret,
    _release,
    _stand_aside,
    _tell,
    _thread_barrier,
    _tile,
    _told,
)
from .launch import Launcher, MakeDescriptor
from .ring_attention import Pieces, _looks, _signed
from .tail import Tail

# Parameters behind those of the other kernel.
_TABLE = gl.constexpr(16)
_ARRIVALS = gl.constexpr(17)
_ERROR = gl.constexpr(18)
_PIECES = gl.constexpr(19)
_EPOCH = gl.constexpr(20)
_LOOKS = gl.constexpr(21)
_HEADS_PER_FLAG = gl.constexpr(22)
_FLAG_STRIDE = gl.constexpr(23)
_BATCHES = gl.constexpr(24)
_ALL_PARAMETERS = gl.constexpr(32)

# In the slot of what the producer tells: the first piece that holds keys of the item. How many of each piece stands in
# a slot of its own, of so many pieces.
_TOLD_FIRST = _TOLD_KEYS
_MOST_PIECES = gl.constexpr(32)


@gluon.jit
def _park_pieces(
    parameters, table, arrivals, error, pieces, epoch, looks, heads_per_flag, flag_stride, batches
):  # fmt: skip
    index = 16 + gl.arange(0, 16, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    values = gl.where(index == _TABLE, table.to(gl.int64), batches.to(gl.int64))
    values = gl.where(index == _ARRIVALS, arrivals.to(gl.int64), values)
    values = gl.where(index == _ERROR, error.to(gl.int64), values)
    values = gl.where(index == _PIECES, pieces.to(gl.int64), values)
    values = gl.where(index == _EPOCH, epoch.to(gl.int64), values)
    values = gl.where(index == _LOOKS, looks.to(gl.int64), values)
    values = gl.where(index == _HEADS_PER_FLAG, heads_per_flag.to(gl.int64), values)
    parameters.store(gl.where(index == _FLAG_STRIDE, flag_stride.to(gl.int64), values))


@gluon.jit
def _place(parameters, i):
    """(first query, head, sample) of the program's i-th item of work. Heads run slowest: programs start in order, so
    those of heads that arrive late start late, and hold no multiprocessor that others could use."""
    tile = _tile_of(parameters, _part(parameters, i))
    blocks = _integer(parameters, _BLOCKS)
    batches = _integer(parameters, _BATCHES)
    rest = tile // blocks
    return tile % blocks * (_integer(parameters, _ACTIVE) * _ROWS), rest // batches, rest % batches


@gluon.jit
def _sequence_len(parameters, first_m, sample):
    """(keys of a sample over all pieces, its queries of this rank); no keys for rows past the queries."""
    flags = _integer(parameters, _FLAGS)
    _, q_len = _sample_span(parameters, _Q_LENS, _HAS_Q_LENS, _integer(parameters, _ROWS_Q), sample, flags)
    _, kv_total = _sample_span(parameters, _KV_LENS, _HAS_KV_LENS, 0x7FFFFFFF, sample, flags)
    return gl.where(first_m < q_len, kv_total, 0), q_len


@gluon.jit
def _piece_span(parameters, piece, kv_total, i):
    """(first, how many) of a piece's rows are keys of a sample that the program's i-th item takes: of every piece a
    part of a tile has its share."""
    row = _pointer(parameters, _TABLE, gl.int32) + piece * 3
    kv_len = gl.minimum(gl.maximum(kv_total - gl.load(row + 1), 0), gl.load(row + 2))
    return _own_keys(parameters, _part(parameters, i), kv_len, _KEYS)


@gluon.jit
def _tell_pieces(parameters, told_keys, slot, kv_total, i):
    """Leave for the consumers how many keys the program's i-th item has of each piece; the first piece with any, or the
    number of pieces. Seen by them after the barrier of `_tell`.
    """
    piece = gl.arange(0, _MOST_PIECES, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    pieces = _integer(parameters, _PIECES)
    _, kv_len = _piece_span(parameters, gl.minimum(piece, pieces - 1), kv_total, i)
    kv_len = gl.where(piece < pieces, kv_len, 0)
    told_keys.index(slot).store(kv_len)
    return gl.min(gl.where(kv_len > 0, piece, pieces), 0)


@gluon.jit
def _keys_of(told_keys, slot, piece):
    """The number of keys that an item has of a piece."""
    each = _reinterpret(told_keys, gl.int32, [told_keys.shape[0] * _MOST_PIECES, 1], told_keys.layout)
    return gl.max(each.index(slot * _MOST_PIECES + piece).load(_one(gl.num_warps())), 0)


@gluon.jit
def _output_span(parameters, first_m, consumer: gl.constexpr):
    """(row of the tensor, rows to store) of a consumer's 64 rows."""
    first = first_m + consumer * _ROWS
    return first, gl.where(consumer < _integer(parameters, _ACTIVE), _integer(parameters, _ROWS_Q) - first, 0)


# --- the producer -----------------------------------------------------------------------------------------------------


@gluon.jit
def _pause(count):
    """Some hundred nanoseconds, so that looks are about as many as `_LOOKS_PER_SECOND` says, or fewer."""
    counts = gl.full([1], 0, gl.int32, _one(gl.num_warps())) + count
    gl.inline_asm_elementwise(
        "nanosleep.u32 500; mov.u32 $0, $1;", "=r,r", [counts], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _await_piece(parameters, piece, kv_head, failed):
    """Wait until a head of a piece has arrived; 1 if it, or one before it, has not.

    The reads of the copy engine go through another proxy than the flag's: they are fenced (PTX ISA, async proxy). The
    acquire is by one thread, whose value all get behind a barrier.
    """
    flag = _pointer(parameters, _ARRIVALS, gl.int32) + piece * _integer(parameters, _FLAG_STRIDE)
    flag += kv_head // _integer(parameters, _HEADS_PER_FLAG)
    epoch = _integer(parameters, _EPOCH)
    left = gl.where(failed != 0, 0, _integer(parameters, _LOOKS))
    seen = gl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen - epoch < 0) & (left > 0):
        left -= 1
        _pause(left)
        seen = gl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if seen - epoch < 0:
        error = _pointer(parameters, _ERROR, gl.int32)
        gl.store(error + 1, epoch)
        gl.store(error + 2, seen)
        gl.store(error + 3, kv_head)
        gl.store(error, 1 + piece)
        failed = gl.to_tensor(1)
    return failed


@gluon.jit
def _fenced(row):
    """`row`, known only after a fence between the acquire and the reads of the copy engine."""
    rows = gl.full([1], 0, gl.int32, _one(gl.num_warps())) + row
    rows = gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [rows], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.max(rows, 0)


@gluon.jit
def _load_piece(memory, ring, barriers, turn, k_row, v_row, kv_len, STAGES: gl.constexpr):
    """Load the window of a piece's last keys, then its full blocks from the start; the next turn."""
    first = kv_len - _KEYS
    for block in range((kv_len + _KEYS - 1) // _KEYS):
        mbarrier.wait(barriers.index(STAGES + turn % STAGES), (turn // STAGES + 1) & 1, pred=turn >= STAGES)
        full = barriers.index(turn % STAGES)
        mbarrier.expect(full, 2 * memory.block_type.nbytes)
        _async_load(memory, [k_row + first, 0], full, _tile(ring, _K, turn, STAGES))
        _async_load(memory, [v_row + first, 0], full, _tile(ring, _V, turn, STAGES))
        first = block * _KEYS
        turn += 1
    return turn


@gluon.jit
def _feed(
    q, memory, queries, ring, barriers, told, told_keys, parameters, before, turn, failed, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(_turns(parameters)):
        first_m, head, sample = _place(parameters, i)
        kv_total, q_len = _sequence_len(parameters, first_m, sample)
        rows = _integer(parameters, _ACTIVE) * _ROWS
        alive = gl.minimum(q_len - first_m, rows)
        stored = gl.minimum(_integer(parameters, _ROWS_Q) - first_m, rows)
        slot = (before + i) % Q_STAGES
        _await_free_queries(barriers, before + i, STAGES, Q_STAGES)
        first = _tell_pieces(parameters, told_keys, slot, kv_total, i)
        _tell(told.index(slot), first, alive, stored, first_m, head, sample, 0, _part(parameters, i))
        pieces = _integer(parameters, _PIECES)
        active = gl.where(first < pieces, _integer(parameters, _ACTIVE), 0)
        _load_queries(q, queries, barriers, before + i, sample, head, first_m, active, CONSUMERS, STAGES, Q_STAGES)
        kv_head = head // _integer(parameters, _HEADS_PER_KV)
        for piece in range(first, pieces):
            first_key, kv_len = _piece_span(parameters, piece, kv_total, i)
            table = _pointer(parameters, _TABLE, gl.int32) + piece * 3
            length = gl.load(table + 2)
            k_row = gl.load(table) + first_key + (kv_head * _integer(parameters, _BATCHES) + sample) * 2 * length
            # The first piece is this rank's own, written before the launch. Keys that do not exist are not waited for.
            if (piece > 0) & (kv_len > 0):
                failed = _await_piece(parameters, piece, kv_head, failed)
                k_row = _fenced(k_row)
            turn = _load_piece(memory, ring, barriers, turn, k_row, k_row + length, kv_len, STAGES)
    return turn, failed


@gluon.jit
def _producer(
    q, memory, queries, ring, barriers, told, told_keys, parameters, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    first = gl.to_tensor(0)
    turn, failed = _feed(
        q, memory, queries, ring, barriers, told, told_keys, parameters, first, first, first, CONSUMERS, STAGES,
        Q_STAGES,
    )  # fmt: skip
    if not ONLINE:  # noqa: SIM102, `and` would evaluate both sides
        if _any_overflow(False, CONSUMERS):
            before = _turns(parameters)
            _, failed = _feed(
                q, memory, queries, ring, barriers, told, told_keys, parameters, before, turn, failed, CONSUMERS,
                STAGES, Q_STAGES,
            )  # fmt: skip
    _any_overflow(failed != 0, CONSUMERS)


# --- the consumers ----------------------------------------------------------------------------------------------------


@gluon.jit
def _attend_pieces(
    q, ring, barriers, told_keys, slot, turn, first, pieces, scale_log2, CONSUMERS: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A consumer's 64 rows over all pieces from `first` on: (accumulator, m_i, l_i per row, the next turn)."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    kv_len = _keys_of(told_keys, slot, first)
    if kv_len < _KEYS:
        _clean(ring, barriers, turn, kv_len, CONSUMERS, D, STAGES)
    weights, m_i, l_i = _attend_window(q, ring, barriers, turn, kv_len, scale_log2, S, P, D, STAGES)
    acc = gl.zeros([_ROWS, D], gl.float32, OUT)
    for piece in range(first, pieces):
        kv_len = _keys_of(told_keys, slot, piece)
        if (piece > first) & (kv_len > 0) & (kv_len < _KEYS):
            _clean(ring, barriers, turn + 1, kv_len, CONSUMERS, D, STAGES)
        # A last block that is full needs no mask.
        windows = gl.where((piece > first) & (kv_len % _KEYS > 0), 1, 0)
        weights, acc, m_i, l_i, turn = _attend_blocks(
            q, ring, barriers, turn, windows, weights, acc, m_i, l_i, scale_log2, kv_len, S, P, D, STAGES, ONLINE, True
        )
        blocks = (kv_len + _KEYS - 1) // _KEYS - gl.where(piece > first, windows, 1)
        weights, acc, m_i, l_i, turn = _attend_blocks(
            q, ring, barriers, turn, blocks, weights, acc, m_i, l_i, scale_log2, kv_len, S, P, D, STAGES, ONLINE, False
        )
    acc = warpgroup_mma(weights, _tile(ring, _V, turn, STAGES).reshape([_KEYS, D]), acc)
    _release(barriers, turn, STAGES)
    return acc, m_i, gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S)), turn + 1


@gluon.jit
def _stand_aside_pieces(
    barriers, told_keys, slot, turn, first, pieces, CONSUMERS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    for piece in range(first, pieces):
        kv_len = _keys_of(told_keys, slot, piece)
        if (kv_len > 0) & (kv_len < _KEYS):
            _meet(CONSUMERS)
        turn = _stand_aside(barriers, turn, kv_len, STAGES)
    return turn


@gluon.jit
def _consume(
    queries, ring, barriers, told, told_keys, parameters, notes, before, turn, scale_log2, consumer: gl.constexpr,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A consumer's rows of the program's tiles; the ring's next turn."""
    for i in range(_turns(parameters)):
        fed = before + i
        _await_queries(barriers, fed, STAGES, Q_STAGES)
        slot = told.index(fed % Q_STAGES)
        first = _told(slot, _TOLD_FIRST)
        pieces = _integer(parameters, _PIECES)
        if (first < pieces) & (_told(slot, _TOLD_QUERIES) > consumer * _ROWS):
            mine = queries.index(fed % Q_STAGES * CONSUMERS + consumer).reshape([_ROWS, D])
            acc, m_i, l_i, turn = _attend_pieces(
                mine, ring, barriers, told_keys, fed % Q_STAGES, turn, first, pieces, scale_log2, CONSUMERS, D, STAGES,
                ONLINE,
            )  # fmt: skip
            rows = _told(slot, _TOLD_QUERIES) - consumer * _ROWS
            if not ONLINE:
                _note_overflow(notes.index(consumer), acc, l_i, rows)
            _write_told_rows(parameters, slot, rows, mine, acc, m_i, l_i, consumer, D)
            fence_async_shared()
        else:
            turn = _stand_aside_pieces(barriers, told_keys, fed % Q_STAGES, turn, first, pieces, CONSUMERS, STAGES)
            _write_told_empty_rows(parameters, slot, queries.dtype, consumer, D)
        mbarrier.arrive(_queries_empty(barriers, fed, STAGES, Q_STAGES))
    return turn


@gluon.jit
def _consumer(
    queries, ring, barriers, told, told_keys, parameters, notes, scale_log2, consumer: gl.constexpr,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    first = gl.to_tensor(0)
    turn = _consume(
        queries, ring, barriers, told, told_keys, parameters, notes, first, first, scale_log2, consumer, CONSUMERS, D,
        STAGES, Q_STAGES, ONLINE,
    )  # fmt: skip
    if not ONLINE:
        in_each_thread: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
        if _any_overflow(gl.max(notes.index(consumer).load(in_each_thread), 0) != 0, CONSUMERS):
            before = _turns(parameters)
            _consume(
                queries, ring, barriers, told, told_keys, parameters, notes, before, turn, scale_log2, consumer,
                CONSUMERS, D, STAGES, Q_STAGES, True,
            )  # fmt: skip
    if _any_overflow(False, CONSUMERS):
        # The producer has waited in vain: what was computed is no result, and must not look like one.
        for i in range(_turns(parameters)):
            first_m, head, sample = _place(parameters, i)
            row, stored_rows = _output_span(parameters, first_m, consumer)
            _write_empty_rows(
                parameters, row, head, sample, _part(parameters, i), stored_rows, queries.dtype, float("nan"),
                float("nan"), consumer, D,
            )  # fmt: skip


_RUNTIME_INTEGERS = (
    "heads_per_kv", "rows_q", "flags", "heads", "blocks", "items", "whole", "cuts", "active", "own_start", "pieces",
    "epoch", "looks", "heads_per_flag", "flag_stride", "batches",
)  # fmt: skip


@gluon.jit(
    do_not_specialize=_RUNTIME_INTEGERS,
    do_not_specialize_on_alignment=("lse", "scratch", "q_lens", "kv_lens", "table", "arrivals", "error"),
)
def _hopper_ring_attention(
    q, memory, out, lse, scratch, q_lens, kv_lens, table, arrivals, error, scale_log2, heads_per_kv, rows_q, flags,
    heads, blocks, items, whole, cuts, active, own_start, pieces, epoch, looks, heads_per_flag, flag_stride, batches,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """q: a descriptor of (B, H, S, D) in blocks of (1, 1, 64, D); memory: one of (rows, D) in blocks of (64, D)."""
    scale_log2 = gl.maximum(scale_log2, _LEAST_SCALE)
    queries = gl.allocate_shared_memory(q.dtype, [Q_STAGES * CONSUMERS, 1, 1, _ROWS, D], q.layout)
    ring = gl.allocate_shared_memory(memory.dtype, [2 * STAGES, _KEYS, D], memory.layout)
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
    told = gl.allocate_shared_memory(gl.int32, [Q_STAGES, _TOLD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told_keys = gl.allocate_shared_memory(gl.int32, [Q_STAGES, _MOST_PIECES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    parameters = gl.allocate_shared_memory(gl.int64, [_ALL_PARAMETERS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _park(
        parameters.slice(0, 16), out, lse, scratch, q_lens, kv_lens, heads_per_kv, rows_q, rows_q, flags, heads, blocks,
        items, whole, cuts, active, own_start,
    )  # fmt: skip
    _park_pieces(
        parameters.slice(16, 16), table, arrivals, error, pieces, epoch, looks, heads_per_flag, flag_stride, batches
    )
    _thread_barrier()
    gl.warp_specialize(
        [
            (_producer, (
                q, memory, queries, ring, barriers, told, told_keys, parameters, CONSUMERS, STAGES, Q_STAGES, ONLINE
            )),
            (_consumer, (
                queries, ring, barriers, told, told_keys, parameters, notes, scale_log2, 0, CONSUMERS, D, STAGES,
                Q_STAGES, ONLINE,
            )),
            (_consumer, (
                queries, ring, barriers, told, told_keys, parameters, notes, scale_log2, 1, CONSUMERS, D, STAGES,
                Q_STAGES, ONLINE,
            )),
            (_consumer, (
                queries, ring, barriers, told, told_keys, parameters, notes, scale_log2, 2, CONSUMERS, D, STAGES,
                Q_STAGES, ONLINE,
            )),
        ],
        [4, 4, 4],
        [160, 160, 160],
    )  # fmt: skip


# --- the launch -------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What a launch needs besides its tensors and what the pieces tell."""

    launcher: Launcher
    grid: tuple[int, int, int]
    q_map: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
    integers: tuple[int, ...]
    tail: Tail


def _make_piece_descriptor(head_dim: int, dtype: torch.dtype) -> MakeDescriptor:
    block = [KEYS, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[dtype])
    return functools.partial(TensorDescriptor, block_shape=block, layout=layout)


@functools.cache
def _launcher(device: torch.device, dtype: torch.dtype, head_dim: int) -> Launcher:
    config = CONFIGS[head_dim]
    descriptors = {
        "q": _make_descriptor(ROWS, head_dim, dtype),
        "memory": _make_piece_descriptor(head_dim, dtype),
    }
    return Launcher(
        _hopper_ring_attention, device, descriptors, CONSUMERS=config.consumers, D=head_dim, STAGES=config.stages,
        Q_STAGES=config.query_stages, ONLINE=dtype == torch.float16, num_warps=4, maxnreg=config.max_registers,
    )  # fmt: skip


# Nothing but shapes, strides and types goes in, so that a call like an earlier one finds its launch ready.
@functools.lru_cache(maxsize=4096)
def _plan(
    q_shape: tuple[int, ...],
    q_stride: tuple[int, ...],
    keys: int,
    pieces: int,
    kv_heads: int,
    flags: int,
    own_start: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan | None:
    batches, rows_q, heads, head_dim = q_shape
    if not takes(dtype, head_dim) or 0 in q_shape or pieces > _MOST_PIECES.value:
        return None
    q_map = _descriptor(q_shape, q_stride)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    uneven = batches > 1 and flags != 0
    choice = choose_rows(head_dim, rows_q, keys, heads, batches, processors, uneven=uneven, pieces=pieces)
    work = choice.work(rows_q, heads, batches, processors, heads_last=True)
    if q_map is None or work.items >= 2**31:
        return None
    integers = (heads // kv_heads, rows_q, flags, heads, *work.integers, own_start)
    return _Plan(_launcher(device, dtype, head_dim), (work.programs, 1, 1), q_map, integers, work.tail)


# What `_compile_merging` has been done for.
_compiled: set[tuple[torch.device, torch.dtype, int]] = set()


def _compile_merging(out: torch.Tensor, lse: torch.Tensor, tail: Tail) -> None:
    """At the first call, on all ranks alike: no later length waits for it."""
    key = (out.device, out.dtype, out.shape[3])
    if key not in _compiled:
        tail.compile(out, lse)
        _compiled.add(key)


def hopper_ring_attention_forward(
    q: torch.Tensor,
    pieces: Pieces,
    keys: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    *,
    kv_heads: int,
    own_start: int,
) -> Callable[[], None] | None:
    """Launch the kernel, with the arguments of `ring_attention_forward`; None, and nothing is launched, where it
    cannot. `keys` is the length of the whole sequence. What is returned launches the rest, see `dispatch`.

    It takes what `hopper_attention_forward` takes: bfloat16 and float16 with D = 64 and 128, q starting at a multiple
    of 16 bytes and with strides that are multiples of 16 bytes.
    """
    flags = (q_lens is not None) * _HAS_Q_LENS.value | (kv_lens is not None) * _HAS_KV_LENS.value
    plan = _plan(q.shape, q.stride(), keys, pieces.table.shape[0], kv_heads, flags, own_start, q.dtype, q.device)
    if plan is None or q.data_ptr() % 16:
        return None
    launcher, grid, q_map, integers, tail = plan
    memory = pieces.memory
    # A pointer that is not followed stands in for what there is not: None would be another compiled variant.
    unused = out.view(torch.int32) if q_lens is None or kv_lens is None else None
    _compile_merging(out, lse, tail)
    scratch = tail.scratch(out) if tail.parts else out.view(torch.float32)
    launcher(
        grid, (q, *q_map), (memory, tuple(memory.shape), (memory.shape[1], 1)), out, lse, scratch,
        unused if q_lens is None else q_lens, unused if kv_lens is None else kv_lens, pieces.table, pieces.flags,
        pieces.error, scale * _LOG2_E, *integers, pieces.table.shape[0], _signed(pieces.epoch), _looks(pieces.timeout),
        pieces.heads_per_flag, pieces.flags.stride(0), q.shape[0],
    )  # fmt: skip
    return functools.partial(tail.merge, scratch, out, lse)


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: one for each type and head dim."""
    return sum(len(caches[0]) for caches in _hopper_ring_attention.device_caches.values())
