"""Which cache policy, at which threshold, is fastest on a pipeline without falling below a quality?

Every policy's threshold is searched by bisection for the highest that keeps the quality: quality falls and speed rises
with it, though not strictly. All that was tried is kept, so that the whole trade-off shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from para_kernels import AdaCache, FirstBlockCache, TeaCache
from para_kernels.cache import Calibration, Policy, fit_rescale

from .accelerate import accelerate
from .generate import Request, generate
from .loading import load_pipeline
from .pareto import pareto_plot
from .quality import Quality, compare
from .video import make_folder

METRICS = ("psnr", "ssim")
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Candidate:
    """A policy but for its threshold.

    Attributes:
        name: for people.
        policy: at any threshold.
        low, high: the thresholds between which to search: from almost never reusing to almost always.
    """

    name: str
    policy: Policy
    low: float
    high: float

    def at(self, threshold: float) -> Policy:
        return replace(self.policy, threshold=threshold)

    def thresholds(self, count: int) -> list[float]:
        """So many, evenly spread on a logarithmic scale."""
        return [round(float(x), 4) for x in np.geomspace(self.low, self.high, count)]


@dataclass(frozen=True)
class Trial:
    """One policy on all prompts: its quality against the uncached videos, the fastest wall time of all calls in
    seconds, and reused of all steps."""

    candidate: str
    policy: Policy
    quality: Quality
    seconds: float
    speed_up: float
    reused: int
    steps: int


@dataclass
class Trials:
    """Runs policies on one pipe and the same prompts, and compares with the uncached run.

    Args:
        requests: batches of prompts; a call each.
        rounds: times each call is made; the fastest counts.
        judge: what `quality.compare` does.
        on_call: called after every call of the pipe.

    Attributes:
        reference, seconds: what `run_reference` found.
        rescale: TeaCache's polynomial, as `calibrate` found it; None before, and where there is none.
        without_teacache: why there is none.
    """

    pipe: Any
    requests: Sequence[Request]
    rounds: int = 1
    judge: Callable[[np.ndarray, np.ndarray], Quality] = compare
    on_call: Callable[[], None] = lambda: None
    reference: np.ndarray = field(default_factory=lambda: np.empty(0))
    seconds: float = math.nan
    rescale: tuple[float, ...] | None = None
    without_teacache: str | None = None

    @property
    def calls(self) -> int:
        """Of the pipe, for one policy."""
        return len(self.requests) * self.rounds

    def run_reference(self) -> None:
        """The uncached videos, and their time; what is compiled or allocated at first is not timed."""
        accelerate(self.pipe, cache=None)
        generate(self.pipe, replace(self.requests[0], steps=min(WARM_UP_STEPS, self.requests[0].steps)))
        self.reference, self.seconds, _ = self._run(None)

    def calibrate(self, requests: Sequence[Request]) -> None:
        """Fit TeaCache's polynomial for this pipe; none where the pipe has no modulated input or too few steps."""
        policy = Calibration()
        try:
            accelerate(self.pipe, cache=policy)
        except ValueError as error:
            self.without_teacache = str(error)
            return
        for request in requests:
            generate(self.pipe, request)
            self.on_call()
        try:
            self.rescale = fit_rescale(policy.pairs)
        except ValueError as error:
            self.without_teacache = str(error)

    def run(self, candidate: Candidate, threshold: float) -> tuple[Trial, np.ndarray]:
        """One policy: its trial and its videos."""
        policy = candidate.at(threshold)
        videos, seconds, (reused, steps) = self._run(policy)
        quality = self.judge(self.reference, videos)
        return Trial(candidate.name, policy, quality, seconds, self.seconds / seconds, reused, steps), videos

    def _run(self, policy: Policy | None) -> tuple[np.ndarray, float, tuple[int, int]]:
        handle = accelerate(self.pipe, cache=policy)
        videos, seconds, reused, steps = [], 0.0, 0, 0
        for request in self.requests:
            fastest = math.inf
            for number in range(self.rounds):
                generation = generate(self.pipe, request)
                fastest = min(fastest, generation.seconds)
                if number == 0:
                    videos.append(generation.videos)
                    reused += sum(record.reused for record in handle.records)
                    steps += len(handle.records)
                self.on_call()
            seconds += fastest
        return np.concatenate(videos), seconds, (reused, steps)


def candidates(rescale: tuple[float, ...] | None) -> list[Candidate]:
    """What is tried; without a polynomial no TeaCache."""
    found = [
        Candidate("First Block Cache", FirstBlockCache(1.0), 0.03, 0.6),
        Candidate("First Block Cache, Taylor 1", FirstBlockCache(1.0, taylor_order=1), 0.03, 0.6),
        Candidate("First Block Cache, Taylor 2", FirstBlockCache(1.0, taylor_order=2), 0.03, 0.6),
        Candidate("first and last block, Taylor 1", FirstBlockCache(1.0, last_blocks=1, taylor_order=1), 0.03, 0.6),
        Candidate("AdaCache", AdaCache(1.0), 0.1, 2.0),
        Candidate("AdaCache, Taylor 1", AdaCache(1.0, taylor_order=1), 0.1, 2.0),
    ]
    if rescale is not None:
        found += [
            Candidate("TeaCache", TeaCache(1.0, rescale=rescale), 0.04, 1.2),
            Candidate("TeaCache, Taylor 1", TeaCache(1.0, rescale=rescale, taylor_order=1), 0.04, 1.2),
        ]
    return found


def search(trials: Trials, candidate: Candidate, keeps: Callable[[Quality], bool], evaluations: int) -> list[Trial]:
    """Bisect a candidate's threshold for the highest that `keeps` the quality; all trials, in the order in which
    they ran."""
    low, high = candidate.low, candidate.high
    tried = []
    for _ in range(evaluations):
        threshold = float(f"{math.sqrt(low * high):.3g}")
        trial, _ = trials.run(candidate, threshold)
        tried.append(trial)
        low, high = (threshold, high) if keeps(trial.quality) else (low, threshold)
    return tried


def best(trials: Sequence[Trial], keeps: Callable[[Quality], bool]) -> Trial | None:
    """The fastest trial that keeps the quality, of those that reused a step and beat no cache; None if no one did."""
    useful = (trial for trial in trials if keeps(trial.quality) and trial.reused and trial.speed_up > 1.0)
    return min(useful, key=lambda trial: trial.seconds, default=None)


def python_line(policy: Policy) -> str:
    """The line that puts `policy` on a pipe."""
    changed = [
        f"{item.name}={getattr(policy, item.name)!r}"
        for item in fields(policy)
        if item.name != "threshold" and getattr(policy, item.name) != item.default
    ]
    return f"accelerate(pipe, cache={type(policy).__name__}({', '.join([repr(policy.threshold), *changed])}))"


# --- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuneJob:
    """The ``tune`` command: model, prompts and their size, the quality to keep, and the folder for what it makes."""

    model: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    request: Request
    metric: str
    floor: float
    evaluations: int
    rounds: int
    batch: int
    out: Path

    def check(self) -> None:
        """Raise a ValueError that names the first bad field."""
        self.request.check()
        if self.metric not in METRICS:
            raise ValueError(f"metric: {self.metric!r}; must be one of {', '.join(METRICS)}")
        highest = 1.0 if self.metric == "ssim" else math.inf
        if not 0 < self.floor < highest:
            raise ValueError(f"floor: {self.floor}; must be above 0 and below {highest:g} for {self.metric}")
        for name, value in (("evaluations", self.evaluations), ("rounds", self.rounds), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name}: {value}; must be at least 1")

    def keeps(self, quality: Quality) -> bool:
        return getattr(quality, self.metric) >= self.floor


def run(job: TuneJob) -> Trial | None:
    """Search, write pareto.png and tune.json to `job.out`, print the table and the line of Python; the best trial."""
    job.check()
    make_folder(job.out)
    pipe = load_pipeline(job.model, job.device, job.dtype, job.revision)
    pipe.set_progress_bar_config(disable=True)
    requests = batches(job.request, job.batch)
    console = Console()
    with _progress(console) as progress:
        every = progress.add_task("uncached", total=None)
        trials = Trials(pipe, requests, job.rounds, on_call=lambda: progress.advance(every))
        trials.run_reference()
        progress.update(every, description="calibrating TeaCache")
        trials.calibrate(requests)
        wanted = candidates(trials.rescale)
        progress.update(every, total=trials.calls * job.evaluations * len(wanted), completed=0)
        tried = []
        for candidate in wanted:
            progress.update(every, description=candidate.name)
            tried += search(trials, candidate, job.keeps, job.evaluations)
        progress.update(every, description="done")
    chosen = best(tried, job.keeps)
    _write(job, trials, tried, chosen)
    console.print(table(job, trials, tried, chosen))
    if trials.without_teacache is not None:
        console.print(f"TeaCache was not tried: {trials.without_teacache}", highlight=False, markup=False)
    console.print(conclusion(job, chosen), soft_wrap=True, highlight=False, markup=False)
    console.print(f"\npareto.png and tune.json are in {job.out}", highlight=False)
    return chosen


def batches(request: Request, size: int) -> list[Request]:
    """The same videos in calls of at most `size` prompts."""
    prompts = request.prompts
    return [
        replace(request, prompts=prompts[start : start + size], seed=request.seed + start)
        for start in range(0, len(prompts), size)
    ]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def table(job: TuneJob, trials: Trials, tried: Sequence[Trial], chosen: Trial | None) -> Table:
    """The best trial of every candidate."""
    found = Table(
        title=f"fastest with {job.metric.upper()} >= {job.floor:g}; uncached {trials.seconds:.2f} s",
        title_justify="left",
    )
    found.add_column("policy")
    for heading in ("threshold", "seconds", "speed-up", "reused", "PSNR dB", "worst", "SSIM"):
        found.add_column(heading, justify="right")
    for name in dict.fromkeys(trial.candidate for trial in tried):
        trial = best([trial for trial in tried if trial.candidate == name], job.keeps)
        if trial is None:
            found.add_row(name, *["-"] * 7, style="dim")
            continue
        quality = trial.quality
        found.add_row(
            name,
            f"{trial.policy.threshold:g}",
            f"{trial.seconds:.2f}",
            f"{trial.speed_up:.2f}x",
            f"{trial.reused}/{trial.steps}",
            f"{quality.psnr:.1f}",
            f"{quality.psnr_worst:.1f}",
            f"{quality.ssim:.4f}",
            style="bold" if trial is chosen else None,
        )
    return found


def conclusion(job: TuneJob, chosen: Trial | None) -> str:
    """What to do now."""
    if chosen is None:
        quality = f"{job.metric.upper()} {job.floor:g}"
        return f"No policy kept {quality} and beat no cache at any threshold that was tried: use none."
    needs = f"from para_kernels import {type(chosen.policy).__name__}"
    return f"\n{needs}\n{python_line(chosen.policy)}"


def _write(job: TuneJob, trials: Trials, tried: Sequence[Trial], chosen: Trial | None) -> None:
    (job.out / "tune.json").write_text(json.dumps(report(job, trials, tried, chosen), indent=2) + "\n")
    pareto_plot(
        job.out / "pareto.png",
        points(tried, job.metric),
        metric=job.metric,
        floor=job.floor,
        title=f"{len(job.request.prompts)} prompts, {job.request.steps} steps, {job.device.type}",
        chosen=None if chosen is None else (getattr(chosen.quality, job.metric), chosen.speed_up),
    )


def points(tried: Sequence[Trial], metric: str) -> dict[str, list[tuple[float, float]]]:
    """(quality, speed-up) of every trial, by candidate."""
    found: dict[str, list[tuple[float, float]]] = {}
    for trial in tried:
        found.setdefault(trial.candidate, []).append((getattr(trial.quality, metric), trial.speed_up))
    return found


def report(job: TuneJob, trials: Trials, tried: Sequence[Trial], chosen: Trial | None) -> dict[str, Any]:
    """All numbers and the conditions under which they were taken, for JSON (an infinite PSNR is null)."""
    return {
        "model": job.model,
        "device": job.device.type,
        "dtype": str(job.dtype).removeprefix("torch."),
        "prompts": list(job.request.prompts),
        "steps": job.request.steps,
        "metric": job.metric,
        "floor": job.floor,
        "uncached_seconds": trials.seconds,
        "rescale": trials.rescale,
        "python": None if chosen is None else python_line(chosen.policy),
        "trials": [
            {
                "candidate": trial.candidate,
                "policy": python_line(trial.policy),
                "threshold": trial.policy.threshold,
                "seconds": trial.seconds,
                "speed_up": trial.speed_up,
                "reused": trial.reused,
                "steps": trial.steps,
                "psnr": trial.quality.psnr if math.isfinite(trial.quality.psnr) else None,
                "ssim": trial.quality.ssim,
            }
            for trial in tried
        ],
    }
