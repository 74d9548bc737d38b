"""Items of work of the Hopper kernels, and the parameters that say what they are, parked in shared memory."""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
