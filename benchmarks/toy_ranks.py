"""Whether several processes on CPUs make the shipped pipeline's video as one process does, cache and all.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 8 -m benchmarks.toy_ranks --out /tmp/ranks

Rank 0 makes the video alone, then all ranks make it together: as a ring, by ulysses, and by both. Rank 0 prints, and
writes the checks to --out; the exit code is 1 if one does not hold. No time is taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from para_kernels import ContextParallel
from para_kernels.integrations.diffusers.generate import Acceleration, Request, generate
from para_kernels.integrations.diffusers.loading import load_pipeline
from para_kernels.integrations.diffusers.processes import is_first, joined
from para_kernels.integrations.diffusers.toy import TOY_PIPELINE

from .record import Check, write_records

ALLOWED = 1e-5  # of values from 0 to 1 in float32, as in tests/test_diffusers_parallel.py
CACHE = 0.6  # reuses some of the few steps and computes others
# Long enough that, of two pieces of the sequence, the second is not padding alone: then the ring would merge nothing.
REQUEST = Request(("a handwritten 7 moving to the left", "seven, up"), 64, 64, 65, 5, 6.0)
TIMEOUT = 600.0  # seconds; more ranks than cores take turns


@dataclass(frozen=True)
class Video:
    """What one process saw: pixels, which steps the cache reused, how the ranks were placed."""

    pixels: np.ndarray
    reused: list[bool]
    place: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    options = parser.parse_args()
    device = torch.device("cpu")
    with joined(device, ContextParallel(timeout=TIMEOUT)):
        world = dist.get_world_size()
        pipe = load_pipeline(str(TOY_PIPELINE), device, torch.float32)
        pipe.set_progress_bar_config(disable=True)
        expected = [_video(pipe, None) if is_first() else None]
        dist.broadcast_object_list(expected)
        assert expected[0] is not None
        checks = [_check(expected[0], _together(pipe, split)) for split in splits(world)]
        if is_first():
            for check in checks:
                print(f"{check.check}: worst {check.worst:.1e} of {ALLOWED:.0e}, {check.failures} ranks failed")
            print(write_records("toy-ranks-cpu", checks, options.out))
    return int(not all(check.passed for check in checks))


def splits(world: int) -> list[ContextParallel]:
    """A ring of all ranks, ulysses over all, and the two-by-half hybrid where there is one."""
    found = [ContextParallel(ring=world, timeout=TIMEOUT), ContextParallel(ulysses=world, timeout=TIMEOUT)]
    if world > 2 and world % 2 == 0:
        found.append(ContextParallel(ring=2, ulysses=world // 2, timeout=TIMEOUT))
    return found


def _video(pipe: object, parallel: ContextParallel | None) -> Video:
    handle = Acceleration(cache=CACHE, parallel=parallel).install(pipe)
    pixels = generate(pipe, REQUEST).videos
    reused = [step.reused for step in handle.records]
    place = "one process" if handle.spread is None else str(handle.spread.last_place)
    handle.remove()
    return Video(pixels, reused, place)


def _together(pipe: object, split: ContextParallel) -> list[Video]:
    videos: list[Video | None] = [None] * dist.get_world_size()
    dist.all_gather_object(videos, _video(pipe, split))
    return [video for video in videos if video is not None]


def _check(expected: Video, everyone: Sequence[Video]) -> Check:
    differences = [float(np.abs(video.pixels - expected.pixels).max()) for video in everyone]
    failures = sum(
        not difference <= ALLOWED or video.reused != expected.reused
        for difference, video in zip(differences, everyone, strict=True)
    )
    return Check(
        check=f"the toy's video and the cache's decisions, {everyone[0].place}",
        cases=len(everyone),
        failures=failures,
        dtype="float32",
        worst=max(differences),
        allowed=ALLOWED,
        notes={"ranks": len(everyone), "steps": len(expected.reused), "reused": sum(expected.reused)},
    )


if __name__ == "__main__":
    sys.exit(main())
