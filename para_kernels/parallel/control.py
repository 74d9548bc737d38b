"""Words in host memory that all ranks of a node share, by which the streams of their GPUs wait for each other.

A word is written by one rank's stream only (cuStreamWriteValue32), and counts epochs, one for each layer of the ring,
modulo 2**32; streams of any rank wait until it has reached an epoch (cuStreamWaitValue32). Nothing is ever reset.

    ready[r]    rank r's keys and values of this epoch lie in its slot; it has done with what it received before
    credit[r]   rank r has taken all pieces of this epoch: its peers may write over the slots that held them
    chunk[r][c] `host` only: chunk c of rank r's piece of this epoch lies in shared host memory

How waits end. In the good case by the writes above. Otherwise by a thread of each process, the watch, that does nothing
but read these words a few times per second. If the process whose word a stream waits for is gone, or nothing has moved
for `timeout` seconds, the watch says so in the shared `abort` words, then writes every word of every rank far past the
epochs in use, again and again: whoever waits, on any rank, goes on. It can, because the words lie in host memory, where
a processor reaches them without a queue of the GPU that may itself be blocked. What the streams then copy is garbage:
the abort stands in the shared memory before the first word is released, so a host that has waited for its device and
then asks (`RankFailure` from `check`, and from `progress.raise_on_failure`) knows. A kernel that waits for a flag of a
copy is released by the copies behind the released waits; and it waits for about `timeout` seconds only, whatever
happens, then fills its rows with NaN and writes its error words, which the watch reports in the same way.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels import ops
from para_kernels.parallel.agreement import exchange, raise_obstacles
from para_kernels.parallel.failure import RankFailure, current_timeout, global_rank, where
from para_kernels.parallel.progress import register_check, unregister_check

_LINE = 16  # words: 64 bytes, so that no two writers share a line
_READY, _CREDIT = 0, 1
_KINDS = 2
_ABORT_WORDS = 4  # aborted, rank that says so, epoch, 1 + rank that is missing
_FAR = 2**30  # past every epoch in use, and counted modulo 2**32 still ahead of them
PAGE = 4096


def signed(word: int) -> int:
    """A word as the int32 that has its bits."""
    return (word + 2**31) % 2**32 - 2**31


def node() -> str:
    """Names the running kernel of an operating system: processes that give the same can share memory."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


class SharedMemory:
    """`size` bytes that all ranks of `group` map, zeros at first; collective.

    Anonymous memory (memfd): it needs no room in /dev/shm and vanishes with the last process, however that ends.

    Raises:
        RankFailure, RuntimeError: on every rank, if some rank cannot map it.
    """

    def __init__(self, group: ProcessGroup, size: int, what: str) -> None:
        self.size = -(-size // PAGE) * PAGE
        fd, obstacle = -1, None
        if group.rank() == 0:
            try:
                fd = os.memfd_create(f"para_kernels {what}")
                os.posix_fallocate(fd, 0, self.size)
            except OSError as error:
                obstacle = f"{self.size} bytes of shared memory: {error}"
        pid, fd_of_0, obstacle_of_0 = exchange(group, [os.getpid(), fd, obstacle], f"shared memory of {what}")[0]
        if obstacle_of_0 is None and group.rank() != 0:
            try:
                fd = os.open(f"/proc/{pid}/fd/{fd_of_0}", os.O_RDWR)
            except OSError as error:
                obstacle = f"the shared memory of process {pid}: {error}"
        obstacles = exchange(group, obstacle, f"shared memory of {what}")
        if any(obstacles):
            if fd >= 0:
                os.close(fd)
            raise RuntimeError(f"ranks cannot share memory: {next(filter(None, obstacles))}")
        self._map = mmap.mmap(fd, self.size)
        os.close(fd)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)  # keeps the mapping as long as it lives
        self.address = self.bytes.data_ptr()
        self._registered: Any = None

    def register(self, library: str) -> int:
        """Pin the memory for the GPU of the current context; the address at which the GPU reaches it."""
        assert ops._C is not None
        self._registered = ops._C.RegisteredMemory(self.address, self.size, library)
        return self._registered.device_address

    def close(self) -> None:
        """Let go of the memory; no stream may use it any more."""
        self._registered = None


class Control:
    """The words of one group, and the watch over them.

    Args:
        chunks: how many words each rank has for chunks.
        error: int32 words of this rank's kernels (`ring_attention.Pieces.error`) are `error`.
    """

    def __init__(self, group: ProcessGroup, library: str, name: str, chunks: int = 0) -> None:
        self.group, self.name = group, name
        self.rank, self.world = group.rank(), group.size()
        self._chunks = chunks
        lines = _KINDS * self.world + 1 + self.world
        self._first_chunk = lines * _LINE
        words = self._first_chunk + self.world * chunks * _LINE
        self._memory = SharedMemory(group, 4 * words, f"{name} flags")
        self._words: Tensor = self._memory.bytes[: 4 * words].view(torch.int32)
        obstacle = None
        try:
            self._base = self._memory.register(library)
        except RuntimeError as error:
            obstacle = str(error).splitlines()[0]
        raise_obstacles(group, obstacle, f"{name} flags")
        self._pids: list[int] = exchange(group, os.getpid(), "process ids")
        self._issued: deque[tuple[int, str, float]] = deque(maxlen=1024)  # epoch, layer, timeout
        self.epoch = 0
        self.failure: str | None = None
        self._closed = threading.Event()
        self._check_name = f"{name}:{group.group_name}:{id(self)}"
        register_check(self._check_name, self.check)
        self._thread = threading.Thread(
            target=_watch, args=(weakref.ref(self), self._closed), name=f"para_kernels {name} watch", daemon=True
        )
        self._thread.start()

    # Addresses for the GPU.

    def ready(self, rank: int) -> int:
        return self._base + 4 * self._at(_READY, rank)

    def credit(self, rank: int) -> int:
        return self._base + 4 * self._at(_CREDIT, rank)

    def chunk(self, rank: int, chunk: int) -> int:
        assert chunk < self._chunks
        return self._base + 4 * (self._first_chunk + (rank * self._chunks + chunk) * _LINE)

    @property
    def error_address(self) -> int:
        return self._base + 4 * self._error_at

    @property
    def error_words(self) -> Tensor:
        """This rank's, as the host sees them."""
        return self._words[self._error_at : self._error_at + 4]

    def _at(self, kind: int, rank: int) -> int:
        return (kind * self.world + rank) * _LINE

    @property
    def _abort_at(self) -> int:
        return _KINDS * self.world * _LINE

    @property
    def _error_at(self) -> int:
        return (_KINDS * self.world + 1 + self.rank) * _LINE

    # What the host does for each layer.

    def next_epoch(self) -> int:
        """Count one more layer, under the timeout and the layer's name that hold now.

        Raises:
            RankFailure: a rank is missing.
        """
        self.check()
        self.epoch = (self.epoch + 1) % 2**32
        self._issued.append((self.epoch, where(), current_timeout()))
        return self.epoch

    def check(self) -> None:
        """Raise if some rank has given up: to be called before a result that came from a device is trusted.

        Raises:
            RankFailure: names rank and layer.
        """
        if self.failure is None and (int(self._words[self._abort_at]) or int(self.error_words[0])):
            self._look_for_failure()
        if self.failure is not None:
            raise RankFailure(self.failure)

    def await_taken(self) -> None:
        """Wait until every rank has taken all pieces of the epochs issued here; what they lie in may go then.

        To be called when this rank's device is done: the others then lack nothing to go on with. Without an error where
        a rank has failed or its process has ended, or after the timeout: nobody's result depends on it any more.
        """
        end = time.monotonic() + current_timeout()
        for rank in range(self.world):
            while self.failure is None and self._behind(_CREDIT, rank) > 0 and time.monotonic() < end:
                if not _is_running(self._pids[rank]):
                    break
                time.sleep(1e-3)

    def give_up(self, error: BaseException) -> None:
        """End all ranks: this one has failed in the middle of a layer."""
        if self.failure is None and not isinstance(error, RankFailure):
            me = global_rank(self.group, self.rank)
            self._tell(self.epoch, self.rank)
            self.failure = f"rank {me} failed in an earlier call: {type(error).__name__}: {error}"
            self._release_all()

    def close(self) -> None:
        """End the watch. The streams must be done with the words."""
        self._closed.set()
        unregister_check(self._check_name)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
        self._memory.close()

    # The watch.

    def _behind(self, kind: int, rank: int) -> int:
        """How many epochs a rank's word is behind the last one issued here."""
        return signed(self.epoch - int(self._words[self._at(kind, rank)]))

    def look(self, state: dict[str, Any]) -> None:
        """One look; `state` holds what the watch remembers between looks."""
        if self.failure is None:
            self._look_for_failure()
        if self.failure is not None:
            self._release_all()
            return
        packed, taken = self._behind(_READY, self.rank), self._behind(_CREDIT, self.rank)
        now = time.monotonic()
        progress = (packed - self.epoch, taken - self.epoch)
        if taken <= 0 or state.get("progress") != progress:
            state.update(progress=progress, since=now)
            return
        # Either own keys are there and others' are waited for, or the slot for own keys is still being read.
        if taken > packed:
            epoch = self.epoch - taken + 1
            missing = [r for r in range(self.world) if self._behind(_READY, r) >= taken]
            what = "K and V of"
        else:
            epoch = self.epoch - packed + 1
            missing = [r for r in range(self.world) if self._behind(_CREDIT, r) - 2 >= packed]
            what = "its K and V to be taken by"
        missing = [r for r in missing if r != self.rank]
        if not missing:  # all have announced theirs, but one may have stopped between its chunks
            missing = [r for r in range(self.world) if r != self.rank]
        layer, timeout = self._layer_of(epoch)
        gone = [r for r in missing if not _is_running(self._pids[r])]
        waited = now - state["since"]
        if gone or waited > timeout:
            self._abort(epoch, missing, gone, f"{what} {_names(self.group, missing)}{layer}", waited)

    def _layer_of(self, epoch: int) -> tuple[str, float]:
        for issued, layer, timeout in reversed(list(self._issued)):  # the main thread appends meanwhile
            if issued == epoch % 2**32:
                return layer or f" in ring call {epoch}", timeout
        return f" in ring call {epoch}", current_timeout()

    def _abort(self, epoch: int, missing: list[int], gone: list[int], what: str, waited: float) -> None:
        me = global_rank(self.group, self.rank)
        if gone:
            self.failure = f"rank {me} lost {_names(self.group, gone)}, whose process has ended, and waited for {what}"
        else:
            self.failure = f"rank {me} waited {waited:.3g} s for {what}"
        self._tell(epoch, (gone or missing)[0])
        self._release_all()
        print(f"para_kernels: {self.failure}", file=sys.stderr, flush=True)

    def _tell(self, epoch: int, missing: int) -> None:
        """Write the shared abort words, unless another rank has."""
        at = self._abort_at
        if not int(self._words[at]):
            self._words[at + 1] = self.rank
            self._words[at + 2] = signed(epoch)
            self._words[at + 3] = 1 + missing
            self._words[at] = 1

    def _look_for_failure(self) -> None:
        """Another rank's abort, or the error words of this rank's kernels."""
        me = global_rank(self.group, self.rank)
        aborted, by, epoch, missing = self._words[self._abort_at : self._abort_at + _ABORT_WORDS].tolist()
        if aborted:
            layer, _ = self._layer_of(epoch)
            gone = _names(self.group, [missing - 1])
            self.failure = f"rank {me} was ended by rank {global_rank(self.group, by)}, which missed {gone}{layer}"
            return
        piece, epoch, _, head = self.error_words.tolist()
        if piece:
            source = (self.rank + piece - 1) % self.world
            layer, timeout = self._layer_of(epoch)
            what = f"head {head} of K and V of {_names(self.group, [source])}{layer}, inside its kernel"
            self._abort(epoch, [source], [], what, timeout)

    def _release_all(self) -> None:
        far = signed(self.epoch + _FAR)
        for kind in range(_KINDS):
            for rank in range(self.world):
                self._words[self._at(kind, rank)] = far
        self._words[self._first_chunk :: _LINE] = far


def _watch(control: Callable[[], Control | None], closed: threading.Event) -> None:
    """The thread: it does not keep the control alive."""
    state: dict[str, Any] = {}
    pause = 0.2
    while not closed.wait(pause):
        watched = control()
        if watched is None:
            return
        watched.look(state)
        pause = 0.2 if watched.failure is None else 0.02
        del watched


def _is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError, OSError):
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # a zombie runs no more
    return False


def _names(group: ProcessGroup, ranks: list[int]) -> str:
    names = [str(global_rank(group, rank)) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names)}"
