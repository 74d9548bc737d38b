"""What the ranks of tests/test_diffusers_linears.py do: FP8 linears over ranks against one process."""

from __future__ import annotations

from typing import Any

from diffusers_ranks import digest
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import accelerate

TIMEOUT = 120.0


WAYS: dict[str, dict[str, int]] = {"ring": {"ring": 2}, "ulysses": {"ulysses": 2}}


def run(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """For every way: how far from one process, how far FP8 is from exact there, and the cache's decisions on both."""
    pipe = tiny_pipeline()
    exact = generate(pipe, PROMPTS[:2], steps=4)
    handle = accelerate(pipe, cache=FirstBlockCache(0.35, warmup_steps=1), linears="fp8")
    alone = generate(pipe, PROMPTS[:2], steps=4)
    fp8, reused = float((alone - exact).norm() / exact.norm()), [record.reused for record in handle.records]
    seen = {}
    for name, way in WAYS.items():
        accelerate(pipe, parallel=ContextParallel(**way, timeout=TIMEOUT))
        got = generate(pipe, PROMPTS[:2], steps=4)
        seen[name] = {
            "output": digest(got),
            "difference": float((got - alone).norm() / alone.norm()),
            "fp8": fp8,
            "reused alone": reused,
            "reused": [record.reused for record in handle.records],
        }
    return seen
