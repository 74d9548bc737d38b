"""Decoding a video with the VAE of HunyuanVideo: diffusers' tiling in one process against `parallelize_vae` in several.

    torchrun --nproc-per-node 2 -m benchmarks.vae_parallel --out benchmarks/results
    torchrun --nproc-per-node 2 -m benchmarks.vae_parallel --out /tmp/vae --encode       and encode its pixels
    torchrun --nproc-per-node 2 -m benchmarks.vae_parallel --out /tmp/vae --small        a tiny VAE, also on a CPU

The weights are random, drawn from one seed on every rank, in the shapes of the public configuration; the default video
is 720 x 1280 x 129 in bfloat16. In turns, rank 0 decodes alone while the others wait, and all decode together; every
rank's result is compared with that of rank 0 alone. Without a GPU, --small is what a CPU can do.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from para_kernels.integrations.diffusers import parallelize_vae
from para_kernels.integrations.diffusers.vae import RankWork

from .record import OURS, Record, write_records

NAME = "vae_parallel"
PEER = "diffusers tiling, one process"
SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION = 8, 4
GIB = 2**30
SMALL_CONFIG: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}


@dataclass
class Timed:
    """Of one way to make the call: seconds of the slowest rank, peak of memory in bytes of the fullest, last result."""

    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0
    result: Tensor | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)


def main() -> int:
    options = _options()
    device = _join()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = build_vae(SMALL_CONFIG if options.small else {}, device, dtype)
    records = [
        _measure(direction, vae, options, device) for direction in ("decode", *(["encode"] if options.encode else []))
    ]
    if dist.get_rank() == 0:
        write_records(NAME, records, options.out)
    dist.destroy_process_group()
    return 0 if all(record.notes["equal"] for record in records) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON record")
    parser.add_argument("--small", action="store_true", help="a tiny VAE, and a small video unless its size is given")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="default: 720")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: 1280")
    parser.add_argument("--frames", type=int, metavar="N", help="default: 129")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed calls of each (default: 3)")
    parser.add_argument("--encode", action="store_true", help="measure encoding as well")
    options = parser.parse_args()
    for name, small, full in (("height", 320, 720), ("width", 512, 1280), ("frames", 17, 129)):
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else full)
    if options.height % SPATIAL_COMPRESSION or options.width % SPATIAL_COMPRESSION:
        parser.error(f"height and width must be multiples of {SPATIAL_COMPRESSION}")
    if (options.frames - 1) % TEMPORAL_COMPRESSION or options.repeats < 1:
        parser.error(f"frames must be a multiple of {TEMPORAL_COMPRESSION} plus 1, and repeats at least 1")
    return options


def _join() -> torch.device:
    """Join the others, as torchrun says. They wait long while rank 0 decodes alone."""
    has_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=timedelta(minutes=30))
    return device


def build_vae(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The VAE with random weights, the same ones on every rank."""
    torch.manual_seed(0)
    with device:
        vae: Any = AutoencoderKLHunyuanVideo(**config)
    return vae.to(dtype).eval().requires_grad_(False)


def _measure(direction: str, vae: Any, options: argparse.Namespace, device: torch.device) -> Record:
    given = _input(direction, vae, options, device)
    call = _call(direction, vae, given)
    vae.enable_tiling()
    alone, together = Timed(), Timed()
    work: tuple[RankWork, ...] = ()
    for turn in range(
        options.repeats + 1
    ):  # in turns, so that what slows the machine down slows both; the first warms up
        _time(alone, call, turn, device, takes_part=dist.get_rank() == 0)
        handle = parallelize_vae(vae)
        _time(together, call, turn, device)
        work = handle.work()
        handle.remove()
    assert together.result is not None
    difference = _difference(alone.result, together.result)
    speed_up = alone.median / together.median
    if dist.get_rank() == 0:
        print(f"{direction}: {sum(row.tiles for row in work)} tiles; one process {alone.median:.2f} s, ", end="")
        print(f"{dist.get_world_size()} processes {together.median:.2f} s, {speed_up:.2f}x; ", end="")
        print(f"largest difference {difference:.1e}", flush=True)
        if sum(row.tiles for row in work) == 1:
            print("  one tile has nothing to share out: the ratio says how much times vary here, and nothing else")
    shape = {name: getattr(options, name) for name in ("height", "width", "frames")}
    return Record(
        op=f"vae_{direction}",
        shape={**shape, "ranks": dist.get_world_size()},
        dtype=str(given.dtype).removeprefix("torch."),
        kernel=OURS,
        median_ms=together.median * 1e3,
        peer=PEER,
        peer_ms=alone.median * 1e3,
        notes={
            "equal": int(difference == 0),
            "difference": difference,
            "peak_gib": together.peak / GIB,
            "peer_peak_gib": alone.peak / GIB,
            "tiles": sum(row.tiles for row in work),
            "fewest_tiles": min(row.tiles for row in work),
            "most_tiles": max(row.tiles for row in work),
            "fastest_ms": min(together.seconds) * 1e3,
            "slowest_ms": max(together.seconds) * 1e3,
            "peer_fastest_ms": min(alone.seconds) * 1e3,
            "peer_slowest_ms": max(alone.seconds) * 1e3,
            "least_busy_s": min(row.seconds for row in work),
            "most_busy_s": max(row.seconds for row in work),
        },
    )


def _input(direction: str, vae: Any, options: argparse.Namespace, device: torch.device) -> Tensor:
    """Normal latents (1, C, T, H, W), or pixels; drawn on the host, where they come out alike on every rank."""
    frames, height, width = options.frames, options.height, options.width
    shape = (1, vae.config.in_channels, frames, height, width)
    if direction == "decode":
        latent = ((frames - 1) // TEMPORAL_COMPRESSION + 1, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
        shape = (1, vae.config.latent_channels, *latent)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, vae.dtype)


def _call(direction: str, vae: Any, given: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            output = getattr(vae, direction)(given)
        return output.sample if direction == "decode" else output.latent_dist.parameters

    return call


def _time(timed: Timed, call: Callable[[], Tensor], turn: int, device: torch.device, takes_part: bool = True) -> None:
    """One call, from when all ranks are there. Turn 0 is not counted; a rank that does not take part waits."""
    timed.result = None
    seconds = peak = 0.0
    dist.barrier()
    if takes_part:
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        timed.result = call()
        _synchronize(device)
        seconds = time.perf_counter() - start
        peak = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0
    slowest = torch.tensor([seconds, peak], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if turn > 0:
        timed.seconds.append(slowest[0].item())
        timed.peak = max(timed.peak, slowest[1].item())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(reference: Tensor | None, result: Tensor) -> float:
    """Largest absolute difference over all ranks' results to rank 0's reference."""
    expected = torch.empty_like(result) if reference is None else reference.contiguous()
    dist.broadcast(expected, src=0)
    worst = (expected.float() - result.float()).abs().max().double().cpu()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


if __name__ == "__main__":
    sys.exit(main())
