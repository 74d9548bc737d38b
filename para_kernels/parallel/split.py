"""Which split of the ranks, ring x ulysses, is fastest: a model of one attention layer that a person can follow.

Ring hides its transfer behind attention and pays where the transfer is longer, and a start for every piece. Ulysses
moves less (for many ranks) and cannot hide it, has to put rows and heads in order, and loses where heads do not divide.
Both move each rank's share over the slowest link that they cross.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels.parallel.agreement import exchange
from para_kernels.parallel.collective import await_collective, sum_over_ranks
from para_kernels.parallel.mesh import ContextParallel
from para_kernels.parallel.waiting import wait


@dataclass(frozen=True)
class Links:
    """What connects the ranks.

    Attributes:
        node: bytes per second that a rank receives from another one of its node.
        network: the same from a rank of another node.
        latency: seconds that one exchange takes at least.
        source: "measured", or what was assumed.
        ordering: bytes per second at which a rank puts rows and heads in the order of an exchange and back.
    """

    node: float
    network: float
    latency: float
    source: str
    ordering: float = 450e9  # with it the model is within 6 % of benchmarks/results/ring-speed.json (2 x H200)


@dataclass(frozen=True)
class Workload:
    """Attention of one layer over a whole sequence.

    Attributes:
        heads, kv_heads, head_dim: of the model.
        rows: of the sequence, all streams together.
        samples: of the batch, on one rank.
        element_bytes: of a key's element.
        flops: floating point operations per second of the attention kernel.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    samples: int = 1
    element_bytes: int = 2
    flops: float = 600e12


@dataclass(frozen=True)
class Split:
    """One way to split, and what the model says of it, in seconds a layer."""

    ring: int
    ulysses: int
    attention: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.attention + self.exposed

    def __str__(self) -> str:
        return f"ring {self.ring} x ulysses {self.ulysses}"


def modelled(work: Workload, ring: int, ulysses: int, node: int, links: Links) -> Split:
    """Seconds of one layer on its busiest rank: attention, and the transfer that it does not hide."""
    pieces = ring * ulysses
    rows, ring_rows = -(-work.rows // pieces), -(-work.rows // ring)
    heads, kv_heads = -(-work.heads // ulysses), -(-work.kv_heads // ulysses)
    row_bytes = work.samples * work.head_dim * work.element_bytes
    attention = 4 * work.samples * ring_rows * work.rows * heads * work.head_dim / work.flops
    exposed = 0.0
    if ulysses > 1:
        link = links.node if ulysses <= node else links.network
        ordered = rows * (2 * work.heads + 2 * work.kv_heads) * row_bytes
        exposed += ordered * (ulysses - 1) / ulysses / link + ordered / links.ordering + 2 * links.latency
    if ring > 1:
        link = links.node if pieces <= node else links.network
        hop = 2 * ring_rows * kv_heads * row_bytes / link
        exposed += (ring - 1) * (max(0.0, hop - attention / ring) + links.latency)
    return Split(ring, ulysses, attention, exposed)


def choose_split(work: Workload, world: int, node: int, links: Links) -> tuple[Split, str]:
    """The fastest ring * ulysses = `world` by the model, and a sentence that says why.

    Args:
        node: ranks on one node; neighbouring ranks, so ulysses is inside a node while it fits.

    Raises:
        ValueError: for a world or node below 1.
    """
    for name, value in (("world", world), ("node", node)):
        if value < 1:
            raise ValueError(f"{name}: got {value!r}, must be an integer >= 1")
    splits = [modelled(work, world // u, u, node, links) for u in range(1, world + 1) if world % u == 0]
    # Of equals the one with less ulysses: it needs no room for exchanged heads.
    best, *others = sorted(splits, key=lambda split: split.seconds)
    reason = f"{best}: {_milliseconds(best)} a layer"
    if others:
        reason += f", {others[0]} would take {_milliseconds(others[0])}"
    uneven = f"; {work.heads} heads do not divide over ulysses {best.ulysses}" if work.heads % best.ulysses else ""
    return best, f"{reason} (links {links.source}: {links.node / 1e9:.3g} GB/s inside a node{uneven})"


def _milliseconds(split: Split) -> str:
    return f"{split.seconds * 1e3:.3g} ms ({split.exposed * 1e3:.2g} ms of it transfer that nothing hides)"


def resolve_split(
    parallel: ContextParallel, work: Workload, world: int, node: int, links: Links, samples: int = 1
) -> tuple[ContextParallel, str]:
    """ContextParallel("auto") with its sizes, and why; other settings come back as they are.

    The same arguments give the same result, so ranks need not talk.

    Args:
        samples: of the whole batch; where parallel.batch is 1, as many ranks as divide both take whole samples, which
            needs no transfer inside a layer.

    Raises:
        ValueError: if parallel.batch does not divide `world`.
    """
    if parallel.split != "auto":
        return parallel, "as set"
    batch = parallel.batch if parallel.batch > 1 else gcd(samples, world)
    if world % batch:
        raise ValueError(f"batch: got {batch}, must divide the world of {world}")
    split, reason = choose_split(work, world // batch, node, links)
    if batch > 1:
        reason = f"batch {batch}, and {reason}"
    return parallel.resolved(batch=batch, ring=split.ring, ulysses=split.ulysses), reason


# --- what the machine can do ----------------------------------------------------------------------------------------

# Bytes per second that one rank gets from another, a little below what transfers of some 10 MB reach.
NVLINK = Links(node=350e9, network=20e9, latency=40e-6, source="assumed for NVLink")
PCIE = Links(node=10e9, network=10e9, latency=60e-6, source="assumed for PCIe")
SOCKETS = Links(node=1e9, network=0.5e9, latency=200e-6, source="assumed for sockets", ordering=5e9)

# Attention in 16 bit, by compute capability: what good kernels reach on the usual card.
FLOPS = {(9, 0): 800e12, (8, 9): 110e12, (8, 0): 200e12}


def assumed_links(device: torch.device) -> Links:
    """Links as they usually are: NVLink on data-centre cards, PCIe on others, sockets between CPU processes."""
    if device.type != "cuda":
        return SOCKETS
    return NVLINK if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0)) else PCIE


def assumed_flops(device: torch.device) -> float:
    """Operations per second of attention in 16 bit on this kind of device."""
    if device.type != "cuda":
        return 50e9
    return FLOPS.get(torch.cuda.get_device_capability(device), 200e12)


def measure_links(group: ProcessGroup, device: torch.device, node: int, size: int | None = None) -> Links:
    """Links timed by exchanges between neighbours, the slowest rank's; the same on all ranks. Waits for the device.

    Args:
        group: all ranks, node by node.
        node: ranks on one node; divides the number of ranks.
        size: bytes that are sent, by default 64 MB on CUDA and 1 MB on the CPU.

    Raises:
        RankFailure: if a rank does not come.
    """
    if group.size() == 1:
        return assumed_links(device)
    size = (64 << 20 if device.type == "cuda" else 1 << 20) if size is None else size
    buffer = torch.zeros(2, size, dtype=torch.uint8, device=device)
    sum_over_ranks(torch.zeros(1, device=device), group)  # What starts with a group's first use has started.
    rank, home = group.rank(), group.rank() // node * node
    beside = [home + (rank - home + step) % node for step in (1, -1)]
    # The rank as far off as a node is large sits at the same place of another node.
    across = [(rank + step) % group.size() for step in (node, -node)] if node < group.size() else beside
    pairs = [(buffer[:, :4], across), (buffer, beside if node > 1 else across), (buffer, across)]
    mine = [min(_exchange_seconds(group, data, *ranks) for _ in range(3)) for data, ranks in pairs]
    latency, near, far = (max(times) for times in zip(*exchange(group, mine, "speed of links"), strict=True))
    return Links(size / near, size / far, latency, "measured")


def _exchange_seconds(group: ProcessGroup, buffer: Tensor, source: int, target: int) -> float:
    """Seconds to receive buffer[1] from rank `source` while buffer[0] goes to rank `target`."""
    await_collective(dist.barrier(group, async_op=True), group, "the speed of links", buffer.device)
    _synchronize(buffer)
    started = time.perf_counter()
    transfers = [
        dist.P2POp(dist.irecv, buffer[1], group=group, group_peer=source),
        dist.P2POp(dist.isend, buffer[0], group=group, group_peer=target),
    ]
    for work in dist.batch_isend_irecv(transfers):
        wait(work, group, "the speed of links", buffer.device, [source, target])
    _synchronize(buffer)
    return time.perf_counter() - started


def _synchronize(buffer: Tensor) -> None:
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)
