"""The GPU report's checks: right values, no synchronisation, no variant for a new length, CUDA graphs, equal runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from para_kernels import flash_attention, flash_attention_varlen, merge_states, residual_diff

from .inputs import attention_inputs, cu_seqlens, hidden_states, lens_tensor
from .record import Check
from .reference import TOLERANCES, attention_float64, relative_error
from .section import CheckFailedError, Result, dtype_name, need_cuda

# Each combination compiles a kernel. All head dims are tried in one dtype, and two sizes in every dtype: those of the
# kernels for tensor cores, padded and not. The tests try the others.
HEAD_DIMS = (64, 96, 128, 256, 40, 80)
EVERY_DTYPE = (128, 80)
# Lengths for which different kernels are chosen.
SHORT, LONG = 257, 3001


@dataclass(frozen=True)
class Case:
    """One attention problem; the lengths are per sample."""

    name: str
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    heads: int = 4
    key_heads: int = 4
    strided: bool = False


CASES = (
    Case("odd lengths", (333, 1), (333, 777)),  # neither divides any tile
    Case("whole tiles", (256, 256), (512, 128)),  # no tail block at all
    Case("empty and single", (5, 0, 1, 130), (0, 7, 1, 129)),  # no keys, no queries, one of each
    Case("grouped queries", (200, 77), (131, 300), heads=6, key_heads=2),
    Case("strided views", (190, 65), (190, 65), strided=True),  # slices of one fused projection
)


def correctness(device: torch.device) -> Result:
    """Head dims, dtypes and cases, padded and packed, output and lse, against float64; then the reductions."""
    checks = [
        _attention_check(layout, run, dtype, device)
        for dtype in TOLERANCES
        for layout, run in (("padded", _padded), ("packed", _packed))
    ]
    checks += [_check_merge(device), *_check_residual(device)]
    lines = [f"{check.check}, {check.dtype}: worst relative error {check.worst:.2e}" for check in checks]
    return lines, [*checks]


def _attention_check(
    layout: str, run: Callable[[Case, torch.dtype, int, torch.device], float], dtype: torch.dtype, device: torch.device
) -> Check:
    tolerance = TOLERANCES[dtype]
    errors = []
    for head_dim in HEAD_DIMS:
        if head_dim not in EVERY_DTYPE and (dtype != torch.bfloat16 or layout == "packed"):
            continue
        for case in CASES:
            errors.append(run(case, dtype, head_dim, device))
            if not errors[-1] <= tolerance:
                raise CheckFailedError(
                    f"{layout}, {case.name}, D={head_dim}, {dtype}: error {errors[-1]:.2e} > {tolerance:.0e}"
                )
    return Check(f"attention, {layout}", len(errors), 0, dtype_name(dtype), max(errors), tolerance)


def _padded(case: Case, dtype: torch.dtype, head_dim: int, device: torch.device) -> float:
    q, k, v = _tensors(case, max(case.query_lens), max(case.key_lens), len(case.query_lens), dtype, head_dim, device)
    out, lse = flash_attention(
        q,
        k,
        v,
        kv_lens=lens_tensor(case.key_lens, device),
        q_lens=lens_tensor(case.query_lens, device),
        return_lse=True,
    )
    errors = []
    for b, (q_len, k_len) in enumerate(zip(case.query_lens, case.key_lens, strict=True)):
        errors.append(_error(out[b, :q_len], lse[b, :, :q_len], q[b, :q_len], k[b, :k_len], v[b, :k_len]))
        if out[b, q_len:].any() or not torch.isneginf(lse[b, :, q_len:]).all():
            raise CheckFailedError(
                f"padded, {case.name}, D={head_dim}, {dtype}: rows past the length are not zero with lse -inf"
            )
    return max(errors)


def _packed(case: Case, dtype: torch.dtype, head_dim: int, device: torch.device) -> float:
    q, _, _ = _tensors(case, sum(case.query_lens), sum(case.query_lens), 1, dtype, head_dim, device)
    _, k, v = _tensors(case, sum(case.key_lens), sum(case.key_lens), 1, dtype, head_dim, device)
    out, lse = flash_attention_varlen(
        q[0],
        k[0],
        v[0],
        cu_seqlens(case.query_lens, device),
        cu_seqlens(case.key_lens, device),
        max(case.query_lens),
        max(case.key_lens),
        return_lse=True,
    )
    samples = zip(
        out.split(case.query_lens),
        lse.split(case.query_lens, dim=1),
        q[0].split(case.query_lens),
        k[0].split(case.key_lens),
        v[0].split(case.key_lens),
        strict=True,
    )
    return max(_error(*sample) for sample in samples)


def _tensors(
    case: Case, queries: int, keys: int, batch: int, dtype: torch.dtype, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, queries, H, D), k and v (B, keys, Hk, D); strided ones are slices of (B, S, 3, H, D)."""
    if case.strided:
        fused = hidden_states((batch, max(queries, keys), 3, case.heads, head_dim), dtype, device)
        q, k, v = fused.unbind(2)
        return q[:, :queries], k[:, :keys], v[:, :keys]
    q, _, _ = attention_inputs(batch, queries, case.heads, head_dim, dtype, device)
    k, v, _ = attention_inputs(batch, keys, case.key_heads, head_dim, dtype, device)
    return q, k, v


def _error(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Larger of the relative errors of out (Sq, H, D) and, in float32 terms, lse (H, Sq); one sample."""
    expected, expected_lse = attention_float64(q, k, v)
    if k.shape[0] == 0:
        return 0.0 if not out.any() and torch.isneginf(lse).all() else float("inf")
    if q.shape[0] == 0:
        return 0.0
    if not torch.allclose(lse.double(), expected_lse, rtol=1e-5, atol=1e-5):
        return float("inf")
    return relative_error(out, expected)


def _check_merge(device: torch.device) -> Check:
    """Attention over two halves of the keys, merged, is attention over all keys."""
    q, k, v = attention_inputs(2, 300, 4, 64, torch.float32, device)
    halves = [flash_attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 111), slice(111, None))]
    (out_a, lse_a), (out_b, lse_b) = halves
    merged, lse = merge_states(out_a, lse_a, out_b, lse_b)
    error = max(_error(merged[b], lse[b], q[b], k[b], v[b]) for b in range(2))
    allowed = 2 * TOLERANCES[torch.float32]
    if not error <= allowed:
        raise CheckFailedError(f"merge_states: error {error:.2e} > {allowed:.0e}")
    return Check("merge_states", 2, 0, "float32", error, allowed)


def _check_residual(device: torch.device) -> list[Check]:
    """The residual bit for bit, the sums against float64, the same sums twice."""
    checks = []
    for dtype in TOLERANCES:
        hidden_in, hidden_out, previous = (hidden_states((2, 1037, 517), dtype, device) for _ in range(3))
        residual, sums = residual_diff(hidden_in, hidden_out, previous)
        expected = hidden_out - hidden_in
        exact = torch.stack([(previous.double() - expected.double()).abs().sum(), previous.double().abs().sum()])
        error, allowed = relative_error(sums, exact), 1e-5
        _, again = residual_diff(hidden_in, hidden_out, previous)
        if not torch.equal(residual, expected) or not torch.equal(sums, again) or not error <= allowed:
            raise CheckFailedError(
                f"residual_diff, {dtype}: residual equal {torch.equal(residual, expected)}, error {error:.2e}"
            )
        checks.append(Check("residual_diff, sums", 1, 0, dtype_name(dtype), error, allowed))
    return checks


def _calls(device: torch.device, length: int = SHORT) -> dict[str, Callable[[], object]]:
    """One call of every operation and every form of its arguments, on inputs made beforehand."""
    dtype = torch.bfloat16
    lens = [length, length // 2]
    q, k, v = attention_inputs(2, length, 4, 128, dtype, device)
    kv_lens, q_lens = lens_tensor(lens, device), lens_tensor(lens[::-1], device)
    packed_q, packed_k, packed_v = (x[0] for x in attention_inputs(1, sum(lens), 4, 128, dtype, device))
    offsets = cu_seqlens(lens, device)
    out, lse = flash_attention(q, k, v, return_lse=True)
    hidden = [hidden_states((2, length, 256), dtype, device) for _ in range(3)]
    return {
        "flash_attention": lambda: flash_attention(q, k, v),
        "flash_attention with kv_lens": lambda: flash_attention(q, k, v, kv_lens=kv_lens),
        "flash_attention with lens": lambda: flash_attention(q, k, v, kv_lens=kv_lens, q_lens=q_lens, return_lse=True),
        "flash_attention_varlen": lambda: flash_attention_varlen(
            packed_q, packed_k, packed_v, offsets, offsets, length, length
        ),
        "merge_states": lambda: merge_states(out, lse, out, lse),
        "residual_diff": lambda: residual_diff(*hidden),
        "residual_diff, first step": lambda: residual_diff(hidden[0], hidden[1], None),
    }


def _warmed_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """The calls at both lengths, each made once: compilation may wait and compile, what follows may not."""
    calls = {f"{name}, {n} tokens": call for n in (SHORT, LONG) for name, call in _calls(device, n).items()}
    for call in calls.values():
        call()
    return calls


def no_sync(device: torch.device) -> Result:
    """No operation waits for the device (torch raises at once where one does)."""
    need_cuda(device)
    calls = _warmed_calls(device)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, call in calls.items():
            try:
                call()
            except RuntimeError as error:
                raise CheckFailedError(f"{name} synchronises: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"no synchronisation in: {', '.join(calls)}"], [Check("no synchronisation", len(calls))]


def compile_count(device: torch.device) -> Result:
    """Fifty new lengths compile nothing and load no other variant: dense, with lengths, and packed."""
    need_cuda(device)
    _warmed_calls(device)
    lengths = _new_lengths(50)
    with _variants() as variants:
        for length in lengths:
            for call in _calls(device, length).values():
                call()
    if variants:
        raise CheckFailedError(f"50 new lengths asked for {len(variants)} more variants: {', '.join(variants)}")
    return ["50 new lengths compiled nothing"], [Check("no compilation for a new length", len(lengths))]


@contextmanager
def _variants() -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles, or loads from its cache on disk, in the block."""
    from triton import knobs

    names: list[str] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda **compiled: names.append(compiled["metadata"]["name"])
    try:
        yield names
    finally:
        knobs.compilation.listener = before


def _new_lengths(count: int) -> Sequence[int]:
    """Multiples of 16 and not, odd and even, below and above every tile size; none is SHORT or LONG."""
    return [64 * i + 16 if i % 3 == 0 else 37 * i + 2 for i in range(count)]


def cuda_graph(device: torch.device) -> Result:
    """Every operation is captured and its replay on changed inputs gives what a fresh call gives."""
    need_cuda(device)
    tried = [(dtype, length) for dtype in (torch.bfloat16, torch.float16) for length in (SHORT, LONG)]
    for dtype, length in tried:
        _check_replay(dtype, length, device)
    return ["captured and replayed with other values and other lengths, bit for bit"], [
        Check("CUDA graph's replay, bit for bit", len(tried))
    ]


def _check_replay(dtype: torch.dtype, length: int, device: torch.device) -> None:
    q, k, v = attention_inputs(2, length, 4, 128, dtype, device)
    hidden = [hidden_states((2, length, 256), dtype, device) for _ in range(3)]
    lens = lens_tensor([length, length // 2], device)
    offsets = cu_seqlens([length, length // 3], device)

    def step() -> list[Tensor]:
        out, lse = flash_attention(q, k, v, kv_lens=lens, return_lse=True)
        packed = flash_attention_varlen(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), offsets, offsets, length, length
        )
        return [out, lse, packed, *merge_states(out, lse, out, lse), *residual_diff(*hidden)]

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (q, k, v, *hidden):
        tensor.normal_()
    lens.copy_(lens_tensor([length // 4, length - 1], device))
    offsets.copy_(cu_seqlens([length // 5, length], device))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    for index, (value, expected) in enumerate(zip(replayed, step(), strict=True)):
        if not torch.equal(value, expected):
            raise CheckFailedError(f"{dtype}, {length} tokens: output {index} of the replay differs from a fresh call")


# Shapes whose work does not divide evenly over the processors, and one that does.
REPEATED: tuple[tuple[tuple[int, ...], tuple[int, ...], int, int, int], ...] = (
    # (lengths of queries, lengths of keys, heads, key heads, head dim)
    ((4096,), (4096,), 24, 24, 128),
    ((2999, 17, 1300), (3333, 2048, 1), 6, 2, 128),
    ((5000,), (226,), 8, 8, 64),
    ((130, 64, 1), (129, 500, 77), 4, 1, 64),
)


def repeatable(device: torch.device) -> Result:
    """Two runs on the same input are equal bit for bit, output and lse, padded and packed."""
    shapes = REPEATED if device.type == "cuda" else REPEATED[-1:]
    tried = 0
    for query_lens, key_lens, heads, key_heads, head_dim in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            case = Case("repeated", query_lens, key_lens, heads, key_heads)
            # Large queries make scores among which no first guess of the maximum holds.
            calls = [call for size in (1, 40) for call in _both_layouts(case, dtype, head_dim, device, size).items()]
            for layout, call in calls:
                # Other work in between leaves another state behind: caches, shared memory, the order of blocks.
                first, _, second = call(), hidden_states((1 << 20,), dtype, device).exp(), call()
                tried += 1
                if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                    raise CheckFailedError(f"{layout}, {case}, D={head_dim}, {dtype}: two runs differ")
    return [f"{tried} calls gave the same bits twice"], [Check("two runs, bit for bit", tried)]


def _both_layouts(
    case: Case, dtype: torch.dtype, head_dim: int, device: torch.device, size: int
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """The case padded and packed, with queries of about `size`."""
    batch, queries, keys = len(case.query_lens), sum(case.query_lens), sum(case.key_lens)
    q, k, v = _tensors(case, max(case.query_lens), max(case.key_lens), batch, dtype, head_dim, device)
    packed_q, packed_k, packed_v = (x[0] for x in _tensors(case, queries, keys, 1, dtype, head_dim, device))
    q, packed_q = q * size, packed_q * size
    q_lens, kv_lens = lens_tensor(case.query_lens, device), lens_tensor(case.key_lens, device)
    offsets_q, offsets_k = cu_seqlens(case.query_lens, device), cu_seqlens(case.key_lens, device)
    longest = max(case.query_lens), max(case.key_lens)
    return {
        "padded": lambda: flash_attention(q, k, v, kv_lens=kv_lens, q_lens=q_lens, return_lse=True),
        "packed": lambda: flash_attention_varlen(
            packed_q, packed_k, packed_v, offsets_q, offsets_k, *longest, return_lse=True
        ),
    }
