"""First Block Cache's policy against a plain Python model of it, and each of its rules alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from host_reads import HostReads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from para_kernels import FirstBlockCache
from para_kernels.cache import CacheState, StepRecord, first_block

TOKENS, CHANNELS = 6, 2


def column(values: Sequence[float]) -> Tensor:
    """One sample (1, S, C) whose token s holds values[s] in every channel."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None].expand(1, len(values), CHANNELS).contiguous()


def run(state: CacheState, residual: Tensor | float, tail: Tensor | float = 0.0) -> tuple[StepRecord, Tensor]:
    """One step whose first block adds `residual` and whose others would add `tail`: the record and the final states."""
    hidden_in = torch.ones(1, TOKENS, CHANNELS)
    first = hidden_in + residual
    record = state.decide(hidden_in, first)
    if record.reused:
        return record, state.reuse((first,))[0]
    final = first + tail
    state.remember((first,), (final,))
    return record, final


def decisions(policy: FirstBlockCache, residuals: list[float]) -> str:
    """One letter per step: (c)omputed or (r)eused."""
    state = policy.new_state()
    return "".join("r" if run(state, residual)[0].reused else "c" for residual in residuals)


# --- against a model ------------------------------------------------------------------------------------------------

# Small integers: their sums are exact in float32, so that both sides form the same quotient and no tie is decided by
# rounding.
VECTORS = st.lists(st.integers(-8, 8), min_size=TOKENS, max_size=TOKENS)


def model(policy: FirstBlockCache, steps: list[tuple[list[int], int]]) -> list[tuple[float | None, bool, int]]:
    """(diff, reused, tail that is added) of every step, in plain Python over lists."""
    reference: list[int] = []
    tail = in_a_row = 0
    result: list[tuple[float | None, bool, int]] = []
    for step, (residual, new_tail) in enumerate(steps):
        seen = [value for token, value in enumerate(residual) if token % policy.downsample_factor == 0]
        diff = None
        if step > 0 and step >= policy.warmup_steps:
            size = sum(abs(value) for value in reference)
            change = sum(abs(before - now) for before, now in zip(reference, seen, strict=True))
            diff = change / size if size else (math.inf if change else math.nan)
        allowed = policy.max_consecutive_hits is None or in_a_row < policy.max_consecutive_hits
        reused = diff is not None and diff < policy.threshold and allowed
        if reused:
            in_a_row += 1
        else:
            reference, tail, in_a_row = seen, new_tail, 0
        result.append((diff, reused, tail))
    return result


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(VECTORS, st.integers(-99, 99)), min_size=1, max_size=12),
    threshold=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]),
    warmup_steps=st.integers(0, 4),
    max_consecutive_hits=st.none() | st.integers(1, 4),
    downsample_factor=st.integers(1, 7),
)
def test_follows_the_model(steps: list[tuple[list[int], int]], **arguments: Any) -> None:
    policy = FirstBlockCache(**arguments)
    state = policy.new_state()
    for step, ((residual, new_tail), (diff, reused, tail)) in enumerate(zip(steps, model(policy, steps), strict=True)):
        record, final = run(state, column(residual), float(new_tail))
        assert (record.step, record.reused) == (step, reused)
        assert record.diff == diff or (math.isnan(record.diff or 0.0) and math.isnan(diff or 0.0))
        assert torch.equal(final, 1.0 + column(residual) + tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_diff_is_the_relative_change_of_the_rounded_residual(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, 50, 7, generator=generator).to(dtype)
    outputs = inputs + (0.5 * torch.randn(2, 3, 50, 7, generator=generator)).to(dtype)
    state = FirstBlockCache(0.1).new_state()
    state.decide(inputs[0], outputs[0])
    state.remember((outputs[0],), (outputs[0],))
    record = state.decide(inputs[1], outputs[1])
    previous, current = ((after - before).double() for before, after in zip(inputs, outputs, strict=True))
    expected = (previous - current).abs().mean() / previous.abs().mean()
    assert record.diff == pytest.approx(expected.item(), rel=1e-6)


# --- one rule at a time ---------------------------------------------------------------------------------------------


def test_reference_is_refreshed_on_a_miss_only() -> None:
    """A drift of 4 % a step passes a threshold of 10 % twice, then is noticed, though no two neighbours differ by 10
    %.
    """
    creeping = [1.0, 1.04, 1.08, 1.12, 1.16, 1.20, 1.24]
    assert decisions(FirstBlockCache(0.10), creeping) == "crrcrrc"


def test_a_diff_equal_to_the_threshold_is_a_miss() -> None:
    assert decisions(FirstBlockCache(0.5), [2.0, 3.0]) == "cc"
    assert decisions(FirstBlockCache(0.5 + 1e-9), [2.0, 3.0]) == "cr"


def test_threshold_zero_never_reuses() -> None:
    assert decisions(FirstBlockCache(0.0), [1.0] * 5) == "ccccc"


def test_warmup_steps_are_computed_and_refresh_the_reference() -> None:
    assert decisions(FirstBlockCache(0.1, warmup_steps=3), [1.0] * 6) == "cccrrr"
    assert decisions(FirstBlockCache(0.1, warmup_steps=2), [9.0, 1.0, 1.0]) == "ccr"


def test_max_consecutive_hits_forces_a_computed_step() -> None:
    assert decisions(FirstBlockCache(0.1, max_consecutive_hits=2), [1.0] * 8) == "crrcrrcr"


def test_downsampling_compares_every_nth_token_only() -> None:
    first, hidden, seen = (column(values) for values in ([1.0] * 6, [1, 9, 9, 1, 9, 9], [9, 1, 1, 1, 1, 1]))
    state = FirstBlockCache(0.1, downsample_factor=3).new_state()
    run(state, first)
    assert run(state, hidden)[0].diff == 0.0
    assert run(state, seen)[0].diff == pytest.approx(4.0)


def test_downsampling_makes_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    given_tensors: list[Tensor] = []

    def spy(hidden_in: Tensor, hidden_out: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given_tensors.extend([hidden_in, hidden_out])
        return original(hidden_in, hidden_out, previous)

    original = first_block.residual_diff
    monkeypatch.setattr(first_block, "residual_diff", spy)
    hidden = torch.zeros(1, TOKENS, CHANNELS)
    FirstBlockCache(0.1, downsample_factor=2).new_state().decide(hidden, hidden)
    assert [(x.data_ptr(), x.stride(1)) for x in given_tensors] == [(hidden.data_ptr(), 2 * CHANNELS)] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diff_that_is_no_number_is_a_miss(value: float) -> None:
    state = FirstBlockCache(1e30).new_state()
    run(state, 1.0)
    record, _ = run(state, value)
    assert not record.reused
    assert record.diff is not None
    assert not math.isfinite(record.diff)
    assert not run(state, 1.0)[0].reused  # Measured against the step above, which holds no numbers either.
    assert run(state, 1.0)[0].reused


@pytest.mark.parametrize(("second", "diff"), [(0.0, math.nan), (1.0, math.inf)])
def test_a_residual_of_zero_is_compared_without_an_error(second: float, diff: float) -> None:
    state = FirstBlockCache(10.0).new_state()
    run(state, 0.0)
    record, _ = run(state, second)
    assert record.diff == pytest.approx(diff, nan_ok=True)
    assert not record.reused


@pytest.mark.parametrize(
    "other",
    [torch.zeros(2, TOKENS, CHANNELS), torch.zeros(1, TOKENS + 1, CHANNELS), torch.zeros(1, TOKENS, CHANNELS).half()],
    ids=["batch", "tokens", "dtype"],
)
def test_another_layout_is_another_call(other: Tensor) -> None:
    state = FirstBlockCache(10.0, warmup_steps=1).new_state()
    assert [run(state, 1.0)[0].reused for _ in range(2)] == [False, True]
    assert state.decide(other, other + 1) == StepRecord(step=0, branch="default", diff=None, reused=False)


def test_a_step_that_was_cut_short_leaves_nothing_to_reuse() -> None:
    state = FirstBlockCache(10.0).new_state()
    run(state, 1.0)
    hidden = torch.ones(1, TOKENS, CHANNELS)
    assert not state.decide(hidden, 100.0 * hidden).reused  # A miss, after which the other blocks fail: no `remember`.
    assert run(state, 99.0)[0] == StepRecord(step=2, branch="default", diff=None, reused=False)


def test_every_stream_gets_its_own_tail() -> None:
    state = FirstBlockCache(1.0).new_state("cond")
    hidden, text = torch.ones(1, 4, 2), torch.ones(1, 3, 2)
    state.decide(hidden, 2 * hidden)
    state.remember((2 * hidden, text), (5 * hidden, 11 * text))
    assert state.decide(hidden, 2 * hidden) == StepRecord(1, "cond", 0.0, True)
    video_out, text_out = state.reuse((2 * hidden, 100 * text))
    assert torch.equal(video_out, 5 * hidden)
    assert torch.equal(text_out, 110 * text)


def test_reduce_sees_the_sums_on_the_device_and_decides() -> None:
    """Two ranks: this one saw no change, the other one a change of 6 in 2."""
    seen: list[Tensor] = []

    def add_other_rank(sums: Tensor) -> Tensor:
        seen.append(sums)
        return sums + torch.tensor([6.0, 2.0])

    state = FirstBlockCache(0.5).new_state()
    hidden = torch.ones(1, TOKENS, CHANNELS)
    state.decide(hidden, 2 * hidden, reduce=add_other_rank)
    state.remember((hidden,), (hidden,))
    record = state.decide(hidden, 2 * hidden, reduce=add_other_rank)
    assert record.diff == pytest.approx(6.0 / (TOKENS * CHANNELS + 2.0))
    assert len(seen) == 1  # Nothing is reduced on the first step: no rank has anything to compare.
    assert seen[0].dtype == torch.float32
    assert seen[0].shape == (2,)


def test_the_host_reads_once_per_compared_step_and_never_otherwise() -> None:
    state = FirstBlockCache(0.1, warmup_steps=2, max_consecutive_hits=2).new_state()
    reads = []
    for residual in [1.0, 1.0, 1.0, 1.0, 1.0, 5.0]:
        with HostReads() as counter:
            run(state, residual)
        reads.append(counter.count)
    assert reads == [0, 0, 1, 1, 1, 1]


def test_states_keep_no_autograd_graph() -> None:
    state = FirstBlockCache(10.0).new_state()
    weight = torch.ones(1, TOKENS, CHANNELS, requires_grad=True)
    first = 2 * weight
    state.decide(weight, first)
    state.remember((first,), (3 * first,))
    assert state.decide(weight, first).reused
    state.reuse((first,))[0].sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))  # Through the first block alone, not the reused tail.


def test_states_are_independent() -> None:
    policy = FirstBlockCache(0.5)
    one, other = policy.new_state("cond"), policy.new_state("uncond")
    run(one, 1.0)
    assert run(one, 1.0)[0] == StepRecord(1, "cond", 0.0, True)
    assert run(other, 1.0)[0] == StepRecord(0, "uncond", None, False)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, r"threshold: got -0\.1, allowed is a finite number >= 0"),
        ({"threshold": math.nan}, r"threshold: got nan, allowed is a finite number >= 0"),
        ({"threshold": math.inf}, r"threshold: got inf, allowed is a finite number >= 0"),
        ({"threshold": "0.1"}, r"threshold: got '0\.1', allowed is a finite number >= 0"),
        ({"threshold": True}, r"threshold: got True, allowed is a finite number >= 0"),
        ({"threshold": 0.1, "warmup_steps": -1}, r"warmup_steps: got -1, allowed is an integer >= 0"),
        ({"threshold": 0.1, "warmup_steps": 1.5}, r"warmup_steps: got 1\.5, allowed is an integer >= 0"),
        (
            {"threshold": 0.1, "max_consecutive_hits": 0},
            r"max_consecutive_hits: got 0, allowed is None or an integer >= 1",
        ),
        ({"threshold": 0.1, "downsample_factor": 0}, r"downsample_factor: got 0, allowed is an integer >= 1"),
        ({"threshold": 0.1, "downsample_factor": True}, r"downsample_factor: got True, allowed is an integer >= 1"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FirstBlockCache(**arguments)


def test_settings_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        FirstBlockCache(0.1).threshold = 0.2  # type: ignore[misc]
