"""TeaCache, AdaCache, extrapolation and error bound against plain Python models of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from host_reads import HostReads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from para_kernels import AdaCache, FirstBlockCache, TeaCache
from para_kernels.cache import CacheState, Calibration, Policy, StepRecord, fit_rescale
from para_kernels.cache.taylor import Trajectory, lagrange_weights

TOKENS, CHANNELS = 6, 2
# Small integers: their sums are exact in float32, so that both sides form the same quotient and no tie is decided by
# rounding.
VECTORS = st.lists(st.integers(-8, 8), min_size=TOKENS, max_size=TOKENS)
STEPS = st.lists(st.tuples(VECTORS, VECTORS), min_size=1, max_size=14)
LIMITS: dict[str, Any] = {
    "warmup_steps": st.integers(0, 4),
    "max_consecutive_hits": st.none() | st.integers(1, 4),
    "max_accumulated_error": st.none() | st.sampled_from([0.25, 1.0, 3.0]),
}


def column(values: Sequence[float]) -> Tensor:
    """One sample (1, S, C) whose token s holds values[s] in every channel."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None].expand(1, len(values), CHANNELS).contiguous()


def run(state: CacheState, seen: Sequence[float], tail: Sequence[float]) -> tuple[StepRecord, Tensor]:
    """One step: `seen` is both the first blocks' residual and the modulated input, `tail` what the blocks would add."""
    hidden_in = torch.ones(1, TOKENS, CHANNELS)
    before = hidden_in + column(seen)
    record = state.decide(hidden_in, before, modulated=column(seen))
    if record.reused:
        return record, state.reuse((before,))[0]
    after = before + column(tail)
    state.remember((before,), (after,))
    return record, after


def relative(previous: Sequence[float], current: Sequence[float]) -> float:
    size = sum(abs(value) for value in previous)
    change = sum(abs(a - b) for a, b in zip(previous, current, strict=True))
    return change / size if size else (math.inf if change else math.nan)


def limited(policy: Policy, hits: int, accumulated: float) -> bool:
    """Whether one of the limits forces a computed step."""
    too_many = policy.max_consecutive_hits is not None and hits >= policy.max_consecutive_hits
    bound = policy.max_accumulated_error
    return too_many or (bound is not None and not accumulated <= bound)


def check(policy: Policy, steps: list[tuple[list[int], list[int]]], expected: list[tuple[float | None, bool]]) -> None:
    """The policy's decisions are `expected`, and a reused step adds what the last computed one did."""
    state, tail = policy.new_state(), [0] * TOKENS
    for step, ((seen, new_tail), (diff, reused)) in enumerate(zip(steps, expected, strict=True)):
        record, final = run(state, seen, new_tail)
        assert (record.step, record.reused) == (step, reused)
        assert record.diff == (None if diff is None else pytest.approx(diff, rel=1e-12, nan_ok=True))
        tail = tail if reused else new_tail
        assert torch.equal(final, 1.0 + column(seen) + column(tail))


# --- TeaCache -------------------------------------------------------------------------------------------------------


def teacache_model(policy: TeaCache, steps: list[tuple[list[int], list[int]]]) -> list[tuple[float | None, bool]]:
    result: list[tuple[float | None, bool]] = []
    hits, total = 0, 0.0
    for step, (seen, _) in enumerate(steps):
        diff = None
        if step > 0 and step >= policy.warmup_steps:
            kept = slice(None, None, policy.downsample_factor)
            x = relative(steps[step - 1][0][kept], seen[kept])
            a, b, c = policy.rescale or (0.0, 1.0, 0.0)
            y = a * x * x + b * x + c
            total += max(0.0, y) if not math.isnan(y) else 0.0 if max(0.0, y) == 0.0 else y
            diff = total
        reused = diff is not None and diff < policy.threshold and not limited(policy, hits, total)
        hits, total = (hits + 1, total) if reused else (0, 0.0)
        result.append((diff, reused))
    return result


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    threshold=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    rescale=st.sampled_from([(0.0, 1.0, 0.0), (0.5, -1.0, 0.25), (1.0, 0.0, 0.125)]),
    downsample_factor=st.integers(1, 4),
    **LIMITS,
)
def test_teacache_follows_its_model(steps: list[tuple[list[int], list[int]]], **arguments: Any) -> None:
    policy = TeaCache(**arguments)
    check(policy, steps, teacache_model(policy, steps))


def test_teacache_sums_up_what_each_step_changes() -> None:
    """2 -> 3 -> 4 -> 5: changes of 1/2, 1/3 and 1/4; the third sum passes a threshold of one."""
    state = TeaCache(1.0, rescale=(1.0, 0.0)).new_state()
    records = [run(state, [value] * TOKENS, [0] * TOKENS)[0] for value in (2, 3, 4, 5)]
    assert [record.reused for record in records] == [False, True, True, False]
    assert [record.diff for record in records] == [None, *map(pytest.approx, (0.5, 5 / 6, 13 / 12))]


def test_a_change_of_teacache_is_never_negative() -> None:
    """A polynomial may be, and would then make room for later changes."""
    state = TeaCache(0.5, rescale=(1.0, -10.0)).new_state()
    assert [run(state, [value] * TOKENS, [0] * TOKENS)[0].diff for value in (2, 3, 4)] == [None, 0.0, 0.0]


# --- AdaCache -------------------------------------------------------------------------------------------------------


def adacache_model(policy: AdaCache, steps: list[tuple[list[int], list[int]]]) -> list[tuple[float | None, bool]]:
    """Straight from the paper: after a computed step, the rate of change and from it the next step to compute."""
    result: list[tuple[float | None, bool]] = []
    computed: list[int] = []
    change: float | None = None  # per step, of the last computed step
    hits, total = 0, 0.0
    for step in range(len(steps)):
        comparable = step > 0 and step >= policy.warmup_steps
        if comparable and len(computed) > 1 and hits == 0:
            last, before = computed[-1], computed[-2]
            change = relative(steps[before][1], steps[last][1]) / (last - before)
        diff = change if comparable and len(computed) > 1 else None
        rate = 1
        if diff is not None:
            rates = [rate for distance, rate in policy.codebook if diff < policy.threshold * distance]
            rate = rates[0] if rates else 1
            total += diff
        reused = diff is not None and step < computed[-1] + rate and not limited(policy, hits, total)
        if reused:
            hits += 1
        else:
            hits, total = 0, 0.0
            computed.append(step)
        result.append((diff, reused))
    return result


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS,
    threshold=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    codebook=st.sampled_from([((0.25, 5), (0.5, 3), (2.0, 2)), ((1.0, 4),), ((0.5, 1), (1.0, 6))]),
    **LIMITS,
)
def test_adacache_follows_its_model(steps: list[tuple[list[int], list[int]]], **arguments: Any) -> None:
    policy = AdaCache(**arguments)
    check(policy, steps, adacache_model(policy, steps))


def test_adacache_looks_the_rate_up() -> None:
    """The residual grows by a tenth of what it first was at every step; only the codebook says when to compute."""
    state = AdaCache(1.0, codebook=((0.08, 4), (0.2, 3))).new_state()
    tails = [[10 + step] * TOKENS for step in range(12)]
    records = [run(state, [1] * TOKENS, tail)[0] for tail in tails]
    assert "".join("r" if record.reused else "c" for record in records) == "ccrrcrrcrrrc"
    assert records[2].diff == pytest.approx(1 / 10)
    assert records[5].diff == pytest.approx(3 / 11 / 3)


@pytest.mark.parametrize(
    ("change", "rate"), [(0.0, 6), (0.079, 6), (0.08, 5), (0.39, 2), (0.4, 1), (9.0, 1), (math.nan, 1), (math.inf, 1)]
)
def test_the_rate_of_adacache(change: float, rate: int) -> None:
    assert AdaCache(1.0).rate(change) == rate
    assert AdaCache(0.5).rate(change / 2) == rate


# --- First Block Cache with an error bound --------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, threshold=st.sampled_from([0.5, 1.0, 2.0]), **LIMITS)
def test_first_block_cache_with_a_bound_follows_its_model(
    steps: list[tuple[list[int], list[int]]], **arguments: Any
) -> None:
    policy = FirstBlockCache(**arguments)
    expected: list[tuple[float | None, bool]] = []
    reference: list[int] = []
    hits, total = 0, 0.0
    for step, (seen, _) in enumerate(steps):
        diff = relative(reference, seen) if step > 0 and step >= policy.warmup_steps else None
        total += diff or 0.0
        reused = diff is not None and diff < policy.threshold and not limited(policy, hits, total)
        if reused:
            hits += 1
        else:
            reference, hits, total = seen, 0, 0.0
        expected.append((diff, reused))
    check(policy, steps, expected)


# --- extrapolation --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    order=st.integers(0, 2),
    coefficients=st.lists(st.integers(-9, 9), min_size=3, max_size=3),
    gaps=st.lists(st.integers(1, 5), min_size=3, max_size=5),
    ahead=st.integers(1, 6),
)
def test_extrapolation_is_exact_on_polynomials(
    order: int, coefficients: list[int], gaps: list[int], ahead: int
) -> None:
    """However the computed steps are spaced, and for every stream."""

    def value(step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, float(sum(coefficients[i] * step**i for i in range(order + 1))), dtype=torch.float64)

    trajectory, step = Trajectory(order), 0
    for gap in gaps:
        step += gap
        trajectory.make_room()
        trajectory.add(step, (value(step, (2, 3)), value(step, (1,))))
    streams = torch.full((2, 3), 7.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for got, stream in zip(trajectory.applied(streams, step + ahead), streams, strict=True):
        torch.testing.assert_close(got, stream + value(step + ahead, tuple(stream.shape)), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3])
def test_order_one_is_the_formula_of_the_paper(interval: int, ahead: int) -> None:
    """F + (F - F_before) / N * k, arXiv 2503.06923."""
    torch.testing.assert_close(
        torch.tensor(lagrange_weights([0, interval], interval + ahead)),
        torch.tensor([-ahead / interval, 1 + ahead / interval]),
    )


def test_until_there_are_enough_steps_the_order_is_lower() -> None:
    trajectory, stream = Trajectory(2), torch.zeros(1)
    trajectory.add(0, (torch.ones(1),))
    assert trajectory.applied((stream,), 5)[0].item() == 1.0
    trajectory.add(1, (2 * torch.ones(1),))
    assert trajectory.applied((stream,), 5)[0].item() == 6.0


@pytest.mark.parametrize("order", [0, 1, 2])
def test_so_many_tensors_are_kept(order: int) -> None:
    trajectory = Trajectory(order)
    for step in range(5):
        trajectory.make_room()
        assert len(trajectory._nodes) == min(step, order)
        trajectory.add(step, (torch.zeros(1),))
        assert len(trajectory._nodes) == min(step, order) + 1


@pytest.mark.parametrize("policy", [FirstBlockCache(9.0, taylor_order=1), TeaCache(9.0, taylor_order=1)])
def test_a_policy_extrapolates(policy: Policy) -> None:
    """Two steps are computed that add 1 and 3: the reused ones add 5, 7 and 9."""
    state = type(policy)(9.0, taylor_order=1, warmup_steps=2).new_state()
    finals = [run(state, [1] * TOKENS, [1 + 2 * min(step, 1)] * TOKENS)[1] for step in range(5)]
    assert [int(final.unique().item()) - 2 for final in finals] == [1, 3, 5, 7, 9]


def test_an_interrupted_step_is_not_a_node() -> None:
    state = FirstBlockCache(0.5, taylor_order=1).new_state()
    run(state, [1] * TOKENS, [1] * TOKENS)
    hidden = torch.ones(1, TOKENS, CHANNELS)
    assert not state.decide(hidden, 100 * hidden).reused  # the blocks fail: no `remember`
    assert not run(state, [99] * TOKENS, [5] * TOKENS)[0].reused
    record, final = run(state, [99] * TOKENS, [0] * TOKENS)
    assert record.reused
    assert torch.equal(final, torch.full_like(final, 100.0 + 7.0))  # 1 at step 0, 5 at step 2: 7 at step 3


# --- for every policy -----------------------------------------------------------------------------------------------

POLICIES: dict[str, Policy] = {
    "first block": FirstBlockCache(1e9),
    "teacache": TeaCache(1e9),
    "adacache": AdaCache(1e9),
    "taylor": FirstBlockCache(1e9, taylor_order=2),
    "adacache, taylor": AdaCache(1e9, taylor_order=1),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_host_reads_at_most_once_per_step(policy: Policy) -> None:
    state, reads, reused = policy.new_state(), [], []
    for step in range(9):
        with HostReads() as counter:
            record, _ = run(state, [1 + step] * TOKENS, [2 + step] * TOKENS)
        reads.append(counter.count)
        reused.append(record.reused)
    assert max(reads) == 1
    assert {False, True} == set(reused)
    if isinstance(policy, AdaCache):  # one read for each computed step but the first
        assert sum(reads) == reused.count(False) - 1


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(
    "other",
    [torch.zeros(2, TOKENS, CHANNELS), torch.zeros(1, TOKENS + 1, CHANNELS), torch.zeros(1, TOKENS, CHANNELS).half()],
    ids=["batch", "tokens", "dtype"],
)
def test_another_layout_is_another_call(policy: Policy, other: Tensor) -> None:
    state = policy.new_state()
    assert [run(state, [1] * TOKENS, [1] * TOKENS)[0].reused for _ in range(3)][-1]
    record = state.decide(other, other + 1, modulated=other + 1)
    assert record == StepRecord(step=0, branch="default", diff=None, reused=False)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_ranks_are_asked_with_the_sums_on_the_device(policy: Policy) -> None:
    """Every sum goes through `reduce`, and nothing else is compared."""
    state, calls = policy.new_state(), []

    def reduce(sums: Tensor) -> Tensor:
        calls.append((sums.dtype, tuple(sums.shape)))
        return torch.tensor([3.0, 4.0])

    hidden = torch.ones(1, TOKENS, CHANNELS)
    diffs = []
    for _ in range(4):
        record = state.decide(hidden, 2 * hidden, modulated=hidden, reduce=reduce, whole=(1, 12))
        diffs.append(record.diff)
        if not record.reused:
            state.remember((hidden,), (3 * hidden,))
    assert set(calls) == {(torch.float32, (2,))}
    assert {diff for diff in diffs if diff is not None} <= {0.75, 1.5, 2.25}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_an_empty_shard_is_measured(policy: Policy) -> None:
    """A rank that has no row of the video takes part all the same."""
    state, empty = policy.new_state(), torch.zeros(1, 0, CHANNELS)
    reused = []
    for _ in range(4):
        record = state.decide(empty, empty, modulated=empty, reduce=lambda sums: sums + 1.0, whole=(1, 12))
        reused.append(record.reused)
        if record.reused:
            assert state.reuse((empty,))[0].shape == empty.shape
        else:
            state.remember((empty,), (empty,))
    assert reused[-1]


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_notes_both_changes_and_never_reuses() -> None:
    policy = Calibration()
    state = policy.new_state()
    for seen, tail in ((2, 10), (3, 20), (3, 15)):
        assert not run(state, [seen] * TOKENS, [tail] * TOKENS)[0].reused
    assert policy.pairs == [(0.5, 1.0), (0.0, 0.25)]


def test_fit_rescale_finds_the_polynomial() -> None:
    coefficients = (700.0, -400.0, 60.0, -3.0, 0.1)
    x = torch.linspace(0.02, 0.3, 30, dtype=torch.float64)
    y = sum(c * x**power for c, power in zip(coefficients, range(4, -1, -1), strict=True))
    assert isinstance(y, Tensor)
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    assert fit_rescale([*pairs, (math.nan, 1.0), (0.1, math.inf)]) == pytest.approx(coefficients, rel=1e-6)
    assert fit_rescale(pairs, degree=0) == pytest.approx((float(y.mean()),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_rescale([(0.1, 0.1)] * 4), r"pairs: got 4 that are finite, allowed are 5 or more"),
        (lambda: fit_rescale([], degree=-1), r"degree: got -1, allowed is an integer >= 0"),
        (lambda: TeaCache(-1.0), r"threshold: got -1\.0, allowed is a finite number >= 0"),
        (lambda: TeaCache(0.1, rescale=()), r"rescale: got \(\), allowed is None or one or more finite coefficients"),
        (lambda: TeaCache(0.1, rescale=(1.0, math.nan)), r"rescale: got \(1\.0, nan\)"),
        (lambda: TeaCache(0.1, rescale=2.0), r"rescale: got 2\.0"),
        (lambda: TeaCache(0.1, downsample_factor=0), r"downsample_factor: got 0, allowed is an integer >= 1"),
        (lambda: AdaCache(1.0, codebook=()), r"codebook: got \(\), allowed are one or more pairs"),
        (lambda: AdaCache(1.0, codebook=((0.2, 3), (0.1, 4))), r"codebook: got .* distances in ascending order"),
        (lambda: AdaCache(1.0, codebook=((0.0, 3),)), r"codebook: got .*, allowed are one or more pairs"),
        (lambda: AdaCache(1.0, codebook=((0.1, 0),)), r"codebook: rate: got 0, allowed is an integer >= 1"),
        (lambda: AdaCache(1.0, codebook=(0.1, 2)), r"codebook: got .*, allowed are one or more pairs"),
        (lambda: FirstBlockCache(0.1, first_blocks=0), r"first_blocks: got 0, allowed is an integer >= 1"),
        (lambda: AdaCache(1.0, first_blocks=-1), r"first_blocks: got -1, allowed is an integer >= 0"),
        (lambda: TeaCache(1.0, last_blocks=1.5), r"last_blocks: got 1\.5, allowed is an integer >= 0"),
        (lambda: FirstBlockCache(0.1, taylor_order=3), r"taylor_order: got 3, allowed is an integer from 0 to 2"),
        (lambda: FirstBlockCache(0.1, taylor_order=True), r"taylor_order: got True"),
        (
            lambda: FirstBlockCache(0.1, max_accumulated_error=0.0),
            r"max_accumulated_error: got 0\.0, allowed is None or",
        ),
        (lambda: FirstBlockCache(0.1, max_accumulated_error=math.inf), r"max_accumulated_error: got inf"),
    ],
)
def test_bad_settings_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_policy_describes_what_is_not_usual() -> None:
    assert AdaCache(2).description() == "AdaCache, threshold 2"
    text = TeaCache(0.1, rescale=[1, 0], warmup_steps=2).description()
    assert text == "TeaCache, threshold 0.1, warmup_steps 2, rescale (1, 0)"
