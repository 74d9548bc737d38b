"""Shared by the micro-benchmarks: the device, a timer that waits for it, and the JSON record of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# The modules here import each other by package name. At the end of the path, so that an installed para_kernels stays
# the one that is measured.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.record import OURS, RESULTS, Record, write_records


@dataclass(frozen=True)
class Timed:
    """One candidate's median in seconds, and the work of the call (0 where it is not counted)."""

    op: str
    shape: tuple[tuple[str, int], ...]
    dtype: str
    kernel: str
    seconds: float
    flops: float
    bytes: float


TIMED = pytest.StashKey[list[Timed]]()


def device_timer() -> float:
    """Seconds, after the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=RESULTS, help="folder for the JSON records (benchmarks/results)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMED] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device_timer, warmup=True, warmup_iterations=2))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """``measure(function, op=, shape=, dtype=, kernel=, flops=, bytes=)``: time it and keep it for the record."""

    def run(
        function: Callable[[], object],
        op: str,
        shape: dict[str, int],
        dtype: torch.dtype,
        kernel: str,
        flops: float = 0.0,
        bytes: float = 0.0,  # noqa: A002 - the unit is the name
    ) -> None:
        dtype_name = str(dtype).removeprefix("torch.")
        benchmark.group = f"{op} {shape} {dtype_name} {device.type}"
        benchmark(function)
        if benchmark.stats is None:  # --benchmark-disable runs the function once and takes no time
            return
        timed = Timed(op, tuple(shape.items()), dtype_name, kernel, benchmark.stats.stats.median, flops, bytes)
        request.config.stash[TIMED].append(timed)

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    records = _records(session.config.stash[TIMED])
    device = "gpu" if torch.cuda.is_available() else "cpu"
    for op in sorted({record.op for record in records}):
        of_this_op = [record for record in records if record.op == op]
        write_records(f"{op}-{device}", of_this_op, session.config.option.results)


def _records(timed: list[Timed]) -> list[Record]:
    """This package's kernel against each peer of the same op, shape and dtype; alone where no peer ran."""
    records = []
    for ours in (entry for entry in timed if entry.kernel == OURS):
        peers = [
            entry
            for entry in timed
            if (entry.op, entry.shape, entry.dtype) == (ours.op, ours.shape, ours.dtype) and entry.kernel != OURS
        ]
        records += [_record(ours, peer) for peer in peers] or [_record(ours, None)]
    return records


def _record(ours: Timed, peer: Timed | None) -> Record:
    return Record(
        op=ours.op,
        shape=dict(ours.shape),
        dtype=ours.dtype,
        kernel=ours.kernel,
        median_ms=ours.seconds * 1e3,
        peer=peer.kernel if peer else None,
        peer_ms=peer.seconds * 1e3 if peer else None,
        tflops=ours.flops / ours.seconds / 1e12 if ours.flops else None,
        gbps=ours.bytes / ours.seconds / 1e9 if ours.bytes else None,
    )
