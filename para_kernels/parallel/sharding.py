"""How a sequence is cut over ranks: contiguous pieces in rank order, of equal size or of equal cost.

What is cut is the joint sequence that attention sees, all its streams one after the other. Padding then stands only at
the end of the whole sequence, one `kv_lens` (B,) of the whole sequence describes it on every rank, and nothing has to
divide. Everything here is arithmetic on host integers; no device value is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf

from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """The sizes of the pieces of a sequence, in rank order.

    Args:
        sizes: rows of every rank, each at least 0; at least one rank.

    Raises:
        ValueError: for no ranks, or a size that is not an integer of at least 0.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(not _is_count(size) for size in self.sizes):
            raise ValueError(f"sizes: got {self.sizes!r}, allowed are integers >= 0, one for each rank, at least one")

    @classmethod
    def of(cls, total: int, world: int) -> Shards:
        """`total` rows over `world` ranks: the first `total % world` ranks hold one row more.

        Raises:
            ValueError: for a negative `total` or a `world` below 1.
        """
        if not _is_count(total):
            raise ValueError(f"total: got {total!r}, must be an integer >= 0")
        if not _is_count(world) or world < 1:
            raise ValueError(f"world: got {world!r}, must be an integer >= 1")
        base, longer = divmod(total, world)
        return cls(tuple(base + (rank < longer) for rank in range(world)))

    @classmethod
    def of_equal_cost(cls, streams: Sequence[tuple[int, float]], world: int) -> Shards:
        """As `of`, where a row of one stream costs more than a row of another: pieces that cost the same.

        A cut that would leave only a sixteenth of a piece on one side, of a stream that ends there, is made at the end
        of the stream: a few rows of a stream take a rank as long as many.

        Args:
            streams: in the order of the sequence, of each its rows and what one of them costs.

        Raises:
            ValueError: for a negative number of rows, a cost that is not finite and above 0, or a `world` below 1.
        """
        if any(not _is_count(rows) or not 0 < cost < inf for rows, cost in streams):
            raise ValueError(f"streams: got {list(streams)!r}, must be counts >= 0 with finite costs > 0")
        equal = cls.of(sum(rows for rows, _ in streams), world)
        if len({cost for rows, cost in streams if rows}) < 2:
            return equal
        piece = sum(rows * cost for rows, cost in streams) / world
        cuts = (_rows_of_cost(streams, rank * piece, piece / 16) for rank in range(1, world))
        return cls(tuple(stop - start for start, stop in pairwise([0, *cuts, equal.total])))

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return self.starts[-1] + self.sizes[-1]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each rank's piece starts in the whole sequence."""
        return (0, *accumulate(self.sizes[:-1]))

    def piece(self, rank: int) -> slice:
        """The rows of the whole sequence that `rank` holds."""
        return slice(self.starts[rank], self.starts[rank] + self.sizes[rank])

    def part_of_stream(self, stream_start: int, stream_rows: int, rank: int) -> slice:
        """The rows of a stream that `rank` holds, counted from the start of the stream; it may be empty.

        The stream's `stream_rows` rows stand at `stream_start` ... in the whole sequence.
        """
        self._check_stream(stream_start, stream_rows)
        piece = self.piece(rank)
        start = min(max(piece.start - stream_start, 0), stream_rows)
        return slice(start, min(max(piece.stop - stream_start, start), stream_rows))

    def part_of_piece(self, stream_start: int, stream_rows: int, rank: int) -> slice:
        """The rows of `rank`'s piece that belong to a stream, counted from the start of the piece; it may be empty."""
        part = self.part_of_stream(stream_start, stream_rows, rank)
        start = min(max(stream_start + part.start - self.starts[rank], 0), self.sizes[rank])
        return slice(start, start + part.stop - part.start)

    def stream(self, stream_start: int, stream_rows: int) -> Shards:
        """How one stream of the sequence is cut: its rows on every rank."""
        parts = (self.part_of_stream(stream_start, stream_rows, rank) for rank in range(self.world))
        return Shards(tuple(part.stop - part.start for part in parts))

    def merged(self, count: int) -> Shards:
        """Each `count` neighbouring pieces taken as one: what a ring over groups of `count` ranks sees.

        Raises:
            ValueError: if `count` does not divide the number of ranks.
        """
        if not _is_count(count) or count < 1 or self.world % count:
            raise ValueError(f"count: got {count!r}, must divide the {self.world} ranks")
        return Shards(tuple(sum(self.sizes[rank : rank + count]) for rank in range(0, self.world, count)))

    def shard(self, tensor: Tensor, rank: int, dim: int = 1) -> Tensor:
        """`rank`'s rows of a tensor that holds the whole sequence along `dim`: a view.

        Raises:
            ValueError: if `tensor` has another number of rows.
        """
        if tensor.shape[dim] != self.total:
            raise ValueError(
                f"tensor: got {tuple(tensor.shape)}, must have the sequence's {self.total} rows in dimension {dim}"
            )
        return tensor.narrow(dim, self.starts[rank], self.sizes[rank])

    def local_lens(self, lens: Tensor, rank: int) -> Tensor:
        """How many of each sample's first `lens` (B,) int32 rows of the whole sequence lie in `rank`'s piece."""
        return (lens - self.starts[rank]).clamp_(0, self.sizes[rank])

    def _check_stream(self, stream_start: int, stream_rows: int) -> None:
        if not _is_count(stream_start) or not _is_count(stream_rows) or stream_start + stream_rows > self.total:
            raise ValueError(
                f"stream: got {stream_rows!r} rows from {stream_start!r} on, must lie within {self.total} rows"
            )


def _rows_of_cost(streams: Sequence[tuple[int, float]], cost: float, slack: float) -> int:
    """How many of the first rows cost so much together, or all of a stream that ends within `slack` of it."""
    before = 0
    for rows, each in streams:
        behind = rows * each - cost
        if behind > slack:
            return before + round(cost / each)
        before, cost = before + rows, -behind
        if cost <= slack:
            break
    return before


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
