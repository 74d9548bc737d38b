"""What the timestep alone decides, shared out over ranks: each makes a part of it, and all get the whole at once.

In every block a linear makes shifts, scales and gates of one vector (adaptive layer norm: Peebles and Xie 2023, arXiv
2212.09748, section 3.2). That vector is the same for all rows, so ranks that share out rows would all do all of it: for
FLUX.1-dev read 6.4 GB of its 24 GB of weights, 2.4 ms of a step of 75 on two H200s. Here they share out the linears
instead, at the start of the forward, when the vector is known, and gather what comes out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from para_kernels.graphs import outside
from para_kernels.parallel.collective import gather_rows
from para_kernels.parallel.sharding import Shards

from .attention import AttentionLengths
from .compiled import hook_of, laid_out
from .hooks import Argument
from .models import Conditioning
from .own_forward import replace_own_forward
from .parallel import Spread

# Elements before the first part: compiled code holds a part that begins at 0, or at what happens to be its size, for a
# case of its own. A multiple of 16 bytes.
_APART = 8


@dataclass(frozen=True, eq=False)
class _Linear:
    """One of a block's linears.

    Attributes:
        name: its path in the block.
        forward: what takes the place of its own forward, given it and its input. All linears of a name have the same
            function, bound to each: compiled code would else be compiled anew for each.
    """

    module: Any
    block: nn.Module
    name: str
    forward: Callable[[Any, Tensor], Tensor]

    @property
    def is_plain(self) -> bool:
        """Whether it does nothing but multiply what it is given by its weight, and the weight is there before a hook of
        its block's loads it.
        """
        linear = self.module
        return (
            type(linear) is nn.Linear
            and type(linear.weight) is nn.Parameter
            and not linear._forward_pre_hooks
            and getattr(linear.__dict__.get("forward"), "__func__", None) is self.forward
            and hook_of(self.block) is None
        )

    def fits(self, vector: Tensor) -> bool:
        """Whether its weight lies where the vector does, and is like it."""
        weight = self.module.weight
        return weight.device == vector.device and weight.dtype == vector.dtype


class SharedConditioning:
    """Of one transformer whose forwards `spread` spreads over ranks.

    While a forward runs for which all is made, the linears' own forwards return what `lengths` holds for the running
    block, if that was given the very vector: so compiled blocks are told too. Where, on any rank, one of the linears is
    not a plain one, each rank makes all. Blocks have to run one after the other: a cache would leave most of what was
    made unused.

    Args:
        lengths: what the blocks read.
    """

    def __init__(
        self,
        transformer: nn.Module,
        blocks: Sequence[nn.Module],
        where: Conditioning,
        spread: Spread,
        lengths: AttentionLengths,
    ) -> None:
        self._transformer = transformer
        self._embedder = transformer.get_submodule(where.embedder)
        self._arguments = {block: Argument.of(block, where.argument) for block in blocks}
        forwards = {name: _made_or_own(lengths, name) for name in where.linears}
        self._linears = [
            _Linear(module, block, name, forwards[name])
            for block in blocks
            for name in where.linears
            if (module := _submodule(block, name)) is not None
        ]
        self._spread = spread
        self._lengths = lengths
        self._listening: dict[nn.Module, RemovableHandle] = {}
        self._vector: Tensor | None = None
        self._made: dict[nn.Module, dict[str, Tensor]] = {}

    def add_hooks(self, undo: ExitStack) -> None:
        """Listen to the modules; closing `undo` ends that."""
        self._lengths.modulations = {}
        undo.callback(self._end)
        undo.callback(self._embedder.register_forward_hook(self._make).remove)
        for block in self._arguments:
            self._listening[block] = block.register_forward_pre_hook(self._hand_over, with_kwargs=True)
            undo.callback(self._listening[block].remove)
        for linear in self._linears:
            bound = MethodType(linear.forward, linear.module)
            replace_own_forward(undo, linear.module, lambda original, bound=bound: bound)  # type: ignore[misc]
        undo.callback(self._transformer.register_forward_hook(self._forget, always_call=True).remove)
        self._spread.can_share = self._can_share

    def _end(self) -> None:
        self._spread.can_share = None
        self._vector, self._made, self._lengths.modulations = None, {}, None

    def _can_share(self) -> bool:
        """What all ranks are asked before a call's first forward: one that went another way would leave the others."""
        # What a block's hook behind this one's does to the vector would not be seen.
        comes_last = (next(reversed(block._forward_pre_hooks)) == known.id for block, known in self._listening.items())
        return all(comes_last) and all(linear.is_plain for linear in self._linears)

    @torch._disable_dynamo
    def _make(self, module: nn.Module, args: Any, vector: Any) -> None:
        self._vector, self._made, self._lengths.modulations = None, {}, {}
        place = self._spread.place
        if place is None or place.pieces == 1 or not self._spread.shares or torch.is_grad_enabled():
            return
        if not isinstance(vector, Tensor) or vector.ndim != 2 or torch.is_autocast_enabled(vector.device.type):
            return
        if not all(linear.fits(vector) for linear in self._linears):
            return
        sizes = [linear.module.out_features for linear in self._linears]
        cuts = even_cuts(sizes, place.pieces)
        conditioning = nn.functional.silu(vector)
        own = [_own(linear.module, conditioning) for linear in self._linears[slice(*cuts[place.piece])]]
        mine = torch.cat(own, dim=1) if own else vector.new_empty((vector.shape[0], 0))
        shards = Shards(tuple(sum(sizes[slice(*cut)]) for cut in cuts))

        def gather(own: Tensor, out: Tensor | None) -> Tensor:
            return gather_rows(own, shards, place.sequence_group, dim=1, what="what the timestep decides")

        whole = outside(gather, mine, out=partial(vector.new_empty, (vector.shape[0], shards.total)))
        _, *parts = nn.functional.pad(whole, (_APART, 0)).split([_APART, *sizes], dim=1)
        for linear, made in zip(self._linears, parts, strict=True):
            self._made.setdefault(linear.block, {})[linear.name] = laid_out(made)
        self._vector = vector

    @torch._disable_dynamo
    def _hand_over(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_meant = self._vector is not None and self._arguments[block].get(args, kwargs) is self._vector
        self._lengths.modulations = self._made.get(block, {}) if is_meant else {}

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        self._vector, self._made, self._lengths.modulations = None, {}, {}


def _made_or_own(lengths: AttentionLengths, name: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(linear: Any, conditioning: Tensor) -> Tensor:
        made = (lengths.modulations or {}).get(name)
        return _own(linear, conditioning) if made is None else made

    return forward


def _own(linear: Any, conditioning: Tensor) -> Tensor:
    """What a linear makes, past all hooks."""
    made: Tensor = type(linear).forward(linear, conditioning)
    return made


def even_cuts(sizes: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """(first, behind the last) of neighbours for each of `parts`, whose sums of `sizes` are about the same."""
    ends = list(accumulate(sizes, initial=0))
    borders = [bisect_left(ends, ends[-1] * part / parts) for part in range(parts + 1)]
    return list(pairwise(borders))


def _submodule(block: nn.Module, name: str) -> Any:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None
