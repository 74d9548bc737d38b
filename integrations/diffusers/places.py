"""The mesh that a forward runs on: the one given, the one of the sizes asked for, or one chosen for its shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from para_kernels import ContextParallel
from para_kernels.parallel.agreement import check_agreement
from para_kernels.parallel.failure import deadline
from para_kernels.parallel.mesh import check_mesh, mesh_groups, node_size, world_size
from para_kernels.parallel.split import Links, Workload, assumed_flops, measure_links, resolve_split
from para_kernels.parallel.transport import close_transports, selection

AUTO = "auto"


@dataclass(frozen=True)
class Place:
    """A mesh, where this rank stands in it, and why it is this one.

    Attributes:
        mesh: with the dims "ring" and "ulysses", and perhaps "batch".
        batch, batch_rank, batch_group: ranks that share out the samples.
        pieces, piece, sequence_group: ranks that share out the joint sequence of the same samples, in its order.
        ring_group: those of them that keys and values go round.
        why: a sentence.
    """

    mesh: DeviceMesh
    batch: int
    batch_rank: int
    batch_group: ProcessGroup | None
    pieces: int
    piece: int
    sequence_group: ProcessGroup
    ring_group: ProcessGroup
    why: str

    @staticmethod
    def on(mesh: DeviceMesh, why: str) -> Place:
        """This rank's place. The first call for a mesh is collective."""
        groups = mesh_groups(mesh)
        return Place(
            mesh=mesh,
            batch=1 if groups.batch is None else groups.batch.size(),
            batch_rank=0 if groups.batch is None else groups.batch.rank(),
            batch_group=groups.batch,
            pieces=groups.pieces,
            piece=groups.piece,
            sequence_group=groups.sequence,
            ring_group=groups.ring,
            why=why,
        )

    def transport(self, device: torch.device, wanted: str) -> str:
        """How keys and values travel here, and why; to be asked after they have."""
        if self.ring_group.size() == 1:
            return "all-to-all of torch.distributed: the ranks exchange heads, nothing goes round"
        chosen = selection(self.ring_group, device, wanted)
        return f"{chosen.transport.name}; {chosen.reason}"

    def __str__(self) -> str:
        """As in "batch 1 x ring 2 x ulysses 2"."""
        names = self.mesh.mesh_dim_names or ()
        return " x ".join(f"{name} {size}" for name, size in zip(names, self.mesh.shape, strict=True))


class Places:
    """Where the forwards of one transformer run.

    Args:
        wanted: what was asked for; its transport and timeout hold also for a mesh that was given.
        mesh: a mesh that was given.

    Raises:
        ValueError: if the sizes do not make up the world, the mesh has other dims, or torch.distributed is not
            initialised.
    """

    def __init__(self, wanted: ContextParallel, mesh: DeviceMesh | None = None) -> None:
        self.wanted = wanted
        self.mesh = mesh
        self._chosen: dict[tuple[object, ...], Place] = {}
        world = world_size()
        if mesh is None:  # Groups are made by all ranks alike: first make sure that they will be.
            with deadline(wanted.timeout):
                check_agreement(_world(), {"parallel": str(wanted)}, what="parallel settings")
        if mesh is not None:
            check_mesh(mesh, "mesh")
            self.fixed = Place.on(mesh, "the mesh was given")
        elif wanted.split == AUTO:
            if world % wanted.batch:
                raise ValueError(f"parallel: got batch {wanted.batch}, must divide the {world} ranks")
            self.fixed = None
        else:
            self.fixed = Place.on(_mesh(wanted), "the sizes were given")
        self.everyone = _world() if self.fixed is None else _all_of(self.fixed.mesh)

    def of(self, samples: int, tokens: int, heads: int, head_dim: int, like: Tensor) -> Place:
        """The place for a forward of so many samples, each a joint sequence of so many tokens. Collective where it is
        new.

        Args:
            heads, head_dim: of the model's attention.
            like: a tensor of the device and dtype that attention will see.
        """
        if self.fixed is not None:
            return self.fixed
        shape = (samples, tokens, like.device, like.dtype)
        if shape not in self._chosen:
            world, node = world_size(), node_size()
            work = Workload(
                heads, heads, head_dim, tokens, samples, like.element_size(), flops=assumed_flops(like.device)
            )
            parallel, why = resolve_split(self.wanted, work, world, node, _links(like.device, node), samples)
            self._chosen[shape] = Place.on(_mesh(parallel), why)
        return self._chosen[shape]

    def close(self) -> None:
        """Give back the buffers in which keys and values have travelled here; the next forward makes them anew.

        To be called on all ranks alike, as forwards are. No rank waits for another's call, but for a rank that is late
        to have taken what lies in the buffers. Groups are kept: they are dear. Other places may have the same ones, and
        their next forward then makes its buffers anew too.
        """
        fixed = () if self.fixed is None else (self.fixed,)
        with deadline(self.wanted.timeout):
            for place in (*fixed, *self._chosen.values()):
                close_transports(place.ring_group)


_measured: dict[tuple[ProcessGroup, torch.device], Links] = {}


def _links(device: torch.device, node: int) -> Links:
    """Measured once."""
    key = (_world(), device)
    if key not in _measured:
        _measured[key] = measure_links(_world(), device, node)
    return _measured[key]


_meshes: dict[tuple[ProcessGroup, int, int, int], DeviceMesh] = {}


def _mesh(parallel: ContextParallel) -> DeviceMesh:
    """One mesh for each split of the world: process groups are dear and never freed."""
    key = (_world(), parallel.batch, parallel.ring, parallel.ulysses)
    if key not in _meshes:
        _meshes[key] = parallel.mesh()
    return _meshes[key]


def _world() -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _all_of(mesh: DeviceMesh) -> ProcessGroup:
    """The group of all ranks of a mesh."""
    if mesh.size() == _world().size():
        return _world()
    return mesh._flatten().get_group()
