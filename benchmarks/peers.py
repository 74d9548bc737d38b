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

SDPA_MASKED = "SDPA with mask"
ATTENTION_PEERS = ("SDPA", "cuDNN", "SDPA flash", "FlashAttention-3", "SageAttention", "flex_attention")


class PeerUnavailableError(Exception):
    """This peer cannot run on this device; the message says why."""


def attention_peer(name: str, device: torch.device) -> Attention:
    """The peer `name`, one of ATTENTION_PEERS.

    Raises:
        PeerUnavailableError: not on this device, or its package is not installed.
    """
    if name == "SDPA":
        return sdpa
    if device.type != "cuda":
        raise PeerUnavailableError(f"{name} runs on CUDA only")
    if name == "cuDNN":
        return _sdpa_with(SDPBackend.CUDNN_ATTENTION)
    if name == "SDPA flash":
        return _sdpa_with(SDPBackend.FLASH_ATTENTION)
    if name == "FlashAttention-3":
        return _flash_attention_3(device)
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


def _flash_attention_3(device: torch.device) -> Attention:
    if torch.cuda.get_device_capability(device) != (9, 0):
        raise PeerUnavailableError("FlashAttention-3 needs sm_90")
    flash_attn_func = _import("fa3_fwd_interface", "pip install fa3-fwd").flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

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
