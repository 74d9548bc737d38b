"""A cache of steps on a transformer's blocks: its policy decides whether the blocks in the middle run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from para_kernels.cache import CacheState, Policy, StepRecord
from para_kernels.graphs import instead, leave_out, rejoin

from .attention import AttentionLengths
from .hooks import Argument, BranchName, add_hook, hook_again
from .models import Family, Modulation
from .offload import load_left_out
from .parallel import Spread

_HOOK = "para_kernels.block_cache"


class BlockCache:
    """Shared by the block hooks of one transformer: the policy, a state per branch, the running forward's decision.

    The policy's first and last blocks always run. Between them, `start` to `stop`, is what a reused step skips.

    Args:
        lengths: what the blocks read.
        count: of the blocks.
        joined: how many of them, at the end, take and return all streams in one.

    Attributes:
        spread: where forwards are spread over ranks, None where they are not. All ranks then decide alike.
        rows: how many rows of each stream are here, in the order in which attention joins them.
        hooks: of the blocks, in their order.
    """

    def __init__(
        self,
        policy: Policy,
        family: Family,
        branch: BranchName,
        lengths: AttentionLengths,
        count: int,
        joined: int = 0,
    ) -> None:
        self.family = family
        self.branch = branch
        self.spread: Spread | None = None
        self.states: dict[str, CacheState] = {}
        self.rows: dict[str, int] = {}
        self.hooks: list[BlockHook] = []
        self._lengths = lengths
        self._count = count
        self.joined = joined
        self.retune(policy)

    def retune(self, policy: Policy) -> None:
        """Go on with another policy and no memory."""
        self.policy = policy
        self.start, self.stop = policy.first_blocks, self._count - policy.last_blocks
        # Behind the last block nobody may need the text; a block does.
        self.reused = self.family.block_returns if policy.last_blocks else self.family.reused_streams
        self.reset()

    def reset(self) -> None:
        """A call has begun or ended: nothing of it may be reused in another one, and its tensors are freed."""
        self.states.clear()
        self.end_forward()

    def forget(self, branch: str) -> None:
        """The branch's next call has nothing to do with its earlier ones."""
        self.states.pop(branch, None)

    def begin_forward(self) -> None:
        """A forward of the transformer begins: no decision yet, blocks run."""
        self.end_forward()
        for hook in self.hooks:
            hook.mend()
        self.running = True

    def end_forward(self) -> None:
        """The forward is over. A block that is called by itself from here on just runs."""
        self.running = False
        self.decision: StepRecord | None = None
        self._hidden_in: Tensor | None = None
        self._modulated: Tensor | None = None
        self._before: dict[str, Tensor] = {}
        self._remembered = False

    @property
    def reusing(self) -> bool:
        """Whether the running forward skips blocks."""
        return self.decision is not None and self.decision.reused

    def skips(self, index: int) -> bool:
        """Whether block number `index` hands its streams through."""
        return self.reusing and self.start <= index < self.stop

    def enter(self, streams: dict[str, Tensor], modulated: Tensor | None) -> dict[str, Tensor]:
        """The first block is about to get `streams`: note them; where no block always runs, decide."""
        self._hidden_in, self._modulated = streams[self.family.block_arguments[0]], modulated
        self.rows = {name: streams[name].shape[1] for name in self.family.shards.sequence}
        return self._decided(streams) if self.start == 0 else streams

    def leave(self, index: int, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        """Block number `index` has run: decide after the last of the first ones; remember what was not skipped."""
        if index == self.start - 1:
            return self._decided(streams)
        if index == self.stop - 1:
            before, self._before = self._before, {}
            self._lengths.forget()
            rejoin(self._remember, self._reuse, tuple(before.values()), tuple(streams[name] for name in before))
        return streams

    def watches(self, index: int) -> bool:
        """Whether anything is to be done after block number `index`; not if the model has left out the first block."""
        if index == self.start - 1:
            return self._hidden_in is not None
        return index == self.stop - 1 and bool(self._before)

    def _decided(self, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        """On a hit the streams as the last of the skipped blocks would have left them."""
        hidden_in, modulated, hidden_out = self._hidden_in, self._modulated, streams[self.family.block_arguments[0]]
        assert hidden_in is not None
        self._hidden_in = self._modulated = None
        kept = {name: streams[name] for name in self.reused}
        if leave_out(partial(self._reuses, self._everywhere()), hidden_in, hidden_out, modulated):
            return streams | dict(zip(kept, instead(self._reuse, tuple(kept.values())), strict=True))
        if not self._remembered:
            self._before = kept
        return streams

    def _everywhere(self) -> dict[str, Any]:
        """What ranks need to decide alike: a replay runs no Python that would find it out."""
        spread = self.spread
        if spread is None:
            return {}
        return {"reduce": spread.reduce, "first_token": spread.first_token, "whole": spread.whole}

    # What follows runs between graphs where the forward is replayed. Where it is run once more, because it could not be
    # recorded or a part of it was not, what was decided and remembered stays.

    def _reuses(
        self, everywhere: dict[str, Any], hidden_in: Tensor, hidden_out: Tensor, modulated: Tensor | None
    ) -> bool:
        if self.decision is None:
            self.decision = self._state().decide(hidden_in, hidden_out, modulated=modulated, **everywhere)
        return self.decision.reused

    def _remember(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        self._state().remember(before, after)
        self._remembered = True

    def _reuse(self, before: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._state().reuse(before)

    def _state(self) -> CacheState:
        name = self.branch.name
        if name not in self.states:
            self.states[name] = self.policy.new_state(name)
        return self.states[name]


class BlockHook(ModelHook):
    """Stands in for the forward of one block; knows the block's streams by name."""

    fn_ref: Any  # The registry's reference to the forward that this hook replaces.

    def __init__(self, cache: BlockCache, block: nn.Module, index: int, joined: bool) -> None:
        super().__init__()
        self._cache = cache
        self._block = block
        self._index = index
        self._joined = joined
        names = cache.family.block_arguments
        self._arguments = [Argument.of(block, name) for name in (names[:1] if joined else names)]
        self._own: Any = None

    def mend(self) -> None:
        """Stand in for the forward again. Where a hook is removed that was registered before this one, as diffusers'
        offloading with a stream does with one of its own after the first forward, its registry has this one's forward
        replaced by the removed one's."""
        if hook_again(self._block, self, _HOOK) or self._own is None:
            self._own = self.fn_ref.forward
        elif self.fn_ref.forward is not self._own:
            self.fn_ref.original_forward, self.fn_ref.forward = self.fn_ref.forward, self._own

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache, index = self._cache, self._index
        if not cache.running:
            return self.fn_ref.original_forward(*args, **kwargs)
        entered = self._enter(module, args, kwargs) if index == 0 else None
        if cache.skips(index):
            if self._joined:
                return self._arguments[0].get(args, kwargs)
            return self._returned(entered or self._given(args, kwargs))
        if cache.reusing:
            load_left_out(module)
        output = self.fn_ref.original_forward(*args, **kwargs)
        return self._left(output) if cache.watches(index) else output

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        cache = self._cache
        looks = cache.policy.uses_modulation
        modulated = modulated_input(module, cache.family.modulation, args, kwargs) if looks else None
        return cache.enter(self._given(args, kwargs), modulated)

    def _left(self, output: Any) -> Any:
        named = self._named(output)
        cut = named if self._cache.spread is None or self._joined else self._cache.spread.recut(named)
        left = self._cache.leave(self._index, cut)
        return output if left is named else self._returned(left)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return {argument.name: argument.get(args, kwargs) for argument in self._arguments}

    def _named(self, output: Any) -> dict[str, Tensor]:
        if self._joined:
            rows = self._cache.rows
            return dict(zip(rows, output.split(list(rows.values()), dim=1), strict=True))
        names = self._cache.family.block_returns
        return dict(zip(names, output if isinstance(output, tuple) else (output,), strict=True))

    def _returned(self, streams: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        if self._joined:
            return torch.cat([streams[name] for name in self._cache.rows], dim=1)
        names = self._cache.family.block_returns
        return streams[names[0]] if len(names) == 1 else tuple(streams[name] for name in names)


def modulated_input(
    block: nn.Module, modulation: Modulation | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The first block's input as the timestep embedding scales and shifts it, (B, rows, C)."""
    assert modulation is not None, "check_cacheable has looked"
    given = {theirs: Argument.of(block, ours).get(args, kwargs) for theirs, ours in modulation.arguments}
    output = block.get_submodule(modulation.submodule)(**given)
    return output[0] if isinstance(output, tuple) else output


def transformer_blocks(transformer: nn.Module, family: Family) -> list[nn.Module]:
    """Every block, in the order in which they run."""
    return [block for name in family.block_lists for block in getattr(transformer, name)]


def check_cacheable(transformer: Any, family: Family, policy: Policy, installed: bool) -> None:
    """Find out whether `policy` can work on `transformer`, on which this package's cache is `installed` or not.

    Raises:
        ValueError: if another cache is enabled, no block is left to skip, or what the policy looks at is missing.
    """
    if not installed and getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "cache: diffusers' own cache is enabled on this transformer, allowed is one cache;"
            " call pipe.transformer.disable_cache() first"
        )
    blocks = transformer_blocks(transformer, family)
    always = policy.first_blocks + policy.last_blocks
    if len(blocks) <= always:
        raise ValueError(f"cache: the transformer has {len(blocks)} block(s), allowed are {always + 1} or more")
    if policy.uses_modulation and (
        family.modulation is None or not hasattr(blocks[0], family.modulation.submodule.split(".")[0])
    ):
        raise ValueError(
            f"cache: {policy.title} looks at the first block's modulated input, which is not known on {family.name};"
            " allowed are the other policies"
        )


def add_cache_hooks(undo: ExitStack, cache: BlockCache, blocks: list[nn.Module]) -> None:
    """Put the cache under the blocks; closing `undo` takes it off again."""
    for index, block in enumerate(blocks):
        hook = BlockHook(cache, block, index, index >= len(blocks) - cache.joined)
        add_hook(undo, block, hook, _HOOK)
        cache.hooks.append(hook)
        hook.mend()
        undo.callback(hook.mend)
