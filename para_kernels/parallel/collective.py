"""Communication by torch.distributed: the ring everywhere, the exchange of heads for rows, gathering of uneven rows.

NCCL between GPUs, gloo between CPU processes. Nothing is read from a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels.attention import flash_attention
from para_kernels.parallel.failure import global_rank, named, other_ranks
from para_kernels.parallel.parts import Parts
from para_kernels.parallel.progress import watch_progress
from para_kernels.parallel.sharding import Shards
from para_kernels.parallel.waiting import stream_ordered, wait
from para_kernels.sources import Source

# --- the ring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """The bytes of one rank, there once what is received has come."""

    owner: int
    memory: Tensor
    receiving: Sequence[dist.Work]


class CollectiveTransport:
    """Ring attention by sends and receives of torch.distributed; the next piece travels while one is attended.

    Every rank takes its own piece first, then those of the ranks after it, each straight from its owner: what a rank
    sends is always its own piece, and nothing is passed on. Two receive buffers, whatever the number of ranks. Parts
    are summed up in float32.
    """

    name = "collective"

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.world = group.rank(), group.size()
        if device.type == "cuda" and self.world > 1:
            # NCCL wants all ranks in the first call of a group, and later a rank without rows may have nothing to send.
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def close(self) -> None:
        """Nothing outlives a call."""

    def ring(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lengths: Sequence[int],
        kv_lens: Tensor | None,
        q_lens: Tensor | None,
        scale: float | None,
        out: Tensor | None = None,
        source: Source | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Transport.ring`, in memory of its own."""
        if source is not None:
            q, k, v = source.prepared()
        shards = Shards(tuple(lengths))
        own_q_lens = None if q_lens is None else shards.local_lens(q_lens, self.rank)
        parts = Parts(q, shards)
        batch, _, heads, dim = k.shape

        def kv_of(owner: int, memory: Tensor) -> Tensor:
            return memory.view(k.dtype).view(2, batch, shards.sizes[owner], heads, dim)

        def put(memory: Tensor) -> None:
            torch.stack((k, v), out=kv_of(self.rank, memory))

        def use(owner: int, memory: Tensor) -> None:
            keys, values = kv_of(owner, memory)
            lens = None if kv_lens is None else shards.local_lens(kv_lens, owner)
            how = {"kv_lens": lens, "q_lens": own_q_lens}
            parts.add(lambda: flash_attention(q, keys, values, scale=scale, return_lse=True, **how))

        self.circulate([2 * batch * rows * heads * dim * k.itemsize for rows in lengths], put, use)
        return parts.result()

    def circulate(
        self, sizes: Sequence[int], fill: Callable[[Tensor], None], use: Callable[[int, Tensor], None]
    ) -> None:
        """As `Transport.circulate`."""
        own = torch.empty(sizes[self.rank], dtype=torch.uint8, device=self.device)
        if own.numel():
            fill(own)
        buffers = [own.new_empty(max(sizes)) for _ in range(min(2, self.world - 1))]
        sending: list[tuple[int, dist.Work]] = []
        arriving = self._post(1, own, buffers[0], sizes, sending) if buffers else None
        if own.numel():
            use(self.rank, own)
        for step in range(1, self.world):
            piece = arriving
            assert piece is not None
            self._await(piece)
            if step + 1 < self.world:
                # Into the buffer whose piece has been used up; on CUDA the transfer starts after that use.
                arriving = self._post(step + 1, own, buffers[step % 2], sizes, sending)
            if piece.memory.numel():
                use(piece.owner, piece.memory)
        for to, work in sending:
            wait(work, self.group, f"rank {global_rank(self.group, to)} to take its K and V", own.device, [to])

    def _post(
        self, step: int, own: Tensor, buffer: Tensor, sizes: Sequence[int], sending: list[tuple[int, dist.Work]]
    ) -> _Piece:
        """Start to receive from the rank `step` places after this one, and to send to the one as far before it."""
        owner, to = (self.rank + step) % self.world, (self.rank - step) % self.world
        memory = buffer[: sizes[owner]]
        transfers = []
        if memory.numel():
            transfers.append(dist.P2POp(dist.irecv, memory, group=self.group, group_peer=owner))
        if own.numel():
            transfers.append(dist.P2POp(dist.isend, own, group=self.group, group_peer=to))
        works = dist.batch_isend_irecv(transfers) if transfers else []
        if len(works) == len(transfers) and own.numel() and works:
            *receiving, send = works
            sending.append((to, send))
            return _Piece(owner, memory, receiving)
        # NCCL gives one handle for both directions.
        return _Piece(owner, memory, works)

    def _await(self, piece: _Piece) -> None:
        what = f"K and V of rank {global_rank(self.group, piece.owner)}"
        for work in piece.receiving:
            wait(work, self.group, what, piece.memory.device, [piece.owner])
        if piece.memory.is_cuda:
            watch_progress(self.group, what)


# --- other collectives ------------------------------------------------------------------------------------------------


# Its name from torch 2.13 on, which warns of the other.
_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_rows(local: Tensor, shards: Shards, group: ProcessGroup, *, dim: int = 1, what: str = "rows") -> Tensor:
    """The whole sequence from every rank's rows: uneven pieces, also empty ones, by one collective.

    Args:
        local: this rank's rows along `dim`.
        shards: rows of every rank of `group`.
        what: what is gathered, for messages.

    Returns:
        A tensor like `local` with `shards.total` rows along `dim`, contiguous, the same on every rank.

    Raises:
        ValueError: if `local` has not the rows that `shards` says.
        RankFailure: if a rank does not come.
    """
    rows = shards.sizes[group.rank()]
    if shards.world != group.size() or local.shape[dim] != rows:
        raise ValueError(
            f"local: got {local.shape[dim]} rows in dimension {dim} of {tuple(local.shape)},"
            f" must be {rows} of {shards.world} ranks"
        )
    if shards.world == 1 or shards.total == 0:
        return local.contiguous()
    moved = local.movedim(dim, 0)
    longest = max(shards.sizes)
    padded = moved.new_empty((longest, *moved.shape[1:]))
    padded[:rows] = moved
    pieces = moved.new_empty((shards.world * longest, *moved.shape[1:]))
    await_collective(_all_gather(pieces, padded, group=group, async_op=True), group, what, local.device)
    parts = [pieces[rank * longest : rank * longest + size] for rank, size in enumerate(shards.sizes)]
    return torch.cat(parts).movedim(0, dim).contiguous()


def sum_over_ranks(local: Tensor, group: ProcessGroup, *, what: str = "sums") -> Tensor:
    """`local` summed over the ranks of `group`, in place and still on its device: one collective.

    Raises:
        RankFailure: if a rank does not come.
    """
    if group.size() > 1:
        await_collective(dist.all_reduce(local, group=group, async_op=True), group, what, local.device)
    return local


def broadcast(tensor: Tensor, group: ProcessGroup, *, source: int = 0, what: str = "values") -> Tensor:
    """`tensor` of rank `source` of `group` on all its ranks, in place.

    Raises:
        RankFailure: if a rank does not come.
    """
    if group.size() > 1:
        await_collective(
            dist.broadcast(tensor, group=group, group_src=source, async_op=True), group, what, tensor.device
        )
    return tensor


def all_to_all(local: Tensor, sends: Sequence[int], receives: Sequence[int], group: ProcessGroup, what: str) -> Tensor:
    """Exchange the parts of a flat tensor: `sends[r]` elements go to rank r, `receives[r]` come from it, in order.

    Raises:
        RankFailure: if a rank does not come.
    """
    received = local.new_empty(sum(receives))
    work = dist.all_to_all_single(received, local, list(receives), list(sends), group=group, async_op=True)
    await_collective(work, group, what, local.device)
    return received


def await_collective(work: dist.Work | None, group: ProcessGroup, what: str, device: torch.device) -> None:
    """Wait as `waiting.wait` does, for what all ranks of `group` take part in."""
    what = f"{what} of {named(other_ranks(group))}"
    wait(work, group, what, device)
    if stream_ordered(group, device):
        watch_progress(group, what)
