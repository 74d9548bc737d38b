"""The main job, measured: the same prompts through stock diffusers, through exact attention, and with the cache.

All settings use the same noise and the same prompts of different token counts in one batch, and share one loaded
pipeline; but for the row that spreads the work over processes, each of which loads its own.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from para_kernels import ContextParallel

from . import several
from .figures import contact_sheet, threshold_plot
from .generate import Acceleration, Request, generate
from .loading import load_pipeline
from .quality import Quality, compare
from .video import check_video, make_folder, write_mp4

PROMPTS = (
    "seven, left",
    "a handwritten 3 moving to the right",
    "a large red digit five gliding upwards on a navy background",
    "footage of a small yellow handwritten 8 that moves slowly toward the bottom, seen from a fixed camera, drawn with"
    " a thick pen in a single stroke",
)
THRESHOLDS = (0.03, 0.06, 0.09, 0.12, 0.15, 0.2, 0.3)
QUICK_THRESHOLDS = (0.06, 0.15)
QUICK_PROMPTS = (PROMPTS[0], PROMPTS[3])
QUICK_STEPS = 10
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class DemoJob:
    """The ``demo`` command: model, prompts, settings to compare, and the folder for what it makes."""

    model: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    request: Request
    thresholds: tuple[float, ...]
    rounds: int
    out: Path
    fps: int
    zoom: int
    processes: int = 2  # of the row that spreads the work; 1 for no such row


@dataclass(frozen=True)
class Setting:
    """One row of the demo: a name for files, a label for people, and what runs (None: diffusers untouched)."""

    name: str
    label: str
    acceleration: Acceleration | None

    @property
    def threshold(self) -> float | None:
        return None if self.acceleration is None or self.acceleration.cache is None else float(self.acceleration.cache)


@dataclass
class Measurement:
    """What one setting gave: its videos, the wall time of each call in seconds, and reused of all steps."""

    setting: Setting
    videos: np.ndarray = field(default_factory=lambda: np.empty(0))
    seconds: list[float] = field(default_factory=list)
    hits: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table. Speed-ups are over stock diffusers and over our own uncached run; quality is against
    the stock videos."""

    setting: str
    threshold: float | None
    seconds: float
    speed_up: float
    speed_up_over_exact: float
    hits: int
    steps: int
    quality: Quality


def settings(thresholds: Sequence[float]) -> list[Setting]:
    """Stock, exact, and exact with the cache at each threshold."""
    cached = [
        Setting(f"cache-{threshold:g}", f"cache {threshold:g}", Acceleration(cache=threshold))
        for threshold in thresholds
    ]
    return [
        Setting("stock", "stock diffusers", None),
        Setting("exact", "exact", Acceleration()),
        *cached,
    ]


def run(job: DemoJob) -> list[Row]:
    """Measure, write videos, pictures and figures to `job.out`, print the table."""
    job.request.check()
    check_video(job.out / "any.mp4", job.fps, job.zoom)
    if job.rounds < 1:
        raise ValueError(f"rounds: {job.rounds}; must be at least 1")
    if job.processes < 1:
        raise ValueError(f"processes: {job.processes}; must be at least 1")
    if not job.thresholds or min(job.thresholds) < 0:
        raise ValueError(f"thresholds: {list(job.thresholds)}; give at least one, none below 0")
    if len(set(job.thresholds)) < len(job.thresholds):
        raise ValueError(f"thresholds: {list(job.thresholds)}; each may stand there once")
    make_folder(job.out / "videos")
    pipe = load_pipeline(job.model, job.device, job.dtype, job.revision)
    pipe.set_progress_bar_config(leave=False)
    measurements = measure(pipe, job.request, settings(sorted(job.thresholds)), job.rounds)
    if job.processes > 1:
        measurements[2:2] = _measure_in_processes(job)
    rows = summarize(measurements)
    _write_videos(job, measurements)
    _write_figures(job, measurements, rows)
    (job.out / "demo.json").write_text(json.dumps(report(job, rows), indent=2) + "\n")
    print(table(rows))
    print(f"\nVideos, contact-sheet.png, threshold.png and demo.json are in {job.out}")
    return rows


def measure(pipe: Any, request: Request, cases: Sequence[Setting], rounds: int) -> list[Measurement]:
    """Time every setting once per round, after one short call of each that is not timed.

    Going round by round instead of setting by setting spreads a machine's slow moments over all settings.
    """
    for case in cases:
        _call(pipe, replace(request, steps=WARM_UP_STEPS), Measurement(case))
    measurements = [Measurement(case) for case in cases]
    for number in range(rounds):
        for measurement in measurements:
            _call(pipe, request, measurement)
            print(
                f"round {number + 1}/{rounds}  {measurement.setting.label:<16} {measurement.seconds[-1]:7.2f} s",
                flush=True,
            )
    return measurements


def _measure_in_processes(job: DemoJob) -> list[Measurement]:
    """Exact attention with the sequence shared out over processes; nothing where there are too few GPUs."""
    count = job.processes
    label = f"{count} processes"
    if not several.enough_devices(job.device, count):
        print(f"{label}: left out, this machine has {torch.cuda.device_count()} GPU(s)")
        return []
    acceleration = Acceleration(parallel=ContextParallel(ring=count))
    threads = max(1, torch.get_num_threads() // count)
    runs = several.run(
        several.Job(
            model=job.model,
            revision=job.revision,
            device_type=job.device.type,
            dtype=job.dtype,
            request=job.request,
            warm_up_steps=min(WARM_UP_STEPS, job.request.steps),
            acceleration=acceleration,
            rounds=job.rounds,
            threads=threads,
        ),
        count,
    )
    print(f"{label}, {threads} thread(s) each: {min(runs.seconds):.2f} s", flush=True)
    setting = Setting(f"processes-{count}", label, acceleration)
    return [Measurement(setting, runs.videos, runs.seconds, hits=0, steps=job.request.steps)]


def _call(pipe: Any, request: Request, measurement: Measurement) -> None:
    acceleration = measurement.setting.acceleration
    handle = None if acceleration is None else acceleration.install(pipe)
    try:
        generation = generate(pipe, request)
        measurement.videos = generation.videos
        measurement.seconds.append(generation.seconds)
        measurement.steps = request.steps
        if handle is not None:
            measurement.hits = sum(record.reused for record in handle.records)
    finally:
        if handle is not None:
            handle.remove()


def summarize(measurements: Sequence[Measurement]) -> list[Row]:
    """Rows of the table; the first measurement is the stock run and the second the exact one.

    Of several rounds the fastest counts: whatever else a machine does can only add time.
    """
    stock, exact = (min(measurement.seconds) for measurement in measurements[:2])
    reference = measurements[0].videos
    return [
        Row(
            setting=measurement.setting.label,
            threshold=measurement.setting.threshold,
            seconds=min(measurement.seconds),
            speed_up=stock / min(measurement.seconds),
            speed_up_over_exact=exact / min(measurement.seconds),
            hits=measurement.hits,
            steps=measurement.steps,
            quality=compare(reference, measurement.videos),
        )
        for measurement in measurements
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text."""
    head = (
        f"{'setting':<16} {'seconds':>8} {'to stock':>9} {'to exact':>9} {'reused':>7} {'PSNR dB':>8} {'worst':>6}"
        f" {'SSIM':>7} {'max abs diff':>13}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        quality = row.quality
        lines.append(
            f"{row.setting:<16} {row.seconds:8.2f} {row.speed_up:8.2f}x {row.speed_up_over_exact:8.2f}x "
            f"{f'{row.hits}/{row.steps}':>7} {_decibels(quality.psnr):>8} {_decibels(quality.psnr_worst):>6} "
            f"{quality.ssim:7.4f} {quality.max_abs_diff:13.2e}"
        )
    return "\n".join(lines)


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal"


def report(job: DemoJob, rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers and the conditions under which they were taken, for JSON (an infinite PSNR is null)."""
    request = job.request
    return {
        "model": job.model,
        "device": _device_name(job.device),
        "threads": torch.get_num_threads(),
        "dtype": str(job.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "prompts": list(request.prompts),
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "steps": request.steps,
        "guidance": request.guidance,
        "seed": request.seed,
        "rounds": job.rounds,
        "rows": [json_row(row) for row in rows],
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def json_row(row: Row) -> dict[str, Any]:
    """One row with plain values; an infinite PSNR is None."""
    return {
        "setting": row.setting,
        "threshold": row.threshold,
        "seconds": row.seconds,
        "speed_up": row.speed_up,
        "speed_up_over_exact": row.speed_up_over_exact,
        "hits": row.hits,
        "steps": row.steps,
        "psnr": row.quality.psnr if math.isfinite(row.quality.psnr) else None,
        "psnr_worst": row.quality.psnr_worst if math.isfinite(row.quality.psnr_worst) else None,
        "ssim": row.quality.ssim,
        "max_abs_diff": row.quality.max_abs_diff,
    }


def _write_videos(job: DemoJob, measurements: Sequence[Measurement]) -> None:
    for measurement in measurements:
        for i, video in enumerate(measurement.videos):
            write_mp4(job.out / "videos" / f"{measurement.setting.name}-{i + 1}.mp4", video, job.fps, job.zoom)


def _write_figures(job: DemoJob, measurements: Sequence[Measurement], rows: Sequence[Row]) -> None:
    contact_sheet(
        job.out / "contact-sheet.png",
        [f"{row.setting}\n{row.seconds:.1f} s, {row.speed_up:.2f}x" for row in rows],
        job.request.prompts,
        [measurement.videos for measurement in measurements],
    )
    cached = [row for row in rows if row.threshold is not None]
    threshold_plot(
        job.out / "threshold.png",
        [row.threshold for row in cached if row.threshold is not None],
        [row.speed_up_over_exact for row in cached],
        [row.quality.psnr for row in cached],
        [row.quality.ssim for row in cached],
        f"{len(job.request.prompts)} prompts, {job.request.steps} steps, {job.device.type}",
    )
