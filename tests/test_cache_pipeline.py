"""Every cache policy on the pipeline: which blocks run, what a reused step becomes, branch by branch, call by call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from hits_and_misses import PLAIN, POLICIES, STEPS, pattern
from host_reads import HostReads
from tiny_hunyuan import NUM_BLOCKS, generate, tiny_pipeline, transformer_inputs
from torch import Tensor

from para_kernels import AdaCache, FirstBlockCache, TeaCache
from para_kernels.cache import Calibration, Policy
from para_kernels.integrations.diffusers import Handle, accelerate
from para_kernels.integrations.diffusers.cache import check_cacheable, transformer_blocks
from para_kernels.integrations.diffusers.models import HUNYUAN_VIDEO

each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe() -> HunyuanVideoPipeline:
    return tiny_pipeline()


class Blocks:
    """What went into each block and what came out, below every hook on its forward; None for one that was skipped."""

    def __init__(self, transformer: Any) -> None:
        self.blocks = transformer_blocks(transformer, HUNYUAN_VIDEO)
        self.seen: list[tuple[Any, Any] | None] = [None] * NUM_BLOCKS
        for index, block in enumerate(self.blocks):
            self._wrap(index, block)

    def _wrap(self, index: int, block: Any) -> None:
        forward = block.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.seen[index] = (args[:3], output)
            return output

        block.forward = watched

    def step(self) -> list[tuple[Any, Any] | None]:
        seen, self.seen = self.seen, [None] * NUM_BLOCKS
        return seen


@each_policy
def test_a_reused_step_is_what_the_formula_says(policy: Policy) -> None:
    """Step by step: which blocks ran, and that the blocks after the gap got what the last computed steps added."""
    pipe = tiny_pipeline()
    blocks = Blocks(pipe.transformer)
    handle = accelerate(pipe, cache=policy)
    embedded: list[Tensor] = []
    finals: list[Tensor] = []
    pipe.transformer.x_embedder.register_forward_hook(lambda _, args, output: embedded.append(output))
    pipe.transformer.norm_out.register_forward_pre_hook(lambda _, args: finals.append(args[0]))
    start, stop = policy.first_blocks, NUM_BLOCKS - policy.last_blocks
    streams = (0, 1) if policy.last_blocks else (0,)  # video; and text, where a block still looks at it
    tails: list[tuple[int, list[Tensor]]] = []  # (step, what the streams gained between `start` and `stop`)

    def check(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen, reused = blocks.step(), handle.records[-1].reused
        ran = [index for index, block in enumerate(seen) if block is not None]
        skipped = range(start, stop) if reused else range(0)
        assert ran == [index for index in range(NUM_BLOCKS) if index not in skipped]
        if not reused:
            before, after = seen[start], seen[stop - 1]
            assert before is not None
            assert after is not None
            tails.append((step, [after[1][stream] - before[0][stream] for stream in streams]))
            return kwargs
        for stream in streams:
            nodes = [(node, added[stream]) for node, added in tails[-1 - policy.taylor_order :]]
            if start > 0:
                before = seen[start - 1][1][stream]  # type: ignore[index]
            elif stream == 0:
                before = embedded[-1]
            else:
                continue  # no block has seen this step's text yet
            got = finals[-1] if stop == NUM_BLOCKS else seen[stop][0][stream]  # type: ignore[index]
            torch.testing.assert_close(got, before + extrapolated(nodes, step), rtol=1e-5, atol=1e-5)
        return kwargs

    generate(pipe, steps=STEPS, callback_on_step_end=check)
    assert set(pattern(handle)) == {"c", "r"}


def extrapolated(tails: list[tuple[int, Tensor]], step: int) -> Tensor:
    """Newton's divided differences, in float64."""
    nodes, values = [node for node, _ in tails], [tail.double() for _, tail in tails]
    result, factor = values[-1], 1.0
    differences = values
    for order in range(1, len(nodes)):
        differences = [
            (differences[i + 1] - differences[i]) / (nodes[i + order] - nodes[i]) for i in range(len(differences) - 1)
        ]
        factor *= step - nodes[-order]
        result = result + factor * differences[-1]
    return result.float()


@each_policy
def test_threshold_zero_is_the_uncached_pipe_bit_for_bit(pipe: HunyuanVideoPipeline, policy: Policy) -> None:
    accelerate(pipe)
    uncached = generate(pipe)
    accelerate(pipe, cache=replace(policy, threshold=0.0))
    assert torch.equal(generate(pipe), uncached)
    assert not any(hasattr(block, "_diffusers_hook") for block in transformer_blocks(pipe.transformer, HUNYUAN_VIDEO))
    handle = accelerate(pipe, cache=replace(policy, threshold=1e-9))
    assert torch.equal(generate(pipe), uncached)
    assert pattern(handle) == "cccc"


@each_policy
def test_the_host_reads_at_most_once_per_step(pipe: HunyuanVideoPipeline, policy: Policy) -> None:
    handle = accelerate(pipe, cache=replace(policy, threshold=100.0, max_accumulated_error=None))
    inputs, counts = transformer_inputs(), []
    for branch in ["cond", "uncond"] * 4:
        with torch.no_grad(), pipe.transformer.cache_context(branch), HostReads() as reads:
            pipe.transformer(**inputs)
        counts.append(reads.count)
    assert max(counts) == 1
    assert "r" in pattern(handle, "cond")
    assert pattern(handle, "cond") == pattern(handle, "uncond")


@each_policy
def test_branches_decide_as_they_do_alone(pipe: HunyuanVideoPipeline, policy: Policy) -> None:
    handle = accelerate(pipe, cache=policy)
    inputs = {branch: [transformer_inputs(seed=seed) for seed in seeds] for branch, seeds in BRANCHES.items()}
    alone: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for branch, steps in inputs.items():
            alone[branch] = [pipe.transformer(**given).sample for given in steps]
            pipe.transformer._reset_stateful_cache()
        for step in range(len(BRANCHES["cond"])):
            for branch, steps in inputs.items():
                with pipe.transformer.cache_context(branch):
                    assert torch.equal(pipe.transformer(**steps[step]).sample, alone[branch][step])
    assert "r" in pattern(handle, "cond") + pattern(handle, "uncond")


BRANCHES = {"cond": (0, 0, 0, 1, 1), "uncond": (2, 3, 3, 3, 3)}  # seeds: steps that change much, or nothing


@each_policy
def test_each_call_starts_afresh_and_keeps_nothing(pipe: HunyuanVideoPipeline, policy: Policy) -> None:
    handle = accelerate(pipe, cache=policy)
    first = generate(pipe, steps=STEPS)
    decided = pattern(handle)
    assert torch.equal(generate(pipe, steps=STEPS), first)
    assert pattern(handle) == decided
    (installation,) = handle._installations
    assert installation.cache is not None
    assert installation.cache.states == {}


def test_policies_follow_each_other_on_one_installation(pipe: HunyuanVideoPipeline) -> None:
    """Each re-tuned pipe is one that was freshly accelerated, and at the end the stock one."""
    stock = generate(pipe)
    handle = accelerate(pipe)
    results = []
    for policy in POLICIES.values():
        handle = accelerate(pipe, cache=policy)
        results.append(generate(pipe, steps=STEPS))
        assert policy.title in handle.summary()
    handle.remove()
    assert torch.equal(generate(pipe), stock)
    for policy, result in zip(POLICIES.values(), results, strict=True):
        fresh = tiny_pipeline()
        accelerate(fresh, cache=policy)
        assert torch.equal(generate(fresh, steps=STEPS), result)


def test_calibration_changes_nothing_and_notes_every_step(pipe: HunyuanVideoPipeline) -> None:
    accelerate(pipe)
    uncached = generate(pipe)
    policy = Calibration()
    accelerate(pipe, cache=policy)
    assert torch.equal(generate(pipe), uncached)
    assert len(policy.pairs) == 3
    assert all(0 < change < 10 for pair in policy.pairs for change in pair)


def test_teacache_takes_the_published_polynomial_of_the_family(pipe: HunyuanVideoPipeline) -> None:
    handle = accelerate(pipe, cache=TeaCache(0.1, warmup_steps=1))
    rescale = HUNYUAN_VIDEO.teacache_rescale
    assert rescale is not None
    assert handle.settings.cache == TeaCache(0.1, warmup_steps=1, rescale=rescale)
    assert handle.settings.cache != accelerate(pipe, cache=TeaCache(0.1, rescale=PLAIN)).settings.cache


def test_teacache_looks_at_the_modulated_input(pipe: HunyuanVideoPipeline) -> None:
    """Two steps with the same latents at two timesteps: what it measures, computed from the block's own parts."""
    block = pipe.transformer.transformer_blocks[0]
    given: list[tuple[Tensor, Tensor]] = []
    block.register_forward_pre_hook(lambda _, args: given.append((args[0], args[2])))
    handle = accelerate(pipe, cache=TeaCache(1e-6, rescale=(2.0, 0.0)))
    with torch.no_grad():
        for timestep in (500.0, 400.0):
            pipe.transformer(**transformer_inputs() | {"timestep": torch.full((2,), timestep)})
        seen = []
        for hidden, temb in given:
            shift, scale, *_ = block.norm1.linear(torch.nn.functional.silu(temb)).chunk(6, dim=1)
            normal = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
            seen.append((normal * (1 + scale[:, None]) + shift[:, None]).double())
    expected = 2 * (seen[0] - seen[1]).abs().sum() / seen[0].abs().sum()
    assert handle.records[-1].diff == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (FirstBlockCache(0.1, first_blocks=5), r"cache: the transformer has 5 block\(s\), allowed are 6 or more"),
        (
            TeaCache(0.1, first_blocks=2, last_blocks=3),
            r"cache: the transformer has 5 block\(s\), allowed are 6 or more",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_changes(
    pipe: HunyuanVideoPipeline, policy: Policy, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(pipe, cache=policy)
    assert Handle.on(pipe.transformer) is None
    handle = accelerate(pipe, cache=0.1)
    with pytest.raises(ValueError, match=message):
        accelerate(pipe, cache=policy)
    assert handle.settings.cache == FirstBlockCache(0.1)


def test_teacache_needs_a_modulated_input(pipe: HunyuanVideoPipeline) -> None:
    """None in the family's row, or another kind of first block."""
    no_dual = tiny_pipeline(num_layers=0)
    with pytest.raises(ValueError, match="cache: TeaCache looks at the first block's modulated input"):
        accelerate(no_dual, cache=TeaCache(0.1))
    assert Handle.on(no_dual.transformer) is None
    family = replace(HUNYUAN_VIDEO, modulation=None)
    with pytest.raises(ValueError, match="allowed are the other policies"):
        check_cacheable(pipe.transformer, family, TeaCache(0.1), installed=False)
    check_cacheable(pipe.transformer, family, AdaCache(0.1), installed=False)
