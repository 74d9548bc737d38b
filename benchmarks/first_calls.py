"""The first calls of attention in a fresh process: how long they take, what they compile, what new lengths compile.

    TRITON_CACHE_DIR=/tmp/empty python -m benchmarks.first_calls --dtype bfloat16 --head-dim 128

Prints one line of JSON. The GPU report's section `compile` runs this once with an empty cache directory and once more
with the same one, for each dtype and head dim.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from para_kernels import flash_attention, flash_attention_varlen

from .inputs import attention_inputs, cu_seqlens, lens_tensor
from .record import REPOSITORY, Check
from .section import CheckFailedError, Result, need_cuda

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_DIMS = (64, 128)
HEADS = 24
LONG, SHORT = 4096, 200  # another configuration is chosen for few keys
NEW_LENGTHS = 50
ALLOWED_SECONDS = 20.0
TIMEOUT_SECONDS = 180


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(json.dumps(first_calls(DTYPES[options.dtype], options.head_dim, device)))
    return 0


def first_calls(dtype: torch.dtype, head_dim: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the first call of each form, and the compiled kernels by name before and after fifty new lengths."""
    sizes = (LONG, SHORT) if device.type == "cuda" else (SHORT,)
    hidden = torch.randn(8, device=device).sum()  # the device is awake and torch's own kernels are loaded
    _wait(device)
    seconds = {}
    for length in sizes:
        for form, call in _forms(length, dtype, head_dim, device).items():
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[f"{form}, {length} tokens"] = time.perf_counter() - start
    before = compiled_kernels()
    for index in range(NEW_LENGTHS):
        length = (37 * index + 3) if index % 2 else (LONG + 64 * index + 16 if device.type == "cuda" else 16 * index)
        for call in _forms(length, dtype, head_dim, device).values():
            call()
    _wait(device)
    assert hidden.isfinite()
    return {"seconds": seconds, "compiled": before, "after_new_lengths": compiled_kernels()}


def _forms(length: int, dtype: torch.dtype, head_dim: int, device: torch.device) -> dict[str, Callable[[], object]]:
    q, k, v = attention_inputs(1, length, HEADS, head_dim, dtype, device)
    lens, offsets = lens_tensor([length - length // 3], device), cu_seqlens([length - length // 3], device)
    return {
        "dense": lambda: flash_attention(q, k, v),
        "kv_lens": lambda: flash_attention(q, k, v, kv_lens=lens),
        "kv_lens and q_lens": lambda: flash_attention(q, k, v, kv_lens=lens, q_lens=lens),
        "packed": lambda: flash_attention_varlen(q[0], k[0], v[0], offsets, offsets, length, length),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled_kernels() -> dict[str, int]:
    """Variants of each kernel in Triton's cache directory: every compilation leaves a cubin there."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    return dict(sorted(Counter(path.stem for path in Path(folder).rglob("*.cubin")).items())) if folder else {}


# --- the section ------------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """One process of `first_calls`: its JSON, and what it said on standard error."""

    dtype: str
    head_dim: int
    found: dict[str, Any]
    said: str


def compile_time(device: torch.device) -> Result:
    """First calls from an empty cache and from a warm one, for each dtype and head dim, each in its own process."""
    need_cuda(device)
    with tempfile.TemporaryDirectory() as folder:
        cold = _children(Path(folder))
        warm = _children(Path(folder))
    lines: list[str] = []
    checks: list[Check] = []
    for first, again in zip(cold, warm, strict=True):
        check = _check(first, again)
        checks.append(check)
        notes = ", ".join(f"{name} {value}" for name, value in check.notes.items())
        lines.append(f"{first.dtype}, D={first.head_dim}: first call {check.worst:.1f} s; {notes}")
        if first.said:
            lines.append(f"    it said: {first.said.splitlines()[0]}")
    return lines, [*checks]


def _check(first: Child, again: Child) -> Check:
    seconds = list(first.found["seconds"].values())
    before, after = first.found["compiled"], first.found["after_new_lengths"]
    new = sum(after.values()) - sum(before.values())
    warm = list(again.found["seconds"].values())
    return Check(
        check=f"first call, D={first.head_dim}",
        cases=1 + NEW_LENGTHS,
        failures=new + (seconds[0] > ALLOWED_SECONDS),
        dtype=first.dtype,
        worst=seconds[0],
        allowed=ALLOWED_SECONDS,
        notes={
            "seconds_all_forms": sum(seconds),
            "seconds_warm": warm[0],
            "seconds_warm_all_forms": sum(warm),
            "compiled_by_new_lengths": new,
            **{f"variants_of_{name.strip('_')}": count for name, count in after.items()},
        },
    )


def _children(folder: Path) -> list[Child]:
    """All dtypes and head dims at once, each with a cache directory of its own in `folder`."""
    running = [
        (dtype, head_dim, _start(dtype, head_dim, folder / f"{dtype}-{head_dim}"))
        for dtype in DTYPES
        for head_dim in HEAD_DIMS
    ]
    try:
        return [_finished(*child) for child in running]
    finally:
        for _, _, process in running:
            process.kill()  # nothing, where it has ended


def _finished(dtype: str, head_dim: int, process: subprocess.Popen[str]) -> Child:
    try:
        output, said = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise CheckFailedError(f"{dtype}, D={head_dim}: not done after {TIMEOUT_SECONDS} s") from None
    if process.returncode:
        raise CheckFailedError(f"{dtype}, D={head_dim}: exit code {process.returncode}\n{said[-2000:]}")
    return Child(dtype, head_dim, json.loads(output.splitlines()[-1]), said.strip())


def _start(dtype: str, head_dim: int, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.first_calls", "--dtype", dtype, "--head-dim", str(head_dim)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
