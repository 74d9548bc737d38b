"""The operator layer: opcheck, torch.compile, no reads of device values, no compilation for a new length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import attention_batch, error
from torch import Tensor

from para_kernels import flash_attention, flash_attention_varlen, merge_states, residual_diff
from para_kernels import ops as para_ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def samples(device: str, dtype: torch.dtype = torch.float32) -> dict[str, list[tuple]]:
    """Arguments for each operator: the plain ones, and those with every optional argument."""
    q, k, v = (torch.randn(2, 33, 4, 16, device=device).to(dtype) for _ in range(3))
    lens = torch.tensor([33, 7], dtype=torch.int32, device=device)
    cu_seqlens = torch.tensor([0, 20, 33], dtype=torch.int32, device=device)
    lse = torch.randn(2, 4, 33, device=device)
    hidden = [torch.randn(2, 21, 48, device=device).to(dtype) for _ in range(3)]
    return {
        "flash_attention": [(q, k, v, None, None, 0.25), (q, k[:, :9, :2], v[:, :9, :2], lens.clamp(max=9), lens, 0.25)],
        "flash_attention_varlen": [(q[0], k[0], v[0], cu_seqlens, cu_seqlens, 20, 20, 0.25)],
        "merge_states": [(q, lse, k, lse.flip(0)), (q[0], lse[0], k[0], lse[1])],
        "residual_diff": [(hidden[0], hidden[1], None), tuple(hidden), (hidden[0][:, ::2], hidden[1][:, ::2], hidden[2][:, ::2])],
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", samples("cpu"))
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    for arguments in samples(device, dtype)[name]:
        torch.library.opcheck(getattr(torch.ops.para_kernels, name).default, arguments)


def attend_lengths(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple[Tensor, ...]:
    out, lse = flash_attention(q, k, v, kv_lens=lens, q_lens=lens, return_lse=True)
    return out * 2, lse


def attend_packed(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple[Tensor, ...]:
    """The batch as one pack of two samples, the first as long as the second length says."""
    total = q.shape[0] * q.shape[1]
    starts = torch.cat([lens.new_zeros(1), lens[1:], lens.new_full((1,), total)])
    return flash_attention_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, starts, total, total, return_lse=True
    )


def merge_halves(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple[Tensor, ...]:
    half = k.shape[1] // 2
    first = flash_attention(q, k[:, :half], v[:, :half], return_lse=True)
    second = flash_attention(q, k[:, half:], v[:, half:], return_lse=True)
    return merge_states(*first, *second)


def difference(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> tuple[Tensor, ...]:
    residual, sums = residual_diff(q, k, v)
    return residual + 1, sums * 2, residual_diff(q, k)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [attend_lengths, attend_packed, merge_halves, difference])
def test_compiles_in_one_graph(function: Callable[..., tuple[Tensor, ...]], device: str) -> None:
    """With dynamic shapes: the second length must give the right result too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (24, 37):
        q, k, v = (torch.randn(2, length, 2, 16, device=device) for _ in range(3))
        lens = torch.tensor([length, 5], dtype=torch.int32, device=device)
        for out, expected in zip(compiled(q, k, v, lens), function(q, k, v, lens), strict=True):
            torch.testing.assert_close(out, expected, equal_nan=False)


@pytest.mark.parametrize("device", DEVICES)
def test_merging_halves_is_exact(device: str) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 300, 2, 64, device=device) for _ in range(3))
    out, _ = merge_halves(q, k, v, torch.empty(0))
    assert error(out, attention_batch(q, k, v)[0]) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_two_residual_sums_agree_to_the_bit_and_with_float64(device: str) -> None:
    torch.manual_seed(2)
    hidden = [torch.randn(1, 3001, 192, device=device, dtype=torch.bfloat16) for _ in range(3)]
    (residual, sums), (_, again) = residual_diff(*hidden), residual_diff(*hidden)
    assert torch.equal(sums, again)
    assert torch.equal(residual, hidden[1] - hidden[0])
    previous = hidden[2].double()
    expected = torch.stack([(previous - residual.double()).abs().sum(), previous.abs().sum()])
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0)


BAD_RESIDUALS: list[tuple[str, dict[str, object], str]] = [
    ("dtype", {"hidden_in": torch.zeros(2, 3, dtype=torch.int64)}, r"hidden_in: got dtype torch.int64, allowed are"),
    ("shape", {"hidden_out": torch.zeros(2, 4)}, r"hidden_out: got shape \(2, 4\), must be \(2, 3\) like hidden_in"),
    ("dtypes differ", {"previous": torch.zeros(2, 3, dtype=torch.float16)}, r"previous: got dtype torch.float16, must be torch.float32"),
    ("device", {"previous": torch.zeros(2, 3, device="meta")}, r"previous: got device meta, must be cpu"),
    ("grad", {"hidden_in": torch.zeros(2, 3, requires_grad=True)}, r"hidden_in: requires grad"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BAD_RESIDUALS], ids=[b[0] for b in BAD_RESIDUALS])
def test_bad_residual_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {name: torch.zeros(2, 3) for name in ("hidden_in", "hidden_out", "previous")}
    with pytest.raises(ValueError, match=message):
        residual_diff(**(arguments | change))  # pyright: ignore[reportArgumentType]


BAD_STATES: list[tuple[str, dict[str, object], str]] = [
    ("dims", {"out_a": torch.zeros(3, 4)}, r"out_a: got shape \(3, 4\), must be \(B, S, H, D\) or \(T, H, D\)"),
    ("dtype", {"out_a": torch.zeros(2, 3, 4, 8, dtype=torch.int32)}, r"out_a: got dtype torch.int32, allowed are"),
    ("outs differ", {"out_b": torch.zeros(2, 3, 4, 9)}, r"out_b: got shape \(2, 3, 4, 9\), must be \(2, 3, 4, 8\) like out_a"),
    ("lse dtype", {"lse_a": torch.zeros(2, 4, 3, dtype=torch.float16)}, r"lse_a: got dtype torch.float16, allowed are torch.float32"),
    ("lse shape", {"lse_b": torch.zeros(2, 3, 4)}, r"lse_b: got shape \(2, 3, 4\), must be \(2, 4, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BAD_STATES], ids=[b[0] for b in BAD_STATES])
def test_bad_states_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"out_a": torch.zeros(2, 3, 4, 8), "lse_a": torch.zeros(2, 4, 3)}
    arguments |= {"out_b": torch.zeros(2, 3, 4, 8), "lse_b": torch.zeros(2, 4, 3)}
    with pytest.raises(ValueError, match=message):
        merge_states(**(arguments | change))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (5, 4, 8), (0, 5, 4, 8)], ids=["batch", "packed", "empty"])
def test_outputs_from_the_extension_are_those_from_torch(shape: tuple[int, ...]) -> None:
    _C = pytest.importorskip("para_kernels._C")
    q = torch.empty(*shape, 2, dtype=torch.bfloat16)[..., 0]
    for ours, theirs in zip(_C.attention_outputs(q), para_ops._attention_outputs(q), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
            theirs.shape, theirs.stride(), theirs.dtype, theirs.device
        )  # fmt: skip


def test_fallbacks_without_the_extension_agree() -> None:
    torch.manual_seed(3)
    arguments = samples("cpu")
    for out_a, lse_a, out_b, lse_b in arguments["merge_states"]:
        lse_a[..., 0] = float("-inf")
        out_a[(lse_a == float("-inf")).transpose(-1, -2)] = float("nan")  # a state without keys may hold anything
        transposed = (out_a, lse_a.transpose(-1, -2).contiguous().transpose(-1, -2), out_b, lse_b)
        for out, expected in zip(para_ops._merge_states_torch(*transposed), merge_states(*transposed), strict=True):
            torch.testing.assert_close(out, expected)
            assert out.stride() == expected.stride()
    for args in arguments["residual_diff"]:
        for out, expected in zip(para_ops._residual_diff_torch(*args), residual_diff(*args), strict=True):
            torch.testing.assert_close(out, expected)


# --- the GPU only ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_nothing_reads_a_device_value() -> None:
    """With lengths, packed, merging and differences, first calls included."""
    arguments = samples("cuda", torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, argument_lists in arguments.items():
            for args in argument_lists:
                getattr(torch.ops.para_kernels, name)(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_new_lengths_compile_nothing() -> None:
    from para_kernels.triton_kernels.dispatch import compile_count

    def attend(length: int) -> None:
        q, k, v = (torch.randn(2, length, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        lens = torch.tensor([length, length // 2], dtype=torch.int32, device="cuda")
        starts = torch.tensor([0, length // 2, length], dtype=torch.int32, device="cuda")
        flash_attention(q, k, v)
        flash_attention(q, k, v, kv_lens=lens, q_lens=lens)
        flash_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, kv_lens=lens)
        flash_attention_varlen(q[0], k[0], v[0], starts, starts, length, length)

    attend(50)
    before = compile_count()
    for length in range(1, 1001, 20):
        attend(length)
    assert compile_count() == before


@pytest.mark.gpu
def test_graph_capture() -> None:
    q, k, v = (torch.randn(1, 500, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lens = torch.tensor([500], dtype=torch.int32, device="cuda")
    flash_attention(q, k, v, kv_lens=lens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, k, v, kv_lens=lens)
    for length in (500, 77):
        lens.fill_(length)
        q.normal_()
        graph.replay()
        assert torch.equal(out, flash_attention(q, k, v, kv_lens=lens))
