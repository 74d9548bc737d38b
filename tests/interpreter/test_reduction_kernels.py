"""residual_diff and merge_states in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from para_kernels.triton_kernels.merge_states import merge_states_forward
from para_kernels.triton_kernels.residual_diff import residual_diff_forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7,), (3, 5), (2, 37, 96), (1, 50, 3000), (2, 2, 3, 40)], ids=lambda shape: "x".join(map(str, shape))
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_residual_diff(shape: tuple[int, ...], dtype: torch.dtype, first: bool) -> None:
    torch.manual_seed(0)
    hidden_in, hidden_out, previous = (torch.randn(shape).to(dtype) for _ in range(3))
    residual, sums = residual_diff_forward(hidden_in, hidden_out, None if first else previous)
    # The interpreter truncates to bfloat16 where the hardware rounds: within one unit in the last place there.
    ulp = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(residual, hidden_out - hidden_in, rtol=ulp, atol=0)
    before, after = previous.double(), residual.double()
    wanted = torch.zeros(2) if first else torch.stack([(before - after).abs().sum(), before.abs().sum()])
    torch.testing.assert_close(sums.double(), wanted.double(), rtol=1e-6, atol=0)


def test_residual_diff_reads_strided_rows_in_place() -> None:
    torch.manual_seed(1)
    wide_in, wide_out = torch.randn(2, 21, 48), torch.randn(2, 21, 64)
    hidden_in, hidden_out = wide_in[:, ::2], wide_out[:, ::2, 8:56]
    previous = torch.randn(2, 11, 48)
    residual, sums = residual_diff_forward(hidden_in, hidden_out, previous)
    assert torch.equal(residual, hidden_out - hidden_in)
    assert residual.is_contiguous()
    wanted = torch.stack([(previous - residual).double().abs().sum(), previous.double().abs().sum()])
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-6, atol=0)


def test_residual_diff_of_nothing() -> None:
    residual, sums = residual_diff_forward(torch.empty(1, 0, 8), torch.empty(1, 0, 8), torch.empty(1, 0, 8))
    assert residual.shape == (1, 0, 8)
    assert sums.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 70, 3, 40), (75, 2, 64)], ids=lambda shape: "x".join(map(str, shape))
)
def test_merge_states(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    out_a, out_b = (torch.randn(shape).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(*shape[:-3], shape[-2], shape[-3]) * 5 for _ in range(2))
    lse_a[..., 0] = float("-inf")
    lse_b[..., -1] = float("-inf")
    expected_a, expected_b = out_a.clone(), out_b.clone()
    # A state without keys may hold anything.
    out_a[lse_a.transpose(-1, -2) == float("-inf")] = float("nan")
    out_b[lse_b.transpose(-1, -2) == float("-inf")] = float("nan")
    out, lse = merge_states_forward(out_a, lse_a, out_b, lse_b)
    merged = torch.logaddexp(lse_a.double(), lse_b.double())
    anchor = torch.where(torch.isinf(merged), 0, merged)
    weights = [torch.exp(x.double() - anchor).transpose(-1, -2)[..., None] for x in (lse_a, lse_b)]
    expected = expected_a.double() * weights[0] + expected_b.double() * weights[1]
    torch.testing.assert_close(lse.double(), merged, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), expected.to(dtype).double(), rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
