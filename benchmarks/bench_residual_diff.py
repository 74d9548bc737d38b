"""The cache's fused metric against the eager expression.

Run: ``python -m pytest benchmarks/bench_residual_diff.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.inputs import hidden_states
from benchmarks.peers import eager_residual_diff
from benchmarks.record import OURS
from para_kernels import residual_diff

ON_GPU = torch.cuda.is_available()
# HunyuanVideo at 720p and 129 frames; on a CPU a tensor past the caches (50 MB in fp32).
SHAPE = (1, 119056, 3072) if ON_GPU else (4, 6144, 512)
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [OURS, "eager"])
def test_with_previous(kernel: str, dtype: torch.dtype, device: torch.device, measure: Callable[..., None]) -> None:
    hidden_in, hidden_out, previous = (hidden_states(SHAPE, dtype, device) for _ in range(3))
    function = residual_diff if kernel == OURS else eager_residual_diff
    measure(
        lambda: function(hidden_in, hidden_out, previous),
        op="residual_diff",
        shape=dict(zip("BSC", SHAPE, strict=True)),
        dtype=dtype,
        kernel=kernel,
        bytes=4.0 * hidden_in.nbytes,  # three reads, one write
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [OURS, "eager"])
def test_first_step(kernel: str, dtype: torch.dtype, device: torch.device, measure: Callable[..., None]) -> None:
    hidden_in, hidden_out = (hidden_states(SHAPE, dtype, device) for _ in range(2))
    measure(
        (lambda: residual_diff(hidden_in, hidden_out, None)) if kernel == OURS else (lambda: hidden_out - hidden_in),
        op="residual_diff_first",
        shape=dict(zip("BSC", SHAPE, strict=True)),
        dtype=dtype,
        kernel=kernel,
        bytes=3.0 * hidden_in.nbytes,  # two reads, one write
    )
