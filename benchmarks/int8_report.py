"""8-bit attention on one GPU: whether the kernels are right, and how fast beside 16 bits.

    python -m benchmarks.int8_report --out /tmp/int8

Compiles the kernels side by side, compares each with float64 (one that fails is not timed), shows the fp8 of
FlashAttention-3 on the same data, times them and the quantisation at 16,384 and 119,056 tokens against this package's
bfloat16 kernel and FlashAttention-3 in bfloat16 and fp8, and writes JSON records to --out. Without CUDA it runs small,
on the CPU's code.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from para_kernels import flash_attention
from para_kernels.attention8 import flash_attention_int8

from .inputs import attention_flops, attention_inputs, lens_tensor
from .peers import FA3, FA3_FP8, PeerUnavailableError, attention_peer, fa3_fp8
from .power import sustained
from .record import Check, Record, write_records
from .reference import attention_float64, relative_error
from .section import dtype_name
from .timing import medians_ms

HEADS, HEAD_DIM = 24, 128
LENGTHS = (16384, 119056)
SMALL_LENGTHS = (130, 200)
SECONDS_OF_POWER = 2.0
COMPILE_SECONDS = 200  # then what is not done is left out
REFERENCE = "reference"
HOPPER = "Hopper kernel"
PORTABLE = "portable kernel"
BFLOAT16 = "bfloat16"
SHIPPED = "flash_attention_int8"
QUANTISATION = "quantisation"

Lens = Tensor | None
# (q, k, v, q_lens, kv_lens, scale) to out and lse
Attend = Callable[[Tensor, Tensor, Tensor, Lens, Lens, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One problem. Rounding alone gives about 3.9e-2 on normal data, where the output is a sum of random signs.

    Attributes:
        queries, keys: lengths.
        q_factor: times the queries: a sharper softmax.
        k_offset, v_offset: of each channel, in standard deviations.
        degrees: of freedom of Student's t for heavy tails; None: normal.
        lens: whether lengths are given, with NaN past them.
        two_kinds: of keys, one with the queries and one against them, whose values are about 1 and -1 in every channel:
            an output near 1, of summands with one sign, where an accumulator of few bits is seen to leak.
        allowed: largest relative error.
        lse_allowed: largest error of the lse.
    """

    queries: int
    keys: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = HEAD_DIM
    dtype: torch.dtype = torch.bfloat16
    q_factor: float = 1.0
    k_offset: float = 0.0
    v_offset: float = 0.0
    degrees: float | None = None
    lens: bool = False
    two_kinds: bool = False
    allowed: float = 4.2e-2
    lse_allowed: float = 5e-2


def _cases(full: bool) -> dict[str, Case]:
    """All of them, or those that show what kernels differ in."""
    cases = {
        "offset of keys": Case(1000, 2048, k_offset=8.0),
        "lengths": Case(700, 999, heads=4, lens=True),
        "one key": Case(65, 1, allowed=1e-2),
        "119,056 keys": Case(256, 119056, heads=1, kv_heads=1),
        "119,056 keys of two kinds": Case(256, 119056, heads=1, kv_heads=1, two_kinds=True, allowed=1e-2),
        "119,056 keys, offset of values": Case(256, 119056, heads=1, kv_heads=1, v_offset=1.0, allowed=4e-3),
    }
    if full:
        cases |= {
            "normal": Case(2048, 2048),
            "heavy tails": Case(2048, 2048, degrees=3.0, allowed=2e-2, lse_allowed=1.5),
            "sharp": Case(2048, 2048, q_factor=3.0, lse_allowed=0.2),
            "grouped queries": Case(500, 700, heads=6, kv_heads=2, lens=True),
            "D 64": Case(1000, 2048, head_dim=64, k_offset=8.0),
            "float16": Case(1000, 2048, dtype=torch.float16, k_offset=8.0, lens=True),
        }
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="these instead of all")
    parser.add_argument("--time-all", action="store_true", help="also those whose error is too large")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kernels = kernels_for(device, options.only)
    if device.type == "cuda":
        ran = compile_side_by_side(list(kernels), device)
        kernels = {name: kernels[name] for name in ran}
    torch.manual_seed(0)
    with torch.no_grad():
        checked, good = checks(kernels, device)
        write_records("int8-checks", checked, options.out)
        timed = list(kernels) if options.time_all else good
        records = speed({name: kernels[name] for name in timed}, device)
        beside = peer_errors(device)
    if beside:
        write_records("int8-checks", checked + beside, options.out)
    if records:
        write_records("int8-speed", records, options.out)
    return int(any(not check.passed for check in checked))


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernels_for(device: torch.device, only: list[str] | None = None) -> dict[str, Attend]:
    """Every kernel that this device runs, by name. The last one is what `flash_attention_int8` takes.

    Raises:
        ValueError: for a name that there is not.
    """
    kernels: dict[str, Attend] = {}
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) == (9, 0):
            kernels[HOPPER] = _hopper
        kernels[PORTABLE] = _portable
        kernels[SHIPPED] = _shipped
    else:
        kernels[REFERENCE] = _shipped
    if unknown := set(only or ()) - set(kernels):
        raise ValueError(f"--only: got {sorted(unknown)}, allowed are {list(kernels)}")
    return {name: attend for name, attend in kernels.items() if only is None or name in only}


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _hopper(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Lens, kv_lens: Lens, scale: float, quantised: Any = None
) -> tuple[Tensor, Tensor]:
    """The Hopper kernel, on what is quantised already where that is given."""
    from para_kernels.triton_kernels.hopper_attention_int8 import hopper_attention_int8_forward

    x = _quantised(True, q, k, v, q_lens, kv_lens, scale) if quantised is None else quantised
    out, lse = _outputs(q)
    hopper_attention_int8_forward(*x, k.shape[1], out, lse, q_lens, kv_lens, scale)
    return out, lse


def _portable(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Lens, kv_lens: Lens, scale: float, quantised: Any = None
) -> tuple[Tensor, Tensor]:
    from para_kernels.triton_kernels.attention_int8 import attention_int8_forward

    x = _quantised(False, q, k, v, q_lens, kv_lens, scale) if quantised is None else quantised
    out, lse = _outputs(q)
    attention_int8_forward(*x, k.shape[1], out, lse, q_lens, kv_lens, scale)
    return out, lse


def _shipped(q: Tensor, k: Tensor, v: Tensor, q_lens: Lens, kv_lens: Lens, scale: float) -> tuple[Tensor, Tensor]:
    return flash_attention_int8(q, k, v, q_lens=q_lens, kv_lens=kv_lens, scale=scale, return_lse=True)


def _quantised(
    permuted: bool, q: Tensor, k: Tensor, v: Tensor, q_lens: Lens, kv_lens: Lens, scale: float
) -> Any:  # fmt: skip
    """Queries and keys, as the kernels take them."""
    from para_kernels.triton_kernels.attention_int8 import value_type
    from para_kernels.triton_kernels.quantize_int8 import new_keys, quantise_keys, quantise_queries

    keys = new_keys(k, value_type(torch.cuda.get_device_capability(q.device)))
    quantise_keys(k, v, kv_lens, keys, permuted=permuted)
    return quantise_queries(q, keys.k_means, q_lens, scale), keys


def compile_side_by_side(names: list[str], device: torch.device) -> list[str]:
    """Compile and run every kernel in a process of its own; this one then loads what they leave on the disk.

    Returns the names of those that ran to the end: a kernel that never ends goes with its process.
    """
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    processes = {
        (name, *kind): context.Process(target=_compile, args=(name, *kind, device.index))
        for name in names
        for kind in (_KINDS if name == SHIPPED else _KINDS[:1])
    }
    for process in processes.values():
        process.start()
    failed = set()
    for what, process in processes.items():
        process.join(max(0.1, start + COMPILE_SECONDS - time.perf_counter()))
        if process.exitcode != 0:
            print(f"  {what}: exit code {process.exitcode}, left out", flush=True)
            process.kill()
            failed.add(what[0])
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    return [name for name in names if name not in failed]


_KINDS = ((torch.bfloat16, HEAD_DIM), (torch.bfloat16, 64), (torch.float16, HEAD_DIM))


def _compile(name: str, dtype: torch.dtype, head_dim: int, index: int) -> None:
    """Run a kernel once, without lengths and with them."""
    device = torch.device("cuda", index)
    attend = kernels_for(device)[name]
    for lens in (None, lens_tensor([128], device)):
        attend(*attention_inputs(1, 300, 2, head_dim, dtype, device), lens, lens, 1.0)
    torch.cuda.synchronize(device)


# --- checks -----------------------------------------------------------------------------------------------------------


def checks(kernels: Mapping[str, Attend], device: torch.device) -> tuple[list[Check], list[str]]:
    """Every kernel against float64; and the names of those that passed."""
    results, good = [], []
    for name, attend in kernels.items():
        full = name in (SHIPPED, REFERENCE)
        of_kernel = [_check(name, what, case, attend, device) for what, case in _cases(full).items()]
        results += of_kernel
        if all(check.passed for check in of_kernel):
            good.append(name)
    return results, good


def _check(name: str, what: str, case: Case, attend: Attend, device: torch.device) -> Check:
    if device.type == "cpu":
        case = _smaller(case)
    try:
        worst, lse = _errors(case, attend, device)
        reason = ""
    except (RuntimeError, ValueError) as error:
        worst, lse, reason = float("inf"), float("inf"), (str(error).strip() or type(error).__name__).splitlines()[0]
    failed = not (worst <= case.allowed and lse <= case.lse_allowed)
    print(f"  {name}: {what}: {worst:.2e}, lse {lse:.1e}{' FAILED ' if failed else ''}{reason}", flush=True)
    finite = worst if worst < float("inf") else None
    notes = {"kernel": name, "lse": lse if lse < float("inf") else None, "lse_allowed": case.lse_allowed}
    return Check(f"8-bit attention, {what}", 1, int(failed), dtype_name(case.dtype), finite, case.allowed, notes)


def peer_errors(device: torch.device) -> list[Check]:
    """FlashAttention-3's fp8 on the same data, where it takes it: shown, not held to anything."""
    try:
        fa3 = fa3_fp8(device)
    except PeerUnavailableError as reason:
        print(f"  {reason}", flush=True)
        return []
    shown = []
    for what, case in _cases(True).items():
        if case.lens or case.head_dim != HEAD_DIM or case.dtype != torch.bfloat16:
            continue
        q, k, v = _tensors(case, device)
        try:
            out = fa3(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)))
        except RuntimeError as refused:
            print(f"  {FA3_FP8}: {what}: {refused}", flush=True)
            continue
        error = relative_error(out[0], attention_float64(q[0], k[0], v[0])[0])
        print(f"  {FA3_FP8}: {what}: {error:.2e}", flush=True)
        notes = {"kernel": FA3_FP8, "lse": None}
        finite = error if math.isfinite(error) else None
        shown.append(Check(f"8-bit attention, {what}", 1, 0, dtype_name(case.dtype), finite, None, notes))
    return shown


def _smaller(case: Case) -> Case:
    return replace(case, queries=min(case.queries, 200), keys=min(case.keys, 600))


def _errors(case: Case, attend: Attend, device: torch.device) -> tuple[float, float]:
    """The worst relative error of a sample, and of the lse."""
    q, k, v = _tensors(case, device)
    q_lens, kv_lens = ([case.queries], [case.keys])
    if case.lens:
        q_lens, kv_lens = [case.queries, case.queries // 2 + 3, 0], [case.keys, case.keys // 3 + 5, case.keys]
        q, k, v = (x.repeat(3, 1, 1, 1) for x in (q, k, v))
        for b in range(3):
            q[b, q_lens[b] :] = k[b, kv_lens[b] :] = v[b, kv_lens[b] :] = float("nan")
    lens = (lens_tensor(q_lens, device), lens_tensor(kv_lens, device)) if case.lens else (None, None)
    out, lse = attend(q, k, v, *lens, case.head_dim**-0.5)
    worst = worst_lse = 0.0
    for b, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        if not (out[b, q_len:] == 0).all() or not (lse[b, :, q_len:] == float("-inf")).all():
            return float("inf"), float("inf")
        if q_len:
            ref, ref_lse = attention_float64(q[b, :q_len], k[b, :kv_len], v[b, :kv_len])
            error, lse_error = relative_error(out[b, :q_len], ref), (lse[b, :, :q_len] - ref_lse).abs().max().item()
            worst, worst_lse = max(worst, _number(error)), max(worst_lse, _number(lse_error))
    return worst, worst_lse


def _number(error: float) -> float:
    return error if error == error else float("inf")


def _tensors(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    shape = (1, case.queries, case.heads, case.head_dim), (1, case.keys, case.kv_heads, case.head_dim)
    if case.degrees is None:
        q, k, v = (torch.randn(shape[i], device=device) for i in (0, 1, 1))
    else:
        student = torch.distributions.StudentT(torch.tensor(case.degrees, device=device))
        q, k, v = (student.sample(shape[i]) for i in (0, 1, 1))
    channels = (1, 1, case.kv_heads, case.head_dim)
    k = k + case.k_offset * torch.randn(channels, device=device)
    v = v + case.v_offset * torch.randn(channels, device=device)
    if case.two_kinds:
        kinds = torch.randint(0, 2, (1, case.keys, 1, 1), device=device) * 2.0 - 1.0
        direction = torch.randn(channels, device=device)
        q, k = 0.5 * q + 0.4 * direction[:, :, :1], 0.5 * k + 0.4 * kinds * direction
        v = 0.25 * v + kinds
    return (q * case.q_factor).to(case.dtype), k.to(case.dtype), v.to(case.dtype)


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(kernels: Mapping[str, Attend], device: torch.device) -> list[Record]:
    """All kernels at every length, against 16 bits and the peers, in turns."""
    records: list[Record] = []
    for i, length in enumerate(LENGTHS if device.type == "cuda" else SMALL_LENGTHS):
        heads = HEADS if device.type == "cuda" else 2
        q, k, v = attention_inputs(1, length, heads, HEAD_DIM, torch.bfloat16, device)
        candidates = _candidates(kernels, q, k, v)
        ours = [name for name in candidates if name in kernels or name == QUANTISATION]
        peers = [name for name in candidates if name not in ours]
        times = medians_ms(candidates, device, rounds=12 if i == 0 else 4, seconds=4.0 if i == 0 else 6.0)
        flops = attention_flops([length], [length], heads, HEAD_DIM)
        shape = {"B": 1, "S": length, "H": heads, "D": HEAD_DIM}
        for name in ours:
            print(f"  {length}: {name}: {times[name]:.3f} ms, {_rates(flops, times, name, peers)}", flush=True)
            tflops = None if name == QUANTISATION else flops / times[name] / 1e9
            for peer in peers:
                record = Record("flash_attention_int8", shape, BFLOAT16, name, times[name], peer, times[peer], tflops)
                records.append(record)
        for peer in peers:
            print(f"  {length}: {peer}: {times[peer]:.3f} ms, {flops / times[peer] / 1e9:.0f} TFLOP/s", flush=True)
        if i == 1 and device.type == "cuda":
            records += _power(candidates, times, shape, [SHIPPED, BFLOAT16, FA3_FP8], device)
    return records


def _power(
    candidates: Mapping[str, Callable[[], object]],
    times: Mapping[str, float],
    shape: Mapping[str, int],
    names: list[str],
    device: torch.device,
) -> list[Record]:
    """Clock and power of some of them, one call behind the other."""
    records = []
    for name in names:
        if name in candidates:
            state = sustained(candidates[name], device, SECONDS_OF_POWER, times[name])
            print(f"  {name}: {state.ms:.1f} ms, {state.clock_mhz} MHz, {state.power_w} W", flush=True)
            notes = {"clock_mhz": state.clock_mhz, "power_w": state.power_w}
            records.append(Record("flash_attention_int8, sustained", shape, BFLOAT16, name, state.ms, notes=notes))
    return records


def _rates(flops: float, times: Mapping[str, float], name: str, peers: list[str]) -> str:
    ratios = ", ".join(f"{times[peer] / times[name]:.3f} x {peer}" for peer in peers)
    return f"{flops / times[name] / 1e9:.0f} TFLOP/s, {ratios}"


def _candidates(
    kernels: Mapping[str, Attend], q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Callable[[], object]]:  # fmt: skip
    """The kernels alone, on what is quantised already; `flash_attention_int8` with its quantisation; and the peers."""
    scale = q.shape[3] ** -0.5
    candidates: dict[str, Callable[[], object]] = {}
    for name, attend in kernels.items():
        arguments = (q, k, v, None, None, scale)
        if name in (SHIPPED, REFERENCE):
            candidates[name] = functools.partial(attend, *arguments)
        else:
            x = _quantised(name != PORTABLE, *arguments)
            candidates[name] = functools.partial(attend, *arguments, quantised=x)
    if q.device.type == "cuda":
        candidates[QUANTISATION] = lambda: _quantised(True, q, k, v, None, None, scale)
    candidates[BFLOAT16] = lambda: flash_attention(q, k, v)
    try:
        fa3 = attention_peer(FA3, q.device)
        in_8_bits = tuple(x.to(torch.float8_e4m3fn) for x in (q, k, v))
        fa3_in_8_bits = fa3_fp8(q.device)
        candidates[FA3] = lambda: fa3(q, k, v)
        candidates[FA3_FP8] = lambda: fa3_in_8_bits(*in_8_bits)
    except PeerUnavailableError as reason:
        print(f"  {reason}", flush=True)
    return candidates


if __name__ == "__main__":
    sys.exit(main())
