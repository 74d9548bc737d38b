"""What the ranks of tests/test_diffusers_int8.py do: attention in 8 bits over ranks against one process."""

from __future__ import annotations

from typing import Any

from diffusers_ranks import digest
from reference import error
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import accelerate, parallelize_pipe

TIMEOUT = 120.0
WAYS: dict[str, dict[str, int]] = {"ring": {"ring": 2}, "ulysses": {"ulysses": 2}, "batch": {"batch": 2}}
CACHE = FirstBlockCache(0.35, warmup_steps=1)


def run(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """For every way: how far 8 bits are from exact attention there, with a cache, and what is left of them after."""
    pipe = tiny_pipeline()
    handle = accelerate(pipe, cache=CACHE)
    exact = generate(pipe, PROMPTS[:2], steps=4)
    accelerate(pipe, attention="int8")
    alone = generate(pipe, PROMPTS[:2], steps=4)
    reused = [record.reused for record in handle.records]
    seen = {}
    for name, way in WAYS.items():
        accelerate(pipe, attention="int8", parallel=ContextParallel(**way, timeout=TIMEOUT))
        got = generate(pipe, PROMPTS[:2], steps=4)
        seen[name] = {
            "output": digest(got),
            "from exact": error(got, exact),
            "from one process": error(got, alone),
            "same decisions": [record.reused for record in handle.records] == reused,
            "summary": handle.summary().splitlines()[1],
        }
        accelerate(pipe)
        seen[name]["exact again"] = error(generate(pipe, PROMPTS[:2], steps=4), exact)
    seen["by hand"] = {"kept": _kept_by_parallelize_pipe(pipe)}
    try:
        accelerate(pipe, attention="int8" if rank else "exact")
        generate(pipe, PROMPTS[:2], steps=1)
        seen["differ"] = {"said": "nothing"}
    except ValueError as refused:
        seen["differ"] = {"said": str(refused)}
    return seen


def _kept_by_parallelize_pipe(pipe: Any) -> bool:
    accelerate(pipe, attention="int8", parallel=None)
    return parallelize_pipe(pipe, timeout=TIMEOUT).settings.attention == "int8"
