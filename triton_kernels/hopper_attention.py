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
consumers finish one, the next one's queries and keys are on their way (4,096 tokens: 263 against 281 microseconds with
a program for each tile).
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from .hopper_choice import CONFIGS, KEYS, ROWS, SMALL_CONFIGS, HopperConfig, choose, takes
from .hopper_items import (
    _ACTIVE,
    _BLOCKS,
    _FLAGS,
    _HAS_KV_LENS,
    _HAS_Q_LENS,
    _HEADS,
    _HEADS_PER_KV,
    _PACKED,
    _PARAMETERS,
    _ROWS_Q,
    _integer,
    _key_span,
    _own_keys,
    _park,
    _part,
    _tile_of,
    _turns,
)
from .hopper_rows import _write_told_empty_rows, _write_told_rows
from .hopper_softmax import _LEAST_SCALE, _LOG2_E, _attend_blocks, _attend_window, _note_overflow
from .hopper_tiles import (
    _K,
    _KEYS,
    _ROWS,
    _TOLD,
    _TOLD_KEYS,
    _TOLD_QUERIES,
    _TOLD_UNCLEAN,
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
    _release,
    _stand_aside,
    _tell,
    _thread_barrier,
    _tile,
    _told,
)
from .launch import Launcher
from .tail import Tail


@gluon.jit
def _place(parameters, i):
    """(first query, head, sample, part) of the program's i-th item of work. Blocks of queries run fastest: programs
    that run side by side share a head's keys in L2."""
    part = _part(parameters, i)
    tile = _tile_of(parameters, part)
    blocks = _integer(parameters, _BLOCKS)
    heads = _integer(parameters, _HEADS)
    rest = tile // blocks
    return tile % blocks * (_integer(parameters, _ACTIVE) * _ROWS), rest % heads, rest // heads, part


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
def _feed(
    q, k, v, queries, ring, barriers, told, parameters, before, turn, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Load what the program's tiles read, as fast as the consumers free the slots; the ring's next turn."""
    for i in range(_turns(parameters)):
        first_m, head, sample, part = _place(parameters, i)
        k_start, kv_len, q_start, q_len = _key_span(parameters, first_m, sample)
        first_key, kv_len = _own_keys(parameters, part, kv_len, _KEYS)
        k_start += first_key
        is_packed = (_integer(parameters, _FLAGS) & _PACKED) != 0
        batch = gl.where(is_packed, 0, sample)
        active = _integer(parameters, _ACTIVE)
        rows = active * _ROWS
        stored = gl.minimum(gl.where(is_packed, q_len, _integer(parameters, _ROWS_Q)) - first_m, rows)
        row = q_start + first_m
        _await_free_queries(barriers, before + i, STAGES, Q_STAGES)
        _tell(
            told.index((before + i) % Q_STAGES), kv_len, gl.minimum(q_len - first_m, rows), stored, row, head, batch,
            gl.where(is_packed & (kv_len > 0) & (kv_len < _KEYS), 1, 0), part,
        )  # fmt: skip
        active = gl.where(kv_len > 0, active, 0)
        _load_queries(q, queries, barriers, before + i, batch, head, row, active, CONSUMERS, STAGES, Q_STAGES)
        kv_head = head // _integer(parameters, _HEADS_PER_KV)
        turn = _load_keys(k, v, ring, barriers, turn, batch, kv_head, k_start, kv_len, STAGES)
    return turn


@gluon.jit
def _producer(
    q, k, v, queries, ring, barriers, told, parameters, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    first = gl.to_tensor(0)
    turn = _feed(q, k, v, queries, ring, barriers, told, parameters, first, first, CONSUMERS, STAGES, Q_STAGES)
    if not ONLINE:  # noqa: SIM102, `and` would evaluate both sides
        if _any_overflow(False, CONSUMERS):
            before = _turns(parameters)
            _feed(q, k, v, queries, ring, barriers, told, parameters, before, turn, CONSUMERS, STAGES, Q_STAGES)


@gluon.jit
def _attend(
    q, ring, barriers, turn, kv_len, unclean, scale_log2, CONSUMERS: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A consumer's 64 rows over all keys: (accumulator, m_i, l_i per row, the next turn)."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    if unclean != 0:
        # Before a packed sample's first row lies another sample. (Before one that is not packed the copy engine reads
        # zeros.)
        _clean(ring, barriers, turn, kv_len, CONSUMERS, D, STAGES)
    weights, m_i, l_i = _attend_window(q, ring, barriers, turn, kv_len, scale_log2, S, P, D, STAGES)
    acc = gl.zeros([_ROWS, D], gl.float32, OUT)
    blocks = (kv_len - 1) // _KEYS
    weights, acc, m_i, l_i, turn = _attend_blocks(
        q, ring, barriers, turn, blocks, weights, acc, m_i, l_i, scale_log2, kv_len, S, P, D, STAGES, ONLINE, False
    )
    v = _tile(ring, _V, turn, STAGES).reshape([_KEYS, D])
    acc = warpgroup_mma(weights, v, acc)
    _release(barriers, turn, STAGES)
    return acc, m_i, gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, S)), turn + 1


@gluon.jit
def _consume(
    queries, ring, barriers, told, parameters, notes, before, turn, scale_log2, consumer: gl.constexpr,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A consumer's rows of the program's tiles; the ring's next turn."""
    for i in range(_turns(parameters)):
        fed = before + i
        _await_queries(barriers, fed, STAGES, Q_STAGES)
        slot = told.index(fed % Q_STAGES)
        kv_len = _told(slot, _TOLD_KEYS)
        unclean = _told(slot, _TOLD_UNCLEAN)
        if (kv_len > 0) & (_told(slot, _TOLD_QUERIES) > consumer * _ROWS):
            mine = queries.index(fed % Q_STAGES * CONSUMERS + consumer).reshape([_ROWS, D])
            acc, m_i, l_i, turn = _attend(
                mine, ring, barriers, turn, kv_len, unclean, scale_log2, CONSUMERS, D, STAGES, ONLINE
            )
            rows = _told(slot, _TOLD_QUERIES) - consumer * _ROWS
            if not ONLINE:
                _note_overflow(notes.index(consumer), acc, l_i, rows)
            _write_told_rows(parameters, slot, rows, mine, acc, m_i, l_i, consumer, D)
            fence_async_shared()
        else:
            if unclean != 0:
                _meet(CONSUMERS)  # as `_clean` of the others does: were it not all of them, turns would mix
            turn = _stand_aside(barriers, turn, kv_len, STAGES)
            _write_told_empty_rows(parameters, slot, queries.dtype, consumer, D)
        mbarrier.arrive(_queries_empty(barriers, before + i, STAGES, Q_STAGES))
    return turn


@gluon.jit
def _consumer(
    queries, ring, barriers, told, parameters, notes, scale_log2, consumer: gl.constexpr, CONSUMERS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    first = gl.to_tensor(0)
    turn = _consume(
        queries, ring, barriers, told, parameters, notes, first, first, scale_log2, consumer, CONSUMERS, D, STAGES,
        Q_STAGES, ONLINE,
    )  # fmt: skip
    if not ONLINE:
        in_each_thread: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
        if _any_overflow(gl.max(notes.index(consumer).load(in_each_thread), 0) != 0, CONSUMERS):
            before = _turns(parameters)
            _consume(
                queries, ring, barriers, told, parameters, notes, before, turn, scale_log2, consumer, CONSUMERS, D,
                STAGES, Q_STAGES, True,
            )  # fmt: skip


_RUNTIME_INTEGERS = (
    "heads_per_kv", "rows_q", "rows_k", "flags", "heads", "blocks", "items", "whole", "cuts", "active",
)  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME_INTEGERS, do_not_specialize_on_alignment=("scratch", "q_lens", "kv_lens"))
def _hopper_attention(
    q, k, v, out, lse, scratch, q_lens, kv_lens, scale_log2, heads_per_kv, rows_q, rows_k, flags, heads, blocks, items,
    whole, cuts, active,
    CONSUMERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """q, k, v: descriptors of (B, H, S, D) in blocks of (1, 1, 64, D); lens pointers are read where `flags` says so.

    There are samples x heads x blocks of `active` x 64 queries; only so many consumers compute. The last of these tiles
    are cut into parts, see `tail`: `items` counts the `whole` ones and the parts.
    """
    scale_log2 = gl.maximum(scale_log2, _LEAST_SCALE)
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
    told = gl.allocate_shared_memory(gl.int32, [Q_STAGES, _TOLD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    parameters = gl.allocate_shared_memory(gl.int64, [_PARAMETERS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _park(
        parameters, out, lse, scratch, q_lens, kv_lens, heads_per_kv, rows_q, rows_k, flags, heads, blocks, items,
        whole, cuts, active, gl.to_tensor(0),
    )  # fmt: skip
    _thread_barrier()
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_producer, (q, k, v, queries, ring, barriers, told, parameters, CONSUMERS, STAGES, Q_STAGES, ONLINE)),
                (_consumer, (
                    queries, ring, barriers, told, parameters, notes, scale_log2, 0, CONSUMERS, D, STAGES, Q_STAGES,
                    ONLINE,
                )),
                (_consumer, (
                    queries, ring, barriers, told, parameters, notes, scale_log2, 1, CONSUMERS, D, STAGES, Q_STAGES,
                    ONLINE,
                )),
                (_consumer, (
                    queries, ring, barriers, told, parameters, notes, scale_log2, 2, CONSUMERS, D, STAGES, Q_STAGES,
                    ONLINE,
                )),
            ],
            [4, 4, 4],
            [160, 160, 160],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_producer, (q, k, v, queries, ring, barriers, told, parameters, CONSUMERS, STAGES, Q_STAGES, ONLINE)),
                (_consumer, (
                    queries, ring, barriers, told, parameters, notes, scale_log2, 0, CONSUMERS, D, STAGES, Q_STAGES,
                    ONLINE,
                )),
            ],
            [4],
            [168],
        )  # fmt: skip


class _Plan(NamedTuple):
    """What a launch needs besides its tensors."""

    launcher: Launcher
    grid: tuple[int, int, int]
    descriptors: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # shape and strides of q, k, v
    integers: tuple[int, ...]
    tail: Tail


@functools.cache
def _launchers(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[HopperConfig, Launcher]:
    of_queries, of_keys = (_make_descriptor(rows, head_dim, dtype) for rows in (ROWS, KEYS))
    return {
        config: Launcher(
            _hopper_attention, device, {"q": of_queries, "k": of_keys, "v": of_keys},
            CONSUMERS=config.consumers, D=head_dim, STAGES=config.stages, Q_STAGES=config.query_stages,
            ONLINE=dtype == torch.float16, num_warps=4, maxnreg=config.max_registers,
        )
        for config in (CONFIGS[head_dim], SMALL_CONFIGS[head_dim])
    }  # fmt: skip


# What `_compile_all` has been done for.
_compiled: set[tuple[torch.device, torch.dtype, int]] = set()


def _compile_all(out: torch.Tensor, lse: torch.Tensor, tail: Tail, arguments: tuple[object, ...]) -> None:
    """Compile every variant for a device, type and head dim at the first call: no later length waits for one."""
    key = (out.device, out.dtype, out.shape[-1])
    if key not in _compiled:
        for launcher in _launchers(*key).values():
            launcher.compile(*arguments)
        tail.compile(out, lse)
        _compiled.add(key)


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
    packed = packed_max_q is not None
    choice = choose(head_dim, max_q, rows_k, heads, samples, processors, uneven=uneven, whole=packed)
    work = choice.work(max_q, heads, samples, processors, heads_last=False)
    if None in descriptors or work.items >= 2**31:
        return None
    launcher = _launchers(device, dtype, head_dim)[choice.config]
    integers = (heads // kv_heads, rows_q, rows_k, flags, heads, *work.integers)
    return _Plan(launcher, (work.programs, 1, 1), descriptors, integers, work.tail)  # pyright: ignore[reportArgumentType]


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
    launcher, grid, (q_map, k_map, v_map), integers, tail = plan
    if 0 in grid:
        return True
    # A pointer that is not followed stands in for what there is not: None would be another compiled variant.
    unused = out.view(torch.int32) if q_lens is None or kv_lens is None else None
    scratch = tail.scratch(out) if tail.parts else out.view(torch.float32)
    arguments = (
        (q, *q_map), (k, *k_map), (v, *v_map), out, lse, scratch, unused if q_lens is None else q_lens,
        unused if kv_lens is None else kv_lens, scale * _LOG2_E, *integers,
    )  # fmt: skip
    _compile_all(out, lse, tail, arguments)
    launcher(grid, *arguments)
    tail.merge(scratch, out, lse)
    if keep_plan:
        launcher.keep_attention_plan(
            q=q, k=k, v=v, q_lens=q_lens, kv_lens=kv_lens, packed_max_q=packed_max_q, grid=grid,
            sources=(q_map, k_map, v_map), has_scratch=True, lens_are_pointers=True, integers=integers,
            merge=tail.merging(out, scratch.numel()) if tail.parts else None,
        )  # fmt: skip
    return True


def compile_count() -> int:
    """How many variants of the kernel this process holds, over all devices: one for each type and head dim."""
    return sum(len(caches[0]) for caches in _hopper_attention.device_caches.values())
