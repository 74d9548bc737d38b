"""From the projections' output to attention's input in one pass: norm, RoPE, joining of streams, head-major layout.

Numbers of norms: 0 none; 2 layer norm; odd: RMS norm, + 2 where the mean runs over all heads' channels, + 4 where
the normalised value is rounded before it meets the weight. Values are rounded where the unfused expressions of
diffusers round: after the norm and after RoPE.

A program takes some rows of one projection through some of its heads, one head after the other: reading 256 bytes a
row and head, writing BLOCK_S rows of one head side by side. RoPE's angles stay in registers meanwhile.

Two streams whose norms and angles are of one kind share a launch. With FLUX's 512 tokens of text, the text's own took 9
to 10 us of the GPU for the bytes of 3, and as long as a kernel's start again before the other (H200).
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
    "rows", "first", "row_blocks", "q_stride_b", "k_stride_b", "v_stride_b",
    "rows_2", "first_2", "row_blocks_2", "q_stride_b_2", "k_stride_b_2", "v_stride_b_2",
    "heads", "q_out_b", "q_out_h", "out_b", "out_h", "groups", "group",
    "q_stride_s", "q_stride_h", "k_stride_s", "k_stride_h", "v_stride_s", "v_stride_h", "angle_stride_s",
    "angle_stride_h",
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
    q, k, v, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, cos, sin,
    q_2, k_2, v_2, q_weight_2, q_bias_2, k_weight_2, k_bias_2, q_eps_2, k_eps_2, cos_2, sin_2,
    rows, first, row_blocks, q_stride_b, k_stride_b, v_stride_b,
    rows_2, first_2, row_blocks_2, q_stride_b_2, k_stride_b_2, v_stride_b_2,
    q_out, k_out, v_out, heads, q_out_b, q_out_h, out_b, out_h, groups, group,
    q_stride_s, q_stride_h, k_stride_s, k_stride_h, v_stride_s, v_stride_h, angle_stride_s, angle_stride_h,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr, PAIRED: tl.constexpr, OF_HEADS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    VEC: tl.constexpr, ANGLE_VEC: tl.constexpr,
):  # fmt: skip
    """COUNT of (q, k, v) from FIRST on, of one stream or two, into the rows from each stream's `first` on of outputs
    whose samples are `out_b` rows apart and heads `out_h`; queries have their own.

    The programs of one block of rows follow each other, so that its angles are read from memory once. Strides arrive
    divided by VEC, those of the angles by ANGLE_VEC. With one stream, `row_blocks_2` is 0.
    """
    pid = tl.program_id(0)
    which = pid % COUNT + FIRST
    head = (pid // COUNT) % groups * group
    blocks = row_blocks + row_blocks_2
    row_block = (pid // (COUNT * groups)) % blocks
    batch = (pid // (COUNT * groups * blocks)).to(tl.int64)
    last_head = tl.minimum(head + group, heads)
    second = row_block >= row_blocks
    row_block -= tl.where(second, row_blocks, 0)
    rows, first = tl.where(second, rows_2, rows), tl.where(second, first_2, first)
    if cos is not None:
        cos, sin = tl.where(second, cos_2, cos), tl.where(second, sin_2, sin)
    q_out_b, q_out_h, out_b, out_h = q_out_b.to(tl.int64), q_out_h.to(tl.int64), out_b.to(tl.int64), out_h.to(tl.int64)
    angle_stride_s = angle_stride_s.to(tl.int64) * ANGLE_VEC
    angle_stride_h = angle_stride_h.to(tl.int64) * ANGLE_VEC
    if FIRST == 0:
        if q_weight is not None:
            q_weight = tl.where(second, q_weight_2, q_weight)
        if q_bias is not None:
            q_bias = tl.where(second, q_bias_2, q_bias)
        if which == 0:
            _prepare_rows(
                tl.where(second, q_2, q), q_out, q_weight, q_bias, tl.where(second, q_eps_2, q_eps), cos, sin,
                row_block, batch, head, last_head, rows, heads, q_out_b, q_out_h, first,
                tl.where(second, q_stride_b_2, q_stride_b).to(tl.int64) * VEC, q_stride_s.to(tl.int64) * VEC,
                q_stride_h.to(tl.int64) * VEC, angle_stride_s, angle_stride_h, D, BLOCK_S, BLOCK_D, HALF, Q_NORM,
                PAIRED, OF_HEADS,
            )  # fmt: skip
    if FIRST + COUNT > 1:
        if k_weight is not None:
            k_weight = tl.where(second, k_weight_2, k_weight)
        if k_bias is not None:
            k_bias = tl.where(second, k_bias_2, k_bias)
        if which == 1:
            _prepare_rows(
                tl.where(second, k_2, k), k_out, k_weight, k_bias, tl.where(second, k_eps_2, k_eps), cos, sin,
                row_block, batch, head, last_head, rows, heads, out_b, out_h, first,
                tl.where(second, k_stride_b_2, k_stride_b).to(tl.int64) * VEC, k_stride_s.to(tl.int64) * VEC,
                k_stride_h.to(tl.int64) * VEC, angle_stride_s, angle_stride_h, D, BLOCK_S, BLOCK_D, HALF, K_NORM,
                PAIRED, OF_HEADS,
            )  # fmt: skip
    if FIRST + COUNT > 2:  # noqa: SIM102 (decided before compilation, which `and` would not be)
        if which == 2:
            _prepare_rows(
                tl.where(second, v_2, v), v_out, None, None, 0.0, None, None,
                row_block, batch, head, last_head, rows, heads, out_b, out_h, first,
                tl.where(second, v_stride_b_2, v_stride_b).to(tl.int64) * VEC, v_stride_s.to(tl.int64) * VEC,
                v_stride_h.to(tl.int64) * VEC, angle_stride_s, angle_stride_h, D, BLOCK_S, BLOCK_D, HALF, 0,
                False, False,
            )  # fmt: skip


class _Kind(NamedTuple):
    """All of a stream that the compiled variant and the launch of it fix: streams of one kind can share it."""

    heads: int
    group: int
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...]
    angle_strides: tuple[int, ...]
    rotated: bool
    parameters: tuple[torch.dtype | None, ...]
    constants: tuple[tuple[str, int], ...]


class _Plan(NamedTuple):
    """What the launch for one stream needs besides its tensors and where its rows go."""

    kind: _Kind
    launcher: Launcher
    programs_of_block: int
    blocks: int
    stride_b: tuple[int, ...]


def _divided(strides: Sequence[int], width: int) -> tuple[tuple[int, ...], int]:
    """Strides divided by the elements of a 16-byte access if all are multiples of it, and by what."""
    width = width if all(stride % width == 0 for stride in strides) else 1
    return tuple(stride // width for stride in strides), width


# Nothing but shapes, strides and types goes in, so that a call like an earlier one finds its launch ready.
@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, strides: tuple[tuple[int, ...], ...], norms: tuple[int, ...], dtype: torch.dtype,
    device: torch.device, angles: torch.Size | None, angle_strides: tuple[int, ...], half: bool, first_part: int,
    parameters: tuple[torch.dtype | None, ...],
) -> _Plan:  # fmt: skip
    batch, rows, heads, head_dim = shape
    block_d = 2 * triton.next_power_of_2(triton.cdiv(head_dim, 2))
    block_s = max(1, TILE // block_d)
    # A mean over all heads needs them in one program.
    group = heads if any(norm % 2 and norm & 2 for norm in norms) else min(heads, HEADS)
    absent = (0, 0, 0) * first_part
    divided, vec = _divided([x for stride in strides for x in stride[:3]], 16 // dtype.itemsize)
    divided = absent + divided + (0,) * (9 - len(absent) - len(divided))
    q_norm, k_norm, *_ = (0,) * first_part + norms + (0, 0)
    of_angles, angle_vec = _divided((*angle_strides[:-1], 0, 0)[:2], 4)
    constants = {
        "D": head_dim, "BLOCK_S": block_s, "BLOCK_D": block_d, "HALF": half and angles is not None, "Q_NORM": q_norm,
        "K_NORM": k_norm, "PAIRED": angles is not None and angles[-1] != head_dim,
        "OF_HEADS": angles is not None and len(angles) == 3, "FIRST": first_part, "COUNT": len(strides),
        "VEC": vec, "ANGLE_VEC": angle_vec,
    }  # fmt: skip
    within = tuple(x for i, x in enumerate(divided) if i % 3)
    kind = _Kind(
        heads, group, dtype, device, within, of_angles, angles is not None, parameters, tuple(constants.items())
    )  # fmt: skip
    launcher = _launcher(device, dtype, WARPS, *constants.items())
    return _Plan(
        kind, launcher, batch * triton.cdiv(heads, group) * len(strides), triton.cdiv(rows, block_s), divided[::3]
    )


class _Rows(NamedTuple):
    """One stream's part of a launch: its tensors, in the kernel's order, and where its rows go."""

    plan: _Plan
    tensors: tuple[Any, ...]
    rows: int
    first: int

    @property
    def integers(self) -> tuple[int, ...]:
        return self.rows, self.first, self.plan.blocks, *self.plan.stride_b


_NO_ROWS = (0, 0, 0, 0, 0, 0)


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
    """One launch for each stream that has rows, or for two that are of one kind.

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
    waiting: _Rows | None = None
    first = 0
    for i in range(len(cos)):
        mine = slice(i * count, (i + 1) * count)
        parts, angle = projections[mine], cos[i]
        rows = parts[0].shape[1]
        if parts[0].numel():
            parameters = tuple(None if x is None else x.dtype for values in (weights, biases) for x in values[mine])
            plan = _plan(
                parts[0].shape, tuple(x.stride() for x in parts), tuple(norms[mine][: 2 - first_part]),
                parts[0].dtype, parts[0].device, None if angle is None else angle.shape,
                () if angle is None else angle.stride(), half, first_part, parameters,
            )  # fmt: skip
            tensors = _tensors(parts, weights[mine], biases[mine], eps[mine], angle, sin[i], first_part)
            stream = _Rows(plan, tensors, rows, first)
            if waiting is not None and waiting.plan.kind == plan.kind:
                _launch(waiting, stream, outputs, first_part)
                waiting = None
            else:
                if waiting is not None:
                    _launch(waiting, None, outputs, first_part)
                waiting = stream
        first += rows
    if waiting is not None:
        _launch(waiting, None, outputs, first_part)


def _launch(one: _Rows, other: _Rows | None, outputs: Sequence[torch.Tensor], first_part: int) -> None:
    kind = one.plan.kind
    blocks = one.plan.blocks + (0 if other is None else other.plan.blocks)
    # A stream that is not there has the other's tensors: None would be another compiled variant.
    second, integers = (one.tensors, _NO_ROWS) if other is None else (other.tensors, other.integers)
    one.plan.launcher(
        (one.plan.programs_of_block * blocks, 1, 1), *one.tensors, *second, *one.integers, *integers,
        *_placed(outputs, None, first_part), kind.heads, *_rows_apart(outputs[0]), *_rows_apart(outputs[-1]),
        triton.cdiv(kind.heads, kind.group), kind.group, *kind.strides, *kind.angle_strides,
    )  # fmt: skip


def _rows_apart(out: torch.Tensor) -> tuple[int, int]:
    """Of an output's samples and heads."""
    samples, rows, heads, head_dim = out.stride(0), out.stride(1), out.stride(2), out.shape[3]
    assert out.stride(3) == 1
    assert samples % head_dim == heads % head_dim == 0
    assert rows == head_dim or out.shape[1] <= 1
    return samples // head_dim, heads // head_dim


def _placed(values: Sequence[Any], absent: Any, first_part: int) -> tuple[Any, Any, Any]:
    """Of q, k and v."""
    q, k, v = [*[absent] * first_part, *values, *[absent] * (3 - first_part - len(values))]
    return q, k, v


def _tensors(
    parts: Sequence[torch.Tensor], weights: Sequence[torch.Tensor | None], biases: Sequence[torch.Tensor | None],
    eps: Sequence[float], cos: torch.Tensor | None, sin: torch.Tensor | None, first_part: int,
) -> tuple[Any, ...]:  # fmt: skip
    """A stream's arguments of the kernel; None and 0 for what is not there."""
    q_weight, k_weight, _ = _placed(weights, None, first_part)
    q_bias, k_bias, _ = _placed(biases, None, first_part)
    q_eps, k_eps, _ = _placed([float(x) for x in eps], 0.0, first_part)
    return *_placed(parts, None, first_part), q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, cos, sin


@functools.cache
def _launcher(device: torch.device, dtype: torch.dtype, warps: int, *constants: tuple[str, int]) -> Launcher:
    """The launches of one compiled variant."""
    return Launcher(_prepare, device, **dict(constants), num_warps=warps)
