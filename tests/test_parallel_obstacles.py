"""What stands in the way of one rank becomes known to all, soon and by name."""

from __future__ import annotations

import gc
import time

import pytest
import torch
import torch.distributed as dist
from ranks import launch

from para_kernels.parallel import attention, deadline, progress, ring_attention, transport, waiting
from para_kernels.parallel.agreement import raise_obstacles
from para_kernels.parallel.failure import RankFailure
from para_kernels.parallel.progress import raise_on_failure
from para_kernels.parallel.waiting import wait_for_collective


def world_of_one() -> dist.ProcessGroup:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    group = dist.group.WORLD
    assert group is not None
    return group


def test_a_failure_ends_with_its_group() -> None:
    """A new group has the name of the one before it, and not its failure."""
    group = world_of_one()
    try:
        watch = progress._watch_of(group)
        assert progress._watch_of(group) is watch
        watch.failure = "rank 0 waited"
        with pytest.raises(RankFailure, match="rank 0 waited"):
            raise_on_failure()
        name = group.group_name
        del group
    finally:
        dist.destroy_process_group()
    gc.collect()
    group = world_of_one()
    try:
        assert group.group_name == name
        raise_on_failure()
        assert watch._closed.is_set()
        assert progress._watch_of(group) is not watch
    finally:
        dist.destroy_process_group()


class NeverDone:
    """A collective that a rank does not join."""

    def is_completed(self) -> bool:
        return False


@pytest.mark.parametrize(("backend", "ended"), [("nccl", 1), ("gloo", 0)])
def test_kernels_that_wait_for_a_late_rank_are_ended(monkeypatch: pytest.MonkeyPatch, backend: str, ended: int) -> None:
    group = world_of_one()
    calls = []
    try:
        monkeypatch.setattr(waiting.dist, "get_backend", lambda group: backend)
        monkeypatch.setattr(type(group), "abort", lambda self: calls.append(self))
        with deadline(0.3), pytest.raises(RankFailure, match=r"waited .* for tile 3"):
            wait_for_collective(NeverDone(), group, "tile 3", 0)  # pyright: ignore[reportArgumentType]
        assert len(calls) == ended
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


def out_of_memory(rank: int, world: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    try:
        raise_obstacles(group, "OutOfMemoryError: no 3 GiB" if rank == 1 else None, "memory of the ring")
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_obstacle_of_one_rank_is_raised_on_all() -> None:
    said = "RuntimeError: memory of the ring: rank 1: OutOfMemoryError: no 3 GiB"
    assert launch(2, out_of_memory) == [said, said]


class Standin:
    """For the transport that is always there: it asks CUDA for streams."""

    name = "collective"

    def __init__(self, group: object, device: object) -> None:
        pass


def refused(rank: int, world: int, forced: str) -> tuple[str, str]:
    """Every candidate seems usable, and then is refused what it needs."""
    group = dist.group.WORLD
    assert group is not None

    def make(candidate: object, group: object, device: object) -> None:
        raise RuntimeError("ranks cannot share memory: Permission denied")

    transport._obstacle = lambda candidate, group, device: None
    transport.CollectiveTransport = Standin  # pyright: ignore[reportAttributeAccessIssue]
    transport._make = make  # pyright: ignore[reportAttributeAccessIssue]
    try:
        chosen = transport.selection(group, torch.device("cuda"), forced)
    except ValueError as error:
        return "ValueError", str(error)
    return chosen.transport.name, chosen.reason


def test_auto_falls_back_where_memory_cannot_be_shared() -> None:
    for name, reason in launch(2, refused, "auto"):
        assert name == "collective"
        assert reason == "; ".join(
            f"no {one}: ranks cannot share memory: Permission denied" for one in ("peer", "host")
        )
    for name, message in launch(2, refused, "peer"):
        assert name == "ValueError"
        assert "cannot share memory" in message


def bad_arguments(rank: int, world: int, who: str) -> tuple[str, str, float]:
    """The second call is wrong on some ranks; what each is told, what the third call gives, and seconds of the second.

    A rank that was wrong stays, as one does that goes on after an error.
    """
    attention._SECONDS_TO_COMPARE = 0.5
    q = torch.ones(1, 3, 2, 8)
    ring_attention(q, q, q, mesh=dist.group.WORLD, lengths=[3] * world)
    told, started = "nothing", time.monotonic()
    try:
        with deadline(2.0):
            k = q[:, :2] if who == "all" or rank == 1 else q
            ring_attention(q, k, k, mesh=dist.group.WORLD, lengths=[3] * world)
    except (ValueError, RankFailure) as error:
        told = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    if who == "all":
        out = ring_attention(q, q, q, mesh=dist.group.WORLD, lengths=[3] * world)
        return told, str(float(out.sum())), seconds
    time.sleep(3.0)
    return told, "", seconds


def test_a_rank_with_bad_arguments_tells_those_who_have_begun() -> None:
    (told, _, seconds), (own, _, _) = launch(2, bad_arguments, "one")
    assert own.startswith("ValueError: k: got 2 rows, must be the 3 of q")
    assert told.startswith("RankFailure: rank 0 ")
    assert "rank 1 gave up: ValueError: k: got 2 rows" in told
    assert seconds < 10


def test_arguments_that_are_bad_on_all_ranks_leave_them_whole() -> None:
    for told, total, _ in launch(2, bad_arguments, "all"):
        assert told.startswith("ValueError: k: got 2 rows, must be the 3 of q")
        assert float(total) == pytest.approx(48.0)
