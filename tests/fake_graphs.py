"""Graphs without a GPU: operators are noted while they run, and a replay runs them again on the memory that they had.

Before a replay runs its first graph, all memory of the recording is spoilt: nothing of an earlier replay may be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class FakeGraph:
    """Of a recording whose graphs make `made` altogether; `comes_first` of them in a replay."""

    def __init__(self, made: list[Tensor], comes_first: bool) -> None:
        self.operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.made = made
        self._comes_first = comes_first
        self._replays = 0

    def replay(self) -> None:
        self._replays += 1
        if self._comes_first and self._replays > 1:  # The recording itself replays each graph once.
            spoil(self.made)
        for operator, args, kwargs, outputs in self.operators:
            again = operator(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nwith more lines")
        given = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        self._graph.operators.append((func, args, kwargs or {}, outputs))
        tensors = (x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor))
        self._graph.made += [x for x in tensors if x.untyped_storage().data_ptr() not in given]
        return outputs


def spoil(tensors: list[Tensor]) -> None:
    """NaN, or 0 where there is none."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0)


class FakeCapture:
    """Of a `para_kernels.graphs.Capture`. Memory is kept: nothing here knows when it is needed again."""

    def __init__(self) -> None:
        self._noting: _Noting | None = None

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self._made: list[Tensor] = []
        self._is_first = True
        yield

    def begin(self) -> None:
        assert self._noting is None
        self._graph, self._is_first = FakeGraph(self._made, self._is_first), False
        self._noting = _Noting(self._graph)
        self._noting.__enter__()

    def end(self) -> FakeGraph:
        assert self._noting is not None
        self.abandon()
        return self._graph

    def abandon(self) -> None:
        noting, self._noting = self._noting, None
        if noting is not None:
            noting.__exit__(None, None, None)

    def borrowed(self, tensor: Tensor) -> Tensor:
        return tensor


def fake_capture_for(device: torch.device) -> FakeCapture:
    """In the place of `capture_for`."""
    return FakeCapture()
