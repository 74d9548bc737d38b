"""What is particular to the Hopper kernel: when it is taken, how it is sized, and the second pass of rows that overflow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from benchmarks import ring_launches
from para_kernels import flash_attention, flash_attention_varlen
from para_kernels.triton_kernels import (
    hopper_attention,
    hopper_choice,
    hopper_ring_attention,
    hopper_tiles,
    launch,
    tail,
)
from para_kernels.triton_kernels.tail import Cut
from tests.reference import TOLERANCES, attention_batch, error

HALF = (torch.bfloat16, torch.float16)


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(), reason="needs compute capability 9.0")]


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((2, 100, 3, 64), (19200, 192, 64, 1), ((2, 3, 100, 64), (19200, 64, 192, 1))),  # token-major
        ((2, 100, 3, 64), (19200, 64, 6400, 1), ((2, 3, 100, 64), (19200, 6400, 64, 1))),  # head-major
        ((1, 100, 1, 64), (7, 64, 3, 1), ((1, 1, 100, 64), (64, 64, 64, 1))),  # strides of single rows do not matter
        ((2, 100, 3, 64), (19200, 190, 64, 1), None),  # rows at 380 bytes: not a multiple of 16
        ((2, 100, 3, 64), (0, 192, 64, 1), None),  # expanded
    ],
)
def test_descriptors(shape: tuple[int, ...], stride: tuple[int, ...], expected: object) -> None:
    assert hopper_tiles._descriptor(shape, stride) == expected


@pytest.mark.parametrize(
    ("max_q", "keys", "samples", "active"),
    [
        (64, 64, 1, 1), (512, 512, 1, 1), (768, 768, 1, 3), (1024, 1024, 1, 2), (1280, 1280, 1, 2), (2048, 2048, 1, 3),
        (512, 512, 4, 2), (4096, 256, 1, 3), (4096, 4096, 1, 3), (119056, 119056, 1, 3),
    ],
)  # fmt: skip
def test_the_size_chooses_the_rows_of_a_tile(max_q: int, keys: int, samples: int, active: int) -> None:
    """The fastest at 24 heads on 132 multiprocessors, as measured."""
    choice = hopper_choice.choose(128, max_q, keys, 24, samples, 132)
    assert choice.active == active
    assert choice.config.consumers == (1 if active == 1 else 3)


def test_long_sequences_leave_the_order_of_tiles_to_the_hardware() -> None:
    assert hopper_choice.choose(128, 16384, 16384, 24, 1, 132).stays
    assert not hopper_choice.choose(128, 119056, 119056, 24, 1, 132).stays
    assert not hopper_choice.choose(128, 16384, 16384, 24, 4, 132, uneven=True).stays


@pytest.mark.parametrize(
    ("max_q", "keys", "cut"),
    [(2304, 4608, Cut(264, 5)), (1024, 4608, Cut(132, 2)), (2048, 2048, None), (2560, 2560, None), (64, 64, None)],
)
def test_the_last_round_is_cut_where_it_is_far_from_full(max_q: int, keys: int, cut: Cut | None) -> None:
    """On an H200 of 132 multiprocessors 217 us became 178, and 106 became 87; 2,560 tokens took longer in parts."""
    assert hopper_choice.choose(128, max_q, keys, 24, 1, 132).cut == cut


def test_tiles_whose_order_of_ending_is_not_known_are_whole() -> None:
    assert hopper_choice.choose(128, 2304, 4608, 24, 1, 132, whole=True).cut is None
    assert hopper_choice.choose(128, 2304, 4608, 12, 2, 132).cut is not None
    assert hopper_choice.choose(128, 2304, 4608, 12, 2, 132, uneven=True).cut is None


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 200))
def test_a_cut_fills_whole_rounds_first_and_loses_no_tile(tiles: int, blocks: int, processors: int) -> None:
    cut, time = tail.cheapest_cut(tiles, blocks, processors, of_tile=3.0, of_block=1.0)
    whole, time_whole = tail.cheapest_cut(tiles, blocks, processors, of_tile=3.0, of_block=1.0, most=1)
    assert whole == Cut(tiles, 1)
    assert whole.items(tiles) == tiles
    assert whole.parts(tiles) == 0
    assert time <= time_whole
    if cut != whole:
        assert cut.whole == tiles // processors * processors < tiles
        assert 2 <= cut.cuts <= min(tail.MOST_CUTS, blocks)
        assert cut.parts(tiles) == (tiles - cut.whole) * cut.cuts
        assert cut.items(tiles) == cut.whole + cut.parts(tiles)


def test_types_and_head_dims() -> None:
    assert hopper_choice.takes(torch.bfloat16, 128)
    assert hopper_choice.takes(torch.float16, 64)
    assert not hopper_choice.takes(torch.float32, 128)
    assert not hopper_choice.takes(torch.bfloat16, 96)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("active", [1, 2, 3])
    def test_programs_of_many_tiles_of_packed_short_and_empty_samples(
        self, monkeypatch: pytest.MonkeyPatch, active: int
    ) -> None:
        """Some consumers have rows in a tile and some have none, and run ahead: barriers of the tiles must not mix."""
        choice = hopper_choice.Choice(hopper_choice.CONFIGS[64], active, True)
        monkeypatch.setattr(hopper_attention, "choose", lambda *_, **__: choice)
        hopper_attention._plan.cache_clear()
        generator = torch.Generator().manual_seed(active)
        lengths = torch.randint(0, 200, (400,), generator=generator)
        lengths[torch.rand(400, generator=generator) < 0.3] //= 8
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to("cuda", torch.int32)
        total = int(lengths.sum())
        q, k, v = (random(total, 8, 64, dtype=torch.bfloat16) for _ in range(3))
        longest = int(lengths.max())
        out = flash_attention_varlen(q, k, v, starts, starts, longest, longest)
        expected = torch.empty_like(out)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=False):
            rows = slice(start, start + length)
            expected[rows] = flash_attention(q[None, rows].float(), k[None, rows].float(), v[None, rows].float())[0]
        assert error(out, expected) < TOLERANCES[torch.bfloat16]

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("keys", [1, 63, 64, 200])
    def test_scale_of_zero_is_the_mean(self, keys: int, dtype: torch.dtype) -> None:
        """What masks scores is -inf, and 0 * -inf is NaN."""
        q = random(1, 70, 2, 128, dtype=dtype)
        k, v = (random(1, keys, 2, 128, dtype=dtype) for _ in range(2))
        out = flash_attention(q, k, v, scale=0.0)
        assert error(out, v.float().mean(1, keepdim=True).expand(out.shape)) < TOLERANCES[dtype]

    @pytest.mark.parametrize("growth", [10.0, 60.0, 100.0, 300.0])
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("length", [200, 3000])
    def test_scores_far_above_the_first_window(self, growth: float, dtype: torch.dtype, length: int) -> None:
        """A third of the rows meets scores that exceed those of its first window by `growth`."""
        q, k, v = (random(1, length, 2, 128, dtype=torch.float32) for _ in range(3))
        q[:, ::3, :, 0] = 40.0
        k[..., 0] = 0.0
        k[:, 60:100, :, 0] = growth / 40.0 * 128**0.5
        q, k, v = (x.to(dtype) for x in (q, k, v))
        out, lse = flash_attention(q, k, v, return_lse=True)
        expected, expected_lse = attention_batch(q, k, v)
        assert error(out, expected) < TOLERANCES[dtype]
        torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("q_len", [0, 1, 63, 64, 65, 128, 129, 191, 192, 193, 300])
    @pytest.mark.parametrize("keys", [40, 1000])
    def test_rows_past_the_queries_cost_nothing_and_are_zeros(self, q_len: int, keys: int) -> None:
        """Whatever they hold, and also where other rows take the second pass."""
        q, k, v = (random(1, n, 24, 128, dtype=torch.bfloat16) for n in (300, keys, keys))
        q[:, q_len:] = float("nan")
        k[:, : keys // 2] *= 60.0
        lens = torch.tensor([q_len], dtype=torch.int32, device="cuda")
        out, lse = flash_attention(q, k, v, q_lens=lens, return_lse=True)
        assert (out[:, q_len:] == 0).all()
        assert (lse[..., q_len:] == float("-inf")).all()
        if q_len:
            expected, _ = attention_batch(q[:, :q_len], k, v)
            assert error(out[:, :q_len], expected) < TOLERANCES[torch.bfloat16]

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_packed_neighbours_do_not_leak(self, dtype: torch.dtype) -> None:
        """Samples of fewer keys than a tile, beside one that is all NaN."""
        lengths = [5, 70, 1, 63, 64, 127, 170]
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
        q, k, v = (random(sum(lengths), 2, 128, dtype=dtype) for _ in range(3))
        for bad in range(len(lengths)):
            keys, values = k.clone(), v.clone()
            own = slice(int(offsets[bad]), int(offsets[bad + 1]))
            keys[own] = values[own] = float("nan")
            out = flash_attention_varlen(q, keys, values, offsets, offsets, 170, 170)
            assert out[own].isnan().all()
            for i in range(len(lengths)):
                rows = slice(int(offsets[i]), int(offsets[i + 1]))
                if i != bad:
                    expected, _ = attention_batch(q[None, rows], k[None, rows], v[None, rows])
                    assert error(out[None, rows], expected) < TOLERANCES[dtype]

    def test_infinite_values_stay_in_their_columns(self) -> None:
        q, k, v = (random(1, 500, 2, 128, dtype=torch.bfloat16) for _ in range(3))
        expected, _ = attention_batch(q, k, v)
        v[:, 250, :, 7] = float("inf")
        out = flash_attention(q, k, v)
        assert (out[..., 7] == float("inf")).all()
        others = [i for i in range(128) if i != 7]
        assert error(out[..., others], expected[..., others]) < TOLERANCES[torch.bfloat16]

    @pytest.mark.parametrize("length", [100, 777, 2048])
    def test_two_runs_agree_to_the_bit(self, length: int) -> None:
        q, k, v = (random(2, length, 24, 128, dtype=torch.bfloat16) for _ in range(3))
        k[:, ::7] *= 50.0  # some rows take the second pass
        first, second = (flash_attention(q, k, v, return_lse=True) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])

    @pytest.mark.parametrize("cuts", [2, 3, 8])
    @pytest.mark.parametrize("active", [2, 3])
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_tiles_that_are_cut(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, active: int, cuts: int
    ) -> None:
        """Some tiles whole and some in parts, a few of which have no keys; grouped heads, and rows that overflow."""
        q = random(1, 700, 4, 128, dtype=dtype)
        k, v = (random(1, 450, 2, 128, dtype=dtype) for _ in range(2))
        k[:, 250:260] *= 40.0
        choice = hopper_choice.Choice(hopper_choice.CONFIGS[128], active, True)
        tiles = choice.tiles(700, 4, 1)
        for whole in (0, tiles - 3):
            cut = choice._replace(cut=Cut(whole, cuts))
            monkeypatch.setattr(hopper_attention, "choose", lambda *_, cut=cut, **__: cut)
            hopper_attention._plan.cache_clear()
            launch._extension.module.forget_attention_plans()
            for q_len, kv_len in ((700, 450), (700, 100), (650, 0), (3, 449)):
                lens = [torch.tensor([n], dtype=torch.int32, device="cuda") for n in (q_len, kv_len)]
                out, lse = flash_attention(q, k, v, q_lens=lens[0], kv_lens=lens[1], return_lse=True)
                assert (out[:, q_len:] == 0).all()
                assert (lse[..., q_len:] == float("-inf")).all()
                if kv_len == 0:
                    assert (out == 0).all()
                    assert (lse == float("-inf")).all()
                    continue
                expected, expected_lse = attention_batch(q[:, :q_len], k[:, :kv_len], v[:, :kv_len])
                assert error(out[:, :q_len], expected) < TOLERANCES[dtype]
                torch.testing.assert_close(lse[..., :q_len].double(), expected_lse.double(), rtol=1e-4, atol=1e-4)
        hopper_attention._plan.cache_clear()
        launch._extension.module.forget_attention_plans()

    @pytest.mark.parametrize("samples", [1, 2])
    @pytest.mark.parametrize("length", [2304, 3000])
    def test_the_last_round_is_cut_where_that_is_faster(self, length: int, samples: int) -> None:
        q, k, v = (random(samples, length, 24, 128, dtype=torch.bfloat16) for _ in range(3))
        (out, lse), again = (flash_attention(q, k, v, return_lse=True) for _ in range(2))
        expected, expected_lse = attention_batch(q, k, v)
        assert error(out, expected) < TOLERANCES[torch.bfloat16]
        torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-4, atol=1e-4)
        assert torch.equal(out, again[0])

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize(
        ("lengths", "kv_lens"),
        [((190, 1, 0, 70, 450), None), ((190, 1, 0, 70, 450), (200,)), ((300, 500), (0, 777)), ((64, 64), None)],
    )
    def test_tiles_over_pieces_that_are_cut(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        lengths: tuple[int, ...],
        kv_lens: tuple[int, ...] | None,
    ) -> None:
        """Parts that end inside a piece, that have nothing of one, and whose pieces are still on their way."""
        batches = 1 if kv_lens is None else len(kv_lens)
        for active, cuts in ((3, 3), (2, 5)):
            choice = hopper_choice.Choice(hopper_choice.CONFIGS[128], active, True)
            tiles = choice.tiles(lengths[0], 4, batches)
            for whole in (0, tiles - 1):
                cut = choice._replace(cut=Cut(whole, cuts))
                monkeypatch.setattr(hopper_ring_attention, "choose_rows", lambda *_, cut=cut, **__: cut)
                hopper_ring_attention._plan.cache_clear()
                worst = ring_launches.error_of(lengths, 4, 2, 128, kv_lens, dtype, torch.device("cuda"))
                assert worst <= 2 * TOLERANCES[dtype]
        hopper_ring_attention._plan.cache_clear()

    def test_a_graph_of_a_launch_whose_last_round_is_cut(self) -> None:
        q = random(1, 2304, 24, 128, dtype=torch.bfloat16)
        k, v = (random(1, 4608, 24, 128, dtype=torch.bfloat16) for _ in range(2))
        assert hopper_choice.choose(128, 2304, 4608, 24, 1, 132).cut is not None
        expected = flash_attention(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flash_attention(q, k, v)
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected)
