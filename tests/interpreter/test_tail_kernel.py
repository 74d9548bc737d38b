"""The parts of tiles that were cut, put together in the interpreter, against attention over all keys."""

from __future__ import annotations

import pytest
import torch
from reference import attention_batch, error

from para_kernels.triton_kernels.tail import Cut, Tail

ROWS_OF_TILE = 64
POISON = float("nan")


def attended(
    batches: int, rows: int, heads: int, dim: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(batches, rows, heads, dim), torch.randn(batches, keys, heads, dim),
        torch.randn(batches, keys, heads, dim),
    )  # fmt: skip


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize(("whole", "cuts", "keys"), [(0, 2, 90), (5, 3, 100), (11, 8, 20)])
def test_parts_make_up_the_whole(heads_last: bool, whole: int, cuts: int, keys: int) -> None:
    """Rows that do not fill their tile, parts without keys, and tiles that were not cut, which stay as they are."""
    torch.manual_seed(0)
    batches, rows, heads, dim = 2, 100, 3, 64
    q, k, v = attended(batches, rows, heads, dim, keys)
    expected, expected_lse = attention_batch(q, k, v)
    blocks = -(-rows // ROWS_OF_TILE)
    tiles = blocks * batches * heads
    cut = Cut(whole, cuts)
    tail = Tail(cut, cut.parts(tiles), ROWS_OF_TILE, blocks, heads_last)
    out, lse = torch.full((batches, rows, heads, dim), 7.0), torch.full((batches, heads, rows), 7.0)
    scratch = tail.scratch(out).fill_(POISON)
    plane = tail.parts * ROWS_OF_TILE
    of_rows, of_lse = scratch[: plane * dim].view(-1, ROWS_OF_TILE, dim), scratch[plane * dim :].view(-1, ROWS_OF_TILE)
    left = torch.ones(batches, heads, rows, dtype=torch.bool)
    size = -(-keys // cuts) + 3  # the last parts have few keys or none
    for part in range(tail.parts):
        tile, share = whole + part // cuts, part % cuts
        block, rest = tile % blocks, tile // blocks
        head, batch = (rest // batches, rest % batches) if heads_last else (rest % heads, rest // heads)
        own = slice(block * ROWS_OF_TILE, (block + 1) * ROWS_OF_TILE)
        left[batch, head, own] = False
        some = slice(share * size, (share + 1) * size)
        of_lse[part] = float("-inf")
        if share * size < keys:
            x, x_lse = attention_batch(
                *(y[batch : batch + 1, z, head : head + 1] for y, z in ((q, own), (k, some), (v, some)))
            )
            of_rows[part, : x.shape[1]], of_lse[part, : x.shape[1]] = x[0, :, 0].float(), x_lse[0, 0].float()
    tail.merge(scratch, out, lse)
    assert left.sum() == sum(min(ROWS_OF_TILE, rows - tile % blocks * ROWS_OF_TILE) for tile in range(whole))
    assert (out.transpose(1, 2)[left] == 7.0).all()
    assert (lse[left] == 7.0).all()
    assert error(out.transpose(1, 2)[~left], expected.transpose(1, 2)[~left]) < 1e-6
    torch.testing.assert_close(lse[~left].double(), expected_lse.double()[~left], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_without_any_keys_are_zeros_and_what_failed_is_nan(dtype: torch.dtype) -> None:
    cut = Cut(0, 2)
    tail = Tail(cut, cut.parts(2), ROWS_OF_TILE, 2, False)
    out, lse = torch.full((1, 2 * ROWS_OF_TILE, 1, 64), 7.0, dtype=dtype), torch.full((1, 1, 2 * ROWS_OF_TILE), 7.0)
    scratch = tail.scratch(out).fill_(POISON)
    of_lse = scratch[-tail.parts * ROWS_OF_TILE :].view(2, 2, ROWS_OF_TILE)
    of_lse[0] = float("-inf")
    tail.merge(scratch, out, lse)
    assert (out[:, :ROWS_OF_TILE] == 0).all()
    assert (lse[..., :ROWS_OF_TILE] == float("-inf")).all()
    assert out[:, ROWS_OF_TILE:].isnan().all()
    assert lse[..., ROWS_OF_TILE:].isnan().all()


def test_no_parts_no_launch() -> None:
    tail = Tail(Cut(4, 1), Cut(4, 1).parts(4), ROWS_OF_TILE, 2, False)
    out, lse = torch.full((1, 128, 2, 64), 7.0), torch.full((1, 2, 128), 7.0)
    tail.merge(tail.scratch(out), out, lse)
    assert (out == 7.0).all()
