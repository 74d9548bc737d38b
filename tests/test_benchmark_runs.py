"""Whole benchmarks, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import record, render_tables
from benchmarks.record import OURS

ROOT = record.REPOSITORY


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
