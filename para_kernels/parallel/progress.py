"""CUDA: a thread watches that what was enqueued gets done, since the host never waits for it."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch.distributed import ProcessGroup

from para_kernels.parallel.failure import RankFailure, abort, current_timeout, late, roll_call


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
    _watch_of(group).mark(event.query, late(group, what, timeout), timeout)


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
        abort(group)
