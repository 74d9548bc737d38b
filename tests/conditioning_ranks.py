"""What the ranks of tests/test_diffusers_conditioning.py do: who computes what the timestep alone decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from compile_ranks import difference
from compile_ranks import graphs as graphs_compiled
from diffusers_ranks import traces
from fake_graphs import fake_capture_for
from tiny_families import generate_family, tiny_family
from torch import Tensor, nn

from para_kernels import ContextParallel, FirstBlockCache
from para_kernels.integrations.diffusers import accelerate, conditioning, graphs

TIMEOUT = 60.0
STEPS = 3
FAMILIES = ("FLUX.1-dev", "Stable Diffusion 3")
NAMES = ("norm1.linear", "norm1_context.linear", "norm.linear")


def run(rank: int, world: int) -> dict[str, dict[str, Any]]:
    with torch.no_grad(), patch.object(graphs, "capture_for", fake_capture_for):
        found = {name: of_family(name, world) for name in FAMILIES}
        for name in FAMILIES if world == 2 else FAMILIES[:1]:  # compiling takes half a minute
            found[name]["compiled"] = compiled(name, world)
        return found


def of_family(name: str, world: int) -> dict[str, Any]:
    """Of each way: how far from one process, and how much each linear was given to do in a call."""
    pipe = tiny_family(name)
    linears = modulations(pipe)
    accelerate(pipe)
    expected, alone = generated(name, pipe, linears)
    accelerate(pipe).remove()
    before = traces(pipe)

    def seen(**settings: Any) -> tuple[float, Counter[str]]:
        accelerate(pipe, parallel=parallel(ring=world), **settings)
        got, work = generated(name, pipe, linears)
        return difference(got, expected), work

    found: dict[str, Any] = {"alone": alone, "sizes": {at: linear.out_features for at, linear in linears.items()}}
    found["shared"] = seen(cache=None)
    found["graphs"] = seen(graphs=True)
    found["with a cache"] = seen(graphs=False, cache=FirstBlockCache(1e-9))[1]
    *_, last = linears.values()
    for way, module, hook in (
        ("other vector", pipe.transformer.time_text_embed, scaled_output),
        ("other argument", pipe.transformer.transformer_blocks[1], scaled_vector),
    ):
        found[way] = with_hook(name, pipe, module, hook, world)
    listener = (last if dist.get_rank() == 0 else nn.Identity()).register_forward_pre_hook(changed_input)
    found["one rank's hook"] = seen(cache=None)
    found["summary"] = accelerate(pipe).summary()
    listener.remove()
    pipe.transformer.transformer_blocks[0]._hf_hook = "loads the block's weights"
    found["offloaded"] = seen()
    del pipe.transformer.transformer_blocks[0]._hf_hook
    listener = last.register_forward_hook(changed_output)
    found["changed output"] = seen()
    listener.remove()
    accelerate(pipe, parallel=parallel(batch=world) if world == 2 else None)
    found["batch"] = generated(name, pipe, linears)[1]
    accelerate(pipe).remove()
    found["traces"] = traces(pipe) == before
    return found


def changed_input(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Somebody else's hook, which may do anything."""
    return (args[0] * 1,)


def changed_output(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 1


def with_hook(name: str, pipe: Any, module: nn.Module, hook: Any, world: int) -> float:
    """The difference from one process with the same hook, which comes after the installation."""
    difference_of = []
    for split in (None, parallel(ring=world)):
        accelerate(pipe, cache=None, parallel=split)
        listener = (
            module.register_forward_pre_hook(hook, with_kwargs=True)
            if hook is scaled_vector
            else module.register_forward_hook(hook)
        )
        difference_of.append(generate_family(name, pipe, guided=True, steps=STEPS))
        listener.remove()
    one, several = difference_of
    return difference(several, one)


def scaled_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.5


def scaled_vector(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"temb": kwargs["temb"] * 1.5}


def compiled(name: str, world: int) -> dict[str, Any]:
    """Blocks compiled for one sample: in one process, over ranks, with a cache and without; graphs by the way."""
    pipe = tiny_family(name)
    ring = parallel(ring=world)
    expected = {}
    for prompts in (1, 2):
        accelerate(pipe)
        expected[prompts] = generate_family(name, pipe, guided=True, steps=STEPS, prompts=prompts)
    found: dict[str, Any] = {"worst": 0.0, "graphs": {}}
    accelerate(pipe, compile="aot_eager", parallel=ring)
    for way, settings in (
        ("shared", {"cache": None}),
        ("with a cache", {"cache": FirstBlockCache(1e-9)}),
        ("shared again", {"cache": None}),
    ):
        accelerate(pipe, **settings)
        for prompts in (1, 2):
            before = graphs_compiled()
            got = generate_family(name, pipe, guided=True, steps=STEPS, prompts=prompts)
            found["worst"] = max(found["worst"], difference(got, expected[prompts]))
            found["graphs"][way, prompts] = graphs_compiled() - before
    with patch.object(conditioning, "laid_out", lambda made: made * 1.5):
        found["others"] = difference(generate_family(name, pipe, guided=True, steps=STEPS), expected[2])
    accelerate(pipe, compile=False, parallel=None)
    return found


def parallel(**split: int) -> ContextParallel:
    return ContextParallel(**split, timeout=TIMEOUT)


def modulations(pipe: Any) -> dict[str, nn.Linear]:
    """By their places in the transformer."""
    modules = pipe.transformer.named_modules()
    return {at: module for at, module in modules if "blocks." in at and at.endswith(NAMES)}


def generated(name: str, pipe: Any, linears: dict[str, nn.Linear]) -> tuple[Tensor, Counter[str]]:
    """Guided latents, and how many rows each linear has computed."""
    with counted(linears) as work:
        latents = generate_family(name, pipe, guided=True, steps=STEPS)
    return latents, work


@contextmanager
def counted(linears: dict[str, nn.Linear]) -> Iterator[Counter[str]]:
    names = {id(linear.weight): at for at, linear in linears.items()}
    work: Counter[str] = Counter()
    own = nn.functional.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in names:
            work[names[id(weight)]] += len(x)
        return own(x, weight, bias)

    with patch.object(nn.functional, "linear", counting):
        yield work
