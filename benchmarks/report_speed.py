"""The GPU report's timings of what is bound by memory, and of the host's part of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from para_kernels import flash_attention, flash_attention_varlen, merge_states, residual_diff

from .inputs import attention_inputs, cu_seqlens, hidden_states, key_mask, lens_tensor
from .peers import SDPA_MASKED, eager_merge_states, eager_residual_diff, sdpa
from .record import OURS, Record
from .section import Result, dtype_name
from .timing import HOST_CALLS, host_microseconds, medians_ms


def residual_diff_speed(device: torch.device) -> Result:
    """The fused metric against the eager expression and against what a copy reaches."""
    shape = (1, 119056, 3072) if device.type == "cuda" else (2, 1024, 256)
    dtype = torch.bfloat16
    hidden_in, hidden_out, previous = (hidden_states(shape, dtype, device) for _ in range(3))
    target = torch.empty_like(hidden_in)
    times = medians_ms(
        {
            OURS: lambda: residual_diff(hidden_in, hidden_out, previous),
            "eager": lambda: eager_residual_diff(hidden_in, hidden_out, previous),
            "first step": lambda: residual_diff(hidden_in, hidden_out, None),
            "subtraction": lambda: hidden_out - hidden_in,
            "copy": lambda: target.copy_(hidden_in),
        },
        device,
    )
    size = float(hidden_in.nbytes)
    copy_gbps = 2 * size / times["copy"] / 1e6
    gbps, first_gbps = 4 * size / times[OURS] / 1e6, 3 * size / times["first step"] / 1e6
    sizes = dict(zip("BSC", shape, strict=True))
    notes = {"copy_gbps": copy_gbps, "of_copy": gbps / copy_gbps}
    lines = [
        f"{shape}: {gbps:.0f} GB/s, {gbps / copy_gbps:.1%} of a copy's {copy_gbps:.0f} GB/s; "
        f"{times['eager'] / times[OURS]:.2f} x eager ({times[OURS]:.3f} ms, {times['eager']:.3f} ms)",
        f"first step: {first_gbps:.0f} GB/s, {first_gbps / copy_gbps:.1%} of a copy; "
        f"{times['subtraction'] / times['first step']:.2f} x torch's subtraction",
    ]
    with_previous = Record(
        "residual_diff", sizes, dtype_name(dtype), OURS, times[OURS], "eager", times["eager"], gbps=gbps, notes=notes
    )
    first = Record(
        "residual_diff_first",
        sizes,
        dtype_name(dtype),
        OURS,
        times["first step"],
        "subtraction",
        times["subtraction"],
        gbps=first_gbps,
        notes={"copy_gbps": copy_gbps, "of_copy": first_gbps / copy_gbps},
    )
    return lines, [with_previous, first]


def merge_states_speed(device: torch.device) -> Result:
    """The softmax merge against the eager expression."""
    shape = (1, 119056, 24, 128) if device.type == "cuda" else (2, 256, 4, 64)
    dtype = torch.bfloat16
    batch, length, heads, _ = shape
    out_a, out_b = (hidden_states(shape, dtype, device) for _ in range(2))
    lse_a, lse_b = (hidden_states((batch, heads, length), torch.float32, device) for _ in range(2))
    target = torch.empty_like(out_a)
    times = medians_ms(
        {
            OURS: lambda: merge_states(out_a, lse_a, out_b, lse_b),
            "eager": lambda: eager_merge_states(out_a, lse_a, out_b, lse_b),
            "copy": lambda: target.copy_(out_a),
        },
        device,
    )
    gbps = 3.0 * (out_a.nbytes + lse_a.nbytes) / times[OURS] / 1e6
    copy_gbps = 2.0 * out_a.nbytes / times["copy"] / 1e6
    record = Record(
        "merge_states",
        dict(zip("BSHD", shape, strict=True)),
        dtype_name(dtype),
        OURS,
        times[OURS],
        "eager",
        times["eager"],
        gbps=gbps,
        notes={"copy_gbps": copy_gbps, "of_copy": gbps / copy_gbps},
    )
    line = f"{shape}: {gbps:.0f} GB/s, {gbps / copy_gbps:.1%} of a copy; {times['eager'] / times[OURS]:.2f} x eager"
    return [line], [record]


def host_overhead(device: torch.device) -> Result:
    """Microseconds of the host per call, at a short and a long sequence: different kernels may be chosen for them."""
    lines: list[str] = []
    records: list[Record] = []
    with torch.no_grad():
        for length in (128, 4096) if device.type == "cuda" else (16,):
            for op, (ours, peer, theirs) in _host_calls(length, device).items():
                ours_us = host_microseconds(ours, device, *_few(device))
                peer_us = host_microseconds(theirs, device, *_few(device))
                lines.append(f"{op}, S={length}: {ours_us:.1f} us per call, {peer} {peer_us:.1f} us")
                shape = {"B": 1, "S": length, "H": 2, "D": 128}
                records.append(Record(f"host_{op}", shape, "bfloat16", OURS, ours_us / 1e3, peer, peer_us / 1e3))
    return lines, [*records]


def _few(device: torch.device) -> tuple[int, int]:
    """(calls, samples): on a CPU, where the op itself is what takes the time, a rehearsal."""
    return (HOST_CALLS, 15) if device.type == "cuda" else (5, 3)


def _host_calls(length: int, device: torch.device) -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """By operation: this package's call, the peer's name, its call."""
    dtype = torch.bfloat16
    q, k, v = attention_inputs(1, length, 2, 128, dtype, device)
    valid = length - length // 4
    kv_lens, mask, offsets = (
        lens_tensor([valid], device),
        key_mask([valid], length, device),
        cu_seqlens([valid], device),
    )
    hidden = [hidden_states((1, length, 256), dtype, device) for _ in range(3)]
    out, lse = flash_attention(q, k, v, return_lse=True)
    packed = (q[0], k[0], v[0], offsets, offsets, valid, valid)
    return {
        "flash_attention": (lambda: flash_attention(q, k, v), "SDPA", lambda: sdpa(q, k, v)),
        "flash_attention_kv_lens": (
            lambda: flash_attention(q, k, v, kv_lens=kv_lens),
            SDPA_MASKED,
            lambda: sdpa(q, k, v, mask),
        ),
        "flash_attention_varlen": (lambda: flash_attention_varlen(*packed), "SDPA", lambda: sdpa(q, k, v)),
        "merge_states": (
            lambda: merge_states(out, lse, out, lse),
            "eager",
            lambda: eager_merge_states(out, lse, out, lse),
        ),
        "residual_diff": (lambda: residual_diff(*hidden), "eager", lambda: eager_residual_diff(*hidden)),
    }
