"""Fair times: candidates in turn, what they read not left in the cache, the median counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

# Longer than any call here keeps the host busy (about 0.2 ms): the device must find the call already queued, or the gap
# before it would be counted. What the host takes is measured by itself, in `host_microseconds`.
HEAD_START_CYCLES = 1_000_000
FLUSH_BYTES = 256 * 2**20  # several times the largest L2 (50 MB on an H100, 60 MB on an H200)
# A stream holds about a thousand launches before the host has to wait; no call here makes more than nine.
HOST_CALLS = 100
HOST_HEAD_START_CYCLES = 40_000_000  # 20 ms: a hundred calls of up to 200 microseconds


def medians_ms(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 20,
    seconds: float = 4.0,
    warmup: int = 2,
) -> dict[str, float]:
    """Median time of each candidate in milliseconds.

    Candidates take turns, so that a clock that drops drops for all of them, and each round begins with another one, so
    that none is always the one that runs after the hottest. On CUDA each call is timed by its own pair of events, after
    a write of 256 MB that empties the L2 cache, and is queued before the device gets to it.

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


def _turn(candidates: Mapping[str, Callable[[], object]], done: int) -> list[tuple[str, Callable[[], object]]]:
    """The candidates in the order of round `done`."""
    first = done % len(candidates)
    items = list(candidates.items())
    return items[first:] + items[:first]


def _host_medians(candidates: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, candidate in _turn(candidates, done):
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
        for name, candidate in _turn(candidates, done):
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


def graph_medians_ms(
    candidates: Mapping[str, Sequence[Callable[[], object]]], device: torch.device, rounds: int = 20
) -> dict[str, float]:
    """Median time of one call of each candidate in milliseconds, for calls of microseconds: no host in the way.

    On CUDA the calls of a candidate are captured into one CUDA graph, which is replayed in turns with the others'; the
    time of a replay is divided by the number of calls.

    Args:
        candidates: by name, the same call on several sets of inputs: enough of them that each finds its own out of the
            L2 cache.
        device: where they run.
        rounds: replays of each.
    """
    if device.type == "cuda":
        times = _replay_medians(candidates, device, rounds)
    else:
        times = _host_medians({name: _in_sequence(calls) for name, calls in candidates.items()}, rounds, seconds=1.0)
    return {name: times[name] / len(calls) for name, calls in candidates.items()}


def _replay_medians(
    candidates: Mapping[str, Sequence[Callable[[], object]]], device: torch.device, rounds: int
) -> dict[str, float]:
    graphs = {name: _captured(calls, device) for name, calls in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for done in range(rounds):
        events = {}
        for name, replay in _turn({name: graph.replay for name, graph in graphs.items()}, done):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            replay()
            stop.record()
            events[name] = (start, stop)
        torch.cuda.synchronize(device)
        for name, (start, stop) in events.items():
            times[name].append(start.elapsed_time(stop))
    return {name: median(values) for name, values in times.items()}


def _in_sequence(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: Sequence[Callable[[], object]], device: torch.device) -> torch.cuda.CUDAGraph:
    """All calls in one graph, replayed once."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in (calls[0], *calls):  # the first one compiles and plans
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize(device)
    return graph


def host_microseconds(
    function: Callable[[], object], device: torch.device, calls: int = HOST_CALLS, samples: int = 30
) -> float:
    """Time the host spends on one call, in microseconds: the median over `samples` runs of `calls` calls.

    The device is kept busy with something else meanwhile: how fast it is does not matter, and the host never waits,
    neither for results nor for room in the queue.
    """
    for _ in range(20):
        function()
    times = []
    for _ in range(samples):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda._sleep(HOST_HEAD_START_CYCLES)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return median(times)
