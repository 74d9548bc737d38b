"""All that two GPUs have to show, by one command: each section in processes of its own, with a limit and a record.

    python -m benchmarks.two_gpus --out /tmp/two
    python -m benchmarks.two_gpus --out /tmp/two --only generate,death

    ring       ring_report: right, 500 layers under stress, speed against one GPU, the packing's variants
    vae        vae_parallel: the VAE's tiles on two GPUs, equal to one GPU's tiling
    generate   the command under torchrun against the same command in one process: the same video
    death      a rank that is killed in the middle of `generate`: the other one ends in time and names it
    sanitize   compute-sanitizer on the ring's kernels, in one process (ring_launches)

A section that fails is reported and does not stop the others; the exit code is then 1. Without GPUs, `--small`
rehearses all but `sanitize` over gloo.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
import torch

from .record import REPOSITORY, Check, write_records

RANKS = 2
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m")
DEATH_TIMEOUT = 30.0  # seconds, what `generate` is told; a dead process is noticed sooner
# Steps of 8-bit pixels, after rounding and the video's lossy coding: a difference of 1e-5 may move either.
PIXEL_TOLERANCE = 4.0


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    out: Path
    small: bool

    @property
    def device(self) -> list[str]:
        return ["--device", "cpu"] if self.small else ["--device", "cuda"]


class SectionFailedError(RuntimeError):
    """What a section was to show did not hold."""


def ring(options: Options) -> None:
    """Its records are ring_report's own."""
    sections = "stress,speed" if options.small else "correctness,stress,speed,parts"
    report = [*TORCHRUN, "benchmarks.ring_report", "--out", str(options.out), "--only", sections]
    report += ["--transports", "peer,host", "--layers", "500", "--limit", "200"]
    print(_finished(report, 210), flush=True)


def vae(options: Options) -> None:
    """Its record is vae_parallel's own."""
    size = (
        ["--small", "--height", "272", "--width", "272", "--frames", "5"]
        if options.small
        else ["--height", "480", "--width", "832", "--frames", "65"]
    )
    report = [*TORCHRUN, "benchmarks.vae_parallel", "--out", str(options.out), "--repeats", "1", *size]
    print(_finished(report, 120), flush=True)


# --- generate ---------------------------------------------------------------------------------------------------------


def _generate(options: Options, output: Path, steps: int, *more: str) -> list[str]:
    # In float32, where one process and two differ by rounding alone and by little of it.
    given = ["--steps", str(steps), "--dtype", "fp32", *options.device, "--output", str(output), "--zoom", "1"]
    return ["para_kernels", "generate", "a handwritten 7 moving to the left", *given, *more]


def generate(options: Options) -> None:
    """The toy's video by `--ring 2` and by one process; the VAE whole in both, since tiling changes it."""
    steps = 3 if options.small else 30
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one.mp4", Path(folder) / "two.mp4"
        _finished([sys.executable, "-m", *_generate(options, one, steps)], 60)
        printed = _finished([*TORCHRUN, *_generate(options, two, steps, "--ring", "2", "--no-parallel-vae")], 60)
        expected, got = _pixels(one), _pixels(two)
    shown = next((line for line in printed.splitlines() if "ranks:" in line), "no line tells of ranks")
    same = expected.shape == got.shape
    worst = float(np.abs(expected.astype(int) - got.astype(int)).max()) if same else 255.0
    failed = not same or worst > PIXEL_TOLERANCE or f"{RANKS} ranks" not in shown
    _judge(
        options,
        "two-gpus-generate",
        Check("generate in 2 processes, pixel steps", len(got), int(failed), "float32", worst, PIXEL_TOLERANCE),
        f"{shown.strip()}; largest difference {worst:g} of 255",
    )


def _pixels(path: Path) -> np.ndarray:
    """(frames, bytes of a frame) of a video as it is played."""
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)  # what the video is
    return np.stack([np.frombuffer(frame, np.uint8) for frame in reader])


# --- death ------------------------------------------------------------------------------------------------------------


def death(options: Options) -> None:
    """Without torchrun, which would end the other rank by itself."""
    with tempfile.TemporaryDirectory() as folder:
        command = _generate(options, Path(folder) / "v.mp4", 5000, "--ring", "2", "--timeout", str(DEATH_TIMEOUT))
        with _ranks([sys.executable, "-m", *command], Path(folder)) as (processes, errors):
            _await_steps(processes, errors[0], seconds=100)
            processes[1].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            try:
                code = processes[0].wait(DEATH_TIMEOUT + 10)
            except subprocess.TimeoutExpired:
                code = None
            seconds = time.monotonic() - killed
            said = errors[0].read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    told = [line for line in said if "rank 0" in line and "rank 1" in line]
    failed = code in (None, 0) or not told
    _judge(
        options,
        "two-gpus-death",
        Check("a killed rank ends the other, seconds", 1, int(failed), None, seconds, DEATH_TIMEOUT + 10),
        (told or said or ["nothing was said"])[-1],
    )


@contextmanager
def _ranks(command: Sequence[str], folder: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path]]]:
    """The command once for each rank; what each writes to standard error. All are killed at the end."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    errors = [folder / f"rank{rank}.txt" for rank in range(RANKS)]
    processes: list[subprocess.Popen[bytes]] = []
    files: list[IO[bytes]] = []
    try:
        for rank, path in enumerate(errors):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in (place | meeting).items()}
            files.append(path.open("wb"))
            processes.append(
                subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=files[-1]
                )
            )  # fmt: skip
        yield processes, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for file in files:
            file.close()


def _await_steps(processes: Sequence[subprocess.Popen[bytes]], progress: Path, seconds: float) -> None:
    """Until rank 0's progress bar has counted two steps.

    Raises:
        SectionFailedError: if a rank ends before, or it takes longer than `seconds`.
    """
    end = time.monotonic() + seconds
    while " 2/5000" not in (said := progress.read_text(errors="replace")):
        ended = [rank for rank, process in enumerate(processes) if process.poll() is not None]
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
        print(_finished(command, 140), flush=True)


# --- the run ----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Options], None]] = {
    "ring": ring,
    "generate": generate,
    "death": death,
    "vae": vae,
    "sanitize": sanitize,
}


def main() -> int:
    options, only = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in only:
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


def _options() -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--small", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="A,B", help=f"of {', '.join(SECTIONS)}")
    given = parser.parse_args()
    only = given.only.split(",")
    if unknown := [name for name in only if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}")
    if not given.small and torch.cuda.device_count() < RANKS:
        parser.error(f"needs {RANKS} GPUs, or --small")
    return Options(given.out.resolve(), given.small), only


if __name__ == "__main__":
    sys.exit(main())
