"""What the ranks of tests/test_diffusers_offload.py do: offloaded and spread over ranks, against not offloaded."""

from __future__ import annotations

import torch
from offloading import WAYS
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import accelerate

CACHE = FirstBlockCache(0.35, warmup_steps=1)
CASES = [(way, order) for way in ("sequential", "group of two") for order in ("offload first", "offload last")]
Case = tuple[str, str]


def run(rank: int, world: int) -> dict[Case, str]:
    """For every case: whether it is to the bit the result without offloading, and what the cache did."""
    parallel = ContextParallel(ring=2, timeout=120.0)
    expected = None
    seen: dict[Case, str] = {}
    for case in [None, *CASES]:
        pipe = tiny_pipeline()
        if case is not None and case[1] == "offload first":
            WAYS[case[0]](pipe)
        handle = accelerate(pipe, cache=CACHE, parallel=parallel)
        if case is not None and case[1] == "offload last":
            WAYS[case[0]](pipe)
        got = generate(pipe, PROMPTS[:2], steps=4)
        reused = sum(record.reused for record in handle.records)
        if case is None:
            expected = got
        else:
            assert expected is not None
            same = "equal" if torch.equal(got, expected) else "other"
            seen[case] = f"{same}, reused {reused} of {len(handle.records)} steps"
    return seen
