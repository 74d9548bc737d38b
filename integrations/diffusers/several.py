"""The demo's run on several processes of this machine, which it starts itself; for other runs torchrun does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .generate import Acceleration, Request, generate
from .loading import load_pipeline


@dataclass(frozen=True)
class Job:
    """What every process does: load, a short call that is not timed, the call as often as there are rounds."""

    model: str
    revision: str | None
    device_type: str
    dtype: torch.dtype
    request: Request
    warm_up_steps: int
    acceleration: Acceleration
    rounds: int
    threads: int


@dataclass(frozen=True)
class Runs:
    """The first rank's videos, and the wall time of each of its calls in seconds."""

    videos: np.ndarray
    seconds: list[float]


def enough_devices(device: torch.device, count: int) -> bool:
    """Whether every one of `count` processes would have a GPU of its own, or needs none."""
    return device.type == "cpu" or torch.cuda.device_count() >= count


def run(job: Job, count: int) -> Runs:
    """Start `count` processes, wait for them.

    Raises:
        torch.multiprocessing.ProcessException: if one of them fails; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(count, job, folder), nprocs=count)  # pyright: ignore[reportPrivateImportUsage]
        seconds = np.load(Path(folder) / "seconds.npy")
        return Runs(np.load(Path(folder) / "videos.npy"), seconds.tolist())


def _rank(rank: int, count: int, job: Job, folder: str) -> None:
    torch.set_num_threads(job.threads)
    on_gpu = job.device_type == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    assert job.acceleration.parallel is not None
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(f"{folder}/store", count),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=job.acceleration.parallel.timeout),
        device_id=device if on_gpu else None,
    )
    pipe = load_pipeline(job.model, device, job.dtype, job.revision)
    pipe.set_progress_bar_config(disable=True)
    job.acceleration.install(pipe)
    generate(pipe, replace(job.request, steps=job.warm_up_steps))
    calls = [generate(pipe, job.request) for _ in range(job.rounds)]
    if rank == 0:
        np.save(f"{folder}/videos.npy", calls[-1].videos)
        np.save(f"{folder}/seconds.npy", [call.seconds for call in calls])
    dist.destroy_process_group()
