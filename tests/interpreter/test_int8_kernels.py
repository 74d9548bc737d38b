"""Quantisation and the portable 8-bit kernel, in the interpreter: against the CPU's arithmetic, and against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from reference import attention_batch, error, lse_error

from para_kernels import ops8
from para_kernels.parallel.parts import Parts
from para_kernels.parallel.ring8 import laid_out
from para_kernels.parallel.sharding import Shards
from para_kernels.triton_kernels import dispatch8, quantize_int8
from para_kernels.triton_kernels.dispatch8 import attention_int8_forward
from para_kernels.triton_kernels.quantize_int8 import new_keys, quantise_keys, quantise_queries

POISON = float("nan")
# Normal data, where the output is a sum of random signs: of the weights in float16 only the rounding of queries and keys
# is left, and that of values; e4m3 adds that of the weights. The interpreter's e4m3 cuts bits off instead of rounding.
TOLERANCES = {(8, 0): 1.4e-2, (8, 9): 1e-1}


def inputs(
    queries: int, keys: int, heads: int = 2, kv_heads: int = 2, head_dim: int = 64, batch: int = 1, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(batch, queries, heads, head_dim)
    k = torch.randn(batch, keys, kv_heads, head_dim) + offset * torch.randn(1, 1, kv_heads, head_dim)
    return q, k, torch.randn(batch, keys, kv_heads, head_dim)


def lens_of(lens: list[int] | None) -> torch.Tensor | None:
    return None if lens is None else torch.tensor(lens, dtype=torch.int32)


def quantised(permuted: bool, *tensors: torch.Tensor, lens: list[int] | None = None) -> SimpleNamespace:
    q, k, v = tensors
    keys = new_keys(k, torch.float16)
    quantise_keys(k, v, lens_of(lens), keys, permuted=permuted)
    return SimpleNamespace(**keys._asdict(), **quantise_queries(q, keys.k_means, None, 0.5)._asdict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_queries_and_keys_are_rounded_as_on_the_cpu(dtype: torch.dtype) -> None:
    """But that float32 is not rotated here."""
    torch.manual_seed(0)
    q, k, v = (x.to(dtype) for x in inputs(150, 300, offset=8.0))
    x = quantised(False, q, k, v)
    q, k = q.float(), k.float()
    rotated = ops8.rotated if dtype == torch.float16 else torch.Tensor.float
    sample = torch.cat([k[0, first : first + 16] for first in (0, 128, 256)])
    mean = rotated(sample.mean(0))
    for got, scales, block, values in (
        (x.q, x.q_scales, 1, rotated(q[0])),
        (x.k, x.k_scales, ops8.K_BLOCK, rotated(k[0]) - mean),
    ):
        expected = ops8.round_to_int8(values, block)
        rows = got[0, :, : values.shape[0]].transpose(0, 1)
        # One step where the scale's last bit, or the mean's, turned a tie.
        assert (rows - expected.rows).abs().max() <= 1
        assert (rows != expected.rows).float().mean() < 1e-3
        of_rows = scales[0].repeat_interleave(block, 1)[:, : values.shape[0]]
        torch.testing.assert_close(of_rows.T[..., None], expected.scales, rtol=1e-5, atol=0)
    assert (x.k[0, :, 300:384] == 0).all()
    # Sums of 64 products of up to 100, which nothing rounds in the same order.
    means = 0.5 * torch.einsum("qhd,hd->hq", q[0], sample.mean(0))
    torch.testing.assert_close(x.means_of_scores[0, :, :150], means, rtol=1e-5, atol=1e-4)


def test_values_lose_mean_and_scale() -> None:
    torch.manual_seed(1)
    q, k, v = inputs(3, 300)
    v[0, :, 0, 5] = 2.0  # a channel without any range
    x = quantised(False, q, k, v)
    scale, mean = x.v_scales[0, :, 0], x.v_scales[0, :, 1]
    torch.testing.assert_close(mean, v[0].mean(0), rtol=0, atol=1e-4)
    assert x.v.float().abs().max() <= ops8.HIGHEST_E4M3
    back = x.v[0, :, :, :300].float() * scale[..., None] + mean[..., None]
    torch.testing.assert_close(back.permute(2, 0, 1), v[0], rtol=1e-3, atol=1e-3)
    assert (x.v[0, :, :, 300:384] == 0).all()


@pytest.mark.parametrize("lens", [None, [9000, 130]], ids=["whole", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_rounding_does_not_change_the_values_mean(dtype: torch.dtype, lens: list[int] | None) -> None:
    """More blocks than a program adds up at a time, and a head dim that is padded."""
    torch.manual_seed(4)
    _, k, v = inputs(1, 9000, head_dim=40, batch=2)
    v = (v + 0.3).bfloat16().float()
    keys = new_keys(k, dtype)
    quantise_keys(k, v, lens_of(lens), keys, permuted=True)
    for b, length in enumerate(lens or [9000, 9000]):
        blocks = -(-length // ops8.K_BLOCK) * ops8.K_BLOCK  # the others are not written
        scale, mean = keys.v_scales[b, :, 0].double(), keys.v_scales[b, :, 1].double()
        back = keys.v[b, ..., :blocks].double().sum(2) / length * scale + mean
        torch.testing.assert_close(back[:, :40], v[b, :length].double().mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lens", [None, [700, 0, 33]], ids=["whole", "lengths"])
def test_scales_of_values_are_those_that_err_least(lens: list[int] | None) -> None:
    torch.manual_seed(5)
    v = torch.randn(3, 700, 2, 40)
    v[:, :, 1, 4] = v[:, :, 1, 4].sign() + 1e-3 * v[:, :, 1, 5]  # one scale is right for this one, and others are not
    v[:, :, 0, 3] = 2.0  # a channel without any range
    keys = new_keys(v, torch.float8_e4m3fn)
    quantise_keys(torch.randn_like(v), v, lens_of(lens), keys, permuted=False)
    float16 = new_keys(v, torch.float16)
    quantise_keys(torch.randn_like(v), v, lens_of(lens), float16, permuted=False)
    tried = 2.0 ** (torch.arange(quantize_int8.SCALES_TRIED) / quantize_int8.SCALES_TRIED)
    for b, length in enumerate(lens or [700] * 3):
        least, chosen = float16.v_scales[b, :, 0, :40], keys.v_scales[b, :, 0, :40]
        if not length:
            assert torch.equal(chosen, least)
            continue
        centred = v[b, :length] - v[b, :length].mean(0)
        count = min(length, quantize_int8.SCALES_FROM)
        sample = centred[torch.arange(count) * length // count]
        errors = torch.stack([(sample - in_e4m3(sample / (least * x)) * least * x).square().sum(0) for x in tried])
        at = (chosen / least).log2().mul(quantize_int8.SCALES_TRIED).round().long()
        assert (at >= 0).all() and (at < quantize_int8.SCALES_TRIED).all()  # noqa: PT018
        got = errors.gather(0, at[None])[0]
        assert (got <= errors.amin(0) * 1.02 + 1e-9).all()
        assert got[1, 4] < 0.2 * errors[:, 1, 4].amax(), "a choice that matters"
        assert at[0, 3] == 0


@triton.jit
def _to_e4m3(x, out, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(tl.float8e4nv).to(tl.float32))


def in_e4m3(x: torch.Tensor) -> torch.Tensor:
    """As the interpreter has it, whose rounding up forgets the carry."""
    padded = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 1024))
    out = torch.empty_like(padded)
    _to_e4m3[(padded.numel() // 1024,)](padded, out, 1024)
    return out[: x.numel()].reshape(x.shape)


def test_keys_of_values_are_permuted_in_sixteens() -> None:
    torch.manual_seed(2)
    q, k, v = inputs(3, 40)
    plain, permuted = (quantised(flag, q, k, v).v for flag in (False, True))
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    keys = torch.tensor([16 * i + j for i in range(8) for j in order])
    assert torch.equal(permuted[..., :128], plain[..., keys])
    assert torch.equal(permuted[..., 128:], plain[..., 128 + keys]), "and so are what they lack"


@pytest.mark.parametrize("lens", [None, [1200, 700, 3, 0]], ids=["whole", "lengths"])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_largest_keys_and_what_their_values_lack_are_those_of_the_cpu(
    permuted: bool, lens: list[int] | None
) -> None:
    """Groups of three keys, of two, of one, and none; more groups than a block, and a last one that is not full."""
    torch.manual_seed(7)
    _, k, v = inputs(1, 1200, head_dim=40, batch=4)
    k, v = k.half(), v.half()
    if lens is not None:
        for b, length in enumerate(lens):
            k[b, length:] = v[b, length:] = POISON
    x = new_keys(k, torch.float16)
    quantise_keys(k, v, lens_of(lens), x, permuted=permuted)
    behind, rows = 1280, quantize_int8.rows_of_largest(1200)
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    assert x.k.shape[2] == behind + rows == 1280 + 512
    for b, length in enumerate(lens or [1200] * 4):
        count = 0
        lacking = x.v[b, ..., behind:].float().permute(2, 0, 1)
        if permuted:
            lacking = lacking[(torch.arange(0, rows, 16)[:, None] + order.argsort()).flatten()]
        if length:
            keys = ops8.rotated(k[b, :length].float()) - x.k_means[b]
            stored = x.v[b, ..., :behind].float().permute(2, 0, 1)
            if permuted:
                stored = stored[(torch.arange(0, behind, 16)[:, None] + order.argsort()).flatten()]
            values = ops8.Values(stored[:length], *x.v_scales[b].unbind(1))
            padded = torch.nn.functional.pad(v[b, :length].float(), (0, 24))
            expected = ops8.round_largest(keys, padded, values)
            count = expected.lacking.shape[0]
            scales = x.k_scales[b, :, behind // 128 :].repeat_interleave(128, 1)[:, :count].T
            torch.testing.assert_close(scales[..., None], expected.keys.scales, rtol=1e-4, atol=0)
            assert (x.k[b, :, behind : behind + count].transpose(0, 1) - expected.keys.rows).abs().max() <= 1
            # Of float16 values little is lacking: e4m3's numbers, but for the last bits of float32's sums.
            torch.testing.assert_close(lacking[:count], expected.lacking, rtol=0.1, atol=2e-3)
        assert (x.k[b, :, behind + count :] == 0).all()
        assert (lacking[count:] == 0).all()


def test_what_lies_past_the_keys_is_not_read() -> None:
    torch.manual_seed(3)
    q, k, v = inputs(70, 200, batch=2)
    k[1, 77:] = v[1, 77:] = POISON
    x = quantised(True, q, k, v, lens=[200, 77])
    alone = quantised(True, q[1:], k[1:, :77], v[1:, :77])
    assert torch.equal(x.v_scales[1], alone.v_scales[0])
    assert torch.equal(x.k[1, :, :128], alone.k[0, :, :128])
    assert torch.equal(x.v[1, ..., :128], alone.v[0, ..., :128])
    assert torch.equal(x.k[1, :, 256:384], alone.k[0, :, 128:])
    assert torch.equal(x.v[1, ..., 256:384], alone.v[0, ..., 128:])
    assert torch.equal(x.means_of_scores[1], alone.means_of_scores[0])


@pytest.mark.parametrize("capability", TOLERANCES, ids=["float16", "e4m3"])
@pytest.mark.parametrize(
    ("sizes", "kv_lens", "q_lens"),
    [
        ({"queries": 1, "keys": 1}, None, None),
        ({"queries": 130, "keys": 300, "offset": 8.0}, None, None),
        ({"queries": 40, "keys": 70, "heads": 6, "kv_heads": 2, "head_dim": 40}, None, None),
        ({"queries": 140, "keys": 140, "batch": 4}, [129, 5, 0, 140], [140, 0, 33, 129]),
    ],
    ids=["one key", "offset of keys", "grouped, D 40", "lengths"],
)
def test_attention_matches_float64(
    sizes: dict[str, int], kv_lens: list[int] | None, q_lens: list[int] | None, capability: tuple[int, int]
) -> None:
    torch.manual_seed(4)
    q, k, v = inputs(**sizes)
    for b in range(q.shape[0]):
        if kv_lens is not None and q_lens is not None:
            k[b, kv_lens[b] :] = v[b, kv_lens[b] :] = POISON
            q[b, q_lens[b] :] = POISON
    out, lse = torch.full_like(q, POISON), torch.full((q.shape[0], q.shape[2], q.shape[1]), POISON)
    scale = q.shape[3] ** -0.5
    attention_int8_forward(q, k, v, out, lse, lens_of(q_lens), lens_of(kv_lens), scale, capability=capability)
    ref, ref_lse = attention_batch(q, k, v, kv_lens, q_lens)
    assert error(out, ref) <= TOLERANCES[capability]
    assert lse_error(lse, ref_lse) <= 3e-2


@pytest.mark.parametrize("capability", TOLERANCES, ids=["float16", "e4m3"])
def test_pieces_in_one_memory_each_make_up_the_whole(capability: tuple[int, int]) -> None:
    """As the ring does it: keys with an offset of their own in each piece, lengths that end in the first or second."""
    torch.manual_seed(6)
    q, k, v = inputs(40, 300, heads=4, kv_heads=2, batch=2)
    k[:, 170:] += 5 * torch.randn(1, 1, 2, 64)
    lens = [300, 90]
    parts = Parts(q, Shards((170, 130)))
    for rows, start in ((170, 0), (130, 170)):
        piece = slice(start, start + rows)
        local = lens_of([min(max(length - start, 0), rows) for length in lens])
        layout = laid_out(dispatch8.shapes(k[:, piece].shape, capability))
        keys = dispatch8.Keys8(*layout.piece(torch.full((layout.size,), 0xFF, dtype=torch.uint8)))
        dispatch8.keys_forward(k[:, piece], v[:, piece], local, keys, capability=capability)

        def attend(rows: int = rows, keys: Any = keys, local: Any = local) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = torch.full_like(q, POISON), torch.full((2, 4, 40), POISON)
            dispatch8.attend_keys_forward(q, keys, rows, out, lse, None, local, 0.125, capability=capability)
            return out, lse

        parts.add(attend)
    out, lse = parts.result()
    ref, ref_lse = attention_batch(q, k, v, lens)
    assert error(out, ref) <= 1.2 * TOLERANCES[capability]  # the offset makes attention sharper
    assert lse_error(lse, ref_lse) <= 3e-2


def test_a_scale_of_zero_weighs_keys_alike() -> None:
    torch.manual_seed(5)
    q, k, v = inputs(20, 100)
    out, lse = torch.empty_like(q), torch.empty(1, 2, 20)
    attention_int8_forward(q, k, v, out, lse, None, None, 0.0, capability=(8, 0))
    ref, ref_lse = attention_batch(q, k, v, scale=0.0)
    assert error(out, ref) <= TOLERANCES[8, 0]
    assert lse_error(lse, ref_lse) <= 1e-5


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_comes_out_as_nan(which: str) -> None:
    q, k, v = inputs(20, 100)
    {"query": q, "key": k, "value": v}[which][0, 7, 0, 3] = POISON
    out, lse = torch.zeros_like(q), torch.zeros(1, 2, 20)
    attention_int8_forward(q, k, v, out, lse, None, None, 0.125, capability=(8, 0))
    assert out[0, 7, 0].isnan().any()
    assert out[0, :, 1].isfinite().all()
