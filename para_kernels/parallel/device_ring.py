"""What the transports `peer` and `host` have in common: where pieces lie, and one layer from packing to the kernel.

One layer, on each rank (epoch e counts layers; a slot is e modulo 2):

    main stream   waits until every peer has taken this rank's piece of epoch e - 2, packs k and v into the slot, or
                  has them made there, announces that by a word that peers and the own side streams wait for, has the
                  queries prepared if they are not yet, then runs the attention kernel, which waits for the flags of the
                  pieces that it reads
    side streams  wait until this rank has announced its piece, and the peers theirs; bring the pieces head by head in
                  the order in which the kernel reads them; write a flag behind each group of heads; at last write the
                  credit: all pieces of epoch e have been taken

A received piece is overwritten by the side streams of the next layer, which wait for that layer's announcement, and it
comes after this layer's kernel. A rank that runs ahead can be one layer further than the slowest, two slots hold that.
The order of consumption is r, r + 1, r + 2, ...: at any time all ranks take pieces of different ranks.

The host enqueues the main stream's part first. A device that was idle then computes on its own keys while the host
enqueues the transfers, some 30 calls of the driver. It does not matter that the kernel may wait for flags whose copies
have not been enqueued yet: the streams order all that counts by words, not by the order in which the host came, and
copies need no multiprocessor. Should the host fail in between, no copy brings the flags: `give_up` ends the peers, the
flags are written without the copies, and if the driver refuses even that, the kernel ends by its own bounded wait.
Where a launch blocks the host until the kernel is done (CUDA_LAUNCH_BLOCKING), the transfers are enqueued first.
What attention launches after that kernel comes behind them in any case: loading a kernel for the first time may wait
for those that run.

Bytes go round in the same way (`circulate`), but that the main stream waits for the flags of a piece before it runs
what uses it. That wait has no bound of its own: in trouble it is ended by the copies behind released words, as above.

The memory of a rank is one range, the arena: two slots, then the world - 1 received pieces, `capacity` bytes each.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels import ops
from para_kernels.attention import softmax_scale
from para_kernels.parallel.agreement import exchange, raise_obstacles
from para_kernels.parallel.control import Control
from para_kernels.parallel.failure import current_timeout
from para_kernels.sources import Source

LIBRARY = "libcuda.so.1"
# Copies of this size and more run at nearly the full speed of a bus; a group of heads is about one.
COPY_BYTES = 4 * 2**20
MAX_CHUNKS = 1024  # `host`: pieces of a piece that have a flag in host memory
_ALIGNMENT = 1024  # bytes: what a slot may lose to start at a whole row, at most 256 elements of 4 bytes
_ROW_OF_BYTES = 512  # what `circulate` counts bytes in: half of what a "row" of keys and values takes
_KEPT_LAYOUTS = 32
_SLOTS = 2


@dataclass(frozen=True)
class Shape:
    """What a layer's pieces look like. `lengths` are in rank order; a group of heads has at most `copy_bytes` bytes, if
    it has more than one."""

    lengths: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    copy_bytes: int = COPY_BYTES

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.dtype.itemsize

    def head_bytes(self, rank: int) -> int:
        """Keys and values of one head of a rank's piece, all samples."""
        return 2 * self.batch * self.lengths[rank] * self.row_bytes

    @property
    def largest_piece(self) -> int:
        return self.heads * max(self.head_bytes(rank) for rank in range(len(self.lengths)))

    @property
    def heads_per_flag(self) -> int:
        """In groups of one size, for the first one is waited for; of what is more than a small copy there are two."""
        largest = max(1, self.largest_piece // self.heads)
        groups = -(-self.heads // max(1, self.copy_bytes // largest))
        at_least = min(2, self.heads, -(-self.largest_piece // COPY_BYTES))
        return -(-self.heads // max(1, groups, at_least))

    def groups(self) -> list[tuple[int, int]]:
        """(first head, number of heads) of each group that has a flag."""
        step = self.heads_per_flag
        return [(first, min(step, self.heads - first)) for first in range(0, self.heads, step)]


@dataclass(frozen=True)
class Place:
    """Where the pieces of a shape lie in an arena with this capacity."""

    shape: Shape
    capacity: int

    def offset(self, index: int) -> int:
        """Bytes before slot `index`, or received piece index - 2: at a whole row."""
        row = self.shape.row_bytes
        return -(-index * self.capacity // row) * row

    def first_row(self, index: int) -> int:
        return self.offset(index) // self.shape.row_bytes


@dataclass(frozen=True)
class Layout:
    """A shape's place, and what runs for it; one program and one table for each slot, an arrival for each peer."""

    place: Place
    memory: Tensor
    flags: Tensor
    tables: tuple[Tensor, ...]
    transfers: tuple[Any, ...]
    arrivals: tuple[Any, ...]
    flags_alone: Any


class DeviceRing(ABC):
    """Ring attention by one kernel per layer, its pieces brought by copy engines. See this module's text.

    Calls are ordered as in the current stream of the first; a call in another stream waits for the one before it.
    Not to be captured into a CUDA graph: epochs are values of the launch.
    """

    name: str
    _side_streams = 2
    _chunks = 0
    _copy_bytes = COPY_BYTES

    def __init__(self, group: ProcessGroup, device: torch.device, library: str = LIBRARY) -> None:
        assert ops._C is not None
        self.group, self.device, self._library = group, device, library
        self.rank, self.world = group.rank(), group.size()
        self._capacity = 0
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._layouts: OrderedDict[Shape, Layout] = OrderedDict()
        with self._on_device():
            self._control = Control(group, library, self.name, self._chunks)
            self._error = self._view_of_error()
            self._sides = self._make_streams(self._side_streams)
            self._wait_for_slot, self._announce = self._main_programs()
        self._launches_block = os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")
        self._last_stream: int | None = None  # the default stream is 0

    # What differs between the two transports.

    @abstractmethod
    def _allocate(self, capacity: int) -> Tensor:
        """This rank's arena, uint8, for pieces of `capacity` bytes; collective. What it replaces has been let go."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of the arena and of what belongs to it."""

    @abstractmethod
    def _steps(self, place: Place, slot: int, base: int, flags: Tensor) -> tuple[list[Any], int]:
        """One layer's work of the side streams, and how many events it uses; it waits for this rank's announcement."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """What this rank holds for the ring, on its device and of the host's memory."""

    # One layer.

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
        """As `Transport.ring`. RankFailure, of this call or of one before it: a rank is missing."""
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        shape = Shape(tuple(lengths), k.shape[0], k.shape[2], k.shape[3], k.dtype, self._copy_bytes)
        if not shape.largest_piece:  # No rank has any keys, nor queries.
            return out.zero_(), lse.fill_(float("-inf"))
        with self._on_device(), contextlib.ExitStack() as in_trouble:
            with self._layer(shape) as (layout, main, slot, epoch):
                self._wait_for_slot.run([main], epoch)
                if source is None:
                    self._pack(k, v, layout.memory, layout.place.first_row(slot))
                else:
                    self._prepare(source.write_keys, *_piece(layout.memory, layout.place.first_row(slot), k.shape))
                self._announce.run([main], epoch)
                if self._launches_block:
                    layout.transfers[slot].run(self._sides, epoch)
                if source is not None:  # The first pieces travel meanwhile.
                    q = q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)
                    self._prepare(source.write_queries, q)
                finish = self._attend(q, layout, slot, epoch, out, lse, q_lens, kv_lens, scale)
                in_trouble.callback(_without_error, finish)  # what the kernel marks as no result becomes so in `out`
                if not self._launches_block:
                    layout.transfers[slot].run(self._sides, epoch)
            in_trouble.pop_all()
            finish()
        return out, lse

    def circulate(
        self, sizes: Sequence[int], fill: Callable[[Tensor], None], use: Callable[[int, Tensor], None]
    ) -> None:
        """As `Transport.circulate`: the main stream waits for the flag of a piece before what uses it."""
        shape = Shape(tuple(-(-size // (2 * _ROW_OF_BYTES)) for size in sizes), 1, 1, _ROW_OF_BYTES, torch.uint8)
        if not shape.largest_piece:
            return
        with self._on_device(), self._layer(shape) as (layout, main, slot, epoch):
            own = layout.place.offset(slot)
            self._wait_for_slot.run([main], epoch)
            if sizes[self.rank]:
                fill(self._arena[own : own + sizes[self.rank]])
            self._announce.run([main], epoch)
            if self._launches_block:
                layout.transfers[slot].run(self._sides, epoch)
            if sizes[self.rank]:
                use(self.rank, self._arena[own : own + sizes[self.rank]])
            if not self._launches_block:
                layout.transfers[slot].run(self._sides, epoch)
            for t, owner in enumerate(self._peers(), 1):
                if sizes[owner]:
                    start = layout.place.offset(1 + t)
                    layout.arrivals[t - 1].run([main], epoch)
                    use(owner, self._arena[start : start + sizes[owner]])

    @contextlib.contextmanager
    def _layer(self, shape: Shape) -> Iterator[tuple[Layout, int, int, int]]:
        """(layout, main stream, slot, epoch) of the next layer; if what is done in it fails, no rank waits for it."""
        layout = self._layout(shape)
        main = self._main_stream()
        epoch = self._control.next_epoch()
        try:
            yield layout, main, epoch % _SLOTS, epoch
        except BaseException as error:  # also an interrupt, which would leave the device without its copies
            # The peers count this epoch: from here on nothing may be taken for a layer that it is not.
            self._control.give_up(error)
            with contextlib.suppress(RuntimeError):  # The driver may refuse this too: then the kernel's wait ends.
                layout.flags_alone.run(self._sides, epoch)
            raise

    def check(self) -> None:
        """Raise a RankFailure if a rank is missing: ask after the device is done, before its results are trusted."""
        self._control.check()

    def give_up(self, error: BaseException) -> None:
        """End all ranks: this one has failed outside of a layer that the others have begun."""
        self._control.give_up(error)

    def close(self) -> None:
        """Give back all memory, once this rank's device is done with it and the peers have taken what lies in it.

        Every rank closes for itself, and meets no other one there: whoever has made the same calls may be late.
        """
        self._synchronize()
        self._control.await_taken()
        self._layouts.clear()
        self._release()
        self._capacity = 0
        self._control.close()

    def _attend(
        self,
        q: Tensor,
        layout: Layout,
        slot: int,
        epoch: int,
        out: Tensor,
        lse: Tensor,
        q_lens: Tensor | None,
        kv_lens: Tensor | None,
        scale: float | None,
    ) -> Callable[[], None]:
        """Launch the kernel; what is returned launches what comes after it."""
        shape = layout.place.shape
        kernels = ops._triton()
        pieces = kernels.ring_attention.Pieces(
            layout.memory,
            layout.tables[slot],
            layout.flags,
            shape.heads_per_flag,
            epoch,
            self._error,
            current_timeout(),
        )
        return kernels.dispatch.ring_attention_forward(
            q, pieces, sum(shape.lengths), out, lse, q_lens, kv_lens, softmax_scale(scale, q.shape[3]),
            kv_heads=shape.heads, own_start=sum(shape.lengths[: self.rank]), capability=ops._capability(self.device),
        )  # fmt: skip

    def _pack(self, k: Tensor, v: Tensor, memory: Tensor, first_row: int) -> None:
        ops._triton().ring_attention.pack_piece(k, v, memory, first_row)

    def _prepare(self, write: Callable[..., None], *targets: Tensor) -> None:
        write(*targets)

    # Layouts.

    def _layout(self, shape: Shape) -> Layout:
        if shape in self._layouts:
            self._layouts.move_to_end(shape)
            return self._layouts[shape]
        if shape.largest_piece + _ALIGNMENT > self._capacity:
            self._grow(shape.largest_piece + _ALIGNMENT)
        while len(self._layouts) >= _KEPT_LAYOUTS:
            self._synchronize()  # The device may still be using the flags and the table of the oldest.
            self._layouts.popitem(last=False)
        self._layouts[shape] = self._make_layout(shape)
        return self._layouts[shape]

    def _grow(self, capacity: int) -> None:
        """A larger arena, at the same call on all ranks: none may still read this rank's old one."""
        self._synchronize()
        exchange(self.group, capacity, "larger buffers of the ring")
        self._layouts.clear()
        self._release()
        self._capacity = 0  # until there is an arena again: allocating may fail
        capacity = -(-capacity // 2**21) * 2**21
        self._arena = self._allocate(capacity)
        self._capacity = capacity

    def _allocated(self, allocate: Callable[[], Tensor]) -> Tensor:
        """This rank's own memory; RuntimeError on every rank where one has too little."""
        arena, obstacle = None, None
        try:
            arena = allocate()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            obstacle = f"{type(error).__name__}: {error}".splitlines()[0]
        raise_obstacles(self.group, obstacle, "memory of the ring")
        assert arena is not None
        return arena

    def _make_layout(self, shape: Shape) -> Layout:
        place = Place(shape, self._capacity)
        rows = self._arena.numel() // shape.row_bytes
        memory = self._arena[: rows * shape.row_bytes].view(shape.dtype).view(rows, shape.head_dim)
        flags = torch.zeros(self.world, len(shape.groups()), dtype=torch.int32, device=self.device)
        tables = tuple(self._table(place, slot) for slot in range(_SLOTS))
        assert ops._C is not None
        step, program = ops._C.StreamStep, ops._C.StreamProgram
        transfers = []
        for slot in range(_SLOTS):
            steps, events = self._steps(place, slot, self._arena.data_ptr(), flags)
            transfers.append(program(steps, self._side_streams, events, self._library))
        alone = [step.write(0, flags.data_ptr() + 4 * index) for index in range(flags.stride(0), flags.numel())]
        flags_alone = program(alone, self._side_streams, 0, self._library)
        arrivals = tuple(self._arrival(flags[t]) for t in range(1, self.world))
        return Layout(place, memory, flags, tables, tuple(transfers), arrivals, flags_alone)

    def _arrival(self, flags: Tensor) -> Any:
        """The main stream's wait for all of a received piece."""
        assert ops._C is not None
        waits = [ops._C.StreamStep.wait(0, flags.data_ptr() + 4 * group) for group in range(flags.numel())]
        return ops._C.StreamProgram(waits, 1, 0, self._library)

    def _main_programs(self) -> tuple[Any, Any]:
        """What the main stream does before the packing, and behind it; for all layers alike."""
        assert ops._C is not None
        step, program, control = ops._C.StreamStep, ops._C.StreamProgram, self._control
        before = [step.wait(0, control.credit(peer), -_SLOTS) for peer in self._peers()]
        behind = [step.write(0, control.ready(self.rank))]
        return program(before, 1, 0, self._library), program(behind, 1, 0, self._library)

    def _table(self, place: Place, slot: int) -> Tensor:
        """`Pieces.table`: this rank's piece in its slot, then the received ones."""
        lengths = place.shape.lengths
        rows = []
        for t in range(self.world):
            owner = (self.rank + t) % self.world
            rows.append((place.first_row(slot if t == 0 else 1 + t), sum(lengths[:owner]), lengths[owner]))
        return torch.tensor(rows, dtype=torch.int32).to(self.device)

    def _peers(self) -> list[int]:
        """The other ranks, in the order in which their pieces are consumed."""
        return [(self.rank + t) % self.world for t in range(1, self.world)]

    # The device.

    def _view_of_error(self) -> Tensor:
        assert ops._C is not None
        return ops._C.view_of_memory(self._control.error_address, [4], torch.int32, self.device)

    def _make_streams(self, count: int) -> list[int]:
        # Of high priority: hardware queues of their own, so that what waits here holds up no kernel of other streams.
        self._stream_objects = [torch.cuda.Stream(self.device, priority=-1) for _ in range(count)]
        return [stream.cuda_stream for stream in self._stream_objects]

    def _main_stream(self) -> int:
        """The current stream, ordered after the one of the call before."""
        stream = torch.cuda.current_stream(self.device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"the transport {self.name!r} cannot be captured into a CUDA graph: use 'collective'")
        if self._last_stream is not None and self._last_stream != stream.cuda_stream:
            stream.wait_stream(torch.cuda.ExternalStream(self._last_stream, self.device))
        self._last_stream = stream.cuda_stream
        return stream.cuda_stream

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def _on_device(self) -> Any:
        return torch.cuda.device(self.device)


def _piece(memory: Tensor, first_row: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where keys and values (B, n, Hk, D) of the piece that starts at `first_row` lie: by heads, then samples, whose
    keys come before the values.
    """
    batch, rows, heads, dim = shape
    piece = memory[first_row : first_row + 2 * batch * heads * rows].view(heads, batch, 2, rows, dim)
    keys, values = piece.permute(2, 1, 3, 0, 4)
    return keys, values


def _without_error(function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):
        function()


def unavailable_here(group: ProcessGroup, device: torch.device) -> str | None:
    """Why no transport of this kind can run in this process; None if it can."""
    if group.size() == 1:
        return "there is one rank"
    if device.type != "cuda":
        return "needs CUDA"
    if ops._C is None:
        return "the extension is not built"
    if not hasattr(ops._C, "StreamProgram"):
        return "the extension was built from older sources"
    if not ops.TRITON_AVAILABLE:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "needs CUDA, not ROCm"
    try:
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # makes the context
            ops._C.StreamProgram([], 1, 0, LIBRARY)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
