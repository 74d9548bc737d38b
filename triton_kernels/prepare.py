"""From the projections' output to attention's input in one pass: norm, RoPE, joining of streams, head-major layout.

Numbers of norms: 0 none; 2 layer norm; odd: RMS norm, + 2 where the mean runs over all heads' channels, + 4 where
the normalised value is rounded before it meets the weight. Values are rounded where the unfused expressions of
diffusers round: after the norm and after RoPE.

A program takes some rows of one projection through some of its heads, one head after the other: reading 256 bytes a
row and head, writing BLOCK_S rows of one head side by side. RoPE's angles stay in registers meanwhile.
"""

# Of a function that Triton compiles, pyright takes a result for what Python would return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launcher

# Elements of a program's tile, heads that it goes through, and warps; `python -m benchmarks.prepare_report --tune`
# measures others.
TILE, HEADS, WARPS = 2048, 8, 4

_RUNTIME_INTEGERS = (
    "rows", "heads", "q_out_b", "q_out_h", "out_b", "out_h", "first", "groups", "group", "row_blocks",
    "q_stride_b", "q_stride_s", "q_stride_h", "k_stride_b", "k_stride_s", "k_stride_h",
    "v_stride_b", "v_stride_s", "v_stride_h", "angle_stride_s", "angle_stride_h",
)  # fmt: skip


@triton.jit
def _load_pairs(pointers, d, mask, D: tl.constexpr, HALF: tl.constexpr):
    """Both channels of each pair, (..., BLOCK_D / 2) each. `pointers` are to channel 0; d counts channels, or pairs in
    half form.
    """
    if HALF:
        a = tl.load(pointers + d, mask=mask & (d < D // 2), other=0.0)
        b = tl.load(pointers + D // 2 + d, mask=mask & (d < D // 2), other=0.0)
        return a, b
    else:
        x = tl.load(pointers + d, mask=mask & (d < D), other=0.0)
        return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _load_angles(pointers, d, mask, D: tl.constexpr, HALF: tl.constexpr, PAIRED: tl.constexpr):
    """One value for each pair. PAIRED: as they lie in memory; else they stand at both channels: the first is read."""
    if HALF or PAIRED:
        return tl.load(pointers + d, mask=mask & (d < D // 2), other=0.0)
    else:
        first, _ = _load_pairs(pointers, d, mask, D, HALF)
        return first


@triton.jit
def _store_pairs(pointers, d, mask, a, b, D: tl.constexpr, HALF: tl.constexpr):
    if HALF:
        tl.store(pointers + d, a, mask=mask & (d < D // 2))
        tl.store(pointers + D // 2 + d, b, mask=mask & (d < D // 2))
    else:
        x = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1] * 2])
        tl.store(pointers + d, x, mask=mask & (d < D))


@triton.jit
def _load_parameter(parameter, head, d, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """A norm's weight or bias for one head, as pairs (1, BLOCK_D / 2), float32."""
    pointer = parameter
    if NORM % 2 == 1 and NORM & 2 != 0:
        pointer += head * D
    a, b = _load_pairs(pointer, d, d >= 0, D, HALF)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _normed(
    a, b, pair, squares, weight_a, weight_b, bias_a, bias_b, heads, eps, weight, bias,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Pairs a, b of float32 after the norm, rounded as diffusers rounds. `pair` masks the pairs' channels."""
    if NORM == 2:
        mean = (tl.sum(a, 1) + tl.sum(b, 1)) / D
        # What is masked must not count as a distance from the mean.
        in_a = pair < D // 2 if HALF else pair * 2 < D
        in_b = pair < D // 2 if HALF else pair * 2 + 1 < D
        a = tl.where(in_a, a - mean[:, None], 0.0)
        b = tl.where(in_b, b - mean[:, None], 0.0)
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        count = D
    elif NORM & 2 != 0:
        count = heads * D
    else:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        count = D
    scale = tl.rsqrt(squares / count + eps)[:, None]
    a, b = a * scale, b * scale
    if NORM & 4 != 0:
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    if weight is not None:
        a, b = a * weight_a, b * weight_b
        if bias is not None:  # noqa: SIM102
            if NORM & 4 != 0:
                a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    if bias is not None:
        a, b = a + bias_a, b + bias_b
    return a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)


@triton.jit
def _prepare_rows(
    x, out, weight, bias, eps, cos, sin, row_block, batch, head, last_head,
    rows, heads, out_b, out_h, first, stride_b, stride_s, stride_h, angle_stride_s, angle_stride_h,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    PAIRED: tl.constexpr, OF_HEADS: tl.constexpr,
):  # fmt: skip
    """BLOCK_S rows of one projection, heads `head` ... `last_head` - 1. RoPE where `cos` is not None."""
    dtype: tl.constexpr = out.dtype.element_ty
    OVER_HEADS: tl.constexpr = NORM % 2 == 1 and NORM & 2 != 0
    s = row_block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (s < rows)[:, None]
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    d = pair if HALF else tl.arange(0, BLOCK_D)[None, :]
    angle_d = pair if PAIRED else d
    s = s.to(tl.int64)[:, None]
    source = x + batch * stride_b + s * stride_s
    target = out + (batch * out_b + first + s) * D

    row_cos, row_sin = 0.0, 0.0
    if cos is not None and not OF_HEADS:
        row_cos = _load_angles(cos + s * angle_stride_s, angle_d, mask, D, HALF, PAIRED)
        row_sin = _load_angles(sin + s * angle_stride_s, angle_d, mask, D, HALF, PAIRED)
    weight_a, weight_b, bias_a, bias_b = 0.0, 0.0, 0.0, 0.0
    if weight is not None and not OVER_HEADS:
        weight_a, weight_b = _load_parameter(weight, 0, d, D, HALF, NORM)
    if bias is not None and not OVER_HEADS:
        bias_a, bias_b = _load_parameter(bias, 0, d, D, HALF, NORM)

    squares = tl.zeros([BLOCK_S], tl.float32)
    if OVER_HEADS:
        # The rows come a second time below, from the L2.
        for h in range(heads):
            a, b = _load_pairs(source + h * stride_h, d, mask, D, HALF)
            a, b = a.to(tl.float32), b.to(tl.float32)
            squares += tl.sum(a * a, 1) + tl.sum(b * b, 1)

    next_a, next_b = _load_pairs(source + head * stride_h, d, mask, D, HALF)
    for h in range(head, last_head):
        a, b = next_a, next_b
        # The next head's rows are asked for before this one's are written, past which a load cannot be moved.
        another = s < tl.where(h + 1 < last_head, rows, 0)
        next_a, next_b = _load_pairs(source + (h + 1) * stride_h, d, another, D, HALF)
        if NORM != 0:
            w_a, w_b, c_a, c_b = weight_a, weight_b, bias_a, bias_b
            if weight is not None and OVER_HEADS:
                w_a, w_b = _load_parameter(weight, h, d, D, HALF, NORM)
            if bias is not None and OVER_HEADS:
                c_a, c_b = _load_parameter(bias, h, d, D, HALF, NORM)
            a, b = _normed(
                a.to(tl.float32), b.to(tl.float32), pair, squares, w_a, w_b, c_a, c_b, heads, eps, weight, bias,
                D, HALF, NORM, dtype,
            )  # fmt: skip
        if cos is not None:
            c, e = row_cos, row_sin
            if OF_HEADS:
                angles = s * angle_stride_s + h * angle_stride_h
                c = _load_angles(cos + angles, angle_d, mask, D, HALF, PAIRED)
                e = _load_angles(sin + angles, angle_d, mask, D, HALF, PAIRED)
            a, b = a.to(tl.float32), b.to(tl.float32)
            a, b = a * c - b * e, b * c + a * e
        _store_pairs(target + h * out_h * D, d, mask, a.to(dtype), b.to(dtype), D, HALF)


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS)
def _prepare(
    q, k, v, q_out, k_out, v_out, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, cos, sin,
    rows, heads, q_out_b, q_out_h, out_b, out_h, first, groups, group, row_blocks,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    angle_stride_s, angle_stride_h,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr, PAIRED: tl.constexpr, OF_HEADS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    VEC: tl.constexpr, ANGLE_VEC: tl.constexpr,
):  # fmt: skip
    """COUNT of (q, k, v) from FIRST on, of one stream, into the rows from `first` on of outputs whose samples are
    `out_b` rows apart and heads `out_h`; queries have their own.

    The programs of one block of rows follow each other, so that its angles are read from memory once. Strides arrive
    divided by VEC, those of the angles by ANGLE_VEC.
    """
    pid = tl.program_id(0)
    which = pid % COUNT + FIRST
    head = (pid // COUNT) % groups * group
    row_block = (pid // (COUNT * groups)) % row_blocks
    batch = (pid // (COUNT * groups * row_blocks)).to(tl.int64)
    last_head = tl.minimum(head + group, heads)
    q_out_b, q_out_h, out_b, out_h = q_out_b.to(tl.int64), q_out_h.to(tl.int64), out_b.to(tl.int64), out_h.to(tl.int64)
    angle_stride_s = angle_stride_s.to(tl.int64) * ANGLE_VEC
    angle_stride_h = angle_stride_h.to(tl.int64) * ANGLE_VEC
    if FIRST == 0:  # noqa: SIM102 (decided before compilation, which `and` would not be)
        if which == 0:
            _prepare_rows(
                q, q_out, q_weight, q_bias, q_eps, cos, sin, row_block, batch, head, last_head, rows, heads, q_out_b,
                q_out_h, first,
                q_stride_b.to(tl.int64) * VEC, q_stride_s.to(tl.int64) * VEC, q_stride_h.to(tl.int64) * VEC,
                angle_stride_s, angle_stride_h, D, BLOCK_S, BLOCK_D, HALF, Q_NORM, PAIRED, OF_HEADS,
            )  # fmt: skip
    if FIRST + COUNT > 1:  # noqa: SIM102
        if which == 1:
            _prepare_rows(
                k, k_out, k_weight, k_bias, k_eps, cos, sin, row_block, batch, head, last_head, rows, heads, out_b,
                out_h, first,
                k_stride_b.to(tl.int64) * VEC, k_stride_s.to(tl.int64) * VEC, k_stride_h.to(tl.int64) * VEC,
                angle_stride_s, angle_stride_h, D, BLOCK_S, BLOCK_D, HALF, K_NORM, PAIRED, OF_HEADS,
            )  # fmt: skip
    if FIRST + COUNT > 2:  # noqa: SIM102
        if which == 2:
            _prepare_rows(
                v, v_out, None, None, 0.0, None, None, row_block, batch, head, last_head, rows, heads, out_b, out_h,
                first, v_stride_b.to(tl.int64) * VEC, v_stride_s.to(tl.int64) * VEC, v_stride_h.to(tl.int64) * VEC,
                angle_stride_s, angle_stride_h, D, BLOCK_S, BLOCK_D, HALF, 0, False, False,
            )  # fmt: skip


class _Plan(NamedTuple):
    """What the launch for one stream needs besides its tensors and where its rows go."""

    launcher: Launcher
    programs: int
    groups: tuple[int, int, int]
    strides: tuple[int, ...]


def _divided(strides: Sequence[int], width: int) -> tuple[tuple[int, ...], int]:
    """Strides divided by the elements of a 16-byte access if all are multiples of it, and by what."""
    width = width if all(stride % width == 0 for stride in strides) else 1
    return tuple(stride // width for stride in strides), width


# Nothing but shapes, strides and types goes in, so that a call like an earlier one finds its launch ready.
@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, strides: tuple[tuple[int, ...], ...], norms: tuple[int, ...], dtype: torch.dtype,
    device: torch.device, angles: torch.Size | None, angle_strides: tuple[int, ...], half: bool, first_part: int,
) -> _Plan:  # fmt: skip
    batch, rows, heads, head_dim = shape
    block_d = 2 * triton.next_power_of_2(triton.cdiv(head_dim, 2))
    block_s = max(1, TILE // block_d)
    # A mean over all heads needs them in one program.
    group = heads if any(norm % 2 and norm & 2 for norm in norms) else min(heads, HEADS)
    groups, row_blocks = triton.cdiv(heads, group), triton.cdiv(rows, block_s)
    of_inputs, vec = _divided([x for stride in strides for x in stride[:3]], 16 // dtype.itemsize)
    of_inputs = (0, 0, 0) * first_part + of_inputs
    of_inputs += (0,) * (9 - len(of_inputs))
    q_norm, k_norm, *_ = (0,) * first_part + norms + (0, 0)
    of_angles, angle_vec = _divided((*angle_strides[:-1], 0, 0)[:2], 4)
    constants = {
        "D": head_dim, "BLOCK_S": block_s, "BLOCK_D": block_d, "HALF": half and angles is not None, "Q_NORM": q_norm,
        "K_NORM": k_norm, "PAIRED": angles is not None and angles[-1] != head_dim,
        "OF_HEADS": angles is not None and len(angles) == 3, "FIRST": first_part, "COUNT": len(strides),
        "VEC": vec, "ANGLE_VEC": angle_vec,
    }  # fmt: skip
    launcher = _launcher(device, dtype, WARPS, *constants.items())
    return _Plan(
        launcher, batch * row_blocks * groups * len(strides), (groups, group, row_blocks), of_inputs + of_angles
    )  # fmt: skip


def prepare_forward(
    projections: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    norms: Sequence[int],
    eps: Sequence[float],
    cos: Sequence[torch.Tensor | None],
    sin: Sequence[torch.Tensor | None],
    half: bool,
    first_part: int = 0,
) -> None:
    """One launch for each stream that has rows.

    Args:
        projections: (B, S, H, D), D contiguous; q, or q and k, or q, k and v of the first stream, then of the next.
        outputs: (B, sum of S, H, D), as many as a stream has projections: rows of a head one behind the other, samples
            and heads any number of rows apart, the same for keys and values.
        weights, biases, norms, eps: of the norm of each projection.
        cos, sin: RoPE's angles of each stream.
        half: whether channels i and i + D / 2 make a pair, not 2i and 2i + 1.
        first_part: of q, k and v the first one that is there: with 1, a stream has k, or k and v.
    """
    count = len(outputs)
    heads = outputs[0].shape[2]
    of_queries, of_keys = _rows_apart(outputs[0]), _rows_apart(outputs[-1])
    first = 0
    for i in range(len(cos)):
        begin = i * count
        parts = projections[begin : begin + count]
        if parts[0].numel():
            angle = cos[i]
            plan = _plan(
                parts[0].shape, tuple(x.stride() for x in parts), tuple(norms[begin : begin + count][: 2 - first_part]),
                parts[0].dtype, parts[0].device, None if angle is None else angle.shape,
                () if angle is None else angle.stride(), half, first_part,
            )  # fmt: skip
            of_norms = (values[begin : begin + count] for values in (weights, biases, eps))
            arguments = _of_stream(parts, outputs, *of_norms, first_part)
            plan.launcher(
                (plan.programs, 1, 1), *arguments, angle, sin[i], parts[0].shape[1], heads, *of_queries, *of_keys,
                first, *plan.groups, *plan.strides,
            )  # fmt: skip
        first += parts[0].shape[1]


def _rows_apart(out: torch.Tensor) -> tuple[int, int]:
    """Of an output's samples and heads."""
    samples, rows, heads, head_dim = out.stride(0), out.stride(1), out.stride(2), out.shape[3]
    assert out.stride(3) == 1
    assert samples % head_dim == heads % head_dim == 0
    assert rows == head_dim or out.shape[1] <= 1
    return samples // head_dim, heads // head_dim


def _of_stream(
    parts: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None], eps: Sequence[float], first_part: int,
) -> tuple[Any, ...]:  # fmt: skip
    """The kernel's arguments up to the angles; None and 0 for what is not there."""

    def placed(values: Sequence[Any], absent: Any) -> list[Any]:
        return [*[absent] * first_part, *values, *[absent] * (3 - first_part - len(values))]

    (q_weight, k_weight, _), (q_bias, k_bias, _), (q_eps, k_eps, _) = (
        placed(weights, None), placed(biases, None), placed([float(x) for x in eps], 0.0)
    )  # fmt: skip
    return *placed(parts, None), *placed(outputs, None), q_weight, q_bias, k_weight, k_bias, q_eps, k_eps


@functools.cache
def _launcher(device: torch.device, dtype: torch.dtype, warps: int, *constants: tuple[str, int]) -> Launcher:
    """The launches of one compiled variant."""
    return Launcher(_prepare, device, **dict(constants), num_warps=warps)
