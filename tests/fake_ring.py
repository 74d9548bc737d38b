"""The transports `peer` and `host` on the CPU: their own programs in the streams of a driver without a GPU.

What replaces the GPU: each stream is a thread (fake_cuda.c); memory that a peer reaches is shared memory; the kernels
are the few lines of torch below, which wait for each head's flag as the kernel does, and read what lies in the arena.
They run in a thread too, in the order of the main stream: the host goes on meanwhile, as with a GPU, and results are
there after `_synchronize`.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels.attention import softmax_scale
from para_kernels.parallel.control import SharedMemory
from para_kernels.parallel.device_ring import DeviceRing, Layout
from para_kernels.parallel.failure import current_timeout
from para_kernels.parallel.host import HostTransport
from para_kernels.parallel.peer import PeerTransport

CPU = torch.device("cpu")
MAIN = 0x100
GONE = 0xFF  # what the bytes of an arena become that has been given back: NaN


class FakeDevice(DeviceRing):
    """What a GPU does for a ring, done by the processor."""

    def __init__(self, group: ProcessGroup, library: str, delay_us: int = 0) -> None:
        self.fake = ctypes.CDLL(library)
        self.fake.steps_enqueued.argtypes = self.fake.steps_finished.argtypes = [ctypes.c_void_p]
        self.fake.cuStreamWaitValue32_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self._launches: SimpleQueue[tuple[int, Callable[[], None]]] = SimpleQueue()
        self._launched, self._ended = 0, torch.zeros(1, dtype=torch.int32)
        threading.Thread(target=self._run_kernels, daemon=True).start()
        self.fake.stream_is_idle.argtypes = [ctypes.c_void_p]
        ctypes.c_uint.in_dll(self.fake, "delay_us").value = delay_us
        super().__init__(group, CPU, library)

    def _on_device(self) -> Any:
        return contextlib.nullcontext()

    def _view_of_error(self) -> Tensor:
        return self._control.error_words

    def _make_streams(self, count: int) -> list[int]:
        return [MAIN + 1 + i for i in range(count)]

    def _main_stream(self) -> int:
        return MAIN

    def _synchronize(self) -> None:
        while int(self._ended) < self._launched:
            time.sleep(1e-4)
        for stream in (MAIN, *self._sides):
            self._drain(stream)

    def _drain(self, stream: int) -> None:
        while not self.fake.stream_is_idle(stream):
            time.sleep(1e-4)

    def _launch(self, kernel: Callable[[], None]) -> None:
        """Run it after what stands in the main stream, and what comes there after it."""
        self._launches.put((self.fake.steps_enqueued(MAIN), kernel))
        self._launched += 1
        self.fake.cuStreamWaitValue32_v2(MAIN, self._ended.data_ptr(), self._launched, 0)

    def _run_kernels(self) -> None:
        while True:
            steps, kernel = self._launches.get()
            while self.fake.steps_finished(MAIN) < steps:
                time.sleep(2e-5)
            kernel()
            self._ended += 1

    def _pack(self, k: Tensor, v: Tensor, memory: Tensor, first_row: int) -> None:
        batch, rows, heads, dim = k.shape
        piece = memory[first_row : first_row + 2 * batch * heads * rows].view(heads, batch, 2, rows, dim)
        self._launch(lambda: piece.copy_(torch.stack((k, v), 2).permute(3, 0, 2, 1, 4)))

    def _prepare(self, write: Callable[..., None], *targets: Tensor) -> None:
        self._launch(lambda: write(*targets))

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
        how = softmax_scale(scale, q.shape[3]), current_timeout()
        self._launch(lambda: self._kernel(q, layout, slot, epoch, out, lse, q_lens, kv_lens, *how))
        return lambda: None

    def _kernel(
        self,
        q: Tensor,
        layout: Layout,
        slot: int,
        epoch: int,
        out: Tensor,
        lse: Tensor,
        q_lens: Tensor | None,
        kv_lens: Tensor | None,
        scale: float,
        timeout: float,
    ) -> None:
        shape, table, memory = layout.place.shape, layout.tables[slot].tolist(), layout.memory
        total = sum(shape.lengths)
        own_start = sum(shape.lengths[: self.rank])
        for b in range(shape.batch):
            q_len = q.shape[1] if q_lens is None else min(max(int(q_lens[b]) - own_start, 0), q.shape[1])
            kv_len = total if kv_lens is None else int(kv_lens[b])
            out[b, q_len if kv_len else 0 :] = 0
            lse[b, :, q_len if kv_len else 0 :] = float("-inf")
            for h in range(q.shape[2] if q_len and kv_len else 0):
                head = h // (q.shape[2] // shape.heads)
                keys, values, failed = [], [], False
                for t, (row, start, length) in enumerate(table):
                    wanted = min(max(kv_len - start, 0), length)
                    if t and wanted and not self._await(layout, t, head, epoch, 0.0 if failed else timeout):
                        failed = True
                    first = row + (head * shape.batch + b) * 2 * length
                    keys.append(memory[first : first + wanted].double())
                    values.append(memory[first + length : first + length + wanted].double())
                scores = q[b, :q_len, h].double() @ torch.cat(keys).T * scale
                out[b, :q_len, h] = (scores.softmax(-1) @ torch.cat(values)).to(q.dtype)
                lse[b, h, :q_len] = scores.logsumexp(-1).float()
                if failed:
                    out[b, :q_len, h] = float("nan")

    def _await(self, layout: Layout, t: int, head: int, epoch: int, timeout: float) -> bool:
        """Whether a head has arrived in time; if not, the error words say so."""
        flag = layout.flags[t, head // layout.place.shape.heads_per_flag]
        end = time.monotonic() + timeout
        while int(flag) - epoch < 0:
            if time.monotonic() > end:
                self._error[1:] = torch.tensor([epoch, int(flag), head], dtype=torch.int32)
                self._error[0] = 1 + t
                return False
            time.sleep(1e-5)
        return True


class FakePeer(FakeDevice, PeerTransport):
    """`peer`, its symmetric memory shared memory."""

    _symmetric: SharedMemory | None = None

    def _allocate(self, capacity: int) -> Tensor:
        size = (1 + self.world) * capacity
        self._symmetric = SharedMemory(self.group, self.world * size, "arenas")
        self._bases = [self._symmetric.address + rank * size for rank in range(self.world)]
        return self._symmetric.bytes[self.rank * size : (self.rank + 1) * size]

    def _release(self) -> None:
        self._arena.fill_(GONE)
        self._symmetric = None
        self._bases = []
        self._arena = torch.empty(0, dtype=torch.uint8)


class FakeHost(FakeDevice, HostTransport):
    """`host`: its shared memory is what it is."""


FAKES: dict[str, type[FakeDevice]] = {"peer": FakePeer, "host": FakeHost}
