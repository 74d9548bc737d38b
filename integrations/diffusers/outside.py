"""Attention that compiled code calls without looking into it, because it is found out only then what it does.

Where a sequence is spread over ranks, attention waits for other processes: nothing that a graph could hold, or should,
since the ranks and their mesh may change while the graph stays. So a graph holds the one operator of this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q, k, v (B, S, H, D) and the lengths (B,) of the whole sequence, None for full ones: to out (B, S, H, D)."""

_library = torch.library.Library("para_kernels", "FRAGMENT")
_library.define(
    "attend_outside(Tensor(a!) ticket, bool video, Tensor q, Tensor k, Tensor v, Tensor? lens) -> Tensor",
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

    def __init__(self, joint: Attend, video: Attend) -> None:
        number = next(_numbers)
        self.ticket = torch.tensor([number])
        self.joint: Attend = _Function(self, joint, False)
        self.video: Attend = _Function(self, video, True)
        _known[number] = self


_numbers = count()
_known: WeakValueDictionary[int, Outside] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class _Function:
    outside: Outside
    attend: Attend
    video: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lens: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.para_kernels.attend_outside.default(self.outside.ticket, self.video, q, k, v, lens)
        return self.attend(q, k, v, lens)


@torch.library.register_fake("para_kernels::attend_outside", lib=_library)
def _attend_outside_fake(ticket: Tensor, video: bool, q: Tensor, k: Tensor, v: Tensor, lens: Tensor | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _attend_outside(ticket: Tensor, video: bool, q: Tensor, k: Tensor, v: Tensor, lens: Tensor | None) -> Tensor:
    outside = _known[int(ticket)]
    function = outside.video if video else outside.joint
    return function(q, k, v, lens).contiguous()


for _device in ("CPU", "CUDA"):
    _library.impl("attend_outside", _attend_outside, _device)
