"""The kernels of `quantize_int8`, which launches them and says in which order.

Formats and scales are those of `para_kernels.ops8`, from whose expressions these kernels differ by the order of float32
sums. What lies past a sample's lengths is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .format8 import HIGHEST_E4M3, HIGHEST_INT8, K_BLOCK, K_SAMPLE, LARGEST_KEYS, Q_BLOCK

_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float of this size has no fraction
_ROUNDING_BITS = tl.constexpr(0x4B400000)
_HIGHEST_INT8 = tl.constexpr(HIGHEST_INT8)
_HIGHEST_VALUE = tl.constexpr(HIGHEST_E4M3)
_Q_BLOCK = tl.constexpr(Q_BLOCK)
_K_BLOCK = tl.constexpr(K_BLOCK)
_K_SAMPLE = tl.constexpr(K_SAMPLE)
_LARGEST_KEYS = tl.constexpr(LARGEST_KEYS)
_SUM_ROWS = tl.constexpr(32)  # of values that a program of the first pass reads at a time
_V_ROWS = tl.constexpr(32)  # that a program rounds at a time
_K_STRIDES = ("stride_kb", "stride_ks", "stride_kh")
_V_STRIDES = ("stride_vb", "stride_vs", "stride_vh")


@triton.jit
def _length(lens, batch, rows):
    """The sample's length, clamped: what lies on the device cannot be refused on the host."""
    length = rows
    if lens is not None:
        length = tl.minimum(tl.maximum(tl.load(lens + batch), 0), rows)
    return length


@triton.jit
def _whole(stride, VEC: tl.constexpr):
    """A stride that came divided by VEC, which tells the compiler what it is a multiple of."""
    return tl.cast(stride, tl.int64) * VEC


@triton.jit
def _rows(source, batch, head, rows, end, stride_b, stride_s, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """These rows of a head, zeros at or past `end`."""
    cols = tl.arange(0, BLOCK_D)
    start = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    offsets = rows.to(tl.int64)[:, None] * stride_s + cols[None, :]
    mask = (rows < end)[:, None]
    if D != BLOCK_D:
        mask = mask & (cols < D)[None, :]
    return tl.load(start + offsets, mask=mask, other=0.0)


@triton.jit
def _matrix(matrix, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    return tl.load(matrix + at[:, None] * WIDTH + at[None, :])


@triton.jit
def _rotated(x, by, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows, in their own dtype, to rotated ones in float32: products with 1 and -1, summed up in float32. Where `by` is
    None nothing is rotated."""
    if by is None:
        return x.to(tl.float32)
    else:
        y = tl.dot(x.reshape([x.shape[0] * (BLOCK_D // WIDTH), WIDTH]), by)
        return y.reshape([x.shape[0], BLOCK_D]) * (WIDTH**-0.5)


@triton.jit(
    do_not_specialize=("rows_k", "kv_heads", "chunks", "blocks_of_chunk", *_K_STRIDES, *_V_STRIDES),
    do_not_specialize_on_alignment=("kv_lens",),
)
def _sums(
    k, v, kv_lens, partial, rows_k, kv_heads, chunks, blocks_of_chunk,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """`partial` (B, Hk, chunks, 4, D'): of a chunk of rows the sum of values, their range, and the sum of some keys."""
    stride_kb, stride_ks, stride_kh = _whole(stride_kb, VEC), _whole(stride_ks, VEC), _whole(stride_kh, VEC)
    stride_vb, stride_vs, stride_vh = _whole(stride_vb, VEC), _whole(stride_vs, VEC), _whole(stride_vh, VEC)
    chunk = tl.program_id(0)
    batch = tl.program_id(1) // kv_heads
    head = tl.program_id(1) % kv_heads
    kv_len = _length(kv_lens, batch, rows_k)
    # Rows lie beside each other until the end: a sum over a block's rows goes through shared memory.
    k_sum = tl.zeros([_K_SAMPLE, BLOCK_D], tl.float32)
    v_sum = tl.zeros([_SUM_ROWS, BLOCK_D], tl.float32)
    lowest = tl.full([_SUM_ROWS, BLOCK_D], float("inf"), tl.float32)
    highest = tl.full([_SUM_ROWS, BLOCK_D], float("-inf"), tl.float32)
    first = chunk * blocks_of_chunk * _K_BLOCK
    end = tl.minimum(first + blocks_of_chunk * _K_BLOCK, kv_len)
    for row in range(first, end, _K_BLOCK):
        rows = row + tl.arange(0, _K_SAMPLE)
        k_sum += _rows(k, batch, head, rows, end, stride_kb, stride_ks, stride_kh, D, BLOCK_D).to(tl.float32)
    for row in tl.range(first, end, _SUM_ROWS, loop_unroll_factor=2):
        rows = row + tl.arange(0, _SUM_ROWS)
        values = _rows(v, batch, head, rows, end, stride_vb, stride_vs, stride_vh, D, BLOCK_D).to(tl.float32)
        v_sum += values
        exists = (rows < end)[:, None]
        lowest = tl.minimum(lowest, tl.where(exists, values, float("inf")))
        highest = tl.maximum(highest, tl.where(exists, values, float("-inf")))
    out = partial + (tl.program_id(1) * chunks + chunk) * 4 * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(out, tl.sum(k_sum, 0))
    tl.store(out + BLOCK_D, tl.sum(v_sum, 0))
    tl.store(out + 2 * BLOCK_D, tl.min(lowest, 0))
    tl.store(out + 3 * BLOCK_D, tl.max(highest, 0))


@triton.jit(do_not_specialize=("rows_k", "kv_heads", "chunks"), do_not_specialize_on_alignment=("kv_lens",))
def _finish(
    partial, matrix, k_means, v_scales, v_means, kv_lens, rows_k, kv_heads, chunks, BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, MOST_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A head's `partial` to the keys' mean, rotated, (B, Hk, D'), the values' scale and mean (B, Hk, 2, D'), and their
    mean once more (B, Hk, D'): some of its columns."""
    of_head = tl.program_id(0)
    kv_len = _length(kv_lens, of_head // kv_heads, rows_k)
    first = tl.program_id(1) * COLUMNS
    chunk = tl.arange(0, MOST_CHUNKS)[:, None]
    source = partial + (of_head * chunks + chunk) * 4 * BLOCK_D
    exists = chunk < chunks

    # A rotated column is made of all columns of its part.
    at = tl.arange(0, WIDTH)
    sums = tl.sum(tl.load(source + first // WIDTH * WIDTH + at[None, :], mask=exists, other=0.0), 0)
    sampled = kv_len // _K_BLOCK * _K_SAMPLE + tl.minimum(kv_len % _K_BLOCK, _K_SAMPLE)
    k_mean = sums / tl.maximum(sampled, 1).to(tl.float32)
    own = first % WIDTH + tl.arange(0, COLUMNS)[None, :]
    if matrix is None:
        by = (at[:, None] == own).to(tl.float32)
    else:
        by = tl.load(matrix + at[:, None] * WIDTH + own).to(tl.float32) * (WIDTH**-0.5)
    cols = first + tl.arange(0, COLUMNS)
    tl.store(k_means + of_head * BLOCK_D + cols, tl.sum(k_mean[:, None] * by, 0))

    source += cols[None, :]
    v_mean = tl.sum(tl.load(source + BLOCK_D, mask=exists, other=0.0), 0) / tl.maximum(kv_len, 1).to(tl.float32)
    lowest = tl.min(tl.load(source + 2 * BLOCK_D, mask=exists, other=float("inf")), 0)
    highest = tl.max(tl.load(source + 3 * BLOCK_D, mask=exists, other=float("-inf")), 0)
    largest = tl.maximum(highest - v_mean, v_mean - lowest)
    out = v_scales + of_head * 2 * BLOCK_D + cols
    tl.store(out, tl.where(largest > 0.0, largest / _HIGHEST_VALUE, 1.0))
    tl.store(out + BLOCK_D, v_mean)
    tl.store(v_means + of_head * BLOCK_D + cols, v_mean)


@triton.jit(
    do_not_specialize=("rows_k", "kv_heads", *_V_STRIDES),
    do_not_specialize_on_alignment=("kv_lens",),
)
def _choose_scales(
    v, kv_lens, v_scales, rows_k, kv_heads, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    SAMPLE: tl.constexpr, TRIED: tl.constexpr,
):  # fmt: skip
    """Make a channel's scale the one, of `TRIED` within an octave, by which e4m3 errs least: some columns of a head.

    Evenly spread rows stand for all of them. What e4m3 has are the same numbers in every octave, and which of them a
    channel meets depends on its scale: 6 % less error on the toy model's values.
    """
    stride_vb, stride_vs, stride_vh = _whole(stride_vb, VEC), _whole(stride_vs, VEC), _whole(stride_vh, VEC)
    of_head = tl.program_id(0)
    batch, head = of_head // kv_heads, of_head % kv_heads
    kv_len = _length(kv_lens, batch, rows_k)
    count = tl.minimum(kv_len, SAMPLE)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(v_scales + of_head * 2 * BLOCK_D + cols)
    mean = tl.load(v_scales + (of_head * 2 + 1) * BLOCK_D + cols)
    tried = tl.exp2(tl.arange(0, TRIED).to(tl.float32) / TRIED)
    factor = tried[:, None] * scale[None, :]
    start = v + batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    errors = tl.zeros([ROWS, TRIED, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        own = first + tl.arange(0, ROWS)
        rows = own.to(tl.int64) * kv_len // tl.maximum(count, 1)
        mask = (own < count)[:, None] & (cols < D)[None, :]
        x = tl.load(start + rows[:, None] * stride_vs + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - mean[None, :], 0.0)
        exact = x[:, None, :] * (1.0 / factor)[None, :, :]
        error = (exact - exact.to(tl.float8e4nv).to(tl.float32)) * factor[None, :, :]
        errors += error * error
    best = tl.argmin(tl.sum(errors, 0), 0)
    tl.store(v_scales + of_head * 2 * BLOCK_D + cols, scale * tl.exp2(best.to(tl.float32) / TRIED))


@triton.jit
def _largest_of_rows(x):
    """The largest magnitude in each row. A NaN becomes the row's, so that it is not lost."""
    return tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)


@triton.jit
def _scale_of(largest):
    return tl.where(largest == 0.0, 1.0, largest / _HIGHEST_INT8)


@triton.jit
def _store_int8(x, scale, out, BLOCK_D: tl.constexpr):
    """A block of rows as int8; `scale` broadcasts."""
    rounded = x * (1.0 / scale) + _ROUNDING
    values = (rounded.to(tl.int32, bitcast=True) - _ROUNDING_BITS).to(tl.int8)
    rows = tl.arange(0, x.shape[0])
    tl.store(out + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], values)


@triton.jit(
    do_not_specialize=("scale", "rows_q", "heads", "kv_heads", "padded_q", "stride_qb", "stride_qs", "stride_qh"),
    do_not_specialize_on_alignment=("q_lens",),
)
def _quantise_queries(
    q, q_lens, matrix, k_means, q_out, q_scales, means_of_scores, scale, rows_q, heads, kv_heads, padded_q,
    stride_qb, stride_qs, stride_qh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Some blocks of a head's queries, the next one on its way while one is rotated."""
    stride_qb, stride_qs, stride_qh = _whole(stride_qb, VEC), _whole(stride_qs, VEC), _whole(stride_qh, VEC)
    batch = tl.program_id(1)
    chunks = tl.cdiv(padded_q // _Q_BLOCK, BLOCKS)
    head = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * BLOCKS
    q_len = _length(q_lens, batch, rows_q)
    own = tl.arange(0, _Q_BLOCK)
    by = matrix
    if matrix is not None:
        by = _matrix(matrix, WIDTH)
    kv_head = batch * kv_heads + head // (heads // kv_heads)
    k_mean = tl.load(k_means + kv_head * BLOCK_D + tl.arange(0, BLOCK_D))
    for block in tl.range(first, tl.minimum(first + BLOCKS, tl.cdiv(q_len, _Q_BLOCK)), num_stages=STAGES):
        rows = own + block * _Q_BLOCK
        x = _rows(q, batch, head, rows, q_len, stride_qb, stride_qs, stride_qh, D, BLOCK_D)
        x = _rotated(x, by, BLOCK_D, WIDTH)
        at = (batch * heads + head).to(tl.int64) * padded_q + block * _Q_BLOCK
        tl.store(means_of_scores + at + own, tl.sum(x * k_mean[None, :], 1) * scale)
        q_scale = _scale_of(_largest_of_rows(x))
        tl.store(q_scales + at + own, q_scale)
        _store_int8(x, q_scale[:, None], q_out + at * BLOCK_D, BLOCK_D)


@triton.jit(
    do_not_specialize=("rows_k", "kv_heads", "padded_k", *_K_STRIDES),
    do_not_specialize_on_alignment=("kv_lens",),
)
def _quantise_keys(
    k, kv_lens, matrix, k_means, k_out, k_scales, norms, rows_k, kv_heads, padded_k, stride_kb, stride_ks, stride_kh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Some blocks of a head's keys, the next one on its way while one is rotated; `norms` (B, Hk, Sk') are squares."""
    stride_kb, stride_ks, stride_kh = _whole(stride_kb, VEC), _whole(stride_ks, VEC), _whole(stride_kh, VEC)
    batch = tl.program_id(1)
    blocks = padded_k // _K_BLOCK
    chunks = tl.cdiv(blocks, BLOCKS)
    head = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * BLOCKS
    of_head = batch * kv_heads + head
    kv_len = _length(kv_lens, batch, rows_k)
    by = matrix
    if matrix is not None:
        by = _matrix(matrix, WIDTH)
    k_mean = tl.load(k_means + of_head * BLOCK_D + tl.arange(0, BLOCK_D))
    for block in tl.range(first, tl.minimum(first + BLOCKS, tl.cdiv(kv_len, _K_BLOCK)), num_stages=STAGES):
        rows = tl.arange(0, _K_BLOCK) + block * _K_BLOCK
        keys = _rows(k, batch, head, rows, kv_len, stride_kb, stride_ks, stride_kh, D, BLOCK_D)
        x = _rotated(keys, by, BLOCK_D, WIDTH) - k_mean[None, :]
        x = tl.where((rows < kv_len)[:, None], x, 0.0)
        largest = _largest_of_rows(x)
        # The sum is 0, or NaN where a row's is.
        k_scale = _scale_of(tl.max(largest, 0) + tl.sum(largest * 0.0, 0))
        tl.store(k_scales + of_head * blocks + block, k_scale)
        at = of_head.to(tl.int64) * padded_k + block * _K_BLOCK
        tl.store(norms + at + tl.arange(0, _K_BLOCK), tl.sum(x * x, 1))
        _store_int8(x, k_scale, k_out + at * BLOCK_D, BLOCK_D)


@triton.jit
def _stored_at(column, PERMUTED: tl.constexpr):
    """Which key's value is stored there."""
    if PERMUTED:  # in each 16: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15
        column = column // 16 * 16 + column // 2 % 2 * 8 + column % 16 // 4 * 2 + column % 2
    return column


@triton.jit(
    do_not_specialize=("rows_k", "kv_heads", "blocks", *_V_STRIDES),
    do_not_specialize_on_alignment=("kv_lens",),
)
def _quantise_values(
    v, kv_lens, v_scales, v_out, v_errors, rows_k, kv_heads, blocks, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, PERMUTED: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Some blocks of a head's values, the next rows on their way while some are rounded.

    `v_errors` (B, Hk, chunks, D') gets the sum of what rounding took from them, in units of their scale.
    """
    stride_vb, stride_vs, stride_vh = _whole(stride_vb, VEC), _whole(stride_vs, VEC), _whole(stride_vh, VEC)
    batch = tl.program_id(1)
    chunks = tl.cdiv(blocks, BLOCKS)
    padded_k = tl.cast(blocks, tl.int64) * _K_BLOCK  # The compiler sees a multiple, and stores 16 bytes at once.
    head = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    of_head = batch * kv_heads + head
    kv_len = _length(kv_lens, batch, rows_k)
    cols = tl.arange(0, BLOCK_D)
    own = _stored_at(tl.arange(0, _V_ROWS), PERMUTED)
    factor = 1.0 / tl.load(v_scales + of_head * 2 * BLOCK_D + cols)[None, :]
    v_mean = tl.load(v_scales + (of_head * 2 + 1) * BLOCK_D + cols)[None, :]
    out = v_out + of_head * BLOCK_D * padded_k
    out += cols[:, None] * padded_k + tl.arange(0, _V_ROWS)[None, :]
    errors = tl.zeros([_V_ROWS, BLOCK_D], tl.float32)
    start = chunk * BLOCKS * _K_BLOCK
    end = tl.minimum(start + BLOCKS * _K_BLOCK, tl.cdiv(kv_len, _K_BLOCK) * _K_BLOCK)
    for first in tl.range(start, end, _V_ROWS, num_stages=STAGES):
        rows = first + own
        x = _rows(v, batch, head, rows, kv_len, stride_vb, stride_vs, stride_vh, D, BLOCK_D).to(tl.float32)
        x = tl.clamp((x - v_mean) * factor, -_HIGHEST_VALUE, _HIGHEST_VALUE)
        x = tl.where((rows < kv_len)[:, None], x, 0.0)
        rounded = x.to(v_out.dtype.element_ty)
        errors += x - rounded.to(tl.float32)
        tl.store(out + first, tl.trans(rounded))
    if start < end:
        tl.store(v_errors + (of_head * chunks + chunk) * BLOCK_D + cols, tl.sum(errors, 0))


@triton.jit(do_not_specialize=("rows_k", "kv_heads", "chunks"), do_not_specialize_on_alignment=("kv_lens",))
def _mend_means(
    v_errors, v_scales, kv_lens, rows_k, kv_heads, chunks, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add a head's `v_errors` to the values' means: some of its columns.

    16-bit values are few numbers, so that rounding errs for thousands of keys alike and does not average out. Outputs
    over 119,056 keys of normal data had errors of 5.7e-2 to 8.8e-2; with the errors' mean in the values' 3.5e-2.
    """
    of_head = tl.program_id(0)
    kv_len = _length(kv_lens, of_head // kv_heads, rows_k)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own = tl.arange(0, CHUNKS)
    written = tl.cdiv(kv_len, BLOCKS * _K_BLOCK)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, written, CHUNKS):
        chunk = first + own
        source = v_errors + (of_head * chunks + chunk)[:, None] * BLOCK_D + cols[None, :]
        total += tl.sum(tl.load(source, mask=(chunk < written)[:, None], other=0.0), 0)
    scale = v_scales + of_head * 2 * BLOCK_D + cols
    mean = scale + BLOCK_D
    count = tl.maximum(kv_len, 1).to(tl.float32)
    tl.store(mean, tl.load(mean) + tl.load(scale) * (total / count))


@triton.jit
def _largest_of_groups(norms, group, size, kv_len, NORMS: tl.constexpr):
    """The key of the largest norm in each of these groups of `size` keys; `kv_len` where a group has none."""
    largest = tl.full([group.shape[0]], -1.0, tl.float32)
    key = tl.zeros([group.shape[0]], tl.int32) + kv_len
    own = tl.arange(0, NORMS)
    for first in range(0, size, NORMS):
        keys = group[:, None] * size + first + own[None, :]
        mask = (first + own < size)[None, :] & (keys < kv_len)
        found, place = tl.max(tl.load(norms + keys, mask=mask, other=-1.0), 1, return_indices=True)
        key = tl.where(found > largest, group * size + first + place, key)
        largest = tl.maximum(largest, found)
    return key


@triton.jit(
    do_not_specialize=("rows_k", "kv_heads", "padded_k", *_K_STRIDES, *_V_STRIDES),
    do_not_specialize_on_alignment=("kv_lens",),
)
def _round_largest(
    k, v, kv_lens, matrix, k_means, v_scales, v_means, norms, k_out, v_out, k_scales, rows_k, kv_heads, padded_k,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, PERMUTED: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """A block of the largest keys of a head, and what their values lack in units of their scale. `v_means` are those
    with which values have been rounded, `v_scales` has the mended ones."""
    stride_kb, stride_ks, stride_kh = _whole(stride_kb, VEC), _whole(stride_ks, VEC), _whole(stride_kh, VEC)
    stride_vb, stride_vs, stride_vh = _whole(stride_vb, VEC), _whole(stride_vs, VEC), _whole(stride_vh, VEC)
    of_head = tl.program_id(1)
    batch, head = of_head // kv_heads, of_head % kv_heads
    kv_len = _length(kv_lens, batch, rows_k)
    size = tl.cdiv(kv_len, _LARGEST_KEYS)
    cols = tl.arange(0, BLOCK_D)
    column = tl.arange(0, _K_BLOCK)
    group = tl.program_id(0) * _K_BLOCK
    first = of_head.to(tl.int64) * padded_k
    norms += first
    behind = tl.cdiv(rows_k, _K_BLOCK) + tl.program_id(0)  # blocks of keys

    rows = _largest_of_groups(norms, group + column, size, kv_len, NORMS)
    x = _rows(k, batch, head, rows, kv_len, stride_kb, stride_ks, stride_kh, D, BLOCK_D)
    by = matrix
    if matrix is not None:
        by = _matrix(matrix, WIDTH)
    x = _rotated(x, by, BLOCK_D, WIDTH) - tl.load(k_means + of_head * BLOCK_D + cols)[None, :]
    x = tl.where((rows < kv_len)[:, None], x, 0.0)
    scale = _scale_of(tl.max(tl.max(tl.abs(x), 1), 0))
    tl.store(k_scales + first // _K_BLOCK + behind, scale)
    _store_int8(x, scale, k_out + (first + behind * _K_BLOCK) * BLOCK_D, BLOCK_D)

    rows = _largest_of_groups(norms, group + _stored_at(column, PERMUTED), size, kv_len, NORMS)
    values = _rows(v, batch, head, rows, kv_len, stride_vb, stride_vs, stride_vh, D, BLOCK_D).to(tl.float32)
    factor = 1.0 / tl.load(v_scales + of_head * 2 * BLOCK_D + cols)[None, :]
    rounded = (values - tl.load(v_means + of_head * BLOCK_D + cols)[None, :]) * factor
    rounded = tl.clamp(rounded, -_HIGHEST_VALUE, _HIGHEST_VALUE).to(v_out.dtype.element_ty).to(tl.float32)
    lacks = (values - tl.load(v_scales + (of_head * 2 + 1) * BLOCK_D + cols)[None, :]) * factor - rounded
    lacks = tl.where((rows < kv_len)[:, None], tl.clamp(lacks, -_HIGHEST_VALUE, _HIGHEST_VALUE), 0.0)
    out = v_out + (first * BLOCK_D + behind * _K_BLOCK)
    tl.store(
        out + (cols[:, None] * tl.cast(padded_k, tl.int64) + column[None, :]),
        tl.trans(lacks.to(v_out.dtype.element_ty)),
    )
