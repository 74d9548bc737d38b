"""One denoising step of the full-size HunyuanVideo transformer: stock diffusers against ``accelerate(pipe)``.

    python -m benchmarks.hunyuan_step --out benchmarks/results
    python -m benchmarks.hunyuan_step --small --out /tmp/step        a tiny model and video, also on a CPU
    python -m benchmarks.hunyuan_step --out /tmp/step --profile      and one more step, taken apart by kernel
    torchrun --nproc-per-node 2 -m benchmarks.hunyuan_step --out /tmp/step     one GPU against all (step_parallel.py)

The weights are random (normal, standard deviation 1 / sqrt(fan-in), so that activations stay of order one) in the
shapes of the public configuration, which is diffusers' default one: 20 dual-stream and 40 single-stream blocks, 24
heads of 128, 13 billion parameters. Speed does not depend on their values. The default video is 720 x 1280 x 129:
118,800 video tokens and 256 text tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from para_kernels.integrations.diffusers import accelerate
from para_kernels.integrations.diffusers.processes import world_size

from . import step_parallel, step_profile
from .record import Record, write_records
from .reference import relative_error
from .step_model import (
    SMALL_CONFIG,
    TEMPORAL_COMPRESSION,
    TEXT_TOKENS,
    build_transformer,
    forward,
    pipeline_around,
    step_inputs,
    timed_forward,
    video_tokens,
)

STOCK, OURS = "diffusers", "para_kernels exact"


@dataclass
class Measured:
    """Of one way to run the step: seconds of each forward, peak memory in GiB, and the last output on the host."""

    seconds: list[float]
    peak_gib: float
    output: Tensor


def main() -> int:
    options = _options()
    if world_size() > 1:
        return step_parallel.run(options)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.perf_counter()
    transformer = build_transformer(SMALL_CONFIG if options.small else {}, device, dtype)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters in {time.perf_counter() - start:.1f} s", flush=True)

    full = step_inputs(transformer, options.height, options.width, options.frames, options.text, device, dtype)
    tokens = video_tokens(transformer, full)
    measured = measure(transformer, full, options.repeats, device)
    record = _record(transformer, measured, tokens, options, dtype)
    write_records("hunyuan_step", [record], options.out)
    print(_table(measured, tokens))
    print(f"relative difference of the outputs: {record.notes['difference']:.2e}", flush=True)
    if options.profile:
        _profile(transformer, full, record, options.out, device)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON record")
    parser.add_argument("--small", action="store_true", help="a tiny model, and a tiny video unless its size is given")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="default: 720")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: 1280")
    parser.add_argument("--frames", type=int, metavar="N", help="default: 129")
    parser.add_argument("--text", type=int, default=120, metavar="TOKENS", help="valid ones of 256 (default: 120)")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed forwards of each (default: 2; torchrun: 1)")
    parser.add_argument("--profile", action="store_true", help="take one more step apart, of this package")
    several = parser.add_argument_group("under torchrun")
    several.add_argument("--splits", nargs="+", choices=step_parallel.SPLITS, default=["ring", "ulysses"])
    several.add_argument("--cache-steps", type=int, default=0, metavar="N", help="steps with the cache (default: none)")
    several.add_argument("--cache-frames", type=int, default=17, metavar="N", help="of their video (default: 17)")
    options = parser.parse_args()
    if options.repeats is None:
        options.repeats = 2 if world_size() == 1 else 1
    for name, small, full in (("height", 64, 720), ("width", 96, 1280), ("frames", 9, 129)):
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else full)
    all_frames = (options.frames, options.cache_frames)
    if options.height % 16 or options.width % 16 or any((count - 1) % TEMPORAL_COMPRESSION for count in all_frames):
        parser.error("height and width must be multiples of 16, frames a multiple of 4 plus 1")
    if not 1 <= options.text <= TEXT_TOKENS or options.repeats < 1:
        parser.error(f"text must be 1 ... {TEXT_TOKENS} and repeats at least 1")
    if options.cache_steps and options.cache_steps < 2:
        parser.error("cache-steps must be 0, or at least 2: the first one has nothing to reuse")
    if options.profile and world_size() > 1:
        parser.error("profile has no effect under torchrun")
    return options


def measure(transformer: Any, inputs: dict[str, Any], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Time both ways in turns, each warmed up on a small video."""
    pipe = pipeline_around(transformer)
    small = step_inputs(transformer, 64, 96, 9, 50, device, transformer.dtype)
    measured: dict[str, Measured] = {}
    for turn in range(repeats):
        for way in (STOCK, OURS):
            handle = accelerate(pipe, cache=None) if way == OURS else None
            if turn == 0:
                timed_forward(transformer, small, device)
            seconds, peak, output = timed_forward(transformer, inputs, device)
            entry = measured.setdefault(way, Measured([], 0.0, output))
            entry.seconds.append(seconds)
            entry.peak_gib = max(entry.peak_gib, peak)
            if handle is not None:
                handle.remove()
            print(f"{way}: {seconds:.3f} s", flush=True)
    return measured


def _profile(transformer: Any, inputs: dict[str, Any], measured: Record, out: Path, device: torch.device) -> None:
    """One step of this package under the profiler: written beside the step's record, and printed."""
    handle = accelerate(pipeline_around(transformer), cache=None)
    found = step_profile.profiled(transformer, lambda: forward(transformer, inputs), device)
    handle.remove()
    rows = step_profile.records(found, dict(measured.shape), measured.dtype, OURS)
    write_records("hunyuan_step_profile", rows, out)
    print(step_profile.table(found, rows))


def _record(
    transformer: Any, measured: dict[str, Measured], tokens: int, options: argparse.Namespace, dtype: torch.dtype
) -> Record:
    ours, stock = measured[OURS], measured[STOCK]
    config = transformer.config
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
        },
        dtype=str(dtype).removeprefix("torch."),
        kernel=OURS,
        median_ms=median(ours.seconds) * 1e3,
        peer=STOCK,
        peer_ms=median(stock.seconds) * 1e3,
        notes={
            "difference": relative_error(ours.output, stock.output),
            "peak_gib": ours.peak_gib,
            "peer_peak_gib": stock.peak_gib,
        },
    )


def _table(measured: dict[str, Measured], tokens: int) -> str:
    lines = [f"{tokens} video + {TEXT_TOKENS} text tokens", f"{'':<20} {'seconds':>9} {'ratio':>7} {'peak GiB':>9}"]
    stock = median(measured[STOCK].seconds)
    for way, entry in measured.items():
        seconds = median(entry.seconds)
        lines.append(f"{way:<20} {seconds:9.3f} {stock / seconds:6.2f}x {entry.peak_gib:9.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
