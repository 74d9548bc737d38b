"""compute-sanitizer over the kernels, on small problems: memory errors and races in shared memory.

    python -m benchmarks.sanitize --out /tmp/report
    python -m benchmarks.sanitize --out /tmp/report --only "racecheck attention"

Each run is a process of its own, all at once. A run that finds something, ends badly, makes no call or is not done in
time has failed; the exit code is then 1. Needs an NVIDIA GPU and compute-sanitizer on the path.

One kind of race is counted apart: where Triton starts and ends partitions of a warp-specialised kernel, it tells the
waiting warps what to do through words in shared memory, written before a barrier over the whole program and read
behind it, and racecheck reports them. A race is of this kind if all of its accesses stand at the kernel's `def`, or its
`gl.warp_specialize` and the `if` before it. Why racecheck does so is not known: in the run "racecheck control", of a
kernel whose shared memory and barriers are all Triton's, it does not.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from para_kernels.triton_kernels import hopper_attention, hopper_ring_attention

from . import summing_partitions
from .record import REPOSITORY, Check, write_records

TIMEOUT_SECONDS = 130
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}
# How the programs below say what they did: pytest, and benchmarks.random_shapes.
DONE = (
    re.compile(r"\b(\d+) passed"),
    re.compile(r"^(\d+) problems judged", re.MULTILINE),
    re.compile(r"^(\d+) launches$", re.MULTILINE),
)
RACE = re.compile(r"Race reported between (.*access at .*(?:\n=+ +and .*access at .*)+)")
PLACE = re.compile(r" in ([\w./]+\.py):(\d+)")
DISPATCHING = tuple(
    Path(str(module.__file__)) for module in (hopper_attention, hopper_ring_attention, summing_partitions)
)
FAILED = re.compile(r"\b[1-9]\d* (?:failed|errors?)\b")


@dataclass(frozen=True)
class Run:
    """One program under one tool."""

    tool: str
    name: str
    arguments: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.tool} {self.name}"

    @property
    def command(self) -> list[str]:
        limit = ("--print-limit", "100000")  # all of them: each is looked at
        return ["compute-sanitizer", "--tool", self.tool, *limit, sys.executable, "-m", *self.arguments]


def _tests(path: str, select: str) -> tuple[str, ...]:
    return ("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", "-k", select, path)


def _problems(seed: int, cases: int, longest: int) -> tuple[str, ...]:
    options = {"--seed": seed, "--cases": cases, "--longest": longest}
    return ("benchmarks.random_shapes", *(str(part) for option in options.items() for part in option))


PROGRAMS = {
    "attention": _tests("tests/test_attention.py", "grouped or packed or hide"),
    "operators": _tests("tests/test_ops.py", "opcheck or merging or bit or device_value"),
    "random problems": _problems(seed=1, cases=12, longest=300),
    # Few and long, for the kernel that is chosen for long sequences. Of the seeds whose problems have both head dims,
    # both dtypes, lengths padded and packed, and large scores, the one with the least work.
    "ring": ("benchmarks.ring_launches",),
    "long random problems": _problems(seed=529, cases=8, longest=2500),
}
RUNS = [
    *(Run(tool, name, arguments) for tool in SUMMARY for name, arguments in PROGRAMS.items()),
    Run("racecheck", "control", ("benchmarks.summing_partitions",)),
]


def main() -> int:
    options = _options()
    chosen = [run for run in RUNS if options.only is None or run.title == options.only]
    with ThreadPoolExecutor(len(chosen)) as pool:
        checks = list(pool.map(run_one, chosen))
    write_records("gpu-sanitize", checks, options.out)
    return 0 if all(check.passed for check in checks) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON record")
    parser.add_argument("--only", choices=[run.title for run in RUNS], help="one run instead of all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    return options


def run_one(run: Run) -> Check:
    """Run it, print what it said last, and judge it."""
    start = time.perf_counter()
    output = _output(run.command)
    seconds = time.perf_counter() - start
    check = judge(run, output, seconds)
    verdict = "clean" if check.passed else "FAILED"
    tail = "" if check.passed else "\n" + "\n".join(output.splitlines()[-40:])
    print(f"{run.title}: {verdict}, {check.cases} calls checked, {seconds:.0f} s{tail}", flush=True)
    return check


def _output(command: list[str]) -> str:
    """Standard output and error together; of a run that is not done in time, what it had written."""
    # Every tensor its own allocation: past the end of one is past the end of what the tool knows, not in the next one.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the tool and the program under it end together
    ) as process:
        try:
            return process.communicate(timeout=TIMEOUT_SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"{process.communicate()[0]}\nnot done after {TIMEOUT_SECONDS} s"


def judge(run: Run, output: str, seconds: float) -> Check:
    """A check of one run: `cases` are what the program did, `failures` what the tool found or that the run is void."""
    summary = SUMMARY[run.tool].search(output)
    done = next((int(found[1]) for pattern in DONE if (found := pattern.search(output))), 0)
    of_dispatch = sum(_is_of_dispatch(accesses) for accesses in RACE.findall(output))
    found = int(summary[1]) - of_dispatch if summary else 0
    void = summary is None or done == 0 or _program_failed(output)
    return Check(
        check=f"compute-sanitizer {run.title}",
        cases=done,
        failures=found + void,
        notes={
            "found": found if summary else None,
            "of_triton_dispatch": of_dispatch,
            "seconds": seconds,
            "command": _shown(run),
        },
    )


def _is_of_dispatch(accesses: str) -> bool:
    """Whether all accesses of a race stand where Triton starts and ends partitions."""
    places = [(Path(found[1]).name, int(found[2])) for found in PLACE.finditer(accesses)]
    return len(places) == accesses.count(" access at ") and set(places) <= _dispatch_places()


@functools.cache
def _dispatch_places() -> frozenset[tuple[str, int]]:
    """(file, line) of the entry functions of warp-specialised kernels, and of their calls of `gl.warp_specialize`."""
    found = set()
    for path in DISPATCHING:
        lines = path.read_text().splitlines()
        calls = [number for number, line in enumerate(lines, 1) if "gl.warp_specialize(" in line]
        entry = max(number for number, line in enumerate(lines, 1) if line.startswith("def ") and number < calls[0])
        found |= {(path.name, number) for call in calls for number in (entry, call - 1, call)}
    return frozenset(found)


def _program_failed(output: str) -> bool:
    """Whether pytest or the sweep itself counted a failure, apart from what the tool says on its own lines."""
    own = "\n".join(line for line in output.splitlines() if not line.startswith("========="))
    return FAILED.search(own) is not None


def _shown(run: Run) -> str:
    """The command as one would type it."""
    words = ["compute-sanitizer", "--tool", run.tool, "python", "-m", *run.arguments]
    return " ".join(f'"{word}"' if " " in word else word for word in words)


if __name__ == "__main__":
    sys.exit(main())
