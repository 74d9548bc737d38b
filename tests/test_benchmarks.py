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

from benchmarks import gpu_report, inputs, peers, record, render_tables, report_checks, report_speed, timing
from benchmarks.record import OURS, Record
from para_kernels import flash_attention, merge_states, residual_diff

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


def test_a_record_holds_nobodys_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = record.REPOSITORY / "benchmarks" / "gpu_report.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "here"), "--only", "varlen"])
    assert record.environment()["command"] == "python -m benchmarks.gpu_report --out here --only varlen"
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


@pytest.mark.parametrize(
    ("name", "message"), [("no-such", "unknown"), ("step", "benchmarks/results/hunyuan_step.json")]
)
def test_a_table_without_a_record_is_an_error(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        render_tables.render(f"<!-- table: {name} -->\n<!-- /table -->", tmp_path)


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


def test_every_table_renders_from_what_the_reports_write(tmp_path: Path) -> None:
    for name in ("attention", "masked", "varlen", "residual_diff", "merge_states"):
        _, records = gpu_report.SECTIONS[name](CPU)
        record.write_records(f"gpu-{name}", records, tmp_path)
    for table in ("attention", "masked", "varlen", "memory-bound"):
        text = render_tables.render(f"<!-- table: {table} -->\n<!-- /table -->", tmp_path)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) >= 3, table
        assert len({row.count("|") for row in rows}) == 1, table


# --- timing -----------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_none_is_timed_less_than_three_times() -> None:
    calls: list[str] = []
    times = timing.medians_ms(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, seconds=0.0, warmup=2
    )
    assert calls == ["a"] * 2 + ["b"] * 2 + ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_no_more_rounds_than_asked_for() -> None:
    calls: list[int] = []
    timing.medians_ms({"a": lambda: calls.append(1)}, CPU, rounds=5, seconds=60.0, warmup=0)
    assert len(calls) == 5


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


# --- the GPU report, as far as a CPU goes -----------------------------------------------------------------------------


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_checks, "HEAD_DIMS", (40,))
    monkeypatch.setattr(report_checks, "TOLERANCES", {torch.float32: 1e-6})


@pytest.mark.usefixtures("few_checks")
def test_the_checks_hold() -> None:
    lines, _ = report_checks.correctness(CPU)
    assert any(line.startswith("attention, float32, padded") for line in lines)
    assert any(line.startswith("residual_diff") for line in lines)


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
    with pytest.raises(report_checks.CheckFailedError):
        report_checks.correctness(CPU)


def test_the_checks_notice_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        residual, sums = residual_diff(*args)
        return residual, sums * 1.001

    monkeypatch.setattr(report_checks, "residual_diff", wrong)
    with pytest.raises(report_checks.CheckFailedError, match="residual_diff"):
        report_checks._check_residual(CPU)


def run_report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_report", *arguments])
    return gpu_report.main()


def test_a_section_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device) -> report_checks.Result:
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


def test_unknown_sections_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_report(monkeypatch, "--out", str(tmp_path), "--only", "atention")
    assert exit_.value.code == 2


def test_the_speed_of_a_record_is_its_work_over_its_time() -> None:
    times = {OURS: 2.0, "cuDNN": 3.0, "SDPA flash": 1.0}
    records = report_speed._versus_peers("flash_attention", {"S": 8}, torch.bfloat16, times, flops=4e12)
    assert [(r.peer, r.median_ms, r.peer_ms, r.tflops) for r in records] == [
        ("cuDNN", 2.0, 3.0, 2000.0),
        ("SDPA flash", 2.0, 1.0, 2000.0),
    ]


# --- whole runs -------------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(sys, "argv", ["hunyuan_step", "--small", "--repeats", "1", "--out", str(tmp_path)])
    assert hunyuan_step.main() == 0
    (row,) = record.read_records("hunyuan_step", tmp_path)
    tolerance = 1e-2 if torch.cuda.is_available() else 1e-5  # bf16 there, fp32 here
    assert row["notes"]["difference"] < tolerance
    assert row["shape"]["S"] == 3 * 4 * 6 + 256
    text = render_tables.render("<!-- table: step -->\n<!-- /table -->", tmp_path)
    assert "| 64 x 96 x 9 (328 tokens) | para_kernels exact |" in text


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
    stock, exact, always = record.read_records("toy_demo", tmp_path / "results")
    assert [row["kernel"] for row in (stock, exact, always)] == ["stock diffusers", "exact", "cache 1e+09"]
    assert (stock["ratio"], stock["notes"]["psnr"]) == (1.0, None)
    assert (exact["notes"]["hits"], always["notes"]["hits"]) == (0, 2)
    text = render_tables.render("<!-- table: demo -->\n<!-- /table -->", tmp_path / "results")
    assert "| cache 1e+09 |" in text
