"""Passes of a step that the pipeline announces by no `cache_context`: told apart by their prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from host_reads import HostReads
from tiny_families import TINY, generate_family, tiny_family
from torch import Tensor, nn

from para_kernels import FirstBlockCache
from para_kernels.integrations.diffusers import Handle, accelerate, apply_cache_on_pipe
from para_kernels.integrations.diffusers.hooks import BranchName

KONTEXT, SD3 = "FLUX.1-Kontext", "Stable Diffusion 3"
THRESHOLD = 0.345  # hits and misses in turn on random weights, others in each pass
STEPS = 8

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls:
    """What a transformer was given and what it returned, call by call, above every hook of this package."""

    def __init__(self, transformer: nn.Module) -> None:
        self.seen: list[tuple[dict[str, Any], Tensor]] = []
        transformer.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        self.seen.append((kwargs, output[0]))


def steps(handle: Handle, branch: str) -> list[tuple[int, float | None, bool]]:
    return [(record.step, record.diff, record.reused) for record in handle.records if record.branch == branch]


def pattern(handle: Handle, branch: str) -> str:
    """One letter per step of a branch: (c)omputed or (r)eused."""
    return "".join("r" if reused else "c" for _, _, reused in steps(handle, branch))


@pytest.mark.parametrize("prompts", [1, 2])
def test_each_pass_decides_as_it_does_alone(prompts: int) -> None:
    """Every call of a guided Kontext pipeline again, pass by pass, where the passes are announced."""
    pipe = tiny_family(KONTEXT)
    calls = Calls(pipe.transformer)
    handle = apply_cache_on_pipe(pipe, THRESHOLD)
    generate_family(KONTEXT, pipe, guided=True, prompts=prompts, steps=STEPS)
    assert [record.branch for record in handle.records] == ["cond", "uncond"] * STEPS
    assert "r" in pattern(handle, "cond")
    assert "r" in pattern(handle, "uncond")
    assert pattern(handle, "cond") != pattern(handle, "uncond")
    for first, branch in enumerate(["cond", "uncond"]):
        fresh = tiny_family(KONTEXT)
        alone = apply_cache_on_pipe(fresh, THRESHOLD)
        for given, output in calls.seen[first::2]:
            with torch.no_grad(), fresh.transformer.cache_context(branch):
                assert fresh.transformer(**given)[0].equal(output)
        assert steps(alone, branch) == steps(handle, branch)


@pytest.mark.parametrize("name", [KONTEXT, "FLUX.1-Fill"])
def test_without_guidance_there_is_one_pass(name: str) -> None:
    pipe = tiny_family(name)
    handle = apply_cache_on_pipe(pipe, 1e6)
    for _ in range(2):  # The second call's prompts are other objects, and again the first that it has.
        generate_family(name, pipe)
        assert pattern(handle, "cond") == "crrr"
        assert len(handle.records) == 4


def test_what_the_pipeline_announces_goes_first() -> None:
    """FLUX.1-dev's pipeline announces its passes; these names would be the other way round."""
    pipe = tiny_family("FLUX.1-dev")
    handle = apply_cache_on_pipe(pipe, 1e6)
    calls = Calls(pipe.transformer)
    generate_family("FLUX.1-dev", pipe, guided=True)
    assert [record.branch for record in handle.records] == ["cond", "uncond"] * 4
    with torch.no_grad(), pipe.transformer.cache_context("uncond"):
        pipe.transformer(**calls.seen[0][0])
    with torch.no_grad():
        pipe.transformer(**calls.seen[1][0])
    assert [record.branch for record in handle.records] == ["uncond", "cond"]


def test_other_prompts_in_mid_call_begin_a_pass_anew() -> None:
    def other(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if step != 1 else kwargs | {"prompt_embeds": kwargs["prompt_embeds"].flip(1)}

    pipe = tiny_family(KONTEXT)
    pipe_call = {"callback_on_step_end": other, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    handle = apply_cache_on_pipe(pipe, 1e6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, KONTEXT, replace(TINY[KONTEXT], call=TINY[KONTEXT].call | pipe_call))
        generate_family(KONTEXT, pipe, guided=True)
    assert pattern(handle, "cond") == "crcr"
    assert pattern(handle, "uncond") == "crrr"


def test_the_host_reads_at_most_once_per_pass() -> None:
    pipe = tiny_family(KONTEXT)
    calls = Calls(pipe.transformer)
    generate_family(KONTEXT, pipe, guided=True)
    handle = apply_cache_on_pipe(pipe, 1e6)
    counts = []
    for given, _ in list(calls.seen):
        with torch.no_grad(), HostReads() as reads:
            pipe.transformer(**given)
        counts.append(reads.count)
    assert counts == [0, 0] + [1] * 6
    assert pattern(handle, "cond") == pattern(handle, "uncond") == "crrr"


@pytest.mark.parametrize("skipped", [[1], [0], [2]], ids=["middle", "first", "last"])
def test_skip_layer_guidance_is_a_pass(monkeypatch: pytest.MonkeyPatch, skipped: list[int]) -> None:
    """Where the model leaves out a block at which the cache decides or remembers, the pass is computed."""
    guided = {"guidance_scale": 4.0, "skip_guidance_layers": skipped, "skip_layer_guidance_stop": 0.7}
    monkeypatch.setitem(TINY, SD3, replace(TINY[SD3], guided=guided))
    pipe = tiny_family(SD3)
    stock = generate_family(SD3, pipe, guided=True, steps=6)
    handle = apply_cache_on_pipe(pipe, 1e-12)
    assert generate_family(SD3, pipe, guided=True, steps=6).equal(stock)
    assert (pattern(handle, "cond_uncond"), pattern(handle, "skip_layers")) == ("cccccc", "cccc")
    apply_cache_on_pipe(pipe, 1e6)
    assert generate_family(SD3, pipe, guided=True, steps=6).isfinite().all()
    assert pattern(handle, "cond_uncond") == "crrrrr"
    assert pattern(handle, "skip_layers") == ("crrr" if skipped == [1] else "cccc")


def test_no_more_is_kept_than_there_are_names() -> None:
    branch = BranchName(("a", "b"))
    prompts = [(object(), object()) for _ in range(4)]

    def begin(index: int) -> tuple[bool, str]:
        return branch.begin(prompts[index]), branch.name

    assert [begin(i) for i in (0, 1, 0, 1)] == [(True, "a"), (True, "b"), (False, "a"), (False, "b")]
    assert [begin(i) for i in (2, 1, 3)] == [(True, "a"), (False, "b"), (True, "a")]
    assert branch.begin((prompts[1][0], object()))  # one of the two is another
    assert branch.name == "b"
    branch.end_call()
    assert begin(1) == (True, "a")
    branch.set_context("uncond")
    assert begin(0) == (False, "uncond")
    branch.set_context(None)
    assert begin(1) == (False, "a")


def test_compiled_code_serves_every_pass() -> None:
    torch._dynamo.reset()
    branch, names = BranchName(("a", "b")), []

    @torch.compile(backend="eager")
    def step(prompt: Tensor) -> Tensor:
        branch.begin((prompt,))
        return prompt + 1

    prompts = [torch.zeros(3), torch.ones(3)]
    step(prompts[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompt in prompts[1:] + prompts:
            assert step(prompt).equal(prompt + 1)
            names.append(branch.name)
    assert names == ["b", "a", "b"]


def test_a_policy_with_last_blocks_keeps_the_passes_apart() -> None:
    pipe = tiny_family(KONTEXT)
    handle = accelerate(pipe, cache=FirstBlockCache(1e6, last_blocks=1))
    generate_family(KONTEXT, pipe, guided=True)
    assert pattern(handle, "cond") == pattern(handle, "uncond") == "crrr"
