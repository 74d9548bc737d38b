"""What goes wrong between ranks, found and named: differing settings, ranks that never arrive, ranks that die.

A wait that is bounded says who waited for whom, for what, and in which layer. On the CPU every wait is bounded by
itself. On CUDA the host never waits: a thread watches that what was enqueued gets done (`watch_progress`).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from datetime import timedelta
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

DEFAULT_TIMEOUT = 120.0

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


def _where() -> str:
    layer = _layer.get()
    return "" if layer is None else f" in layer {layer}"


def _ranks(ranks: Sequence[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def global_rank(group: ProcessGroup, rank: int) -> int:
    """The rank in the world of a rank of `group`: what users know, and what messages name."""
    return dist.get_global_rank(group, rank)


# --- waiting ----------------------------------------------------------------------------------------------------------


def wait(work: dist.Work | None, group: ProcessGroup, what: str, ranks: Sequence[int] | None = None) -> None:
    """Wait for a transfer: on the CPU for at most the current timeout, on CUDA by ordering the stream only.

    Args:
        what: names it, as in "K and V of rank 0".
        ranks: ranks of `group` that it depends on, None for all others.

    Raises:
        RankFailure: if it did not come, naming this rank, `what`, the layer, and the ranks it depends on.
    """
    if work is None:
        return
    if _stream_ordered(group):
        work.wait()
        return
    timeout, started = current_timeout(), time.monotonic()
    try:
        work.wait(timedelta(seconds=timeout))
    except RuntimeError as error:
        waited = time.monotonic() - started
        raise RankFailure(_message(group, what, waited, timed_out=waited >= 0.9 * timeout, ranks=ranks)) from error


def _message(
    group: ProcessGroup, what: str, waited: float, *, timed_out: bool, ranks: Sequence[int] | None = None
) -> str:
    me = global_rank(group, group.rank())
    if timed_out:
        return f"rank {me} waited {waited:.3g} s for {what}{_where()}"
    others = [rank for rank in range(group.size()) if rank != group.rank()] if ranks is None else ranks
    names = _ranks([global_rank(group, rank) for rank in others])
    one_of = "" if len(others) == 1 else "one of "
    return f"rank {me} lost {one_of}{names} while it waited for {what}{_where()}: the connection is closed"


def _stream_ordered(group: ProcessGroup) -> bool:
    """True where a wait only orders streams; a gloo group blocks the host, which then has to bound the wait."""
    return "nccl" in dist.get_backend(group)


# --- agreement --------------------------------------------------------------------------------------------------------

_rounds: dict[str, int] = {}


def exchange(group: ProcessGroup, value: object, what: str = "settings") -> list:
    """Every rank's `value`, in rank order, over the group's key-value store: between hosts, past all devices.

    Args:
        value: anything that JSON holds.
        what: what is waited for, for the message.

    Raises:
        RankFailure: if a rank does not come within the current timeout, naming all that did not.
    """
    if group.size() == 1:
        return [json.loads(json.dumps(value))]
    message = json.dumps(value)
    return _bounded(lambda: _exchange(group, message, what), group, f"the store, to exchange {what}")


def _exchange(group: ProcessGroup, message: str, what: str) -> list:
    rank = group.rank()
    store = dist.PrefixStore("para_kernels", group.get_group_store())
    name = f"{group.group_name}:{','.join(str(r) for r in dist.get_process_group_ranks(group))}"
    turn = _rounds[name] = _rounds.get(name, -1) + 1
    keys = [f"{name}:{turn}:{r}" for r in range(group.size())]
    try:
        store.set(keys[rank], message)
        _await_keys(store, keys, group, what)
        values = [json.loads(store.get(key)) for key in keys]
        # All ranks have written this turn, so all have read the one before.
        if turn:
            store.delete_key(f"{name}:{turn - 1}:{rank}")
    except dist.DistError as error:
        raise RankFailure(_message(group, f"the {what} of the other ranks", 0.0, timed_out=False)) from error
    return values


def _bounded(work: Callable[[], list], group: ProcessGroup, what: str) -> list:
    """`work()` in a thread that is given up when it does not end: a store whose host has stopped never answers."""
    outcome: SimpleQueue[list | BaseException] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put(work())
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=copy_context().run, args=(run,), name="para_kernels exchange", daemon=True).start()
    limit = current_timeout() * 1.1 + 1.0  # `work` bounds itself and names more.
    try:
        result = outcome.get(timeout=limit)
    except Empty:
        raise RankFailure(_message(group, what, limit, timed_out=True)) from None
    if isinstance(result, BaseException):
        raise result
    return result


def _await_keys(store: dist.Store, keys: list[str], group: ProcessGroup, what: str) -> None:
    """Look, rather than wait: a wait would keep the store from other threads, such as NCCL's watchdog."""
    timeout, started, pause = current_timeout(), time.monotonic(), 1e-4
    while not store.check(keys):
        waited = time.monotonic() - started
        if waited > timeout:
            absent = [global_rank(group, rank) for rank, key in enumerate(keys) if not store.check([key])]
            if absent:
                raise RankFailure(_message(group, f"the {what} of {_ranks(absent)}", waited, timed_out=True))
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def check_agreement(
    group: ProcessGroup,
    settings: Mapping[str, object],
    *,
    problem: str | None = None,
    own: object = None,
    what: str = "settings",
) -> list:
    """Make sure that all ranks have the same `settings` (names to values that JSON holds), before anything is launched.

    Args:
        problem: what is wrong on this rank already, so that no other rank waits for it.
        own: something that may differ between ranks.

    Returns:
        What every rank gave as `own`, in rank order.

    Raises:
        ValueError: on every rank, for the problem of a rank, or naming the first setting that differs, its values, and
            the ranks that differ from the majority (of equals, from the one that the lowest rank belongs to).
        RankFailure: if a rank does not come.
    """
    everyone = exchange(group, [dict(settings), problem, own], what)
    _raise_problems(group, [theirs for _, theirs, _ in everyone])
    _raise_differences(group, [theirs for theirs, _, _ in everyone])
    return [theirs for _, _, theirs in everyone]


def _raise_problems(group: ProcessGroup, problems: Sequence[str | None]) -> None:
    mine = problems[group.rank()]
    if mine is not None:
        raise ValueError(mine)
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise ValueError(f"{problem} (on rank {global_rank(group, rank)})")


def _raise_differences(group: ProcessGroup, everyone: Sequence[Mapping[str, object]]) -> None:
    for name in dict.fromkeys(name for one in everyone for name in one):
        values = [json.dumps(one.get(name)) for one in everyone]
        usual = max(values, key=values.count)  # The first of equals: of the lowest rank.
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            theirs = ", ".join(f"{values[rank]} on rank {global_rank(group, rank)}" for rank in odd)
            raise ValueError(f"{name}: got {theirs}, must be {usual} as on the other ranks")


# --- CUDA: progress ---------------------------------------------------------------------------------------------------


class ProgressWatch:
    """Watches marks that are put into a stream and must be reached one after the other.

    Not the age of a mark counts but how long none has been reached while one is due: the host may run minutes ahead
    of the device.

    Args:
        on_failure: called once, from the watching thread, with the message.
        interval: seconds between two looks.
    """

    def __init__(self, on_failure: Callable[[str], None], interval: float = 0.5) -> None:
        self.failure: str | None = None
        self._on_failure = on_failure
        self._interval = interval
        self._marks: deque[tuple[Callable[[], bool], str, float]] = deque()
        self._due_since = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def mark(self, reached: Callable[[], bool], message: str, timeout: float) -> None:
        """`message` names what is not there if `reached()` stays False for `timeout` seconds."""
        if not self._marks:
            self._due_since = time.monotonic()
        self._marks.append((reached, message, timeout))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="para_kernels progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self.look()
            if self.failure is not None:
                return

    def look(self) -> None:
        """One look at what has been reached."""
        while self._marks and self._marks[0][0]():
            self._marks.popleft()
            self._due_since = time.monotonic()
        if self._marks and time.monotonic() - self._due_since > self._marks[0][2]:
            self.failure = self._marks[0][1]
            self._on_failure(self.failure)


_watches: dict[str, ProgressWatch] = {}


def watch_progress(group: ProcessGroup, what: str) -> None:
    """CUDA: from here on, what the current stream holds must be done in time, or the group is ended.

    Costs an event. The message is printed and every rank's waiting kernels of `group` are ended, so that the host comes
    back from where it waits for the device; `raise_on_failure` then tells that what was computed is worthless.
    """
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return
    raise_on_failure()
    if group.group_name not in _watches:
        _watches[group.group_name] = ProgressWatch(lambda message: _end_group(group, message))
    event = torch.cuda.Event()
    event.record()
    timeout = current_timeout()
    message = _message(group, what, timeout, timed_out=True)
    _watches[group.group_name].mark(event.query, message, timeout)


def raise_on_failure() -> None:
    """Raise if a watched rank has failed: to be called before a result that came from a device is trusted.

    Raises:
        RankFailure: names rank and layer.
    """
    for watch in _watches.values():
        if watch.failure is not None:
            raise RankFailure(watch.failure)


def _end_group(group: ProcessGroup, message: str) -> None:
    print(f"para_kernels: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        group.abort()
