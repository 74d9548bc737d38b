"""What the ranks of a group tell each other on the host: what they are about to do, that they live, why they stopped.

It goes through the store with which the processes found each other, so no device waits for it, and a silent rank is
known by name.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

SLICE = 0.5  # seconds between two looks at whether another rank has given up
ROLL_CALL = 5.0  # seconds in which a rank that is alive answers; one that computes on a CPU answers after its tile
STORE_GONE = "the process that keeps the store (rank 0 or the launcher) is gone"
_groups: Counter[str] = Counter()


class PeerError(RuntimeError):
    """Another rank failed, died or never arrived; the message names it. The process group is of no use any more."""


class Peers:
    """The ranks of one group, with a channel of their own: the n-th of a group talks to the n-th of every other rank.

    Args:
        group: the process group; `RuntimeError` where this process is not in it.
        timeout: seconds without a sign of life after which a rank counts as lost.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.group = group
        self.timeout = timeout
        self.ranks = dist.get_process_group_ranks(group)
        self.index = dist.get_rank(group)
        members = ".".join(map(str, self.ranks))
        self._store = dist.PrefixStore(f"para_kernels/vae/{members}/{_groups[members]}", _get_default_store())
        _groups[members] += 1
        self._call = 0
        self._signs = 0

    @property
    def rank(self) -> int:
        """This process, as the world counts it."""
        return self.ranks[self.index]

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)

    def begin_call(self) -> None:
        """What is told from here on belongs to the next call, which every rank must make."""
        self._call += 1

    def exchange(self, topic: str, text: str, what: str) -> list[str]:
        """Every rank's `text`, in rank order; returns when all have told theirs.

        Raises:
            PeerError: a rank gave up, or told nothing within `timeout` seconds. It says that `what` is missing.
        """
        self.tell(topic, text)
        return self.told(topic, what)

    def tell(self, topic: str, text: str) -> None:
        """Say something under `topic`, and wait for nobody."""
        self._store.set(self._key(topic, self.index), text)

    def told(self, topic: str, what: str) -> list[str]:
        """What every rank has told under `topic`, in rank order; waits for it. Raises as `exchange`."""
        keys = [self._key(topic, index) for index in range(self.world)]
        end = time.monotonic() + self.timeout
        while not self._appeared(keys, min(SLICE, self.timeout)):
            self._raise_if_given_up()
            if time.monotonic() > end:
                raise PeerError(f"{_names(self._missing(keys))} gave no {what} within {self.timeout:g} s")
        return [self._store.get(key).decode() for key in keys]

    def forget_last_call(self) -> None:
        """Clear away what this rank told in the last call. To be called after an exchange in this one."""
        last = self._call - 1
        with suppress(RuntimeError):  # a store of files cannot
            for topic in ("plan", "work", "here"):
                self._store.delete_key(f"{last}/{topic}/{self.index}")

    def give_up(self, error: BaseException) -> None:
        """Tell the others why this rank leaves the call. The first word counts."""
        reason = f"rank {self.rank} gave up: {type(error).__name__}: {error}"
        with suppress(RuntimeError):
            self._store.compare_set(f"{self._call}/gave_up", "", reason)

    def sign(self) -> None:
        """A sign of life, for those who wait for this rank."""
        self._signs += 1
        self._store.set(f"sign/{self.index}", str(self._signs))
        self._answer_roll_call()

    def wait(self, transfer: Any, source: int, what: str) -> None:
        """Wait until `transfer`, a `torch.distributed` work whose data the rank with index `source` sends, is done.

        Raises:
            PeerError: a rank gave up or is gone, or `source` gave no sign for `timeout` seconds.
        """
        pause, seen = 5e-5, b""
        end = time.monotonic() + self.timeout
        look = time.monotonic() + SLICE
        while not transfer.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)
            if (now := time.monotonic()) < look:
                continue
            look = now + SLICE
            self._raise_if_given_up()
            if (sign := self._last_sign(source)) != seen:
                seen, end = sign, now + self.timeout
            if now > end:
                raise self._lost(f"rank {self.ranks[source]} gave no {what} within {self.timeout:g} s")
        try:
            transfer.wait()
        except RuntimeError as error:
            raise self._lost(f"the transfer of {what} of rank {self.ranks[source]} failed") from error

    def _key(self, topic: str, index: int) -> str:
        return f"{self._call}/{topic}/{index}"

    def _appeared(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are there within `seconds`. The store's own `wait` would print a warning when it ends."""
        pause, end = 1e-4, time.monotonic() + seconds
        try:
            while not self._store.check(keys):
                if time.monotonic() > end:
                    return False
                time.sleep(pause)
                pause = min(2 * pause, 1e-2)
        except dist.DistError as error:
            raise PeerError(STORE_GONE) from error
        return True

    def _raise_if_given_up(self) -> None:
        self._answer_roll_call()
        key = f"{self._call}/gave_up"
        try:
            reason = self._store.get(key).decode() if self._store.check([key]) else ""
        except dist.DistError as error:
            raise PeerError(STORE_GONE) from error
        if reason:
            raise PeerError(reason)

    def _answer_roll_call(self) -> None:
        with suppress(dist.DistError):
            if self._store.check([f"{self._call}/roll_call"]):
                self.tell("here", "")

    def _last_sign(self, index: int) -> bytes:
        key = f"sign/{index}"
        try:
            return self._store.get(key) if self._store.check([key]) else b""
        except dist.DistError:
            return b""

    def _lost(self, what: str) -> PeerError:
        """The error for `what`, with the names of those who do not answer a roll call."""
        try:
            self._store.set(f"{self._call}/roll_call", "")
            self._raise_if_given_up()
            keys = [self._key("here", index) for index in range(self.world)]
            silent = [] if self._appeared(keys, ROLL_CALL) else self._missing(keys)
        except (PeerError, dist.DistError) as error:
            return PeerError(f"{what}; {error if isinstance(error, PeerError) else STORE_GONE}")
        return PeerError(f"{what}; " + (f"no sign of life from {_names(silent)}" if silent else "all ranks are alive"))

    def _missing(self, keys: list[str]) -> list[int]:
        return [rank for rank, key in zip(self.ranks, keys, strict=True) if not self._store.check([key])]


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
