"""Random inputs, and the work that an operation does on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def attention_inputs(
    batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, key_heads: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q (B, S, H, D) and k, v (B, S, Hk, D); `key_heads` 0 means as many as `heads`."""
    q = torch.randn(batch, length, heads, head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(batch, length, key_heads or heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    return q, k, v


def lens_tensor(lens: Sequence[int], device: torch.device) -> Tensor:
    """Lengths as the int32 tensor (B,) that the operations take."""
    return torch.tensor(lens, dtype=torch.int32, device=device)


def cu_seqlens(lens: Sequence[int], device: torch.device) -> Tensor:
    """Offsets of packed sequences, int32 (B + 1,)."""
    return lens_tensor([0, *accumulate(lens)], device)


def key_mask(lens: Sequence[int], length: int, device: torch.device) -> Tensor:
    """The boolean mask (B, 1, 1, S) that diffusers builds for HunyuanVideo: True where a key exists."""
    return (torch.arange(length, device=device) < lens_tensor(lens, device)[:, None])[:, None, None, :]


def attention_flops(query_lens: Sequence[int], key_lens: Sequence[int], heads: int, head_dim: int) -> float:
    """Multiplications and additions of the two matrix products, softmax not counted."""
    return 4.0 * heads * head_dim * sum(q * k for q, k in zip(query_lens, key_lens, strict=True))


def hidden_states(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)
