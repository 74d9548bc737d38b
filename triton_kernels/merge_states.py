"""Merge two attention states (output, log-sum-exp) over disjoint keys into the state over their union.

Source: FlashInfer (Ye et al. 2025, arXiv 2501.01005, section 2.2) and FlashDecoding: with weights w = exp(lse -
lse_merged), out = w_a out_a + w_b out_b and lse_merged = log(exp(lse_a) + exp(lse_b)).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .launch import Launcher

_RUNTIME_INTEGERS = (
    "length", "heads", "a_stride_b", "a_stride_s", "a_stride_h", "b_stride_b", "b_stride_s", "b_stride_h",
    "lse_a_stride_b", "lse_a_stride_h", "lse_a_stride_s", "lse_b_stride_b", "lse_b_stride_h", "lse_b_stride_s",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS)
def _merge_states(
    out_a, lse_a, out_b, lse_b, out, lse, length, heads,
    a_stride_b, a_stride_s, a_stride_h, b_stride_b, b_stride_s, b_stride_h,
    lse_a_stride_b, lse_a_stride_h, lse_a_stride_s, lse_b_stride_b, lse_b_stride_h, lse_b_stride_s,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(1) % heads).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row_mask = s < length
    mask = row_mask[:, None] & (d < D)[None, :]

    state_a = tl.load(
        lse_a + batch * lse_a_stride_b + head * lse_a_stride_h + s * lse_a_stride_s, mask=row_mask, other=float("-inf")
    )
    state_b = tl.load(
        lse_b + batch * lse_b_stride_b + head * lse_b_stride_h + s * lse_b_stride_s, mask=row_mask, other=float("-inf")
    )
    highest = tl.maximum(state_a, state_b)
    # Two empty states merge to an empty one: -inf - -inf must not become NaN.
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    weight_a = tl.exp(state_a - anchor)
    weight_b = tl.exp(state_b - anchor)
    total = weight_a + weight_b
    share = 1.0 / tl.where(total > 0, total, 1.0)

    # The rows of a state without keys are not looked at: they may hold anything, NaN included.
    has_a = (state_a > float("-inf"))[:, None]
    has_b = (state_b > float("-inf"))[:, None]
    a_offsets = batch * a_stride_b + head * a_stride_h + s[:, None] * a_stride_s + d[None, :]
    b_offsets = batch * b_stride_b + head * b_stride_h + s[:, None] * b_stride_s + d[None, :]
    x = tl.load(out_a + a_offsets, mask=mask & has_a, other=0.0)
    y = tl.load(out_b + b_offsets, mask=mask & has_b, other=0.0)
    merged = x.to(tl.float32) * (weight_a * share)[:, None] + y.to(tl.float32) * (weight_b * share)[:, None]
    tl.store(
        out + ((batch * length + s[:, None]) * heads + head) * D + d[None, :],
        merged.to(out.dtype.element_ty),
        mask=mask,
    )
    tl.store(lse + (batch * heads + head) * length + s, anchor + tl.log(total), mask=row_mask)


def merge_states_forward(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged (out, lse), contiguous; (B, S, H, D) with (B, H, S), or packed (T, H, D) with (H, T). D is contiguous."""
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        # No element to weigh, but an lse may exist where D is 0.
        return out, torch.logaddexp(lse_a, lse_b).contiguous()
    if out_a.dim() == 3:
        out_a, lse_a, out_b, lse_b = (x[None] for x in (out_a, lse_a, out_b, lse_b))
    launcher, grid = _plan(out_a.shape, out_a.dtype, out_a.device)
    _, length, heads, _ = out_a.shape
    launcher(
        grid, out_a, lse_a, out_b, lse_b, out, lse, length, heads,
        *out_a.stride()[:-1], *out_b.stride()[:-1], *lse_a.stride(), *lse_b.stride(),
    )  # fmt: skip
    return out, lse


@functools.lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Launcher, tuple[int, int, int]]:
    """(launcher, grid) for states (B, S, H, D)."""
    batch, length, heads, head_dim = shape
    block_d = triton.next_power_of_2(head_dim)
    block_s = max(1, 4096 // block_d)
    launcher = _launcher(device, dtype, head_dim, block_s, block_d)
    return launcher, (int(triton.cdiv(length, block_s)), heads * batch, 1)


@functools.cache
def _launcher(device: torch.device, dtype: torch.dtype, head_dim: int, block_s: int, block_d: int) -> Launcher:
    """The launches of one compiled variant."""
    return Launcher(_merge_states, device, D=head_dim, BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4)
