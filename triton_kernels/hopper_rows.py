"""Writing out and lse of a Hopper kernel's rows, or of a part of an item to scratch memory."""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_items import _ACTIVE, _HEADS, _ITEMS, _LSE, _OUT, _ROWS_Q, _SCRATCH, _WHOLE, _integer, _pointer
from .hopper_tiles import _ROWS, _TOLD_BATCH, _TOLD_HEAD, _TOLD_PART, _TOLD_ROW, _TOLD_STORED, _thread_barrier, _told

_LN_2 = gl.constexpr(0.6931471805599453)


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
