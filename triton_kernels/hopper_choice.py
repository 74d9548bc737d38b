"""Which variant of a Hopper kernel takes a problem, and how the problem is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .tail import MOST_CUTS, Cut, Tail, cheapest_cut

# Rows of one consumer's queries, and of a block of keys or values.
ROWS = 64
KEYS = 64
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HopperConfig:
    """One compiled variant.

    Attributes:
        consumers: warpgroups of 64 query rows each.
        stages: slots of the ring of keys and values.
        query_stages: slots of the ring of queries. With two, the next tile's loads are under way while this one ends.
        residents: programs that share a multiprocessor.
        max_registers: registers per thread at launch; None: what fits one program.
    """

    consumers: int
    stages: int
    query_stages: int
    residents: int
    max_registers: int | None


# By head dim. Three consumers fill a multiprocessor. Of one consumer's programs two share one: fewer rows at a time,
# but the start and the end of one run beside the other.
CONFIGS = {64: HopperConfig(3, 8, 2, 1, None), 128: HopperConfig(3, 4, 2, 1, None)}
SMALL_CONFIGS = {64: HopperConfig(1, 4, 1, 2, 104), 128: HopperConfig(1, 3, 1, 2, 104)}


class Choice(NamedTuple):
    """How a problem is cut: the variant, the consumers that compute (rows of a tile / 64), and whether a program takes
    tile after tile or each tile is a program's; and how the last tiles are cut, None where they are not."""

    config: HopperConfig
    active: int
    stays: bool
    cut: Cut | None = None

    def tiles(self, max_q: int, heads: int, samples: int) -> int:
        return -(-max_q // (self.active * ROWS)) * heads * samples

    def work(self, max_q: int, heads: int, samples: int, processors: int, *, heads_last: bool) -> Work:
        tiles = self.tiles(max_q, heads, samples)
        cut = self.cut or Cut(tiles, 1)
        items = cut.items(tiles)
        programs = min(items, processors * self.config.residents) if self.stays else items
        blocks = -(-max_q // (self.active * ROWS))
        tail = Tail(cut, cut.parts(tiles), self.active * ROWS, blocks, heads_last)
        return Work(programs, items, (blocks, items, *cut, self.active), tail)


class Work(NamedTuple):
    """What is launched for a choice.

    Attributes:
        programs: of the launch.
        items: tiles, and parts of tiles.
        integers: what the kernel is told of it: blocks of queries, items, whole tiles, parts of a cut one, and the
            consumers that compute.
        tail: what comes behind it.
    """

    programs: int
    items: int
    integers: tuple[int, int, int, int, int]
    tail: Tail


# From so many blocks of keys on, what a tile's start and end cost is less than what the hardware gains by giving a free
# multiprocessor the next tile: 221.7 against 225.8 ms at 119,056 tokens, but 4.105 against 4.081 ms at 16,384 (H100;
# one run of a script that is not kept).
_BLOCKS_OF_A_PROGRAM = 512


class _Problem(NamedTuple):
    """What the choice depends on."""

    head_dim: int
    max_q: int
    keys: int
    heads: int
    samples: int
    processors: int

    @property
    def blocks(self) -> int:
        return -(-self.keys // KEYS)

    def cut(self, choice: Choice, of_tile: float, of_block: float, whole: bool, pieces: int) -> tuple[Choice, float]:
        """The choice with its tiles cut in the best way, and the microseconds of its rounds; `whole`: cut none."""
        tiles = choice.tiles(self.max_q, self.heads, self.samples)
        cut, time = cheapest_cut(
            tiles, self.blocks, self.processors, of_tile=of_tile, of_block=of_block,
            most=1 if whole else MOST_CUTS, pieces=pieces,
        )  # fmt: skip
        return choice._replace(cut=None if cut.cuts == 1 else cut), time


def _microseconds_of_rows(problem: _Problem, uneven: bool, whole: bool, pieces: int = 1) -> dict[Choice, float]:
    """What the variant of three consumers should take with tiles of 192 and of 128 rows."""
    large = CONFIGS[problem.head_dim]
    stays = problem.blocks <= _BLOCKS_OF_A_PROGRAM and not uneven
    whole = whole or uneven  # Which tiles end last is not known.
    rows_192, time_192 = problem.cut(Choice(large, 3, stays), 3.3, 0.9, whole, pieces)
    rows_128, time_128 = problem.cut(Choice(large, 2, stays), 2.7, 0.68, whole, pieces)
    return {rows_192: 4.0 + time_192, rows_128: 3.5 + time_128}


def _fastest(microseconds: dict[Choice, float]) -> Choice:
    return min(microseconds, key=microseconds.__getitem__)


def choose_rows(*problem: int, uneven: bool, pieces: int) -> Choice:
    """As `choose`, among the tiles of the variant of three consumers alone, for keys in pieces."""
    return _fastest(_microseconds_of_rows(_Problem(*problem), uneven, False, pieces))


def choose(*problem: int, uneven: bool = False, whole: bool = False) -> Choice:
    """The choice that should take the fewest microseconds: a start, then rounds of a tile's cost and its blocks'.

    `problem`: the fields of `_Problem`. Samples of `uneven` lengths make tiles that take more and less time: there, as
    for long sequences, the hardware hands out the tiles. `whole`: no tile may be cut.

    The constants give the fastest choice, or one within 2 %, at each of the shapes of
    `python -m benchmarks.gpu_tune --only hopper` (H100, D = 128, 24 heads).
    """
    of = _Problem(*problem)
    rows_64 = Choice(SMALL_CONFIGS[of.head_dim], 1, False)
    # Two of the small programs share a multiprocessor; one alone is faster than one of two.
    rounds = -(-rows_64.tiles(of.max_q, of.heads, of.samples) // of.processors)
    shared, alone = divmod(rounds, 2)
    small = {rows_64: 1.0 + (shared + 0.8 * alone) * (4.2 + 0.78 * of.blocks)}
    return _fastest(_microseconds_of_rows(of, uneven, whole) | small)


class _CudnnRow(NamedTuple):
    """Where cuDNN is faster: from, not including, to. `rounds` are tiles of 128 rows over multiprocessors."""

    keys: tuple[int, int]
    rounds: tuple[float, float]


# With few keys a tile's start and end outweigh its blocks. The first row is four samples of 512 tokens: 33.2 us and
# 31.0 by cuDNN on an H100, 30.9 and 29.9 on an H200 (gpu-small.json); earlier runs there had them even. Of the second
# row, on an H200: 4,096 queries on 128 keys 27.2 us and 24.1, 8,192 queries 47.6 and 41.1; with 256 keys and four
# samples it is the other way round. 24 heads of 128, inputs out of the L2: benchmarks/results/gpu-tune_cudnn.json.
_CUDNN = (
    _CudnnRow(keys=(448, 512), rounds=(2.8, 3.0)),
    _CudnnRow(keys=(64, 128), rounds=(5.0, float("inf"))),
)


def is_cudnn_faster(head_dim: int, max_q: int, keys: int, heads: int, samples: int, processors: int) -> bool:
    """Whether cuDNN takes less time than the best choice, for samples of one length."""
    rounds = Choice(CONFIGS[head_dim], 2, True).tiles(max_q, heads, samples) / processors
    return head_dim == 128 and any(
        row.keys[0] < keys <= row.keys[1] and row.rounds[0] < rounds <= row.rounds[1] for row in _CUDNN
    )


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel exists for this type and head dim."""
    return dtype in _DTYPES and head_dim in CONFIGS
