"""When the steps of a call ran and how long they took, without ever making the host wait for the device."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import torch

from para_kernels.cache import StepRecord


class _HostClock:
    """Wall time from construction to `stop`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._start

    @property
    def ms(self) -> float:
        return self._seconds * 1e3


class _CudaClock:
    """Time on a CUDA device's current stream from construction to `stop`; asking for it waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._start.record(self._stream)

    def stop(self) -> None:
        self._end.record(self._stream)

    @property
    def ms(self) -> float:
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


class Timeline:
    """The steps of the current call, or of the last one until the next begins."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new call begins."""
        self._steps: list[tuple[StepRecord, _HostClock | _CudaClock]] = []
        self._forwards: Counter[str] = Counter()
        self._running: _HostClock | _CudaClock | None = None

    def start(self, device: torch.device) -> None:
        """A forward begins. One that was started and never stopped has failed and is not counted."""
        self._running = _CudaClock(device) if device.type == "cuda" else _HostClock()

    def stop(self, branch: str, decision: StepRecord | None) -> None:
        """The forward is over; `decision` is what the cache made of it, None without a cache."""
        if self._running is None:
            return
        self._running.stop()
        step = self._forwards[branch]
        self._forwards[branch] += 1
        self._steps.append((decision or StepRecord(step, branch, diff=None, reused=False), self._running))
        self._running = None

    @property
    def records(self) -> list[StepRecord]:
        """One record per forward, with its time. On CUDA this waits for the last step to end."""
        return [replace(record, ms=clock.ms) for record, clock in self._steps]
