"""What this package's operations are compared with. All take and return the package's own layouts.

Each attention peer is a function of (q, k, v), all (B, S, H, D). A peer that cannot run here is a reason instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

Lens = Tensor  # int32 (B,)

SDPA_MASKED = "SDPA with mask"
FA3 = "FlashAttention-3"
FA3_FP8 = "FlashAttention-3 fp8"
CUDNN = "cuDNN"
PORTABLE = "portable kernel"
ATTENTION_PEERS = ("SDPA", CUDNN, "SDPA flash", FA3, "SageAttention", "flex_attention")


class PeerUnavailableError(Exception):
    """This peer cannot run on this device; the message says why."""


def attention_peer(name: str, device: torch.device) -> Attention:
    """The peer `name`, one of ATTENTION_PEERS or PORTABLE.

    Raises:
        PeerUnavailableError: not on this device, or its package is not installed.
    """
    if name == "SDPA":
        return sdpa
    if device.type != "cuda":
        raise PeerUnavailableError(f"{name} runs on CUDA only")
    if name == CUDNN:
        return _sdpa_with(SDPBackend.CUDNN_ATTENTION)
    if name == "SDPA flash":
        return _sdpa_with(SDPBackend.FLASH_ATTENTION)
    if name == FA3:
        return _flash_attention_3(device)
    if name == PORTABLE:
        return _portable(device)
    if name == "SageAttention":
        return _sage_attention()
    return _flex_attention()


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's attention, with torch's own choice of kernel; `mask` as in `inputs.key_mask`."""
    out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _sdpa_with(backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return run


def runs(peer: Callable[[], object]) -> str | None:
    """Call `peer` once: None, or in one line why it cannot compute this (a dtype or a size that it does not take)."""
    try:
        peer()
    except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _flash_attention_3(device: torch.device) -> Attention:
    flash_attn_func = _fa3_interface(device).flash_attn_func
    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def fa3_fp8(device: torch.device) -> Attention:
    """FlashAttention-3 on inputs that are e4m3 already; the output is bfloat16.

    Raises:
        PeerUnavailableError: not on this device, or its package is not installed.
    """
    return _flash_attention_3(device)


def fa3_packed(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]:
    """FlashAttention-3 on packed samples, with the arguments of `flash_attention_varlen`.

    Raises:
        PeerUnavailableError: not on this device, or its package is not installed.
    """
    varlen = _fa3_interface(device).flash_attn_varlen_func
    return lambda *arguments: _first(varlen(*arguments))


def fa3_padded(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Lens | None, Lens], Tensor]:
    """FlashAttention-3 on padded samples: (q, k, v, q_lens, kv_lens), its `seqused_q` and `seqused_k`.

    Raises:
        PeerUnavailableError: not on this device, or its package is not installed.
    """
    varlen = _fa3_interface(device).flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, q_lens: Lens | None, kv_lens: Lens) -> Tensor:
        longest = q.shape[1], k.shape[1]
        return _first(varlen(q, k, v, None, None, *longest, seqused_q=q_lens, seqused_k=kv_lens))

    return run


def _fa3_interface(device: torch.device) -> Any:
    if device.type != "cuda":
        raise PeerUnavailableError(f"{FA3} runs on CUDA only")
    if torch.cuda.get_device_capability(device) != (9, 0):
        raise PeerUnavailableError(f"{FA3} needs sm_90")
    return _import("fa3_fwd_interface", "pip install fa3-fwd")


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _portable(device: torch.device) -> Attention:
    """This package's own portable kernel, past the choice that `flash_attention` makes by size."""
    attention_forward = _import("para_kernels.triton_kernels.attention", "pip install triton").attention_forward
    capability = torch.cuda.get_device_capability(device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        attention_forward(q, k, v, out, lse, None, None, q.shape[-1] ** -0.5, capability=capability)
        return out

    return run


def _sage_attention() -> Attention:
    sageattn = _import("sageattention", "pip install sageattention").sageattn
    # smooth_k subtracts the mean from K in place: give it a copy that nothing else reads.
    return lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD")


def _flex_attention() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return run


def _import(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise PeerUnavailableError(f"{module} does not import ({error}); {remedy}") from error


def eager_residual_diff(hidden_in: Tensor, hidden_out: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cache's metric as caches for diffusers write it: about nine passes over memory."""
    residual = hidden_out - hidden_in
    return residual, (previous - residual).abs().mean(), previous.abs().mean()


def eager_merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The merge of two attention states, out (B, S, H, D) and lse (B, H, S), as ring attention in torch writes it."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).transpose(1, 2)[..., None] for x in (lse_a, lse_b))
    return (weight_a * out_a.float() + weight_b * out_b.float()).to(out_a.dtype), lse
