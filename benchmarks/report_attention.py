"""The GPU report's timings of attention: long, masked, of various lengths, and small, against peers in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, isqrt

import torch
from torch import Tensor

from para_kernels import flash_attention, flash_attention_varlen

from .inputs import attention_flops, attention_inputs, cu_seqlens, key_mask, lens_tensor
from .peers import (
    ATTENTION_PEERS,
    CUDNN,
    FA3,
    PORTABLE,
    SDPA_MASKED,
    PeerUnavailableError,
    attention_peer,
    fa3_packed,
    fa3_padded,
    runs,
    sdpa,
)
from .power import sustained
from .record import OURS, Record
from .reference import relative_error
from .section import Result, dtype_name
from .timing import graph_medians_ms, medians_ms

MASKED_KEYS = 200  # of 256 text tokens, a short prompt's padding
ROUNDS = 60  # at most; the long ones are bounded by their time
SUSTAINED_SECONDS = 1.6
ROTATED_BYTES = 2 * 50 * 2**20  # q, k and v of all input sets of a small problem: twice an H100's L2


@dataclass(frozen=True)
class Size:
    """A dense problem of the section `attention`: batch 1, as many key heads as query heads."""

    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    peers: tuple[str, ...]


def _sizes(device: torch.device) -> tuple[tuple[int, ...], int, int, torch.dtype]:
    """(lengths, heads, head dim, dtype): HunyuanVideo's, up to 720p and 129 frames; tiny on a CPU, as a rehearsal."""
    if device.type == "cuda":
        return (4096, 16384, 32768, 119056), 24, 128, torch.bfloat16
    return (320, 512), 4, 32, torch.float32


def _dense_sizes(device: torch.device) -> list[Size]:
    lengths, heads, head_dim, dtype = _sizes(device)
    # SDPA alone chooses cuDNN or flash, which are timed by name; flex_attention compiles, which takes its time.
    left_out = ("SDPA", "flex_attention") if device.type == "cuda" else ("flex_attention",)
    peers = tuple(name for name in ATTENTION_PEERS if name not in left_out)
    fast = peers if device.type == "cpu" else (FA3, CUDNN)
    longest = max(lengths)
    sizes = [Size(length, heads, head_dim, dtype, fast if length == longest else peers) for length in lengths]
    other_dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return [*sizes, Size(lengths[1], heads, 64, dtype, fast), Size(lengths[1], heads, head_dim, other_dtype, fast)]


def attention(device: torch.device) -> Result:
    """Dense attention of one long sequence against the peers that run here."""
    lines: list[str] = []
    records: list[Record] = []
    for size in _dense_sizes(device):
        q, k, v = attention_inputs(1, size.length, size.heads, size.head_dim, size.dtype, device)
        candidates = _dense_candidates(size, q, k, v, device, lines)
        seconds = 8.0 if size.length > 100_000 else 2.5
        times = medians_ms(candidates, device, rounds=ROUNDS, seconds=seconds)
        flops = attention_flops([size.length], [size.length], size.heads, size.head_dim)
        agreement = _agreement(q, k, v, candidates)
        drawn = _drawn(candidates, times, device, lines) if size.length > 100_000 else {}
        shape = {"B": 1, "S": size.length, "H": size.heads, "D": size.head_dim}
        records += [
            _record("flash_attention", shape, size.dtype, times, peer, flops, {"difference": agreement, **notes})
            for peer, notes in ((peer, _pair(drawn, peer)) for peer in times if peer != OURS)
        ]
        rates = ", ".join(f"{name} {flops / ms / 1e9:.0f}" for name, ms in times.items())
        ratios = "".join(f"; {times[name] / times[OURS]:.3f} x {name}" for name in (FA3, CUDNN) if name in times)
        what = f"S={size.length} D={size.head_dim} {dtype_name(size.dtype)}"
        lines.append(f"{what}: TFLOP/s {rates}{ratios}; relative difference to a peer {agreement:.1e}")
    return list(dict.fromkeys(lines)), [*records]  # a peer that is missing is missing at every size


def _dense_candidates(
    size: Size, q: Tensor, k: Tensor, v: Tensor, device: torch.device, lines: list[str]
) -> dict[str, Callable[[], object]]:
    """This package and the peers that run on these inputs; `lines` gets why the others do not."""
    own_k = k.clone()  # for peers that change K in place
    candidates: dict[str, Callable[[], object]] = {OURS: lambda: flash_attention(q, k, v)}
    for name in size.peers:
        try:
            peer = attention_peer(name, device)
        except PeerUnavailableError as reason:
            lines.append(f"without {name}: {reason}")
            continue
        _add(candidates, name, lambda peer=peer: peer(q, own_k, v), lines)
    return candidates


def _add(candidates: dict[str, Callable[[], object]], name: str, peer: Callable[[], object], lines: list[str]) -> None:
    reason = runs(peer)
    if reason is None:
        candidates[name] = peer
    else:
        lines.append(f"without {name}: {reason}")


def _agreement(q: Tensor, k: Tensor, v: Tensor, candidates: Mapping[str, Callable[[], object]]) -> float:
    """Relative difference to an exact peer, on the first head: float64 is out of reach at these lengths."""
    exact = next(candidates[name] for name in (CUDNN, "SDPA") if name in candidates)
    return relative_error(_first_head(flash_attention(q, k, v)), _first_head(exact()))


def _first_head(out: object) -> Tensor:
    assert isinstance(out, Tensor)  # a pair only where the lse was asked for
    return out[:, :, 0]


def _drawn(
    candidates: Mapping[str, Callable[[], object]], times: Mapping[str, float], device: torch.device, lines: list[str]
) -> dict[str, dict[str, float | None]]:
    """Clock, power and time per call of each candidate, run without pause for a while."""
    drawn: dict[str, dict[str, float | None]] = {}
    for name, candidate in candidates.items():
        run = sustained(candidate, device, SUSTAINED_SECONDS, times[name])
        drawn[name] = {"clock_mhz": run.clock_mhz, "power_w": run.power_w, "sustained_ms": run.ms}
        clock, power = (f"{value:.0f}" if value else "unknown" for value in (run.clock_mhz, run.power_w))
        lines.append(f"without pause, {name}: {run.ms:.2f} ms per call at {clock} MHz and {power} W")
    return drawn


def _pair(drawn: Mapping[str, Mapping[str, float | None]], peer: str) -> dict[str, float | None]:
    """The notes of one record: this package's values, and the peer's under peer_..."""
    ours, theirs = drawn.get(OURS, {}), drawn.get(peer, {})
    return {**ours, **{f"peer_{name}": value for name, value in theirs.items()}}


def hard_values(device: torch.device) -> Result:
    """Dense attention on data whose scores are spread widely: what the speed owes to well-behaved values."""
    lengths, heads, head_dim, dtype = _sizes(device)
    length = lengths[1]
    q, k, v = attention_inputs(1, length, heads, head_dim, dtype, device)
    sink = k.clone()
    sink[:, length // 3] *= 40  # one key, in the middle, that some rows attend to almost alone
    flops = attention_flops([length], [length], heads, head_dim)
    lines: list[str] = []
    records: list[Record] = []
    for values, queries, keys in (("normal", q, k), ("large", 40 * q, k), ("one sink", q, sink)):
        size = Size(length, heads, head_dim, dtype, (FA3, CUDNN) if device.type == "cuda" else ("SDPA",))
        candidates = _dense_candidates(size, queries, keys, v, device, lines)
        times = medians_ms(candidates, device, rounds=ROUNDS, seconds=1.5)
        notes = {"values": values, "difference": _agreement(queries, keys, v, candidates)}
        shape = {"B": 1, "S": length, "H": heads, "D": head_dim}
        records += [
            _record("hard_values", shape, dtype, times, peer, flops, notes) for peer in times if peer != OURS
        ] or [_record("hard_values", shape, dtype, times, None, flops, notes)]
        rates = ", ".join(f"{name} {flops / ms / 1e9:.0f}" for name, ms in times.items())
        lines.append(f"{values}: TFLOP/s {rates}; relative difference to a peer {notes['difference']:.1e}")
    return list(dict.fromkeys(lines)), [*records]


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
            seconds=2.5,
        )
        difference = relative_error(
            _first_head(flash_attention(q, k, v, kv_lens=kv_lens)), _first_head(sdpa(q, k, v, mask))
        )
        flops = attention_flops([length], [valid], heads, head_dim)
        shape = {"B": 1, "S": length, "valid": valid, "H": heads, "D": head_dim}
        notes = {"difference": difference}
        records.append(_record("flash_attention_kv_lens", shape, dtype, times, SDPA_MASKED, flops, notes))
        lines.append(
            f"S={length}, {valid} valid: {flops / times[OURS] / 1e9:.0f} TFLOP/s, "
            f"{times[SDPA_MASKED] / times[OURS]:.2f} x {SDPA_MASKED}; relative difference {difference:.1e}"
        )
    return lines, [*records]


# --- lengths ----------------------------------------------------------------------------------------------------------

DENSE = "dense"  # one dense call of the same work, of this package
PADDED, PACKED = "padded", "packed"
FA3_PADDED, FA3_PACKED = f"{FA3} padded", f"{FA3} packed"


def varlen(device: torch.device) -> Result:
    """What lengths cost against a dense call of the same work, and against FlashAttention-3's own lengths."""
    lines: list[str] = []
    records = [*_one_length(device, lines), *_batch_of_lengths(device, lines)]
    return list(dict.fromkeys(lines)), [*records]


def _one_length(device: torch.device, lines: list[str]) -> list[Record]:
    """One sample whose last keys are absent; dense is the call on the keys that are there."""
    lengths, heads, head_dim, dtype = _sizes(device)
    records: list[Record] = []
    for length in lengths[1:]:
        valid = length - MASKED_KEYS
        q, k, v = attention_inputs(1, length, heads, head_dim, dtype, device)
        kv_lens, offsets_q, offsets_k = (
            lens_tensor([valid], device),
            cu_seqlens([length], device),
            cu_seqlens([valid], device),
        )
        short_k, short_v = k[:, :valid], v[:, :valid]
        packed = (q[0], short_k[0], short_v[0], offsets_q, offsets_k, length, valid)
        candidates: dict[str, Callable[[], object]] = {
            PADDED: lambda q=q, k=k, v=v, kv_lens=kv_lens: flash_attention(q, k, v, kv_lens=kv_lens),
            DENSE: lambda q=q, k=short_k, v=short_v: flash_attention(q, k, v),
        }
        _add_fa3(candidates, (q, k, v, None, kv_lens), packed, device, lines)
        times = medians_ms(candidates, device, rounds=ROUNDS, seconds=8.0 if length > 100_000 else 2.5)
        flops = attention_flops([length], [valid], heads, head_dim)
        shape = {"B": 1, "S": length, "valid": valid, "H": heads, "D": head_dim}
        records += _against(PADDED, "varlen_one", shape, dtype, times, flops, flops)
        lines.append(f"kv_lens={valid} of {length}: {_of_dense(times[PADDED], flops, times, flops)}")
    return records


def _batch_of_lengths(device: torch.device, lines: list[str]) -> list[Record]:
    """Four samples of very different lengths; dense is one call of one length whose work is theirs together."""
    _, heads, head_dim, dtype = _sizes(device)
    lens = (16384, 900, 9100, 4333) if device.type == "cuda" else (320, 11, 97, 256)
    longest = max(lens)
    q, k, v = attention_inputs(len(lens), longest, heads, head_dim, dtype, device)
    packed_q, packed_k, packed_v = (torch.cat([x[b, :n] for b, n in enumerate(lens)]) for x in (q, k, v))
    device_lens, offsets = lens_tensor(lens, device), cu_seqlens(lens, device)
    packed = (packed_q, packed_k, packed_v, offsets, offsets, longest, longest)
    same_work = isqrt(sum(length**2 for length in lens))
    dense = attention_inputs(1, same_work, heads, head_dim, dtype, device)
    candidates: dict[str, Callable[[], object]] = {
        PADDED: lambda: flash_attention(q, k, v, kv_lens=device_lens, q_lens=device_lens),
        PACKED: lambda: flash_attention_varlen(*packed),
        DENSE: lambda: flash_attention(*dense),
    }
    _add_fa3(candidates, (q, k, v, device_lens, device_lens), packed, device, lines)
    times = medians_ms(candidates, device, rounds=ROUNDS, seconds=3.0)
    flops = attention_flops(lens, lens, heads, head_dim)
    dense_flops = attention_flops([same_work], [same_work], heads, head_dim)
    shape = {"B": len(lens), "T": sum(lens), "longest": longest, "H": heads, "D": head_dim}
    records: list[Record] = []
    for form in (PADDED, PACKED):
        records += _against(form, f"varlen_{form}", shape, dtype, times, flops, dense_flops)
        lines.append(f"{form}, lengths {lens}: {_of_dense(times[form], flops, times, dense_flops)}")
    return records


def _add_fa3(
    candidates: dict[str, Callable[[], object]],
    padded: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor],
    packed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int],
    device: torch.device,
    lines: list[str],
) -> None:
    try:
        run_padded, run_packed = fa3_padded(device), fa3_packed(device)
    except PeerUnavailableError as reason:
        lines.append(f"without {FA3}: {reason}")
        return
    _add(candidates, FA3_PADDED, lambda: run_padded(*padded), lines)
    _add(candidates, FA3_PACKED, lambda: run_packed(*packed), lines)


def _of_dense(ms: float, flops: float, times: Mapping[str, float], dense_flops: float) -> str:
    """A line's end: the rate as a share of the dense one, and the speed-ups over what else ran."""
    rate, dense_rate = flops / ms, dense_flops / times[DENSE]
    peers = "".join(f", {times[name] / ms:.3f} x {name}" for name in (FA3_PADDED, FA3_PACKED) if name in times)
    return f"{rate / 1e9:.0f} TFLOP/s, {rate / dense_rate:.3f} of the dense rate{peers}"


def _against(
    form: str,
    op: str,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    times: Mapping[str, float],
    flops: float,
    dense_flops: float,
) -> list[Record]:
    """This package's `form` against the dense call and FlashAttention-3's two forms."""
    own = {OURS: times[form], **{name: times[name] for name in (DENSE, FA3_PADDED, FA3_PACKED) if name in times}}
    notes = {"of_dense_rate": (flops / times[form]) / (dense_flops / times[DENSE])}
    return [_record(op, shape, dtype, own, peer, flops, notes) for peer in own if peer != OURS]


# --- small ------------------------------------------------------------------------------------------------------------


def small(device: torch.device) -> Result:
    """Short sequences, where the choice of the kernel matters: against cuDNN and this package's portable kernel."""
    lines: list[str] = []
    records: list[Record] = []
    for batch, length, keys in _small_shapes(device):
        times = _small_times(batch, length, keys, device, lines)
        _, heads, head_dim, dtype = _sizes(device)
        flops = attention_flops([length] * batch, [keys] * batch, heads, head_dim)
        shape = {"B": batch, "S": length, "Sk": keys, "H": heads, "D": head_dim}
        records += [
            _record("small_attention", shape, dtype, times, peer, flops, {}) for peer in times if peer != OURS
        ] or [_record("small_attention", shape, dtype, times, None, flops, {})]
        best = min((name for name in times if name in (CUDNN, PORTABLE)), key=lambda name: times[name], default=None)
        verdict = f"; {times[best] / times[OURS]:.3f} x the best, {best}" if best else ""
        what = ", ".join(f"{name} {ms * 1e3:.1f} us" for name, ms in times.items())
        lines.append(f"B={batch} S={length} keys={keys}: {what}{verdict}")
    return list(dict.fromkeys(lines)), [*records]


def _small_shapes(device: torch.device) -> list[tuple[int, int, int]]:
    """(batch, queries, keys)"""
    if device.type == "cpu":
        return [(1, 64, 64), (2, 96, 16)]
    lengths = (64, 128, 256, 512, 1024, 1536, 2048)
    return [*((1, n, n) for n in lengths), *((4, n, n) for n in (128, 512, 2048)), (1, 4096, 256), (4, 4096, 256)]


def _small_times(batch: int, length: int, keys: int, device: torch.device, lines: list[str]) -> dict[str, float]:
    """Milliseconds per call by name, in CUDA graphs over input sets that together exceed the L2 cache."""
    _, heads, head_dim, dtype = _sizes(device)
    per_set = batch * (length + 2 * keys) * heads * head_dim * dtype.itemsize
    count = min(64, max(4, ceil(ROTATED_BYTES / per_set))) if device.type == "cuda" else 2
    sets = [
        (
            torch.randn(batch, length, heads, head_dim, dtype=dtype, device=device),
            *(torch.randn(batch, keys, heads, head_dim, dtype=dtype, device=device) for _ in range(2)),
        )
        for _ in range(count)
    ]
    candidates: dict[str, list[Callable[[], object]]] = {
        OURS: [lambda inputs=inputs: flash_attention(*inputs) for inputs in sets]
    }
    for name in (CUDNN, PORTABLE, FA3) if device.type == "cuda" else ("SDPA",):
        try:
            peer = attention_peer(name, device)
        except PeerUnavailableError as reason:
            lines.append(f"without {name}: {reason}")
            continue
        reason = runs(lambda peer=peer: peer(*sets[0]))
        if reason is None:
            candidates[name] = [lambda peer=peer, inputs=inputs: peer(*inputs) for inputs in sets]
        else:
            lines.append(f"without {name}: {reason}")
    return graph_medians_ms(candidates, device)


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
    record = _record("flash_attention", shape, dtype, times, "flex_attention", flops, {})
    return [f"S={length}: TFLOP/s {speeds}"], [record]


def _record(
    op: str,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    times: Mapping[str, float],
    peer: str | None,
    flops: float,
    notes: Mapping[str, float | int | str | None],
) -> Record:
    """This package, timed as OURS in `times` (milliseconds), against one peer of them."""
    ours = times[OURS]
    return Record(
        op=op,
        shape=dict(shape),
        dtype=dtype_name(dtype),
        kernel=OURS,
        median_ms=ours,
        peer=peer,
        peer_ms=None if peer is None else times[peer],
        tflops=flops / ours / 1e9,
        notes=dict(notes),
    )
