"""Random attention problems: they cover what they are meant to, and notice a wrong kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import inputs, random_shapes, reference
from para_kernels import flash_attention, flash_attention_varlen

CPU = torch.device("cpu")


def test_a_problem_is_made_of_its_seed_and_number_alone() -> None:
    problems = [random_shapes.problem(3, case) for case in range(40)]
    assert problems == [random_shapes.problem(3, case) for case in range(40)]
    assert len(set(problems)) == 40
    assert problems[5] != random_shapes.problem(4, 5)


def test_problems_cover_what_they_are_meant_to() -> None:
    problems = [random_shapes.problem(random_shapes.SEED, case) for case in range(random_shapes.CASES)]
    lens = [n for one in problems for n in (*one.query_lens, *one.key_lens)]
    assert {0, 1} <= set(lens)
    assert max(lens) <= random_shapes.LONGEST + 200  # a padded query without q_lens has all rows
    for edge in random_shapes.EDGES:
        for beside in (-1, 0, 1):
            assert sum(n > 0 and (n - beside) % edge == 0 for n in lens) >= 50, (edge, beside)
    for name, values in {
        "form": {"dense", "padded", "packed"},
        "dtype": {torch.bfloat16, torch.float16},
        "storage_q": {*random_shapes.STORAGES, *random_shapes.ODD_STORAGES},
        "storage_kv": {*random_shapes.STORAGES, *random_shapes.ODD_STORAGES},
        "gives_q_lens": {True, False},
    }.items():
        assert {getattr(one, name) for one in problems} == values, name
    assert {64, 128} < {one.head_dim for one in problems}
    assert {1, 2, 3, 4} == {one.heads // one.key_heads for one in problems} == {len(one.query_lens) for one in problems}
    assert {None, 0.0} < {one.scale for one in problems}
    assert {one.values for one in problems} == {"normal", "large", "sink", "edge"}
    both = [one for one in problems if one.form == "padded" and one.gives_q_lens]
    assert any(0 in one.query_lens for one in both) and any(0 in one.key_lens for one in both)  # noqa: PT018
    assert sum(one.poisoned is not None for one in problems) >= 50


def test_random_problems_hold() -> None:
    judged, _ = random_shapes.sweep(seed=2, cases=60, device=CPU, longest=100)
    assert not random_shapes.report(judged, 100)


@pytest.mark.gpu
def test_random_problems_hold_on_a_gpu() -> None:
    judged, _ = random_shapes.sweep(seed=2, cases=60, device=torch.device("cuda", 0), longest=700)
    assert not random_shapes.report(judged, 700)


def sees_one_key_too_many(q: Tensor, k: Tensor, v: Tensor, *, kv_lens: Tensor | None = None, **rest: Any) -> Any:
    lens = None if kv_lens is None else (kv_lens + 1).clamp(max=k.shape[1])
    return flash_attention(q, k, v, kv_lens=lens, **rest)


def ignores_the_scale(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **rest: Any) -> Any:
    return flash_attention(q, k, v, **rest)


def swaps_grouped_heads(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    return flash_attention(q, k.flip(2), v.flip(2), **rest)


def leaves_the_last_row(*args: Any, **kwargs: Any) -> Any:
    out, lse = flash_attention(*args, **kwargs)
    out[:, -1:] = torch.empty_like(out[:, -1:])  # NaN where memory is filled with it
    return out, lse


def gives_the_padding_an_lse(*args: Any, **kwargs: Any) -> Any:
    out, lse = flash_attention(*args, **kwargs)
    return out, lse.nan_to_num(neginf=0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        sees_one_key_too_many,
        ignores_the_scale,
        swaps_grouped_heads,
        leaves_the_last_row,
        gives_the_padding_an_lse,
    ],
)
def test_random_problems_notice_a_wrong_kernel(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_shapes, "flash_attention", wrong)
    judged, seconds = random_shapes.sweep(seed=0, cases=40, device=CPU, longest=80)
    failures = random_shapes.report(judged, 80)
    assert failures
    number = next(one.case for one, result in judged if not result.passed)
    assert f"python -m benchmarks.random_shapes --seed 0 --case {number} --longest 80" in failures[0]
    checks = random_shapes.checks(judged, seconds)
    assert sum(check.failures for check in checks) == len(failures)
    assert sum(check.cases for check in checks) == 40


def excess(one: random_shapes.Problem) -> float:
    """By how much a row's largest score exceeds the largest of its last 64 keys, at most, over all samples."""
    q, k, _ = random_shapes._inputs(one, CPU)
    random_shapes._set_values(one, q, k)
    largest = 0.0
    for b in range(len(one.query_lens)):
        (batch_q, rows_q, _), (batch_k, rows_k, _) = random_shapes._spans(one, b)
        queries, keys = q[batch_q, rows_q, 0].double(), k[batch_k, rows_k, 0].double()
        if queries.shape[0] and keys.shape[0]:
            scores = queries @ keys.T * one.head_dim**-0.5
            largest = max(largest, (scores.amax(1) - scores[:, -64:].amax(1)).max().item())
    return largest


def test_hard_values_reach_to_both_sides_of_what_float32_holds() -> None:
    """exp(88.7) is float32's largest power of e: a softmax that follows no maximum overflows there."""
    problems = [random_shapes.problem(0, case, longest=300) for case in range(400)]
    by_values = {
        values: [excess(one) for one in problems if one.values == values]
        for values in ("normal", "large", "sink", "edge")
    }
    assert max(by_values["large"]) > 89 and max(by_values["sink"]) > 89  # noqa: PT018
    edge = [value for value in by_values["edge"] if value]  # none where the sink is one of the last 64
    assert sum(60 < value < 88 for value in edge) >= 10
    assert sum(89 < value < 110 for value in edge) >= 5


def test_random_problems_notice_an_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    def follows_no_maximum(
        q: Tensor, k: Tensor, v: Tensor, *, kv_lens: Tensor | None, q_lens: Tensor | None, scale: float | None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention(q, k, v, kv_lens=kv_lens, q_lens=q_lens, scale=scale, return_lse=True)
        group = q.shape[2] // k.shape[2]
        for b in range(q.shape[0]):
            rows = q.shape[1] if q_lens is None else int(q_lens[b])
            keys = k.shape[1] if kv_lens is None else int(kv_lens[b])
            if rows and keys:
                wide_k, wide_v = (x[b, :keys].float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
                scores = (
                    q[b, :rows].float().transpose(0, 1) @ wide_k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
                )
                weights = (scores - scores[..., -64:].amax(-1, keepdim=True)).exp()
                out[b, :rows] = (weights @ wide_v / weights.sum(-1, keepdim=True)).transpose(0, 1).to(q.dtype)
        return out, lse

    monkeypatch.setattr(random_shapes, "flash_attention", follows_no_maximum)
    problems = [
        one for one in (random_shapes.problem(0, case, longest=300) for case in range(400)) if one.form != "packed"
    ]
    judged = {
        values: [random_shapes.judge(o, CPU) for o in problems if o.values == values] for values in ("normal", "edge")
    }
    assert all(result.passed for result in judged["normal"])
    assert any("not finite" in fault for result in judged["edge"] for fault in result.faults)


def test_random_problems_notice_a_sample_that_reads_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed: 0 * NaN is NaN, so a tail that is masked by a weight of zero alone shows."""

    def leaky(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, **kwargs: Any) -> Any:
        out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, *rest, **kwargs)
        return out + 0 * v.float().mean().to(out.dtype), lse

    monkeypatch.setattr(random_shapes, "flash_attention_varlen", leaky)
    judged, _ = random_shapes.sweep(seed=0, cases=40, device=CPU, longest=80)
    assert any("not finite" in fault for _, result in judged for fault in result.faults)


def test_one_problem_runs_again_by_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["random_shapes", "--seed", "5", "--case", "7", "--longest", "60"])
    assert random_shapes.main() == 0
    assert str(random_shapes.problem(5, 7, 60)) in capsys.readouterr().out


def test_the_reference_is_that_of_torch() -> None:
    q, k, v = (x[0] for x in inputs.attention_inputs(1, 33, 4, 16, torch.float64, CPU, key_heads=2))
    out, lse = reference.attention_float64(q, k, v, scale=0.3)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    heads_first = [x.transpose(0, 1) for x in (q, *repeated)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=0.3)
    torch.testing.assert_close(out, expected.transpose(0, 1))
    torch.testing.assert_close(lse, (0.3 * heads_first[0] @ heads_first[1].mT).logsumexp(-1))
