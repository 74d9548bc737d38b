"""A function recorded as CUDA graphs, and as calls between them that no graph may hold.

What waits for other processes, or for words that change from call to call, cannot be part of a graph. Such a call is
made by `outside`: while a function is being recorded, the graph ends there, the call runs as always, and the next graph
begins. A replay goes through the same list; of the function's own Python nothing runs but those calls.

A part of the function may be left out at some times and not at others, as a cache of steps does it. It lies between
`leave_out`, which asks on the host, and `rejoin`; where it is left out, `instead` makes what it would have made. A
recording of a run with the part serves both; one of a run without it serves until the part is to run.

All graphs of a recording share one pool of memory, which holds for a replay because the order is always that of the
recording, and a part that is left out changes nothing of what was made before it. The calls between are given the
addresses that the recording's tensors had.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
    """Makes graphs, one after the other; those of one recording share their memory."""

    def around(self) -> contextlib.AbstractContextManager[None]:
        """Where a recording runs, or calls that prepare for one."""
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
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """In the stream of the recordings, ordered after and before the current one."""
        self._pool = torch.cuda.graph_pool_handle()  # one that is empty cannot be taken up again
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
        graph = self._graph
        assert graph is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")  # between two calls outside
            graph.capture_end()
        self._graph = None  # not before: a capture that cannot be ended is one to abandon
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
        graphs, calls, parts: how many graphs there are, calls between them that `outside` made, and parts that may be
            left out; of a recording that failed, until then.
        has_parts: whether the parts are in the recording, which else serves while they are left out.
        is_whole: whether it can be replayed: every part has an end.
        is_repeatable: of a recording that failed, whether the function may be run once more: nothing was made outside.
    """

    def __init__(self) -> None:
        self.graphs = self.calls = self.parts = 0
        self.has_parts = self.is_repeatable = True
        self.is_whole = False
        self._steps: _Steps = []

    def record(self, function: Callable[[], R], capture: Capture, made: Sequence[Tensor] = ()) -> R:
        """Run `function` and record it. The result is real, and the next replay overwrites it.

        Args:
            made: what its first calls of `outside` have made already, in the replay that asks for this recording. They
                are not made again: to a call over ranks the others would not come.

        Raises:
            RuntimeError: if it does what no graph can hold, as waiting for the device. Some of it may have run.
        """
        self.is_repeatable = not made
        recording = _Recording(self, self._steps, capture, made)
        with capture.around(), _active(recording), _no_garbage_collected():
            try:
                capture.begin()
                result = function()
                self.is_whole = recording.finish()
            except BaseException:
                capture.abandon()
                raise
        return result

    def replay(self) -> list[Tensor] | None:
        """Enqueue everything again in the current stream.

        Returns:
            None; or, where a part is to run that was left out of the recording, what the calls outside have made until
            then. The rest is of no use: the function is to be recorded anew.
        """
        assert self.is_whole
        try:
            for step in self._steps:
                step()
        except _NotRecordedError:
            calls = (step for step in self._steps if isinstance(step, _CallOutside))
            return [call.made for call in calls if call.made is not None]
        return None


_Steps = list[Callable[[], object]]


def outside(function: Callable[..., Tensor], *inputs: Tensor | None, out: Callable[[], Tensor]) -> Tensor:
    """`function(*inputs, None)`, which is not to become part of a graph.

    Args:
        function: anything that enqueues its work in the current stream; called again for every replay. Its last
            argument is where it may write its result, None for memory of its own.
        inputs: what it reads, None for what there is not.
        out: makes a tensor like the result. In a recording it is what the function is given, and a result that it
            returns in other memory is copied into it.
    """
    recording = _running()
    return function(*inputs, None) if recording is None else recording.outside(function, inputs, out())


def leave_out(decide: Callable[..., bool], *inputs: Tensor | None) -> bool:
    """Whether what follows, up to `rejoin`, is left out: `decide(*inputs)`, which may wait for the device.

    Every replay asks again. Parts do not lie in each other.

    Args:
        decide: may keep what it makes of its inputs, and not the inputs: the next replay overwrites them.
    """
    recording = _running()
    return decide(*inputs) if recording is None else recording.leave_out(decide, inputs)


Streams = Sequence[Tensor]


def instead(make: Callable[[Streams], Streams], before: Streams) -> Streams:
    """What stands for what a part would have made that is left out: `make(before)`, which is not to become part of a
    graph. Like `before` in shapes and dtypes.

    Args:
        make: called again by every replay that leaves the part out. It changes nothing.
    """
    recording = _running()
    return make(before) if recording is None else recording.instead(make, before)


def rejoin(
    ran: Callable[[Streams, Streams], object], make: Callable[[Streams], Streams], before: Streams, after: Streams
) -> None:
    """End a part that was not left out: `ran(before, after)`, which is not to become part of a graph.

    Args:
        ran: may keep what it makes of its inputs, and not the inputs.
        make: as for `instead`, for replays that leave the part out.
        before, after: what was there before the part, and what is after it. They may lie in the same memory.
    """
    recording = _running()
    if recording is None:
        ran(before, after)
    else:
        recording.rejoin(ran, make, before, after)


_here = threading.local()


def _running() -> _Recording | None:
    recording: _Recording | None = getattr(_here, "recording", None)
    return recording


class _Recording:
    """A function is being recorded: where its steps go."""

    def __init__(self, recorded: Recorded, steps: _Steps, capture: Capture, made: Sequence[Tensor]) -> None:
        self._recorded = recorded
        self._steps = self._outer_steps = steps
        self._capture = capture
        self._made = deque(made)
        self._part: _Part | None = None

    def finish(self) -> bool:
        """The function has returned. Returns whether every part has an end."""
        self._end_graph()
        return self._part is None

    def outside(self, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], out: Tensor) -> Tensor:
        call = _CallOutside(function, self._borrowed(inputs), self._capture.borrowed(out))
        with self._between():
            self._recorded.calls += 1
            self._recorded.is_repeatable = False
            self._steps.append(call)
            if self._made:
                out.copy_(self._made.popleft())
            else:
                call()
        return out

    def leave_out(self, decide: Callable[..., bool], inputs: tuple[Tensor | None, ...]) -> bool:
        assert self._part is None, "parts do not lie in each other"
        self._part = part = _Part(partial(decide, *self._borrowed(inputs)))
        with self._between():
            self._recorded.parts += 1
            left_out = part.is_left_out()
            if not left_out:
                self._steps.append(part)
                self._steps = part.steps = []
        return left_out

    def instead(self, make: Callable[[Streams], Streams], before: Streams) -> Streams:
        after = [torch.empty_like(x) for x in before]
        part = self._ended(make, before, after)
        with self._between():
            for call in self._steps:
                if isinstance(call, _CallOutside):
                    call.keeps = True
            self._recorded.has_parts = False
            self._steps.append(part)  # behind the graph in which there came to be memory for `after`
            part.instead()
        return after

    def rejoin(
        self,
        ran: Callable[[Streams, Streams], object],
        make: Callable[[Streams], Streams],
        before: Streams,
        after: Streams,
    ) -> None:
        part = self._ended(make, before, after)
        part.ran = partial(ran, self._borrowed(before), self._borrowed(after))
        with self._between():
            self._steps = self._outer_steps
            part.ran()

    def _ended(self, make: Callable[[Streams], Streams], before: Streams, after: Streams) -> _Part:
        assert self._part is not None, "a part ends behind a leave_out()"
        part, self._part = self._part, None
        part.instead = _Made(make, self._borrowed(before), self._borrowed(after))
        return part

    @contextlib.contextmanager
    def _between(self) -> Iterator[None]:
        """Between two graphs. What fails here is no matter of recording."""
        self._end_graph()
        try:
            with _active(None):
                yield
        except BaseException:
            self._recorded.is_repeatable = False
            raise
        self._capture.begin()

    def _end_graph(self) -> None:
        """Of what has been captured, which then runs."""
        graph = self._capture.end()
        self._recorded.graphs += 1
        self._steps.append(graph.replay)
        graph.replay()

    def _borrowed(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return tuple(None if x is None else self._capture.borrowed(x) for x in tensors)


@dataclass
class _Part:
    """Steps of a replay that it may leave out.

    Attributes:
        steps: None where the recording has left them out, and until it is known whether it does.
    """

    is_left_out: Callable[[], bool]
    steps: _Steps | None = None
    ran: Callable[[], object] = lambda: None
    instead: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        if self.is_left_out():
            self.instead()
            return
        if self.steps is None:
            raise _NotRecordedError
        for step in self.steps:
            step()
        self.ran()


class _NotRecordedError(Exception):
    """A part is to run that was left out of the recording."""


class _Made:
    """In a replay `after` is what is made of `before`."""

    def __init__(self, make: Callable[[Streams], Streams], before: Streams, after: Streams) -> None:
        self._make, self._before, self._after = make, before, after

    def __call__(self) -> None:
        # All of it is made before any of it is written: it may lie where `before` does.
        for mine, made in zip(self._after, self._make(self._before), strict=True):
            mine.copy_(made)


class _CallOutside:
    """A call between two graphs.

    Attributes:
        keeps: whether what it makes is kept, in `made`: graphs behind it may overwrite it, and it may be asked for.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], out: Tensor) -> None:
        self._function, self._inputs, self._out = function, inputs, out
        self.keeps = False
        self.made: Tensor | None = None

    def __call__(self) -> None:
        result = self._function(*self._inputs, self._out)
        if result is not self._out:
            self._out.copy_(result)
        if self.keeps:
            self.made = self._out.clone()


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
