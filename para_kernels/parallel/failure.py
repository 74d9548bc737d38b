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
from typing import TypeVar
from weakref import WeakKeyDictionary, finalize, ref

import torch
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


# --- waiting ----------------------------------------------------------------------------------------------------------


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
        text = _late(group, what, waited) if waited >= 0.9 * timeout else _lost(group, what, ranks)
        raise RankFailure(text + (_why_given_up(group) or roll_call())) from error


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
                _raise_given_up(group)
            if now - started > timeout:
                raise RankFailure(_late(group, what, now - started) + roll_call())
    try:
        work.wait()
    except RuntimeError as error:
        with _aborting(group):
            with contextlib.suppress(dist.DistError):
                _raise_given_up(group)
            raise RankFailure(_lost(group, what, [source]) + roll_call()) from error


@contextlib.contextmanager
def _aborting(group: ProcessGroup) -> Iterator[None]:
    """Where a RankFailure comes out, the kernels of `group` that still wait are ended."""
    try:
        yield
    except RankFailure:
        _abort(group)
        raise


def stream_ordered(group: ProcessGroup, device: torch.device) -> bool:
    """True where a wait only orders streams; gloo blocks the host, which then has to bound the wait."""
    return device.type == "cuda" and "nccl" in dist.get_backend(group)


def _late(group: ProcessGroup, what: str, waited: float) -> str:
    return f"rank {global_rank(group, group.rank())} waited {waited:.3g} s for {what}{where()}"


def _lost(group: ProcessGroup, what: str, ranks: Sequence[int] | None = None) -> str:
    others = other_ranks(group) if ranks is None else [global_rank(group, rank) for rank in ranks]
    one_of = "" if len(others) == 1 else "one of "
    return (
        f"rank {global_rank(group, group.rank())} lost the connection to {one_of}{named(others)}"
        f" while it waited for {what}{where()}"
    )


def roll_call() -> str:
    """Called by a rank that has failed: which ranks are not failing too, as the end of a message.

    Who waits for whom makes a chain or a knot that says little about where it began. All ranks that still run come
    here at about the same time; the one that does not is the one to look at. Takes 1 ... 5 s; empty where the store
    does not answer.
    """
    try:
        absent = _in_thread(_absent_ranks, _grace() + 1.0)
    except (RuntimeError, TimeoutError):
        return ""
    return f"; no sign of {named(absent)}" if absent else ""


def _grace() -> float:
    """Seconds that ranks get to be seen, once one has failed: those that fail too do so at about the same time."""
    return min(5.0, max(1.0, current_timeout() / 4))


def _absent_ranks() -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    store = dist.PrefixStore("para_kernels/roll_call", group.get_group_store())
    store.set(str(group.rank()), "here")
    keys = [str(rank) for rank in range(group.size())]
    end = time.monotonic() + _grace()
    while time.monotonic() < end and not store.check(keys):
        time.sleep(0.02)
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _in_thread(work: Callable[[], Result], limit: float) -> Result:
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
        _in_thread(lambda: _told(group).set("why", reason), _STORE_SECONDS)


def _why_given_up(group: ProcessGroup) -> str:
    """What a rank that left has said, as the end of a message; empty where none has."""
    try:
        _in_thread(lambda: _raise_given_up(group), _STORE_SECONDS)
    except RankFailure as failure:
        return f"; {failure}"
    except (RuntimeError, TimeoutError):
        pass
    return ""


def _raise_given_up(group: ProcessGroup) -> None:
    store = _told(group)
    if store.check(["why"]):
        raise RankFailure(store.get("why").decode())


def _told(group: ProcessGroup) -> dist.Store:
    return dist.PrefixStore(f"para_kernels/gave_up/{group.group_name}", group.get_group_store())


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
    # The thread bounds itself, by all but a store that stopped, and can name who is missing.
    limit = current_timeout() + _grace() + 1.0
    try:
        return _in_thread(lambda: _exchange(group, message, what), limit)
    except TimeoutError:
        text = _late(group, f"the store, for the {what} of {named(other_ranks(group))}", limit)
    except dist.DistError:
        text = _lost(group, f"the {what} of {named(other_ranks(group))}")
    raise RankFailure(text + roll_call())


def _exchange(group: ProcessGroup, message: str, what: str) -> list:
    rank = group.rank()
    store = dist.PrefixStore("para_kernels", group.get_group_store())
    name = f"{group.group_name}:{','.join(str(r) for r in dist.get_process_group_ranks(group))}"
    turn = _rounds[name] = _rounds.get(name, -1) + 1
    keys = [f"{name}:{turn}:{r}" for r in range(group.size())]
    store.set(keys[rank], message)
    _await_keys(store, keys, group, what)
    values = [json.loads(store.get(key)) for key in keys]
    # All ranks have written this turn, so all have read the one before.
    if turn:
        with contextlib.suppress(dist.DistError):  # Whoever hosts the store may have gone, this turn is complete.
            store.delete_key(f"{name}:{turn - 1}:{rank}")
    return values


def _await_keys(store: dist.Store, keys: list[str], group: ProcessGroup, what: str) -> None:
    """Look, rather than wait: a wait would keep the store from other threads, such as NCCL's watchdog."""
    timeout, started, pause = current_timeout(), time.monotonic(), 1e-4
    look = LOOK_INTERVAL
    while not store.check(keys):
        waited = time.monotonic() - started
        if waited > look:
            look = waited + LOOK_INTERVAL
            _raise_given_up(group)
        absent = [] if waited < timeout else [rank for rank, key in enumerate(keys) if not store.check([key])]
        if absent:
            names = named([global_rank(group, rank) for rank in absent])
            raise RankFailure(_late(group, f"the {what} of {names}", waited) + roll_call())
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def raise_obstacles(group: ProcessGroup, obstacle: str | None, what: str) -> None:
    """Make what stands in the way of one rank the error of all, so that none waits for it.

    Raises:
        RuntimeError: on every rank, with the first obstacle and its rank.
        RankFailure: if a rank does not come.
    """
    for rank, theirs in enumerate(exchange(group, obstacle, what)):
        if theirs is not None:
            raise RuntimeError(f"{what}: rank {global_rank(group, rank)}: {theirs}")


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
    try:
        _raise_problems(group, [theirs for _, theirs, _ in everyone])
        _raise_differences(group, [theirs for theirs, _, _ in everyone])
    except ValueError:
        # A rank that ends now may host the store that others are still to read the reason from.
        with contextlib.suppress(RankFailure), deadline(min(5.0, current_timeout())):
            exchange(group, None, what)
        raise
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


# By the group itself: a group that is made after another was destroyed may have its name.
_watches: WeakKeyDictionary[ProcessGroup, ProgressWatch] = WeakKeyDictionary()
_checks: dict[str, Callable[[], None]] = {}


def register_check(name: str, check: Callable[[], None]) -> None:
    """Have `raise_on_failure` call `check` as well, which raises a RankFailure; one of the same name is replaced."""
    _checks[name] = check


def unregister_check(name: str) -> None:
    """Call it no longer."""
    _checks.pop(name, None)


def watch_progress(group: ProcessGroup, what: str) -> None:
    """CUDA: from here on, what the current stream holds must be done in time, or the group is ended.

    Costs an event. The message is printed and every rank's waiting kernels of `group` are ended, so that the host comes
    back from where it waits for the device; `raise_on_failure` then tells that what was computed is worthless.
    """
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return
    raise_on_failure()
    event = torch.cuda.Event()
    event.record()
    timeout = current_timeout()
    _watch_of(group).mark(event.query, _late(group, what, timeout), timeout)


def _watch_of(group: ProcessGroup) -> ProgressWatch:
    """The watch of a group; it ends with the group, and does not keep it."""
    if group not in _watches:
        known = ref(group)
        watch = ProgressWatch(lambda message: _end_group(known(), message))
        finalize(group, watch.close)
        _watches[group] = watch
    return _watches[group]


def raise_on_failure() -> None:
    """Raise if a watched rank has failed: to be called before a result that came from a device is trusted.

    Raises:
        RankFailure: names rank and layer.
    """
    for watch in list(_watches.values()):
        if watch.failure is not None:
            raise RankFailure(watch.failure)
    for check in list(_checks.values()):
        check()


def _end_group(group: ProcessGroup | None, message: str) -> None:
    print(f"para_kernels: {message}{roll_call()}", file=sys.stderr, flush=True)
    if group is not None:
        _abort(group)


def _abort(group: ProcessGroup) -> None:
    """End the kernels of a group that wait for a rank, so that nothing waits for them in turn. Gloo has none."""
    with contextlib.suppress(Exception):
        if "nccl" in dist.get_backend(group):
            group.abort()
