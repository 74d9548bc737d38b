"""The softmax's steps of the Hopper kernels of 16 bits, over tiles of keys."""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .hopper_tiles import _K, _KEYS, _ROWS, _V, _release, _tile, _wait_full

_LOG2_E = 1.4426950408889634
# What a scale of 0 becomes: masked scores are -inf, and 0 * -inf is NaN.
_LEAST_SCALE = gl.constexpr(1e-30)


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
def _note_overflow(notes, acc, l_i, alive_rows):
    """Set a warp's note if a sum of its rows is not finite: 0 * x is 0 for finite x only. Rows past the queries do not
    count."""
    probe = gl.convert_layout(gl.sum(_sum_in_thread(acc * 0.0), 1), l_i.type.layout) + l_i * 0.0
    alive = gl.arange(0, _ROWS, layout=l_i.type.layout) < alive_rows
    by_warp = gl.max(gl.where(alive & (probe != 0.0), 1, 0).reshape([4, _ROWS // 4]), 1)
    notes.store(notes.load(by_warp.type.layout) | by_warp)
