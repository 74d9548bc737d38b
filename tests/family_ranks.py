"""What the ranks of tests/test_diffusers_families.py do: every family spread over ranks against one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_families import TINY, generate_family, tiny_family
from torch import nn

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import Handle, accelerate
from para_kernels.integrations.diffusers.hooks import Argument

CACHE = FirstBlockCache(1e6, warmup_steps=1)  # reuses every step that it may
TIMEOUT = 60.0
Outcome = tuple[np.ndarray, dict[tuple[str, int], float], int]
WAYS = {2: {"ulysses": 2}, 3: {"ring": 3}}  # three heads on two ranks; on three the first or the last has text alone


def run(rank: int, world: int) -> dict[str, Outcome]:
    """For every family: what this rank makes."""
    return {name: made(name, parallel=ContextParallel(**WAYS[world], timeout=TIMEOUT)) for name in TINY}


@torch.no_grad()
def made(name: str, parallel: ContextParallel | None = None) -> Outcome:
    """Guided latents, what the cache has measured, by branch and step, and how many rows were here."""
    pipe = tiny_family(name)
    handle = accelerate(pipe, cache=CACHE, parallel=parallel)
    rows = rows_of(handle)
    latents = generate_family(name, pipe, guided=True, steps=3)
    assert any(record.reused for record in handle.records)
    changes = {(r.branch, r.step): r.diff for r in handle.records if r.diff is not None}
    (here,) = set(rows)
    return latents.numpy(), changes, here


def rows_of(handle: Handle) -> list[int]:
    """Will be filled with the rows of the joint sequence that the first block is given, call by call."""
    rows: list[int] = []
    first = getattr(handle.transformers[0], handle.family.block_lists[0])[0]
    streams = [Argument.of(first, name) for name in handle.family.shards.sequence]

    def listen(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(sum(stream.get(args, kwargs).shape[1] for stream in streams))

    first.register_forward_pre_hook(listen, with_kwargs=True)
    return rows
