"""How keys and values travel round a ring: one interface, three transports, and the choice between them.

`peer` (copy engines, GPU to GPU), `host` (pinned shared memory, for cards that cannot reach each other) and
`collective` (torch.distributed, everywhere). The hardware is asked; an argument or PARA_KERNELS_TRANSPORT forces.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels.parallel.agreement import exchange
from para_kernels.parallel.collective import CollectiveTransport
from para_kernels.parallel.failure import RankFailure, global_rank
from para_kernels.parallel.mesh import TRANSPORTS
from para_kernels.sources import Source

ENVIRONMENT = "PARA_KERNELS_TRANSPORT"


class Transport(Protocol):
    """Runs ring attention over its group. Made for one group and device, and kept."""

    name: str

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
        """This rank's rows of attention over the whole sequence; collective, arguments have been checked.

        Args:
            q: (B, S_r, H, D), this rank's rows; any strides, D contiguous.
            k, v: (B, S_r, Hk, D).
            lengths: rows of every rank of the group, in rank order.
            kv_lens, q_lens: int32 (B,), of the whole sequence, or None.
            scale: factor on the scores, default D ** -0.5.
            out: where the result may be written, contiguous and like q.
            source: what q, k and v, which are outlines then, are still to be made of; None: they are there.

        Returns:
            out (B, S_r, H, D) in q's dtype and lse (B, H, S_r) float32, contiguous.
        """
        ...

    def circulate(
        self, sizes: Sequence[int], fill: Callable[[Tensor], None], use: Callable[[int, Tensor], None]
    ) -> None:
        """Bring the bytes of every rank to all of them; collective. What travels meanwhile does not stop the device.

        Args:
            sizes: bytes of every rank of the group, in rank order; those without any are left out.
            fill: writes this rank's bytes into the uint8 (sizes[rank],) that it is given, aligned to 256 bytes, in the
                current stream. Called at once.
            use: called with a rank and its bytes, this rank first, then in the order in which they come. They are there
                for what it enqueues in the current stream, and until it returns.
        """
        ...

    def close(self) -> None:
        """Give back buffers and handles."""
        ...


@runtime_checkable
class SupportsGivingUp(Protocol):
    """A transport whose other ranks can be told, rather than time out."""

    def give_up(self, error: BaseException) -> None:
        """End all ranks: this one has failed."""
        ...


@dataclass(frozen=True)
class Selection:
    """A transport and why it was taken."""

    transport: Transport
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A transport that not every machine has. `module` offers `unavailable(group, device)`, a reason or None."""

    name: str
    module: str
    transport: str


CANDIDATES = (
    Candidate("peer", "para_kernels.parallel.peer", "PeerTransport"),
    Candidate("host", "para_kernels.parallel.host", "HostTransport"),
)

_selected: WeakKeyDictionary[ProcessGroup, dict[tuple[torch.device, str], Selection]] = WeakKeyDictionary()


def select_transport(group: ProcessGroup, device: torch.device, forced: str = "auto") -> Transport:
    """The transport for rings over `group`; all ranks get the same one. Collective at first, then kept.

    Args:
        forced: "peer", "host" or "collective" instead of the choice; PARA_KERNELS_TRANSPORT is heard where this is
            "auto". CPU tensors always travel by `collective`.

    Raises:
        ValueError: for an unknown name, or a forced transport that a rank cannot use, with its reason.
    """
    return selection(group, device, forced).transport


def selection(group: ProcessGroup, device: torch.device, forced: str = "auto") -> Selection:
    """As `select_transport`, with the reason for reports."""
    known = _selected.setdefault(group, {})
    if (device, forced) not in known:
        known[device, forced] = _select(group, device, forced)
    return known[device, forced]


def give_up_transports(group: ProcessGroup, error: Exception) -> None:
    """End the layers of `group` that other ranks have begun: this rank does not come, because of `error`."""
    for chosen in _selected.get(group, {}).values():
        if isinstance(chosen.transport, SupportsGivingUp):
            chosen.transport.give_up(error)


def close_transports(group: ProcessGroup) -> None:
    """Give back what the transports of `group` hold."""
    for chosen in _selected.pop(group, {}).values():
        chosen.transport.close()


def _select(group: ProcessGroup, device: torch.device, forced: str) -> Selection:
    name, source = _forced(forced)
    if device.type == "cpu":
        return Selection(CollectiveTransport(group, device), "CPU tensors travel by torch.distributed")
    if name == "collective":
        return Selection(CollectiveTransport(group, device), f"set by {source}")
    obstacles = {c.name: _obstacle(c, group, device) for c in CANDIDATES if name in ("auto", c.name)}
    for candidate in CANDIDATES:
        if candidate.name in obstacles and obstacles[candidate.name] is None:
            reason = "the fastest that every rank can use" if name == "auto" else f"set by {source}"
            try:
                return Selection(_make(candidate, group, device), reason)
            except RankFailure:
                raise
            except RuntimeError as error:  # on every rank alike, such as shared memory that one of them is refused
                obstacles[candidate.name] = str(error).splitlines()[0]
    why = "; ".join(f"no {name}: {obstacle}" for name, obstacle in obstacles.items())
    if name != "auto":
        raise ValueError(f"transport: got {name!r} by {source}, which cannot be used here ({why})")
    return Selection(CollectiveTransport(group, device), why)


def _forced(argument: str) -> tuple[str, str]:
    name, source = argument, "the argument transport"
    if argument == "auto" and os.environ.get(ENVIRONMENT):
        name, source = os.environ[ENVIRONMENT], ENVIRONMENT
    if name not in TRANSPORTS:
        raise ValueError(f"transport: got {name!r} by {source}, allowed are {', '.join(map(repr, TRANSPORTS))}")
    return name, source


def _obstacle(candidate: Candidate, group: ProcessGroup, device: torch.device) -> str | None:
    """Why some rank cannot use a transport; None if all can. Collective."""
    mine = _own_obstacle(candidate, group, device)
    for rank, obstacle in enumerate(exchange(group, mine, f"choice of transport ({candidate.name})")):
        if obstacle is not None:
            return f"{obstacle} (rank {global_rank(group, rank)})"
    return None


def _own_obstacle(candidate: Candidate, group: ProcessGroup, device: torch.device) -> str | None:
    if importlib.util.find_spec(candidate.module) is None:
        return "not part of this installation"
    return importlib.import_module(candidate.module).unavailable(group, device)


def _make(candidate: Candidate, group: ProcessGroup, device: torch.device) -> Transport:
    return getattr(importlib.import_module(candidate.module), candidate.transport)(group, device)
