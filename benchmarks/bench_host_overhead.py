"""Where the host's time of one attention call goes: the public function, and the layers below it by themselves.

Run on a GPU: ``python -m pytest benchmarks/bench_host_overhead.py``. The problem is so small that the device keeps up.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.inputs import attention_inputs, lens_tensor
from benchmarks.peers import sdpa
from benchmarks.record import OURS
from para_kernels import _C, flash_attention, ops

LENGTH, HEADS, HEAD_DIM, DTYPE = 64, 2, 128, torch.bfloat16
SCALE = HEAD_DIM**-0.5


def layers(device: torch.device) -> dict[str, Callable[[], object]]:
    """Each is part of the one before it, but for the peer and for one launch of torch's, for scale."""
    q, k, v = attention_inputs(1, LENGTH, HEADS, HEAD_DIM, DTYPE, device)
    lens = lens_tensor([LENGTH - 14], device)
    return {
        OURS: lambda: flash_attention(q, k, v, kv_lens=lens),
        "operator": lambda: torch.ops.para_kernels.flash_attention.default(q, k, v, lens, None, SCALE),
        "implementation": lambda: _C.cuda_attention(q, k, v, None, lens, SCALE),
        "outputs": lambda: _C.attention_outputs(q),
        "outputs from torch": lambda: ops._attention_outputs(q),
        "SDPA without lengths": lambda: sdpa(q, k, v),
        "zero_": lambda: q.zero_(),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the host's time is the operator's")
@pytest.mark.benchmark(timer=time.perf_counter, warmup=True, warmup_iterations=50)
@pytest.mark.parametrize("layer", layers(torch.device("cpu")))
def test_host_overhead(layer: str, device: torch.device, measure: Callable[..., None]) -> None:
    shape = {"B": 1, "S": LENGTH, "H": HEADS, "D": HEAD_DIM}
    with torch.no_grad():
        measure(layers(device)[layer], op="host_flash_attention", shape=shape, dtype=DTYPE, kernel=layer)
