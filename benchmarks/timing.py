"""Fair times: every candidate in turn, the cache flushed before each call, the median counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

# Longer than any call here keeps the host busy (about 0.2 ms): the device must find the call already queued, or the gap
# before it would be counted. What the host takes is measured by itself, in `host_microseconds`.
HEAD_START_CYCLES = 1_000_000
FLUSH_BYTES = 256 * 2**20  # several times the largest L2 (50 MB on an H100, 60 MB on an H200)


def medians_ms(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 20,
    seconds: float = 4.0,
    warmup: int = 2,
) -> dict[str, float]:
    """Median time of each candidate in milliseconds.

    Candidates take turns, so that a clock that drops drops for all of them. On CUDA each call is timed by its own pair
    of events, after a write of 256 MB that empties the L2 cache, and is queued before the device gets to it.

    Args:
        candidates: functions of no arguments by name.
        device: where they run.
        rounds: calls of each, at most.
        seconds: stop after about so much time, but never before three rounds.
        warmup: calls of each that are not timed (compilation, planning).
    """
    for candidate in candidates.values():
        for _ in range(warmup):
            candidate()
    if device.type == "cuda":
        return _cuda_medians(candidates, device, rounds, seconds)
    return _host_medians(candidates, rounds, seconds)


def _host_medians(candidates: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def _cuda_medians(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, float]:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    torch.cuda.synchronize(device)
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        events = {}
        for name, candidate in candidates.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HEAD_START_CYCLES)
            flush.zero_()
            start.record()
            candidate()
            stop.record()
            events[name] = (start, stop)
        torch.cuda.synchronize(device)
        for name, (start, stop) in events.items():
            times[name].append(start.elapsed_time(stop))
    return {name: median(values) for name, values in times.items()}


def host_microseconds(function: Callable[[], object], device: torch.device, calls: int = 300) -> float:
    """Time the host spends on one call, in microseconds: the queue of the device is never waited for.

    Give inputs so small that the device keeps up; otherwise a full queue is measured.
    """
    for _ in range(20):
        function()
    _synchronize(device)
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        samples.append((time.perf_counter() - start) / calls * 1e6)
        _synchronize(device)
    return median(samples)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
