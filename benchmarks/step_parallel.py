"""What `hunyuan_step` measures under torchrun: the same step on one GPU and with its sequence split over all of them.

Every rank first runs the step by itself, all at the same time, then all run it together. Every rank compares what it
got together with what it got alone. With --cache-steps, a few steps of First Block Cache come first, on fewer frames.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from para_kernels import ContextParallel
from para_kernels.integrations.diffusers import Handle, accelerate
from para_kernels.integrations.diffusers.processes import is_first, joined, own_device
from para_kernels.parallel.agreement import exchange

from .record import Record, write_records
from .reference import relative_error
from .step_model import (
    SMALL_CONFIG,
    TEXT_TOKENS,
    build_transformer,
    forward,
    pipeline_around,
    step_inputs,
    timed_forward,
    video_tokens,
)

NAME = "hunyuan_step_parallel"
ALONE = "one GPU"
CACHE = 0.06
SPLITS: dict[str, Callable[[int], ContextParallel]] = {
    "ring": lambda world: ContextParallel(ring=world),
    "ulysses": lambda world: ContextParallel(ulysses=world),
}


@dataclass
class Measured:
    """Of one way to run the step, on this rank unless said otherwise.

    Attributes:
        seconds: of each forward, of the slowest rank.
        first_seconds: of rank 0.
        peak_gib: of the fullest rank.
        reused, diffs: what the cache decided, and its diffs where there was something to compare.
        cached: the output of the last step with the cache.
        placed: the split, and the transport with why.
    """

    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    output: Tensor | None = None
    reused: list[bool] = field(default_factory=list)
    diffs: list[float] = field(default_factory=list)
    cached: Tensor | None = None
    placed: tuple[str, str] = ("", "")


@dataclass
class Job:
    """The model and the videos of one run."""

    options: argparse.Namespace
    device: torch.device
    transformer: Any
    pipe: Any
    inputs: dict[str, Any]
    small: dict[str, Any]

    @staticmethod
    def of(options: argparse.Namespace, device: torch.device) -> Job:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        transformer = build_transformer(SMALL_CONFIG if options.small else {}, device, dtype)
        height, width = options.height, options.width
        return Job(
            options,
            device,
            transformer,
            pipeline_around(transformer),
            step_inputs(transformer, height, width, options.frames, options.text, device, dtype),
            step_inputs(transformer, 64, 96, 9, min(options.text, 50), device, dtype),
        )

    def cache_steps(self) -> list[dict[str, Any]]:
        """The inputs of some steps: every second one changes little, the others much."""
        options = self.options
        size = options.height, options.width, options.cache_frames, options.text
        inputs = step_inputs(self.transformer, *size, self.device, self.transformer.dtype)
        latents = inputs["hidden_states"]
        noise = latents.flip(-1)
        steps = []
        for step in range(options.cache_steps):
            change = 0.005 * (step % 2) + 0.6 * (step // 2)
            timestep = inputs["timestep"] - 0.01 * (step % 2) - 50.0 * (step // 2)
            steps.append(inputs | {"hidden_states": latents + change * noise, "timestep": timestep})
        return steps


def run(options: argparse.Namespace) -> int:
    """Measure on all ranks of torchrun's world; rank 0 writes the records and prints. 1 if a cache decided otherwise
    on any rank."""
    started = time.perf_counter()
    device = own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with joined(device, ContextParallel()):
        job = Job.of(options, device)
        world = dist.get_world_size()
        _say(f"model: {time.perf_counter() - started:.1f} s")
        alone = _measure(job, ALONE, None)
        together = {split: _measure(job, split, SPLITS[split](world)) for split in options.splits}
        records = [_record(job, split, alone, found) for split, found in together.items()]
        if is_first():
            write_records(NAME, records, options.out)
        _say(_table(job, alone, records))
        _say(f"all of it: {time.perf_counter() - started:.1f} s")
    return int(any(record.notes.get("same_decisions") == 0 for record in records))


def _say(line: str) -> None:
    if is_first():
        print(line, flush=True)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _measure(job: Job, way: str, parallel: ContextParallel | None) -> Measured:
    """Warm up on a small video, take the steps with the cache, then time whole steps without it."""
    found = Measured()
    handle = accelerate(job.pipe, cache=None, parallel=parallel)
    timed_forward(job.transformer, job.small, job.device)
    if job.options.cache_steps:
        _cache_steps(job, accelerate(job.pipe, cache=CACHE), found)
        accelerate(job.pipe, cache=None)
    for _ in range(job.options.repeats):
        exchange(_world(), None, "arrival")
        seconds, peak, found.output = timed_forward(job.transformer, job.inputs, job.device)
        ranks = exchange(_world(), [seconds, peak], "seconds")
        found.first_seconds.append(ranks[0][0])
        found.seconds.append(max(rank[0] for rank in ranks))
        found.peak_gib = max(found.peak_gib, *(rank[1] for rank in ranks))
        _say(f"{way}: {found.seconds[-1]:.3f} s, rank 0 {ranks[0][0]:.3f} s")
    if handle.spread is not None:
        found.placed = str(handle.spread.last_place), handle.spread.transport
    handle.remove()
    return found


def _cache_steps(job: Job, handle: Handle, found: Measured) -> None:
    output = None
    for inputs in job.cache_steps():
        output = forward(job.transformer, inputs)
    assert output is not None
    found.cached = output.float().cpu()
    found.reused = [step.reused for step in handle.records]
    found.diffs = [step.diff for step in handle.records if step.diff is not None]


def _record(job: Job, split: str, alone: Measured, found: Measured) -> Record:
    """Of one split; every rank has to come, since what is compared is compared on all."""
    assert alone.output is not None
    assert found.output is not None
    own = {
        "difference": relative_error(found.output, alone.output),
        "same": found.reused == alone.reused,
        "diffs": max((abs(a - b) for a, b in zip(found.diffs, alone.diffs, strict=False)), default=0.0),
        "cached": 0.0 if alone.cached is None else relative_error(_given(found.cached), alone.cached),
    }
    ranks = exchange(_world(), own, "differences")
    options, config = job.options, job.transformer.config
    tokens = video_tokens(job.transformer, job.inputs)
    cache = {
        "same_decisions": int(all(rank["same"] for rank in ranks)),
        "cache_steps": len(found.reused),
        "reused": sum(found.reused),
        "cache_frames": options.cache_frames,
        "cache_diff_change": max(rank["diffs"] for rank in ranks),
        "cache_difference": max(rank["cached"] for rank in ranks),
        "closest_to_threshold": min((abs(diff - CACHE) for diff in alone.diffs), default=0.0),
    }
    return Record(
        op="hunyuan_step",
        shape={
            "height": options.height,
            "width": options.width,
            "frames": options.frames,
            "S": tokens + TEXT_TOKENS,
            "valid": tokens + options.text,
            "H": config.num_attention_heads,
            "D": config.attention_head_dim,
            "blocks": config.num_layers + config.num_single_layers,
            "ranks": dist.get_world_size(),
        },
        dtype=str(job.transformer.dtype).removeprefix("torch."),
        kernel=split,
        median_ms=median(found.seconds) * 1e3,
        peer=ALONE,
        peer_ms=median(alone.seconds) * 1e3,
        notes={
            "split": found.placed[0],
            "transport": found.placed[1],
            "difference": max(rank["difference"] for rank in ranks),
            "rank_0_ms": median(found.first_seconds) * 1e3,
            "peer_rank_0_ms": median(alone.first_seconds) * 1e3,
            "peak_gib": found.peak_gib,
            "peer_peak_gib": alone.peak_gib,
            **(cache if found.reused else {}),
        },
    )


def _given(output: Tensor | None) -> Tensor:
    assert output is not None
    return output


def _table(job: Job, alone: Measured, records: list[Record]) -> str:
    tokens = video_tokens(job.transformer, job.inputs)
    lines = [
        f"{tokens} video + {TEXT_TOKENS} text tokens; the slowest of {dist.get_world_size()} ranks",
        f"{'':<10} {'seconds':>9} {'ratio':>7} {'peak GiB':>9} {'difference':>11}  transport",
        f"{ALONE:<10} {median(alone.seconds):9.3f} {1:6.2f}x {alone.peak_gib:9.1f}",
    ]
    for record in records:
        notes = record.notes
        lines.append(
            f"{record.kernel:<10} {record.median_ms / 1e3:9.3f} {record.ratio:6.2f}x {notes['peak_gib']:9.1f}"
            f" {notes['difference']:11.2e}  {notes['split']}; {notes['transport']}"
        )
    for record in records:
        notes = record.notes
        if "same_decisions" in notes:
            lines.append(
                f"cache, {record.kernel}: {notes['reused']} of {notes['cache_steps']} steps reused,"
                f" {'as on' if notes['same_decisions'] else 'NOT as on'} one GPU; diffs change by at most"
                f" {notes['cache_diff_change']:.1e}, all stay {notes['closest_to_threshold']:.1e} or more from the"
                f" threshold; last output {notes['cache_difference']:.2e}"
            )
    return "\n".join(lines)
