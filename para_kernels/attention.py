"""Exact attention with lengths instead of masks, and the merging of partial attention."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from para_kernels import ops
from para_kernels.checks import (
    check_contiguous_last,
    check_device,
    check_device_type,
    check_dims,
    check_dtype,
    check_inference,
    check_same,
    check_shape,
)

MAX_HEAD_DIM = 256
ATTENTION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Bound once: looking an operator up by its names takes a microsecond.
_flash_attention = torch.ops.para_kernels.flash_attention.default
_flash_attention_varlen = torch.ops.para_kernels.flash_attention_varlen.default
_merge_states = torch.ops.para_kernels.merge_states.default


def _not_checked(*arguments: object) -> None:
    """Without the extension, or in a traced call, the checks in Python have the word."""


# The operators on arguments that are good, in 2 microseconds where checks and call take 12 from Python, else None.
_checked_attention = _not_checked if ops._C is None else ops._C.checked_attention
_checked_varlen = _not_checked if ops._C is None else ops._C.checked_varlen


@overload
def flash_attention(
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
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over each sample's true length, without a mask.

    Method: FlashAttention-2 (Dao 2023, arXiv 2307.08691). Lengths stay on the device: no synchronisation, no
    recompilation.

    Args:
        q: (B, Sq, H, D), bfloat16, float16 or float32; D contiguous and at most 256, any other strides, no copies are
            made.
        k, v: (B, Sk, Hk, D), same dtype and device; Hk divides H, and query head h reads key head h // (H / Hk).
        kv_lens: int32 (B,) on the same device, or None: keys at or past kv_lens[b] do not exist, whatever they hold. A
            sample with no keys gives zeros and an lse of -inf. Values must lie in 0 ... Sk: on the CPU others are
            refused, on CUDA, where looking would stall the device, they are clamped into that range.
        q_lens: int32 (B,), or None: rows at or past q_lens[b] come back as zeros, with an lse of -inf. Range as for
            kv_lens.
        scale: factor on the scores, at least 0, default D ** -0.5.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out (B, Sq, H, D), contiguous, in q's dtype; with `return_lse` also lse (B, H, Sq), float32, natural logarithm.

    Raises:
        ValueError: for a dtype, device, shape or stride that is not allowed, D > 256, H % Hk != 0, a negative scale,
            or (CPU) lengths out of range.
    """
    if not torch.compiler.is_compiling():
        outputs = _checked_attention(q, k, v, kv_lens, q_lens, scale)
        if outputs is not None:
            return outputs if return_lse else outputs[0]
    check_attention(q, k, v, kv_lens, q_lens)
    out, lse = _flash_attention(q, k, v, kv_lens, q_lens, softmax_scale(scale, q.shape[3]))
    return (out, lse) if return_lse else out


@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over samples packed one after the other, in the argument order of flash-attn.

    Args:
        q: (Tq, H, D), the samples' queries concatenated; dtypes, strides and D as for `flash_attention`.
        k, v: (Tk, Hk, D).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,) on the same device: sample b owns rows cu_seqlens[b] ...
            cu_seqlens[b + 1]. Start at 0, never fall, end at T at most: others are refused on the CPU and clamped into
            the tensor on CUDA.
        max_seqlen_q, max_seqlen_k: at least the longest sample (checked on the CPU; on CUDA rows of a sample past
            max_seqlen_q come back as zeros). They size the launch; no kernel is compiled for them.
        scale: factor on the scores, at least 0, default D ** -0.5.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out (Tq, H, D), contiguous, in q's dtype; with `return_lse` also lse (H, Tq), float32, natural logarithm. Rows
        of no sample are zeros, with an lse of -inf.

    Raises:
        ValueError: as for `flash_attention`, and for negative maximum lengths or cu_seqlens of different sizes.
    """
    if not torch.compiler.is_compiling():
        outputs = _checked_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
        if outputs is not None:
            return outputs if return_lse else outputs[0]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dims(name, tensor, "T, H, D")
    check_shape("k", k, (*k.shape[:2], q.shape[2]), "Tk, Hk, D of q")
    _check_qkv(q, k, v)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.numel() < 1:
        raise ValueError(
            f"cu_seqlens_q: got shape {tuple(cu_seqlens_q.shape)}, must be (B + 1,) with at least one element"
        )
    for name, lens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_lens(name, lens, cu_seqlens_q.numel(), q.device, "B + 1")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, (int, torch.SymInt)) or longest < 0:
            raise ValueError(f"{name}: got {longest!r}, must be an integer, at least 0")
    out, lse = _flash_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale(scale, q.shape[2])
    )
    return (out, lse) if return_lse else out


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each: exact, softmax included.

    Method: out = w_a out_a + w_b out_b with w = exp(lse - lse_merged), lse_merged = log(exp(lse_a) + exp(lse_b))
    (FlashInfer, Ye et al. 2025, arXiv 2501.01005, section 2.2); float32 inside. An lse of -inf marks a state without
    keys; two of them merge into zeros.

    Args:
        out_a, out_b: (B, S, H, D) or packed (T, H, D), one shape and dtype (bfloat16, float16, float32), D contiguous.
        lse_a, lse_b: (B, H, S), or packed (H, T): float32, natural logarithm.

    Returns:
        (out, lse), contiguous, with the shapes and dtypes of out_a and lse_a.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together.
    """
    if out_a.dim() not in (3, 4):
        raise ValueError(f"out_a: got shape {tuple(out_a.shape)}, must be (B, S, H, D) or (T, H, D)")
    check_dtype("out_a", out_a, ATTENTION_DTYPES)
    check_device_type("out_a", out_a)
    check_same("out_b", out_b, "out_a", out_a)
    for name, out in (("out_a", out_a), ("out_b", out_b)):
        check_contiguous_last(name, out)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(name, lse, (torch.float32,))
        check_device(name, lse, out_a.device)
        check_shape(name, lse, (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3]), "..., H, S of out_a")
    check_inference(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return _merge_states(out_a, lse_a, out_b, lse_b)


def selected_kernel(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the kernel that `flash_attention` runs for (device, dtype, head dim), as reports show it.

    Raises:
        ValueError: for a combination that `flash_attention` refuses.
    """
    device = torch.device(device)
    if dtype not in ATTENTION_DTYPES:
        raise ValueError(f"dtype: got {dtype}, allowed are {', '.join(str(d) for d in ATTENTION_DTYPES)}")
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim: got {head_dim}, must lie in 1 ... {MAX_HEAD_DIM}")
    if device.type == "cpu":
        return "torch CPU flash attention, per sample"
    if device.type != "cuda" or not ops.TRITON_AVAILABLE:
        raise ValueError(f"device: got {device}, allowed are cpu, and cuda with Triton installed")
    from para_kernels.triton_kernels.dispatch import kernel_name

    return kernel_name(torch.cuda.get_device_capability(device), dtype, head_dim)


def check_attention(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, q_lens: Tensor | None) -> None:
    """Raise a ValueError unless `flash_attention` takes these tensors; the values of lengths are not looked at."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dims(name, tensor, "B, S, H, D")
    _, max_k, kv_heads, _ = k.shape
    check_shape("k", k, (q.shape[0], max_k, kv_heads, q.shape[3]), "B, Sk, Hk, D of q and k")
    _check_qkv(q, k, v)
    if kv_lens is not None:
        _check_lens("kv_lens", kv_lens, q.shape[0], q.device, "B")
    if q_lens is not None:
        _check_lens("q_lens", q_lens, q.shape[0], q.device, "B")


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores: D ** -0.5 where none is given; a ValueError for one that is negative or not finite."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale: got {scale}, must be finite and at least 0")
    return float(scale)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What both attention functions require of q (..., H, D) and k, v (..., Hk, D)."""
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    check_dtype("q", q, ATTENTION_DTYPES)
    check_device_type("q", q)
    check_same("v", v, "k", k)
    if k.dtype != q.dtype:
        raise ValueError(f"k: got dtype {k.dtype}, must be {q.dtype} like q")
    check_device("k", k, q.device)
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: got head dim {head_dim}, must lie in 1 ... {MAX_HEAD_DIM}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: got {kv_heads} heads, must divide the {heads} heads of q")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_contiguous_last(name, tensor)
    check_inference(q=q, k=k, v=v)


def _check_lens(name: str, lens: Tensor, count: int, device: torch.device, meaning: str) -> None:
    if lens.dtype == torch.int32 and lens.device == device and lens.shape == (count,) and lens.stride() == (1,):
        return
    check_dtype(name, lens, (torch.int32,))
    check_device(name, lens, device)
    check_shape(name, lens, (count,), meaning)
    check_contiguous_last(name, lens)
