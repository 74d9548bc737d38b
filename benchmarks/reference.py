"""Attention in float64, written out plainly, and the errors that the reports give."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative error in the Frobenius norm against float64: a few units in the last place of the input type. The result is
# rounded once to the type, and P once before the second product.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def attention_float64(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """One sample: q (Sq, H, D), k and v (Sk, Hk, D) to out (Sq, H, D) and lse (H, Sq), both float64.

    Without keys: zeros, and an lse of -inf. `scale` is D ** -0.5 by default.
    """
    length, heads, head_dim = q.shape
    if k.shape[0] == 0:
        lse = torch.full((heads, length), float("-inf"), dtype=torch.float64, device=q.device)
        return torch.zeros(q.shape, dtype=torch.float64, device=q.device), lse
    group = heads // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * (head_dim**-0.5 if scale is None else scale)
    lse = scores.logsumexp(-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), lse


def relative_error(value: Tensor, reference: Tensor) -> float:
    """norm(value - reference) / norm(reference), in float64."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())
