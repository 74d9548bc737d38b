"""What is installed on one transformer: its parts, how each is put on and taken off, and what its hooks do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from para_kernels.cache import Policy

from .attention import ATTEND, AttentionLengths, attend_here
from .cache import BlockCache, add_cache_hooks, transformer_blocks
from .compiled import CompiledBlocks
from .conditioning import SharedConditioning
from .graphs import ForwardGraphs
from .hooks import Argument, BranchName, CallHook, DropArgumentHook, add_hook, forget_child_registries
from .linears import Fp8Linears
from .models import Family
from .parallel import Spread
from .places import Places
from .processor_swap import attn_processors, set_attn_processors

if TYPE_CHECKING:
    from .handle import Handle

STOCK = "stock"


@dataclass(frozen=True)
class Settings:
    """What is wanted.

    Attributes:
        attention: one of `ATTEND`, or `"stock"`, diffusers' own.
        cache: None without one.
        parallel: where forwards run, None in one process; not with `"stock"`.
        compile: the backend of `torch.compile` for the blocks, None where they are not compiled.
        linears: how linears are quantised, None where they are not.
        graphs: whether forwards are recorded as CUDA graphs.
    """

    attention: str = STOCK
    cache: Policy | None = None
    parallel: Places | None = None
    compile: str | None = None
    linears: Fp8Linears | None = None
    graphs: bool = False


class Installation:
    """The installation on one transformer; a `Handle` has one for each of its pipeline's transformers.

    It has seven parts, each put on and taken off as a whole: the listeners (which call, which branch, what length, how
    long), the attention processors, the compiled blocks, the graphs, the spreading over ranks, what of the conditioning
    they share, the cache. What must run around the transformer's forward is a hook of torch's own: those stay on the
    module when CPU offload unwraps and wraps `forward` anew after every call, which loses any hook of diffusers' that
    wraps the same `forward`.

    Args:
        handle: whose it is.
        name: tells its steps from those of the handle's other transformers; "" where there is no need.

    Attributes:
        cache, spread, conditioning, compiled, graphs: None where there is none.
        device: where the transformer ran last; None before.
    """

    def __init__(self, handle: Handle, transformer: Any, name: str) -> None:
        self.handle = handle
        self.transformer = transformer
        self.family: Family = handle.family
        self.cache: BlockCache | None = None
        self.spread: Spread | None = None
        self.conditioning: SharedConditioning | None = None
        self.compiled: CompiledBlocks | None = None
        self.graphs: ForwardGraphs | None = None
        self._parts: dict[str, ExitStack] = {}
        passes = handle.family.passes
        self._branch = BranchName(passes.names if passes else (), of=name)
        self._lengths = AttentionLengths()
        self.device: torch.device | None = None

    @staticmethod
    def on(transformer: Any) -> Installation | None:
        """What is installed on `transformer`, found by its own listener; None if nothing is."""
        for hook in transformer._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Installation):
                return owner
        return None

    @property
    def processors(self) -> int:
        """How many attention modules have this installation's processor now."""
        return sum(self._is_ours(processor) for processor in attn_processors(self.transformer).values())

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks, in the order in which they run."""
        return transformer_blocks(self.transformer, self.family)

    # --- parts ------------------------------------------------------------------------------------------------------

    def put_on(self, failed: ExitStack, wanted: Sequence[str], settings: Settings) -> None:
        """Add those of the wanted parts that are missing; closing `failed` takes them off again."""
        add = {
            "listeners": self._add_listeners,
            "attention": self._add_attention,
            "compile": self._add_compiled,
            "graphs": self._add_graphs,
            "parallel": self._add_parallel,
            "conditioning": self._add_conditioning,
            "cache": self._add_cache,
        }
        failed.callback(forget_child_registries, self.transformer)
        for part in wanted:
            if part not in self._parts:
                stack = failed.enter_context(ExitStack())
                failed.callback(self._parts.pop, part)
                self._parts[part] = stack
                add[part](stack, settings)
        forget_child_registries(self.transformer)

    def take_off(self, wanted: Sequence[str] = ()) -> None:
        """Remove every part but those wanted."""
        with ExitStack() as undo:  # the last one first, and all of them even if one fails
            undo.callback(forget_child_registries, self.transformer)
            for part in [part for part in self._parts if part not in wanted]:
                undo.push(self._parts.pop(part))

    def retune(self, settings: Settings) -> None:
        """Tell the parts that are there what is wanted of them now."""
        self._lengths.attend = ATTEND.get(settings.attention, attend_here)
        if self.cache is not None and settings.cache is not None:
            self.cache.retune(settings.cache)
            self.cache.spread = self.spread
        if self.compiled is not None and settings.compile is not None:
            self.compiled.retune(settings.compile)
        if self.graphs is not None:
            self.graphs.clear()
        if self.spread is not None and settings.parallel is not None:
            self.spread.retune(settings.parallel, settings.attention)

    def end_call(self) -> None:
        """A call begins or is over: nothing of it goes into another."""
        self._branch.end_call()
        if self.cache is not None:
            self.cache.reset()
        if self.spread is not None:
            self.spread.end_call()

    def _add_listeners(self, undo: ExitStack, settings: Settings) -> None:
        transformer = self.transformer
        mask = self.family.text_mask
        self._text_mask = None if mask is None else Argument.of(transformer, mask)
        self._latents = Argument.of(transformer, self.family.shards.samples[0])
        passes = self.family.passes
        self._prompts = [Argument.of(transformer, name) for name in passes.prompts] if passes else []
        # The list of blocks is itself never called and nobody else hooks it: a place to listen that stands in no
        # one's way.
        blocks = getattr(transformer, self.family.block_lists[0])
        add_hook(undo, blocks, CallHook(self._branch, self.handle.end_call), "para_kernels.call")
        undo.callback(transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        after = transformer.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)
        undo.callback(after.remove)

    def _add_attention(self, undo: ExitStack, settings: Settings) -> None:
        transformer = self.transformer
        processor = self.family.processor(self._lengths)
        originals = attn_processors(transformer)
        undo.callback(self._give_back_processors, originals)
        set_attn_processors(transformer, dict.fromkeys(originals, processor))
        if self.family.refiner is not None:
            refiner = transformer.get_submodule(self.family.refiner)
            hook = DropArgumentHook(Argument.of(refiner, self.family.refiner_mask))
            add_hook(undo, refiner, hook, "para_kernels.no_refiner_mask")

    def _give_back_processors(self, originals: dict[str, Any]) -> None:
        """The very objects that were there; where somebody has put another one since, that one stays."""
        now = attn_processors(self.transformer)
        set_attn_processors(
            self.transformer, {name: originals[name] for name, there in now.items() if self._is_ours(there)}
        )

    def _is_ours(self, processor: Any) -> bool:
        return getattr(processor, "lengths", None) is self._lengths

    def _add_compiled(self, undo: ExitStack, settings: Settings) -> None:
        assert settings.compile is not None
        undo.callback(self._forget_compiled)
        self.compiled = CompiledBlocks(self._lengths, self.family.block_arguments, settings.compile)
        self.compiled.add_to(self.blocks, undo)

    def _forget_compiled(self) -> None:
        self.compiled = None

    def _add_graphs(self, undo: ExitStack, settings: Settings) -> None:
        undo.callback(self._forget_graphs)
        self.graphs = ForwardGraphs(self.transformer, self._lengths, self._place)
        self.graphs.add_to(undo)

    def _forget_graphs(self) -> None:
        self.graphs = None

    def _place(self) -> Hashable:
        """What the running forward depends on beside its arguments."""
        is_cached = self.cache is not None and self.cache.running  # not where a forward is called past all hooks
        return is_cached, None if self.spread is None else self.spread.situation

    def _add_parallel(self, undo: ExitStack, settings: Settings) -> None:
        assert settings.parallel is not None
        undo.callback(self._forget_parallel)
        self.spread = Spread(self.transformer, self.family, self._lengths, settings.parallel, settings.attention)
        self.spread.add_hooks(undo)

    def _forget_parallel(self) -> None:
        spread, self.spread = self.spread, None
        if self.cache is not None:
            self.cache.spread = None
            self.cache.reset()
        if spread is not None:
            spread.close()

    def _add_conditioning(self, undo: ExitStack, settings: Settings) -> None:
        if self.family.conditioning is not None:
            assert self.spread is not None
            undo.callback(self._forget_conditioning)
            self.conditioning = SharedConditioning(
                self.transformer, self.blocks, self.family.conditioning, self.spread, self._lengths
            )
            self.conditioning.add_hooks(undo)

    def _forget_conditioning(self) -> None:
        self.conditioning = None

    def _add_cache(self, undo: ExitStack, settings: Settings) -> None:
        assert settings.cache is not None
        undo.callback(self._forget_cache)
        joined = sum(len(getattr(self.transformer, name)) for name in self.family.joined)
        self.cache = BlockCache(settings.cache, self.family, self._branch, self._lengths, len(self.blocks), joined)
        add_cache_hooks(undo, self.cache, self.blocks)

    def _forget_cache(self) -> None:
        self.cache = None

    # --- what the listeners hear ------------------------------------------------------------------------------------

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        handle = self.handle
        handle.begin_forward()
        other = self._branch.begin(tuple(argument.get(args, kwargs) for argument in self._prompts))
        if other and self.cache is not None:
            self.cache.forget(self._branch.name)
        if self.spread is not None:
            args, kwargs = self.spread.begin(args, kwargs, self._branch.name, str(handle.settings.cache))
        text_mask = None if self._text_mask is None else self._text_mask.get(args, kwargs)
        if self.cache is not None:
            self.cache.begin_forward()
        if "attention" in self._parts:
            self._lengths.begin(text_mask)
        device: torch.device = self._latents.get(args, kwargs).device
        self.device = device
        handle.timeline.start(device)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._lengths.end()
        decision = None
        if self.cache is not None:
            decision = self.cache.decision
            self.cache.end_forward()
        if self.spread is not None:
            output = self.spread.finish(output)
        if output is not None:  # None: the forward has failed.
            self.handle.timeline.stop(self._branch.name, decision)
        return output
