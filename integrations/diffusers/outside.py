"""Attention that compiled code calls without looking into it, because it is found out only then what it does.

Where a sequence is spread over ranks, attention waits for other processes: nothing that a graph could hold, or should,
since the ranks and their mesh may change while the graph stays. So a graph holds the one operator of this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from para_kernels.sources import Unprepared, as_they_are

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q, k, v (B, S, H, D) and the lengths (B,) of the whole sequence, None for full ones: to out (B, S, H, D)."""
AttendUnprepared = Callable[[Unprepared, Tensor | None], Tensor]
"""The same of what q, k and v are still to be made of."""

_library = torch.library.Library("para_kernels", "FRAGMENT")
_library.define(
    "attend_outside(Tensor(a!) ticket, bool video, Tensor[] projections, Tensor?[] weights, Tensor?[] biases,"
    " int[] norms, float[] eps, Tensor?[] cos, Tensor?[] sin, bool half, Tensor? value, Tensor? lens) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Outside:
    """Two functions of attention, each of which compiled code calls through the operator.

    The graph is given a ticket, a tensor on the CPU with the number under which this object is known: as a value and
    not a constant, so that one graph serves every transformer of its kind. To the graph each call writes to the
    ticket. That keeps calls in their order: ranks that talk in another order than others would wait for ever.

    Args:
        joint: over the joint sequence.
        video: over the video alone.
    """

    def __init__(self, joint: AttendUnprepared, video: AttendUnprepared) -> None:
        number = next(_numbers)
        self.ticket = torch.tensor([number])
        self.joint = AttendOutside(self, joint, False)
        self.video = AttendOutside(self, video, True)
        _known[number] = self


_numbers = count()
_known: WeakValueDictionary[int, Outside] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class AttendOutside:
    """An `Attend`, which lets what it calls prepare its input."""

    outside: Outside
    attend: AttendUnprepared
    video: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lens: Tensor | None) -> Tensor:
        return self.unprepared(as_they_are(q, k, v), lens)

    def unprepared(self, streams: Unprepared, lens: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.para_kernels.attend_outside.default(self.outside.ticket, self.video, *streams, lens)
        return self.attend(streams, lens)


@torch.library.register_fake("para_kernels::attend_outside", lib=_library)
def _attend_outside_fake(ticket: Tensor, video: bool, *arguments: Any) -> Tensor:
    return _streams(arguments).new_result()


def _attend_outside(ticket: Tensor, video: bool, *arguments: Any) -> Tensor:
    outside = _known[int(ticket)]
    function = outside.video if video else outside.joint
    return function.unprepared(_streams(arguments), arguments[-1]).contiguous()


def _streams(arguments: tuple[Any, ...]) -> Unprepared:
    return Unprepared(*arguments[:-1])


for _device in ("CPU", "CUDA"):
    _library.impl("attend_outside", _attend_outside, _device)
