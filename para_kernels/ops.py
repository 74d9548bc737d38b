"""The operators: schemas, fakes, and which code runs on which device. The public functions check the arguments.

Every operator is functional and opaque to `torch.compile`. On CUDA nothing reads a device value on the host; on the
CPU, where there is no device to wait for, lengths are read and checked.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

try:  # The compiled CPU kernels; without them (PARA_KERNELS_SKIP_EXT=1) the torch expressions below take their place.
    from para_kernels import _C
except ImportError:
    _C: ModuleType | None = None

if _C is not None and not hasattr(_C, "signature"):
    raise ImportError("para_kernels._C was built from older sources: build the package again")

EXTENSION_AVAILABLE = _C is not None
TRITON_AVAILABLE = importlib.util.find_spec("triton") is not None

_library = torch.library.Library("para_kernels", "DEF")
_library.define(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor? kv_lens, Tensor? q_lens, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "flash_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "residual_diff(Tensor hidden_in, Tensor hidden_out, Tensor? previous) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "prepare(Tensor[] projections, Tensor?[] weights, Tensor?[] biases, int[] norms, float[] eps, Tensor?[] cos,"
    " Tensor?[] sin, bool half) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# --- outputs ----------------------------------------------------------------------------------------------------------


def _attention_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty and contiguous (out, lse): like q (B, S, H, D) and float32 (B, H, S); packed (T, H, D) and (H, T)."""
    *batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((*batch, heads, length), dtype=torch.float32)


def prepared_outputs(projections: list[Tensor], streams: int) -> list[Tensor]:
    """Empty (B, sum of S, H, D), stored (B, H, sum of S, D): one for each projection of a stream."""
    each = len(projections) // streams
    batch, _, heads, head_dim = projections[0].shape
    tokens = sum(x.shape[1] for x in projections[::each])
    return [projections[0].new_empty((batch, heads, tokens, head_dim)).transpose(1, 2) for _ in range(each)]


# --- fakes: shapes and dtypes for torch.compile -----------------------------------------------------------------------


@torch.library.register_fake("para_kernels::flash_attention", lib=_library)
def _flash_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _attention_outputs(q)


@torch.library.register_fake("para_kernels::flash_attention_varlen", lib=_library)
def _flash_attention_varlen_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _attention_outputs(q)


@torch.library.register_fake("para_kernels::merge_states", lib=_library)
def _merge_states_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(out_a, memory_format=torch.contiguous_format),
        torch.empty_like(lse_a, memory_format=torch.contiguous_format),
    )


@torch.library.register_fake("para_kernels::residual_diff", lib=_library)
def _residual_diff_fake(hidden_in: Tensor, hidden_out: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    residual = torch.empty_like(hidden_in, memory_format=torch.contiguous_format)
    return residual, hidden_in.new_empty((2,), dtype=torch.float32)


@torch.library.register_fake("para_kernels::prepare", lib=_library)
def _prepare_fake(
    projections: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    norms: list[int],
    eps: list[float],
    cos: list[Tensor | None],
    sin: list[Tensor | None],
    half: bool,
) -> list[Tensor]:
    return prepared_outputs(projections, len(cos))


# --- CPU: torch's own flash attention on the true lengths, C++ for the reductions -------------------------------------


def _host_lens(name: str, lens: Tensor | None, samples: int, longest: int) -> list[int]:
    if lens is None:
        return [longest] * samples
    values = lens.tolist()
    if any(not 0 <= value <= longest for value in values):
        raise ValueError(f"{name}: got {values}, every length must lie in 0 ... {longest}")
    return values


def _host_offsets(name: str, cu_seqlens: Tensor, total: int, longest: int) -> list[int]:
    values = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(values)]
    if values[0] != 0 or values[-1] > total or any(not 0 <= length <= longest for length in lengths):
        raise ValueError(
            f"{name}: got {values}, allowed are offsets that start at 0, never fall, end at {total} or before it,"
            f" and whose steps are at most the maximum length {longest}"
        )
    return values


def _cpu_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of one sample, q (Sq, H, D) over k, v (Sk, Hk, D), into out (Sq, H, D) and lse (H, Sq).

    Query heads that share a key head are taken one from each group at a time, so that keys are never repeated in
    memory.
    """
    if k.shape[0] == 0 or q.shape[0] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
    for group in range(groups):
        queries = q[:, group::groups].transpose(0, 1).unsqueeze(0)
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, False, attn_mask=None, scale=scale
        )
        out[:, group::groups] = part[0].transpose(0, 1)
        lse[group::groups] = part_lse[0]


def _attend_each_sample(
    attend: Callable[..., None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Samples cut to their lengths, one after the other; `attend` writes the out and lse that it is given."""
    out, lse = _attention_outputs(q)
    queries = _host_lens("q_lens", q_lens, q.shape[0], q.shape[1])
    keys = _host_lens("kv_lens", kv_lens, q.shape[0], k.shape[1])
    for b, (q_len, kv_len) in enumerate(zip(queries, keys, strict=True)):
        attend(q[b, :q_len], k[b, :kv_len], v[b, :kv_len], scale, out[b, :q_len], lse[b, :, :q_len])
        out[b, q_len:] = 0
        lse[b, :, q_len:] = float("-inf")
    return out, lse


@torch.library.impl(_library, "flash_attention", "CPU")
def _flash_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend_each_sample(_cpu_attend, q, k, v, kv_lens, q_lens, scale)


@torch.library.impl(_library, "flash_attention_varlen", "CPU")
def _flash_attention_varlen_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_outputs(q)
    queries = _host_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    keys = _host_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    for (q0, q1), (k0, k1) in zip(pairwise(queries), pairwise(keys), strict=True):
        _cpu_attend(q[q0:q1], k[k0:k1], v[k0:k1], scale, out[q0:q1], lse[:, q0:q1])
    out[queries[-1] :] = 0
    lse[:, queries[-1] :] = float("-inf")
    return out, lse


def _merge_states_torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The merge as torch expressions: what the CPU runs when the extension is not built."""
    lse = torch.logaddexp(lse_a, lse_b).contiguous()
    # Where both states are empty there is nothing to weigh: exp(-inf - 0) is 0.
    anchor = torch.where(lse == float("-inf"), 0.0, lse)
    merged = torch.zeros((), dtype=out_a.dtype)
    for out, state in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(state - anchor).transpose(-1, -2).unsqueeze(-1)
        # The rows of a state without keys are not looked at: they may hold anything, NaN included.
        merged = merged + torch.where(state.transpose(-1, -2).unsqueeze(-1) == float("-inf"), 0.0, out * weight)
    return merged.to(out_a.dtype).contiguous(), lse


def _residual_diff_torch(hidden_in: Tensor, hidden_out: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual and its sums as torch expressions: what the CPU runs when the extension is not built."""
    residual = (hidden_out - hidden_in).contiguous()
    if previous is None:
        return residual, torch.zeros(2, dtype=torch.float32, device=hidden_in.device)
    wide = torch.promote_types(hidden_in.dtype, torch.float32)
    before, after = previous.to(wide), residual.to(wide)
    return residual, torch.stack([(before - after).abs().sum(), before.abs().sum()]).float()


def _prepare_cpu_into(
    projections: list[Tensor],
    outputs: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    norms: list[int],
    eps: list[float],
    cos: list[Tensor | None],
    sin: list[Tensor | None],
    half: bool,
    first_part: int,
) -> None:
    """The expressions of diffusers one after the other, in their order and dtypes."""
    each = len(outputs)
    first = 0
    for stream, (cos_of_stream, sin_of_stream) in enumerate(zip(cos, sin, strict=True)):
        for i, out in enumerate(outputs):
            j = stream * each + i
            x = _normed(projections[j], norms[j], weights[j], biases[j], eps[j])
            if first_part + i < 2 and cos_of_stream is not None and sin_of_stream is not None:
                x = _rotated(x, cos_of_stream, sin_of_stream, half)
            out[:, first : first + x.shape[1]] = x
        first += projections[stream * each].shape[1]


def _normed(x: Tensor, norm: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (B, S, H, D) after the norm of that number (para_kernels/triton_kernels/prepare.py), in the dtype of x."""
    if norm == 0:
        return x
    if norm == 2:
        wide = x.dtype if weight is None else weight.dtype
        return torch.nn.functional.layer_norm(x.to(wide), (x.shape[-1],), weight, bias, eps).to(x.dtype)
    over_heads, round_first = norm & 2 != 0, norm & 4 != 0
    rows = x.flatten(2) if over_heads else x
    normed = rows * torch.rsqrt(rows.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed.to(x.dtype).view(x.shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """RoPE in float32: (a cos - b sin, b cos + a sin) for each pair of channels (a, b) of x (B, S, H, D).

    The same products and sums as diffusers' `apply_rotary_emb`, so the same bits, without writing out the swapped copy
    of x and its float32 image: about a third of the memory traffic.
    """
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = (torch.cat([y, y], -1) if half else y.repeat_interleave(2, -1) for y in (cos, sin))
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    width = x.shape[-1]
    a, b = (slice(width // 2), slice(width // 2, None)) if half else (slice(0, None, 2), slice(1, None, 2))
    out = x * cos
    out[..., a] -= x[..., b] * sin[..., a]
    out[..., b] += x[..., a] * sin[..., b]
    return out


if not EXTENSION_AVAILABLE:
    _library.impl("merge_states", _merge_states_torch, "CPU")
    _library.impl("residual_diff", _residual_diff_torch, "CPU")


# --- CUDA: Triton -----------------------------------------------------------------------------------------------------


@functools.cache
def _triton() -> ModuleType:
    """The Triton kernels, imported when first needed: without a GPU there may be no Triton."""
    from para_kernels import triton_kernels
    from para_kernels.triton_kernels import (  # noqa: F401
        dispatch,
        dispatch8,
        launch,
        merge_states,
        prepare,
        residual_diff,
        ring_attention,
    )

    launch.use_extension(_C)
    return triton_kernels


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    scale: float,
    packed_max_q: int | None,
) -> None:
    _triton().dispatch.attention_forward(
        q, k, v, out, lse, q_lens, kv_lens, scale, packed_max_q=packed_max_q, capability=_capability(q.device)
    )


def _flash_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_outputs(q)
    _attention_forward(q, k, v, out, lse, q_lens, kv_lens, scale, None)
    return out, lse


def _flash_attention_varlen_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    # Rows of no sample come back as on the CPU.
    out, lse = _attention_outputs(q)
    out.zero_()
    lse.fill_(float("-inf"))
    _attention_forward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, max_seqlen_q)
    return out, lse


if _C is not None:  # It has registered both operators, and launches calls like earlier ones itself.
    _C.use_attention_forward(_attention_forward)
else:
    _library.impl("flash_attention", _flash_attention_cuda, "CUDA")
    _library.impl("flash_attention_varlen", _flash_attention_varlen_cuda, "CUDA")


@torch.library.impl(_library, "merge_states", "CUDA")
def _merge_states_cuda(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return _triton().merge_states.merge_states_forward(out_a, lse_a, out_b, lse_b)


@torch.library.impl(_library, "residual_diff", "CUDA")
def _residual_diff_cuda(hidden_in: Tensor, hidden_out: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    return _triton().residual_diff.residual_diff_forward(hidden_in, hidden_out, previous)


# --- both -------------------------------------------------------------------------------------------------------------


def prepare_into(
    outputs: list[Tensor],
    projections: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    norms: list[int],
    eps: list[float],
    cos: list[Tensor | None],
    sin: list[Tensor | None],
    half: bool,
    first_part: int = 0,
) -> None:
    """As the operator `prepare`, into the caller's memory, in which a head's rows lie one behind the other.

    `first_part`: of q, k and v the first one that is there.
    """
    prepare = _prepare_cpu_into if outputs[0].device.type == "cpu" else _triton().prepare.prepare_forward
    prepare(projections, outputs, weights, biases, norms, eps, cos, sin, half, first_part)


def _prepare(
    projections: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    norms: list[int],
    eps: list[float],
    cos: list[Tensor | None],
    sin: list[Tensor | None],
    half: bool,
) -> list[Tensor]:
    outputs = prepared_outputs(projections, len(cos))
    prepare_into(outputs, projections, weights, biases, norms, eps, cos, sin, half)
    return outputs


for _device in ("CPU", "CUDA"):
    _library.impl("prepare", _prepare, _device)
