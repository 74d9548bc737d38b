"""Running as one of the processes that torchrun starts: which one, on which device, and how to meet the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from para_kernels import ContextParallel
from para_kernels.parallel.failure import DEFAULT_TIMEOUT, RankFailure

AUTO = "auto"


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device(device: torch.device) -> torch.device:
    """Under torchrun a GPU for each process of a node; else `device` as it is.

    Raises:
        ValueError: if the node has fewer GPUs than processes, or all were sent to the same one.
    """
    alone = world_size() == 1
    if device.type != "cuda" or (alone and (device.index is not None or "LOCAL_RANK" not in os.environ)):
        return device
    if device.index is not None:
        raise ValueError(f"device: '{device}'; must be auto, cpu or cuda on several ranks: each takes a GPU of its own")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"device: 'cuda'; this machine has {count} CUDA device(s), too few for local rank {local}")
    return torch.device("cuda", local)


def parallel_options(
    split: str | None,
    batch: int | None,
    ring: int | None,
    ulysses: int | None,
    transport: str | None,
    timeout: float | None,
) -> ContextParallel | None:
    """What the options of a command ask for, None where nothing was given; None in a single process.

    Raises:
        ValueError: if the sizes do not make up the processes, or stand beside `auto`; or if anything is asked for in a
            single process.
    """
    world = world_size()
    given = {"batch": batch, "ring": ring, "ulysses": ulysses}
    sizes = {name: size for name, size in given.items() if size is not None}
    if world == 1:
        options = {"parallel": split, **sizes, "transport": transport, "timeout": timeout}
        if asked := [f"--{name}" for name, value in options.items() if value is not None]:
            raise ValueError(f"{', '.join(asked)}: has no effect in one process; start the command with torchrun")
        return None
    how = {"transport": transport or AUTO, "timeout": DEFAULT_TIMEOUT if timeout is None else timeout}
    if sizes and split is not None:
        raise ValueError(f"parallel: {split!r} beside {sizes}; give one or the other")
    if not sizes:
        return ContextParallel(AUTO, **how)
    parallel = ContextParallel(**sizes, **how)
    if parallel.world != world:
        raise ValueError(f"batch, ring, ulysses: {sizes} make up {parallel.world} rank(s); must be all {world}")
    return parallel


@contextmanager
def joined(device: torch.device, parallel: ContextParallel | None) -> Iterator[None]:
    """Inside, this process is part of the world that torchrun has started; nothing happens without `parallel`.

    After a RankFailure the world is ended rather than left: nobody waits for a rank that is gone.
    """
    if parallel is None:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=parallel.timeout),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    except RankFailure:
        with suppress(Exception):  # Backends differ in what they can end.
            if (world := dist.group.WORLD) is not None:
                world.abort()
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
