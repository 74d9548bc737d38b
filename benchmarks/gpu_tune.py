"""Sweep the launch configurations of a kernel on this GPU: how the tables that ship with the package were chosen.

    python -m benchmarks.gpu_tune --out /tmp/tune

Times every candidate at 24 heads and writes one JSON record per candidate. Nothing is changed: a better
configuration has to be written into `triton_kernels/attention.py` or `triton_kernels/residual_diff.py` by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from para_kernels import flash_attention, residual_diff
from para_kernels.triton_kernels import attention as attention_kernel
from para_kernels.triton_kernels import residual_diff as residual_kernel
from para_kernels.triton_kernels.attention import AttentionConfig

from .inputs import attention_flops, attention_inputs, hidden_states
from .record import OURS, Record, write_records
from .timing import medians_ms

HEADS, LENGTH = 24, 16384
# (block_m, block_n, num_warps, num_stages)
ATTENTION: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    64: ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 4), (64, 128, 4, 3), (128, 128, 4, 2)),
    128: (
        (128, 128, 8, 3),
        (128, 128, 8, 2),
        (128, 64, 8, 4),
        (128, 64, 8, 3),
        (128, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 32, 4, 4),
    ),
    256: ((128, 64, 8, 2), (128, 32, 8, 3)),
}
# (elements per tile, widest row, tiles per program)
RESIDUAL = tuple(
    (tile, cols, tiles) for tile in (4096, 8192, 16384) for cols in (512, 1024, 2048) for tiles in (1, 4, 16)
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    device = torch.device("cuda", 0)
    write_records("gpu-tuning", [*_sweep_attention(device), *_sweep_residual(device)], options.out)
    return 0


def _sweep_attention(device: torch.device) -> list[Record]:
    records = []
    for head_dim, candidates in ATTENTION.items():
        q, k, v = attention_inputs(1, LENGTH, HEADS, head_dim, torch.bfloat16, device)
        flops = attention_flops([LENGTH], [LENGTH], HEADS, head_dim)
        for candidate in candidates:
            attention_kernel._CONFIGS["sm90 tma", head_dim] = AttentionConfig(*candidate)
            attention_kernel._plan.cache_clear()
            ms = medians_ms({OURS: lambda q=q, k=k, v=v: flash_attention(q, k, v)}, device, seconds=1.0)[OURS]
            block_m, block_n, num_warps, num_stages = candidate
            shape = {"B": 1, "S": LENGTH, "H": HEADS, "D": head_dim, "block_m": block_m, "block_n": block_n}
            shape |= {"num_warps": num_warps, "num_stages": num_stages}
            records.append(Record("tune_attention", shape, "bfloat16", OURS, ms, tflops=flops / ms / 1e9))
            print(shape, f"{flops / ms / 1e9:.0f} TFLOP/s", flush=True)
    return records


def _sweep_residual(device: torch.device) -> list[Record]:
    hidden = [hidden_states((1, 119056, 3072), torch.bfloat16, device) for _ in range(3)]
    records = []
    for tile, cols, tiles in RESIDUAL:
        residual_kernel._TILE, residual_kernel._MAX_COLS, residual_kernel._TILES_PER_PROGRAM = tile, cols, tiles
        residual_kernel._plan.cache_clear()
        ms = medians_ms({OURS: lambda: residual_diff(*hidden)}, device, seconds=1.0)[OURS]
        shape = {"B": 1, "S": 119056, "C": 3072, "tile": tile, "max_cols": cols, "tiles_per_program": tiles}
        gbps = 4.0 * hidden[0].nbytes / ms / 1e6
        records.append(Record("tune_residual_diff", shape, "bfloat16", OURS, ms, gbps=gbps))
        print(shape, f"{gbps:.0f} GB/s", flush=True)
    return records


if __name__ == "__main__":
    sys.exit(main())
