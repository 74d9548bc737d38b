"""The operator of 8-bit attention: schema, fake, the CPU's implementation, and the launch on CUDA.

What is quantised, and how (SageAttention2, Zhang et al. 2024, arXiv 2411.10958, sections 3.1 to 3.3):

- queries and keys are rotated, so that no channel and no entry alone decides about a scale (`format8.rotation`);
- keys lose the mean of some of them, which softmax does not see, and become int8 with a scale per 128 keys;
- queries become int8 with a scale per row;
- values lose their mean, which is added to the output again, and become e4m3 with a scale per channel, of those within
  an octave the one that errs least; what rounding changes in the mean is added too;
- weights, `exp(score - maximum)` times 256, become e4m3, once they have been summed up;
- what e4m3 takes from the values of the largest keys becomes e4m3 too, and is multiplied by their weights: where tails
  are heavy, few keys decide, and these are among them.

The CPU's implementation is that arithmetic written out in torch, for tests and small models; it saves no time there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from para_kernels.ops import (
    _attend_each_sample,
    _attention_outputs,
    _capability,
    _host_lens,
    _library,
    _triton,
)
from para_kernels.triton_kernels.format8 import (
    HIGHEST_E4M3,
    HIGHEST_INT8,
    K_BLOCK,
    K_SAMPLE,
    LARGEST_KEYS,
    SCALES_FROM,
    SCALES_TRIED,
    padded_head_dim,
    rotation,
    rotation_width,
    rows_of_largest,
)

# Weights are multiplied by 2^8: e4m3 reaches from 2^-9 to 448, and they lie in 0 ... 1.
LOG2_OF_WEIGHTS = 8.0
_ROWS_AT_A_TIME = 1024

_library.define(
    "flash_attention_int8(Tensor q, Tensor k, Tensor v, Tensor? kv_lens, Tensor? q_lens, float scale)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("para_kernels::flash_attention_int8", lib=_library)
def _flash_attention_int8_fake(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _attention_outputs(q)


class Rounded(NamedTuple):
    """Rows of int8 and the scales of their blocks: x is about `rows` * `scales`.

    Attributes:
        rows: (S, H, D) float32, whole numbers of at most 127.
        scales: (S, H, 1) float32, one value for each block of rows.
    """

    rows: Tensor
    scales: Tensor


class Values(NamedTuple):
    """Values in e4m3: v is about `rows` * `scale` + `mean`, and on average exactly.

    Attributes:
        rows: (S, H, D) float32, numbers that e4m3 has.
        scale, mean: (H, D) float32.
    """

    rows: Tensor
    scale: Tensor
    mean: Tensor


class Largest(NamedTuple):
    """The largest key of each group of keys.

    Attributes:
        keys: of R groups.
        lacking: (R, H, D) float32, what the rows of their values lack, rounded to numbers that e4m3 has.
    """

    keys: Rounded
    lacking: Tensor


def round_to_int8(x: Tensor, block: int) -> Rounded:
    """(S, H, D) float32 in blocks of rows, a scale for each block and head."""
    length, heads, _ = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -length % block))
    largest = padded.reshape(-1, block, heads, x.shape[2]).abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / HIGHEST_INT8, 1.0).repeat_interleave(block, 0)[:length, :, None]
    return Rounded((x / scales).round().clamp(-HIGHEST_INT8, HIGHEST_INT8), scales)


def rotated(x: Tensor) -> Tensor:
    """(..., D) float32 to (..., D'): padded, and each part times the same orthogonal matrix."""
    width = rotation_width(x.shape[-1])
    padded = torch.nn.functional.pad(x, (0, padded_head_dim(x.shape[-1]) - x.shape[-1]))
    return (padded.unflatten(-1, (-1, width)) @ rotation(width, x.dtype, x.device)).flatten(-2) * width**-0.5


def round_values(v: Tensor) -> Values:
    """(S, H, D) float32, a mean and a scale for each head and channel.

    16-bit values are few numbers, so that rounding errs for thousands of keys alike: what it takes from them on average
    is added to their mean.
    """
    mean = v.mean(0)
    centred = v - mean
    largest = centred.abs().amax(0)
    scale = _best_scale(centred, torch.where(largest > 0, largest / HIGHEST_E4M3, 1.0))
    rows = to_e4m3(centred / scale)
    return Values(rows, scale, mean + (centred - rows * scale).mean(0))


def round_largest(keys: Tensor, v: Tensor, values: Values) -> Largest:
    """Of keys (S, H, D') without their mean the largest of each group, and what `values` lack of v (S, H, D)."""
    length, heads, _ = keys.shape
    size = -(-length // LARGEST_KEYS)
    norms = torch.nn.functional.pad(keys.square().sum(2), (0, 0, 0, -length % size), value=-1.0)
    starts = torch.arange(0, length, size, device=keys.device)[:, None]
    at = (norms.view(-1, size, heads).argmax(1) + starts)[..., None]
    lacking = (v - values.mean) / values.scale - values.rows
    return Largest(
        round_to_int8(keys.take_along_dim(at, 0), K_BLOCK), to_e4m3(lacking.take_along_dim(at, 0))
    )  # fmt: skip


def _best_scale(centred: Tensor, least: Tensor) -> Tensor:
    """Of the scales from `least` to its double the one by which e4m3 errs least, on evenly spread rows."""
    length = centred.shape[0]
    count = min(length, SCALES_FROM)
    sample = centred[torch.arange(count, device=centred.device) * length // count]
    scales = torch.stack([least * 2.0 ** (i / SCALES_TRIED) for i in range(SCALES_TRIED)])
    errors = torch.stack([(sample - to_e4m3(sample / scale) * scale).square().sum(0) for scale in scales])
    return scales.gather(0, errors.argmin(0, keepdim=True))[0]


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest numbers that e4m3 has, as float32; NaN stays NaN."""
    return x.clamp(-HIGHEST_E4M3, HIGHEST_E4M3).to(torch.float8_e4m3fn).float()


class Piece(NamedTuple):
    """Keys and values in 8 bits, as one memory that can travel: what is in it is the business of the device.

    Attributes:
        k, v: int8 and e4m3 (float16 on some GPUs).
        k_scales, v_scales, k_means: float32.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor
    v_scales: Tensor
    k_means: Tensor


def piece_tensors(k_shape: Sequence[int], device: torch.device) -> tuple[tuple, ...]:
    """(shape, dtype) of each tensor of the `Piece` of keys and values (B, S, Hk, D)."""
    if device.type == "cuda":
        return _triton().dispatch8.shapes(tuple(k_shape), _capability(device))
    batch, rows, heads, dim = k_shape
    largest = rows_of_largest(rows)
    return (
        ((batch, rows + largest, heads, padded_head_dim(dim)), torch.int8),
        ((batch, rows + largest, heads, dim), torch.float8_e4m3fn),
        ((batch, -(-rows // K_BLOCK) + largest // K_BLOCK, heads, 1), torch.float32),
        ((batch, 2, heads, dim), torch.float32),
        ((batch, heads, padded_head_dim(dim)), torch.float32),
    )


def round_piece(k: Tensor, v: Tensor, kv_lens: Tensor | None, piece: Piece) -> None:
    """Write k and v (B, S, Hk, D), of a size that is not 0, to `piece`: the first kv_lens[b] rows of each sample."""
    if k.is_cuda:
        kernels = _triton().dispatch8
        kernels.keys_forward(k, v, kv_lens, kernels.Keys8(*piece), capability=_capability(k.device))
        return
    for b, length in enumerate(_host_lens("kv_lens", kv_lens, k.shape[0], k.shape[1])):
        if length:
            keys, values, mean, largest = _rounded(k[b, :length].float(), v[b, :length].float())
            piece.k[b, :length] = keys.rows.to(torch.int8)
            piece.v[b, :length] = values.rows.to(torch.float8_e4m3fn)
            piece.k_scales[b, : -(-length // K_BLOCK)] = keys.scales[::K_BLOCK]
            first, count = k.shape[1], largest.lacking.shape[0]
            piece.k[b, first : first + count] = largest.keys.rows.to(torch.int8)
            piece.v[b, first : first + count] = largest.lacking.to(torch.float8_e4m3fn)
            first = -(-first // K_BLOCK)
            piece.k_scales[b, first : first - (-count // K_BLOCK)] = largest.keys.scales[::K_BLOCK]
            piece.v_scales[b] = torch.stack((values.scale, values.mean))
            piece.k_means[b] = mean


def attend_piece(
    q: Tensor, piece: Piece, rows: int, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over a piece of `rows` > 0 rows, out (B, Sq, H, D) and lse (B, H, Sq); q of a size that is not 0."""
    if q.is_cuda:
        out, lse = _attention_outputs(q)
        kernels = _triton().dispatch8
        kernels.attend_keys_forward(
            q, kernels.Keys8(*piece), rows, out, lse, q_lens, kv_lens, scale, capability=_capability(q.device)
        )
        return out, lse
    samples = iter(range(q.shape[0]))

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
        b, length = next(samples), k.shape[0]
        if not length:
            _attend_nothing(out, lse)
            return
        scales, blocks = piece.k_scales[b].repeat_interleave(K_BLOCK, 0), -(-rows // K_BLOCK)
        values = Values(v.float(), *piece.v_scales[b])
        count = -(-length // -(-length // LARGEST_KEYS))
        behind = slice(rows, rows + count)
        of_largest = Rounded(piece.k[b, behind].float(), scales[blocks * K_BLOCK :][:count])
        largest = Largest(of_largest, piece.v[b, behind].float())
        _attend_rounded(q, Rounded(k.float(), scales[:length]), values, piece.k_means[b], largest, scale, out, lse)

    return _attend_each_sample(attend, q, piece.k[:, :rows], piece.v[:, :rows], kv_lens, q_lens, scale)


def _rounded(k: Tensor, v: Tensor) -> tuple[Rounded, Values, Tensor, Largest]:
    """Rotated keys without a mean, values, that mean, and the largest keys; k, v (S, Hk, D) float32, S > 0."""
    sampled = torch.arange(k.shape[0], device=k.device) % K_BLOCK < K_SAMPLE
    mean = rotated(k[sampled].mean(0))
    keys, values = rotated(k) - mean, round_values(v)
    return round_to_int8(keys, K_BLOCK), values, mean, round_largest(keys, v, values)


def _attend_8_bit(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of one sample, q (Sq, H, D) over k, v (Sk, Hk, D), into out (Sq, H, D) and lse (H, Sq)."""
    if k.shape[0]:
        _attend_rounded(q, *_rounded(k.float(), v.float()), scale, out, lse)
    else:
        _attend_nothing(out, lse)


def _attend_nothing(out: Tensor, lse: Tensor) -> None:
    out.zero_()
    lse.fill_(float("-inf"))


def _attend_rounded(
    q: Tensor,
    keys: Rounded,
    values: Values,
    k_mean: Tensor,
    largest_keys: Largest,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """As `_attend_8_bit`, over keys and values in 8 bits, at least one."""
    groups = q.shape[1] // keys.rows.shape[1]
    q = rotated(q.float())
    keys, of_largest = (Rounded(*(x.repeat_interleave(groups, 1) for x in k)) for k in (keys, largest_keys.keys))
    lacking = largest_keys.lacking.repeat_interleave(groups, 1)
    values = Values(values.rows.repeat_interleave(groups, 1), *(x.repeat_interleave(groups, 0) for x in values[1:]))
    k_mean = k_mean.repeat_interleave(groups, 0)
    queries = round_to_int8(q, 1)
    factor = scale * math.log2(math.e)
    for first in range(0, q.shape[0], _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        own = Rounded(*(x[rows] for x in queries))
        scores = _scores(own, keys) * factor
        largest = scores.amax(2)
        weights = torch.exp2(scores - largest[..., None] + LOG2_OF_WEIGHTS)
        # Not of the rounded ones: over many keys those that e4m3 has no number for would be missed.
        sums = weights.sum(2)
        weights = to_e4m3(weights)
        product = torch.einsum("hqk,khd->qhd", weights, values.rows)
        # Rounded in another block than before, a score may exceed the maximum a little: up to 448 / 256.
        again = _scores(own, of_largest) * factor - largest[..., None]
        product += torch.einsum("hqk,khd->qhd", to_e4m3(torch.exp2(again + LOG2_OF_WEIGHTS)), lacking)
        out[rows] = (product / sums.T[..., None] * values.scale + values.mean).to(out.dtype)
        left_out = torch.einsum("qhd,hd->hq", q[rows], k_mean) * scale
        lse[:, rows] = (largest + sums.log2() - LOG2_OF_WEIGHTS) * math.log(2) + left_out


def _scores(queries: Rounded, keys: Rounded) -> Tensor:
    """(H, Sq, Sk). Sums of products of whole numbers below 2^24: float32 holds them exactly."""
    products = torch.einsum("qhd,khd->hqk", queries.rows, keys.rows)
    return products * (queries.scales.transpose(0, 1) * keys.scales.permute(1, 2, 0))


@torch.library.impl(_library, "flash_attention_int8", "CPU")
def _flash_attention_int8_cpu(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend_each_sample(_attend_8_bit, q, k, v, kv_lens, q_lens, scale)


@torch.library.impl(_library, "flash_attention_int8", "CUDA")
def _flash_attention_int8_cuda(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_outputs(q)
    _triton().dispatch8.attention_int8_forward(
        q, k, v, out, lse, q_lens, kv_lens, scale, capability=_capability(q.device)
    )
    return out, lse
