"""The 8-bit attention kernel for Hopper (sm90), written in Gluon: int8 scores, e4m3 weights and values.

Its input is what `quantize_int8` writes. In each program one producer feeds consumer warpgroups of 64 query rows from a
ring of tiles of keys and values in shared memory (TMA; per slot an mbarrier, and a barrier of the hardware). What is
particular to 8 bits:

- The accumulator of the scores starts at the bits of 1.5 * 2^23, so that the integers that come out are, read as
  floats, 1.5 * 2^23 + score: no conversion, and the offset cancels inside the multiply-add before the exponential. The
  maximum is taken of the integers, which the chip does for three at a time.
- Values lie channel by channel, with the keys of each 16 permuted, so that the weights are the second product's left
  operand as they stand in the registers, converted four at a time.
- The tensor cores add up e4m3 products in about 22 bits (Zhang et al. 2024, arXiv 2411.10958, section 3.3), which leak
  over a long row. So they add up only a few blocks of keys; float32 sums of these stand in shared memory.
- What stands for a row's maximum follows only scores that exceed it by more than e4m3 has room for: mostly nothing is
  rescaled, which a warp decides by a branch.
- Queries stay in registers, which spares shared memory a third of what the scores would read of it.
- The keys' last block, which is masked, comes first; the loop over the others has no mask.
- After all keys the largest come once more, with what e4m3 has taken from their values: the same weights, which nothing
  sums up again and no maximum is taken for.

docs/kernels/int8.md has the other orders of this work that were tried, and what they measured.
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .format8 import LARGEST_KEYS
from .hopper_choice import ROWS
from .hopper_items import (
    _BLOCKS,
    _HAS_KV_LENS,
    _HAS_Q_LENS,
    _HEADS,
    _HEADS_PER_KV,
    _PARAMETERS,
    _ROWS_K,
    _ROWS_Q,
    _integer,
    _key_span,
    _one,
    _park,
    _pointer,
    _turns,
)
from .hopper_rows import _write_empty_rows, _write_rows
from .hopper_softmax import _LOG2_E
from .hopper_softmax_int8 import (
    _LOG2_OF_WEIGHTS,
    _by_rows,
    _exponents,
    _followed,
    _layout_of_scores,
    _masked,
    _maximum,
    _product,
    _scores,
    _weights,
)
from .hopper_tiles import (
    _ROWS,
    _async_load,
    _await_free_queries,
    _await_queries,
    _load_queries,
    _queries_empty,
    _reinterpret,
    _thread_barrier,
)
from .launch import Launcher, MakeDescriptor
from .quantize_int8 import K_BLOCK, Keys8, Queries8

CONSUMERS = 2  # warpgroups of ROWS query rows each
STAGES = 4  # slots of the ring of keys and values
# Of the second consumer's threads; the first one has what is left, as many. With 240 ptxas issues the next scores among
# the first exponentials, with 216 after the last one: at 119,056 tokens both take 3 to 4 % longer.
REGISTERS = 224
PRODUCER_REGISTERS = 56  # what the consumers leave of 65,536

_K_BLOCK = gl.constexpr(K_BLOCK)
_LARGEST_KEYS = gl.constexpr(LARGEST_KEYS)
_WHOLE_TILE = gl.constexpr(-1)  # of the kernel of 16 bits the last ones are cut, see `tail`
_LOWEST_SCORE = gl.constexpr(0x4B000000)  # 2^23, that is a score of -2^22; none lies below -2^21
_BLOCKS_OF_A_SUM = gl.constexpr(16)  # of keys, in the tensor cores' accumulator; with 32, sums of one sign leak 1.6 %
_FLOAT_LOG2_E = gl.constexpr(_LOG2_E)


# More parameters that wait in shared memory, see `hopper_items`.
_Q_SCALES = gl.constexpr(0)
_K_SCALES = gl.constexpr(1)
_V_SCALES = gl.constexpr(2)
_MEANS_OF_SCORES = gl.constexpr(3)
_PADDED_Q = gl.constexpr(4)
_PADDED_K = gl.constexpr(5)
_SCALES = gl.constexpr(8)


@gluon.jit
def _park_scales(scales, q_scales, k_scales, v_scales, means_of_scores, padded_q, padded_k):
    index = gl.arange(0, _SCALES, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    values = gl.where(index == _Q_SCALES, q_scales.to(gl.int64), padded_k.to(gl.int64))
    values = gl.where(index == _K_SCALES, k_scales.to(gl.int64), values)
    values = gl.where(index == _V_SCALES, v_scales.to(gl.int64), values)
    values = gl.where(index == _MEANS_OF_SCORES, means_of_scores.to(gl.int64), values)
    scales.store(gl.where(index == _PADDED_Q, padded_q.to(gl.int64), values))


@gluon.jit
def _place(parameters, i, CONSUMERS: gl.constexpr):
    """(first query, head, sample) of the program's i-th tile; blocks of queries run fastest, to share keys in L2."""
    tile = gl.program_id(0) + i * gl.num_programs(0)
    blocks = _integer(parameters, _BLOCKS)
    heads = _integer(parameters, _HEADS)
    rest = tile // blocks
    return tile % blocks * (CONSUMERS * _ROWS), rest % heads, rest // heads


@gluon.jit
def _slot(turn, STAGES: gl.constexpr):
    """turn % STAGES. No turn is negative, which the compiler does not know: it takes four instructions."""
    gl.static_assert(STAGES & (STAGES - 1) == 0)
    return turn & (STAGES - 1)


@gluon.jit
def _wait_full(barriers, turn, STAGES: gl.constexpr):
    mbarrier.wait(barriers.index(_slot(turn, STAGES)), (turn // STAGES) & 1)


def _named(operation: str) -> str:
    """One of the hardware's barriers, of which each slot of the ring has one, if $2 is not 0."""
    return (
        f"{{ .reg .pred p; setp.ne.s32 p, $2, 0; @p barrier.{operation} $1, {CONSUMERS * 128 + 32}; mov.b32 $0, $1; }}"
    )


_ARRIVE = gl.constexpr(_named("arrive"))
_SYNC = gl.constexpr(_named("sync"))
_CONSUMERS = gl.constexpr(CONSUMERS)
_FIRST_BARRIER = gl.constexpr(10)  # those below are Triton's


@gluon.jit
def _at_barrier(slot, wanted, asm: gl.constexpr):
    """For all threads of a partition, at the barrier of a slot."""
    one: gl.constexpr = _one(gl.num_warps())
    barrier = gl.full([1], _FIRST_BARRIER, gl.int32, one) + slot
    pred = gl.full([1], 0, gl.int32, one) + wanted.to(gl.int32)
    gl.inline_asm_elementwise(asm, "=r,r,r", [barrier, pred], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _free(slot):
    """A warp of a consumer no longer reads a slot. At an mbarrier one thread would arrive for all, after the warps have
    waited for each other."""
    _at_barrier(slot, gl.to_tensor(1), _ARRIVE)


@gluon.jit
def _load_block(k, v, keys, values, barriers, turn, batch, head, row, STAGES: gl.constexpr):
    _at_barrier(_slot(turn, STAGES), turn >= STAGES, _SYNC)
    full = barriers.index(_slot(turn, STAGES))
    mbarrier.expect(full, k.block_type.nbytes + v.block_type.nbytes)
    _async_load(k, [batch, head, row, 0], full, keys.index(_slot(turn, STAGES)))
    _async_load(v, [batch, head, 0, row], full, values.index(_slot(turn, STAGES)))


@gluon.jit
def _first_of_largest(parameters):
    """The row behind the blocks of keys at which the largest ones stand once more."""
    return (_integer(parameters, _ROWS_K) + _K_BLOCK - 1) // _K_BLOCK * _K_BLOCK


@gluon.jit
def _blocks_of_largest(kv_len):
    return gl.minimum((kv_len + _K_BLOCK - 1) // _K_BLOCK, _LARGEST_KEYS // _K_BLOCK)


@gluon.jit
def _producer(
    q, k, v, queries, keys, values, barriers, parameters, CONSUMERS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Load what the program's tiles read, as fast as the consumers free the slots: the last block of keys first."""
    turn = gl.to_tensor(0)
    for i in range(_turns(parameters)):
        first_m, head, sample = _place(parameters, i, CONSUMERS)
        _, kv_len, _, _ = _key_span(parameters, first_m, sample)
        _await_free_queries(barriers, i, STAGES, Q_STAGES)
        active = gl.where(kv_len > 0, CONSUMERS, 0)
        _load_queries(q, queries, barriers, i, sample, head, first_m, active, CONSUMERS, STAGES, Q_STAGES)
        kv_head = head // _integer(parameters, _HEADS_PER_KV)
        row = (kv_len - 1) // KEYS * KEYS
        for block in range((kv_len + KEYS - 1) // KEYS):
            _load_block(k, v, keys, values, barriers, turn, sample, kv_head, row, STAGES)
            row = block * KEYS
            turn += 1
        behind = _first_of_largest(parameters)
        for block in range(_blocks_of_largest(kv_len)):
            _load_block(k, v, keys, values, barriers, turn, sample, kv_head, behind + block * KEYS, STAGES)
            turn += 1


@gluon.jit
def _exists(kv_len, layout: gl.constexpr, KEYS: gl.constexpr):
    """(1, KEYS): which keys of the last block there are."""
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
    return gl.expand_dims((kv_len - 1) // KEYS * KEYS + columns < kv_len, 0)


@gluon.jit
def _under_product(
    scores, product, m_i, factor, barriers, slot, ahead, end, STAGES: gl.constexpr, FOLLOWS: gl.constexpr
):  # fmt: skip
    """The next block's scores, and where it FOLLOWS what stands for the maximum after them, while the product of this
    block, in `slot`, is in flight: (scores, product, m_i, the next turn that is waited for)."""
    s = warpgroup_mma_wait(1, deps=(scores,))
    if FOLLOWS:
        m_i = _maximum(s, m_i, factor)
    # The wait for the next keys stands here since the assembler moves the wait for the product up to the last branch:
    # without one in between, the maximum would come after it.
    ahead = gl.minimum(ahead + 1, end)
    _wait_full(barriers, ahead, STAGES)
    product, m_i = warpgroup_mma_wait(0, deps=(product, m_i))
    _free(slot)
    return s, product, m_i, ahead


@gluon.jit
def _attend(
    q, keys, values, total, barriers, turn, kv_len, q_factor, k_scales, first_of_largest,
    KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's 64 rows over all keys: (accumulator, m_i, l_i by rows, the next turn).

    The product of the next block's scores runs under this block's exponentials, and that of this one's weights under
    the next one's maximum. After the last block the same keys are taken once more for nothing, which is cheaper than a
    branch. `q_factor` is the rows' scale times that of softmax, for exponents of two; `k_scales` points to the head's,
    and `first_of_largest` is the row at which the largest keys begin. `total`, in shared memory, is where float32 sums
    of `product` gather; `since` is what they have to be rescaled by since the last one was added.

    Nothing is in flight from one iteration to the next: the assembler would wait for it before anything else.
    """
    S: gl.constexpr = _layout_of_scores(KEYS)
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=4)
    last = (kv_len - 1) // KEYS
    behind = first_of_largest // _K_BLOCK
    blocks = last + _blocks_of_largest(kv_len)
    end = turn + blocks
    slot = _slot(turn, STAGES)
    ahead = gl.minimum(turn + 1, end)  # the turn that is waited for: that of the next scores
    next_slot = _slot(ahead, STAGES)
    factor = q_factor * gl.load(k_scales + last)
    k_scale = gl.load(k_scales + gl.where(last > 0, 0, behind))
    _wait_full(barriers, turn, STAGES)
    s = warpgroup_mma_wait(0, deps=(_scores(q, keys.index(slot), S, KEYS, D),))
    _wait_full(barriers, ahead, STAGES)
    scores = _scores(q, keys.index(next_slot), S, KEYS, D)
    exists = _exists(kv_len, S, KEYS)
    lowest = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    m_i = _maximum(gl.where(exists, s, _LOWEST_SCORE), lowest, factor)
    p, l_i = _weights(_masked(_exponents(s, m_i, factor), exists), P)
    product = _product(gl.zeros([_ROWS, D], gl.float32, OUT), p, values.index(slot), KEYS, D)
    factor = q_factor * k_scale
    s, product, m_next, ahead = _under_product(
        scores, product, m_i, factor, barriers, slot, ahead, end, STAGES, FOLLOWS=True
    )
    alpha = gl.exp2(m_i - m_next)
    m_i = m_next
    product = _followed(product, alpha)
    total.store(gl.zeros([_ROWS, D], gl.float32, OUT))
    since = gl.full([_ROWS], 1.0, gl.float32, alpha.type.layout)

    for first in range(0, last, _BLOCKS_OF_A_SUM):
        for block in range(first, gl.minimum(first + _BLOCKS_OF_A_SUM, last)):
            k_scale = gl.load(k_scales + gl.where(block + 1 < last, block + 1, behind))
            p, sums = _weights(_exponents(s, m_i, factor), P)
            l_i = gl.fma(l_i, _by_rows(alpha, l_i), sums)
            slot = next_slot
            next_slot = _slot(ahead, STAGES)
            scores = _scores(q, keys.index(next_slot), S, KEYS, D)
            product = _product(product, p, values.index(slot), KEYS, D)
            factor = q_factor * k_scale
            s, product, m_next, ahead = _under_product(
                scores, product, m_i, factor, barriers, slot, ahead, end, STAGES, FOLLOWS=True
            )
            alpha = gl.exp2(m_i - m_next)
            m_i = m_next
            since *= alpha
            product = _followed(product, alpha)
        total.store(gl.fma(total.load(OUT), _by_rows(since, product), product))
        product = gl.zeros([_ROWS, D], gl.float32, OUT)
        since = gl.full([_ROWS], 1.0, gl.float32, since.type.layout)
    l_i *= _by_rows(alpha, l_i)
    for block in range(last, blocks):
        # What the values of the largest keys lack; their weights have been summed up before.
        k_scale = gl.load(k_scales + behind + gl.minimum(block + 1, blocks - 1) - last)
        p, _ = _weights(_exponents(s, m_i, factor), P)
        slot = next_slot
        next_slot = _slot(ahead, STAGES)
        scores = _scores(q, keys.index(next_slot), S, KEYS, D)
        product = _product(product, p, values.index(slot), KEYS, D)
        factor = q_factor * k_scale
        s, product, m_i, ahead = _under_product(
            scores, product, m_i, factor, barriers, slot, ahead, end, STAGES, FOLLOWS=False
        )
    acc = gl.fma(total.load(OUT), _by_rows(since, product), product)
    return acc, m_i, gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S)), end + 1


@gluon.jit
def _rescaled(acc, m_i, l_i, scales, at_q, at_k, row, alive_rows, D: gl.constexpr):
    """(acc, m_i) with what quantisation took away: values' scales and means, and the keys' mean in the scores."""
    v_scales = _pointer(scales, _V_SCALES, gl.float32) + at_k * (2 * D)
    means_of_scores = _pointer(scales, _MEANS_OF_SCORES, gl.float32)
    means_of_scores += at_q.to(gl.int64) * _integer(scales, _PADDED_Q) + row
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))
    scale = gl.expand_dims(gl.load(v_scales + channels), 0)
    mean = gl.expand_dims(gl.load(v_scales + D + channels), 0)
    sums = _by_rows(l_i, acc)
    own = gl.arange(0, _ROWS, layout=m_i.type.layout)
    left_out = gl.load(means_of_scores + own, mask=own < alive_rows, other=0.0)
    return acc * scale + mean * sums, m_i - _LOG2_OF_WEIGHTS + left_out * _FLOAT_LOG2_E


@gluon.jit
def _consumer(
    queries, keys, values, totals, barriers, parameters, scales, scale_log2, consumer: gl.constexpr,
    CONSUMERS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    OUT: gl.constexpr,
):  # fmt: skip
    total = totals.index(consumer)
    stage = _reinterpret(total, OUT, [_ROWS, D], gl.NVMMASharedLayout.get_default_for([_ROWS, D], OUT))
    S: gl.constexpr = _layout_of_scores(KEYS)
    turn = gl.to_tensor(0)
    for i in range(_turns(parameters)):
        first_m, head, sample = _place(parameters, i, CONSUMERS)
        _, kv_len, _, q_len = _key_span(parameters, first_m, sample)
        _await_queries(barriers, i, STAGES, Q_STAGES)
        row = first_m + consumer * _ROWS
        stored = _integer(parameters, _ROWS_Q) - row
        if (kv_len > 0) & (row < q_len):
            heads = _integer(parameters, _HEADS)
            at_q = sample * heads + head
            at_k = at_q // _integer(parameters, _HEADS_PER_KV)
            q = queries.index(i % Q_STAGES * CONSUMERS + consumer).reshape([_ROWS, D])
            q = q.load(gl.DotOperandLayout(operand_index=0, parent=S, k_width=4))
            mbarrier.arrive(_queries_empty(barriers, i, STAGES, Q_STAGES))
            padded_q = _integer(scales, _PADDED_Q)
            own = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, S))
            q_scales = _pointer(scales, _Q_SCALES, gl.float32) + at_q.to(gl.int64) * padded_q
            q_factor = gl.load(q_scales + own, mask=own < padded_q, other=0.0) * scale_log2
            of_head = _pointer(scales, _K_SCALES, gl.float32) + at_k * (_integer(scales, _PADDED_K) // _K_BLOCK)
            acc, m_i, l_i, turn = _attend(
                q, keys, values, total, barriers, turn, kv_len, q_factor, of_head, _first_of_largest(parameters),
                KEYS, D, STAGES,
            )  # fmt: skip
            # Derived once more, for else it would occupy registers in the loop over keys.
            first_m, head, sample = _place(parameters, i, CONSUMERS)
            row = first_m + consumer * _ROWS
            at_q = sample * _integer(parameters, _HEADS) + head
            at_k = at_q // _integer(parameters, _HEADS_PER_KV)
            stored = _integer(parameters, _ROWS_Q) - row
            alive = q_len - row
            acc, m_i = _rescaled(acc, m_i, l_i, scales, at_q, at_k, row, alive, D)
            # No warp writes to the stage before all have read their sums, nor sums before all have read the stage.
            _thread_barrier()
            _write_rows(parameters, row, head, sample, _WHOLE_TILE, alive, stored, stage, acc, m_i, l_i, consumer, D)
            _thread_barrier()
        else:
            for _ in range((kv_len + KEYS - 1) // KEYS + _blocks_of_largest(kv_len)):
                _wait_full(barriers, turn, STAGES)
                _free(_slot(turn, STAGES))
                turn += 1
            mbarrier.arrive(_queries_empty(barriers, i, STAGES, Q_STAGES))
            if stored > 0:
                _write_empty_rows(
                    parameters, row, head, sample, _WHOLE_TILE, stored, OUT, 0.0, float("-inf"), consumer, D
                )


_RUNTIME_INTEGERS = (
    "heads_per_kv", "rows_q", "rows_k", "flags", "heads", "blocks", "tiles", "padded_q", "padded_k",
)  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=("q_lens", "kv_lens"))
def _hopper_attention_int8(
    q, k, v, q_scales, k_scales, v_scales, means_of_scores, out, lse, q_lens, kv_lens, scale_log2, heads_per_kv,
    rows_q, rows_k, flags, heads, blocks, tiles, padded_q, padded_k,
    CONSUMERS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """q, k, v: descriptors of int8 (B, H, S, D) and e4m3 (B, H, D, S), in blocks of 64 rows and of KEYS keys; `lens`
    pointers are read where `flags` says so. `tiles` = samples x heads x blocks of CONSUMERS x 64 queries."""
    gl.static_assert(KEYS == _K_BLOCK)
    gl.static_assert(CONSUMERS == _CONSUMERS and _FIRST_BARRIER + STAGES <= 16)  # as many as the hardware has
    queries = gl.allocate_shared_memory(q.dtype, [Q_STAGES * CONSUMERS, 1, 1, _ROWS, D], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, KEYS, D], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, D, KEYS], v.layout)
    OUT: gl.constexpr = out.dtype.element_ty
    # A thread reads what it has written, two elements at a time: eight rows lie in different banks.
    totals = gl.allocate_shared_memory(gl.float32, [CONSUMERS, _ROWS, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    barriers = gl.allocate_shared_memory(gl.int64, [2 * (STAGES + Q_STAGES), 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):  # Of the keys' "empty" barriers, whose places stay free, see `_free`.
        mbarrier.init(barriers.index(i), count=1)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(barriers.index(2 * STAGES + i), count=CONSUMERS)
        mbarrier.init(barriers.index(2 * STAGES + Q_STAGES + i), count=CONSUMERS)
    parameters = gl.allocate_shared_memory(gl.int64, [_PARAMETERS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _park(
        parameters, out, lse, lse, q_lens, kv_lens, heads_per_kv, rows_q, rows_k, flags, heads, blocks, tiles,
        tiles, gl.to_tensor(1), gl.to_tensor(CONSUMERS), gl.to_tensor(0),
    )  # fmt: skip
    scales = gl.allocate_shared_memory(gl.int64, [_SCALES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _park_scales(scales, q_scales, k_scales, v_scales, means_of_scores, padded_q, padded_k)
    _thread_barrier()
    gl.warp_specialize(
        [
            (_consumer, (
                queries, keys, values, totals, barriers, parameters, scales, scale_log2, 0, CONSUMERS, KEYS, D, STAGES,
                Q_STAGES, OUT,
            )),
            (_consumer, (
                queries, keys, values, totals, barriers, parameters, scales, scale_log2, 1, CONSUMERS, KEYS, D, STAGES,
                Q_STAGES, OUT,
            )),
            (_producer, (q, k, v, queries, keys, values, barriers, parameters, CONSUMERS, KEYS, STAGES, Q_STAGES)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def constants(head_dim: int) -> dict[str, object]:
    """The kernel's compile-time constants."""
    return {
        "CONSUMERS": CONSUMERS, "KEYS": K_BLOCK, "D": head_dim, "STAGES": STAGES, "Q_STAGES": 1,
        "REGISTERS": REGISTERS, "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }  # fmt: skip


_HEAD_DIMS = (64, 128)
_OUT_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel exists for this type and head dim."""
    return dtype in _OUT_TYPES and head_dim in _HEAD_DIMS


def _make_descriptor(rows: int, columns: int, dtype: gl.dtype) -> MakeDescriptor:
    block = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return functools.partial(TensorDescriptor, block_shape=block, layout=layout)


@functools.cache
def _launcher(device: torch.device, dtype: torch.dtype, head_dim: int) -> Launcher:
    """`dtype` is the output's: one for each, since a launcher follows its last compiled variant."""
    return Launcher(
        _hopper_attention_int8, device,
        {
            "q": _make_descriptor(ROWS, head_dim, gl.int8),
            "k": _make_descriptor(K_BLOCK, head_dim, gl.int8),
            "v": _make_descriptor(head_dim, K_BLOCK, gl.float8e4nv),
        },
        **constants(head_dim), num_warps=4,
    )  # fmt: skip


class _Plan(NamedTuple):
    """What a launch needs besides its tensors."""

    launcher: Launcher
    programs: int
    blocks: int
    tiles: int


# From so many blocks of keys on each tile is a program's own, and the hardware hands them out, as for the kernel of 16
# bits.
_BLOCKS_OF_A_PROGRAM = 512


@functools.lru_cache(maxsize=1024)
def _plan(q_shape: tuple[int, ...], rows_k: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    batch, rows_q, heads, head_dim = q_shape
    blocks = -(-rows_q // (CONSUMERS * ROWS))
    tiles = blocks * heads * batch
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    stays = rows_k < _BLOCKS_OF_A_PROGRAM * ROWS
    launcher = _launcher(device, dtype, head_dim)
    return _Plan(launcher, min(tiles, processors) if stays else tiles, blocks, tiles)


def hopper_attention_int8_forward(
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

    `rows_k` is Sk; the values' keys are permuted; D is 64 or 128, and `out` bfloat16 or float16.
    """
    plan = _plan(out.shape, rows_k, out.dtype, out.device)
    flags = (q_lens is not None) * _HAS_Q_LENS.value | (kv_lens is not None) * _HAS_KV_LENS.value
    # A pointer that is not followed stands in for lengths that are not given: None would be another compiled variant.
    unused = out.view(torch.int32) if q_lens is None or kv_lens is None else None
    descriptors = ((t, tuple(t.shape), t.stride()) for t in (queries.q, keys.k, keys.v))
    plan.launcher(
        (plan.programs, 1, 1), *descriptors, queries.q_scales, keys.k_scales, keys.v_scales,
        queries.means_of_scores, out, lse,
        unused if q_lens is None else q_lens, unused if kv_lens is None else kv_lens, scale * _LOG2_E,
        out.shape[2] // keys.k.shape[1], out.shape[1], rows_k, flags, out.shape[2], plan.blocks, plan.tiles,
        queries.q.shape[2], keys.k.shape[2],
    )  # fmt: skip


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: one for each type and head dim."""
    return sum(len(caches[0]) for caches in _hopper_attention_int8.device_caches.values())
