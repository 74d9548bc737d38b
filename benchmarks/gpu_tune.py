"""Sweep the launch configurations of a kernel on this GPU: how the tables that ship with the package were chosen.

    python -m benchmarks.gpu_tune --out /tmp/tune
    python -m benchmarks.gpu_tune --out /tmp/tune --only hopper

Times every candidate at 24 heads and writes one JSON record per candidate. Nothing is changed: a better configuration
has to be written into the kernel's file by hand.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from para_kernels import flash_attention, ops, residual_diff
from para_kernels.triton_kernels import attention as attention_kernel
from para_kernels.triton_kernels import hopper_attention as hopper_kernel
from para_kernels.triton_kernels import hopper_choice
from para_kernels.triton_kernels import residual_diff as residual_kernel
from para_kernels.triton_kernels.attention import AttentionConfig, attention_forward
from para_kernels.triton_kernels.tail import MOST_CUTS, Cut

from .inputs import attention_flops, attention_inputs, hidden_states
from .record import OURS, Record, write_records
from .timing import graph_medians_ms, medians_ms

HEADS, LENGTH = 24, 16384
# (block_m, block_n, num_warps, num_stages)
PORTABLE: dict[int, tuple[tuple[int, int, int, int], ...]] = {
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
# (batch, queries, keys)
SMALL = (
    *((1, size, size) for size in (64, 128, 256, 512, 768, 1024, 1280, 1536, 2048, 4096)),
    *((4, size, size) for size in (128, 512, 2048)),
    (1, 4096, 256),
    (4, 4096, 256),
    (1, 4096, 512),
    (1, 1024, 4608),
    (1, 2304, 4608),
)
# Around the sizes at which cuDNN is faster: (batch, queries, keys)
SHORT = (
    *((batch, size, size) for size in (256, 384, 512, 640, 768, 1024) for batch in (1, 2, 3, 4, 6, 8)),
    *((1, queries, keys) for queries in (1024, 1536, 2048, 4096, 8192) for keys in (128, 256, 384, 512)),
)
# (elements per tile, widest row, tiles per program)
RESIDUAL = tuple(
    (tile, cols, tiles) for tile in (4096, 8192, 16384) for cols in (512, 1024, 2048) for tiles in (1, 4, 16)
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--only", choices=list(SWEEPS), help="one sweep instead of all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    device = torch.device("cuda", 0)
    for name in [options.only] if options.only else list(SWEEPS):
        write_records(f"gpu-tune_{name}", SWEEPS[name](device), options.out)
    return 0


def _forget_plans(kernel: ModuleType) -> None:
    """Launches planned for another configuration are not to be taken again, neither Python's nor the extension's."""
    kernel._plan.cache_clear()
    if ops._C is not None:
        ops._C.forget_attention_plans()


def _sweep_portable(device: torch.device) -> list[Record]:
    records = []
    capability = torch.cuda.get_device_capability(device)
    for head_dim, candidates in PORTABLE.items():
        q, k, v = attention_inputs(1, LENGTH, HEADS, head_dim, torch.bfloat16, device)
        out, lse = torch.empty_like(q), torch.empty(1, HEADS, LENGTH, dtype=torch.float32, device=device)
        call = functools.partial(attention_forward, q, k, v, out, lse, None, None, 1.0, capability=capability)
        flops = attention_flops([LENGTH], [LENGTH], HEADS, head_dim)
        for candidate in candidates:
            attention_kernel._CONFIGS["sm90 tma", head_dim] = AttentionConfig(*candidate)
            _forget_plans(attention_kernel)
            ms = medians_ms({OURS: call}, device, seconds=0.3)[OURS]
            block_m, block_n, num_warps, num_stages = candidate
            shape = {"B": 1, "S": LENGTH, "H": HEADS, "D": head_dim, "block_m": block_m, "block_n": block_n}
            shape |= {"num_warps": num_warps, "num_stages": num_stages}
            records.append(Record("tune_attention", shape, "bfloat16", "portable", ms, tflops=flops / ms / 1e9))
            print(shape, f"{flops / ms / 1e9:.0f} TFLOP/s", flush=True)
    return records


def _sweep_hopper(device: torch.device) -> list[Record]:
    """Every way to cut a problem at every small shape: what the constants of the Hopper kernel's choice rest on.

    The last round of tiles is left whole, and cut into two to eight parts.
    """
    records = []
    chosen = hopper_kernel.choose
    large, small = hopper_choice.CONFIGS[128], hopper_choice.SMALL_CONFIGS[128]
    choices = [hopper_choice.Choice(large, active, stays) for active in (3, 2) for stays in (True, False)]
    choices.append(hopper_choice.Choice(small, 1, False))
    for batch, queries, keys in SMALL:
        shape = {"B": batch, "Sq": queries, "Sk": keys, "H": HEADS, "D": 128}
        q = attention_inputs(batch, queries, HEADS, 128, torch.bfloat16, device)[0]
        k, v = attention_inputs(batch, keys, HEADS, 128, torch.bfloat16, device)[:2]
        for choice in choices + _cut(choices, queries, batch, device):
            hopper_kernel.choose = lambda *_, choice=choice, **__: choice
            _forget_plans(hopper_kernel)
            calls = [functools.partial(flash_attention, q, k, v)] * 10
            ms = graph_medians_ms({OURS: calls}, device)[OURS]
            rows = {"consumers": choice.config.consumers, "active": choice.active, "stays": int(choice.stays)}
            rows["cuts"] = choice.cut.cuts if choice.cut else 1
            records.append(Record("tune_hopper", shape | rows, "bfloat16", "hopper", ms))
            print(shape, rows, f"{ms * 1e3:.1f} us", flush=True)
    hopper_kernel.choose = chosen
    _forget_plans(hopper_kernel)
    return records


def _cut(
    choices: list[hopper_choice.Choice], queries: int, batch: int, device: torch.device
) -> list[hopper_choice.Choice]:
    """Those whose programs stay, with the tiles behind the last whole round in parts."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    cut = []
    for choice in choices:
        tiles = choice.tiles(queries, HEADS, batch)
        if choice.stays and tiles % processors:
            whole = tiles // processors * processors
            cut += [choice._replace(cut=Cut(whole, cuts)) for cuts in range(2, MOST_CUTS + 1)]
    return cut


def _sweep_cudnn(device: torch.device) -> list[Record]:
    """The Hopper kernel against cuDNN, both with the lse, where inputs are not in the L2."""
    records = []
    for batch, queries, keys in SHORT:
        sets = _input_sets(batch, queries, keys, device)
        times = graph_medians_ms(
            {
                "hopper": [functools.partial(_by_hopper, *inputs) for inputs in sets],
                "cuDNN": [functools.partial(_by_cudnn, *inputs) for inputs in sets],
            },
            device,
            rounds=10,
        )
        shape = {"B": batch, "Sq": queries, "Sk": keys, "H": HEADS, "D": 128}
        record = Record("tune_cudnn", shape, "bfloat16", "hopper", times["hopper"], "cuDNN", times["cuDNN"])
        tiles = -(-queries // 128) * HEADS * batch
        print(
            shape,
            f"{tiles} tiles; hopper {times['hopper'] * 1e3:.1f} us, cuDNN {times['cuDNN'] * 1e3:.1f} us",
            flush=True,
        )
        records.append(record)
    return records


def _input_sets(batch: int, queries: int, keys: int, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """So many q, k, v that together they are twice an H100's L2."""
    size = batch * (queries + 2 * keys) * HEADS * 128 * 2
    count = min(64, max(4, -(-2 * 50 * 2**20 // size)))
    of = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
    lengths = (queries, keys, keys)
    return [tuple(of(batch, length, HEADS, 128) for length in lengths) for _ in range(count)]


def _by_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    out, lse = torch.empty_like(q), q.new_empty((q.shape[0], HEADS, q.shape[1]), dtype=torch.float32)
    assert hopper_kernel.hopper_attention_forward(q, k, v, out, lse, None, None, 128**-0.5)


def _by_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    torch.ops.aten._scaled_dot_product_cudnn_attention(*(x.transpose(1, 2) for x in (q, k, v)), None, True)


def _sweep_residual(device: torch.device) -> list[Record]:
    hidden = [hidden_states((1, 119056, 3072), torch.bfloat16, device) for _ in range(3)]
    records = []
    for tile, cols, tiles in RESIDUAL:
        residual_kernel._TILE, residual_kernel._MAX_COLS, residual_kernel._TILES_PER_PROGRAM = tile, cols, tiles
        _forget_plans(residual_kernel)
        ms = medians_ms({OURS: lambda: residual_diff(*hidden)}, device, seconds=0.3)[OURS]
        shape = {"B": 1, "S": 119056, "C": 3072, "tile": tile, "max_cols": cols, "tiles_per_program": tiles}
        gbps = 4.0 * hidden[0].nbytes / ms / 1e6
        records.append(Record("tune_residual_diff", shape, "bfloat16", OURS, ms, gbps=gbps))
        print(shape, f"{gbps:.0f} GB/s", flush=True)
    return records


SWEEPS: dict[str, Callable[[torch.device], list[Record]]] = {
    "portable": _sweep_portable,
    "hopper": _sweep_hopper,
    "cudnn": _sweep_cudnn,
    "residual_diff": _sweep_residual,
}

if __name__ == "__main__":
    sys.exit(main())
