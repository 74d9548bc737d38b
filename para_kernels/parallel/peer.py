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
from para_kernels.parallel.agreement import exchange
from para_kernels.parallel.control import node
from para_kernels.parallel.device_ring import DeviceRing, Place, unavailable_here

_COPIES = (0, 1)  # streams
# A copy over NVLink costs some 3 us besides its bytes, at 340 to 370 GB/s, and those of the two streams do not overlap.
# Of FLUX's 24 heads of 1.1 MiB what runs first needs eleven, after 36 us of its own keys. With 12, 6 and 5 heads a copy
# the kernel took 255, 236 to 249 and 228 to 254 us in a step (H200, flux_copies.json); with 3, before, 234 to 274.
_COPY_BYTES = 6 * 2**20


class PeerTransport(DeviceRing):
    """See `device_ring`. Two streams take turns with the groups of heads: one's flag overlaps the other's copy."""

    name = "peer"
    _side_streams = len(_COPIES)
    _copy_bytes = _COPY_BYTES
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
        shape, control, groups = place.shape, self._control, place.shape.groups()
        used = _COPIES[: len(groups)]
        steps = [step.wait(stream, control.ready(self.rank)) for stream in used]
        announced: set[tuple[int, int]] = set()
        for group, (first, count) in enumerate(groups):
            stream = _COPIES[group % len(_COPIES)]
            for t, owner in enumerate(self._peers(), 1):
                head = shape.head_bytes(owner)
                if not head:
                    continue
                if (stream, owner) not in announced:
                    announced.add((stream, owner))
                    steps.append(step.wait(stream, control.ready(owner)))
                source = self._bases[owner] + place.offset(slot) + first * head
                target = base + place.offset(1 + t) + first * head
                steps.append(step.copy(stream, target, source, count * head))
                steps.append(step.write(stream, flags.data_ptr() + 4 * (t * flags.stride(0) + group)))
        # No credit before both streams of copies are done with the slots.
        for event, stream in enumerate(used[1:]):
            steps += [step.record(stream, event), step.wait_record(_COPIES[0], event)]
        steps.append(step.write(_COPIES[0], control.credit(self.rank)))
        return steps, len(used) - 1


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
