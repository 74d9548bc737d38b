"""A transformer's forward as CUDA graphs: the device is given whole forwards, and no longer waits for Python.

What is recorded stands below every hook, in the place of the class's own forward. The first forward with shapes that
are new runs as always, the second is recorded, those after it are replays. Over ranks, attention and the gathering at
the end stay calls between the graphs (`para_kernels.graphs`).
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from para_kernels.graphs import Capture, Recorded, capture_for
from para_kernels.parallel.failure import RankFailure

from .attention import AttentionLengths
from .own_forward import Forward, replace_own_forward

_KEPT = 4  # recordings, each with memory of its own: the sizes and passes of one pipeline
_SEEN = 64  # calls that have run once
_IN_VAIN = 2  # recordings of which none was replayed, until no more are made
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)

logger = logging.getLogger(__name__)


@dataclass
class _Call:
    """The arguments of a forward: tensors, and all that the graphs of one forward have in common.

    Attributes:
        tensors: in the order in which they are found; the last one is the text's lengths, if there are any.
        key: the same for calls that one recording serves.
    """

    tensors: list[Tensor]
    key: Hashable
    spec: pytree.TreeSpec
    plain: tuple[Any, ...]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
        """args, kwargs and the text's lengths of this call, with `tensors` in the place of its own."""
        left = iter(tensors)
        leaves = [next(left) if plain is _TENSOR else plain for plain in self.plain]
        return pytree.tree_unflatten(leaves, self.spec)


_TENSOR = object()


@dataclass
class _Forward:
    """A recorded forward and the memory that it reads and writes."""

    recorded: Recorded
    inputs: list[Tensor]
    outputs: list[Any]
    spec: pytree.TreeSpec
    replays: int = 0

    def run(self, tensors: Sequence[Tensor]) -> Any:
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.recorded.replay()
        self.replays += 1
        return self.output()

    def output(self) -> Any:
        """The results, in memory of their own: the next replay overwrites the graph's."""
        return pytree.tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.outputs], self.spec)


class ForwardGraphs:
    """The recordings of one transformer's forward.

    Args:
        lengths: what the attention processors read.
        place: on which ranks the running forward runs, and with what beside its arguments.

    Attributes:
        forwards: the recorded ones, the one used last at the end.
        obstacle: why nothing is recorded; None if something is, or can be.
    """

    def __init__(self, transformer: nn.Module, lengths: AttentionLengths, place: Callable[[], Hashable]) -> None:
        self.forwards: OrderedDict[Hashable, _Forward] = OrderedDict()
        self.obstacle: str | None = None
        self._transformer = transformer
        self._lengths = lengths
        self._place = place
        self._seen: OrderedDict[Hashable, Capture] = OrderedDict()
        self._weights: tuple[int, ...] = ()
        self._in_vain = 0

    def add_to(self, undo: ExitStack) -> None:
        """Put the graphs in the place of the transformer's own forward; closing `undo` takes them off again."""
        undo.callback(self.clear)
        replace_own_forward(undo, self._transformer, functools.partial(GraphedForward, self))

    def clear(self) -> None:
        """Forget everything: what is recorded holds for settings and weights of its time."""
        self.forwards.clear()
        self._seen.clear()
        self.obstacle = None
        self._in_vain = 0

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward, as graphs if it can be."""
        call = None if self.obstacle else self._call(args, kwargs)
        if call is None:
            return forward(*args, **kwargs)
        self._forget_moved_weights()
        if call.key in self.forwards:
            self.forwards.move_to_end(call.key)
            return self.forwards[call.key].run(call.tensors)
        if call.key in self._seen:
            return self._recorded(forward, call, args, kwargs)
        capture = capture_for(call.tensors[0].device)
        if capture is None:
            return forward(*args, **kwargs)
        # Compiling, choices that are made once and the workspaces of libraries do not belong into a graph.
        with capture.around():
            output = forward(*args, **kwargs)
        self._seen[call.key] = capture
        _drop_oldest(self._seen, _SEEN)
        return output

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """None for what no graph can stand for: gradients, tensors elsewhere, arguments that are not plain."""
        leaves, spec = pytree.tree_flatten((args, kwargs, self._lengths.of_text))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if torch.is_grad_enabled() or not tensors or any(x.device != tensors[0].device for x in tensors):
            return None
        if not all(leaf is _TENSOR or isinstance(leaf, _PLAIN) for leaf in plain):
            return None
        key = (self._place(), str(spec), plain, *((x.shape, x.stride(), x.dtype, x.device) for x in tensors))
        return _Call(tensors, key, spec, plain)

    def _recorded(self, forward: Forward, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        capture = self._seen.pop(call.key)
        inputs = [x.clone() for x in call.tensors]
        own_args, own_kwargs, of_text = call.arguments(inputs)
        given = self._lengths.of_text
        self._lengths.replace(of_text)
        _free_memory(inputs[0].device)
        recorded = Recorded()
        try:
            output = recorded.record(lambda: forward(*own_args, **own_kwargs), capture)
        except RankFailure:
            raise
        except RuntimeError as error:
            if recorded.calls:
                raise  # They would be made a second time, and other ranks made them once.
            self._give_up(f"the forward cannot be recorded: {str(error).splitlines()[0]}")
            self._lengths.replace(given)
            return forward(*args, **kwargs)
        outputs, spec = pytree.tree_flatten(output)
        self._weights = tuple(_addresses(self._transformer))
        self.forwards[call.key] = _Forward(recorded, inputs, outputs, spec)
        _drop_oldest(self.forwards, _KEPT)
        return self.forwards[call.key].output()

    def _forget_moved_weights(self) -> None:
        """Graphs hold the addresses of the weights."""
        if not self.forwards or tuple(_addresses(self._transformer)) == self._weights:
            return
        in_vain = 0 if any(known.replays for known in self.forwards.values()) else self._in_vain + 1
        self.clear()
        self._in_vain = in_vain
        if in_vain >= _IN_VAIN:
            self._give_up("the weights move from one forward to the next, as they do when they are offloaded")

    def _give_up(self, obstacle: str) -> None:
        self.clear()
        self.obstacle = obstacle
        logger.warning("graphs: %s; it runs without", obstacle)


class GraphedForward:
    """In the place of a transformer's own forward, `original`."""

    def __init__(self, graphs: ForwardGraphs, original: Forward) -> None:
        functools.update_wrapper(self, original)  # hooks ask a forward for its signature
        self._graphs = graphs
        self._original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._graphs.run(self._original, args, kwargs)


def _addresses(module: nn.Module) -> Iterator[int]:
    """Where all weights lie, also those of tensors that are made of others."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            yield from _addresses_of(tensor)


def _addresses_of(tensor: Any) -> Iterator[int]:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor.data_ptr()
    else:
        for name in inner()[0]:
            yield from _addresses_of(getattr(tensor, name))


def _free_memory(device: torch.device) -> None:
    """Graphs have memory of their own: what the forward before it left in the allocator's hands is needed there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _drop_oldest(entries: OrderedDict[Hashable, Any], kept: int) -> None:
    while len(entries) > kept:
        entries.popitem(last=False)
