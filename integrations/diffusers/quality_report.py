"""What every setting that changes the output costs in quality: against exact, on the same prompts and noise.

The settings come from tables: the cache's thresholds, `linears.LINEARS` and `accelerate.ATTENTION`. One that cannot run
here is left out, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .accelerate import ATTENTION, accelerate, recognised
from .figures import contact_sheet, settings_plot
from .generate import Request, generate
from .layer_errors import LayerError, LayerReferences
from .linears import LINEARS
from .loading import load_pipeline
from .quality import Quality, compare
from .tune import batches
from .video import make_folder

THRESHOLDS = (0.06, 0.12, 0.2)
QUICK_STEPS = 6
EXACT = "exact"


@dataclass(frozen=True)
class Setting:
    """A name, and the arguments of `accelerate`; None for diffusers untouched."""

    name: str
    arguments: Mapping[str, Any] | None


@dataclass(frozen=True)
class Result:
    """What one setting gave, against the exact run.

    Attributes:
        quality: of the videos.
        reused, steps: of all denoising steps.
        layers: of every attention layer at the first step, in the order in which they ran.
    """

    setting: str
    quality: Quality
    reused: int
    steps: int
    layers: tuple[LayerError, ...]

    @property
    def errors(self) -> tuple[float, float] | None:
        """The median and the largest over the layers; None where none was measured."""
        values = [layer.error for layer in self.layers]
        return (median(values), max(values)) if values else None


def settings(thresholds: Sequence[float]) -> list[Setting]:
    """Exact first, which the others are compared with."""
    return [
        Setting(EXACT, {}),
        Setting("stock diffusers", None),
        *[Setting(f"cache {threshold:g}", {"cache": threshold}) for threshold in thresholds],
        *[
            Setting(f"linears {name}", {"linears": replace(linears, keep_originals=True)})
            for name, linears in LINEARS.items()
        ],
        *[Setting(f"attention {name}", {"attention": name}) for name in ATTENTION if name != EXACT],
    ]


@dataclass
class Measuring:
    """Runs settings one after the other on a pipe, which is each time as it was before.

    Args:
        requests: batches of prompts; a call each, and one more of a single step for the layers.
        on_call: called after every call of the pipe.
    """

    pipe: Any
    requests: Sequence[Request]
    on_call: Callable[[], None] = lambda: None
    videos: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        family, transformers = recognised(self.pipe)
        self._transformer = next(iter(transformers.values()))
        self._references = LayerReferences.of(self._transformer, family)

    @property
    def calls(self) -> int:
        """Of the pipe, for one setting."""
        return len(self.requests) + 1

    def run(self, setting: Setting) -> Result | None:
        """None where the setting cannot run here; `left_out` then says why."""
        try:
            handle = None if setting.arguments is None else accelerate(self.pipe, **setting.arguments)
        except ValueError as error:
            self.left_out[setting.name] = str(error)
            return None
        try:
            return self._measured(setting.name, handle)
        finally:
            if handle is not None:
                handle.remove()

    def _measured(self, name: str, handle: Any) -> Result:
        videos, records = [], []
        for request in self.requests:
            videos.append(generate(self.pipe, request).videos)
            records += [] if handle is None else handle.records
            self.on_call()
        self.videos[name] = np.concatenate(videos)
        with self._references.watching(self._transformer) as layers:
            generate(self.pipe, replace(self.requests[0], steps=1))
        self.on_call()
        reused, steps = sum(record.reused for record in records), self._steps(records)
        return Result(name, compare(self.videos[EXACT], self.videos[name]), reused, steps, tuple(layers))

    def _steps(self, records: Sequence[Any]) -> int:
        return len(records) or sum(request.steps for request in self.requests)


# --- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QualityJob:
    """The ``quality`` command: model, prompts and their size, the thresholds, and the folder for what it makes."""

    model: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    request: Request
    thresholds: tuple[float, ...]
    batch: int
    out: Path

    def check(self) -> None:
        """Raise a ValueError that names the first bad field."""
        self.request.check()
        if any(not math.isfinite(threshold) or threshold <= 0 for threshold in self.thresholds):
            raise ValueError(f"thresholds: {list(self.thresholds)}; each must be above 0")
        if len(set(self.thresholds)) < len(self.thresholds):
            raise ValueError(f"thresholds: {list(self.thresholds)}; each may stand there once")
        if self.batch < 1:
            raise ValueError(f"batch: {self.batch}; must be at least 1")


def run(job: QualityJob) -> list[Result]:
    """Measure, write quality.md, quality.json, quality.png and contact-sheet.png to `job.out`, print the table."""
    job.check()
    make_folder(job.out)
    pipe = load_pipeline(job.model, job.device, job.dtype, job.revision)
    pipe.set_progress_bar_config(disable=True)
    console = Console()
    wanted = settings(sorted(job.thresholds))
    with _progress(console) as progress:
        task = progress.add_task("loading", total=None)
        measuring = Measuring(pipe, batches(job.request, job.batch), on_call=lambda: progress.advance(task))
        progress.update(task, total=measuring.calls * len(wanted))
        results = []
        for number, setting in enumerate(wanted, start=1):
            progress.update(task, description=setting.name)
            results.append(measuring.run(setting))
            progress.update(task, completed=number * measuring.calls)
        progress.update(task, description="done")
    found = [result for result in results if result is not None]
    _write(job, measuring, found)
    print(_conditions(job) + "\n\n" + table(found, measuring.left_out))
    print(f"\nquality.md, quality.json, quality.png and contact-sheet.png are in {job.out}")
    return found


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def table(results: Sequence[Result], left_out: Mapping[str, str]) -> str:
    """In markdown, which reads well as plain text too."""
    head = ("setting", "reused", "PSNR, dB", "worst video", "SSIM", "layer error, median", "largest")
    rows = [head, *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["| " + " | ".join(_aligned(row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join(["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]) + " |"
    reasons = [f"\nLeft out: {name}. {reason}" for name, reason in left_out.items()]
    return "\n".join([lines[0], rule, *lines[1:], *reasons])


def _row(result: Result) -> tuple[str, ...]:
    quality, errors = result.quality, result.errors
    return (
        result.setting,
        f"{result.reused}/{result.steps}",
        _decibels(quality.psnr),
        _decibels(quality.psnr_worst),
        f"{quality.ssim:.4f}",
        *(("-", "-") if errors is None else (f"{error:.1e}" for error in errors)),
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = row
    return [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal"


def _conditions(job: QualityJob) -> str:
    request = job.request
    dtype = str(job.dtype).removeprefix("torch.")
    return (
        f"{job.model}: {len(request.prompts)} prompts, {request.num_frames} frames of {request.height} x"
        f" {request.width}, {request.steps} steps, {dtype} on {_device_name(job.device)}; against exact, same noise"
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _write(job: QualityJob, measuring: Measuring, results: Sequence[Result]) -> None:
    shown = table(results, measuring.left_out)
    (job.out / "quality.md").write_text(f"{_conditions(job)}:\n\n{shown}\n\n{READING}")
    (job.out / "quality.json").write_text(json.dumps(report(job, results, measuring.left_out), indent=2) + "\n")
    settings_plot(
        job.out / "quality.png",
        [result.setting for result in results[1:]],
        [result.quality.psnr for result in results[1:]],
        [result.quality.ssim for result in results[1:]],
        {result.setting: [layer.error for layer in result.layers] for result in results if result.reused == 0},
        _conditions(job),
    )
    contact_sheet(
        job.out / "contact-sheet.png",
        [_label(result) for result in results],
        job.request.prompts,
        [measuring.videos[result.setting] for result in results],
    )


def _label(result: Result) -> str:
    """For the contact sheet, whose labels have lines of some 20 letters."""
    decibels = _decibels(result.quality.psnr)
    return "\n".join([*result.setting.split(" ", 1), decibels if decibels == "equal" else f"{decibels} dB"])


READING = """\
PSNR and SSIM are of the decoded videos against those of exact attention, made from the same noise; "equal" is equal to
the bit. They tell how far a video is from the other, not which of the two is the better one. The layer error is that of
each attention layer (projections, attention and output projection) against float64 on the layer's own input, at the
first step, which a cache always computes.
"""


def report(job: QualityJob, results: Sequence[Result], left_out: Mapping[str, str]) -> dict[str, Any]:
    """All numbers and the conditions under which they were taken, for JSON (an infinite PSNR is null)."""
    request = job.request
    return {
        "model": job.model,
        "device": _device_name(job.device),
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
        "left_out": dict(left_out),
        "settings": [_json(result) for result in results],
    }


def _json(result: Result) -> dict[str, Any]:
    quality = result.quality
    return {
        "setting": result.setting,
        "reused": result.reused,
        "steps": result.steps,
        "psnr": quality.psnr if math.isfinite(quality.psnr) else None,
        "psnr_worst": quality.psnr_worst if math.isfinite(quality.psnr_worst) else None,
        "ssim": quality.ssim,
        "max_abs_diff": quality.max_abs_diff,
        "layers": {layer.layer: layer.error for layer in result.layers},
    }
