"""The ring's kernels on one GPU, for compute-sanitizer: all pieces local, flags written by a copy that comes late.

    compute-sanitizer --tool racecheck python -m benchmarks.ring_launches

Pieces that a copy engine brings from another process are memory that compute-sanitizer knows nothing of; here the same
kernels read pieces of this process, whose flags arrive while they wait. Results are compared with `flash_attention`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from para_kernels import flash_attention
from para_kernels.triton_kernels import ring_attention
from para_kernels.triton_kernels.dispatch import ring_attention_forward

from .reference import TOLERANCES, relative_error

# (lengths in order of consumption, heads, key heads, head dim, kv_lens, dtype)
CASES = (
    ((130, 257), 3, 3, 128, None, torch.bfloat16),
    ((64, 1, 0, 200), 4, 2, 64, (265, 90), torch.bfloat16),
    ((190, 70), 2, 2, 128, (0, 260), torch.float16),
    ((33, 50), 2, 1, 32, None, torch.float32),
)
EPOCH, TIMEOUT_SECONDS, DELAY_CYCLES = 7, 20.0, 1_000_000


def main() -> int:
    if not torch.cuda.is_available():
        print("ring_launches: needs an NVIDIA GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    failed = 0
    for lengths, heads, kv_heads, head_dim, kv_lens, dtype in CASES:
        worst = error_of(lengths, heads, kv_heads, head_dim, kv_lens, dtype, device)
        failed += not worst <= 2 * TOLERANCES[dtype]  # both sides of the comparison are rounded
        print(f"{lengths} {dtype}: error {worst:.1e}", flush=True)
    print(f"{len(CASES)} launches" if not failed else f"{failed} failed", flush=True)
    return 1 if failed else 0


def error_of(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_lens: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The first piece's queries on all pieces, against one call on the whole sequence."""
    batch, total = 1 if kv_lens is None else len(kv_lens), sum(lengths)
    generator = torch.Generator(device).manual_seed(total)
    q, k, v = (
        torch.randn(batch, total, h, head_dim, generator=generator, device=device, dtype=dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    q = q[:, : lengths[0]]
    lens = None if kv_lens is None else torch.tensor(kv_lens, dtype=torch.int32, device=device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, lengths[0], device=device)
    flags = torch.zeros(len(lengths), kv_heads, dtype=torch.int32, device=device)
    error = torch.zeros(ring_attention.ERROR_WORDS, dtype=torch.int32, device=device)
    memory, table = packed(k, v, lengths)
    pieces = ring_attention.Pieces(memory, table, flags, 1, EPOCH, error, TIMEOUT_SECONDS)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    arrive_late(flags)
    finish = ring_attention_forward(
        q, pieces, total, out, lse, None, lens, head_dim**-0.5, kv_heads=kv_heads, own_start=0, capability=capability
    )
    finish()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    expected, expected_lse = flash_attention(q, k, v, kv_lens=lens, return_lse=True)
    if error.any() or not torch.equal(lse.isneginf(), expected_lse.isneginf()):
        return float("inf")
    alive = expected_lse.isfinite()
    return max(relative_error(out, expected), relative_error(lse[alive], expected_lse[alive]))


def packed(k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All pieces in one memory, and their table."""
    batch, _, kv_heads, head_dim = k.shape
    memory = torch.empty(2 * batch * kv_heads * sum(lengths), head_dim, dtype=k.dtype, device=k.device)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = []
    for start, length in zip(starts, lengths, strict=True):
        first_row = 2 * batch * kv_heads * start
        rows_of_piece = slice(start, start + length)
        ring_attention.pack_piece(k[:, rows_of_piece], v[:, rows_of_piece], memory, first_row)
        rows.append((first_row, start, length))
    return memory, torch.tensor(rows, dtype=torch.int32, device=k.device)


def arrive_late(flags: Tensor) -> None:
    """Flags that reach the epoch while the kernel runs, by a copy engine: it needs no multiprocessor."""
    if flags.device.type != "cuda":
        flags.fill_(EPOCH)
        return
    arrived = torch.full(flags.shape, EPOCH, dtype=flags.dtype).pin_memory()
    side = torch.cuda.Stream(flags.device, priority=-1)
    side.wait_stream(torch.cuda.current_stream(flags.device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY_CYCLES)
        flags.copy_(arrived, non_blocking=True)


if __name__ == "__main__":
    sys.exit(main())
