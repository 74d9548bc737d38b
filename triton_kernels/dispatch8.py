"""Which 8-bit attention kernel runs, the Hopper kernel where it can, and what is quantised for it."""

from __future__ import annotations

import torch

from . import attention_int8, hopper_attention_int8
from .quantize_int8 import quantise

_HOPPER = (9, 0)


def attention_int8_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    *,
    capability: tuple[int, int],
) -> None:
    """Quantise and attend; writes `out` (as q) and `lse` (B, H, Sq) float32, both contiguous.

    q is (B, Sq, H, D), k and v (B, Sk, Hk, D), D contiguous, any other strides. `q_lens` and `kv_lens` are int32 (B,),
    or None. The caller has checked all of this.
    """
    if q.numel() == 0 or k.numel() == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    if capability == _HOPPER and hopper_attention_int8.takes(q.dtype, q.shape[3]):
        x = quantise(q, k, v, q_lens, kv_lens, scale, values=torch.float8_e4m3fn, permuted=True)
        hopper_attention_int8.hopper_attention_int8_forward(x, k.shape, out, lse, q_lens, kv_lens, scale)
    else:
        values = attention_int8.value_type(capability)
        x = quantise(q, k, v, q_lens, kv_lens, scale, values=values, permuted=False)
        attention_int8.attention_int8_forward(x, k.shape, out, lse, q_lens, kv_lens, scale)


def kernel_name(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    """What runs."""
    if capability == _HOPPER and hopper_attention_int8.takes(dtype, head_dim):
        return "Gluon, warp-specialised, int8 and e4m3"
    values = "e4m3" if attention_int8.value_type(capability) == torch.float8_e4m3fn else "float16"
    return f"Triton, int8 and {values}"


def compile_count() -> int:
    """How many variants of the kernels this process holds, over all devices: new lengths must not add any."""
    return attention_int8.compile_count() + hopper_attention_int8.compile_count()
