"""cuDNN's attention, for the sizes at which `hopper_choice.is_cudnn_faster` says that it is faster than the kernel."""

from __future__ import annotations

import functools

import torch

from .hopper_choice import is_cudnn_faster, takes
from .launch import keep_cudnn_plan, keeps_plans


def cudnn_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float
) -> bool:
    """Write `out` and `lse` by cuDNN, and leave calls like this one to C++, which hands cuDNN's outputs on as they are;
    False, and nothing is written, where another kernel is faster or cuDNN cannot.

    Arguments are those of `attention.attention_forward` without lengths. Every later call is C++ alone, since a copy of
    the output would cost more than cuDNN gains.
    """
    if not keeps_plans() or not _is_planned(q.shape, k.shape, q.stride(), q.dtype, q.device):
        return False
    try:
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), None, True, scale=scale
        )
    except RuntimeError:  # no cuDNN, or one that is too old for this
        return False
    out.copy_(result[0].transpose(1, 2))
    lse.copy_(result[1].reshape(lse.shape))
    keep_cudnn_plan(q, k, v)
    return True


@functools.lru_cache(maxsize=4096)
def _is_planned(
    q_shape: torch.Size, k_shape: torch.Size, q_stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    if 0 in q_shape or 0 in k_shape or not takes(dtype, q_shape[3]):
        return False
    # cuDNN lays its output out as q: where q is stored by heads, it would have to be copied.
    if not q_stride[0] >= q_stride[1] >= q_stride[2] >= q_stride[3] == 1:
        return False
    samples, queries, heads, head_dim = q_shape
    of = torch.cuda.get_device_properties(device)
    return is_cudnn_faster(head_dim, queries, k_shape[1], heads, samples, of.multi_processor_count)
