"""What the ranks of tests/test_diffusers_compile.py do: compiled blocks over several ranks, put on in every order."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from tiny_families import generate_family, tiny_family
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline
from torch import Tensor
from torch._dynamo.utils import counters

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import accelerate

TIMEOUT = 120.0  # of a rank that waits for another, which may be compiling
CACHE = FirstBlockCache(0.35, warmup_steps=1)
SHORT = {"height": 48, "width": 48, "num_frames": 13, "max_sequence_length": 5}
LONG = {"height": 80, "width": 48, "num_frames": 13, "max_sequence_length": 23}
MIDDLE = {"height": 64, "width": 48, "num_frames": 13, "max_sequence_length": 11}
ORDERS = list(itertools.permutations(["compile", "cache", "parallel"]))


def graphs() -> int:
    """How many have been compiled in this process."""
    return counters["stats"]["unique_graphs"]


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def run(rank: int, world: int) -> dict[str, Any]:
    """Every case; all ranks compile the same things at the same time, and none waits long."""
    return {case.__name__: case(world) for case in (added_and_removed, orders, dual_attention)}


def added_and_removed(world: int) -> dict[str, Any]:
    """One installation whose blocks are compiled, re-tuned: against the same without compiling.

    On all sizes the first rank has rows of the video alone, and the last has both.
    """
    pipe = tiny_pipeline(num_layers=0)
    ring, ulysses = (ContextParallel(**split, timeout=TIMEOUT) for split in ({"ring": world}, {"ulysses": world}))
    steps: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("alone", {"parallel": None, "cache": None}, SHORT),
        ("ring", {"parallel": ring}, SHORT),
        ("ring, longer", {}, LONG),
        ("ring, between", {}, MIDDLE),
        ("ring, cache", {"cache": CACHE}, LONG),
        ("ulysses, cache", {"parallel": ulysses}, MIDDLE),
        ("cache", {"parallel": None}, LONG),
        ("alone again", {"cache": None}, SHORT),
    ]
    expected = []
    for _, settings, arguments in steps:
        accelerate(pipe, **(settings | {"parallel": None}))
        expected.append(generate(pipe, PROMPTS[:2], steps=3, **arguments))
    handle = accelerate(pipe, cache=None, compile="eager")
    seen: dict[str, tuple[float, int]] = {}
    for (name, settings, arguments), one_process in zip(steps, expected, strict=True):
        before = graphs()
        accelerate(pipe, **settings)
        got = generate(pipe, PROMPTS[:2], steps=3, **arguments)
        seen[name] = difference(got, one_process), graphs() - before
    summary = handle.summary()
    handle.remove()
    return {"steps": seen, "summary": summary}


def orders(world: int) -> dict[tuple[str, ...], float]:
    """Compiling, cache and ranks put on in every order, then taken off again in the same order.

    Compiling takes seconds: but for the first order and the last it is left out, and only its place is taken.
    """
    name = "Wan 2.1"  # one kind of block, and no text in the sequence: one graph
    pipe = tiny_family(name)
    ring = ContextParallel(ring=world, timeout=TIMEOUT)
    parts: dict[str, tuple[Any, Any]] = {"compile": ("eager", False), "cache": (CACHE, None), "parallel": (ring, None)}
    handle = accelerate(pipe, cache=CACHE)
    expected = generate_family(name, pipe, steps=3)
    handle.remove()
    seen = {}
    for order in ORDERS:
        really = order in (ORDERS[0], ORDERS[-1])
        with nullcontext() if really else patch.object(torch, "compile", lambda function, **_: function):
            for part in order:
                handle = accelerate(pipe, **{part: parts[part][0]})
            together = difference(generate_family(name, pipe, steps=3), expected)
        for part in order:
            accelerate(pipe, **{part: parts[part][1]})
        handle.remove()
        seen[order] = together
    return seen


def dual_attention(world: int) -> float:
    """Two attentions over ranks in one graph, neither of which needs the other's result."""
    name = "Stable Diffusion 3.5 medium"
    pipe = tiny_family(name)
    expected = generate_family(name, pipe, steps=2)
    accelerate(pipe, compile="aot_eager", parallel=ContextParallel(ring=world, timeout=TIMEOUT))
    return difference(generate_family(name, pipe, steps=2), expected)
