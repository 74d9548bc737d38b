"""Graphs without a GPU: operators are noted while they run, and a replay runs them again on the memory that they had."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class FakeGraph:
    def __init__(self) -> None:
        self.operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
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
        outputs = func(*args, **(kwargs or {}))
        self._graph.operators.append((func, args, kwargs or {}, outputs))
        return outputs


class FakeCapture:
    """Of a `para_kernels.graphs.Capture`. Memory is kept: nothing here knows when it is needed again."""

    def __init__(self) -> None:
        self._graph = FakeGraph()
        self._noting: _Noting | None = None

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        yield

    def begin(self) -> None:
        assert self._noting is None
        self._graph = FakeGraph()
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
