"""A function recorded as CUDA graphs, and as calls between them that no graph may hold.

What waits for other processes, or for words that change from call to call, cannot be part of a graph. Such a call is
made by `outside`: while a function is being recorded, the graph ends there, the call runs as always, and the next graph
begins. A replay goes through the same list; of the function's own Python nothing runs but those calls.

All graphs of a recording share one pool of memory, which holds for a replay because the order is always that of the
recording. The calls between are given the addresses that the recording's tensors had.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from para_kernels import ops

R = TypeVar("R")


class Graph(Protocol):
    """Work of a device that can be enqueued again, on the same memory."""

    def replay(self) -> object:
        """Enqueue it in the current stream."""
        ...


class Capture(Protocol):
    """Makes graphs, one after the other, that share their memory."""

    def around(self) -> contextlib.AbstractContextManager[None]:
        """Where a recording runs, and calls that prepare for one."""
        ...

    def begin(self) -> None:
        """What is enqueued from here on becomes part of a graph and does not run."""
        ...

    def end(self) -> Graph:
        """The graph of what was enqueued since `begin`."""
        ...

    def abandon(self) -> None:
        """End without a graph, if one has been begun."""
        ...

    def borrowed(self, tensor: Tensor) -> Tensor:
        """The same memory, which in a replay is there when it is needed, without keeping it from others."""
        ...


class CudaCapture:
    """Graphs of one GPU, recorded in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._device_index = torch.cuda.current_device() if device.index is None else device.index
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """In the stream of the recordings, ordered after and before the current one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that watch over ranks, go on calling CUDA meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        graph, self._graph = self._graph, None
        assert graph is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")  # between two calls outside
            graph.capture_end()
        return graph

    def abandon(self) -> None:
        graph, self._graph = self._graph, None
        if graph is None:
            return
        try:
            graph.capture_end()
        except RuntimeError:  # The error that ended the capture once more, before the allocator was told of its end.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device_index, self._pool)
                torch._C._cuda_releasePool(self._device_index, self._pool)

    def borrowed(self, tensor: Tensor) -> Tensor:
        assert ops._C is not None
        extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        flat = ops._C.view_of_memory(tensor.data_ptr(), [extent if tensor.numel() else 0], tensor.dtype, tensor.device)
        return flat.as_strided(tensor.shape, tensor.stride())


def capture_for(device: torch.device) -> Capture | None:
    """What records on `device`; None where nothing can, or somebody else is capturing already."""
    if device.type != "cuda" or ops._C is None or not hasattr(ops._C, "view_of_memory"):
        return None
    return None if torch.cuda.is_current_stream_capturing() else CudaCapture(device)


class Recorded:
    """What a function did, to be done again on the memory that it had.

    Attributes:
        graphs, calls: how many graphs there are, and calls between them; of a recording that failed, until then.
    """

    def __init__(self) -> None:
        self.graphs = self.calls = 0
        self._steps: list[Callable[[], object]] = []

    def record(self, function: Callable[[], R], capture: Capture) -> R:
        """Run `function` and record it. The result is real, and the next replay overwrites it.

        Raises:
            RuntimeError: if it does what no graph can hold, as waiting for the device. It may have run in part.
        """
        recording = _Recording(self, capture)
        with capture.around(), _active(recording), _no_garbage_collected():
            try:
                capture.begin()
                result = function()
                recording.end_graph()
            except BaseException:
                capture.abandon()
                raise
        return result

    def replay(self) -> None:
        """Enqueue everything again in the current stream."""
        for step in self._steps:
            step()

    def add_graph(self, graph: Graph) -> None:
        self.graphs += 1
        self._steps.append(graph.replay)

    def add_call(self, call: Callable[[], object]) -> None:
        self.calls += 1
        self._steps.append(call)


def outside(function: Callable[..., Tensor], *inputs: Tensor | None, out: Callable[[], Tensor]) -> Tensor:
    """`function(*inputs, None)`, which is not to become part of a graph.

    Args:
        function: anything that enqueues its work in the current stream; called again for every replay. Its last
            argument is where it may write its result, None for memory of its own.
        inputs: what it reads, None for what there is not.
        out: makes a tensor like the result. In a recording it is what the function is given, and a result that it
            returns in other memory is copied into it.
    """
    recording: _Recording | None = getattr(_here, "recording", None)
    return function(*inputs, None) if recording is None else recording.outside(function, inputs, out())


_here = threading.local()


class _Recording:
    def __init__(self, recorded: Recorded, capture: Capture) -> None:
        self._recorded = recorded
        self._capture = capture

    def end_graph(self) -> None:
        """Of what has been captured, which then runs."""
        graph = self._capture.end()
        self._recorded.add_graph(graph)
        graph.replay()

    def outside(self, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], out: Tensor) -> Tensor:
        borrowed = self._capture.borrowed
        call = _CallOutside(function, tuple(None if x is None else borrowed(x) for x in inputs), borrowed(out))
        self.end_graph()
        self._recorded.add_call(call)
        with _active(None):
            call()
        self._capture.begin()
        return out


class _CallOutside:
    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], out: Tensor) -> None:
        self._function, self._inputs, self._out = function, inputs, out

    def __call__(self) -> None:
        result = self._function(*self._inputs, self._out)
        if result is not self._out:
            self._out.copy_(result)


@contextlib.contextmanager
def _active(recording: _Recording | None) -> Iterator[None]:
    before: Any = getattr(_here, "recording", None)
    _here.recording = recording
    try:
        yield
    finally:
        _here.recording = before


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """A graph, or memory of another pool, that is let go of during a capture would end it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
