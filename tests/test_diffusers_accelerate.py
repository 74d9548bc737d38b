"""Putting on and taking off: nothing is left behind, nothing is shared, nothing is half done."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate as accelerate_library
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.hooks import HookRegistry
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_skyreels_image2video import HunyuanSkyreelsImageToVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline, tiny_transformer, transformer_inputs

from para_kernels import FirstBlockCache
from para_kernels.cache import StepRecord
from para_kernels.integrations.diffusers import Handle, ParaAttnProcessor, accelerate, apply_cache_on_pipe
from para_kernels.integrations.diffusers.models import HUNYUAN_VIDEO
from para_kernels.integrations.diffusers.summary import estimated_speedup

Snapshot = dict[str, tuple[Any, ...]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe() -> HunyuanVideoPipeline:
    """A pipeline that has run once: from then on diffusers itself keeps an empty hook registry on the transformer."""
    pipe = tiny_pipeline()
    generate(pipe, PROMPTS[:1], steps=1)
    return pipe


def snapshot(transformer: Any) -> Snapshot:
    """All that an installation could leave behind: attributes, processors by identity, hooks of diffusers' and
    torch's.
    """
    return {
        name: (
            sorted(module.__dict__),
            id(getattr(module, "processor", None)),
            sorted(getattr(getattr(module, "_diffusers_hook", None), "hooks", {})),
            sorted(key for key, value in module.__dict__.items() if key.endswith("hooks") and value),
        )
        for name, module in transformer.named_modules()
    }


# --- taking off -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, 100.0])
def test_remove_leaves_nothing_behind(pipe: HunyuanVideoPipeline, cache: float | None) -> None:
    before, stock = snapshot(pipe.transformer), generate(pipe)
    handle = accelerate(pipe, cache=cache)
    generate(pipe)
    assert snapshot(pipe.transformer) != before
    handle.remove()
    assert snapshot(pipe.transformer) == before
    assert torch.equal(generate(pipe), stock)
    assert not handle.installed
    handle.remove()
    assert snapshot(pipe.transformer) == before


def test_remove_before_any_call_leaves_nothing_behind() -> None:
    pipe = tiny_pipeline()
    before = snapshot(pipe.transformer)
    accelerate(pipe, cache=0.1).remove()
    assert snapshot(pipe.transformer) == before


def test_removing_an_old_handle_does_not_touch_a_new_installation(pipe: HunyuanVideoPipeline) -> None:
    old = accelerate(pipe)
    old.remove()
    new = accelerate(pipe, cache=100.0)
    old.remove()
    generate(pipe)
    assert new.installed
    assert new is not old
    assert [record.reused for record in new.records] == [False, True, True, True]


def test_remove_gives_back_the_users_own_processor_and_keeps_a_later_one(pipe: HunyuanVideoPipeline) -> None:
    own, later = ParaAttnProcessor(), ParaAttnProcessor()
    pipe.transformer.set_attn_processor(own)
    handle = accelerate(pipe)
    pipe.transformer.transformer_blocks[1].attn.set_processor(later)
    handle.remove()
    processors = pipe.transformer.attn_processors
    assert processors.pop("transformer_blocks.1.attn.processor") is later
    assert all(processor is own for processor in processors.values())


def test_hooks_of_others_stay(pipe: HunyuanVideoPipeline) -> None:
    stock = generate(pipe)
    handle = accelerate(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    cached = generate(pipe)
    handle.remove()
    still_cached = generate(pipe)
    assert torch.allclose(cached, still_cached, atol=1e-5)
    assert not torch.allclose(still_cached, stock, atol=1e-5)


def test_a_pipe_that_is_dropped_is_freed() -> None:
    pipe = tiny_pipeline()
    accelerate(pipe, cache=0.1)
    transformer = weakref.ref(pipe.transformer)
    known = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert known() is None
    assert transformer() is None


def test_an_accelerated_transformer_does_not_hold_its_pipe() -> None:
    known, transformer = weakref.ref(tiny := tiny_pipeline()), tiny.transformer
    accelerate(tiny, cache=100.0)
    generate(tiny, steps=1)
    del tiny
    gc.collect()
    assert known() is None
    with torch.no_grad():
        transformer(**transformer_inputs())


# --- calling again --------------------------------------------------------------------------------------------------


def test_calling_again_retunes_the_same_installation(pipe: HunyuanVideoPipeline) -> None:
    before = snapshot(pipe.transformer)
    handle = accelerate(pipe, cache=100.0)
    generate(pipe)
    installed = snapshot(pipe.transformer)
    assert accelerate(pipe, cache=1e-9) is handle
    assert handle.records == []
    generate(pipe)
    assert [record.reused for record in handle.records] == [False] * 4
    assert snapshot(pipe.transformer) == installed
    handle.remove()
    assert snapshot(pipe.transformer) == before


@pytest.mark.parametrize("off", [None, False, 0, 0.0, FirstBlockCache(0.0)])
def test_the_cache_can_be_turned_off_again(pipe: HunyuanVideoPipeline, off: Any) -> None:
    handle = accelerate(pipe)
    installed, uncached = snapshot(pipe.transformer), generate(pipe)
    accelerate(pipe, cache=100.0)
    accelerate(pipe, cache=off)
    assert handle.settings.cache is None
    assert snapshot(pipe.transformer) == installed
    assert torch.equal(generate(pipe), uncached)


def test_the_order_of_the_two_functions_does_not_matter(pipe: HunyuanVideoPipeline) -> None:
    installed, results = [], []
    for order in ([accelerate, apply_cache_on_pipe], [apply_cache_on_pipe, accelerate]):
        handles = [install(pipe) for install in order]
        assert handles[0] is handles[1]
        assert handles[0].settings.cache == FirstBlockCache(HUNYUAN_VIDEO.cache_threshold)
        assert handles[0].settings.attention == "exact"
        results.append(generate(pipe))
        installed.append({name: state[::2] for name, state in snapshot(pipe.transformer).items()})
        handles[0].remove()
    assert torch.equal(*results)
    assert installed[0] == installed[1]


def test_apply_cache_on_pipe_leaves_the_attention_alone(pipe: HunyuanVideoPipeline) -> None:
    processors = pipe.transformer.attn_processors
    handle = apply_cache_on_pipe(pipe)
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in processors.items())
    assert handle.settings.cache == FirstBlockCache(0.06)
    assert "diffusers' own" in handle.summary()


@pytest.mark.parametrize(("cache", "threshold"), [(True, 0.06), (0.2, 0.2), (1, 1), (FirstBlockCache(0.3), 0.3)])
def test_the_cache_argument(pipe: HunyuanVideoPipeline, cache: Any, threshold: float) -> None:
    assert accelerate(pipe, cache=cache).settings.cache == FirstBlockCache(threshold)


# --- pipes ----------------------------------------------------------------------------------------------------------


def test_two_pipes_share_nothing(pipe: HunyuanVideoPipeline) -> None:
    other = tiny_pipeline(seed=1)
    stock = generate(other)
    alone = generate_cached(tiny_pipeline(seed=1), 1e-9)
    handle = accelerate(pipe, cache=100.0)
    assert torch.equal(generate(other), stock)

    second = accelerate(other, cache=1e-9)
    assert second is not handle
    assert torch.equal(generate(other), alone)
    generate(pipe)
    assert [record.reused for record in handle.records] == [False, True, True, True]
    assert [record.reused for record in second.records] == [False, False, False, False]
    handle.remove()
    assert torch.equal(generate(other), alone)


def test_two_pipes_in_step_share_nothing(pipe: HunyuanVideoPipeline) -> None:
    """One call runs inside a step of another one: neither sees the other's lengths or residuals."""
    other = tiny_pipeline(seed=1)
    for each in (pipe, other):
        accelerate(each, cache=100.0)
    expected = generate(pipe, PROMPTS[:1]), generate(other, PROMPTS[1:2])
    inner = []

    def run_other(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            inner.append(generate(other, PROMPTS[1:2]))
        return kwargs

    outer = generate(pipe, PROMPTS[:1], callback_on_step_end=run_other)
    assert torch.equal(outer, expected[0])
    assert torch.equal(inner[0], expected[1])


def test_pipes_with_one_transformer_share_its_installation(pipe: HunyuanVideoPipeline) -> None:
    components: Any = pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}
    other = HunyuanVideoPipeline(**components)
    other.set_progress_bar_config(disable=True)
    stock = generate(other)
    handle = accelerate(pipe, cache=100.0)
    assert accelerate(other) is handle
    result = generate(other)

    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(other, PROMPTS[:1] * 3, callback_on_step_end=interrupt)
    assert torch.equal(generate(other), result)  # The second pipe's calls are told apart too.
    handle.remove()
    assert torch.equal(generate(other), stock)


def test_a_subclass_and_a_compiled_transformer_are_recognised(pipe: HunyuanVideoPipeline) -> None:
    class Mine(HunyuanVideoPipeline):
        pass

    mine = Mine(**pipe.components)
    transformer = mine.transformer
    mine.transformer = torch.compile(transformer, backend="eager")
    handle = accelerate(mine)
    assert handle.transformer is transformer
    handle.remove()


# --- CPU offload ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload_first", [True, False])
def test_survives_model_cpu_offload(pipe: HunyuanVideoPipeline, offload_first: bool) -> None:
    """`enable_model_cpu_offload` wraps the transformer's forward, and after each call unwraps it and wraps it anew."""

    def offload() -> None:
        remove_hook_from_module(pipe.transformer, recurse=True)
        accelerate_library.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))

    stock = generate(pipe)
    expected = generate_cached(tiny_pipeline(), 100.0)
    if offload_first:
        offload()
    handle = accelerate(pipe, cache=100.0)
    for _ in range(3):
        offload()
        assert torch.equal(generate(pipe), expected)
        assert [record.reused for record in handle.records] == [False, True, True, True]
    handle.remove()
    assert torch.equal(generate(pipe), stock)
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(generate(pipe), stock)


def generate_cached(pipe: HunyuanVideoPipeline, threshold: float) -> torch.Tensor:
    accelerate(pipe, cache=threshold)
    return generate(pipe)


# --- failure --------------------------------------------------------------------------------------------------------


class FailAfter:
    """Lets `register_hook` through a number of times, then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        original = HookRegistry.register_hook

        def register_hook(registry: HookRegistry, *arguments: Any) -> None:
            if self.left == 0:
                raise RuntimeError("injected")
            self.left -= 1
            original(registry, *arguments)

        monkeypatch.setattr(HookRegistry, "register_hook", register_hook)


HOOKS = 2 + 5  # The call's, the refiner's, the blocks'.


@pytest.mark.parametrize("calls", range(HOOKS))
def test_a_failed_installation_leaves_the_pipe_untouched(
    pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    before, stock = snapshot(pipe.transformer), generate(pipe, steps=2)
    with monkeypatch.context() as patch:
        FailAfter(patch, calls)
        with pytest.raises(RuntimeError, match="injected"):
            accelerate(pipe, cache=100.0)
    assert snapshot(pipe.transformer) == before
    assert torch.equal(generate(pipe, steps=2), stock)
    assert accelerate(pipe, cache=100.0).installed


def test_the_injection_reaches_every_hook(pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = FailAfter(monkeypatch, HOOKS)
    accelerate(pipe, cache=100.0)
    assert failing.left == 0


def test_a_failed_processor_swap_leaves_the_pipe_untouched(
    pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails after some processors are already in place."""
    before = snapshot(pipe.transformer)
    last = pipe.transformer.single_transformer_blocks[-1].attn
    original = last.set_processor
    refuse_ours = lambda processor: 1 / 0 if isinstance(processor, ParaAttnProcessor) else original(processor)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(last, "set_processor", refuse_ours)
        with pytest.raises(ZeroDivisionError):
            accelerate(pipe)
    assert snapshot(pipe.transformer) == before


@pytest.mark.parametrize("calls", range(5))
def test_a_failed_retune_leaves_the_installation_as_it_was(
    pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    handle = accelerate(pipe)
    before, uncached = snapshot(pipe.transformer), generate(pipe, steps=2)
    with monkeypatch.context() as patch:
        FailAfter(patch, calls)
        with pytest.raises(RuntimeError, match="injected"):
            apply_cache_on_pipe(pipe, 100.0)
    assert snapshot(pipe.transformer) == before
    assert handle.settings.cache is None
    assert torch.equal(generate(pipe, steps=2), uncached)


# --- bad input ------------------------------------------------------------------------------------------------------

SUPPORTED = r"supported: HunyuanVideoPipeline \[HunyuanVideo \(text to video\)\]"
BAD_CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "threshold": (lambda pipe: accelerate(pipe, cache=-0.1), r"cache: got -0\.1, allowed is a finite number >= 0"),
    "not a number": (
        lambda pipe: accelerate(pipe, cache=float("nan")),
        r"cache: got nan, allowed is a finite number >= 0",
    ),
    "type": (
        lambda pipe: accelerate(pipe, cache="fast"),  # type: ignore[arg-type]
        r"cache: got 'fast', allowed is a policy, a threshold >= 0, True, False or None",
    ),
    "attention": (
        lambda pipe: accelerate(pipe, attention="int4"),
        r"attention: got 'int4', allowed is one of \['exact', 'int8'\]",
    ),
    "residual_diff_threshold": (
        lambda pipe: apply_cache_on_pipe(pipe, -1),
        r"residual_diff_threshold: got -1, allowed is a finite number >= 0",
    ),
    "warmup_steps": (
        lambda pipe: apply_cache_on_pipe(pipe, warmup_steps=-1),
        r"warmup_steps: got -1, allowed is an integer >= 0",
    ),
}


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_arguments_are_refused_before_anything_changes(
    pipe: HunyuanVideoPipeline, installed: bool, call: Callable[[Any], Any], message: str
) -> None:
    if installed:
        accelerate(pipe, cache=0.2)
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert snapshot(pipe.transformer) == before


@pytest.mark.parametrize("install", [accelerate, apply_cache_on_pipe])
def test_what_is_no_supported_pipe_is_refused(pipe: HunyuanVideoPipeline, install: Callable[[Any], Handle]) -> None:
    with pytest.raises(ValueError, match=r"pipe: got a int, " + SUPPORTED):
        install(3)
    with pytest.raises(ValueError, match=r"pipe: got a HunyuanVideoTransformer3DModel, " + SUPPORTED):
        install(pipe.transformer)
    image_to_video = object.__new__(HunyuanSkyreelsImageToVideoPipeline)
    with pytest.raises(ValueError, match=r"pipe: got a HunyuanSkyreelsImageToVideoPipeline, " + SUPPORTED):
        install(image_to_video)


def test_another_transformer_is_refused(pipe: HunyuanVideoPipeline) -> None:
    pipe.transformer = tiny_transformer(image_condition_type="token_replace")
    with pytest.raises(ValueError, match=r"its transformer has image_condition_type='token_replace', allowed is None"):
        accelerate(pipe)
    pipe.transformer = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"its transformer is None, allowed is HunyuanVideoTransformer3DModel"):
        accelerate(pipe)


def test_a_second_kind_of_cache_is_refused(pipe: HunyuanVideoPipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    before = snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=r"cache: diffusers' own cache is enabled .*disable_cache\(\) first"):
        accelerate(pipe, cache=0.1)
    assert snapshot(pipe.transformer) == before


def test_a_cache_over_a_single_block_is_refused(pipe: HunyuanVideoPipeline) -> None:
    pipe.transformer = tiny_transformer(num_layers=1, num_single_layers=0)
    with pytest.raises(ValueError, match=r"cache: the transformer has 1 block\(s\), allowed are 2 or more"):
        accelerate(pipe, cache=0.1)
    assert accelerate(pipe).installed


# --- summary --------------------------------------------------------------------------------------------------------


def test_the_summary_before_and_after_a_call(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=FirstBlockCache(100.0, warmup_steps=2, downsample_factor=2))
    assert "none has run yet" in handle.summary()
    generate(pipe, true_cfg_scale=2.0, negative_prompt=["a"] * 3)
    text = handle.summary()
    lines = text.splitlines()
    assert "exact, 7 of 7 processors swapped; kernel: torch CPU flash attention" in text
    assert "(cpu, torch.float32, head dim 16)" in text
    assert "First Block Cache, threshold 100, warmup_steps 2, downsample_factor 2" in text
    assert sum("[cond]" in line or "[uncond]" in line for line in lines) == 2
    rows = [line.split() for line in lines if "computed  " in line or "reused  " in line]
    records = [record for branch in ("cond", "uncond") for record in handle.records if record.branch == branch]
    assert rows == [
        [
            str(record.step),
            "-" if record.diff is None else f"{record.diff:.4f}",
            "reused" if record.reused else "computed",
            f"{record.ms:.1f}",
        ]
        for record in records
    ]
    assert "steps       8: 4 computed, 4 reused (50%)" in text
    assert f"speed-up    {estimated_speedup(handle.records):.2f}x, an estimate" in text
    assert text.isascii()


def test_the_summary_after_removal_says_so(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=0.1)
    generate(pipe, steps=2)
    handle.remove()
    assert "the installation was removed" in handle.summary()
    assert len(handle.records) == 2


def test_the_estimate_counts_a_reused_step_as_the_median_computed_one() -> None:
    """The first step also compiled: 90 ms of 100 are not what a reused step would have cost."""
    times = [(False, 100.0), (False, 10.0), (True, 1.0), (True, 1.0), (False, 10.0)]
    records = [StepRecord(step, "cond", None, reused, ms) for step, (reused, ms) in enumerate(times)]
    assert estimated_speedup(records) == pytest.approx(140.0 / 122.0)


def test_a_forward_at_a_time_is_recorded_too(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe)
    with torch.no_grad():
        pipe.transformer(**transformer_inputs())
    (record,) = handle.records
    assert replace(record, ms=None) == StepRecord(0, "default", None, False)
