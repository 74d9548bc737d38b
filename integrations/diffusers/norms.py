"""The norms of queries and keys as diffusers has them, told to the preparation kernel."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm, MochiRMSNorm, RMSNorm
from torch import Tensor, nn

from para_kernels.preparation import PREPARED_DTYPES, Norm


def left_to_norm(module: nn.Module | None, x: Tensor) -> tuple[Tensor, Norm | None]:
    """x (B, S, H, D), and the norm that is left to do on it: all of `module`'s, or, where the preparation cannot take
    its place, none, and x has been through the module.

    The module itself is called where it is of an unknown type and where calling it does more than the norm: with a hook
    of offloading, its weight arrives with the call.
    """
    if module is None:
        return x, None
    norm = None if _is_hooked(module) else _described(module, x)
    if norm is not None:
        return x, norm
    shape: tuple[int, ...] = tuple(getattr(module, "normalized_shape", None) or getattr(module, "dim", ()))
    normed = module(x.flatten(2)).view(x.shape) if shape == (x.shape[2] * x.shape[3],) else module(x)
    return normed.to(x.dtype), None


def _is_hooked(module: nn.Module) -> bool:
    """By accelerate, diffusers or torch. A module looks for an attribute that it does not have in three places and then
    raises, which costs more than all else here: so its own dictionary is asked.
    """
    own = module.__dict__
    return "_hf_hook" in own or "_diffusers_hook" in own or bool(module._forward_hooks or module._forward_pre_hooks)


def _described(module: Any, x: Tensor) -> Norm | None:
    """What `module` does, or None where the kernel has no such norm."""
    if type(module) in (RMSNorm, MochiRMSNorm):
        shape, is_layer = module.dim, False
    elif type(module) in (nn.LayerNorm, FP32LayerNorm, nn.RMSNorm):
        shape, is_layer = module.normalized_shape, type(module) is not nn.RMSNorm
    else:
        return None
    if module.eps is None:  # torch's own choice, which its documentation and its kernels name differently
        return None
    weight, bias = _own(module, "weight"), _own(module, "bias")
    if not all(_fits(parameter, x) for parameter in (weight, bias)):
        return None
    heads, head_dim = x.shape[2:]
    if tuple(shape) == (head_dim,):
        over = "head"
    elif tuple(shape) == (heads * head_dim,) and not is_layer:
        over = "heads"
    else:
        return None
    # diffusers' RMSNorm casts to a weight of half precision before it multiplies; Mochi's and torch's do not.
    round_first = type(module) is RMSNorm and weight is not None and weight.dtype != torch.float32
    return Norm("layer" if is_layer else "rms", weight, bias, float(module.eps), over, round_first)  # type: ignore[arg-type]


def _own(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, or the plain tensor that stands in for one; None where there is none."""
    return module._parameters[name] if name in module._parameters else module.__dict__.get(name)


def _fits(parameter: Tensor | None, x: Tensor) -> bool:
    """Of a dtype whose rounding the kernel repeats, and where x is."""
    if parameter is None:
        return True
    return parameter.dtype in (x.dtype, torch.float32) and parameter.device == x.device and x.dtype in PREPARED_DTYPES
