"""The GPU report's timings: each operation against its peers in one run, at HunyuanVideo's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from para_kernels import flash_attention, flash_attention_varlen, merge_states, residual_diff

from .inputs import attention_flops, attention_inputs, cu_seqlens, hidden_states, key_mask, lens_tensor
from .peers import (
    ATTENTION_PEERS,
    SDPA_MASKED,
    Attention,
    PeerUnavailableError,
    attention_peer,
    eager_merge_states,
    eager_residual_diff,
    sdpa,
)
from .record import OURS, Record
from .report_checks import Result, relative_error
from .timing import host_microseconds, medians_ms

MASKED_KEYS = 200  # of 256 text tokens, a short prompt's padding


def _sizes(device: torch.device) -> tuple[tuple[int, ...], int, int, torch.dtype]:
    """(lengths, heads, head dim, dtype): HunyuanVideo's, up to 720p and 129 frames; tiny on a CPU, as a rehearsal."""
    if device.type == "cuda":
        return (4096, 16384, 32768, 119056), 24, 128, torch.bfloat16
    return (320, 512), 4, 64, torch.float32


def _usable_peers(device: torch.device, lines: list[str], leave_out: tuple[str, ...] = ()) -> dict[str, Attention]:
    peers = {}
    for name in ATTENTION_PEERS:
        try:
            if name not in leave_out:
                peers[name] = attention_peer(name, device)
        except PeerUnavailableError as reason:
            lines.append(f"without {name}: {reason}")
    return peers


def attention(device: torch.device) -> Result:
    """Dense attention of one long sequence against every peer that runs here."""
    lengths, heads, head_dim, dtype = _sizes(device)
    lines: list[str] = []
    records: list[Record] = []
    # SDPA alone chooses cuDNN or flash, which are timed by name; flex_attention compiles, which takes its time.
    left_out = ("SDPA", "flex_attention") if device.type == "cuda" else ("flex_attention",)
    peers = _usable_peers(device, lines, left_out)
    for length in lengths:
        q, k, v = attention_inputs(1, length, heads, head_dim, dtype, device)
        own_k = k.clone()  # for peers that change K in place
        candidates: dict[str, Callable[[], object]] = {OURS: lambda q=q, k=k, v=v: flash_attention(q, k, v)}
        for name, peer in peers.items():
            candidates[name] = lambda peer=peer, q=q, own_k=own_k, v=v: peer(q, own_k, v)
        times = medians_ms(candidates, device)
        flops = attention_flops([length], [length], heads, head_dim)
        agreement = _agreement(q, k, v, peers)
        shape = {"B": 1, "S": length, "H": heads, "D": head_dim}
        records += _versus_peers("flash_attention", shape, dtype, times, flops=flops, notes={"difference": agreement})
        speeds = ", ".join(f"{name} {flops / ms / 1e9:.0f}" for name, ms in times.items())
        lines.append(f"S={length}: TFLOP/s {speeds}; relative difference to a peer {agreement:.1e}")
    return lines, records


def _agreement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, peers: Mapping[str, Attention]) -> float:
    """Relative difference to an exact peer, on the first head: float64 is out of reach at these lengths."""
    exact = next(peers[name] for name in ("cuDNN", "SDPA") if name in peers)
    return relative_error(_first_head(flash_attention(q, k, v)), _first_head(exact(q, k, v)))


def _first_head(out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    assert isinstance(out, torch.Tensor)  # a pair only where the lse was asked for
    return out[:, :, 0]


def masked(device: torch.device) -> Result:
    """Key lengths against SDPA with the boolean mask that diffusers builds for HunyuanVideo."""
    lengths, heads, head_dim, dtype = _sizes(device)
    lines: list[str] = []
    records: list[Record] = []
    for length in lengths:
        valid = length - MASKED_KEYS
        q, k, v = attention_inputs(1, length, heads, head_dim, dtype, device)
        kv_lens, mask = lens_tensor([valid], device), key_mask([valid], length, device)
        times = medians_ms(
            {
                OURS: lambda q=q, k=k, v=v, kv_lens=kv_lens: flash_attention(q, k, v, kv_lens=kv_lens),
                SDPA_MASKED: lambda q=q, k=k, v=v, mask=mask: sdpa(q, k, v, mask),
            },
            device,
        )
        difference = relative_error(
            _first_head(flash_attention(q, k, v, kv_lens=kv_lens)), _first_head(sdpa(q, k, v, mask))
        )
        flops = attention_flops([length], [valid], heads, head_dim)
        shape = {"B": 1, "S": length, "valid": valid, "H": heads, "D": head_dim}
        records += _versus_peers(
            "flash_attention_kv_lens", shape, dtype, times, flops=flops, notes={"difference": difference}
        )
        lines.append(
            f"S={length}, {valid} valid: {flops / times[OURS] / 1e9:.0f} TFLOP/s, "
            f"{times[SDPA_MASKED] / times[OURS]:.2f} x {SDPA_MASKED}; relative difference {difference:.1e}"
        )
    return lines, records


def varlen(device: torch.device) -> Result:
    """What lengths cost: the same work with lengths and as dense calls, which have nothing to look up."""
    _, heads, head_dim, dtype = _sizes(device)
    lens = (16384, 12001, 9100, 14333) if device.type == "cuda" else (320, 211, 97, 256)
    longest = max(lens)
    q, k, v = attention_inputs(len(lens), longest, heads, head_dim, dtype, device)
    packed_q, packed_k, packed_v = (torch.cat([x[b, :n] for b, n in enumerate(lens)]) for x in (q, k, v))
    alone = [[x[b : b + 1, :length].contiguous() for x in (q, k, v)] for b, length in enumerate(lens)]
    lens_on_device, offsets = lens_tensor(lens, device), cu_seqlens(lens, device)
    dense_calls = f"{len(lens)} dense calls"
    candidates: dict[str, Callable[[], object]] = {
        "padded": lambda: flash_attention(q, k, v, kv_lens=lens_on_device, q_lens=lens_on_device),
        "packed": lambda: flash_attention_varlen(packed_q, packed_k, packed_v, offsets, offsets, longest, longest),
        dense_calls: lambda: [flash_attention(*sample) for sample in alone],
    }
    times = medians_ms(candidates, device)
    flops = attention_flops(lens, lens, heads, head_dim)
    lines = []
    records = []
    for form in ("padded", "packed"):
        ratio = times[form] / times[dense_calls]
        lines.append(f"{form}, lengths {lens}: {ratio - 1:+.2%} time against {dense_calls} of the same work")
        records.append(
            Record(
                op=f"varlen_{form}",
                shape={"B": len(lens), "T": sum(lens), "H": heads, "D": head_dim},
                dtype=_name(dtype),
                kernel=OURS,
                median_ms=times[form],
                peer=dense_calls,
                peer_ms=times[dense_calls],
                tflops=flops / times[form] / 1e9,
            )
        )
    one_lines, one_records = _one_length(device)
    return lines + one_lines, records + one_records


def _one_length(device: torch.device) -> Result:
    """One sample with its last keys absent against the dense call on the keys that are there."""
    lengths, heads, head_dim, dtype = _sizes(device)
    lines: list[str] = []
    records: list[Record] = []
    for length in lengths[1:]:
        valid = length - MASKED_KEYS
        q, k, v = attention_inputs(1, length, heads, head_dim, dtype, device)
        kv_lens = lens_tensor([valid], device)
        times = medians_ms(
            {
                OURS: lambda q=q, k=k, v=v, kv_lens=kv_lens: flash_attention(q, k, v, kv_lens=kv_lens),
                "dense": lambda q=q, k=k[:, :valid], v=v[:, :valid]: flash_attention(q, k, v),
            },
            device,
            seconds=6.0,
        )
        flops = attention_flops([length], [valid], heads, head_dim)
        shape = {"B": 1, "S": length, "valid": valid, "H": heads, "D": head_dim}
        records += _versus_peers("varlen_one", shape, dtype, times, flops=flops)
        lines.append(f"kv_lens={valid} of {length}: {times[OURS] / times['dense'] - 1:+.2%} time against dense")
    return lines, records


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
        "residual_diff", sizes, _name(dtype), OURS, times[OURS], "eager", times["eager"], gbps=gbps, notes=notes
    )
    first = Record(
        "residual_diff_first",
        sizes,
        _name(dtype),
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
        _name(dtype),
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
    """Microseconds of the host per call, on inputs so small that the device keeps up."""
    q, k, v = attention_inputs(1, 64, 2, 64, torch.bfloat16, device)
    kv_lens, mask = lens_tensor([50], device), key_mask([50], 64, device)
    hidden = [hidden_states((1, 64, 64), torch.bfloat16, device) for _ in range(3)]
    pairs: dict[str, tuple[str, Callable[[], object], Callable[[], object]]] = {
        "flash_attention_kv_lens": (
            SDPA_MASKED,
            lambda: flash_attention(q, k, v, kv_lens=kv_lens),
            lambda: sdpa(q, k, v, mask),
        ),
        "flash_attention": ("SDPA", lambda: flash_attention(q, k, v), lambda: sdpa(q, k, v)),
        "residual_diff": ("eager", lambda: residual_diff(*hidden), lambda: eager_residual_diff(*hidden)),
    }
    lines = []
    records = []
    for op, (peer, ours, theirs) in pairs.items():
        ours_us, peer_us = host_microseconds(ours, device), host_microseconds(theirs, device)
        lines.append(f"{op}: {ours_us:.1f} us per call, {peer} {peer_us:.1f} us")
        records.append(Record(f"host_{op}", {"B": 1, "S": 64}, "bfloat16", OURS, ours_us / 1e3, peer, peer_us / 1e3))
    return lines, records


def flex_attention(device: torch.device) -> Result:
    """Dense attention against compiled flex_attention, at one length: compiling it takes a while."""
    lengths, heads, head_dim, dtype = _sizes(device)
    length = lengths[1]
    q, k, v = attention_inputs(1, length, heads, head_dim, dtype, device)
    peer = attention_peer("flex_attention", device)
    times = medians_ms({OURS: lambda: flash_attention(q, k, v), "flex_attention": lambda: peer(q, k, v)}, device)
    flops = attention_flops([length], [length], heads, head_dim)
    shape = {"B": 1, "S": length, "H": heads, "D": head_dim}
    speeds = ", ".join(f"{name} {flops / ms / 1e9:.0f}" for name, ms in times.items())
    return [f"S={length}: TFLOP/s {speeds}"], _versus_peers("flash_attention", shape, dtype, times, flops=flops)


def _versus_peers(
    op: str,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    times: Mapping[str, float],
    flops: float,
    notes: Mapping[str, float] | None = None,
) -> list[Record]:
    """One record per peer; `times` in milliseconds by name, this package's under OURS."""
    ours = times[OURS]
    return [
        Record(op, dict(shape), _name(dtype), OURS, ours, peer, ms, tflops=flops / ours / 1e9, notes=dict(notes or {}))
        for peer, ms in times.items()
        if peer != OURS
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
