"""The ring's portable kernel against float64 in the interpreter, with TMA descriptors and with pointers; all flags set.

float32 and float16: the interpreter holds bfloat16 as raw integers and cannot multiply it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from reference import TOLERANCES, attention_batch, error, lse_error

from para_kernels.triton_kernels.attention import uses_tma
from para_kernels.triton_kernels.ring_attention import Pieces, pack_piece, ring_attention_forward

TMA, POINTERS = (9, 0), (8, 0)
POISON = float("nan")


@dataclass
class Case:
    """`lengths` in rank order; tiles have 128 rows and 64 or 128 keys."""

    lengths: list[int]
    head_dim: int = 64
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float16
    q_lens: list[int] | None = None
    kv_lens: list[int] | None = None
    scale: float | None = None
    heads_per_flag: int = 1
    fused: bool = False

    def tensor(self, length: int, heads: int) -> torch.Tensor:
        if self.fused:
            return torch.randn(self.batch, length, 3, heads, self.head_dim, dtype=self.dtype)[:, :, 1]
        return torch.randn(self.batch, length, heads, self.head_dim, dtype=self.dtype)


CASES = {
    "one piece": Case([70]),
    "two, with tails": Case([130, 129], heads=2, kv_heads=2),
    "three, float32": Case([17, 33, 5], head_dim=40, heads=2, kv_heads=2, dtype=torch.float32),
    "an empty piece": Case([40, 0, 70]),
    "no rows on this rank": Case([40, 0], heads=2, kv_heads=2),
    "d128": Case([66, 130], head_dim=128),
    "d96 padded": Case([30, 31], head_dim=96),
    "gqa, groups of heads": Case([40, 30], heads=6, kv_heads=3, batch=2, heads_per_flag=2),
    "kv_lens": Case([50, 70, 40], batch=5, kv_lens=[160, 0, 30, 50, 121]),
    "both lens": Case([50, 70], batch=3, heads=2, kv_heads=1, q_lens=[120, 30, 0], kv_lens=[55, 120, 7], fused=True),
    "scale": Case([20, 30], scale=0.3),
    "fused projection, float32": Case([20, 30], heads=2, kv_heads=2, dtype=torch.float32, fused=True),
}  # fmt: skip


def stored(case: Case, rank: int, keys: list[torch.Tensor], values: list[torch.Tensor], epoch: int) -> Pieces:
    """The pieces as they lie in `rank`'s memory, in its order of consumption, with NaN around and after them."""
    order = [(rank + step) % len(case.lengths) for step in range(len(case.lengths))]
    starts = [sum(case.lengths[:p]) for p in range(len(case.lengths))]
    rows, table = 7, []
    for p in order:
        table.append((rows, starts[p], case.lengths[p]))
        rows += 2 * case.kv_heads * case.batch * case.lengths[p] + 3
    memory = torch.full((rows + 200, case.head_dim), POISON, dtype=case.dtype)
    for p, (first_row, _, _) in zip(order, table, strict=True):
        pack_piece(keys[p], values[p], memory, first_row)
    groups = -(-case.kv_heads // case.heads_per_flag)
    flags = torch.full((len(order), groups), epoch, dtype=torch.int32)
    flags[0] = 0  # the own piece is not waited for
    error_words = torch.zeros(4, dtype=torch.int32)
    table_of_pieces = torch.tensor(table, dtype=torch.int32)
    return Pieces(memory, table_of_pieces, flags, case.heads_per_flag, epoch, error_words, 1e-5)


def run(case: Case, rank: int, capability: tuple[int, int], epoch: int = 3, late: tuple[int, int] | None = None):
    torch.manual_seed(0)
    queries = [case.tensor(length, case.heads) for length in case.lengths]
    keys = [case.tensor(length, case.kv_heads) for length in case.lengths]
    values = [case.tensor(length, case.kv_heads) for length in case.lengths]
    pieces = stored(case, rank, keys, values, epoch)
    if late is not None:
        pieces.flags[late] = epoch - 1
    q = queries[rank]
    out = torch.full(q.shape, POISON, dtype=case.dtype)
    lse = torch.full((case.batch, case.heads, q.shape[1]), POISON)
    q_lens, kv_lens = (None if x is None else torch.tensor(x, dtype=torch.int32) for x in (case.q_lens, case.kv_lens))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    start = sum(case.lengths[:rank])
    ring_attention_forward(
        q, pieces, out, lse, q_lens, kv_lens, scale, kv_heads=case.kv_heads, own_start=start, capability=capability
    )
    whole = attention_batch(
        torch.cat(queries, 1), torch.cat(keys, 1), torch.cat(values, 1), case.kv_lens, case.q_lens, case.scale
    )
    rows = slice(start, start + case.lengths[rank])
    return out, lse, whole[0][:, rows], whole[1][:, :, rows], pieces


@pytest.mark.parametrize("capability", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case: Case, capability: tuple[int, int]) -> None:
    if capability == TMA and not uses_tma(TMA, case.dtype, case.head_dim):
        pytest.skip("no descriptors for this dtype or head dim")
    for rank in range(len(case.lengths)):
        out, lse, expected, expected_lse, pieces = run(case, rank, capability)
        assert error(out, expected) <= TOLERANCES[case.dtype]
        assert lse_error(lse, expected_lse) <= 1e-2 if case.dtype == torch.float16 else 1e-5
        assert not pieces.error.any()


@pytest.mark.filterwarnings("ignore:overflow")
def test_epochs_count_modulo_two_to_the_32() -> None:
    case = CASES["two, with tails"]
    out, _, expected, _, pieces = run(case, 1, POINTERS, epoch=-(2**31) + 500)
    assert error(out, expected) <= TOLERANCES[case.dtype]
    assert not pieces.error.any()


def test_a_piece_that_does_not_come_gives_nan_and_an_error() -> None:
    """Head 1 of the other piece is late: its rows are NaN, those of head 0 are right, and the error says what."""
    case = CASES["two, with tails"]
    out, lse, expected, _, pieces = run(case, 0, POINTERS, epoch=9, late=(1, 1))
    assert error(out[:, :, 0], expected[:, :, 0]) <= TOLERANCES[case.dtype]
    assert out[:, :, 1].isnan().all()
    assert lse[:, 1].isnan().all()
    assert pieces.error.tolist() == [2, 9, 8, 1]
