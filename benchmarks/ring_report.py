"""Attention over several GPUs in one run: first whether it is right, then how fast it is, against one GPU and peers.

    torchrun --nproc-per-node 2 -m benchmarks.ring_report --out /tmp/ring
    torchrun --nproc-per-node 2 -m benchmarks.ring_report --out /tmp/ring --only correctness,speed --transports peer

Rank 0 prints, and writes one JSON file of records per section to --out. A section that fails on some rank is reported
and does not stop the others; the exit code is then 1. Without CUDA, processes rehearse it over gloo with tiny shapes.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from para_kernels import flash_attention
from para_kernels.attention8 import flash_attention_int8
from para_kernels.parallel import Shards, deadline, raise_on_failure, select_transport, ulysses_attention
from para_kernels.parallel.agreement import exchange
from para_kernels.parallel.ring8 import ring_int8
from para_kernels.parallel.transport import Transport

from .inputs import attention_flops, lens_tensor
from .peers import PORTABLE, PeerUnavailableError, attention_peer
from .record import Check, Record, environment, write_records
from .reference import TOLERANCES, attention_float64, relative_error
from .section import dtype_name
from .timing import HOST_HEAD_START_CYCLES

ONE_GPU = "flash_attention on one GPU"
WAIT_SECONDS = 45.0  # for another rank: a section that hangs on one rank fails on the others after so long
LIMIT_SECONDS = 240  # of the whole run, by default


@dataclass
class Run:
    """This process's place, and what the command line asks for."""

    rank: int
    world: int
    device: torch.device
    out: Path
    transports: list[str]
    tokens: list[int]
    heads: int
    head_dim: int
    dtype: torch.dtype
    layers: int
    lines: list[str] = field(default_factory=list)
    records: list[Record | Check] = field(default_factory=list)

    @property
    def group(self) -> dist.ProcessGroup:
        group = dist.group.WORLD
        assert group is not None
        return group

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def transport(self, name: str) -> Transport:
        return select_transport(self.group, self.device, name)

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(f"  {line}", flush=True)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        raise_on_failure()


# --- correctness ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One attention over all ranks. `kv_lens` and `q_lens` are shares of the whole length."""

    name: str
    shares: Sequence[float]
    total: int
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 128
    kv_lens: Sequence[float] | None = None
    q_lens: Sequence[float] | None = None
    batch: int = 1

    def lengths(self, world: int) -> tuple[int, ...]:
        """Rows of every rank; `shares` are taken in turn."""
        weights = [self.shares[rank % len(self.shares)] for rank in range(world)]
        sizes = [int(self.total * weight / max(sum(weights), 1e-9)) for weight in weights]
        sizes[-1] += self.total - sum(sizes)
        return tuple(sizes)


PROBLEMS = (
    Problem("even", (1,), 4096),
    Problem("uneven, odd", (3, 1, 2), 2999),
    Problem("a rank without rows", (1, 0), 1025),
    Problem("batch of lengths", (2, 3), 1733, kv_lens=(1.0, 0.31), q_lens=(0.77, 0.52), batch=2),
    Problem("no keys", (1,), 700, kv_lens=(0.0, 1.0, 0.001), batch=3),
    Problem("grouped heads, 64", (1, 2), 1500, heads=6, kv_heads=3, head_dim=64),
    Problem("head dim 96", (1,), 900, head_dim=96),
    Problem("one row", (1,), 1),
)


def correctness(run: Run) -> None:
    """Every transport against float64, then a large problem on some rows and heads."""
    for name in run.transports:
        transport = run.transport(name)
        problems = PROBLEMS if run.is_cuda else PROBLEMS[1:5]
        errors = {problem.name: _error(run, transport.ring, problem) for problem in problems}
        if run.is_cuda:
            errors["119,056 tokens, 2 heads, 96 rows"] = _large_error(run, transport)
        worst, allowed = max(errors.values()), TOLERANCES[run.dtype]
        failures = [f"{case} {value:.1e}" for case, value in errors.items() if not value <= allowed]
        run.records.append(
            Check(f"ring attention, {name}", len(errors), len(failures), dtype_name(run.dtype), _finite(worst), allowed)
        )
        held = getattr(transport, "memory_bytes", 0) / 2**20
        run.say(f"{name}: worst error {worst:.1e} of {allowed:.0e}, holds {held:.0f} MiB; failed: {failures or 'none'}")


def _finite(value: float) -> float:
    return value if value == value and value != float("inf") else 1e30


def _whole(run: Run, batch: int, total: int, heads: int, kv_heads: int, head_dim: int, seed: int) -> list[Tensor]:
    """q, k, v of the whole sequence, the same on every rank."""
    generator = torch.Generator(run.device).manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads)
    return [
        torch.randn(batch, total, h, head_dim, generator=generator, device=run.device, dtype=run.dtype) for h in sizes
    ]


Ring = Callable[..., tuple[Tensor, Tensor]]
"""As `Transport.ring`."""


def _error(run: Run, ring: Ring, problem: Problem) -> float:
    lengths = problem.lengths(run.world)
    start = sum(lengths[: run.rank])
    rows = slice(start, start + lengths[run.rank])
    whole = _whole(run, problem.batch, problem.total, problem.heads, problem.kv_heads, problem.head_dim, seed=7)
    lens = [
        None if x is None else [round(share * problem.total) for share in x] for x in (problem.kv_lens, problem.q_lens)
    ]
    kv_lens, q_lens = (None if x is None else lens_tensor(x, run.device) for x in lens)
    q, k, v = (x[:, rows] for x in whole)
    worst = 0.0
    for _ in range(3):  # both slots, and the first again
        out, lse = ring(q, k, v, lengths=lengths, kv_lens=kv_lens, q_lens=q_lens, scale=None)
        run.synchronize()
        for b in range(problem.batch):
            kv_len = problem.total if lens[0] is None else lens[0][b]
            q_len = problem.total if lens[1] is None else lens[1][b]
            alive = max(0, min(q_len - start, lengths[run.rank]))
            expected, expected_lse = attention_float64(q[b, :alive], whole[1][b, :kv_len], whole[2][b, :kv_len])
            if alive and kv_len:
                worst = max(worst, relative_error(out[b, :alive], expected))
                worst = max(worst, relative_error(lse[b, :, :alive], expected_lse))
            if out[b, alive if kv_len else 0 :].any() or not lse[b, :, alive if kv_len else 0 :].isneginf().all():
                worst = float("inf")
    return _worst_of_all(run, worst)


def _large_error(run: Run, transport: Transport) -> float:
    lengths = Shards.of(max(run.tokens), run.world).sizes
    q, k, v = _whole(run, 1, max(run.tokens), 2, 2, run.head_dim, seed=11)
    start = sum(lengths[: run.rank])
    mine = slice(start, start + lengths[run.rank])
    out, _ = transport.ring(q[:, mine], k[:, mine], v[:, mine], lengths=lengths, kv_lens=None, q_lens=None, scale=None)
    run.synchronize()
    some = torch.linspace(0, lengths[run.rank] - 1, 96, device=run.device).long()
    expected, _ = attention_float64(q[0, mine][some], k[0], v[0])
    return _worst_of_all(run, relative_error(out[0][some], expected))


def _worst_of_all(run: Run, value: float) -> float:
    values = exchange(run.group, repr(value), "errors")
    return max((float(x) if x != "nan" else float("inf")) for x in values)


# --- stress -----------------------------------------------------------------------------------------------------------


def stress(run: Run) -> None:
    """Layers in a row with fresh data: bit for bit the same when ranks run apart and copies come late."""
    problem = Problem("stress", (3, 4), 6007 if run.is_cuda else 207, heads=8, kv_heads=8)
    for name in run.transports:
        transport = run.transport(name)
        calm = _layers(run, transport, problem, skew=False, late=False)
        ways = {"ranks apart": (True, False), "late copies": (False, True), "both": (True, True)}
        for way, (skew, late) in ways.items():
            if late and not hasattr(transport, "_stream_objects"):
                continue
            other = _layers(run, transport, problem, skew=skew, late=late)
            differing = sum(not torch.equal(a, b) for a, b in zip(calm, other, strict=True))
            broken = sum(not bool(torch.isfinite(x).all()) for x in other)
            differing = max(exchange(run.group, max(differing, broken), "results"))
            run.records.append(Check(f"ring attention, {name}, {way}: same bits", run.layers, differing))
            run.say(f"{name}, {way}: {differing} of {run.layers} layers differ")


def _layers(run: Run, transport: Transport, problem: Problem, *, skew: bool, late: bool) -> list[Tensor]:
    lengths = problem.lengths(run.world)
    start = sum(lengths[: run.rank])
    mine = slice(start, start + lengths[run.rank])
    randomness = torch.Generator().manual_seed(100 + run.rank)
    outputs = []
    for layer in range(run.layers):
        q, k, v = (x[:, mine] for x in _whole(run, 1, problem.total, 8, 8, 128, seed=1000 + layer))
        if skew:
            _sleep(run, int(torch.randint(0, 3_000_000, (1,), generator=randomness)))
        if late:
            for stream in transport._stream_objects:  # pyright: ignore[reportAttributeAccessIssue]
                with torch.cuda.stream(stream):
                    _sleep(run, int(torch.randint(0, 3_000_000, (1,), generator=randomness)))
        out, _ = transport.ring(q, k, v, lengths=lengths, kv_lens=None, q_lens=None, scale=None)
        outputs.append(out)
    run.synchronize()
    return outputs


def _sleep(run: Run, cycles: int) -> None:
    """Up to 1.5 ms of the current stream."""
    if run.is_cuda:
        torch.cuda._sleep(cycles)
    else:
        time.sleep(cycles * 1e-9)


# --- 8 bits -----------------------------------------------------------------------------------------------------------

ERROR_8 = 6e-2  # relative, on normal data, where a rank may have few rows: docs/kernels/int8.md


def in_8_bits(run: Run) -> None:
    """The ring with keys and values in 8 bits on every transport: against float64, then against 16 bits on one GPU."""
    rings: dict[str, Ring] = {
        name: partial(ring_int8, transport=run.transport(name), rank=run.rank) for name in run.transports
    }
    for name, ring in rings.items():
        problems = PROBLEMS if run.is_cuda else PROBLEMS[1:5]
        errors = {problem.name: _error(run, ring, problem) for problem in problems}
        failures = [f"{case} {value:.1e}" for case, value in errors.items() if not value <= ERROR_8]
        kind, worst = f"ring attention in 8 bits, {name}", max(errors.values())
        run.records.append(Check(kind, len(errors), len(failures), dtype_name(run.dtype), _finite(worst), ERROR_8))
        run.say(f"{name}: worst error {worst:.1e} of {ERROR_8:.0e}; failed: {failures or 'none'}")
    for total in run.tokens:
        lengths = Shards.of(total, run.world).sizes
        start = sum(lengths[: run.rank])
        whole = _whole(run, 1, total, run.heads, run.heads, run.head_dim, seed=3)
        own = [x[:, start : start + lengths[run.rank]].contiguous() for x in whole]
        lens = {"lengths": lengths, "kv_lens": None, "q_lens": None, "scale": None}
        candidates: Candidates = {ONE_GPU: partial(flash_attention, *whole)}
        candidates[f"8 bits: {ONE_GPU}"] = partial(flash_attention_int8, *whole)
        candidates |= {f"8 bits: {name}": partial(ring, *own, **lens) for name, ring in rings.items()}
        candidates["8 bits: ulysses"] = partial(
            ulysses_attention, *own, mesh=run.group, lengths=lengths, attention="int8"
        )
        _report(run, total, _times(run, candidates, total), ONE_GPU)
        _write(run, "int8")


# --- speed ------------------------------------------------------------------------------------------------------------

Candidates = dict[str, Callable[[], object]]


def speed(run: Run) -> None:
    """Milliseconds per call, the slowest rank's, and how much faster than one GPU on the whole sequence."""
    for total in run.tokens:
        candidates = _candidates(run, total)
        times = _times(run, candidates, total)
        _report(run, total, times, ONE_GPU)
        _write(run, "speed")  # what comes next may not be done in time


def no_p2p(run: Run) -> None:
    """NCCL without P2P, as on cards that cannot reach each other: in processes of their own, started by rank 0."""
    if not run.is_cuda:
        run.say("skipped: needs CUDA")
        return
    failed = ""
    if run.rank == 0:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.world)]
        command += ["-m", "benchmarks.ring_report", "--out", str(run.out), "--only", "without_p2p", "--tokens"]
        command.append(",".join(map(str, run.tokens)))
        own = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        environment["NCCL_P2P_DISABLE"] = "1"
        try:
            child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
            print("\n".join(line for line in child.stdout.splitlines() if line.startswith("  ")), flush=True)
            failed = child.stderr[-3000:] if child.returncode else ""
        except subprocess.TimeoutExpired as error:
            failed = str(error)
    with deadline(130):
        failed = exchange(run.group, failed, "end of the processes without P2P")[0]
    if failed:
        raise RuntimeError(failed)


def without_p2p(run: Run) -> None:
    """What `no_p2p` starts."""
    for total in run.tokens:
        candidates = {name: f for name, f in _candidates(run, total).items() if name in (ONE_GPU, "collective", RING)}
        times = _times(run, candidates, total)
        _report(run, total, times, ONE_GPU, "NCCL without P2P, ")


RING, ULYSSES = "diffusers ring", "diffusers ulysses"


def _candidates(run: Run, total: int) -> Candidates:
    """By name; each rank attends its own rows, except for those on one GPU."""
    lengths = Shards.of(total, run.world).sizes
    start = sum(lengths[: run.rank])
    whole = _whole(run, 1, total, run.heads, run.heads, run.head_dim, seed=3)
    q, k, v = (x[:, start : start + lengths[run.rank]].contiguous() for x in whole)

    def ring(name: str) -> Callable[[], object]:
        transport = run.transport(name)
        return lambda: transport.ring(q, k, v, lengths=lengths, kv_lens=None, q_lens=None, scale=None)

    candidates: Candidates = {ONE_GPU: lambda: flash_attention(*whole)}
    try:
        portable = attention_peer(PORTABLE, run.device)
        candidates[f"{PORTABLE} on one GPU"] = lambda: portable(*whole)
    except PeerUnavailableError:
        pass
    candidates |= {name: ring(name) for name in run.transports}
    candidates["ulysses"] = lambda: ulysses_attention(q, k, v, mesh=run.group, lengths=lengths)
    for name in (RING, ULYSSES):
        try:
            candidates[name] = _diffusers(run, name, q, k, v)
            candidates[name]()
            run.synchronize()
        except Exception as error:  # another library's failure, on all ranks alike, must not cost the other times
            candidates.pop(name, None)
            run.say(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return candidates


_configs: dict[str, Any] = {}  # a mesh is made once


def _diffusers(run: Run, name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """diffusers' own context parallelism with the cuDNN backend."""
    if not run.is_cuda:
        raise PeerUnavailableError("needs CUDA")
    from diffusers import ContextParallelConfig
    from diffusers.models import attention_dispatch
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    if q.shape[1] * run.world != sum(exchange(run.group, q.shape[1], "rows")):
        raise PeerUnavailableError("takes only lengths that divide")
    if name not in _configs:
        shape = (run.world, 1) if name == RING else (1, run.world)
        split = ContextParallelConfig(ring_degree=shape[0], ulysses_degree=shape[1])
        config = ParallelConfig(context_parallel_config=split)
        mesh = init_device_mesh("cuda", shape, mesh_dim_names=("ring", "ulysses"))
        config.setup(run.rank, run.world, run.device, mesh=mesh)
        _configs[name] = config
    config = _configs[name]
    return lambda: attention_dispatch._native_cudnn_attention(q, k, v, _parallel_config=config)


def _times(run: Run, candidates: Mapping[str, Callable[[], object]], total: int) -> dict[str, float]:
    """Median over rounds, in which the candidates take turns, of the slowest rank's milliseconds per call."""
    calls = 1 if total > 60_000 else 4 if total > 15_000 else 12
    rounds = 4 if total > 60_000 else 6
    if not run.is_cuda:
        calls, rounds = 1, 2
    for candidate in candidates.values():
        candidate()
        run.synchronize()
    mine: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        # Each round begins with another one: what runs after the hottest is the slowest.
        for name in [*list(candidates)[done % len(candidates) :], *list(candidates)[: done % len(candidates)]]:
            mine[name].append(_one_time(run, candidates[name], calls))
    everyone = exchange(run.group, mine, "times")
    return {
        name: median(max(theirs[name][i] for theirs in everyone) for i in range(rounds)) for name in candidates
    }  # fmt: skip


def _one_time(run: Run, candidate: Callable[[], object], calls: int) -> float:
    """Milliseconds per call of some calls in a row, on this rank's device alone.

    On CUDA the device first sleeps while the host queues all calls: what the host takes for the first one is not
    counted (`host_time` measures it). The sleeps end apart, since clocks differ, so the ranks meet once more behind
    them, on their devices, before the first event.
    """
    run.synchronize()
    dist.all_reduce(torch.zeros(1, device=run.device))
    run.synchronize()
    if not run.is_cuda:
        start = time.perf_counter()
        for _ in range(calls):
            candidate()
        return (time.perf_counter() - start) * 1e3 / calls
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    meeting = torch.zeros(1, device=run.device)
    torch.cuda._sleep(HOST_HEAD_START_CYCLES)
    dist.all_reduce(meeting)
    before.record()
    for _ in range(calls):
        candidate()
    after.record()
    run.synchronize()
    return before.elapsed_time(after) / calls


def _report(run: Run, total: int, times: Mapping[str, float], base: str, prefix: str = "") -> None:
    flops = attention_flops([total], [total], run.heads, run.head_dim)
    shape = {"B": 1, "S": total, "H": run.heads, "D": run.head_dim, "ranks": run.world}
    run.say(f"{prefix}{total} tokens in all, {run.world} ranks, {run.heads} heads of {run.head_dim}:")
    for name, ms in times.items():
        gpus = 1 if "one GPU" in name else run.world
        run.say(
            f"  {name:28} {ms:9.3f} ms  {times[base] / ms:6.3f} x one GPU"
            f"  {flops / ms / 1e9 / gpus:6.0f} TFLOP/s per GPU"
        )
        if name != base:
            kernel = prefix + name
            run.records.append(
                Record("ring_attention", shape, dtype_name(run.dtype), kernel, ms, base, times[base], flops / ms / 1e9)
            )
    ours = min((ms for name, ms in times.items() if name in ("peer", "host", "collective", "ulysses")), default=None)
    for other in (RING, ULYSSES):
        if ours and other in times:
            run.say(f"  the best of ours is {times[other] / ours:.3f} x as fast as {other}")


def trace(run: Run) -> None:
    """A profile of six layers of each transport, for a viewer of Chrome traces and for `ring_timeline`."""
    if not run.is_cuda:
        run.say("skipped: needs CUDA")
        return
    from torch.profiler import ProfilerActivity, profile

    for total, name in ((total, name) for total in run.tokens if total < 60_000 for name in run.transports):
        lengths = Shards.of(total, run.world).sizes
        q, k, v = _whole(run, 1, lengths[run.rank], run.heads, run.heads, run.head_dim, seed=5)
        transport = run.transport(name)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            for _ in range(6):
                transport.ring(q, k, v, lengths=lengths, kv_lens=None, q_lens=None, scale=None)
            run.synchronize()
        if run.rank == 0:
            recorded.export_chrome_trace(str(run.out / f"trace-{name}-{total}.json"))


def host_time(run: Run) -> None:
    """Microseconds that the host spends on one layer."""
    lengths = Shards.of(8192, run.world).sizes if run.is_cuda else Shards.of(64, run.world).sizes
    q, k, v = _whole(run, 1, lengths[run.rank], run.heads, run.heads, run.head_dim, seed=5)
    for name in run.transports:
        transport = run.transport(name)
        values = []
        for _ in range(8):
            run.synchronize()
            start = time.perf_counter()
            for _ in range(8):
                transport.ring(q, k, v, lengths=lengths, kv_lens=None, q_lens=None, scale=None)
            values.append((time.perf_counter() - start) / 8 * 1e6)
        run.synchronize()
        run.say(f"{name}: {median(values):.0f} us of host time per layer at {sum(lengths)} tokens")


# --- the run ----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Run], None]] = {
    "correctness": correctness,
    "stress": stress,
    "host_time": host_time,
    "speed": speed,
    "int8": in_8_bits,
    "no_p2p": no_p2p,
}
BY_NAME: dict[str, Callable[[Run], None]] = {"trace": trace, "without_p2p": without_p2p}


def main() -> int:
    options = _options()
    faulthandler.dump_traceback_later(options.limit, exit=True)
    torch.set_grad_enabled(False)
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        device_id=device if is_cuda else None,
        timeout=timedelta(seconds=2 * WAIT_SECONDS),
    )
    heads, head_dim, dtype = (24, 128, torch.bfloat16) if is_cuda else (2, 16, torch.float32)
    tokens = options.tokens if is_cuda else [64]
    transports = options.transports if is_cuda else ["collective"]
    run = Run(
        dist.get_rank(), dist.get_world_size(), device, options.out, transports, tokens, heads, head_dim, dtype,
        options.layers if is_cuda else 5,
    )  # fmt: skip
    if run.rank == 0:
        print(", ".join(f"{key} {value}" for key, value in environment().items() if value), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not _section(run, name)]
    if run.rank == 0:
        print(f"\nfailed: {', '.join(failed) or 'none'}", flush=True)
    sys.stdout.flush()
    # A rank that failed may have left others' streams waiting: nothing is closed in turn.
    os._exit(1 if failed else 0)


def _section(run: Run, name: str) -> bool:
    """Run one section; False if it failed on some rank."""
    start, failure = time.perf_counter(), None
    run.records.clear()
    if run.rank == 0:
        print(f"\n== {name}", flush=True)
    try:
        with deadline(WAIT_SECONDS):
            {**SECTIONS, **BY_NAME}[name](run)
        failed = [record.check for record in run.records if isinstance(record, Check) and not record.passed]
        failure = f"did not hold: {', '.join(failed)}" if failed else None
    except Exception:  # One broken section must not cost the others their results.
        failure = traceback.format_exc()
        print(f"rank {run.rank}: {failure}", flush=True)
    _write(run, name)
    if run.is_cuda:
        torch.cuda.empty_cache()
    try:
        with deadline(2 * WAIT_SECONDS):
            failures = exchange(run.group, failure is not None, f"end of {name}")
    except RuntimeError as error:
        failures = [True]
        print(f"rank {run.rank}: {error}", flush=True)
    run.say(f"-- {name} {'FAILED' if any(failures) else 'done'} ({time.perf_counter() - start:.1f} s)")
    return not any(failures)


def _write(run: Run, name: str) -> None:
    if run.rank == 0 and run.records:
        write_records(f"ring-{name}", run.records, run.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument(
        "--only",
        type=_section_names,
        default=list(SECTIONS),
        metavar="A,B",
        help=f"sections to run, of {', '.join([*SECTIONS, *BY_NAME])}",
    )
    parser.add_argument("--transports", type=lambda text: text.split(","), default=["peer", "host", "collective"])
    parser.add_argument("--tokens", type=lambda text: list(map(int, text.split(","))), default=[119056, 32768, 8192])
    parser.add_argument("--layers", type=int, default=50, help="layers in a row in `stress`")
    parser.add_argument("--limit", type=int, default=LIMIT_SECONDS, metavar="SECONDS", help="end the run after so long")
    return parser.parse_args()


def _section_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in {**SECTIONS, **BY_NAME}]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
