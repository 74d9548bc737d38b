"""First Block Cache on a transformer's blocks: the first one decides whether the others run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from para_kernels.cache import CacheState, FirstBlockCache, StepRecord

from .hooks import Argument, BranchName, add_hook
from .models import Family
from .parallel import Spread

_HOOK = "para_kernels.first_block_cache"


class BlockCache:
    """Shared by the block hooks of one transformer: the policy, a state per branch, the running forward's decision.

    Attributes:
        spread: where forwards are spread over ranks, None where they are not. All ranks then decide alike.
    """

    def __init__(self, policy: FirstBlockCache, family: Family, branch: BranchName) -> None:
        self.policy = policy
        self.family = family
        self.branch = branch
        self.spread: Spread | None = None
        self.states: dict[str, CacheState] = {}
        self.end_forward()

    def retune(self, policy: FirstBlockCache) -> None:
        """Go on with another policy and no memory."""
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        """A call has begun or ended: nothing of it may be reused in another one, and its tensors are freed."""
        self.states.clear()
        self.end_forward()

    def begin_forward(self) -> None:
        """A forward of the transformer begins: no decision yet, blocks run."""
        self.end_forward()
        self.running = True

    def end_forward(self) -> None:
        """The forward is over. A block that is called by itself from here on just runs."""
        self.running = False
        self.decision: StepRecord | None = None
        self._first: dict[str, Tensor] = {}

    @property
    def reusing(self) -> bool:
        """Whether the running forward skips the blocks after the first one."""
        return self.decision is not None and self.decision.reused

    def after_first_block(self, hidden_in: Tensor, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decide; on a hit return the streams as the last block would have left them."""
        video = self.family.block_arguments[0]
        state = self._state()
        self.decision = self._decide(state, hidden_in, streams[video])
        kept = {name: streams[name] for name in self.family.reused_streams}
        if self.decision.reused:
            return streams | dict(zip(kept, state.reuse(tuple(kept.values())), strict=True))
        self._first = kept
        return streams

    def after_last_block(self, streams: dict[str, Tensor]) -> None:
        """On a miss: remember what the blocks after the first one added."""
        first, self._first = self._first, {}
        self._state().remember(tuple(first.values()), tuple(streams[name] for name in first))

    def _decide(self, state: CacheState, hidden_in: Tensor, hidden_out: Tensor) -> StepRecord:
        spread = self.spread
        if spread is None:
            return state.decide(hidden_in, hidden_out)
        return state.decide(
            hidden_in, hidden_out, reduce=spread.reduce, first_token=spread.first_token, whole=spread.whole
        )

    def _state(self) -> CacheState:
        name = self.branch.name
        if name not in self.states:
            self.states[name] = self.policy.new_state(name)
        return self.states[name]


class _BlockHook(ModelHook):
    """A hook that stands in for a block's forward; knows the block's streams by name."""

    fn_ref: Any  # The registry's reference to the forward that this hook replaces.

    def __init__(self, cache: BlockCache, block: nn.Module) -> None:
        super().__init__()
        self._cache = cache
        self._arguments = [Argument.of(block, name) for name in cache.family.block_arguments]

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        output = self.fn_ref.original_forward(*args, **kwargs)
        names = self._cache.family.block_returns
        streams = dict(zip(names, output if isinstance(output, tuple) else (output,), strict=True))
        return streams if self._cache.spread is None else self._cache.spread.recut(streams)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return {argument.name: argument.get(args, kwargs) for argument in self._arguments}

    def _returned(self, streams: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        names = self._cache.family.block_returns
        return streams[names[0]] if len(names) == 1 else tuple(streams[name] for name in names)


class FirstBlockHook(_BlockHook):
    """Runs the first block and decides about the others."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._cache.running:
            return self.fn_ref.original_forward(*args, **kwargs)
        hidden_in = self._arguments[0].get(args, kwargs)
        return self._returned(self._cache.after_first_block(hidden_in, self._run(args, kwargs)))


class MiddleBlockHook(_BlockHook):
    """Hands the streams through on a hit."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._cache.reusing:
            return self._returned(self._given(args, kwargs))
        return self.fn_ref.original_forward(*args, **kwargs)


class LastBlockHook(_BlockHook):
    """Hands the streams through on a hit, and on a miss has them remembered."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._cache.reusing:
            return self._returned(self._given(args, kwargs))
        if not self._cache.running:
            return self.fn_ref.original_forward(*args, **kwargs)
        streams = self._run(args, kwargs)
        self._cache.after_last_block(streams)
        return self._returned(streams)


def transformer_blocks(transformer: nn.Module, family: Family) -> list[nn.Module]:
    """Every block, in the order in which they run."""
    return [block for name in family.block_lists for block in getattr(transformer, name)]


def add_cache_hooks(undo: ExitStack, cache: BlockCache, blocks: list[nn.Module]) -> None:
    """Put the cache under two or more blocks; closing `undo` takes it off again."""
    first, *middle, last = blocks
    add_hook(undo, first, FirstBlockHook(cache, first), _HOOK)
    for block in middle:
        add_hook(undo, block, MiddleBlockHook(cache, block), _HOOK)
    add_hook(undo, last, LastBlockHook(cache, last), _HOOK)
