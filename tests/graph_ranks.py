"""What the ranks of tests/test_diffusers_graphs.py and ..._graphs_cache.py do: recorded forwards over several ranks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from compile_ranks import difference
from fake_graphs import fake_capture_for
from hits_and_misses import POLICIES, STEPS, pattern
from tiny_families import generate_family, tiny_family
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.cache import Policy
from para_kernels.integrations.diffusers import accelerate, graphs

TIMEOUT = 60.0
SIZES: dict[str, dict[str, Any]] = {"short": {}, "long": {"height": 80, "max_sequence_length": 5}}


def run(rank: int, world: int) -> dict[str, Any]:
    with patch.object(graphs, "capture_for", fake_capture_for):
        return {
            "hunyuan": {
                name: hunyuan(ContextParallel(**split, timeout=TIMEOUT)) for name, split in ways(world).items()
            },
            "families": {name: family(name, world) for name in ("FLUX.1-dev", "Wan 2.1")},
            "cached": {
                policy: with_cache(POLICIES[policy], ContextParallel(**{split: world}, timeout=TIMEOUT))
                for policy, split in CACHED[world].items()
            },
            "moved": moved_on_one(rank, world),
            "skips": skips(world),
        }


def moved_on_one(rank: int, world: int) -> float:
    """The weights of one rank move: it records anew, and the others go on with what they have. All steps but the first
    are reused."""
    pipe = tiny_pipeline()
    accelerate(pipe, cache=100.0)
    expected = [generate(pipe, PROMPTS[: 2 + call % 2]) for call in range(4)]
    accelerate(pipe, parallel=ContextParallel(ring=world, timeout=TIMEOUT), graphs=True)
    worst = 0.0
    for call, one_process in enumerate(expected):
        worst = max(worst, difference(generate(pipe, PROMPTS[: 2 + call % 2]), one_process))
        if rank == world - 1:
            for parameter in pipe.transformer.parameters():  # type: ignore[union-attr]
                parameter.data = parameter.data.clone()
    return worst


# Of Stable Diffusion 3.5: a third pass, which leaves out the last but one block.
SKIPS = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_scale": 2.8,
    "skip_layer_guidance_start": 0.0,
    "skip_layer_guidance_stop": 1.0,
}


def skips(world: int) -> float:
    name, policy = "Stable Diffusion 3.5 medium", FirstBlockCache(9.0, last_blocks=1, max_consecutive_hits=1)
    pipe = tiny_family(name)
    accelerate(pipe, cache=policy)
    expected = generate_family(name, pipe, guided=True, steps=6, **SKIPS)
    accelerate(pipe, parallel=ContextParallel(ring=world, timeout=TIMEOUT), graphs=True)
    return difference(generate_family(name, pipe, guided=True, steps=6, **SKIPS), expected)


CACHED = {
    2: {"taylor": "ring", "adacache": "batch"},
    3: {"first and last blocks": "ulysses", "teacache": "ring"},
}


def with_cache(policy: Policy, parallel: ContextParallel) -> dict[str, Any]:
    """Two sizes in turns, with a cache: the largest difference from one process, what was decided and what recorded."""
    pipe = tiny_pipeline()
    handle, expected = accelerate(pipe, cache=policy), {}
    for name, size in SIZES.items():
        expected[name] = generate(pipe, PROMPTS[:2], steps=STEPS, **size), pattern(handle)
    handle = accelerate(pipe, parallel=parallel, graphs=True)
    worst, patterns, order = 0.0, [], [*SIZES, *SIZES]
    for name in order:
        worst = max(worst, difference(generate(pipe, PROMPTS[:2], steps=STEPS, **SIZES[name]), expected[name][0]))
        patterns.append(pattern(handle))
    (recorded,) = handle.graphs
    return {
        "worst": worst,
        "patterns": patterns,
        "expected": [expected[name][1] for name in order],
        "counts": [(one.recorded.parts, one.replays) for one in recorded.forwards.values()],
    }


def ways(world: int) -> dict[str, dict[str, int]]:
    found = {"ring": {"ring": world}, "ulysses": {"ulysses": world}}
    return found | ({"batch": {"batch": world}} if world == 2 else {})


def hunyuan(parallel: ContextParallel) -> dict[str, Any]:
    """Two sizes in turns: the largest difference from one process, what was recorded, how often it was replayed."""
    pipe = tiny_pipeline()
    accelerate(pipe)
    expected = {name: generate(pipe, PROMPTS[:2], **size) for name, size in SIZES.items()}
    handle = accelerate(pipe, parallel=parallel, graphs=True)
    worst = 0.0
    for name in [*SIZES, *SIZES]:
        worst = max(worst, difference(generate(pipe, PROMPTS[:2], **SIZES[name]), expected[name]))
    (recorded,) = handle.graphs
    found = {
        "worst": worst,
        "counts": [(one.recorded.graphs, one.recorded.calls, one.replays) for one in recorded.forwards.values()],
        "summary": handle.summary(),
    }
    handle.remove()
    return found


@torch.no_grad()
def family(name: str, world: int) -> float:
    """Guided latents: the difference from one process."""
    pipe = tiny_family(name)
    accelerate(pipe)
    expected = generate_family(name, pipe, guided=True)
    handle = accelerate(pipe, parallel=ContextParallel(ring=world, timeout=TIMEOUT), graphs=True)
    got = generate_family(name, pipe, guided=True)
    assert all(known.forwards for known in handle.graphs)
    return difference(got, expected)
