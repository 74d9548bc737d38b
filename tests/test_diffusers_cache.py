"""First Block Cache on the pipeline: against diffusers' own, step by step, branch by branch, call by call."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from hits_and_misses import STEPS, pattern
from host_reads import HostReads
from tiny_hunyuan import NUM_BLOCKS, PROMPTS, generate, tiny_pipeline, transformer_inputs
from torch import nn

from para_kernels import FirstBlockCache
from para_kernels.integrations.diffusers import accelerate, apply_cache_on_pipe
from para_kernels.integrations.diffusers.attention import AttentionLengths
from para_kernels.integrations.diffusers.cache import BlockCache, add_cache_hooks, transformer_blocks
from para_kernels.integrations.diffusers.calls import Calls
from para_kernels.integrations.diffusers.hooks import BranchName
from para_kernels.integrations.diffusers.models import HUNYUAN_VIDEO

# Random weights change the first block's residual by 20 to 40 % a step: this threshold gives hits and misses in turn.
THRESHOLD = 0.32
GUIDED: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": ["slowly", "up and down", "a"]}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe() -> HunyuanVideoPipeline:
    return tiny_pipeline()


class BlockCounter:
    """Counts how often the body of each transformer block runs, below every hook on the block's forward."""

    def __init__(self, transformer: Any) -> None:
        self.runs = [0] * NUM_BLOCKS
        for index, block in enumerate([*transformer.transformer_blocks, *transformer.single_transformer_blocks]):
            block.attn.register_forward_pre_hook(lambda *_, index=index: self._count(index))

    def _count(self, index: int) -> None:
        self.runs[index] += 1


# --- against diffusers' own First Block Cache -----------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, GUIDED], ids=["one branch", "two branches"])
def test_has_the_bits_of_diffusers_first_block_cache(pipe: HunyuanVideoPipeline, arguments: dict[str, Any]) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
    theirs = generate(pipe, steps=STEPS, **arguments)
    pipe.transformer.disable_cache()

    handle = apply_cache_on_pipe(pipe, THRESHOLD)
    assert torch.equal(generate(pipe, steps=STEPS, **arguments), theirs)
    assert set(pattern(handle)) == {"c", "r"}  # It was a comparison of something.


def test_a_hit_runs_the_first_block_alone(pipe: HunyuanVideoPipeline) -> None:
    blocks = BlockCounter(pipe.transformer)
    handle = accelerate(pipe, cache=100.0)
    generate(pipe, steps=STEPS)
    assert pattern(handle) == "c" + "r" * (STEPS - 1)
    assert blocks.runs == [STEPS] + [1] * (NUM_BLOCKS - 1)


def test_the_same_policy_through_every_door(pipe: HunyuanVideoPipeline) -> None:
    policy = FirstBlockCache(THRESHOLD, warmup_steps=2, max_consecutive_hits=1, downsample_factor=2)
    by_policy = accelerate(pipe, cache=policy)
    result = generate(pipe, steps=STEPS)
    by_policy.remove()
    accelerate(pipe)
    apply_cache_on_pipe(pipe, THRESHOLD, warmup_steps=2, max_consecutive_hits=1, downsample_factor=2)
    assert torch.equal(generate(pipe, steps=STEPS), result)


def test_warmup_and_limit_reach_the_policy(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=FirstBlockCache(100.0, warmup_steps=2, max_consecutive_hits=3))
    generate(pipe, steps=STEPS)
    assert pattern(handle) == "ccrrrcrr"


# --- exactly nothing at threshold 0 ---------------------------------------------------------------------------------


def test_threshold_zero_is_the_uncached_pipe_bit_for_bit(pipe: HunyuanVideoPipeline) -> None:
    stock = generate(pipe)
    apply_cache_on_pipe(pipe, residual_diff_threshold=0.0)
    assert torch.equal(generate(pipe), stock)
    accelerate(pipe)
    uncached = generate(pipe)
    accelerate(pipe, cache=0.0)
    assert torch.equal(generate(pipe), uncached)
    assert not any(hasattr(block, "_diffusers_hook") for block in transformer_blocks(pipe.transformer, HUNYUAN_VIDEO))


def test_a_threshold_that_no_step_passes_changes_no_bit(pipe: HunyuanVideoPipeline) -> None:
    accelerate(pipe)
    uncached = generate(pipe)
    handle = accelerate(pipe, cache=1e-9)
    assert torch.equal(generate(pipe), uncached)
    assert pattern(handle) == "cccc"
    assert all(record.diff is not None for record in handle.records[1:])


# --- one read per step ----------------------------------------------------------------------------------------------


def test_the_host_reads_once_per_compared_step(pipe: HunyuanVideoPipeline) -> None:
    apply_cache_on_pipe(pipe, 100.0, warmup_steps=2)
    inputs, counts = transformer_inputs(), []
    for branch in ["cond", "uncond"] * 4:
        with torch.no_grad(), pipe.transformer.cache_context(branch), HostReads() as reads:
            pipe.transformer(**inputs)
        counts.append(reads.count)
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1]


# --- branches -------------------------------------------------------------------------------------------------------


def test_branches_have_states_of_their_own(pipe: HunyuanVideoPipeline) -> None:
    """Each branch must decide as it does alone; in turn they differ by far more than the threshold."""
    handle = apply_cache_on_pipe(pipe, 0.05)
    inputs = {"cond": transformer_inputs(seed=0), "uncond": transformer_inputs(seed=1)}
    with torch.no_grad():
        for _ in range(3):
            for branch, given in inputs.items():
                with pipe.transformer.cache_context(branch):
                    pipe.transformer(**given)
    assert pattern(handle, "cond") == pattern(handle, "uncond") == "crr"
    assert [(record.branch, record.step) for record in handle.records] == [
        (branch, step) for step in range(3) for branch in ("cond", "uncond")
    ]


def test_without_a_context_there_is_one_branch(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=0.1)
    with torch.no_grad():
        for _ in range(2):
            pipe.transformer(**transformer_inputs())
    assert pattern(handle, "default") == "cr"


# --- calls ----------------------------------------------------------------------------------------------------------


def test_each_call_starts_afresh(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=100.0)
    first, second = generate(pipe), generate(pipe)
    assert torch.equal(first, second)
    assert pattern(handle) == "crrr"


def test_after_a_call_no_tensor_is_kept(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=100.0)
    generate(pipe)
    (installation,) = handle._installations
    assert installation.cache is not None
    assert installation.cache.states == {}


def test_a_pipe_that_is_gone_begins_no_call() -> None:
    """It may go in the middle of a call of another one with the same transformer."""

    class Pipe:
        def __init__(self) -> None:
            self.scheduler = SimpleNamespace(timesteps=[3, 2, 1])

    first, second = Pipe(), Pipe()
    calls = Calls()
    for pipe in (first, second, first):
        calls.watch(pipe)
    assert [calls.begin_forward() for _ in range(3)] == [True, False, False]
    assert calls.pipes == [first, second]
    del second, pipe
    assert not calls.begin_forward()
    assert calls.pipes == [first]
    first.scheduler.timesteps = [3, 2, 1]
    assert [calls.begin_forward() for _ in range(2)] == [True, False]
    calls.end()
    assert calls.begin_forward()


def test_an_interrupted_call_leaves_nothing_to_the_next(pipe: HunyuanVideoPipeline) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    handle = accelerate(pipe, cache=100.0)
    uninterrupted = generate(pipe, PROMPTS[:1])
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, PROMPTS[1:2], callback_on_step_end=interrupt)
    assert pattern(handle) == "cr"
    assert torch.equal(generate(pipe, PROMPTS[:1]), uninterrupted)
    assert pattern(handle) == "crrr"


def test_a_forward_that_fails_leaves_nothing_to_the_next(pipe: HunyuanVideoPipeline) -> None:
    """The first block had already been compared; the step is not counted and what it left is not reused."""
    handle = accelerate(pipe, cache=100.0)
    failing = pipe.transformer.single_transformer_blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            pipe.transformer(**transformer_inputs())
        failing.remove()
        assert handle.records == []
        pipe.transformer(**transformer_inputs())
    assert pattern(handle, "default") == "c"


@pytest.mark.parametrize("index", [0, 1, -1], ids=["first", "middle", "last"])
def test_a_block_called_by_itself_after_a_hit_is_computed(pipe: HunyuanVideoPipeline, index: int) -> None:
    block = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks][index]
    video, text, temb = torch.ones(1, 18, 48), torch.ones(1, 5, 48), torch.ones(1, 48)
    with torch.no_grad():
        stock = block(video, text, temb)
        handle = apply_cache_on_pipe(pipe, 100.0)
        for _ in range(2):
            pipe.transformer(**transformer_inputs())
        assert pattern(handle, "default") == "cr"
        ours = block(video, text, temb)
        pipe.transformer(**transformer_inputs())
    assert torch.equal(ours[0], stock[0])
    assert torch.equal(ours[1], stock[1])
    assert pattern(handle, "default") == "crr"


def test_another_size_is_computed(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=100.0)
    with torch.no_grad():
        for batch in (2, 2, 1, 1):
            pipe.transformer(**transformer_inputs(batch, lengths=(5, 11)[:batch]))
    assert pattern(handle, "default") == "crcr"


# --- records --------------------------------------------------------------------------------------------------------


def test_records_of_the_last_call_survive_its_end(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=THRESHOLD)
    generate(pipe, steps=STEPS)
    records = handle.records
    assert [record.step for record in records] == list(range(STEPS))
    assert records[0].diff is None
    assert all(record.reused == (record.diff < THRESHOLD) for record in records[1:] if record.diff is not None)
    assert all(record.ms is not None and record.ms > 0 for record in records)


def test_records_without_a_cache_are_all_computed(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe)
    generate(pipe, steps=3, **GUIDED)
    assert [(record.branch, record.step, record.diff, record.reused) for record in handle.records] == [
        (branch, step, None, False) for step in range(3) for branch in ("cond", "uncond")
    ]


# --- families that need the text after the blocks -------------------------------------------------------------------


class Block(nn.Module):
    """Adds one to the video and doubles the text."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return encoder_hidden_states * 2, hidden_states + 1


@pytest.mark.parametrize("positional", [True, False])
def test_other_families_are_a_row_in_the_table(positional: bool) -> None:
    """Text first in what a block returns, and kept: on a hit both streams end where the last block left them."""
    family = replace(
        HUNYUAN_VIDEO,
        block_returns=("encoder_hidden_states", "hidden_states"),
        reused_streams=("hidden_states", "encoder_hidden_states"),
    )
    blocks: list[nn.Module] = [Block() for _ in range(3)]
    cache = BlockCache(FirstBlockCache(0.1), family, BranchName(), AttentionLengths(), len(blocks))
    with ExitStack() as undo:
        add_cache_hooks(undo, cache, blocks)
        for expect_reuse in (False, True):
            video, text = torch.zeros(1, 4, 2), torch.ones(1, 3, 2)
            cache.begin_forward()
            for block in blocks:
                if positional:
                    text, video = block(video, text)
                else:
                    text, video = block(encoder_hidden_states=text, hidden_states=video)
            assert cache.reusing == expect_reuse
            assert torch.equal(video, torch.full((1, 4, 2), 3.0))
            assert torch.equal(text, torch.full((1, 3, 2), 8.0))
    assert not any(hasattr(block, "_diffusers_hook") or "forward" in block.__dict__ for block in blocks)
