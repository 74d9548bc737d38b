"""What the ranks of tests/test_diffusers_families.py do: every family spread over ranks against one process."""

from __future__ import annotations

import numpy as np
import torch
from tiny_families import TINY, generate_family, tiny_family

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import accelerate

CACHE = FirstBlockCache(1e6, warmup_steps=1)  # reuses every step that it may
TIMEOUT = 60.0
Outcome = tuple[np.ndarray, dict[tuple[str, int], float], tuple[int, ...]]
WAYS = {2: {"ulysses": 2}, 3: {"ring": 3}}  # three heads on two ranks; on three the first or the last has text alone


def run(rank: int, world: int) -> dict[str, Outcome]:
    """For every family: what this rank makes."""
    return {name: made(name, parallel=ContextParallel(**WAYS[world], timeout=TIMEOUT)) for name in TINY}


@torch.no_grad()
def made(name: str, parallel: ContextParallel | None = None) -> Outcome:
    """Guided latents, what the cache has measured, by branch and step, and how many rows each rank had."""
    pipe = tiny_family(name)
    handle = accelerate(pipe, cache=CACHE, parallel=parallel)
    latents = generate_family(name, pipe, guided=True, steps=3)
    assert any(record.reused for record in handle.records)
    changes = {(r.branch, r.step): r.diff for r in handle.records if r.diff is not None}
    return latents.numpy(), changes, handle.spread.last_pieces if handle.spread else ()
