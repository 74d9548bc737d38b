"""The benchmarks: records, tables, timing, peers and reports; and that the tables in the documents are up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# At the end of the path, so that an installed para_kernels stays the one that is tested.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    first_calls,
    gpu_report,
    inputs,
    peers,
    random_shapes,
    record,
    reference,
    render_tables,
    report_attention,
    report_checks,
    ring_timeline,
    sanitize,
    step_profile,
    timing,
)
from benchmarks.record import OURS, Check, Record
from benchmarks.section import CheckFailedError, Result
from benchmarks.step_profile import Launch
from para_kernels import flash_attention, flash_attention_varlen, merge_states, residual_diff

ROOT = record.REPOSITORY
CPU = torch.device("cpu")


def one_record(**changes: Any) -> Record:
    settings: dict[str, Any] = {
        "op": "flash_attention",
        "shape": {"B": 1, "S": 4096, "H": 24, "D": 128},
        "dtype": "bfloat16",
        "kernel": OURS,
        "median_ms": 2.0,
        "peer": "cuDNN",
        "peer_ms": 3.0,
        "tflops": 600.0,
    }
    return Record(**(settings | changes))


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_says_what_ran_against_what_and_where(tmp_path: Path) -> None:
    record.write_records("name", [one_record(), one_record(peer=None, peer_ms=None)], tmp_path)
    with_peer, alone = record.read_records("name", tmp_path)
    fields = ("op", "shape", "dtype", "kernel", "peer", "median_ms", "peer_ms", "tflops", "gbps", "ratio", "notes")
    environment = ("gpu", "driver", "cpu", "torch", "triton", "commit", "date", "command")
    assert set(with_peer) == {*fields, *environment}
    assert with_peer["ratio"] == 1.5  # the peer took 3 ms, this package 2 ms
    assert alone["ratio"] is None
    assert with_peer["torch"] == torch.__version__


def test_a_check_says_on_how_much_it_was_tried_and_whether_it_held(tmp_path: Path) -> None:
    checks = [Check("holds", cases=3, worst=1e-3, allowed=2e-3), Check("fails", cases=3, failures=1, dtype="float16")]
    record.write_records("name", checks, tmp_path)
    holds, fails = record.read_records("name", tmp_path)
    assert {"check", "cases", "failures", "dtype", "worst", "allowed", "notes", "passed", "commit"} <= set(holds)
    assert (holds["passed"], fails["passed"]) == (True, False)


def test_a_record_holds_nobodys_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = record.REPOSITORY / "benchmarks" / "gpu_report.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "here"), "--only", "varlen"])
    assert record.environment()["command"] == "python -m benchmarks.gpu_report --out here --only varlen"
    monkeypatch.setattr(sys, "argv", [str(script), "--only", "exact compiled", "a, b"])
    assert record.environment()["command"] == "python -m benchmarks.gpu_report --only 'exact compiled' 'a, b'"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/python3/pytest/__main__.py", "benchmarks/bench_attention.py"])
    assert record.environment()["command"] == "python -m pytest benchmarks/bench_attention.py"


@pytest.mark.parametrize("name", ["", "a/b", "../up", "with space"])
def test_a_records_name_is_a_file_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: "):
        record.write_records(name, [one_record()], tmp_path)


def test_an_empty_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records: empty"):
        record.write_records("name", [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_never_reaches_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        record.write_records("name", [one_record(median_ms=float("nan"))], tmp_path)
    assert not list(tmp_path.iterdir())


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_tables_in_the_documents_are_those_of_the_records() -> None:
    stale = render_tables.update(render_tables.documents(ROOT), record.RESULTS, write=False)
    assert not stale, "run: python -m benchmarks.render_tables"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    record.write_records("gpu-attention", [one_record(), one_record(peer="SDPA flash", peer_ms=4.0)], tmp_path)
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table: attention -->\nold\n<!-- /table -->\nafter\n")
    return path


def test_a_stale_table_is_found_and_rewritten_between_its_marks(document: Path) -> None:
    results = document.parent
    assert render_tables.update([document], results, write=False) == [document]
    assert "old" in document.read_text()
    assert render_tables.update([document], results, write=True) == [document]
    text = document.read_text()
    assert text.startswith("before\n<!-- table: attention -->\n")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert "| tokens | TFLOP/s | against cuDNN | against SDPA flash |" in text
    assert "| 4,096 | 600 | 1.50x | 2.00x |" in text
    assert render_tables.update([document], results, write=False) == []


def test_a_changed_record_makes_the_table_stale(document: Path) -> None:
    render_tables.update([document], document.parent, write=True)
    record.write_records("gpu-attention", [one_record(peer_ms=5.0)], document.parent)
    assert render_tables.update([document], document.parent, write=False) == [document]


def test_text_outside_the_marks_is_left_alone(tmp_path: Path) -> None:
    text = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert render_tables.render(text, tmp_path) == text


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown"):
        render_tables.render("<!-- table: no-such -->\n<!-- /table -->", tmp_path)


def test_a_table_without_its_records_says_which_are_missing(tmp_path: Path) -> None:
    both = "<!-- table: memory-bound -->\n<!-- /table -->"
    assert "*No record yet: `benchmarks/results/gpu-residual_diff.json`, `benchmarks/results/gpu-merge" in (
        render_tables.render(both, tmp_path)
    )
    row = one_record(op="merge_states", gbps=2000.0, notes={"of_copy": 0.9})
    record.write_records("gpu-merge_states", [row], tmp_path)
    text = render_tables.render(both, tmp_path)
    assert "| `merge_states` |" in text
    assert "*No record yet: `benchmarks/results/gpu-residual_diff.json`.*" in text


def test_check_exits_1_on_a_stale_table(
    document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render_tables, "REPOSITORY", document.parent)
    monkeypatch.setattr(render_tables, "RESULTS", document.parent)
    monkeypatch.setattr(sys, "argv", ["render_tables", "--check"])
    assert render_tables.main() == 1
    assert "README.md: out of date" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["render_tables"])
    assert render_tables.main() == 0
    monkeypatch.setattr(sys, "argv", ["render_tables", "--check"])
    assert render_tables.main() == 0


def rows_of(table: str, results: Path) -> list[str]:
    text = render_tables.render(f"<!-- table: {table} -->\n<!-- /table -->", results)
    return [line for line in text.splitlines() if line.startswith("|")]


SECTION_TABLES = {
    "attention": ("attention", "attention-all"),
    "hard_values": ("hard-values",),
    "masked": ("masked",),
    "varlen": ("varlen",),
    "small": ("small",),
    "host_overhead": ("host",),
    "repeatable": ("checks",),
    "random_shapes": ("checks",),
}


@pytest.mark.parametrize("section", SECTION_TABLES)
def test_every_table_renders_from_what_its_section_writes(section: str, tmp_path: Path) -> None:
    _, records = gpu_report.SECTIONS[section](CPU)
    record.write_records(f"gpu-{section}", records, tmp_path)
    for table in SECTION_TABLES[section]:
        rows = rows_of(table, tmp_path)
        assert len(rows) >= 3, table
        assert len({row.count("|") for row in rows}) == 1, table


def test_the_memory_bound_table_renders_from_both_its_sections(tmp_path: Path) -> None:
    for section in ("residual_diff", "merge_states"):
        _, records = gpu_report.SECTIONS[section](CPU)
        record.write_records(f"gpu-{section}", records, tmp_path)
    assert len(rows_of("memory-bound", tmp_path)) == 2 + 3


def test_clocks_and_power_are_shown_for_this_package_and_each_peer(tmp_path: Path) -> None:
    ours = {"sustained_ms": 240.0, "clock_mhz": 1500.0, "power_w": 690.0}
    theirs = {"peer_sustained_ms": 250.0, "peer_clock_mhz": None, "peer_power_w": 700.0}
    record.write_records("gpu-attention", [one_record(), one_record(notes={**ours, **theirs})], tmp_path)
    assert rows_of("power", tmp_path)[2:] == [
        "| para_kernels | 240.0 | 1500 | 690 |",
        "| cuDNN | 250.0 | unknown | 700 |",
    ]


def test_the_share_of_the_dense_rate_is_the_noted_one(tmp_path: Path) -> None:
    shape = {"B": 1, "S": 512, "valid": 312, "H": 2, "D": 64}
    ratios = {"dense": 2.02, "FlashAttention-3 padded": 2.2}
    notes = {"of_dense_rate": 0.99}
    records = [one_record(op="varlen_one", shape=shape, peer=p, peer_ms=ms, notes=notes) for p, ms in ratios.items()]
    record.write_records("gpu-varlen", records, tmp_path)
    assert rows_of("varlen", tmp_path)[2:] == ["| one length | 312 | 2.00 | 0.990 | 1.10x |"]


# --- timing -----------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_none_is_timed_less_than_three_times() -> None:
    calls: list[str] = []
    times = timing.medians_ms(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, seconds=0.0, warmup=2
    )
    # Another one begins each round: none always follows the same other.
    assert calls == ["a"] * 2 + ["b"] * 2 + ["a", "b"] + ["b", "a"] + ["a", "b"]
    assert set(times) == {"a", "b"}


def test_no_more_rounds_than_asked_for() -> None:
    calls: list[int] = []
    timing.medians_ms({"a": lambda: calls.append(1)}, CPU, rounds=5, seconds=60.0, warmup=0)
    assert len(calls) == 5


def test_small_calls_are_timed_together_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def eight_ms(together: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
        for run in together.values():
            run()
        return dict.fromkeys(together, 8.0)

    monkeypatch.setattr(timing, "_host_medians", eight_ms)
    calls = [lambda i=i: seen.append(i) for i in range(4)]
    assert timing.graph_medians_ms({"four": calls, "one": calls[:1]}, CPU) == {"four": 2.0, "one": 8.0}
    assert seen == [0, 1, 2, 3, 0]


@pytest.mark.gpu
def test_a_graph_times_the_device_alone() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(1 << 20, device=device)
    out = [torch.zeros_like(x) for _ in range(3)]
    times = timing.graph_medians_ms({"exp": [lambda y=y: torch.exp(x, out=y) for y in out]}, device, rounds=3)
    assert times["exp"] > 0
    for y in out:
        torch.testing.assert_close(y, x.exp())


def test_the_hosts_time_is_per_call() -> None:
    calls: list[int] = []
    assert timing.host_microseconds(lambda: calls.append(1), CPU, calls=10, samples=3) > 0
    assert len(calls) == 20 + 30  # twenty to warm up


# --- inputs and peers -------------------------------------------------------------------------------------------------


def test_lengths_as_masks_offsets_and_work() -> None:
    lens = (3, 0, 5)
    assert inputs.key_mask(lens, 5, CPU).shape == (3, 1, 1, 5)
    assert inputs.key_mask(lens, 5, CPU).sum(-1).flatten().tolist() == list(lens)
    assert inputs.cu_seqlens(lens, CPU).tolist() == [0, 3, 3, 8]
    # Two products of (q, d) x (d, k) and (q, k) x (k, d) per head, a multiplication and an addition each.
    assert inputs.attention_flops([2, 3], [5, 7], heads=4, head_dim=8) == 2 * 2 * 4 * 8 * (2 * 5 + 3 * 7)


def test_peers_compute_what_this_package_computes() -> None:
    q, k, v = inputs.attention_inputs(2, 33, 4, 16, torch.float32, CPU)
    lens = (33, 20)
    ours = flash_attention(q, k, v, kv_lens=inputs.lens_tensor(lens, CPU))
    torch.testing.assert_close(peers.sdpa(q, k, v, inputs.key_mask(lens, 33, CPU)), ours, atol=1e-5, rtol=1e-5)

    lse = [torch.randn(2, 4, 33) for _ in range(2)]
    eager = peers.eager_merge_states(q, lse[0], k, lse[1])
    torch.testing.assert_close(eager, merge_states(q, lse[0], k, lse[1]), atol=1e-5, rtol=1e-5)

    residual, change, size = peers.eager_residual_diff(q, k, v)
    ours_residual, sums = residual_diff(q, k, v)
    torch.testing.assert_close(residual, ours_residual)
    torch.testing.assert_close(torch.stack([change, size]) * q.numel(), sums, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in peers.ATTENTION_PEERS if name != "SDPA"])
def test_a_peer_that_cannot_run_says_why(name: str) -> None:
    with pytest.raises(peers.PeerUnavailableError, match=name):
        peers.attention_peer(name, CPU)


def test_a_peer_that_refuses_an_input_says_why() -> None:
    def refuses() -> None:
        raise RuntimeError("FP16 is not in this build\nat line 5")

    assert peers.runs(refuses) == "FP16 is not in this build"
    assert peers.runs(lambda: None) is None


@pytest.mark.parametrize("make", [peers.fa3_packed, peers.fa3_padded])
def test_flash_attention_3_with_lengths_needs_cuda(make: Callable[[torch.device], object]) -> None:
    with pytest.raises(peers.PeerUnavailableError, match="FlashAttention-3"):
        make(CPU)


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


# --- random problems --------------------------------------------------------------------------------------------------


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


# --- the preparation --------------------------------------------------------------------------------------------------


def test_the_preparation_as_tables(tmp_path: Path) -> None:
    notes = {"unfused": 1e-7, "equal": 0.75}
    check = record.Check("preparation, rms, half", 1, 0, "float32", 2e-7, 1e-6, notes)
    record.write_records("prepare-checks", [check], tmp_path)
    assert rows_of("prepare-checks", tmp_path)[2:] == ["| rms, half, float32 | 2e-07 | 1e-06 | 1e-07 | 75.00% |"]
    speeds = [
        Record(
            "prepare_attention", {"S": 4608}, "bfloat16", OURS, 0.5, "eager", 2.0, gbps=1500.0,
            notes={"block": "dual", "of_copy": 0.9, "host_us": 410.2, "compiled_ms": compiled},
        )
        for compiled in (1.0, None)  # no compiler on a CPU
    ]  # fmt: skip
    record.write_records("prepare-speed", speeds, tmp_path)
    assert rows_of("prepare-speed", tmp_path)[2:] == [
        "| dual, 4,608 tokens | 0.500 | 1,500 | 90% | 2.000 (4.0x) | 1.000 (2.0x) | 410 |",
        "| dual, 4,608 tokens | 0.500 | 1,500 | 90% | 2.000 (4.0x) |  | 410 |",
    ]


# --- the profile of a step --------------------------------------------------------------------------------------------

# Names as torch.profiler gives them on an H100: (kernel, operator, innermost module, category).
KERNELS = [
    ("_attention_fwd", "para_kernels::flash_attention", "Attention", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "aten::_scaled_dot_product_cudnn_attention", "Attention", "attention"),
    ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", "aten::addmm", "Linear", "linear"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "aten::cudnn_convolution", "Conv3d", "linear"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<...>", "aten::cat", "Attention", "copy, cast, cat"),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda", "aten::copy_", "Attention", "copy, cast, cat"),
    ("Memcpy DtoD (Device -> Device)", "aten::copy_", "Attention", "copy, cast, cat"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "aten::native_layer_norm", "LayerNorm", "norm"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor>>", "aten::mul", "RMSNorm", "norm"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>", "aten::mean", "RMSNorm", "norm"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor>>", "aten::mul", "Attention", "RoPE"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "aten::gelu", "GELU", "activation"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "aten::add", "HunyuanVideoSingleTransformerBlock", "gates and residuals"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::sin_kernel_cuda>", "aten::sin", "Timesteps", "other"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "operator", "module", "category"), KERNELS)
def test_kernels_are_told_apart(kernel: str, operator: str, module: str, category: str) -> None:
    assert step_profile.category(Launch(kernel, operator, module, 1.0)) == category


@pytest.mark.parametrize(
    ("intervals", "span", "idle"),
    [
        ([], 0.0, 0.0),
        ([(10.0, 20.0), (30.0, 40.0)], 30e-6, 10e-6),
        ([(30.0, 40.0), (10.0, 35.0), (12.0, 14.0)], 30e-6, 0.0),  # two streams at once, and not in order
    ],
)
def test_gaps_are_what_no_kernel_covers(intervals: list[tuple[float, float]], span: float, idle: float) -> None:
    assert step_profile._span(intervals) == pytest.approx((span, idle))


class Gated(torch.nn.Module):
    """A gate around a projection and a norm: something of most kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.projection = torch.nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.projection(self.norm(x)) * x.sigmoid()


def trace_event(category: str, name: str, start: float, duration: float, identity: int | None = None) -> dict[str, Any]:
    arguments = {} if identity is None else {"External id": identity}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": arguments}


def test_each_kernel_of_a_trace_counts_once_and_for_the_innermost_module() -> None:
    mark = step_profile.MARK
    found = step_profile.of_trace(
        [
            {"ph": "M", "name": "process_name"},
            trace_event("user_annotation", f"{mark}Block", 0, 100, 7),
            trace_event("user_annotation", f"{mark}Linear", 10, 20, 8),
            trace_event("gpu_user_annotation", f"{mark}Linear", 500, 90, 8),
            trace_event("cpu_op", "aten::addmm", 12, 5, 1),
            trace_event("cuda_runtime", "cudaLaunchKernel", 13, 1, 1),
            trace_event("overhead", "Command Buffer Full", 13, 1),
            trace_event("cpu_op", "aten::mul", 40, 5, 2),
            trace_event("kernel", "gemm", 500, 30, 1),
            trace_event("kernel", "multiply", 540, 10, 2),
            trace_event("gpu_memcpy", "Memcpy", 560, 5, None),
        ]
    )
    assert found.launches == [
        Launch("gemm", "aten::addmm", "Linear", 30),
        Launch("multiply", "aten::mul", "Block", 10),
        Launch("Memcpy", "", "", 5),
    ]
    assert (found.span, found.idle) == (pytest.approx(65e-6), pytest.approx(20e-6))


def test_work_is_found_under_the_module_that_did_it() -> None:
    model = Gated().requires_grad_(False)
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    found = step_profile.profiled(model, lambda: model(torch.randn(16, 32)), CPU)
    launched = {(launch.operator, launch.module) for launch in found.launches}
    expected = {("aten::addmm", "Linear"), ("aten::native_layer_norm", "LayerNorm"), ("aten::sigmoid", "Gated")}
    assert expected <= launched
    assert ("aten::randn", "") in launched  # outside of every module
    assert 0 < sum(launch.microseconds for launch in found.launches) <= found.span * 1e6
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_the_profiled_step_prepares_as_the_timed_one_does() -> None:
    """No norm is called that the preparation takes over; others are, and are marked."""
    pytest.importorskip("diffusers")
    from tiny_hunyuan import tiny_pipeline, transformer_inputs

    from para_kernels.integrations.diffusers import accelerate

    pipe, called = tiny_pipeline(), []
    accelerate(pipe)
    norms = {name: module for name, module in pipe.transformer.named_modules() if type(module).__name__ == "RMSNorm"}
    assert norms
    for name, norm in norms.items():
        norm.forward = lambda x, name=name, forward=norm.forward: called.append(name) or forward(x)
    inputs = transformer_inputs()
    with torch.no_grad():
        found = step_profile.profiled(pipe.transformer, lambda: pipe.transformer(**inputs), CPU)
    assert called == []
    assert {"Attention", "LayerNorm", "HunyuanVideoTransformer3DModel"} <= {launch.module for launch in found.launches}


def test_the_profile_as_records_and_tables(tmp_path: Path) -> None:
    launches = [Launch("gemm", "aten::addmm", "Linear", 3000.0)] * 2 + [Launch("exp", "aten::exp", "GELU", 1000.0)]
    found = step_profile.Profile(launches, span=8e-3, idle=1e-3)
    records = step_profile.records(found, {"S": 8}, "bfloat16", OURS)
    record.write_records("hunyuan_step_profile", records, tmp_path)
    assert rows_of("step-profile", tmp_path) == [
        "| work | ms | share | kernels |",
        "| --- | ---: | ---: | ---: |",
        "| linear | 6.0 | 75.0% | 2 |",
        "| activation | 1.0 | 12.5% | 1 |",
        "| gaps between kernels | 1.0 | 12.5% | 0 |",
    ]
    assert rows_of("step-kernels", tmp_path)[2:] == [
        "| `gemm` | linear | Linear | 6.0 | 75.0% | 2 |",
        "| `exp` | activation | GELU | 1.0 | 12.5% | 1 |",
    ]


def test_a_profile_of_seconds_is_in_seconds(tmp_path: Path) -> None:
    found = step_profile.Profile([Launch("gemm", "aten::addmm", "Linear", 2e6)], span=2.5, idle=0.5)
    record.write_records("hunyuan_step_profile", step_profile.records(found, {"S": 8}, "bfloat16", OURS), tmp_path)
    assert rows_of("step-profile", tmp_path)[0] == "| work | s | share | kernels |"
    assert rows_of("step-profile", tmp_path)[2] == "| linear | 2.00 | 80.0% | 1 |"


# --- whole runs -------------------------------------------------------------------------------------------------------


def torchrun(module: str, *options: str) -> str:
    """What `module` prints in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_a_pytest_benchmark_run_leaves_its_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_merge_states.py", "-q", "-p", "no:cacheprovider"]
    options = ["--results", str(tmp_path), "--benchmark-max-time", "0.05", "--benchmark-min-rounds", "2"]
    # Of a pytest-xdist worker's environment nothing may be left: pytest-benchmark takes no times under it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    device = "gpu" if torch.cuda.is_available() else "cpu"
    rows = json.loads((tmp_path / f"merge_states-{device}.json").read_text())
    assert {(row["kernel"], row["peer"]) for row in rows} == {(OURS, "eager")}
    assert all(row["median_ms"] > 0 and row["gbps"] > 0 for row in rows)


def test_the_full_size_step_runs_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    from benchmarks import hunyuan_step

    arguments = ["--small", "--repeats", "1", "--profile", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hunyuan_step", *arguments])
    assert hunyuan_step.main() == 0
    (row,) = record.read_records("hunyuan_step", tmp_path)
    tolerance = 1e-2 if torch.cuda.is_available() else 1e-5  # bf16 there, fp32 here
    assert row["notes"]["difference"] < tolerance
    assert row["shape"]["S"] == 3 * 4 * 6 + 256
    text = render_tables.render("<!-- table: step -->\n<!-- /table -->", tmp_path)
    assert "| 64 x 96 x 9 (328 tokens) | para_kernels exact |" in text
    profile = record.read_records("hunyuan_step_profile", tmp_path)
    seconds = {row["notes"]["name"]: row["median_ms"] for row in profile if row["op"] == "step_category"}
    kinds = {"attention", "linear", "copy, cast, cat", "norm", "activation", "RoPE", "gates and residuals"}
    assert kinds <= {name for name, ms in seconds.items() if ms > 0}
    assert sum(row["notes"]["share"] for row in profile if row["op"] == "step_category") == pytest.approx(1, abs=0.01)


def test_the_step_over_several_gpus_rehearses_without_any(tmp_path: Path) -> None:
    """Two processes over gloo: both splits, and the cache, give what one process gives."""
    pytest.importorskip("diffusers")
    options = ["--small", "--cache-steps", "4", "--cache-frames", "9", "--out", str(tmp_path)]
    printed = torchrun("benchmarks.hunyuan_step", *options)
    assert "as on one GPU" in printed
    rows = record.read_records("hunyuan_step_parallel", tmp_path)
    assert [row["kernel"] for row in rows] == ["ring", "ulysses"]
    for row in rows:
        notes = row["notes"]
        assert (row["peer"], row["shape"]["ranks"], row["ratio"] > 0) == ("one GPU", 2, True)
        assert notes["difference"] < 1e-5
        assert notes["cache_difference"] < 1e-5
        assert (notes["same_decisions"], notes["reused"], notes["cache_steps"]) == (1, 2, 4)
        assert notes["closest_to_threshold"] > 1e-2


@pytest.mark.parametrize("model", ["hunyuan", "flux", "cogvideox"])
def test_the_settings_of_a_step_run_small(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from benchmarks import step_settings

    settings = ["diffusers", "diffusers, cache", "exact", "exact, cache", "exact, cache, graphs"]
    arguments = [model, "--small", "--steps", "4", "--rounds", "2", "--out", str(tmp_path), "--only", *settings]
    monkeypatch.setattr(sys, "argv", ["step_settings", *arguments])
    assert step_settings.main() == 0
    rows = record.read_records(f"{model}_step_settings", tmp_path)
    assert [row["kernel"] for row in rows] == settings
    stock, _, exact, cached, graphs = rows
    assert (stock["ratio"], stock["notes"]["difference"]) == (1.0, 0.0)
    assert exact["notes"]["difference"] < (1e-2 if torch.cuda.is_available() else 1e-5)
    assert [row["notes"]["reused"] for row in rows] == [0, None, 0, 2, 2]
    assert graphs["notes"]["difference"] == cached["notes"]["difference"]
    assert all(len(row["notes"]["rounds_ms"]) == 2 for row in rows)


def test_a_setting_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    from benchmarks import step_settings

    bad = step_settings.Setting("bad", {"attention": "none such"})
    monkeypatch.setattr(step_settings, "SETTINGS", (bad, *step_settings.SETTINGS))
    arguments = ["flux", "--small", "--steps", "1", "--out", str(tmp_path), "--only", "bad", "exact"]
    monkeypatch.setattr(sys, "argv", ["step_settings", *arguments])
    assert step_settings.main() == 1
    assert "failed: bad" in capsys.readouterr().out
    (row,) = record.read_records("flux_step_settings", tmp_path)
    assert (row["kernel"], row["peer"]) == ("exact", None)


@pytest.mark.parametrize("model", ["flux", "cogvideox"])
def test_steps_over_several_gpus_rehearse_without_any(model: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    printed = torchrun(
        "benchmarks.step_ranks", model, "--small", "--steps", "2", "--rounds", "2", "--profile", "--text-cost", "1.5",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert "failed: none" in printed
    rows = {row["kernel"]: row for row in record.read_records(f"{model}_step_ranks", tmp_path)}
    assert list(rows) == ["one GPU", "auto", "ring", "ulysses", "auto (text 1.5)", "diffusers on one GPU"]
    assert rows["auto (text 1.5)"]["peer"] == "one GPU"
    for row in rows.values():
        assert row["notes"]["difference"] < 1e-5
        assert row["ratio"] > 0
        assert row["shape"]["steps"] == 2
        assert len(row["notes"]["rounds_ms"]) == 2
    assert rows["ring"]["notes"]["place"] == "batch 1 x ring 2 x ulysses 1"
    assert record.read_records(f"{model}_step_ranks_profile", tmp_path)


@pytest.mark.parametrize(("model", "steps"), [("flux", 28), ("cogvideox", 4)])
def test_a_round_is_as_long_as_an_image_of_flux(model: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from benchmarks import step_ranks

    monkeypatch.setattr(sys, "argv", ["step_ranks", model, "--out", "none"])
    assert step_ranks._options().steps == steps


def test_the_kept_demo_writes_its_record_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from tiny_hunyuan import PROMPTS, tiny_pipeline

    from benchmarks import toy_demo
    from para_kernels.integrations.diffusers import loading

    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "TOY_PIPELINE", tmp_path / "model")
    small = replace(loading.TOY_DEFAULTS, height=48, width=32, num_frames=5)
    monkeypatch.setattr(toy_demo, "TOY_DEFAULTS", small)
    monkeypatch.setattr(toy_demo.demo, "PROMPTS", tuple(PROMPTS))
    monkeypatch.setattr(toy_demo.demo, "THRESHOLDS", (1e9,))
    folders = ["--results", str(tmp_path / "results"), "--images", str(tmp_path / "images")]
    monkeypatch.setattr(sys, "argv", ["toy_demo", "--rounds", "1", "--steps", "3", *folders])
    assert toy_demo.main() == 0
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"demo.png", "threshold.png"}
    stock, exact, _, always = record.read_records("toy_demo", tmp_path / "results")
    assert [row["kernel"] for row in (stock, exact, always)] == ["stock diffusers", "exact", "cache 1e+09"]
    assert (stock["ratio"], stock["notes"]["psnr"]) == (1.0, None)
    assert (exact["notes"]["hits"], always["notes"]["hits"]) == (0, 2)
    text = render_tables.render("<!-- table: demo -->\n<!-- /table -->", tmp_path / "results")
    assert "| cache 1e+09 |" in text


def test_the_kept_quality_writes_its_record_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("torchao")
    from tiny_hunyuan import PROMPTS, tiny_pipeline

    from benchmarks import toy_demo, toy_quality
    from para_kernels.integrations.diffusers import loading

    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "TOY_PIPELINE", tmp_path / "model")
    small = replace(loading.TOY_DEFAULTS, height=48, width=32, num_frames=5)
    monkeypatch.setattr(toy_demo, "TOY_DEFAULTS", small)
    monkeypatch.setattr(toy_demo.demo, "PROMPTS", tuple(PROMPTS))
    monkeypatch.setattr(toy_quality, "FLOORS", {"attention int8": 1000.0, "linears fp8": 1.0})
    folders = ["--results", str(tmp_path / "results"), "--images", str(tmp_path / "images")]
    monkeypatch.setattr(sys, "argv", ["toy_quality", "--steps", "2", *folders])
    assert toy_quality.main() == 1, "a floor of 1,000 dB"
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"quality.png", "quality-frames.png"}
    rows = {row["check"]: row for row in record.read_records(toy_quality.NAME, tmp_path / "results")}
    assert rows["quality, exact"]["notes"]["psnr"] is None
    assert rows["quality, linears fp8"]["passed"]
    assert not rows["quality, attention int8"]["passed"]
    text = render_tables.render("<!-- table: quality -->\n<!-- /table -->", tmp_path / "results")
    assert "| attention int8 |" in text
    text = render_tables.render("<!-- table: quality-cache -->\n<!-- /table -->", tmp_path / "results")
    assert "| 0.06 | 0/2 |" in text


def test_the_report_on_several_gpus_rehearses_without_any(tmp_path: Path) -> None:
    """Two processes over gloo, tiny shapes."""
    printed = torchrun("benchmarks.ring_report", "--out", str(tmp_path), "--only", "stress,no_p2p,speed,int8,host_time")
    assert "failed: none" in printed
    (stress,) = record.read_records("ring-stress", tmp_path)
    assert (stress["cases"], stress["passed"]) == (5, True)
    speed = record.read_records("ring-speed", tmp_path)
    assert {row["kernel"] for row in speed} == {"collective", "ulysses"}
    assert all(row["peer"] == "flash_attention on one GPU" and row["ratio"] > 0 for row in speed)
    right, *in_8_bits = record.read_records("ring-int8", tmp_path)
    assert (right["check"], right["passed"]) == ("ring attention in 8 bits, collective", True)
    assert [row["kernel"] for row in in_8_bits] == [
        f"8 bits: {name}" for name in ("flash_attention on one GPU", "collective", "ulysses")
    ]


# --- the ring's picture -----------------------------------------------------------------------------------------------


def ring_trace(layers: int) -> list[dict[str, Any]]:
    events = [trace_event("cpu_op", "aten::empty", 0, 1, 1)]
    for layer in range(layers):
        start = 1000.0 * layer
        events += [
            trace_event("kernel", "_pack", start, 20),
            trace_event("kernel", "_hopper_ring_attention", start + 22, 900),
            trace_event("gpu_memcpy", "Memcpy PtoP (Device -> Device)", start + 40, 15),
            trace_event("kernel", "something_else", start + 950, 5),
        ]
    return events


def test_the_picture_of_the_ring_shows_its_last_two_layers(tmp_path: Path) -> None:
    found = ring_timeline.bars(ring_trace(4))
    assert [(row, start) for row, start, _, _ in found] == [
        ("packing", 0.0), ("attention", 22.0), ("copies from the peer", 40.0),
        ("packing", 1000.0), ("attention", 1022.0), ("copies from the peer", 1040.0),
    ]  # fmt: skip
    ring_timeline.draw({"peer-8192": found}, tmp_path / "ring.png")
    assert (tmp_path / "ring.png").stat().st_size > 1000


def test_a_trace_of_one_layer_makes_no_picture() -> None:
    with pytest.raises(ValueError, match="a trace of 1 layers"):
        ring_timeline.bars(ring_trace(1))
