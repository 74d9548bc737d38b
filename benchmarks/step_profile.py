"""Where the time of a forward goes: every kernel by the module that launched it, in categories, and the gaps between.

Names of kernels say little about element-wise work ("vectorized_elementwise_kernel" may be RoPE, a gate or a norm's).
So each is looked up by its own name and its operator's, and, where these are not enough, by the innermost module that
was running when it was launched. Modules are marked with `record_function` ranges from forward hooks, which are
removed afterwards.
"""

from __future__ import annotations

import bisect
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from .record import Record

MARK = "module:"
# An attention's norms of queries and keys. The preparation does them itself, but calls one that is hooked.
PREPARED = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
Key = TypeVar("Key", str, tuple[str, str, str])

# (category, pattern in the names of a kernel and its operator); the first that fits counts.
KERNELS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"attention|attn|fmha|flash|sdpa", re.IGNORECASE)),
    ("linear", re.compile(r"gemm|nvjet|cublas|cutlass|splitk|addmm|\bb?mm\b|linear|conv(?!ert)", re.IGNORECASE)),
    ("copy, cast, cat", re.compile(r"copy|memcpy|memset|fill|\bcat|CatArray|index|gather|scatter", re.IGNORECASE)),
    ("norm", re.compile(r"norm", re.IGNORECASE)),
)
# (category, pattern in the name of the innermost module's class), for kernels that none of the above fits.
MODULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"Norm")),
    ("activation", re.compile(r"GELU|SiLU|Activation|FeedForward")),
    ("RoPE", re.compile(r"Attention|Attn|Rotary|RoPE|PosEmbed")),
    ("gates and residuals", re.compile(r"Block")),
)
OTHER = "other"
TOP_KERNELS = 25


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, the operator and the innermost module's class ("" if none) that launched it, its time."""

    name: str
    operator: str
    module: str
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """All kernels of a forward, the seconds from the start of the first to the end of the last, and those of none."""

    launches: list[Launch]
    span: float
    idle: float


def category(launch: Launch) -> str:
    """The category of a kernel, by its name or its operator's, or else by its module."""
    names = f"{launch.operator} {launch.name}"
    by_name = next((name for name, pattern in KERNELS if pattern.search(names)), None)
    by_module = next((name for name, pattern in MODULES if pattern.search(launch.module)), OTHER)
    return by_name or by_module


def profiled(module: torch.nn.Module, forward: Callable[[], object], device: torch.device) -> Profile:
    """Run `forward`, which calls `module`, once under torch.profiler.

    On a CPU the operators stand for kernels: a rehearsal of the grouping.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _marked(module), profile(activities=activities) as profiler:
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if device.type != "cuda":
        return _cpu_profile([event for event in profiler.events() or [] if isinstance(event, FunctionEvent)])
    # torch's own events list some kernels under several operators; in the trace each stands once.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return of_trace(json.loads(path.read_text())["traceEvents"])


@contextmanager
def _marked(root: torch.nn.Module) -> Iterator[None]:
    """A range named after its class around every forward of every module below `root` but those in PREPARED."""
    handles: list[Any] = []
    open_ranges: list[record_function] = []

    def enter(module: torch.nn.Module, arguments: object) -> None:
        mark = record_function(MARK + type(module).__name__)
        mark.__enter__()
        open_ranges.append(mark)

    def leave(module: torch.nn.Module, arguments: object, output: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for name, module in root.named_modules():
        if name.rpartition(".")[2] in PREPARED:
            continue
        handles += [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module(event: FunctionEvent) -> str:
    """The class of the innermost marked module around `event`, or ""."""
    around: FunctionEvent | None = event
    while around is not None and not around.name.startswith(MARK):
        around = around.cpu_parent
    return around.name.removeprefix(MARK) if around else ""


def of_trace(events: Sequence[dict[str, Any]]) -> Profile:
    """The profile of a Chrome trace, as `torch.profiler` writes it: times in microseconds."""
    timed = [event for event in events if event.get("ph") == "X"]
    operators = {e["args"]["External id"]: e for e in timed if e.get("cat") == "cpu_op" and "External id" in e["args"]}
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(MARK))
        for e in timed
        if e.get("cat") == "user_annotation" and e["name"].startswith(MARK)
    )
    launches, intervals = [], []
    for event in (e for e in timed if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")):
        operator = operators.get(event["args"].get("External id"))
        launches.append(
            Launch(event["name"], operator["name"], _innermost(ranges, operator["ts"]), event["dur"])
            if operator
            else Launch(event["name"], "", "", event["dur"])
        )
        intervals.append((event["ts"], event["ts"] + event["dur"]))
    return Profile(launches, *_span(intervals))


def _innermost(ranges: Sequence[tuple[float, float, str]], moment: float) -> str:
    """The name of the last begun of the (start, end, name) around a moment, which are sorted and nested; "" if none."""
    for i in range(bisect.bisect_right(ranges, (moment, float("inf"), "")) - 1, -1, -1):
        if ranges[i][1] >= moment:
            return ranges[i][2]
    return ""


def _cpu_profile(events: Sequence[FunctionEvent]) -> Profile:
    """Operators call operators here: each counts with the time that is its own."""
    operators = [e for e in events if e.device_type == DeviceType.CPU and not e.name.startswith(MARK)]
    launches = [Launch(event.name, event.name, _module(event), event.self_cpu_time_total) for event in operators]
    return Profile(launches, *_span([(event.time_range.start, event.time_range.end) for event in operators]))


def _span(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds from the first start to the last end, seconds of it that no interval covers), of microseconds."""
    if not intervals:
        return 0.0, 0.0
    ordered = sorted(intervals)
    first, covered_to = ordered[0][0], ordered[0][0]
    idle = 0.0
    for start, end in ordered:
        idle += max(0.0, start - covered_to)
        covered_to = max(covered_to, end)
    return (covered_to - first) / 1e6, idle / 1e6


# --- what is written and printed --------------------------------------------------------------------------------------


def records(found: Profile, shape: dict[str, int], dtype: str, kernel: str) -> list[Record]:
    """One record per category, one for the gaps, then the kernels that take the most time."""
    by_category = _sums(found, category)
    by_kernel = _sums(found, lambda launch: (category(launch), launch.module, launch.name))

    def record(op: str, name: str, microseconds: float, launches: int, **notes: str) -> Record:
        share = microseconds / 1e6 / found.span if found.span else 0.0
        every = {"name": name, "launches": launches, "share": share}
        return Record(op, shape, dtype, kernel, median_ms=microseconds / 1e3, notes={**every, **notes})

    return [
        *(record("step_category", name, sum(times), len(times)) for name, times in by_category),
        record("step_category", "gaps between kernels", found.idle * 1e6, 0),
        *(
            record("step_kernel", name, sum(times), len(times), category=kind, module=module)
            for (kind, module, name), times in by_kernel[:TOP_KERNELS]
        ),
    ]


def _sums(found: Profile, key: Callable[[Launch], Key]) -> list[tuple[Key, list[float]]]:
    """Microseconds of the launches by `key`, the largest sum first."""
    times: dict[Key, list[float]] = defaultdict(list)
    for launch in found.launches:
        times[key(launch)].append(launch.microseconds)
    return sorted(times.items(), key=lambda item: -sum(item[1]))


def table(found: Profile, rows: Sequence[Record]) -> str:
    lines = [f"{found.span:.3f} s from the first kernel to the last", f"{'':<24} {'seconds':>9} {'share':>7} launches"]
    for row in rows:
        name = str(row.notes["name"])
        if row.op == "step_kernel":
            name = f"  {name[:90]} [{row.notes['category']}, in {row.notes['module'] or 'no module'}]"
        lines.append(f"{name:<24} {row.median_ms / 1e3:9.4f} {row.notes['share']:7.1%} {row.notes['launches']:8}")
    return "\n".join(lines)
