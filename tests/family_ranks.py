"""What the ranks of tests/test_diffusers_families.py do: every family spread over ranks against one process."""

from __future__ import annotations

from typing import Any

import torch
from tiny_families import TINY, generate_family, tiny_family

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import accelerate

CACHE = FirstBlockCache(1e6, warmup_steps=1)  # reuses every step that it may
TIMEOUT = 60.0
WAYS = {2: {"ulysses": 2}, 3: {"ring": 3}}  # three heads on two ranks; on three the first or the last has text alone


def run(rank: int, world: int) -> dict[str, Any]:
    """For every family: the largest difference, and what the cache has measured, alone and here."""
    return {name: _compared(name, WAYS[world]) for name in TINY}


@torch.no_grad()
def _compared(name: str, split: dict[str, int]) -> tuple[float, list[float | None], list[float | None]]:
    pipe = tiny_family(name)
    handle = accelerate(pipe, cache=CACHE)
    expected = generate_family(name, pipe, guided=True, steps=3)
    alone = [record.diff for record in handle.records]
    assert any(record.reused for record in handle.records)
    handle = accelerate(pipe, cache=CACHE, parallel=ContextParallel(**split, timeout=TIMEOUT))
    got = generate_family(name, pipe, guided=True, steps=3)
    return float((got - expected).abs().max() / expected.abs().max()), alone, [record.diff for record in handle.records]
