"""flash_attention and flash_attention_varlen against float64, on the CPU and on the GPU where there is one."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCES, attention_batch, attention_packed, error, lse_error
from torch import Tensor

from para_kernels import attention, flash_attention, flash_attention_varlen

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Scores of a few units, rounded to the dtype's products: the lse is exact to about the rounding of its inputs.
LSE_TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}


def random_qkv(
    batch: int, q_len: int, k_len: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, q_len, heads, head_dim, device=device).to(dtype)
    k, v = (torch.randn(batch, k_len, kv_heads, head_dim, device=device).to(dtype) for _ in range(2))
    return q, k, v


def int32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(out: Tensor, lse: Tensor, ref: Tensor, ref_lse: Tensor) -> None:
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert error(out, ref) <= TOLERANCES[out.dtype]
    assert lse_error(lse, ref_lse) <= LSE_TOLERANCES[out.dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 40, 80, 1])
def test_every_head_dim_with_odd_lengths(head_dim: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(head_dim)
    q, k, v = random_qkv(2, 131, 259, 2, 2, head_dim, dtype, device)
    check(*flash_attention(q, k, v, return_lse=True), *attention_batch(q, k, v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(6, 3), (6, 1), (8, 2)], ids=str)
def test_grouped_query_heads(heads: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(1)
    q, k, v = random_qkv(2, 45, 77, *heads, 64, dtype, device)
    check(*flash_attention(q, k, v, return_lse=True), *attention_batch(q, k, v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_hide_what_lies_past_them(dtype: torch.dtype, device: str) -> None:
    """Keys past kv_lens are poisoned with NaN; rows past q_lens come back as zeros; no keys give zeros, not NaN."""
    torch.manual_seed(2)
    kv_lens, q_lens = [300, 0, 1, 129, 128], [150, 150, 0, 1, 129]
    q, k, v = random_qkv(5, 150, 300, 4, 2, 64, dtype, device)
    for b, kv_len in enumerate(kv_lens):
        k[b, kv_len:] = float("nan")
        v[b, kv_len:] = float("nan")
    out, lse = flash_attention(q, k, v, kv_lens=int32(kv_lens, device), q_lens=int32(q_lens, device), return_lse=True)
    check(out, lse, *attention_batch(q, k, v, kv_lens, q_lens))
    assert out[1].count_nonzero() == 0
    assert out[3, 1:].count_nonzero() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1)], ids=str)
def test_empty_and_single(sizes: tuple[int, int], device: str) -> None:
    q, k, v = random_qkv(2, *sizes, 2, 2, 64, torch.float32, device)
    check(*flash_attention(q, k, v, return_lse=True), *attention_batch(q, k, v))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device: str) -> None:
    q, k, v = random_qkv(0, 4, 4, 2, 2, 64, torch.float32, device)
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_with_contiguous_head_dim(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(3)
    fused = torch.randn(2, 140, 3, 2, 64, device=device).to(dtype)
    head_major = torch.randn(2, 2, 140, 64, device=device).to(dtype).transpose(1, 2)
    every_second = torch.randn(2, 280, 2, 64, device=device).to(dtype)[:, ::2]
    odd_offset = torch.randn(2 * 140 * 2 * 64 + 1, device=device).to(dtype)[1:].view(2, 140, 2, 64)
    shared_head = torch.randn(2, 140, 1, 64, device=device).to(dtype).expand(2, 140, 2, 64)
    shared_sample = torch.randn(1, 140, 2, 64, device=device).to(dtype).expand(2, 140, 2, 64)
    views = [fused[:, :, 0], fused[:, :, 2], head_major, every_second, odd_offset, shared_head, shared_sample]
    for q, k, v in zip(views, views[1:] + views[:1], views[2:] + views[:2], strict=True):
        check(*flash_attention(q, k, v, return_lse=True), *attention_batch(q, k, v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(4)
    cu_q, cu_k = [0, 130, 130, 131, 171], [0, 7, 140, 140, 401]
    q = torch.randn(171, 4, 64, device=device).to(dtype)
    k, v = (torch.randn(401, 2, 64, device=device).to(dtype) for _ in range(2))
    out, lse = flash_attention_varlen(q, k, v, int32(cu_q, device), int32(cu_k, device), 130, 261, return_lse=True)
    check(out, lse, *attention_packed(q, k, v, cu_q, cu_k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.7, 0.0])
def test_scale(scale: float, device: str) -> None:
    torch.manual_seed(5)
    q, k, v = random_qkv(1, 20, 30, 2, 2, 16, torch.float32, device)
    check(*flash_attention(q, k, v, scale=scale, return_lse=True), *attention_batch(q, k, v, scale=scale))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_among_the_keys_comes_out_as_nan(device: str) -> None:
    q, k, v = random_qkv(1, 20, 30, 1, 1, 16, torch.float32, device)
    k[0, 3] = float("nan")
    assert flash_attention(q, k, v).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_do_not_overflow(device: str) -> None:
    torch.manual_seed(6)
    q, k, v = random_qkv(1, 64, 200, 1, 1, 64, torch.float32, device)
    q = q * 100
    out, lse = flash_attention(q, k, v, return_lse=True)
    ref, ref_lse = attention_batch(q, k, v)
    # Scores of several hundred: their own float32 rounding, 3e-5, is what the softmax amplifies.
    assert error(out, ref) <= 1e-4
    assert lse_error(lse, ref_lse) <= 1e-3


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_shapes_on_cpu(data: st.DataObject) -> None:
    run_random_shape(data, "cpu")


@pytest.mark.gpu
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_shapes_on_gpu(data: st.DataObject) -> None:
    run_random_shape(data, "cuda")


def run_random_shape(data: st.DataObject, device: str) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, kv_heads, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    q_len, k_len = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    head_dim = data.draw(st.sampled_from([8, 16, 32, 64, 72, 96, 128]))
    kv_lens = data.draw(st.none() | st.lists(st.integers(0, k_len), min_size=batch, max_size=batch))
    q_lens = data.draw(st.none() | st.lists(st.integers(0, q_len), min_size=batch, max_size=batch))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    q, k, v = random_qkv(batch, q_len, k_len, kv_heads * groups, kv_heads, head_dim, dtype, device)
    lens = {
        name: None if values is None else int32(values, device)
        for name, values in (("kv_lens", kv_lens), ("q_lens", q_lens))
    }
    out, lse = flash_attention(q, k, v, **lens, return_lse=True)
    ref, ref_lse = attention_batch(q, k, v, kv_lens, q_lens)
    # With one or two keys the output's norm is a few elements' own rounding: allow twice the tolerance of long sums.
    assert error(out, ref) <= 2 * TOLERANCES[dtype]
    assert lse_error(lse, ref_lse) <= 2 * LSE_TOLERANCES[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_agree_to_the_bit(device: str) -> None:
    torch.manual_seed(7)
    q, k, v = random_qkv(2, 200, 333, 4, 4, 64, torch.bfloat16, device)
    lens = int32([333, 100], device)
    first = flash_attention(q, k, v, kv_lens=lens, return_lse=True)
    second = flash_attention(q, k, v, kv_lens=lens, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_does_not_depend_on_its_batch(device: str) -> None:
    torch.manual_seed(8)
    q, k, v = random_qkv(3, 70, 150, 2, 2, 64, torch.float32, device)
    together = flash_attention(q, k, v, kv_lens=int32([150, 40, 99], device))
    for b, kv_len in enumerate([150, 40, 99]):
        alone = flash_attention(q[b : b + 1], k[b : b + 1, :kv_len], v[b : b + 1, :kv_len])
        assert error(together[b : b + 1], alone) <= TOLERANCES[torch.float32]


# --- bad input ---------------------------------------------------------------------------------------------------------


def good() -> dict[str, Tensor]:
    q, k, v = random_qkv(2, 5, 7, 4, 2, 8, torch.float32, "cpu")
    return {"q": q, "k": k, "v": v}


BAD_INPUTS: list[tuple[str, dict[str, object], str]] = [
    ("dtype", {"q": torch.zeros(2, 5, 4, 8, dtype=torch.float64)}, r"q: got dtype torch.float64, allowed are"),
    ("dtypes differ", {"q": torch.zeros(2, 5, 4, 8, dtype=torch.float16)}, r"k: got dtype torch.float32, must be torch.float16"),
    ("device of q", {"q": torch.zeros(2, 5, 4, 8, device="meta")}, r"q: got device meta, allowed are cpu and cuda"),
    ("device of v", {"v": torch.zeros(2, 7, 2, 8, device="meta")}, r"v: got device meta, must be cpu"),
    ("dims", {"q": torch.zeros(5, 4, 8)}, r"q: got shape \(5, 4, 8\), must be \(B, S, H, D\)"),
    ("batch", {"q": torch.zeros(3, 5, 4, 8)}, r"k: got shape \(2, 7, 2, 8\), must be \(3, 7, 2, 8\)"),
    ("v shape", {"v": torch.zeros(2, 6, 2, 8)}, r"v: got shape \(2, 6, 2, 8\), must be \(2, 7, 2, 8\) like k"),
    ("heads", {"q": torch.zeros(2, 5, 3, 8)}, r"k: got 2 heads, must divide the 3 heads of q"),
    ("no key heads", {"k": torch.zeros(2, 7, 0, 8), "v": torch.zeros(2, 7, 0, 8)}, r"k: got 0 heads, must divide"),
    ("head dim 0", {"q": torch.zeros(2, 5, 4, 0), "k": torch.zeros(2, 7, 2, 0), "v": torch.zeros(2, 7, 2, 0)}, r"q: got head dim 0, must lie in 1 \.\.\. 256"),
    ("head dim 257", {"q": torch.zeros(2, 5, 4, 257), "k": torch.zeros(2, 7, 2, 257), "v": torch.zeros(2, 7, 2, 257)}, r"q: got head dim 257, must lie in 1 \.\.\. 256"),
    ("strided D", {"q": torch.zeros(2, 5, 8, 4).transpose(2, 3)}, r"q: got strides .*last dimension must be contiguous"),
    ("lens dtype", {"kv_lens": torch.tensor([1, 2])}, r"kv_lens: got dtype torch.int64, allowed are torch.int32"),
    ("lens shape", {"kv_lens": torch.zeros(3, dtype=torch.int32)}, r"kv_lens: got shape \(3,\), must be \(2,\)"),
    ("lens device", {"q_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, r"q_lens: got device meta, must be cpu"),
    ("negative lens", {"kv_lens": torch.tensor([-1, 2], dtype=torch.int32)}, r"kv_lens: got \[-1, 2\], every length must lie in 0 \.\.\. 7"),
    ("too long kv_lens", {"kv_lens": torch.tensor([1, 8], dtype=torch.int32)}, r"kv_lens: got \[1, 8\], every length must lie in 0 \.\.\. 7"),
    ("too long q_lens", {"q_lens": torch.tensor([6, 1], dtype=torch.int32)}, r"q_lens: got \[6, 1\], every length must lie in 0 \.\.\. 5"),
    ("negative scale", {"scale": -1.0}, r"scale: got -1.0, must be finite and at least 0"),
    ("requires grad", {"q": torch.zeros(2, 5, 4, 8, requires_grad=True)}, r"q: requires grad"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [bad[1:] for bad in BAD_INPUTS], ids=[bad[0] for bad in BAD_INPUTS])
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(**(good() | change))  # pyright: ignore[reportArgumentType]


BAD_PACKED: list[tuple[str, dict[str, object], str]] = [
    ("dims", {"q": torch.zeros(1, 5, 2, 8)}, r"q: got shape .* must be \(T, H, D\)"),
    ("cu dtype", {"cu_seqlens_q": torch.tensor([0, 5])}, r"cu_seqlens_q: got dtype torch.int64"),
    ("cu empty", {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens_q: got shape \(0,\), must be \(B \+ 1,\)"),
    ("cu sizes", {"cu_seqlens_k": torch.tensor([0, 3, 5], dtype=torch.int32)}, r"cu_seqlens_k: got shape \(3,\), must be \(2,\)"),
    ("falls", {"cu_seqlens_q": torch.tensor([0, 5, 3], dtype=torch.int32), "cu_seqlens_k": torch.tensor([0, 3, 5], dtype=torch.int32)}, r"cu_seqlens_q: got \[0, 5, 3\]"),
    ("past the end", {"cu_seqlens_k": torch.tensor([0, 6], dtype=torch.int32)}, r"cu_seqlens_k: got \[0, 6\].*end at 5 or before"),
    ("longer than max", {"max_seqlen_q": 4}, r"cu_seqlens_q: got \[0, 5\].*at most the maximum length 4"),
    ("negative max", {"max_seqlen_k": -1}, r"max_seqlen_k: got -1, must be an integer, at least 0"),
    ("float max", {"max_seqlen_q": 5.0}, r"max_seqlen_q: got 5.0, must be an integer"),
    ("head dim", {"k": torch.zeros(5, 2, 4), "v": torch.zeros(5, 2, 4)}, r"k: got shape \(5, 2, 4\), must be \(5, 2, 8\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [bad[1:] for bad in BAD_PACKED], ids=[bad[0] for bad in BAD_PACKED])
def test_bad_packed_input_is_named(change: dict[str, object], message: str) -> None:
    lens = torch.tensor([0, 5], dtype=torch.int32)
    arguments: dict[str, object] = {name: torch.zeros(5, 2, 8) for name in "qkv"}
    arguments |= {"cu_seqlens_q": lens, "cu_seqlens_k": lens, "max_seqlen_q": 5, "max_seqlen_k": 5}
    with pytest.raises(ValueError, match=message):
        flash_attention_varlen(**(arguments | change))  # pyright: ignore[reportArgumentType]


def mostly(random: Random, value: object, *others: object) -> object:
    return random.choice(others) if random.random() < 0.05 else value


def any_tensors(random: Random, dims: int) -> list[Tensor]:
    """q, k and v: mostly what attention takes, with each property wrong now and then, in one of them or in all."""
    sizes = [mostly(random, size, 0, 1, 3, 257) for size in (2, 5, 2, 8)]
    dtype = mostly(random, torch.float32, torch.float64, torch.int32)
    device = mostly(random, "cpu", "meta")
    tensors = []
    for name in "qkv":
        # The queries have other heads than the keys; values differ from keys only now and then.
        shape = [mostly(random, size, 0, 1, 3, 16) for size in sizes] if name != "v" else list(tensors[1].shape)
        shape[-2] = 4 if name == "q" and shape[-2] == 2 else shape[-2]
        shape = [mostly(random, size, 2) for size in shape] if name == "v" else shape
        tensor = torch.empty(
            shape[-dims:], dtype=mostly(random, dtype, torch.float16), device=mostly(random, device, "cpu")
        )
        tensor = mostly(random, tensor, tensor[None], tensor.mT, tensor[..., ::2], tensor.transpose(0, 1))
        tensors.append(tensor.requires_grad_(mostly(random, False, True) and tensor.is_floating_point()))
    return tensors


def outcome(*arguments: Tensor) -> str:
    """What the checks say."""
    function = flash_attention if arguments[0].dim() == 4 else flash_attention_varlen
    starts = torch.zeros(2, dtype=torch.int32)
    try:
        function(*arguments, *(() if arguments[0].dim() == 4 else (starts, starts, 0, 0)))
    except ValueError as refusal:
        return str(refusal)
    return "taken"


@pytest.mark.parametrize("dims", [4, 3])
def test_the_quick_check_lets_nothing_pass_that_the_others_refuse(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("para_kernels._C")
    random = Random(dims)
    cases = [any_tensors(random, dims) for _ in range(4000)]
    quick = [outcome(*tensors) for tensors in cases]
    for check in ("_checked_attention", "_checked_varlen"):
        monkeypatch.setattr(attention, check, attention._not_checked)
    assert [outcome(*tensors) for tensors in cases] == quick
    assert 400 < quick.count("taken") < 3600
