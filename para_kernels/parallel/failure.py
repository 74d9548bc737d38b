"""What goes wrong between ranks, named: ranks that never arrive, ranks that die, and ranks that give up.

A message says who waited for whom, for what, and in which layer, and which ranks give no sign any more. What waits is
bounded by `deadline`: on the CPU by itself (waiting.py), on CUDA, where the host does not wait, by a thread
(progress.py).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

DEFAULT_TIMEOUT = 120.0

Result = TypeVar("Result")

_timeout: ContextVar[float] = ContextVar("para_kernels_timeout", default=DEFAULT_TIMEOUT)
_layer: ContextVar[int | str | None] = ContextVar("para_kernels_layer", default=None)


class RankFailure(RuntimeError):  # noqa: N818 - a failure of a rank, not of the code that found it
    """A rank that died, or that did not arrive in time. The process groups cannot be used any more."""


# --- what messages say ------------------------------------------------------------------------------------------------


def check_timeout(timeout: object) -> None:
    """Raise a ValueError unless `timeout` is a finite number of seconds above 0."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout: got {timeout!r}, must be a finite number of seconds > 0")


def current_timeout() -> float:
    """Seconds that a wait for another rank may take."""
    return _timeout.get()


@contextlib.contextmanager
def deadline(timeout: float) -> Iterator[None]:
    """Bound every wait inside by `timeout` seconds.

    Raises:
        ValueError: for a timeout that is not a finite number above 0.
    """
    check_timeout(timeout)
    token = _timeout.set(float(timeout))
    try:
        yield
    finally:
        _timeout.reset(token)


def set_layer(layer: int | str | None) -> None:
    """Name the layer that runs now, for messages; None outside of layers. Costs nothing."""
    _layer.set(layer)


def where() -> str:
    """ " in layer 7", or nothing outside of layers: the end of a message."""
    layer = _layer.get()
    return "" if layer is None else f" in layer {layer}"


def named(ranks: Sequence[int]) -> str:
    """Ranks of the world as a message names them."""
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def global_rank(group: ProcessGroup, rank: int) -> int:
    """The rank in the world of a rank of `group`: what users know, and what messages name."""
    return dist.get_global_rank(group, rank)


def other_ranks(group: ProcessGroup) -> list[int]:
    """The ranks in the world of all others of `group`."""
    return [rank for rank in dist.get_process_group_ranks(group) if rank != global_rank(group, group.rank())]


def late(group: ProcessGroup, what: str, waited: float) -> str:
    """That this rank has waited for `what` so many seconds."""
    return f"rank {global_rank(group, group.rank())} waited {waited:.3g} s for {what}{where()}"


def lost(group: ProcessGroup, what: str, ranks: Sequence[int] | None = None) -> str:
    """That `what` cannot come any more, from these ranks of `group`; None: from any of the others."""
    others = other_ranks(group) if ranks is None else [global_rank(group, rank) for rank in ranks]
    one_of = "" if len(others) == 1 else "one of "
    return (
        f"rank {global_rank(group, group.rank())} lost the connection to {one_of}{named(others)}"
        f" while it waited for {what}{where()}"
    )


# --- who is left ------------------------------------------------------------------------------------------------------


def roll_call() -> str:
    """Called by a rank that has failed: which ranks are not failing too, as the end of a message.

    Who waits for whom makes a chain or a knot that says little about where it began. All ranks that still run come
    here at about the same time; the one that does not is the one to look at. Takes 1 ... 5 s; empty where the store
    does not answer.
    """
    try:
        absent = in_thread(_absent_ranks, grace() + 1.0)
    except (RuntimeError, TimeoutError):
        return ""
    return f"; no sign of {named(absent)}" if absent else ""


def grace() -> float:
    """Seconds that ranks get to be seen, once one has failed: those that fail too do so at about the same time."""
    return min(5.0, max(1.0, current_timeout() / 4))


def _absent_ranks() -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    store = dist.PrefixStore("para_kernels/roll_call", group.get_group_store())
    store.set(str(group.rank()), "here")
    keys = [str(rank) for rank in range(group.size())]
    end = time.monotonic() + grace()
    while time.monotonic() < end and not store.check(keys):
        time.sleep(0.02)
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def in_thread(work: Callable[[], Result], limit: float) -> Result:
    """`work()` in a thread that is given up after `limit` seconds: a store whose host has stopped never answers.

    Raises:
        TimeoutError: if it was given up.
    """
    outcome: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=copy_context().run, args=(run,), name="para_kernels exchange", daemon=True).start()
    try:
        result, error = outcome.get(timeout=limit)
    except Empty:
        raise TimeoutError(f"nothing within {limit} s") from None
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType] - without an error there is a result


# --- giving up --------------------------------------------------------------------------------------------------------

LOOK_INTERVAL = 0.25  # seconds between two looks at whether another rank has given up
_STORE_SECONDS = 2.0  # for a word to a store that may have stopped


def give_up(group: ProcessGroup, error: BaseException) -> None:
    """Tell the others why this rank leaves what the ranks of `group` are doing together: they end at once.

    Nothing is told of a RankFailure, which they find themselves. The group cannot be used any more.
    """
    if isinstance(error, RankFailure) or group.size() == 1:
        return
    reason = f"rank {global_rank(group, group.rank())} gave up: {type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError, TimeoutError):
        in_thread(lambda: _told(group).set("why", reason), _STORE_SECONDS)


def why_given_up(group: ProcessGroup) -> str:
    """What a rank that left has said, as the end of a message; empty where none has."""
    try:
        in_thread(lambda: raise_given_up(group), _STORE_SECONDS)
    except RankFailure as failure:
        return f"; {failure}"
    except (RuntimeError, TimeoutError):
        pass
    return ""


def raise_given_up(group: ProcessGroup) -> None:
    """Raise a RankFailure with the words of a rank that left, if one has."""
    store = _told(group)
    if store.check(["why"]):
        raise RankFailure(store.get("why").decode())


def _told(group: ProcessGroup) -> dist.Store:
    return dist.PrefixStore(f"para_kernels/gave_up/{group.group_name}", group.get_group_store())


def abort(group: ProcessGroup) -> None:
    """End the kernels of a group that wait for a rank, so that nothing waits for them in turn. Gloo has none."""
    with contextlib.suppress(Exception):
        if "nccl" in dist.get_backend(group):
            group.abort()
