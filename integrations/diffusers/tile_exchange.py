"""Tiles of one call, computed by all ranks and handed out on every rank in the order in which they are blended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from para_kernels.parallel.waiting import wait_for_collective

# A round is this many tiles per rank. Two rounds are under way at a time: while one is handed out, the next one is
# computed. More would balance no better: 308 tiles of a 720p video on 8 ranks keep them busy for 99.4 % of the time.
TILES_PER_ROUND = 2


@dataclass(frozen=True)
class Tile:
    """One tile, or a piece of one that cannot be made before the pieces before it.

    Attributes:
        source: what it is made of.
        shape: of what is made of it.
        begins: whether it is the first piece of a tile, or all of it.
        options: the keyword arguments that it is made with, as diffusers gave them: a memory among them has no data.
    """

    source: Tensor
    shape: tuple[int, ...]
    begins: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        """Work, up to a factor: convolutions cost by the element, and attention within a tile costs little."""
        return self.source.numel()


def assign(costs: Sequence[int], world: int) -> list[int]:
    """The index of the rank that computes each tile.

    Round by round, the longest first, each to the rank with the least work so far (Graham, Bounds on multiprocessing
    timing anomalies, 1969): loads never differ by more than one tile, neither at the end nor, which bounds the memory
    for tiles that wait, on the way there.
    """
    loads, owners = [0] * world, [0] * len(costs)
    for tiles in rounds(len(costs), world):
        for tile in sorted(tiles, key=lambda tile: -costs[tile]):
            owners[tile] = min(range(world), key=loads.__getitem__)
            loads[owners[tile]] += costs[tile]
    return owners


def rounds(count: int, world: int) -> list[range]:
    """Tiles by rounds, in the order in which they are handed out."""
    size = TILES_PER_ROUND * world
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def wholes(pieces: Sequence[Tile]) -> list[range]:
    """The pieces of each tile."""
    starts = [index for index, piece in enumerate(pieces) if piece.begins]
    return [range(*ends) for ends in pairwise([*starts, len(pieces)])]


class TileExchange:
    """Computes this rank's tiles, sends each to all others from where it was made, and hands them out in order.

    The tiles of a round are broadcast after the rank has queued its own of that round, and travel while it computes
    those of the next one. So communication hides behind work, and no more than two rounds of tiles are in memory.

    Tiles that are in pieces are shared out as tiles: the rank that makes the first piece makes all of them.

    Args:
        tiles: of the whole call, the same ones on every rank, in pieces.
        compute: makes a piece, with what the piece before it has left, None for a first one; and what it leaves.
        dtype: of what it makes.
        group: the ranks.
        what: such as "decode", for messages.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        compute: Callable[[Tile, Any], tuple[Tensor, Any]],
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        what: str,
    ) -> None:
        self.tiles = tiles
        self._compute = compute
        self._dtype = dtype
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._what = what
        self._wholes = wholes(tiles)
        self._owners = assign([sum(tiles[index].cost for index in whole) for whole in self._wholes], group.size())
        self._rounds = rounds(len(self._wholes), group.size())
        self._whole_of = [number for number, whole in enumerate(self._wholes) for _ in whole]
        self._launched = 0
        self._taken = 0
        self._made: dict[int, tuple[Tensor, Any]] = {}
        self._stopwatch = Stopwatch(tiles[0].source.device)

    @property
    def done(self) -> bool:
        """Whether every tile has been handed out."""
        return self._taken == len(self.tiles)

    @property
    def own(self) -> int:
        """How many tiles this rank computes."""
        return self._owners.count(self._group.rank())

    def seconds(self) -> float:
        """Time that this rank's device spent on its tiles. To be asked once all tiles are handed out."""
        return self._stopwatch.seconds()

    def take(self, source: Tensor) -> Tensor:
        """The next tile, which must be the one made of `source`. The caller may write into it.

        Raises:
            RankFailure: another rank failed, died, or sent nothing in time.
            RuntimeError: the tiles are asked for in another order than they were recorded in.
        """
        index = self._taken
        if self.done or source.shape != self.tiles[index].source.shape:
            raise RuntimeError(f"{self._what}: diffusers asks for other tiles the second time; please report this")
        whole = self._whole_of[index]
        ahead = whole // (TILES_PER_ROUND * self._group.size()) + 2
        while self._launched < min(ahead, len(self._rounds)):
            self._launch(self._rounds[self._launched])
            self._launched += 1
        made, transfer = self._made.pop(index)
        if transfer is not None:
            owner = self._owners[whole]
            name = f"tile {whole} of {len(self._wholes)} of this {self._what}, which rank {self._ranks[owner]} makes"
            wait_for_collective(transfer, self._group, name, owner)
        self._taken += 1
        return made

    def _launch(self, numbers: range) -> None:
        own = {}
        for number in numbers:
            if self._owners[number] == self._group.rank():
                own |= self._run(self._wholes[number])
        for number in numbers:
            for index in self._wholes[number]:
                tile = self.tiles[index]
                made = own.pop(index, None)
                if made is None:
                    made = torch.empty(tile.shape, dtype=self._dtype, device=tile.source.device)
                self._made[index] = made, self._broadcast(made, self._owners[number])

    def _run(self, pieces: range) -> dict[int, Tensor]:
        """One tile, piece by piece."""
        made, left = {}, None
        for index in pieces:
            with self._stopwatch:
                piece, left = self._compute(self.tiles[index], left)
                made[index] = self._checked(self.tiles[index], piece.contiguous())
        return made

    def _checked(self, tile: Tile, made: Tensor) -> Tensor:
        if made.shape != tile.shape or made.dtype != self._dtype:
            raise RuntimeError(
                f"{self._what}: the tile of {tuple(tile.source.shape)} came out as {tuple(made.shape)} in {made.dtype},"
                f" expected {tile.shape} in {self._dtype}; please report this"
            )
        return made

    def _broadcast(self, made: Tensor, owner: int) -> Any:
        if self._group.size() == 1:
            return None
        return dist.broadcast(made, src=self._ranks[owner], group=self._group, async_op=True)


class Stopwatch:
    """Adds up the time of what runs inside it, on the device if that is a GPU, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._laps: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *exception: object) -> None:
        self._laps.append((self._start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> float:
        """The sum of all laps."""
        if not self._cuda:
            return sum(stop - start for start, stop in self._laps)
        if self._laps:
            self._laps[-1][1].synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._laps) / 1e3
