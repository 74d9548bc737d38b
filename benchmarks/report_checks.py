"""The GPU report's checks: right values, no synchronisation, no compilation for a new length, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from para_kernels import flash_attention, flash_attention_varlen, merge_states, residual_diff

from .inputs import attention_inputs, cu_seqlens, hidden_states, lens_tensor
from .record import Record

# Relative error in the Frobenius norm against float64: a few units in the last place of the input type. The result is
# rounded once to the type, and P once before the second product.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
HEAD_DIMS = (64, 96, 128, 256, 40, 80)

Result = tuple[list[str], list[Record]]


class CheckFailedError(Exception):
    """A check that did not hold; the message says which and by how much."""


class SectionSkippedError(Exception):
    """A section that cannot run on this device; the message says why."""


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
    """Every dtype, head dim and case, padded and packed, output and lse, against float64."""
    worst: dict[tuple[str, str], float] = {}
    for dtype, tolerance in TOLERANCES.items():
        for head_dim in HEAD_DIMS:
            for case in CASES:
                for layout, run in (("padded", _padded), ("packed", _packed)):
                    if layout == "packed" and dtype != torch.bfloat16 and head_dim != 128:
                        continue  # each combination compiles a kernel; the packed ones differ in the row offsets only
                    error = run(case, dtype, head_dim, device)
                    key = (str(dtype).removeprefix("torch."), layout)
                    worst[key] = max(worst.get(key, 0.0), error)
                    if not error <= tolerance:
                        raise CheckFailedError(
                            f"{layout}, {case.name}, D={head_dim}, {dtype}: error {error:.2e} > {tolerance:.0e}"
                        )
    lines = [
        f"attention, {dtype}, {layout}: worst relative error {error:.2e}" for (dtype, layout), error in worst.items()
    ]
    return [*lines, *_check_merge(device), *_check_residual(device)], []


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


def attention_float64(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One sample written out in float64: q (Sq, H, D), k and v (Sk, Hk, D) to (Sq, H, D) and lse (H, Sq)."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """norm(value - reference) / norm(reference), in float64."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _check_merge(device: torch.device) -> list[str]:
    """Attention over two halves of the keys, merged, is attention over all keys."""
    q, k, v = attention_inputs(2, 300, 4, 64, torch.float32, device)
    halves = [flash_attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 111), slice(111, None))]
    (out_a, lse_a), (out_b, lse_b) = halves
    merged, lse = merge_states(out_a, lse_a, out_b, lse_b)
    error = max(_error(merged[b], lse[b], q[b], k[b], v[b]) for b in range(2))
    if not error <= 2 * TOLERANCES[torch.float32]:
        raise CheckFailedError(f"merge_states: error {error:.2e}")
    return [f"merge_states, float32: relative error {error:.2e}"]


def _check_residual(device: torch.device) -> list[str]:
    """The residual bit for bit, the sums against float64, the same sums twice."""
    errors = []
    for dtype in TOLERANCES:
        hidden_in, hidden_out, previous = (hidden_states((2, 1037, 517), dtype, device) for _ in range(3))
        residual, sums = residual_diff(hidden_in, hidden_out, previous)
        expected = hidden_out - hidden_in
        exact = torch.stack([(previous.double() - expected.double()).abs().sum(), previous.double().abs().sum()])
        errors.append(relative_error(sums, exact))
        _, again = residual_diff(hidden_in, hidden_out, previous)
        if not torch.equal(residual, expected) or not torch.equal(sums, again) or errors[-1] > 1e-5:
            raise CheckFailedError(
                f"residual_diff, {dtype}: residual equal {torch.equal(residual, expected)}, error {errors[-1]:.2e}"
            )
    return [f"residual_diff: residual bit for bit, sums repeatable, relative error {max(errors):.2e}"]


def _calls(device: torch.device, length: int = 257) -> dict[str, Callable[[], object]]:
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
        "flash_attention with lens": lambda: flash_attention(q, k, v, kv_lens=kv_lens, q_lens=q_lens, return_lse=True),
        "flash_attention_varlen": lambda: flash_attention_varlen(
            packed_q, packed_k, packed_v, offsets, offsets, length, length
        ),
        "merge_states": lambda: merge_states(out, lse, out, lse),
        "residual_diff": lambda: residual_diff(*hidden),
        "residual_diff, first step": lambda: residual_diff(hidden[0], hidden[1], None),
    }


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise SectionSkippedError("needs CUDA")


def no_sync(device: torch.device) -> Result:
    """No operation waits for the device (torch raises at once where one does)."""
    _need_cuda(device)
    calls = _calls(device)
    for call in calls.values():
        call()  # Compilation may wait; a compiled call may not.
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
    return [f"no synchronisation in: {', '.join(calls)}"], []


def compile_count(device: torch.device) -> Result:
    """Fifty new lengths compile nothing, padded, with lengths and packed."""
    _need_cuda(device)
    from para_kernels.triton_kernels.attention import compile_count as compiled

    for call in _calls(device).values():
        call()
    before = compiled()
    for length in _new_lengths(50):
        for call in _calls(device, length).values():
            call()
    after = compiled()
    if after != before:
        raise CheckFailedError(f"{after - before} variants compiled for 50 new lengths ({before} before)")
    return [f"50 new lengths compiled nothing ({before} variants)"], []


def _new_lengths(count: int) -> Sequence[int]:
    """Multiples of 16 and not, odd and even, below and above every tile size; none is the warm-up's 257."""
    return [64 * i + 16 if i % 3 == 0 else 37 * i + 2 for i in range(count)]


def cuda_graph(device: torch.device) -> Result:
    """Every operation is captured and its replay on changed inputs gives what a fresh call gives."""
    _need_cuda(device)
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = attention_inputs(2, 300, 4, 128, dtype, device)
        hidden = [hidden_states((2, 300, 256), dtype, device) for _ in range(3)]
        lens = lens_tensor([300, 123], device)

        def step(q=q, k=k, v=v, hidden=hidden, lens=lens) -> list[Tensor]:
            out, lse = flash_attention(q, k, v, kv_lens=lens, return_lse=True)
            return [out, lse, *merge_states(out, lse, out, lse), *residual_diff(*hidden)]

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
        lens.copy_(torch.tensor([77, 299], dtype=torch.int32))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for index, (value, expected) in enumerate(zip(replayed, step(), strict=True)):
            if not torch.equal(value, expected):
                raise CheckFailedError(f"{dtype}: output {index} of the replay differs from a fresh call")
    return ["captured and replayed with other values and other lengths, bit for bit"], []
