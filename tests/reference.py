"""Attention and its preparation in float64, written out plainly: what every test of them compares with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from para_kernels.preparation import Norm, Rotary, Stream

# Largest allowed norm(out - ref) / norm(ref). float32: rounding of the inputs' products and sums, a few ulp of 6e-8.
# bfloat16 and float16: the output's own rounding (half an ulp, at most 2^-8 and 2^-11, of each element) and that of the
# probabilities, which average out over the norm.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def error(out: Tensor, ref: Tensor) -> float:
    """norm(out - ref) / norm(ref) in float64; infinite for a NaN; 0 where both are empty or zero."""
    out, ref = out.double().cpu(), ref.double().cpu()
    assert out.shape == ref.shape, f"{tuple(out.shape)} against {tuple(ref.shape)}"
    if out.numel() == 0:
        return 0.0
    if not torch.isfinite(out).all():
        return float("inf")
    scale = ref.norm().item()
    distance = (out - ref).norm().item()
    return distance / scale if scale > 0 else distance


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """One sample: q (Sq, H, D), k and v (Sk, Hk, D) -> out (Sq, H, D) float64, lse (H, Sq) float64."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)))
    scores = torch.einsum("qhd,khd->hqk", q, k) * factor
    if k.shape[0] == 0:
        return torch.zeros_like(q), torch.full(scores.shape[:2], float("-inf"), dtype=torch.float64, device=q.device)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def attention_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: list[int] | None = None,
    q_lens: list[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A batch with lengths: rows past q_lens are zeros with an lse of -inf, keys past kv_lens are not there."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        q_len = q.shape[1] if q_lens is None else q_lens[b]
        kv_len = k.shape[1] if kv_lens is None else kv_lens[b]
        out[b, :q_len], lse[b, :, :q_len] = attention(q[b, :q_len], k[b, :kv_len], v[b, :kv_len], scale)
    return out, lse


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Packed samples: q (T, H, D) -> out (T, H, D), lse (H, T)."""
    parts = [
        attention(q[q0:q1], k[k0:k1], v[k0:k1], scale)
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def lse_error(lse: Tensor, ref: Tensor) -> float:
    """Largest absolute difference where the reference is finite; infinite if the -inf entries do not agree."""
    lse, ref = lse.double().cpu(), ref.double().cpu()
    empty = torch.isinf(ref)
    if not torch.equal(empty, lse == float("-inf")) or torch.isnan(lse).any():
        return float("inf")
    return (lse - ref)[~empty].abs().max().item() if (~empty).any() else 0.0


class Made(NamedTuple):
    """A `Source` of q, k and v that are there already."""

    q: Tensor
    k: Tensor
    v: Tensor

    def prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def write_keys(self, k: Tensor, v: Tensor) -> None:
        k.copy_(self.k)
        v.copy_(self.v)

    def write_queries(self, q: Tensor) -> None:
        q.copy_(self.q)

    @property
    def outlines(self) -> list[Tensor]:
        return [x.new_full((x.shape[-1],), float("nan")).expand(x.shape) for x in self]


def piece_of(q: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values (B, S, H, D) as they lie in a ring's piece, NaN, behind a row of others."""
    batch, rows, heads, head_dim = shape
    memory = q.new_full((1 + 2 * batch * rows * heads, head_dim), float("nan"))
    keys, values = memory[1:].view(heads, batch, 2, rows, head_dim).permute(2, 1, 3, 0, 4)
    return keys, values


def prepared(streams: list[Stream], half: bool) -> list[Tensor]:
    """q, k, v (B, sum of S, H, D) float64: RoPE as a product of complex numbers."""
    queries = [rotated(normed(stream.query, stream.norm_query), stream.rotary, half) for stream in streams]
    keys = [rotated(normed(stream.key, stream.norm_key), stream.rotary, half) for stream in streams]
    values = [stream.value.double() for stream in streams if stream.value is not None]
    return [torch.cat(parts, 1) for parts in (queries, keys, values) if parts]


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x (B, S, H, D) in float64."""
    x = x.double()
    if norm is None:
        return x
    rows = x.flatten(2) if norm.over == "heads" else x
    if norm.kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        rows = rows * norm.weight.double()
    if norm.bias is not None:
        rows = rows + norm.bias.double()
    return rows.reshape(x.shape)


def rotated(x: Tensor, rotary: Rotary | None, half: bool) -> Tensor:
    """x (B, S, H, D) float64."""
    if rotary is None:
        return x
    cos, sin = (angle.double() for angle in rotary)
    if cos.shape[-1] == x.shape[-1]:
        cos, sin = (angle[..., : x.shape[-1] // 2] if half else angle[..., ::2] for angle in (cos, sin))
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    real, imaginary = x.chunk(2, -1) if half else (x[..., ::2], x[..., 1::2])
    turned = torch.complex(real, imaginary) * torch.complex(cos, sin)
    if half:
        return torch.cat([turned.real, turned.imag], -1)
    return torch.view_as_real(turned).flatten(-2)
