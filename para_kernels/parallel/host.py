"""The transport `host`: pieces travel through pinned host memory that all ranks of a node share.

For GPUs that cannot reach each other's memory. Every rank copies its piece out once; each of the others copies it in.
Pieces go in chunks, each with a flag in shared memory that the copying stream writes and the reading streams wait for
(stream memory operations): out and in overlap, and no processor takes part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels import ops
from para_kernels.parallel.agreement import exchange
from para_kernels.parallel.control import SharedMemory, node
from para_kernels.parallel.device_ring import MAX_CHUNKS, DeviceRing, Place, Shape, unavailable_here

# What a rank takes in begins to arrive one chunk after it began to leave; smaller ones cost more launches.
CHUNK_BYTES = 8 * 2**20
_OUT, _IN = 0, 1  # streams


class HostTransport(DeviceRing):
    """See `device_ring`. One stream copies out, another one in: the two directions of the bus run at a time."""

    name = "host"
    _side_streams = 2
    _chunks = MAX_CHUNKS
    _arena: Tensor
    _shared: SharedMemory | None = None
    _shared_base: int

    def _allocate(self, capacity: int) -> Tensor:
        self._shared = SharedMemory(self.group, 2 * self.world * capacity, "pieces of the ring")
        size, shared = (1 + self.world) * capacity, self._shared

        def allocate() -> Tensor:
            self._shared_base = shared.register(self._library)
            return torch.empty(size, dtype=torch.uint8, device=self.device)

        return self._allocated(allocate)

    def _release(self) -> None:
        if self._shared is not None:
            self._shared.close()
        self._shared = None
        self._arena = torch.empty(0, dtype=torch.uint8)

    @property
    def memory_bytes(self) -> int:
        """On this rank's device, and this rank's share of the host's memory."""
        shared = 0 if self._shared is None else self._shared.size
        return (1 + self.world) * self._capacity + shared // self.world

    def _steps(self, place: Place, slot: int, base: int, flags: Tensor) -> tuple[list[Any], int]:
        assert ops._C is not None
        step = ops._C.StreamStep
        shape, control, size = place.shape, self._control, _chunk_bytes(place.shape)
        steps = [step.wait(stream, control.ready(self.rank)) for stream in (_OUT, _IN)]
        for chunk, (start, count) in enumerate(_chunks(shape, self.rank, size)):
            target = self._address(slot, self.rank) + start
            steps.append(step.copy(_OUT, target, base + place.offset(slot) + start, count))
            steps.append(step.write(_OUT, control.chunk(self.rank, chunk)))
        of = {owner: _by_group(shape, owner, size) for owner in self._peers()}
        for group in range(len(shape.groups())):
            for t, owner in enumerate(self._peers(), 1):
                for chunk, (start, count) in of[owner][group]:
                    steps.append(step.wait(_IN, control.chunk(owner, chunk)))
                    target = base + place.offset(1 + t) + start
                    steps.append(step.copy(_IN, target, self._address(slot, owner) + start, count))
                if of[owner][group]:
                    steps.append(step.write(_IN, flags.data_ptr() + 4 * (t * flags.stride(0) + group)))
        steps.append(step.write(_IN, control.credit(self.rank)))
        return steps, 0

    def _address(self, slot: int, owner: int) -> int:
        """Of a rank's piece in the shared memory."""
        return self._shared_base + (slot * self.world + owner) * self._capacity


def _chunk_bytes(shape: Shape) -> int:
    """Large enough that a piece has no more chunks than there are flags: a group has at most one that is not full."""
    return max(CHUNK_BYTES, -(-shape.largest_piece // (MAX_CHUNKS - shape.heads)))


def _by_group(shape: Shape, owner: int, size: int) -> list[list[tuple[int, tuple[int, int]]]]:
    """For each group of heads its chunks: (number, (first byte, bytes))."""
    head, number, groups = shape.head_bytes(owner), 0, []
    for first, count in shape.groups():
        stop = (first + count) * head
        chunks = [(start, min(size, stop - start)) for start in range(first * head, stop, size)]
        groups.append(list(enumerate(chunks, number)))
        number += len(chunks)
    return groups


def _chunks(shape: Shape, owner: int, size: int) -> list[tuple[int, int]]:
    return [chunk for group in _by_group(shape, owner, size) for _, chunk in group]


def unavailable(group: ProcessGroup, device: torch.device) -> str | None:
    """Why this rank cannot use the transport, None if it can; collective. All ranks have to be on one node."""
    obstacle = unavailable_here(group, device)
    nodes = exchange(group, node(), "nodes of the ranks")
    if obstacle is None and len(set(nodes)) > 1:
        obstacle = "the ranks are on several nodes"
    return obstacle
