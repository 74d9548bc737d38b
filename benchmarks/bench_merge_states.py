"""The softmax merge of two partial attentions against the eager expression.

Run: ``python -m pytest benchmarks/bench_merge_states.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.inputs import hidden_states
from benchmarks.peers import eager_merge_states
from benchmarks.record import OURS
from para_kernels import merge_states

ON_GPU = torch.cuda.is_available()
SHAPE = (1, 119056, 24, 128) if ON_GPU else (4, 1536, 8, 64)
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [OURS, "eager"])
def test_merge_states(kernel: str, dtype: torch.dtype, device: torch.device, measure: Callable[..., None]) -> None:
    batch, length, heads, _ = SHAPE
    out_a, out_b = (hidden_states(SHAPE, dtype, device) for _ in range(2))
    lse_a, lse_b = (hidden_states((batch, heads, length), torch.float32, device) for _ in range(2))
    function = merge_states if kernel == OURS else eager_merge_states
    measure(
        lambda: function(out_a, lse_a, out_b, lse_b),
        op="merge_states",
        shape=dict(zip("BSHD", SHAPE, strict=True)),
        dtype=dtype,
        kernel=kernel,
        bytes=3.0 * (out_a.nbytes + lse_a.nbytes),  # two reads, one write
    )
