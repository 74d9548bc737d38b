"""Waiting for other ranks on the host, for so long and no longer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from para_kernels.parallel.failure import (
    LOOK_INTERVAL,
    RankFailure,
    abort,
    current_timeout,
    late,
    lost,
    raise_given_up,
    roll_call,
    why_given_up,
)


def wait(
    work: dist.Work | None, group: ProcessGroup, what: str, device: torch.device, ranks: Sequence[int] | None = None
) -> None:
    """Wait for a transfer: on the CPU for at most the current timeout, on CUDA by ordering the stream only.

    Args:
        what: names it, as in "K and V of rank 0".
        device: of what is transferred.
        ranks: ranks of `group` that it depends on, None for all others.

    Raises:
        RankFailure: if it did not come, naming this rank, `what`, the layer, and the ranks that do not answer.
    """
    if work is None:
        return
    if stream_ordered(group, device):
        work.wait()
        return
    timeout, started = current_timeout(), time.monotonic()
    try:
        work.wait(timedelta(seconds=timeout))
    except RuntimeError as error:
        waited = time.monotonic() - started
        text = late(group, what, waited) if waited >= 0.9 * timeout else lost(group, what, ranks)
        raise RankFailure(text + (why_given_up(group) or roll_call())) from error


def wait_for_collective(work: dist.Work, group: ProcessGroup, what: str, source: int) -> None:
    """Wait on the host, also on CUDA, until an asynchronous collective is done, for at most the current timeout.

    Args:
        what: names what it brings, as in "tile 3".
        source: the rank of `group` that it comes from.

    Raises:
        RankFailure: if it did not come, as from `wait`; or at once if a rank has said that it gives up.
    """
    timeout, started, pause = current_timeout(), time.monotonic(), 5e-5
    look = started + LOOK_INTERVAL
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 2e-3)
        now = time.monotonic()
        if now < look:
            continue
        look = now + LOOK_INTERVAL
        with _aborting(group):
            with contextlib.suppress(dist.DistError):  # A store that is gone does not say who else is.
                raise_given_up(group)
            if now - started > timeout:
                raise RankFailure(late(group, what, now - started) + roll_call())
    try:
        work.wait()
    except RuntimeError as error:
        with _aborting(group):
            with contextlib.suppress(dist.DistError):
                raise_given_up(group)
            raise RankFailure(lost(group, what, [source]) + roll_call()) from error


@contextlib.contextmanager
def _aborting(group: ProcessGroup) -> Iterator[None]:
    """Where a RankFailure comes out, the kernels of `group` that still wait are ended."""
    try:
        yield
    except RankFailure:
        abort(group)
        raise


def stream_ordered(group: ProcessGroup, device: torch.device) -> bool:
    """True where a wait only orders streams; gloo blocks the host, which then has to bound the wait."""
    return device.type == "cuda" and "nccl" in dist.get_backend(group)
