"""What the ranks of tests/test_diffusers_linears.py do: FP8 linears over ranks against one process."""

from __future__ import annotations

from typing import Any

from diffusers_ranks import digest
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import Fp8Linears, accelerate

TIMEOUT = 120.0


def run(rank: int, world: int, parallel: dict[str, int]) -> dict[str, Any]:
    """How far from one process, how far FP8 is from exact there, and the decisions of the cache on both ways."""
    pipe = tiny_pipeline()
    exact = generate(pipe, PROMPTS[:2], steps=4)
    handle = accelerate(pipe, cache=FirstBlockCache(0.35, warmup_steps=1), linears=Fp8Linears(keep_originals=True))
    alone = generate(pipe, PROMPTS[:2], steps=4)
    reused_alone = [record.reused for record in handle.records]
    accelerate(pipe, parallel=ContextParallel(**parallel, timeout=TIMEOUT))
    got = generate(pipe, PROMPTS[:2], steps=4)
    return {
        "output": digest(got),
        "difference": float((got - alone).norm() / alone.norm()),
        "fp8": float((alone - exact).norm() / exact.norm()),
        "reused alone": reused_alone,
        "reused": [record.reused for record in handle.records],
    }
