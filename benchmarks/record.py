"""The one writer of measurements: JSON lists of records in ``benchmarks/results/``.

A record says what ran (op, shape, dtype, kernel), against which peer timed in the same run, and where; a check says
what must hold, on how many cases it was tried, and the worst of them. The tables in the README and the docs are
rendered from these files by ``render_tables.py`` and are never typed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
OURS = "para_kernels"
COMMIT_VARIABLE = "PARA_KERNELS_COMMIT"  # set it where the code is a copy apart from its history


@dataclass(frozen=True)
class Record:
    """One comparison.

    Attributes:
        op: operation, as named in the package's API.
        shape: sizes by the letters used in the docs, such as {"B": 1, "S": 4096, "H": 24, "D": 128}.
        dtype: such as "bfloat16".
        kernel: what of this package ran.
        peer: what it is compared with in the same run; None where it is measured alone.
        median_ms: of this package, in milliseconds.
        peer_ms: of the peer, in milliseconds.
        ratio: speed relative to the peer, above 1 where this package is faster.
        tflops: 10^12 floating-point operations per second of this package.
        gbps: 10^9 bytes per second of this package.
        notes: further measured values, such as an error or a peak of memory.
    """

    op: str
    shape: Mapping[str, int]
    dtype: str
    kernel: str
    median_ms: float
    peer: str | None = None
    peer_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    notes: Mapping[str, float | int | str | None] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return None if self.peer_ms is None else self.peer_ms / self.median_ms


@dataclass(frozen=True)
class Check:
    """One property, and how far it held on what it was tried on.

    Attributes:
        check: what must hold, such as "attention, padded".
        cases: on how many problems or calls it was tried.
        failures: in how many of them it did not hold.
        dtype: such as "bfloat16"; None where it does not matter.
        worst: largest value seen, such as a relative error or a time in seconds; None where there is none.
        allowed: the largest value that passes.
        notes: further measured values.
    """

    check: str
    cases: int
    failures: int = 0
    dtype: str | None = None
    worst: float | None = None
    allowed: float | None = None
    notes: Mapping[str, float | int | str | None] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.failures == 0


def write_records(name: str, records: Sequence[Record | Check], folder: Path = RESULTS) -> Path:
    """Write `records` with this machine's environment to ``folder/name.json``, replacing that file.

    Raises:
        ValueError: `name` is not made of letters, digits, "_", "-" and ".", or there is nothing to write.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"name: {name!r}; must be made of letters, digits, '_', '-' and '.'")
    if not records:
        raise ValueError("records: empty; there is nothing to write")
    shared = environment()
    rows = [{**asdict(record), **_derived(record), **shared} for record in records]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    return path


def _derived(record: Record | Check) -> dict[str, float | bool | None]:
    return {"passed": record.passed} if isinstance(record, Check) else {"ratio": record.ratio}


def read_records(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of ``folder/name.json``, as `write_records` left them."""
    return json.loads((folder / f"{name}.json").read_text())


def environment() -> dict[str, str | None]:
    """Where and from what a measurement was taken; every record carries it."""
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "driver": _driver() if has_gpu else None,
        "cpu": _cpu(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": _command(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = _output(query).splitlines()
    return lines[0] if lines else None


def _cpu() -> str:
    model = re.search(r"^model name\s*:\s*(.+)$", _cpu_info(), flags=re.MULTILINE)
    return f"{model.group(1) if model else platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, as told, or as git knows it, marked "-dirty" where tracked files differ from it."""
    if told := os.environ.get(COMMIT_VARIABLE):
        return told
    commit = _output(["git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return None
    changed = _output(["git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if changed else commit


def _command() -> str:
    """The command line, without anyone's folders: modules by name, absolute paths by their last part."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        module = program.parent.name
    elif program.is_relative_to(REPOSITORY):
        module = ".".join(program.relative_to(REPOSITORY).with_suffix("").parts)
    else:
        module = program.name
    arguments = [Path(text).name if text.startswith("/") else text for text in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *arguments])


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
