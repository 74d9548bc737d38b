"""The portable attention kernel against float64, block by block in the interpreter, with TMA descriptors and with pointers.

float32 and float16: the interpreter holds bfloat16 as raw integers and cannot multiply it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from reference import TOLERANCES, attention_batch, attention_packed, error, lse_error

from para_kernels.triton_kernels.attention import attention_config, attention_forward, uses_tma

TMA, POINTERS = (9, 0), (8, 0)
POISON = float("nan")


@dataclass
class Case:
    """Sizes around the 128-row and 64- or 128-key tiles: inside one, exactly one, one more, several with a tail."""

    q_len: int
    k_len: int
    head_dim: int = 64
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32
    q_lens: list[int] | None = None
    kv_lens: list[int] | None = None
    scale: float | None = None
    layout: str = "BSHD"

    def tensor(self, length: int, heads: int) -> torch.Tensor:
        """Random (B, S, H, D), stored token-major, head-major, or as a third of a fused projection."""
        if self.layout == "BHSD":
            return torch.randn(self.batch, heads, length, self.head_dim, dtype=self.dtype).transpose(1, 2)
        if self.layout == "fused":
            return torch.randn(self.batch, length, 3, heads, self.head_dim, dtype=self.dtype)[:, :, 1]
        return torch.randn(self.batch, length, heads, self.head_dim, dtype=self.dtype)


CASES = {
    "one token": Case(1, 1),
    "inside one tile": Case(37, 53),
    "exactly one tile": Case(128, 128, dtype=torch.float16),
    "one more than a tile": Case(129, 129, dtype=torch.float16),
    "several with a tail": Case(150, 300, dtype=torch.float16, heads=2, kv_heads=2),
    "cross attention": Case(5, 261, dtype=torch.float16),
    "d96 padded": Case(70, 130, head_dim=96, dtype=torch.float16),
    "d128": Case(130, 140, head_dim=128, dtype=torch.float16),
    "d256": Case(66, 70, head_dim=256, dtype=torch.float16),
    "d40 padded": Case(33, 65, head_dim=40),
    "d8 padded": Case(20, 21, head_dim=8, dtype=torch.float16),
    "gqa": Case(40, 70, heads=6, kv_heads=2, dtype=torch.float16),
    "head-major": Case(70, 135, heads=2, kv_heads=2, batch=2, dtype=torch.float16, layout="BHSD"),
    "fused projection": Case(70, 135, heads=2, kv_heads=2, batch=2, dtype=torch.float16, layout="fused"),
    "scale": Case(30, 40, scale=0.3),
    "scale 0": Case(30, 40, scale=0.0, dtype=torch.float16),
    "kv_lens": Case(40, 200, batch=4, kv_lens=[200, 0, 1, 130], dtype=torch.float16),
    "both lens": Case(140, 140, batch=3, heads=2, kv_heads=1, q_lens=[140, 0, 129], kv_lens=[129, 5, 128], dtype=torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("capability", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case: Case, capability: tuple[int, int]) -> None:
    if capability == TMA and not uses_tma(TMA, case.dtype, case.head_dim):
        pytest.skip("no descriptors for this dtype or head dim")
    torch.manual_seed(0)
    q, k, v = (
        case.tensor(case.q_len, case.heads),
        case.tensor(case.k_len, case.kv_heads),
        case.tensor(case.k_len, case.kv_heads),
    )
    for b, kv_len in enumerate(case.kv_lens or []):
        # What lies past the length must not be looked at, NaN included.
        k[b, kv_len:] = POISON
        v[b, kv_len:] = POISON
    q_lens, kv_lens = (None if x is None else torch.tensor(x, dtype=torch.int32) for x in (case.q_lens, case.kv_lens))
    out = torch.full(q.shape, POISON, dtype=q.dtype)
    lse = torch.full((case.batch, case.heads, case.q_len), POISON)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    attention_forward(q, k, v, out, lse, q_lens, kv_lens, scale, capability=capability)
    ref, ref_lse = attention_batch(q, k, v, case.kv_lens, case.q_lens, scale)
    assert error(out, ref) <= TOLERANCES[case.dtype]
    assert lse_error(lse, ref_lse) <= 1e-3 if case.dtype != torch.float32 else lse_error(lse, ref_lse) <= 2e-6


@pytest.mark.parametrize("capability", [TMA, POINTERS], ids=["tma", "pointers"])
def test_packed_matches_float64(capability: tuple[int, int]) -> None:
    torch.manual_seed(1)
    cu_q, cu_k = [0, 130, 130, 131, 171], [0, 7, 140, 140, 401]
    q = torch.randn(171, 4, 64, dtype=torch.float16)
    k, v = (torch.randn(401, 2, 64, dtype=torch.float16) for _ in range(2))
    out, lse = torch.full_like(q, POISON), torch.full((4, 171), POISON)
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k))
    attention_forward(q, k, v, out, lse, starts_q, starts_k, 0.125, packed_max_q=130, capability=capability)
    ref, ref_lse = attention_packed(q, k, v, cu_q, cu_k)
    assert error(out, ref) <= TOLERANCES[torch.float16]
    assert lse_error(lse, ref_lse) <= 1e-3


@pytest.mark.parametrize("capability", [TMA, POINTERS], ids=["tma", "pointers"])
def test_packed_offsets_out_of_range_are_clamped(capability: tuple[int, int]) -> None:
    """Offsets below 0, past the end and falling: nothing outside the tensors is read or written."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(60, 2, 64, dtype=torch.float16) for _ in range(3))
    around = torch.full((180, 2, 64), 7.0, dtype=torch.float16)
    out, lse = around[60:120], torch.zeros(2, 60)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([-9, 20, 15, 1000], [0, 30, 40, 5000]))
    attention_forward(q, k, v, out, lse, cu_q, cu_k, 0.125, packed_max_q=60, capability=capability)
    assert torch.all(around[:60] == 7.0)
    assert torch.all(around[120:] == 7.0)
    ref, _ = attention_packed(q[15:], k[40:], v[40:], [0, 45], [0, 20])
    assert error(out[15:], ref) <= TOLERANCES[torch.float16]


@pytest.mark.parametrize("key", [0, 130], ids=["full block", "tail"])
def test_nan_among_the_keys_comes_out_as_nan(key: int) -> None:
    q, k, v = (torch.randn(1, 131, 1, 64) for _ in range(3))
    k[0, key] = POISON
    out, lse = torch.zeros_like(q), torch.zeros(1, 1, 131)
    attention_forward(q, k, v, out, lse, None, None, 0.125, capability=POINTERS)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_strides_beyond_32_bits() -> None:
    """Two samples 2^31 elements apart: the pages between them are never touched."""
    torch.manual_seed(4)
    stride = 2**31 + 64
    storage = torch.empty(stride + 40 * 64, dtype=torch.float16)
    far = torch.as_strided(storage, (2, 40, 1, 64), (stride, 64, 64, 1))
    far.copy_(torch.randn(2, 40, 1, 64))
    near = torch.randn(2, 40, 1, 64).half()
    out, lse = torch.empty_like(near), torch.empty(2, 1, 40)
    attention_forward(near, near, far, out, lse, None, None, 0.125, capability=POINTERS)
    assert error(out, attention_batch(near, near, far)[0]) <= TOLERANCES[torch.float16]


def test_lengths_out_of_range_are_clamped() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 40, 1, 16) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(2, 1, 40)
    lens = torch.tensor([-5, 1000], dtype=torch.int32)
    attention_forward(q, k, v, out, lse, None, lens, 0.25, capability=POINTERS)
    ref, _ = attention_batch(q, k, v, [0, 40])
    assert error(out, ref) <= TOLERANCES[torch.float32]


def test_config_for_every_allowed_head_dim() -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for head_dim in range(1, 257):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                config = attention_config(capability, head_dim, dtype, uses_tma(capability, dtype, head_dim))
                assert config.block_m >= 16
                assert config.block_n >= 16
