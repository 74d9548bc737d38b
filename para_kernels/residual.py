"""The fused residual difference: how far a block's residual moved since the last step that was computed."""

from __future__ import annotations

import torch
from torch import Tensor

import para_kernels.ops  # noqa: F401  (defines the operators)
from para_kernels.checks import check_device_type, check_dtype, check_inference, check_same

RESIDUAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_residual_diff = torch.ops.para_kernels.residual_diff.default


def residual_diff(hidden_in: Tensor, hidden_out: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The residual of a block and its distance from an earlier residual, in one pass over memory.

    Method: First Block Cache (ParaAttention) measures mean|previous - residual| / mean|previous|, the relative L1
    distance of TeaCache (Liu et al. 2024, arXiv 2411.19108, section 3.2); both means are over the same elements, so
    the two sums suffice.

    Args:
        hidden_in: what went into the block, any shape (..., C); float32, bfloat16 or float16; rows may be strided.
        hidden_out: what came out, same shape, dtype and device.
        previous: an earlier residual of the same shape, dtype and device, or None.

    Returns:
        (residual, sums): residual = hidden_out - hidden_in in their dtype, contiguous; sums is float32 (2,) on the
        same device: (sum |previous - residual|, sum |previous|), accumulated in float32 or wider in a fixed order (two
        runs agree to the bit), and zeros where `previous` is None. Nothing is read on the host.

    Raises:
        ValueError: for another dtype, or tensors that differ in shape, dtype or device.
    """
    check_dtype("hidden_in", hidden_in, RESIDUAL_DTYPES)
    check_device_type("hidden_in", hidden_in)
    check_same("hidden_out", hidden_out, "hidden_in", hidden_in)
    if previous is not None:
        check_same("previous", previous, "hidden_in", hidden_in)
    check_inference(hidden_in=hidden_in, hidden_out=hidden_out, previous=previous)
    return _residual_diff(hidden_in, hidden_out, previous)
