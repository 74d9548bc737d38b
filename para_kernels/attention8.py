"""Attention in 8 bits: int8 scores and e4m3 weights and values, for models whose quality stands it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

import para_kernels.ops8  # noqa: F401  (defines the operator)
from para_kernels.attention import check_attention, selected_kernel, softmax_scale

# Bound once: looking an operator up by its names takes a microsecond.
_flash_attention_int8 = torch.ops.para_kernels.flash_attention_int8.default


@overload
def flash_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def flash_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def flash_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v with 8-bit products, within a few percent of the exact result.

    Method: SageAttention2 (Zhang et al. 2024, arXiv 2411.10958): keys lose a mean; queries and keys, rotated by a
    Hadamard matrix (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; float32 on a GPU is not), become int8 with a scale
    per row and per 128 keys; values lose their mean and become e4m3 with a scale per channel, and what that takes from
    them on average is added to the mean; weights become e4m3. Nothing is calibrated. Lengths stay on the device, as in
    `flash_attention`.

    The error is that of the formats and depends on the values: about 3.5 % of the output's norm where it is a sum of
    random signs, and well below where attention finds something. docs/kernels/int8.md has the figures.

    Args:
        q: (B, Sq, H, D), bfloat16, float16 or float32; D contiguous and at most 256, any other strides. Values must be
            finite.
        k, v: (B, Sk, Hk, D), same dtype and device; Hk divides H, and query head h reads key head h // (H / Hk).
        kv_lens: int32 (B,) on the same device, or None: keys at or past kv_lens[b] do not exist, whatever they hold. A
            sample with no keys gives zeros and an lse of -inf. Values must lie in 0 ... Sk: on the CPU others are
            refused, on CUDA they are clamped into that range.
        q_lens: int32 (B,), or None: rows at or past q_lens[b] come back as zeros, with an lse of -inf. Range as for
            kv_lens.
        scale: factor on the scores, at least 0, default D ** -0.5.
        return_lse: also return the log-sum-exp of the scaled scores, that of the keys with their mean.

    Returns:
        out (B, Sq, H, D), contiguous, in q's dtype; with `return_lse` also lse (B, H, Sq), float32, natural logarithm.

    Raises:
        ValueError: for a dtype, device, shape or stride that is not allowed, D > 256, H % Hk != 0, a negative scale,
            or (CPU) lengths out of range.
    """
    check_attention(q, k, v, kv_lens, q_lens)
    out, lse = _flash_attention_int8(q, k, v, kv_lens, q_lens, softmax_scale(scale, q.shape[3]))
    return (out, lse) if return_lse else out


# Keys from which on 8 bits, the rounding included, take less time than 16, by compute capability and head dim; 24 heads
# on an H200: 1.08x at 16,384 keys (benchmarks/results/int8-speed.json). At 8,192 an earlier kernel was 0.98x, without
# the largest keys (ring-int8.json).
_FASTER_FROM = {((9, 0), 128): 12288}


def int8_faster_from(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> int | None:
    """From about how many keys on `flash_attention_int8` is faster than `flash_attention`, by what was measured.

    None where that was not measured.
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return _FASTER_FROM.get((torch.cuda.get_device_capability(device), head_dim))


def selected_kernel_int8(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the kernel that `flash_attention_int8` runs for (device, dtype, head dim), as reports show it.

    Raises:
        ValueError: for a combination that `flash_attention_int8` refuses.
    """
    device = torch.device(device)
    if selected_kernel(device, dtype, head_dim) and device.type == "cpu":
        return "torch, the 8-bit arithmetic in float32"
    from para_kernels.triton_kernels.dispatch8 import kernel_name

    return kernel_name(torch.cuda.get_device_capability(device), dtype, head_dim)
