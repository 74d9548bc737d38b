"""Which 8-bit attention kernel runs, the Hopper kernel where it can, and what is quantised for it."""

from __future__ import annotations

import torch

from . import attention_int8, hopper_attention_int8
from .quantize_int8 import Keys8, new_keys, quantise_keys, quantise_queries, shapes_of_keys

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
    keys = new_keys(k, attention_int8.value_type(capability))
    keys_forward(k, v, kv_lens, keys, capability=capability)
    attend_keys_forward(q, keys, k.shape[1], out, lse, q_lens, kv_lens, scale, capability=capability)


def shapes(
    k_shape: tuple[int, int, int, int], capability: tuple[int, int]
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor that `keys_forward` writes for keys and values of this shape."""
    return shapes_of_keys(*k_shape, attention_int8.value_type(capability))


def keys_forward(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_lens: torch.Tensor | None,
    keys: Keys8,
    *,
    capability: tuple[int, int],
) -> None:
    """Write k and v, (B, Sk, Hk, D) of a size that is not 0, to `keys` in 8 bits."""
    quantise_keys(k, v, kv_lens, keys, permuted=_is_hopper(capability, k.dtype, k.shape[3]))


def attend_keys_forward(
    q: torch.Tensor,
    keys: Keys8,
    rows_k: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    *,
    capability: tuple[int, int],
) -> None:
    """Quantise the queries and attend over `keys`, of `rows_k` rows, which `keys_forward` has written."""
    queries = quantise_queries(q, keys.k_means, q_lens, scale)
    hopper = _is_hopper(capability, q.dtype, q.shape[3])
    kernel = hopper_attention_int8.hopper_attention_int8_forward if hopper else attention_int8.attention_int8_forward
    kernel(queries, keys, rows_k, out, lse, q_lens, kv_lens, scale)


def _is_hopper(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> bool:
    return capability == _HOPPER and hopper_attention_int8.takes(dtype, head_dim)


def kernel_name(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    """What runs."""
    if _is_hopper(capability, dtype, head_dim):
        return "Gluon, warp-specialised, int8 and e4m3"
    values = "e4m3" if attention_int8.value_type(capability) == torch.float8_e4m3fn else "float16"
    return f"Triton, int8 and {values}"


def compile_count() -> int:
    """How many variants of the kernels this process holds, over all devices: new lengths must not add any."""
    return attention_int8.compile_count() + hopper_attention_int8.compile_count()
