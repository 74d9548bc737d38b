"""The transport `peer`: copy engines take pieces straight out of the other GPUs' memory.

Each rank's slots lie in symmetric memory (torch.distributed._symmetric_memory), which its peers map. A piece is taken
from its owner at once; nothing is passed on from rank to rank. NVLink multicast is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels import ops
from para_kernels.parallel.control import node
from para_kernels.parallel.device_ring import DeviceRing, Place, Shape, unavailable_here
from para_kernels.parallel.failure import exchange

# The part of the heads that is packed and announced first. The programs that start together read about a quarter of the
# heads at 4,096 rows a rank (24 heads, 132 multiprocessors), and to copy these takes longer than to pack the rest.
EARLY_PART = 4
_COPIES, _ANNOUNCEMENTS = (1, 2), 3  # streams


class PeerTransport(DeviceRing):
    """See `device_ring`. Two streams take turns with the groups of heads: one's flag overlaps the other's copy.

    What is packed is announced in a third one, that no copy holds up.
    """

    name = "peer"
    _side_streams = 3
    _arena: Tensor
    _bases: list[int]

    def _allocate(self, capacity: int) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        size = (1 + self.world) * capacity
        # torch's rendezvous would wait for a rank that has no memory left.
        arena = self._allocated(lambda: symmetric_memory.empty(size, dtype=torch.uint8, device=self.device))
        self._handle = symmetric_memory.rendezvous(arena, self.group.group_name)
        offset = arena.data_ptr() - self._handle.buffer_ptrs[self.rank]
        self._bases = [base + offset for base in self._handle.buffer_ptrs]
        return arena

    def _release(self) -> None:
        self._handle = None
        self._bases = []
        self._arena = torch.empty(0, dtype=torch.uint8)

    @property
    def memory_bytes(self) -> int:
        """On this rank's device."""
        return (1 + self.world) * self._capacity

    def _steps(self, place: Place, slot: int, base: int, flags: Tensor) -> tuple[list[Any], int]:
        assert ops._C is not None
        step = ops._C.StreamStep
        shape, control = place.shape, self._control
        early = self._early_heads(shape)
        steps = [step.record(0, 0), step.wait_record(_ANNOUNCEMENTS, 0)]
        steps.append(step.write(_ANNOUNCEMENTS, control.ready(self.rank)))
        if not early:
            steps += [step.wait_record(stream, 0) for stream in _COPIES]
        waited: set[tuple[int, int]] = set()
        for group, (first, count) in enumerate(shape.groups()):
            stream = _COPIES[group % len(_COPIES)]
            for t, owner in enumerate(self._peers(), 1):
                head = shape.head_bytes(owner)
                if not head:
                    continue
                word = control.early(owner) if first < early else control.ready(owner)
                if (stream, word) not in waited:
                    waited.add((stream, word))
                    steps.append(step.wait(stream, word))
                source = self._bases[owner] + place.offset(slot) + first * head
                target = base + place.offset(1 + t) + first * head
                steps.append(step.copy(stream, target, source, count * head))
                steps.append(step.write(stream, flags.data_ptr() + 4 * (t * flags.stride(0) + group)))
        # No credit before both streams of copies are done with the slots.
        steps += [step.record(_COPIES[1], 1), step.wait_record(_COPIES[0], 1)]
        steps.append(step.write(_COPIES[0], control.credit(self.rank)))
        return steps, 2

    def _early_heads(self, shape: Shape) -> int:
        step = shape.heads_per_flag
        heads = -(-shape.heads // (EARLY_PART * step)) * step if EARLY_PART else 0
        # The other heads' keys start at a multiple of 16 bytes if these do: the packing is compiled for that.
        return heads if heads < shape.heads and heads * shape.row_bytes % 16 == 0 else 0

    def _early_steps(self) -> list[Any]:
        assert ops._C is not None
        step = ops._C.StreamStep
        steps = [step.record(0, 0), *(step.wait_record(stream, 0) for stream in (*_COPIES, _ANNOUNCEMENTS))]
        return [*steps, step.write(_ANNOUNCEMENTS, self._control.early(self.rank))]


def unavailable(group: ProcessGroup, device: torch.device) -> str | None:
    """Why this rank cannot use the transport, None if it can; collective.

    All ranks have to be on one node, each with a GPU of its own that reaches the memory of all the others.
    """
    obstacle = unavailable_here(group, device)
    mine = [node(), "" if obstacle else _uuid(device.index)]
    everyone = exchange(group, mine, "GPUs of the ranks")
    if obstacle is not None:
        return obstacle
    if len({where for where, _ in everyone}) > 1:
        return "the ranks are on several nodes"
    uuids = [uuid for _, uuid in everyone]
    if "" in uuids:
        return "a rank has no GPU that can be used"
    if len(set(uuids)) < len(uuids):
        return "ranks share a GPU"
    visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
    for uuid in uuids:
        if uuid == mine[1]:
            continue
        if uuid not in visible:
            return "the other ranks' GPUs are not visible to this process"
        if not torch.cuda.can_device_access_peer(device.index, visible[uuid]):
            return f"GPU {device.index} cannot reach the memory of GPU {visible[uuid]}"
    return None


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
