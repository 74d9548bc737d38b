"""Which attention kernel runs: the Hopper kernel where it can, cuDNN at the few sizes at which that is faster, and the
portable one everywhere else."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import attention, cudnn_attention, hopper_attention, hopper_ring_attention, ring_attention, tail

_HOPPER = (9, 0)


def attention_forward(
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
    capability: tuple[int, int],
) -> None:
    """Launch a kernel; arguments and contract are those of `attention.attention_forward`."""
    if capability == _HOPPER:
        whole = packed_max_q is None and q_lens is None and kv_lens is None
        if whole and cudnn_attention.cudnn_attention_forward(q, k, v, out, lse, scale):
            return
        if hopper_attention.hopper_attention_forward(
            q, k, v, out, lse, q_lens, kv_lens, scale, packed_max_q=packed_max_q, keep_plan=True
        ):
            return
    attention.attention_forward(
        q, k, v, out, lse, q_lens, kv_lens, scale, packed_max_q=packed_max_q, capability=capability, keep_plan=True
    )


def ring_attention_forward(
    q: torch.Tensor,
    pieces: ring_attention.Pieces,
    keys: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    *,
    kv_heads: int,
    own_start: int,
    capability: tuple[int, int],
) -> Callable[[], None]:
    """Launch a kernel; arguments and contract are those of `ring_attention.ring_attention_forward`, and `keys` is the
    length of the whole sequence.

    What is returned is to be called once all that the kernel waits for has been enqueued: it launches the rest.
    """
    if capability == _HOPPER:
        rest = hopper_ring_attention.hopper_ring_attention_forward(
            q, pieces, keys, out, lse, q_lens, kv_lens, scale, kv_heads=kv_heads, own_start=own_start
        )
        if rest is not None:
            return rest
    ring_attention.ring_attention_forward(
        q, pieces, out, lse, q_lens, kv_lens, scale, kv_heads=kv_heads, own_start=own_start, capability=capability
    )
    return _nothing


def _nothing() -> None:
    pass


def kernel_name(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    """What runs for tensors whose strides the copy engine can follow."""
    if capability == _HOPPER and hopper_attention.takes(dtype, head_dim):
        return "Gluon, warp-specialised"
    return "Triton, TMA descriptors" if attention.uses_tma(capability, dtype, head_dim) else "Triton, pointers"


def compile_count() -> int:
    """How many variants of the kernels this process holds, over all devices: new lengths must not add any."""
    kernels = (attention, hopper_attention, ring_attention, hopper_ring_attention, tail)
    return sum(kernel.compile_count() for kernel in kernels)
