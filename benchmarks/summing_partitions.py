"""A warp-specialised kernel of a sum in each partition, for `benchmarks.sanitize` to compare with: its shared memory
and its barriers are all the compiler's.

compute-sanitizer --tool racecheck python -m benchmarks.summing_partitions
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LAUNCHES = 4


@gluon.jit
def _write(out, part: gl.constexpr):
    rows = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + part * 128 + rows, rows + gl.sum(rows, 0))


@gluon.jit
def _summing_partitions(out):
    gl.warp_specialize([(_write, (out, 0)), (_write, (out, 1)), (_write, (out, 2))], [4, 4], [64, 64])


def main() -> int:
    out = torch.empty(3, 128, dtype=torch.int32, device="cuda")
    for _ in range(LAUNCHES):
        _summing_partitions[(8,)](out, num_warps=4)  # pyright: ignore[reportIndexIssue, reportCallIssue]
    torch.cuda.synchronize()
    assert (out.cpu() == torch.arange(128) + 127 * 64).all()
    print(f"{LAUNCHES} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
