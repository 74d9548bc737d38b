"""Offloading, put on before or after an installation: to the bit the same result, and each comes off without the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import offload_ranks
import pytest
import ranks
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from offloading import READABLE, WAYS, groups, hooks_of_offloading, take_off
from tiny_families import generate_family, tiny_family
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import FirstBlockCache
from para_kernels.cache import Policy
from para_kernels.integrations.diffusers import Fp8Linears, Handle, accelerate
from para_kernels.integrations.diffusers.linears import cpu_multiplies_rows

ranks.preload("offload_ranks")
pytestmark = pytest.mark.usefixtures("one_thread")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None or not cpu_multiplies_rows(), reason="needs torchao, and FP8 on the CPU"
)

ORDERS = pytest.mark.parametrize("offload_first", [True, False], ids=["offload first", "offload last"])
CACHES: dict[str, Policy | None] = {
    "exact": None,
    "cache": FirstBlockCache(0.35, warmup_steps=1),
    # The last block of a group always runs and its first is skipped, the other way round, and both.
    "last block": FirstBlockCache(0.35, warmup_steps=1, last_blocks=1),
    "ends": FirstBlockCache(0.35, warmup_steps=1, first_blocks=2, last_blocks=2),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """Latents without offloading: diffusers' own, and under each cache."""
    pipe = tiny_pipeline()
    found = {"stock": call(pipe)}
    for name, cache in CACHES.items():
        handle = accelerate(pipe, cache=cache)
        found[name] = call(pipe)
        assert {record.reused for record in handle.records} == ({True, False} if cache else {False})
    return found


def call(pipe: HunyuanVideoPipeline) -> torch.Tensor:
    return generate(pipe, PROMPTS[:2], steps=4)


def installed(pipe: Any, offload: Callable[[Any], None], offload_first: bool, **arguments: Any) -> Any:
    if offload_first:
        offload(pipe)
    handle = accelerate(pipe, **arguments)
    if not offload_first:
        offload(pipe)
    return handle


@ORDERS
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", WAYS)
def test_the_result_is_that_without_offloading(
    expected: dict[str, torch.Tensor], way: str, cache: str, offload_first: bool
) -> None:
    pipe = tiny_pipeline()
    handle = installed(pipe, WAYS[way], offload_first, cache=CACHES[cache])
    assert "none has run yet" in handle.summary()
    for _ in range(2):
        assert torch.equal(call(pipe), expected[cache])
    hooks = hooks_of_offloading(pipe.transformer)
    assert hooks
    handle.remove()
    assert hooks_of_offloading(pipe.transformer) == hooks
    assert torch.equal(call(pipe), expected["stock"])
    take_off(pipe)
    assert not hooks_of_offloading(pipe.transformer)
    assert torch.equal(call(pipe), expected["stock"])


@ORDERS
@pytest.mark.parametrize("way", WAYS)
def test_offloading_comes_off_first(expected: dict[str, torch.Tensor], way: str, offload_first: bool) -> None:
    pipe = tiny_pipeline()
    handle = installed(pipe, WAYS[way], offload_first, cache=CACHES["cache"])
    assert torch.equal(call(pipe), expected["cache"])
    take_off(pipe)
    assert torch.equal(call(pipe), expected["cache"])
    assert {record.reused for record in handle.records} == {True, False}
    handle.remove()
    assert torch.equal(call(pipe), expected["stock"])


@ORDERS
@pytest.mark.parametrize("way", ["sequential", "group of two", "group of layers"])
@pytest.mark.parametrize("name", ["Wan 2.1", "FLUX.1-dev"])
def test_other_families(name: str, way: str, offload_first: bool) -> None:
    """Wan's blocks have weights of their own: offloading hooks the very modules that the cache does."""
    pipe = tiny_family(name)
    stock = generate_family(name, pipe, steps=3)
    handle = accelerate(pipe, cache=FirstBlockCache(1e6, last_blocks=1))
    cached = generate_family(name, pipe, steps=3)
    handle.remove()
    handle = installed(pipe, WAYS[way], offload_first, cache=FirstBlockCache(1e6, last_blocks=1))
    for _ in range(2):
        assert torch.equal(generate_family(name, pipe, steps=3), cached)
    hooks = hooks_of_offloading(pipe.transformer)
    handle.remove()
    assert hooks_of_offloading(pipe.transformer) == hooks
    assert torch.equal(generate_family(name, pipe, steps=3), stock)
    take_off(pipe)
    assert torch.equal(generate_family(name, pipe, steps=3), stock)


@ORDERS
def test_hooks_of_accelerate_on_the_blocks_come_off_first(offload_first: bool) -> None:
    pipe = tiny_family("Wan 2.1")
    stock = generate_family("Wan 2.1", pipe, steps=3)
    handle = installed(pipe, WAYS["sequential"], offload_first, cache=FirstBlockCache(1e6))
    cached = generate_family("Wan 2.1", pipe, steps=3)
    take_off(pipe)
    assert torch.equal(generate_family("Wan 2.1", pipe, steps=3), cached)
    assert [record.reused for record in handle.records] == [False, True, True]
    handle.remove()
    assert torch.equal(generate_family("Wan 2.1", pipe, steps=3), stock)
    assert all("forward" not in block.__dict__ for block in pipe.transformer.blocks)


def test_a_hook_that_goes_after_the_first_forward_leaves_the_cache_on() -> None:
    """As with group offloading with a stream, which needs a GPU: a hook that came before the cache's removes itself."""
    pipe = tiny_pipeline()

    class Once(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            module._diffusers_hook.remove_hook("once", recurse=False)
            return output

    for block in pipe.transformer.transformer_blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Once(), "once")
    handle = accelerate(pipe, cache=100.0)
    for _ in range(2):
        call(pipe)
        assert [record.reused for record in handle.records] == [False, True, True, True]
    handle.remove()
    again = accelerate(pipe)
    call(pipe)
    assert [record.reused for record in again.records] == [False] * 4


# --- FP8 linears ------------------------------------------------------------------------------------------------------


@needs_torchao
@ORDERS
@pytest.mark.parametrize("way", READABLE)
def test_fp8_linears(way: str, offload_first: bool) -> None:
    pipe = tiny_pipeline()
    stock = call(pipe)
    keeping = Fp8Linears(keep_originals=True)
    handle = accelerate(pipe, linears=keeping)
    expected = call(pipe)
    handle.remove()
    handle = installed(pipe, READABLE[way], offload_first, linears=keeping)
    for _ in range(2):
        assert torch.equal(call(pipe), expected)
    handle.remove()
    assert hooks_of_offloading(pipe.transformer)
    assert torch.equal(call(pipe), stock)
    take_off(pipe)
    assert torch.equal(call(pipe), stock)


@needs_torchao
@pytest.mark.parametrize(("name", "value"), [("stream", object()), ("offload_to_disk_path", "/somewhere")])
def test_weights_of_which_diffusers_keeps_copies_are_not_exchanged(name: str, value: Any) -> None:
    pipe = tiny_pipeline()
    READABLE["group of layers"](pipe)
    for group in groups(pipe.transformer):
        setattr(group, name, value)
    with pytest.raises(ValueError, match=r"linears: the HunyuanVideo.* is group offloaded .*; call accelerate first"):
        accelerate(pipe, linears="fp8")
    assert Handle.on(pipe.transformer) is None


# --- over ranks -------------------------------------------------------------------------------------------------------


def test_over_two_ranks() -> None:
    first, second = ranks.launch(2, offload_ranks.run, timeout=300.0)
    assert isinstance(first, dict), first
    assert first == second
    assert first == dict.fromkeys(offload_ranks.CASES, "equal, reused 1 of 4 steps")
