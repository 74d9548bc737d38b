"""What attention's queries, keys and values can still be made of, by whoever has memory of his own for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from para_kernels import ops

_prepare = torch.ops.para_kernels.prepare.default


class Source(Protocol):
    """What queries, keys and values can still be made of: in new memory, or where somebody wants them."""

    def prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (B, S, H, D)."""
        ...

    def write_keys(self, k: Tensor, v: Tensor) -> None:
        """Write keys and values, in the current stream, to memory in which a head's rows lie one behind the other; both
        have the same strides.
        """
        ...

    def write_queries(self, q: Tensor) -> None:
        """Write the queries, likewise."""
        ...


class Unprepared(NamedTuple):
    """What queries, keys and values will be made of, checked: a `Source`, for whoever has memory of his own for them.

    Made by `para_kernels.preparation.unprepared`. All up to `half` is what the operator `prepare` takes: one entry for
    each projection of a stream, of each stream in turn; `cos` and `sin` one for each stream.
    """

    projections: list[Tensor]
    weights: list[Tensor | None]
    biases: list[Tensor | None]
    norms: list[int]
    eps: list[float]
    cos: list[Tensor | None]
    sin: list[Tensor | None]
    half: bool
    value: Tensor | None = None

    def prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `prepare_attention`; what nothing is to be done to is returned as it is."""
        if self.is_prepared:
            assert self.value is not None
            return self.projections[0], self.projections[1], self.value
        return self.made()

    def made(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `prepare_attention`."""
        outputs = self.outputs()
        q, k, v = outputs if self.value is None else (*outputs, self.value)
        return q, k, v

    def outputs(self) -> list[Tensor]:
        """Of the operator: as many as a stream has projections."""
        return _prepare(*self._arguments)

    @property
    def _arguments(self) -> tuple[Any, ...]:
        """The operator's."""
        return self[:-1]

    @property
    def is_prepared(self) -> bool:
        """Whether there is nothing to be done."""
        one_stream = self.value is not None and len(self.cos) == 1
        return one_stream and self.cos[0] is None and not any(self.norms)

    @torch.no_grad()  # as below an operator
    def write_keys(self, k: Tensor, v: Tensor) -> None:
        """Prepare keys and values into these. Joined values are copied."""
        ops.prepare_into([k, v], *self._with_values()._parts(1, 2)._arguments, first_part=1)

    @torch.no_grad()
    def write_queries(self, q: Tensor) -> None:
        """Prepare the queries into these."""
        ops.prepare_into([q], *self._parts(0)._arguments)

    @property
    def outline(self) -> Tensor:
        """Like the queries, the keys and the values, (B, sum of S, H, D), without memory for what is in them."""
        return self.projections[1].new_empty(self._shape[3]).expand(self._shape)

    def new_result(self) -> Tensor:
        """Memory for attention's output, (B, sum of S, H, D), contiguous."""
        return self.projections[1].new_empty(self._shape)

    @property
    def _each(self) -> int:
        """Projections of a stream."""
        return len(self.projections) // len(self.cos)

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        batch, _, heads, head_dim = self.projections[1].shape
        return batch, sum(x.shape[1] for x in self.projections[1 :: self._each]), heads, head_dim

    def _parts(self, *which: int) -> Unprepared:
        """Some projections of each stream alone: 0 is of queries, 1 of keys, 2 of values."""

        def chosen(values: list[Any]) -> list[Any]:
            return [values[first + part] for first in range(0, len(values), self._each) for part in which]

        return self._replace(
            projections=chosen(self.projections), weights=chosen(self.weights), biases=chosen(self.biases),
            norms=chosen(self.norms), eps=chosen(self.eps),
        )  # fmt: skip

    @property
    def tensors(self) -> list[Tensor | None]:
        """All that is in it, None where there is none."""
        return [*self.projections, *self.weights, *self.biases, *self.cos, *self.sin, self.value]

    def without_tensors(self) -> Unprepared:
        """What is left for `with_tensors`, which keeps no memory from others."""
        return self.with_tensors([None] * len(self.tensors))

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Unprepared:
        """The same of other tensors, in the order of `tensors`."""
        left = iter(tensors)
        lists = [
            [next(left) for _ in mine] for mine in (self.projections, self.weights, self.biases, self.cos, self.sin)
        ]
        projections, weights, biases, cos, sin = lists
        return self._replace(
            projections=projections, weights=weights, biases=biases, cos=cos, sin=sin, value=next(left)
        )  # fmt: skip

    def _with_values(self) -> Unprepared:
        """Each stream with its part of the joined values."""
        if self.value is None:
            return self
        rows = self.value.split([x.shape[1] for x in self.projections[::2]], dim=1)

        def behind_keys(of_projections: list[Any], of_values: Sequence[Any]) -> list[Any]:
            pairs = zip(of_projections[::2], of_projections[1::2], of_values, strict=True)
            return [x for of_stream in pairs for x in of_stream]

        none = [None] * len(rows)
        return Unprepared(
            behind_keys(self.projections, rows), behind_keys(self.weights, none), behind_keys(self.biases, none),
            behind_keys(self.norms, [0] * len(rows)), behind_keys(self.eps, [0.0] * len(rows)), self.cos, self.sin,
            self.half,
        )  # fmt: skip


def as_they_are(q: Tensor, k: Tensor, v: Tensor) -> Unprepared:
    """Queries, keys and values (B, S, H, D) to which nothing is to be done."""
    none: list[Tensor | None] = [None, None]
    return Unprepared([q, k], none, none, [0, 0], [0.0, 0.0], [None], [None], False, v)
