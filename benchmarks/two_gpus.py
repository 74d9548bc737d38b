"""All that two GPUs have to show, by one command: each section in processes of its own, with a limit and a record.

    python -m benchmarks.two_gpus --out /tmp/two
    python -m benchmarks.two_gpus --out /tmp/two --only ring,death,vae,generate --within 170 \\
        --sections speed,stress --tokens 8192,32768 --layers 100

    ring       ring_report: right, 500 layers under stress, speed against one GPU
    death      a rank that is killed in the middle of `generate`: the other one ends in time and names it
    vae        vae_parallel: the VAE's tiles on two GPUs, equal to one GPU's tiling
    generate   the command in two processes against the same command in one: the same frames
    sanitize   compute-sanitizer on the ring's kernels, in one process (ring_launches)

Sections run in the order given. One that fails is reported and does not stop the others; the exit code is then 1. With
`--within` the whole run has a limit, of which each section leaves something to those after it. Without GPUs, `--small`
rehearses all but `sanitize` over gloo.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .record import REPOSITORY, Check, write_records

RANKS = 2
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m")
# cuDNN's convolutions round what goes in to TF32 otherwise: a difference of 1e-6 before them is 1e-3 behind them.
EXACT = {"NVIDIA_TF32_OVERRIDE": 0}
DEATH_TIMEOUT = 30.0  # seconds, what `generate` is told; a dead process is noticed sooner
# Both processes and one differ by rounding alone, here that of float32 in [0, 1] after all steps.
PIXEL_TOLERANCE = 1e-3
GENERATE_STEPS = 8  # what is wrong between ranks shows in the first; nearly all of the time is starting and compiling
CPU_PATIENCE = 4.0  # times the limits on GPUs
# Seconds that a section leaves to each of those after it, when the whole run has a limit.
RESERVED = {"ring": 60.0, "death": 40.0, "vae": 35.0, "generate": 35.0, "sanitize": 60.0}


@dataclass(frozen=True)
class Options:
    """Of the command line.

    Attributes:
        sections, tokens, layers: of ring_report; tokens None for its own.
        end: when the running section has to be over, on the monotonic clock.
    """

    out: Path
    small: bool
    sections: str
    tokens: str | None
    layers: int
    end: float = math.inf

    @property
    def device(self) -> list[str]:
        return ["--device", "cpu"] if self.small else ["--device", "cuda"]

    def limit(self, most: float) -> float:
        """Seconds that something may take: `most`, or what is left; more on a CPU, which may have other work.

        Raises:
            SectionFailedError: if nothing is left.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise SectionFailedError("no time is left")
        return min(CPU_PATIENCE * most if self.small else most, left)


class SectionFailedError(RuntimeError):
    """What a section was to show did not hold."""


def ring(options: Options) -> None:
    """Its records are ring_report's own."""
    limit = options.limit(210)
    report = [*TORCHRUN, "benchmarks.ring_report", "--out", str(options.out), "--only", options.sections]
    report += ["--transports", "peer,host", "--layers", str(options.layers), "--limit", str(max(1, int(limit - 5)))]
    report += [] if options.tokens is None else ["--tokens", options.tokens]
    print(_finished(report, limit), flush=True)


def vae(options: Options) -> None:
    """Its record is vae_parallel's own."""
    size = (
        ["--small", "--height", "272", "--width", "272", "--frames", "5"]
        if options.small
        else ["--height", "480", "--width", "832", "--frames", "33"]
    )
    report = [*TORCHRUN, "benchmarks.vae_parallel", "--out", str(options.out), "--repeats", "1", *size]
    print(_finished(report, options.limit(120)), flush=True)


# --- generate ---------------------------------------------------------------------------------------------------------


def _generate(options: Options, output: Path, steps: int, *more: str) -> list[str]:
    # In float32, where one process and two differ by rounding alone and by little of it.
    given = ["--steps", str(steps), "--dtype", "fp32", *options.device, "--output", str(output), *more]
    return [sys.executable, "-m", "para_kernels", "generate", "a handwritten 7 moving to the left", *given]


def generate(options: Options) -> None:
    """The toy's frames by `--ring 2` and by one process, at the same time; the VAE whole in both: tiling changes it."""
    steps = 3 if options.small else GENERATE_STEPS
    limit = options.limit(120)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        alone = _generate(options, one / "v.npy", steps)
        both = _generate(options, two / "v.npy", steps, "--ring", str(RANKS), "--no-parallel-vae")
        with _ranks(alone, one, count=1) as first, _ranks(both, two) as others:
            _await_ends([*first, *others], limit)
            printed = others[0].out.read_text(errors="replace")
        expected, got = np.load(one / "v.npy"), np.load(two / "v.npy")
    shown = next((line for line in printed.splitlines() if "ranks:" in line), "no line tells of ranks")
    same = expected.shape == got.shape
    worst = float(np.abs(expected - got).max()) if same else 1e30
    failed = not worst <= PIXEL_TOLERANCE or f"{RANKS} ranks" not in shown
    _judge(
        options,
        "two-gpus-generate",
        Check("generate in 2 processes, frames in [0, 1]", len(got), int(failed), "float32", worst, PIXEL_TOLERANCE),
        f"{shown.strip()}; largest difference {worst:.2e}, largest value {float(np.abs(expected).max()):.3f}",
    )  # fmt: skip


# --- death ------------------------------------------------------------------------------------------------------------


def death(options: Options) -> None:
    """Without torchrun, which would end the other rank by itself."""
    with tempfile.TemporaryDirectory() as folder:
        more = ("--ring", str(RANKS), "--timeout", str(DEATH_TIMEOUT))
        with _ranks(_generate(options, Path(folder) / "v.mp4", 5000, *more), Path(folder)) as ranks:
            _await_steps(ranks, options.limit(100))
            ranks[1].process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            try:
                code = ranks[0].process.wait(options.limit(DEATH_TIMEOUT + 10))
            except subprocess.TimeoutExpired:
                code = None
            seconds = time.monotonic() - killed
            said = ranks[0].errors.replace("\r", "\n").strip().splitlines()
    told = [line for line in said if "rank 0" in line and "rank 1" in line]
    failed = code in (None, 0) or not told
    _judge(
        options,
        "two-gpus-death",
        Check("a killed rank ends the other, seconds", 1, int(failed), None, seconds, DEATH_TIMEOUT + 10),
        (told or said or ["nothing was said"])[-1],
    )


@dataclass(frozen=True)
class Rank:
    """A running process, and the files that it writes to."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self.err.read_text(errors="replace")


@contextmanager
def _ranks(command: Sequence[str], folder: Path, count: int = RANKS) -> Iterator[list[Rank]]:
    """The command once for each rank, which write to `folder`. All are killed at the end."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    with ExitStack() as end:
        ranks = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            given = place | meeting | EXACT
            environment = os.environ | {name: str(value) for name, value in given.items()}
            paths = [folder / f"rank{rank}.{kind}" for kind in ("out", "err")]
            out, err = (end.enter_context(path.open("wb")) for path in paths)
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=err)
            end.callback(_kill, process)
            ranks.append(Rank(process, *paths))
        yield ranks


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _await_ends(ranks: Sequence[Rank], seconds: float) -> None:
    """Until all have ended.

    Raises:
        SectionFailedError: if one fails, or it takes longer than `seconds`.
    """
    end = time.monotonic() + seconds
    while (codes := [rank.process.poll() for rank in ranks]) and None in codes:
        if time.monotonic() > end:
            late = ranks[codes.index(None)]
            raise SectionFailedError(f"not done after {seconds:.0f} s; {late.err.name} has {late.errors[-2000:]}")
        if any(codes):
            break
        time.sleep(0.01)
    for rank, code in zip(ranks, codes, strict=True):
        if code:
            raise SectionFailedError(f"ended with {code}: {rank.errors[-4000:]}")


def _await_steps(ranks: Sequence[Rank], seconds: float) -> None:
    """Until rank 0's progress bar has counted two steps or more: it does not show every count.

    Raises:
        SectionFailedError: if a rank ends before, or it takes longer than `seconds`.
    """
    end = time.monotonic() + seconds
    while not re.search(r"\b([2-9]|\d\d+)/5000", said := ranks[0].errors):
        ended = [number for number, rank in enumerate(ranks) if rank.process.poll() is not None]
        if ended or time.monotonic() > end:
            raise SectionFailedError(f"no second step; ended before: {ended}; rank 0 said: {said[-2000:]}")
        time.sleep(0.01)


# --- sanitize ---------------------------------------------------------------------------------------------------------


def sanitize(options: Options) -> None:
    """Its records are those of `sanitize`, one folder for each tool."""
    if options.small or shutil.which("compute-sanitizer") is None:
        print("skipped: needs a GPU and compute-sanitizer", flush=True)
        return
    commands = {
        tool: [sys.executable, "-m", "benchmarks.sanitize", "--out", str(options.out / tool), "--only", f"{tool} ring"]
        for tool in ("memcheck", "racecheck")
    }
    for command in commands.values():
        print(_finished(command, options.limit(140)), flush=True)


# --- the run ----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Options], None]] = {
    "ring": ring,
    "death": death,
    "vae": vae,
    "generate": generate,
    "sanitize": sanitize,
}


def main() -> int:
    options, only, within = _options()
    end = time.monotonic() + within
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for place, name in enumerate(only):
        options = replace(options, end=end - sum(RESERVED[later] for later in only[place + 1 :]))
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        try:
            SECTIONS[name](options)
        except Exception as error:  # one section that fails must not cost the others their results
            failed.append(name)
            print(f"{type(error).__name__}: {error}", flush=True)
        print(f"-- {name} {'FAILED' if name in failed else 'done'} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"\nfailed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def _finished(command: Sequence[str], limit: float) -> str:
    """What a command prints, which must end well and in time; it and its children end with it.

    Raises:
        SectionFailedError: with what it said last.
    """
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise SectionFailedError(f"not done after {limit:g} s\n{output[-6000:]}") from None
    if process.returncode:
        raise SectionFailedError(f"ended with {process.returncode}\n{output[-6000:]}")
    return output


def _judge(options: Options, name: str, check: Check, words: str) -> None:
    """Write the record, print what was found.

    Raises:
        SectionFailedError: if the check did not pass.
    """
    write_records(name, [check], options.out)
    print(f"  {check.check}: {check.worst:g} of {check.allowed:g} allowed; {words}", flush=True)
    if not check.passed:
        raise SectionFailedError(f"did not hold: {check.check}; {words}")


def _options() -> tuple[Options, list[str], float]:
    """What the sections are told, which ones run, and seconds for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--small", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="A,B", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS", help="limit of the whole run")
    parser.add_argument("--sections", metavar="A,B", help="of ring_report, for `ring`")
    parser.add_argument("--tokens", metavar="N,M", help="of ring_report, for `ring`")
    parser.add_argument("--layers", type=int, default=500, help="in a row in ring_report's stress (default: 500)")
    given = parser.parse_args()
    only = given.only.split(",")
    if unknown := [name for name in only if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}")
    if not given.small and torch.cuda.device_count() < RANKS:
        parser.error(f"needs {RANKS} GPUs, or --small")
    sections = given.sections or ("stress,speed" if given.small else "correctness,stress,speed")
    return Options(given.out.resolve(), given.small, sections, given.tokens, given.layers), only, given.within


if __name__ == "__main__":
    sys.exit(main())
