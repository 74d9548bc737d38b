"""The softmax's steps of the Hopper kernel of 8 bits, and the products before and after it.

How they work together, and why they are as they are, is told in `hopper_attention_int8`.
"""

# Gluon's annotations are of what the compiler holds, not of what Python sees.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from .hopper_tiles import _ROWS

_BITS_OF_OFFSET = gl.constexpr(0x4B400000)
_OFFSET = gl.constexpr(12582912.0)  # 1.5 * 2^23
_LOG2_OF_WEIGHTS = gl.constexpr(8.0)
_LOG2_OF_HEADROOM = gl.constexpr(0.8)  # e4m3 ends at 448: so much may a score exceed what stands for its row's maximum
_RESCALED_AT_A_TIME = gl.constexpr(32)
_CHAINS = gl.constexpr(4)


def _weights_asm() -> str:
    """16 exponents to their weights in e4m3, four to a register, and as floats."""
    body = "".join(f"ex2.approx.ftz.f32 p{i}, ${20 + i};\n" for i in range(16))
    body += "".join(f"cvt.rn.satfinite.e4m3x2.f32 h{i}, p{2 * i + 1}, p{2 * i};\n" for i in range(8))
    body += "".join(f"mov.b32 ${i}, {{h{2 * i}, h{2 * i + 1}}};\n" for i in range(4))
    body += "".join(f"mov.b32 ${4 + i}, p{i};\n" for i in range(16))
    return "{.reg .f32 p<16>; .reg .b16 h<8>;\n" + body + "}"


def _rescaling_asm(count: int) -> str:
    """So many elements of an accumulator times their rows' factors; skipped where those of a warp's rows are all 1."""
    body = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};\n" for i in range(count))
    return (
        "{.reg .pred p, q;\n"
        # An accumulator's elements in a thread are two of one row, then two of another.
        f"setp.neu.f32 p, ${2 * count}, 0f3F800000;\n"
        f"setp.neu.or.f32 q, ${2 * count + 2}, 0f3F800000, p;\n"
        "vote.sync.any.pred p, q, 0xffffffff;\n"
        f"@!p bra SAME;\n{body}SAME:\n}}"
    )


def _rescaling_constraints(count: int) -> str:
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


_ASM = gl.constexpr(_weights_asm())
_CONSTRAINTS = gl.constexpr(",".join(["=r"] * 4 + ["=f"] * 16 + ["f"] * 16))
_RESCALING_ASM = gl.constexpr(_rescaling_asm(_RESCALED_AT_A_TIME.value))
_RESCALING_CONSTRAINTS = gl.constexpr(_rescaling_constraints(_RESCALED_AT_A_TIME.value))


@gluon.jit
def _maximum(scores, m_i, factor):
    """What stands for the rows' maximum, in exponents of two, after these scores (integers with their offset): no score
    exceeds it by more than the headroom.

    In steps, so that what depends on what is short: a row's 32 scores in a thread are four chains instead of one, and
    both rows of a thread go through the shuffles together.
    """
    rows: gl.constexpr = scores.shape[0]
    eighths: gl.constexpr = scores.shape[1] // 8
    x = scores.reshape([rows, _CHAINS, eighths // _CHAINS, 2, 2, 2]).permute((0, 3, 4, 1, 2, 5))
    x = gl.max(x.reshape([rows, 2, 2, _CHAINS, 2 * eighths // _CHAINS]), 4)
    highest = gl.max(gl.max(gl.max(x, 3), 2), 1)
    highest = gl.convert_layout(highest, m_i.type.layout, assert_trivial=True).to(gl.float32, bitcast=True)
    highest = (highest - _OFFSET) * factor
    return gl.where(highest > m_i + _LOG2_OF_HEADROOM, highest, m_i)


@gluon.jit
def _exponents(scores, m_i, factor):
    """Of the weights, as powers of two."""
    s = scores.to(gl.float32, bitcast=True)
    return gl.fma(s, gl.expand_dims(factor, 1), gl.expand_dims(_LOG2_OF_WEIGHTS - (m_i + _OFFSET * factor), 1))


@gluon.jit
def _masked(exponents, exists):
    return gl.where(exists, exponents, -200.0)


@gluon.jit
def _weights(exponents, layout: gl.constexpr):
    """(weights as the second product's left operand, their sums in each thread)."""
    rows: gl.constexpr = exponents.shape[0]
    keys: gl.constexpr = exponents.shape[1]
    x = exponents.reshape([rows, keys // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([rows, keys])
    x = gl.convert_layout(x, layout, assert_trivial=True)
    p, exact = gl.inline_asm_elementwise(
        _ASM, _CONSTRAINTS, [x], dtype=(gl.float8e4nv, gl.float32), is_pure=True, pack=16
    )
    # One sum of a row in each thread: with four, the maximum has too few registers to take two rows at a time.
    exact = exact.reshape([rows, keys // 16, 4, 4]).permute((0, 2, 1, 3)).reshape([rows, 4, keys // 4])
    return p, gl.sum(exact, 2)


@gluon.constexpr_function
def _layout_of_scores(keys: int):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, keys, 32])


@gluon.jit
def _scores(q, k, layout: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr):
    """q k^T of a block with its offset, in flight."""
    keys = k.reshape([KEYS, D]).permute((1, 0))
    start = gl.full([_ROWS, KEYS], _BITS_OF_OFFSET, gl.int32, layout)
    return warpgroup_mma(q, keys, start, is_async=True)


@gluon.jit
def _product(product, p, v, KEYS: gl.constexpr, D: gl.constexpr):
    """`product` and weights times values of a block, in flight."""
    return warpgroup_mma(p, v.reshape([D, KEYS]).permute((1, 0)), product, is_async=True)


@gluon.jit
def _by_rows(x, like):
    """(rows, 1), in the layout of `like`."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout)), 1)


@gluon.jit
def _followed(product, alpha):
    """`product` rescaled to another maximum."""
    return gl.inline_asm_elementwise(
        _RESCALING_ASM, _RESCALING_CONSTRAINTS, [product, _by_rows(alpha, product)], dtype=gl.float32, is_pure=False,
        pack=_RESCALED_AT_A_TIME,
    )  # fmt: skip
