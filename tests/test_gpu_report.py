"""The GPU report, first calls and compute-sanitizer, as far as a CPU goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import first_calls, gpu_report, record, report_attention, report_checks, sanitize
from benchmarks.record import OURS, Check
from benchmarks.section import CheckFailedError, Result
from para_kernels import flash_attention, flash_attention_varlen, residual_diff

CPU = torch.device("cpu")


# --- the GPU report, as far as a CPU goes -----------------------------------------------------------------------------


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_checks, "HEAD_DIMS", (40,))
    monkeypatch.setattr(report_checks, "EVERY_DTYPE", (40,))
    monkeypatch.setattr(report_checks, "TOLERANCES", {torch.float32: 1e-6})


@pytest.mark.usefixtures("few_checks")
def test_the_checks_hold() -> None:
    _, checks = report_checks.correctness(CPU)
    found = {check.check: check for check in checks if isinstance(check, Check)}
    assert set(found) == {"attention, padded", "attention, packed", "merge_states", "residual_diff, sums"}
    assert found["attention, padded"].cases == len(report_checks.CASES)
    for check in found.values():
        assert check.worst is not None and check.allowed is not None, check  # noqa: PT018
        assert 0 <= check.worst <= check.allowed, check


def test_head_dims_and_dtypes_of_the_checks() -> None:
    """Every head dim in bfloat16, and every dtype at the two sizes that differ in padding."""
    _, checks = report_checks.correctness(CPU)
    cases = {(check.check, check.dtype): check.cases for check in checks if isinstance(check, Check)}
    every, some = (
        len(dims) * len(report_checks.CASES) for dims in (report_checks.HEAD_DIMS, report_checks.EVERY_DTYPE)
    )
    assert cases["attention, padded", "bfloat16"] == every
    assert cases["attention, packed", "bfloat16"] == some
    assert cases["attention, padded", "float32"] == cases["attention, padded", "float16"] == some


def damaged_output(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out * (1 + 1e-5), lse


def damaged_lse(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out, lse + 1e-3


def damaged_padding(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out + (out == 0), lse


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize("damage", [damaged_output, damaged_lse, damaged_padding])
def test_the_checks_notice_a_wrong_kernel(
    damage: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention(*args, **kwargs)
        return damage(out, lse)

    monkeypatch.setattr(report_checks, "flash_attention", wrong)
    with pytest.raises(CheckFailedError):
        report_checks.correctness(CPU)


def test_the_checks_notice_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        residual, sums = residual_diff(*args)
        return residual, sums * 1.001

    monkeypatch.setattr(report_checks, "residual_diff", wrong)
    with pytest.raises(CheckFailedError, match="residual_diff"):
        report_checks._check_residual(CPU)


def test_two_different_runs_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def drifting(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = flash_attention_varlen(*args, **kwargs)
        runs.append(1)
        return out + (out == out.max()) * 1e-2 * len(runs), lse

    assert report_checks.repeatable(CPU)[1]
    monkeypatch.setattr(report_checks, "flash_attention_varlen", drifting)
    with pytest.raises(CheckFailedError, match=r"packed.*two runs differ"):
        report_checks.repeatable(CPU)


def run_report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_report", *arguments])
    return gpu_report.main()


def test_a_section_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device) -> Result:
        raise RuntimeError("the device is on fire")

    monkeypatch.setitem(gpu_report.SECTIONS, "masked", broken)
    assert run_report(monkeypatch, "--out", str(tmp_path), "--only", "masked,merge_states") == 1
    printed = capsys.readouterr().out
    assert "the device is on fire" in printed
    assert "failed: masked" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-merge_states.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="these sections run on CUDA")
def test_sections_that_need_cuda_are_skipped_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_report(monkeypatch, "--out", str(tmp_path), "--only", "no_sync,compile_count,cuda_graph") == 0
    assert capsys.readouterr().out.count("skipped: needs CUDA") == 3


@pytest.mark.gpu
@pytest.mark.parametrize("section", ["no_sync", "compile_count", "cuda_graph"])
def test_sections_that_need_cuda_hold(section: str) -> None:
    lines, _ = gpu_report.SECTIONS[section](torch.device("cuda", 0))
    assert lines


def test_a_check_that_does_not_hold_fails_its_section_and_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: torch.device) -> Result:
        return [], [Check("that it holds", cases=10, failures=3, dtype="float16", worst=0.5, allowed=0.1)]

    monkeypatch.setitem(gpu_report.SECTIONS, "repeatable", wrong)
    assert run_report(monkeypatch, "--out", str(tmp_path), "--only", "repeatable") == 1
    assert "that it holds, float16: 3 of 10 failed, worst 0.5, allowed 0.1" in capsys.readouterr().out
    (row,) = record.read_records("gpu-repeatable", tmp_path)
    assert not row["passed"]


def test_sections_are_left_out_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--only", "no_sync,merge_states", "--skip", "merge_states"]
    assert run_report(monkeypatch, "--out", str(tmp_path), *options) == 0
    assert "merge_states" not in capsys.readouterr().out.split("\n", 1)[1]  # after the command line
    assert not list(tmp_path.iterdir())


def test_unknown_sections_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_report(monkeypatch, "--out", str(tmp_path), "--only", "atention")
    assert exit_.value.code == 2


def test_the_speed_of_a_record_is_its_work_over_its_time() -> None:
    times = {OURS: 2.0, "cuDNN": 3.0, "SDPA flash": 1.0}
    made = [
        report_attention._record("op", {"S": 8}, torch.bfloat16, times, peer, 4e12, {})
        for peer in times
        if peer != OURS
    ]
    assert [(r.peer, r.median_ms, r.peer_ms, r.tflops) for r in made] == [
        ("cuDNN", 2.0, 3.0, 2000.0),
        ("SDPA flash", 2.0, 1.0, 2000.0),
    ]


def test_the_dense_rate_is_of_the_dense_calls_own_work() -> None:
    times = {"padded": 2.0, report_attention.DENSE: 1.0}
    records = report_attention._against("padded", "op", {"S": 8}, torch.bfloat16, times, flops=6e12, dense_flops=4e12)
    assert [record.notes["of_dense_rate"] for record in records] == [0.75]  # 3 per ms against 4


# --- first calls ------------------------------------------------------------------------------------------------------


def test_first_calls_are_timed_and_what_they_compile_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("A/_attention_fwd.cubin", "B/_attention_fwd.cubin", "C/_merge_states.cubin", "C/_merge_states.ptx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = first_calls.first_calls(torch.bfloat16, 64, CPU)
    assert found["compiled"] == found["after_new_lengths"] == {"_attention_fwd": 2, "_merge_states": 1}
    assert next(iter(found["seconds"])) == "dense, 200 tokens"
    assert all(seconds > 0 for seconds in found["seconds"].values())


def one_child(seconds: float, before: int, after: int) -> first_calls.Child:
    found = {"seconds": {"dense": seconds, "packed": 1.0}, "compiled": {"k": before}, "after_new_lengths": {"k": after}}
    return first_calls.Child("bfloat16", 128, found, "")


@pytest.mark.parametrize(
    ("first", "failures"), [((8.0, 2, 2), 0), ((8.0, 2, 5), 3), ((21.0, 2, 2), 1)], ids=["good", "recompiles", "slow"]
)
def test_recompiling_and_slow_first_calls_fail(first: tuple[float, int, int], failures: int) -> None:
    check = first_calls._check(one_child(*first), one_child(0.5, 2, 2))
    assert check.failures == failures
    assert (check.worst, check.notes["seconds_warm"], check.notes["variants_of_k"]) == (first[0], 0.5, first[2])


# --- compute-sanitizer ------------------------------------------------------------------------------------------------

CLEAN = {
    "memcheck": "12 passed, 57 deselected in 40 s\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "12 problems judged, 0 failed\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}


@pytest.mark.parametrize("tool", sanitize.SUMMARY)
def test_a_clean_run_passes_with_the_number_of_its_calls(tool: str) -> None:
    run = next(run for run in sanitize.RUNS if run.tool == tool)
    check = sanitize.judge(run, CLEAN[tool], 41.0)
    assert check.passed
    assert (check.cases, check.notes["found"]) == (12, 0)
    assert str(check.notes["command"]).startswith(f"compute-sanitizer --tool {tool} python -m ")


@pytest.mark.parametrize(
    ("tool", "output"),
    [
        ("memcheck", "12 passed in 40 s\n========= ERROR SUMMARY: 3 errors\n"),
        ("memcheck", "1 failed, 11 passed in 40 s\n========= ERROR SUMMARY: 0 errors\n"),
        ("memcheck", "69 deselected in 4 s\n========= ERROR SUMMARY: 0 errors\n"),
        ("memcheck", "12 passed in 40 s\n"),
        ("racecheck", "12 passed in 40 s\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"),
        ("racecheck", "12 problems judged, 2 failed\n========= RACECHECK SUMMARY: 0 hazards displayed\n"),
        ("racecheck", "not done after 90 s"),
    ],
)
def test_findings_failed_tests_and_runs_without_a_verdict_fail(tool: str, output: str) -> None:
    run = next(run for run in sanitize.RUNS if run.tool == tool)
    assert not sanitize.judge(run, output, 41.0).passed


def racecheck_report(read: str, *writes: str) -> str:
    accesses = [f"Race reported between Read access at kernel+0x120 in {read}"]
    accesses += [f"=========     and Write access at kernel+0x90 in {write} [4 hazards]" for write in writes]
    summary = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    return "\n".join(["12 passed in 40 s", "========= Error: " + accesses[0], *accesses[1:], summary])


def test_only_the_dispatch_of_partitions_by_triton_is_no_race() -> None:
    run = next(run for run in sanitize.RUNS if run.tool == "racecheck")
    entry, call = sorted(place for place in sanitize._dispatch_places() if place[0] == "hopper_attention.py")[:2]
    assert entry[1] < call[1]
    here, there, elsewhere = (f"{name}:{line}" for name, line in (entry, call, (entry[0], entry[1] - 1)))
    assert sanitize.judge(run, racecheck_report(here, here, there), 1.0).passed
    assert not sanitize.judge(run, racecheck_report(here, there, elsewhere), 1.0).passed
    assert not sanitize.judge(run, racecheck_report(elsewhere, there), 1.0).passed


def test_a_run_that_is_not_done_in_time_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "TIMEOUT_SECONDS", 1)
    script = "print('begun', flush=True); import time; time.sleep(60)"
    assert sanitize._output([sys.executable, "-c", script]) == "begun\n\nnot done after 1 s"
