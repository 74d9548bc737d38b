"""Every cache policy on the shipped pipeline, over a range of thresholds: how fast, and how near to the uncached video.

    OMP_NUM_THREADS=1 python -m benchmarks.policies

Prompts are held-out wordings, generated in batches of about one length. A batch runs without a cache and under every
setting, in an order that moves on by one from batch to batch, so that a machine that slows down slows down for all of
them. Only the transformer's forwards are timed. TeaCache's polynomial is fitted first, on wordings of the training.
One core; the record goes to ``benchmarks/results/policies-cpu.json``, the picture to ``docs/images/policies.png``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from para_kernels import AdaCache, FirstBlockCache, TeaCache
from para_kernels.cache import Calibration, Policy, StepRecord, fit_rescale
from para_kernels.integrations.diffusers import accelerate
from para_kernels.integrations.diffusers.cache import transformer_blocks
from para_kernels.integrations.diffusers.loading import TOY, TOY_DEFAULTS, load_pipeline
from para_kernels.integrations.diffusers.pareto import pareto_plot
from para_kernels.integrations.diffusers.quality import psnr, ssim
from para_kernels.integrations.diffusers.toy.evaluate import Reader, Reading, score
from para_kernels.integrations.diffusers.toy.prompts import Scene, evaluation_prompts, sample_prompts
from para_kernels.integrations.diffusers.video import to_uint8

from .record import REPOSITORY, RESULTS, Record, write_records
from .section import dtype_name
from .trade_off import BASELINE, QUALITY, UNCACHED, compared, verdict

NAME = "policies-cpu"
PICTURE = REPOSITORY / "docs" / "images" / "policies.png"
FIRST_SEED = 900_000  # of the noise, as in the toy's own evaluation
CALIBRATION_SEED = 500_000
STEPS = 20  # with the pipeline's usual 30 the command would not end in half an hour
# Half the time of float32 on a processor that multiplies bfloat16, and 50 dB from it: far above where policies differ.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Curve:
    """A policy, and the values of what it is tuned by, ascending."""

    name: str
    policy: Callable[[float], Policy]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Setting:
    """One policy at one value; no policy is no cache."""

    name: str
    value: float | None
    policy: Policy | None


NO_CACHE = Setting(UNCACHED, None, None)


def curves(rescale: tuple[float, ...]) -> list[Curve]:
    """What is measured: every policy on both sides of the common quality. `rescale` is TeaCache's polynomial."""
    return [
        Curve(BASELINE, FirstBlockCache, (0.22, 0.34, 0.5)),
        Curve("First Block Cache, Taylor 1", partial(FirstBlockCache, taylor_order=1), (0.28, 0.42)),
        Curve("First Block Cache, Taylor 2", partial(FirstBlockCache, taylor_order=2), (0.24, 0.38)),
        Curve("first and last block", partial(FirstBlockCache, last_blocks=1), (0.28, 0.45)),
        Curve("bounded sum of changes", lambda bound: FirstBlockCache(10.0, max_accumulated_error=bound), (0.7, 1.3)),
        Curve("TeaCache", partial(TeaCache, rescale=rescale), (0.36, 0.5)),
        Curve("TeaCache, Taylor 1", partial(TeaCache, rescale=rescale, taylor_order=1), (0.3, 0.42, 0.58)),
        Curve("AdaCache", AdaCache, (0.5, 0.9)),
        Curve("AdaCache, Taylor 1", partial(AdaCache, taylor_order=1), (0.5, 0.8, 1.2)),
    ]


def settings(found: Sequence[Curve]) -> list[Setting]:
    """Every point of every curve."""
    return [Setting(curve.name, value, curve.policy(value)) for curve in found for value in curve.values]


class Reads(Protocol):
    """What `evaluate.Reader` is: it reads digits from videos (N, T, H, W, 3) of uint8."""

    def read(self, videos: np.ndarray) -> list[Reading]: ...


@dataclass(frozen=True)
class Size:
    """Of the videos, and how many steps they take."""

    height: int = TOY_DEFAULTS.height
    width: int = TOY_DEFAULTS.width
    num_frames: int = TOY_DEFAULTS.num_frames
    steps: int = STEPS
    guidance: float = TOY_DEFAULTS.guidance


@dataclass(frozen=True)
class Batch:
    """Prompts, encoded once for all settings, and the seed of each one's noise.

    Attributes:
        scenes: what the prompts ask for.
        text: the arguments of the pipeline that stand for them.
        seeds: one for each.
    """

    scenes: list[Scene]
    text: Mapping[str, torch.Tensor]
    seeds: list[int]


@dataclass(frozen=True)
class Call:
    """One batch under one setting: videos (N, T, H, W, 3) in [0, 1], the steps, milliseconds of the transformer's
    forwards, and seconds that the processor spent on all steps."""

    videos: np.ndarray
    records: list[StepRecord]
    wall_ms: float
    cpu_s: float


@dataclass
class Tally:
    """All batches under one setting. `wall_ms`, `uncached_ms` and the processor's seconds are per batch."""

    setting: Setting
    wall_ms: list[float] = field(default_factory=list)
    uncached_ms: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    reused: int = 0
    steps: int = 0

    def add(self, batch: Batch, call: Call, uncached: Call, readings: list[Reading]) -> None:
        self.wall_ms.append(call.wall_ms)
        self.uncached_ms.append(uncached.wall_ms)
        self.cpu_s.append(call.cpu_s)
        pairs = list(zip(uncached.videos, call.videos, strict=True))
        self.psnr += [psnr(*pair) for pair in pairs]
        self.ssim += [ssim(*pair) for pair in pairs]
        self.scenes += batch.scenes
        self.readings += readings
        self.reused += sum(record.reused for record in call.records)
        self.steps += len(call.records)

    @property
    def speed_ups(self) -> list[float]:
        """Of each batch."""
        return [theirs / ours for theirs, ours in zip(self.uncached_ms, self.wall_ms, strict=True)]

    def median_batch(self) -> int:
        """The number of the batch whose speed-up is the median one, of an even number the lower one."""
        order = sorted(range(len(self.wall_ms)), key=self.speed_ups.__getitem__)
        return order[(len(order) - 1) // 2]

    def computed_blocks(self, blocks: int) -> float:
        """Share of the calls of the transformer's `blocks` blocks that were computed."""
        policy = self.setting.policy
        always = 0 if policy is None else policy.first_blocks + policy.last_blocks
        return 1.0 - self.reused * (blocks - always) / (self.steps * blocks)


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    began, began_cpu = time.perf_counter(), time.process_time()
    size = Size(steps=options.steps)
    pipe = load_pipeline(TOY, torch.device("cpu"), DTYPES[options.dtype])
    pipe.set_progress_bar_config(disable=True)
    known = batches(pipe, sample_prompts(options.batch, seed=3), options.batch, CALIBRATION_SEED)
    wanted = curves(calibrated(pipe, known, size))
    asked = batches(pipe, evaluation_prompts(options.prompts, seed=1), options.batch, FIRST_SEED)
    tallies = measure(pipe, asked, settings(wanted), size, Reader())
    spent = {"run_s": time.perf_counter() - began, "run_cpu_s": time.process_time() - began_cpu}
    rows = records(tallies, size, options.batch, dtype_name(pipe.transformer.dtype), _blocks(pipe), spent)
    print(write_records(NAME, rows, options.results))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(tallies, options.picture, f"{options.prompts} prompts, {size.steps} steps, one core")
    print(verdict(compared(points(tallies))))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="held-out wordings (default: 200)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps (default: {STEPS})")
    parser.add_argument("--batch", type=int, default=8, help="prompts in a call; they share decisions (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and latents (default: bf16)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the record")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG to write")
    options = parser.parse_args()
    for name, least in (("prompts", 1), ("steps", 6), ("batch", 1)):  # five changes for TeaCache's polynomial
        if getattr(options, name) < least:
            parser.error(f"--{name}: {getattr(options, name)}; must be at least {least}")
    return options


# --- running ----------------------------------------------------------------------------------------------------------


def batches(pipe: Any, pairs: Sequence[tuple[Scene, str]], size: int, first_seed: int) -> list[Batch]:
    """The prompts in batches of at most `size`, the shortest first; prompt number i has the seed `first_seed` + i.

    Prompts of about one length leave little padding, which the transformer's linear layers would compute at every step.
    """
    with torch.no_grad():
        embeds, pooled, mask = pipe.encode_prompt([text for _, text in pairs])
    order = mask.sum(dim=1).argsort(stable=True)
    return [_batch(pairs, chosen, embeds, pooled, mask, first_seed) for chosen in order.split(size)]


def _batch(
    pairs: Sequence[tuple[Scene, str]],
    chosen: torch.Tensor,
    embeds: torch.Tensor,
    pooled: torch.Tensor,
    mask: torch.Tensor,
    first_seed: int,
) -> Batch:
    """The `chosen` prompts, cut to the longest of them."""
    longest = int(mask[chosen].sum(dim=1).max())
    text = {
        "prompt_embeds": embeds[chosen, :longest],
        "pooled_prompt_embeds": pooled[chosen],
        "prompt_attention_mask": mask[chosen, :longest],
    }
    numbers = chosen.tolist()
    return Batch([pairs[number][0] for number in numbers], text, [first_seed + number for number in numbers])


def calibrated(pipe: Any, asked: Sequence[Batch], size: Size) -> tuple[float, ...]:
    """TeaCache's polynomial for this pipe and this number of steps."""
    policy = Calibration()
    for batch in asked:
        call(pipe, batch, policy, size)
    return fit_rescale(policy.pairs)


def measure(pipe: Any, asked: Sequence[Batch], wanted: Sequence[Setting], size: Size, reader: Reads) -> list[Tally]:
    """Every batch without a cache and under every setting, in turns; the uncached tally comes first."""
    tallies = [Tally(setting) for setting in (NO_CACHE, *wanted)]
    call(pipe, asked[0], None, size)  # what is allocated at first is not timed
    with _progress() as progress:
        task = progress.add_task("policies", total=len(asked) * len(tallies))
        for turn, batch in enumerate(asked):
            calls: dict[int, Call] = {}
            for index in in_turn(len(tallies), turn):
                calls[index] = call(pipe, batch, tallies[index].setting.policy, size)
                progress.update(task, advance=1, refresh=True)
            for index, tally in enumerate(tallies):
                tally.add(batch, calls[index], calls[0], reader.read(to_uint8(calls[index].videos)))
    return tallies


def in_turn(count: int, turn: int) -> Iterator[int]:
    """0 to `count` - 1, beginning with another one at each turn."""
    return ((turn + index) % count for index in range(count))


def call(pipe: Any, batch: Batch, policy: Policy | None, size: Size) -> Call:
    """One batch under one policy. The text is encoded already, and decoding is not timed: no cache changes them."""
    handle = accelerate(pipe, cache=policy)
    noise = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    began = time.process_time()
    latents = pipe(
        **batch.text,
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        num_inference_steps=size.steps,
        guidance_scale=size.guidance,
        generator=noise,
        output_type="latent",
    ).frames
    cpu_s = time.process_time() - began
    steps = handle.records
    return Call(decoded(pipe, latents), steps, sum(step.ms or 0.0 for step in steps), cpu_s)


def decoded(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    """Videos (N, T, H, W, 3) in [0, 1] of the pipeline's latents, as the pipeline itself decodes them."""
    with torch.no_grad():
        video = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.video_processor.postprocess_video(video, output_type="np")


def _progress() -> Progress:
    # No thread that redraws: its time would count as the processor's.
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, auto_refresh=False)


def _blocks(pipe: Any) -> int:
    handle = accelerate(pipe, cache=None)
    return len(transformer_blocks(pipe.transformer, handle.family))


# --- what it says -----------------------------------------------------------------------------------------------------


def records(
    tallies: Sequence[Tally], size: Size, batch: int, dtype: str, blocks: int, spent: Mapping[str, float]
) -> list[Record]:
    """A record per setting, no cache first, which also says what the whole command has taken."""
    shape = {
        "prompts": len(tallies[0].scenes),
        "batch": batch,
        "steps": size.steps,
        "height": size.height,
        "width": size.width,
        "frames": size.num_frames,
        "blocks": blocks,
    }
    return [_record(tally, tallies[0], shape, dtype, spent if tally is tallies[0] else {}) for tally in tallies]


def _record(tally: Tally, uncached: Tally, shape: dict[str, int], dtype: str, spent: Mapping[str, float]) -> Record:
    """The times are those of one batch in one turn: the one whose speed-up is the median."""
    chosen = tally.median_batch()
    low, _, high = quartiles(tally.speed_ups)
    return Record(
        op="cache_policy",
        shape=shape,
        dtype=dtype,
        kernel=tally.setting.name,
        median_ms=tally.wall_ms[chosen],
        peer=UNCACHED,
        peer_ms=tally.uncached_ms[chosen],
        notes={
            "value": tally.setting.value,
            "policy": None if tally.setting.policy is None else tally.setting.policy.description(),
            "speed_up_low": low,
            "speed_up_high": high,
            "speed_up_cpu": sum(uncached.cpu_s) / sum(tally.cpu_s),
            "computed_blocks": tally.computed_blocks(shape["blocks"]),
            "reused": tally.reused,
            "steps": tally.steps,
            "psnr": finite(mean(tally.psnr)),
            "psnr_worst": finite(min(tally.psnr)),
            "ssim": mean(tally.ssim),
            **{name: score(tally.scenes, tally.readings)[name] for name in ("digit", "motion")},
            **spent,
        },
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one; of one value, that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = quantiles(values, n=4, method="inclusive")
    return low, median, high


def finite(value: float) -> float | None:
    """JSON knows no infinity: None, where every video was the uncached one."""
    return value if math.isfinite(value) else None


def points(tallies: Sequence[Tally]) -> dict[str, list[tuple[float, float]]]:
    """(PSNR, speed-up) of every setting, by policy."""
    found: dict[str, list[tuple[float, float]]] = {}
    for tally in tallies[1:]:
        point = (mean(tally.psnr), tally.speed_ups[tally.median_batch()])
        found.setdefault(tally.setting.name, []).append(point)
    return found


def draw(tallies: Sequence[Tally], path: Path, title: str) -> None:
    """The picture of all curves."""
    pareto_plot(path, points(tallies), metric="psnr", floor=QUALITY, title=title)


if __name__ == "__main__":
    sys.exit(main())
