"""Graphs beside a cache of steps: the same output and the same decisions, and no block's Python runs in a replay."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import graph_ranks
import ranks
from fake_graphs import fake_capture_for
from graph_ranks import SKIPS
from hits_and_misses import POLICIES, STEPS, pattern
from test_diffusers_cache import GUIDED
from tiny_families import TINY, generate_family, tiny_family
from tiny_hunyuan import PROMPTS, generate, tiny_pipeline

from para_kernels import FirstBlockCache
from para_kernels.cache import Policy
from para_kernels.integrations.diffusers import Handle, accelerate, graphs
from para_kernels.integrations.diffusers.cache import transformer_blocks
from para_kernels.integrations.diffusers.models import HUNYUAN_VIDEO

ranks.preload("graph_ranks")
pytestmark = pytest.mark.usefixtures("one_thread")

ERROR = 1e-5  # float32, of the largest latent
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.fixture(autouse=True)
def recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(graphs, "capture_for", fake_capture_for)


def counts(handle: Handle) -> list[tuple[int, int, int, int]]:
    (recorded,) = handle.graphs
    forwards = recorded.forwards.values()
    return [(one.recorded.graphs, one.recorded.calls, one.recorded.parts, one.replays) for one in forwards]


class Runs:
    """How often each block's forward runs in Python."""

    def __init__(self, pipe: Any) -> None:
        blocks = transformer_blocks(pipe.transformer, HUNYUAN_VIDEO)
        self.of_blocks = [0] * len(blocks)
        for index, block in enumerate(blocks):
            block.attn.register_forward_pre_hook(lambda *_, index=index: self._count(index))

    def _count(self, index: int) -> None:
        self.of_blocks[index] += 1


def latents_of(pipe: Any, call: int, **arguments: Any) -> torch.Tensor:
    """Of a call, each from noise of its own."""
    generators = [torch.Generator().manual_seed(2 * call + sample) for sample in range(2)]
    return generate(pipe, PROMPTS[:2], steps=STEPS, generator=generators, **arguments)


def eager(policy: Policy, calls: int = 1, **arguments: Any) -> tuple[list[torch.Tensor], Any]:
    """The latents of each call, and the records of the last one, without their times."""
    pipe = tiny_pipeline()
    handle = accelerate(pipe, cache=policy)
    latents = [latents_of(pipe, call, **arguments) for call in range(calls)]
    return latents, decisions(handle)


def decisions(handle: Handle) -> list[tuple[int, str, float | None, bool]]:
    return [(record.step, record.branch, record.diff, record.reused) for record in handle.records]


@each_policy
@pytest.mark.parametrize("arguments", [{}, GUIDED], ids=["one branch", "two branches"])
def test_every_policy_has_the_bits_and_the_decisions_of_eager_steps(policy: Policy, arguments: dict[str, Any]) -> None:
    arguments = {**arguments, "negative_prompt": GUIDED["negative_prompt"][:2]} if arguments else {}
    want, decided = eager(policy, calls=2, **arguments)
    pipe = tiny_pipeline()
    handle = accelerate(pipe, cache=policy, graphs=True)
    runs = Runs(pipe)
    for call, latents in enumerate(want):
        assert torch.equal(latents_of(pipe, call, **arguments), latents)
    assert decisions(handle) == decided
    assert {record.reused for record in handle.records} == {True, False}
    ((_, calls, parts, _),) = counts(handle)
    assert (calls, parts) == (0, 1)
    before = list(runs.of_blocks)
    assert torch.equal(latents_of(pipe, 0, **arguments), want[0])
    assert runs.of_blocks == before


def test_a_recording_of_a_reused_step_serves_until_one_is_computed() -> None:
    """All steps but the first of each call are reused: the second is recorded, and the first of the second call."""
    want, decided = eager(FirstBlockCache(100.0), calls=3)
    pipe = tiny_pipeline()
    handle = accelerate(pipe, cache=100.0, graphs=True)
    runs = Runs(pipe)
    assert torch.equal(latents_of(pipe, 0), want[0])
    assert (runs.of_blocks, counts(handle)) == ([2, 1, 1, 1, 1], [(3, 0, 1, STEPS - 2)])
    assert torch.equal(latents_of(pipe, 1), want[1])
    assert (runs.of_blocks, counts(handle)) == ([3, 2, 2, 2, 2], [(3, 0, 1, STEPS - 1)])
    assert torch.equal(latents_of(pipe, 2), want[2])
    assert (runs.of_blocks, counts(handle)) == ([3, 2, 2, 2, 2], [(3, 0, 1, 2 * STEPS - 1)])
    assert decisions(handle) == decided
    assert "3 graphs and 0 calls between and a part that the cache may leave out" in handle.summary()


def test_a_cache_that_comes_and_goes() -> None:
    pipe = tiny_pipeline()
    accelerate(pipe)
    uncached = generate(pipe)
    (cached,), _ = eager(FirstBlockCache(0.32))
    handle = accelerate(pipe, graphs=True)
    for _ in range(2):
        assert torch.equal(generate(pipe), uncached)
        assert counts(handle)[0][2] == 0
        accelerate(pipe, cache=0.32)
        assert torch.equal(latents_of(pipe, 0), cached)
        assert counts(handle)[0][2] == 1
        accelerate(pipe, cache=None)


@pytest.mark.parametrize("name", TINY)
def test_every_family_but_one(name: str) -> None:
    pipe = tiny_family(name)
    policy = FirstBlockCache(9.0, max_consecutive_hits=1)
    accelerate(pipe, cache=policy)
    want = generate_family(name, pipe, guided=True, steps=6)
    handle = accelerate(pipe, graphs=True)
    assert torch.equal(generate_family(name, pipe, guided=True, steps=6), want)
    if name.startswith("HunyuanVideo 1.5"):
        assert all("cannot be recorded" in str(known.obstacle) for known in handle.graphs)
    else:
        replayed = [one.recorded.parts for known in handle.graphs for one in known.forwards.values() if one.replays]
        assert set(replayed) == {1}


def test_a_forward_that_is_called_past_all_hooks_is_not_cached() -> None:
    pipe = tiny_family("FLUX.1-dev")
    transformer: Any = pipe.transformer
    given: list[Any] = []
    listener = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    accelerate(pipe)
    generate_family("FLUX.1-dev", pipe)
    listener.remove()
    with torch.no_grad():
        want = [transformer.forward(**one)[0] for one in given]
        handle = accelerate(pipe, cache=100.0, graphs=True)
        for _ in range(2):
            for one, plain in zip(given, want, strict=True):
                assert torch.equal(transformer.forward(**one)[0], plain)
            generate_family("FLUX.1-dev", pipe)
            assert [record.reused for record in handle.records] == [False, True, True, True]


def test_weights_that_move_between_calls_are_recorded_anew() -> None:
    """Also where the last step of a call has been recorded anew, and replayed in none."""
    policy = FirstBlockCache(9.0, max_consecutive_hits=2)
    pipe = tiny_pipeline()
    accelerate(pipe, cache=policy)
    want = generate(pipe)
    handle = accelerate(pipe, graphs=True)
    for _ in range(5):
        assert torch.equal(generate(pipe), want)
        assert pattern(handle) == "crrc"
        assert len(counts(handle)) == 1
        for parameter in pipe.transformer.parameters():  # type: ignore[union-attr]
            parameter.data = parameter.data.clone()


# --- what cannot be recorded ------------------------------------------------------------------------------------------


def test_a_model_that_leaves_out_the_block_behind_which_the_cache_remembers() -> None:
    """The passes that do not are recorded all the same."""
    name, policy = "Stable Diffusion 3.5 medium", FirstBlockCache(9.0, last_blocks=1, max_consecutive_hits=1)
    pipe = tiny_family(name)
    accelerate(pipe, cache=policy)
    want = generate_family(name, pipe, guided=True, steps=6, **SKIPS)
    handle = accelerate(pipe, graphs=True)
    assert torch.equal(generate_family(name, pipe, guided=True, steps=6, **SKIPS), want)
    ((_, calls, parts, replays),) = counts(handle)
    assert (calls, parts, replays > 0) == (0, 1, True)
    assert "none now" not in handle.summary()


@each_policy
@pytest.mark.parametrize("where", ["single_transformer_blocks.1", "proj_out"])
def test_a_forward_that_waits_behind_the_decision_is_run_once_more(
    policy: Policy, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Which neither decides nor remembers a second time."""
    want, decided = eager(policy, calls=2)
    pipe = tiny_pipeline()
    handle = accelerate(pipe, cache=policy, graphs=True)
    module = pipe.transformer.get_submodule(where)  # type: ignore[union-attr]
    module.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    with caplog.at_level(logging.WARNING):
        for call, latents in enumerate(want):
            assert torch.equal(latents_of(pipe, call), latents)
    assert decisions(handle) == decided
    assert "graphs      none now: the forward cannot be recorded" in handle.summary()
    assert sum("cannot be recorded" in record.message for record in caplog.records) == 1


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@each_policy
def test_every_policy_on_a_gpu(policy: Policy) -> None:
    pipe = tiny_pipeline(dtype=torch.bfloat16).to("cuda")
    handle = accelerate(pipe, cache=policy)
    want = [latents_of(pipe, call) for call in range(3)]
    decided = [record.reused for record in handle.records]
    accelerate(pipe, graphs=True)
    for call, latents in enumerate(want):
        torch.testing.assert_close(latents_of(pipe, call), latents, rtol=0, atol=1e-2)
    assert [record.reused for record in handle.records] == decided
    assert all((calls, parts) == (0, 1) for _, calls, parts, _ in counts(handle))  # bfloat16's first step is another
    assert sum(replays for *_, replays in counts(handle)) >= STEPS


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=[2, 3])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    own, world = tmp_path_factory.getbasetemp(), request.param
    return ranks.results_of_all(own, f"graphs-{world}", world, graph_ranks.run, timeout=240.0)


def test_ranks_decide_alike_and_as_one_process_does(spread: list[Any]) -> None:
    for seen in spread:
        for found in seen["cached"].values():
            assert found["worst"] <= ERROR
            assert found["patterns"] == found["expected"]
            assert {"c", "r"} == set("".join(found["patterns"]))
            assert all(parts == 1 and replays >= STEPS - 1 for parts, replays in found["counts"])


def test_ranks_whose_recordings_differ_call_alike(spread: list[Any]) -> None:
    for seen in spread:
        assert seen["moved"] <= ERROR
        assert seen["skips"] <= ERROR


def test_the_pattern_has_both() -> None:
    pipe = tiny_pipeline()
    handle = accelerate(pipe, cache=0.32)
    generate(pipe, PROMPTS[:2], steps=STEPS)
    assert set(pattern(handle)) == {"c", "r"}
