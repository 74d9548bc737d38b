"""Device meshes for context parallelism: ("batch", "ring", "ulysses"), ulysses innermost."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from para_kernels.parallel.failure import DEFAULT_TIMEOUT, check_timeout

MESH_DIMS = ("batch", "ring", "ulysses")
TRANSPORTS = ("auto", "peer", "host", "collective")


@dataclass(frozen=True)
class ContextParallel:
    """How work is spread over ranks: batch * ring * ulysses of them. Immutable.

    Args:
        split: "auto" lets the split be chosen from heads, sequence length and links; None takes the sizes below.
        batch: ranks that the samples of a batch are spread over (conditional and unconditional, several prompts).
        ring: ranks that pass keys and values on (Liu et al. 2023, Ring Attention, arXiv 2310.01889).
        ulysses: ranks that exchange heads for rows (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv 2309.14509).
        transport: "auto", "peer", "host" or "collective": how keys and values travel round the ring.
        timeout: seconds that a rank may wait for another one.

    Raises:
        ValueError: for a value that is not allowed, or sizes beside split="auto".
    """

    split: str | None = None
    batch: int = field(default=1, kw_only=True)
    ring: int = field(default=1, kw_only=True)
    ulysses: int = field(default=1, kw_only=True)
    transport: str = field(default="auto", kw_only=True)
    timeout: float = field(default=DEFAULT_TIMEOUT, kw_only=True)

    def __post_init__(self) -> None:
        if self.split not in (None, "auto"):
            raise ValueError(f"split: got {self.split!r}, allowed are 'auto' and None")
        for name in MESH_DIMS:
            _check_size(name, getattr(self, name))
        if self.split == "auto" and (self.ring, self.ulysses) != (1, 1):
            raise ValueError(
                f"split: got 'auto' beside ring={self.ring}, ulysses={self.ulysses}; give one or the other"
            )
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport: got {self.transport!r}, allowed are {', '.join(map(repr, TRANSPORTS))}")
        check_timeout(self.timeout)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(batch, ring, ulysses).

        Raises:
            ValueError: for split="auto", which has no sizes before it is resolved.
        """
        if self.split == "auto":
            raise ValueError("split: got 'auto', which has no sizes before it is resolved")
        return self.batch, self.ring, self.ulysses

    @property
    def world(self) -> int:
        """The number of ranks; errors as for `sizes`."""
        return math.prod(self.sizes)

    def resolved(self, *, batch: int, ring: int, ulysses: int) -> ContextParallel:
        """The same settings with the sizes that "auto" has been resolved to (`split.resolve_split`)."""
        return replace(self, split=None, batch=batch, ring=ring, ulysses=ulysses)

    def mesh(self, device_type: str | None = None) -> DeviceMesh:
        """The mesh of these sizes over all ranks.

        Raises:
            ValueError: if the sizes do not make up the world, or are not resolved.
        """
        return build_mesh(*self.sizes, device_type)


@dataclass(frozen=True)
class MeshGroups:
    """The process groups of a mesh, and where this rank stands in each.

    `sequence` is the group of all ranks that share a sequence, in the order of their pieces:
    index = ring_rank * ulysses + ulysses_rank.
    """

    mesh: DeviceMesh
    batch: ProcessGroup | None
    ring: ProcessGroup
    ulysses: ProcessGroup
    sequence: ProcessGroup

    @property
    def piece(self) -> int:
        """The index of this rank's piece of the sequence."""
        return self.ring.rank() * self.ulysses.size() + self.ulysses.rank()

    @property
    def pieces(self) -> int:
        return self.ring.size() * self.ulysses.size()


def mesh_groups(mesh: DeviceMesh) -> MeshGroups:
    """The groups of a mesh with dims "ring" and "ulysses", and perhaps "batch". The first call is collective.

    Raises:
        ValueError: for a mesh without these dims, or with others or in another order.
    """
    check_mesh(mesh)
    known = _groups.get(mesh)
    # A mesh equals one of the same layout, whose groups may have been destroyed.
    if known is None or known.ring is not mesh.get_group("ring") or known.ulysses is not mesh.get_group("ulysses"):
        known = _groups[mesh] = _make_groups(mesh)
    return known


_groups: dict[DeviceMesh, MeshGroups] = {}


def _make_groups(mesh: DeviceMesh) -> MeshGroups:
    batch = mesh.get_group("batch") if "batch" in (mesh.mesh_dim_names or ()) else None
    return MeshGroups(mesh, batch, mesh.get_group("ring"), mesh.get_group("ulysses"), _sequence_group(mesh))


def check_mesh(mesh: object, name: str = "mesh") -> None:
    """Raise a ValueError unless `mesh` is a DeviceMesh with dims (["batch",] "ring", "ulysses")."""
    dims = mesh.mesh_dim_names if isinstance(mesh, DeviceMesh) else None
    if dims not in (MESH_DIMS, MESH_DIMS[1:]):
        got = f"dims {dims}" if isinstance(mesh, DeviceMesh) else repr(mesh)
        raise ValueError(f"{name}: got {got}, must be a DeviceMesh with dims {MESH_DIMS} or {MESH_DIMS[1:]}")


def _sequence_group(mesh: DeviceMesh) -> ProcessGroup:
    """The group over ring and ulysses together."""
    if mesh["ring"].size() == 1:
        return mesh.get_group("ulysses")
    if mesh["ulysses"].size() == 1:
        return mesh.get_group("ring")
    return mesh["ring", "ulysses"]._flatten().get_group()


def group_of(mesh: DeviceMesh | ProcessGroup, name: str = "mesh") -> ProcessGroup:
    """The process group of a 1-D mesh, or the group itself.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(mesh, ProcessGroup):
        return mesh
    if isinstance(mesh, DeviceMesh) and mesh.ndim == 1:
        return mesh.get_group()
    got = f"a DeviceMesh of {mesh.ndim} dims" if isinstance(mesh, DeviceMesh) else repr(mesh)
    raise ValueError(f"{name}: got {got}, must be a ProcessGroup or a DeviceMesh of one dim")


def build_mesh(batch: int, ring: int, ulysses: int, device_type: str | None = None) -> DeviceMesh:
    """A mesh (batch, ring, ulysses) over all ranks of the world; ulysses neighbours are neighbouring ranks.

    Raises:
        ValueError: if the product is not the world size, or torch.distributed is not initialised.
    """
    world = world_size()
    for name, size in zip(MESH_DIMS, (batch, ring, ulysses), strict=True):
        _check_size(name, size)
    if batch * ring * ulysses != world:
        raise ValueError(
            f"batch, ring, ulysses: got {batch} * {ring} * {ulysses} = {batch * ring * ulysses} ranks,"
            f" must make up the world of {world}"
        )
    return init_device_mesh(device_type or default_device_type(), (batch, ring, ulysses), mesh_dim_names=MESH_DIMS)


def init_context_parallel_mesh(
    device_type: str | None = None,
    *,
    max_batch_dim_size: int | None = None,
    max_ring_dim_size: int | None = None,
    max_ulysses_dim_size: int | None = None,
) -> DeviceMesh:
    """A mesh ("batch", "ring", "ulysses") over the whole world, each dim the largest that divides what is left.

    First batch takes the largest divisor of the world up to its maximum (1 without one). Of what is left, a maximum for
    ulysses alone or ring alone leaves the rest to the other; with neither, ulysses fills a node and the ring crosses
    nodes. With both, ulysses is the largest that lets ring stay in its maximum.

    Args:
        device_type: "cuda" or "cpu"; by default that of the process group's backend.

    Raises:
        ValueError: if a maximum is not an integer of at least 1, both maxima cannot make up the world, or
            torch.distributed is not initialised.
    """
    maxima = (max_batch_dim_size, max_ring_dim_size, max_ulysses_dim_size)
    for name, size in zip(MESH_DIMS, maxima, strict=True):
        if size is not None:
            _check_size(f"max_{name}_dim_size", size)
    return build_mesh(*mesh_sizes(world_size(), node_size(), *maxima), device_type)


def mesh_sizes(
    world: int, node: int, max_batch: int | None, max_ring: int | None, max_ulysses: int | None
) -> tuple[int, int, int]:
    """(batch, ring, ulysses) as `init_context_parallel_mesh` chooses them.

    Raises:
        ValueError: if both maxima together cannot make up the world.
    """
    batch = 1 if max_batch is None else _largest_divisor(world, max_batch)
    rest = world // batch
    if max_ring is not None and max_ulysses is not None:
        fits = [u for u in _divisors(rest) if u <= max_ulysses and rest // u <= max_ring]
        if not fits:
            raise ValueError(
                f"max_ring_dim_size, max_ulysses_dim_size: got {max_ring} and {max_ulysses},"
                f" no ring * ulysses within them makes up {rest} ranks"
            )
        ulysses = fits[-1]
    elif max_ring is not None:
        ulysses = rest // _largest_divisor(rest, max_ring)
    else:
        ulysses = _largest_divisor(rest, node if max_ulysses is None else max_ulysses)
    return batch, rest // ulysses, ulysses


def world_size() -> int:
    """The number of ranks.

    Raises:
        ValueError: if torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "world: torch.distributed is not initialised; start with torchrun and call"
            " torch.distributed.init_process_group() first"
        )
    return dist.get_world_size()


def node_size() -> int:
    """Ranks on one node: torchrun's LOCAL_WORLD_SIZE where all nodes have as many, else the whole world."""
    world = world_size()
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdigit() and 0 < int(local) <= world and world % int(local) == 0 else world


def default_device_type() -> str:
    """The device that the default process group communicates between."""
    return "cuda" if "nccl" in dist.get_backend() and torch.cuda.is_available() else "cpu"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in _divisors(number) if divisor <= most)


def _check_size(name: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: got {size!r}, must be an integer >= 1")
