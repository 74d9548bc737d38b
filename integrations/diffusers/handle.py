"""What is installed on one transformer: its parts, how each is put on and taken off, and what it reports."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from para_kernels.cache import Policy, StepRecord

from .agreement import quiet_progress, share_noise
from .attention import ATTEND, AttentionLengths, attend_here
from .cache import BlockCache, add_cache_hooks, check_cacheable, transformer_blocks
from .compiled import CompiledBlocks, check_compilable, check_no_hooks_inside
from .hooks import Argument, BranchName, CallHook, DropArgumentHook, add_hook, forget_child_registries
from .linears import Fp8Linears, QuantisedLinears
from .models import Family
from .parallel import Spread
from .places import Places
from .processor_swap import attn_processors, set_attn_processors
from .summary import render
from .timeline import Timeline

STOCK = "stock"


@dataclass(frozen=True)
class Settings:
    """What is wanted.

    Attributes:
        attention: one of `ATTEND`, or `"stock"`, diffusers' own.
        cache: None without one.
        parallel: where forwards run, None in one process; needs `"exact"`.
        compile: the backend of `torch.compile` for the blocks, None where they are not compiled.
        linears: how linears are quantised, None where they are not.
    """

    attention: str = STOCK
    cache: Policy | None = None
    parallel: Places | None = None
    compile: str | None = None
    linears: Fp8Linears | None = None


class Handle:
    """The installation on one transformer, made by `accelerate`, `apply_cache_on_pipe` and `parallelize_pipe`.

    It has five parts, each put on and taken off as a whole: the listeners (which call, which branch, what length, how
    It has six parts, each put on and taken off as a whole: the listeners (which call, which branch, what length, how
    long), the attention processors, the compiled blocks, the spreading over ranks, the cache, the quantised linears.
    What must run around the transformer's forward is a hook of torch's own: those stay on the module when CPU offload
    unwraps and wraps `forward` anew after every call, which loses any hook of diffusers' that wraps the same `forward`.
    """

    def __init__(self, transformer: Any, family: Family) -> None:
        self.family = family
        self.settings = Settings()
        self._transformer = transformer
        self._parts: dict[str, ExitStack] = {}
        self._pipes: list[weakref.ref[Any]] = []
        self._shared: list[weakref.ref[Any]] = []
        self._schedules: tuple[Any, ...] = ()
        self._call_over = True
        self._branch = BranchName(family.passes.names if family.passes else ())
        self._lengths = AttentionLengths()
        self._timeline = Timeline()
        self._cache: BlockCache | None = None
        self._spread: Spread | None = None
        self._compiled: CompiledBlocks | None = None
        self._linears: QuantisedLinears | None = None
        self._device: torch.device | None = None
        self._execution_device = torch.device("cpu")

    @staticmethod
    def on(transformer: Any) -> Handle | None:
        """The handle that is installed on `transformer`, found by its own listener; None if there is none."""
        for hook in transformer._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Handle):
                return owner
        return None

    # --- for the user -----------------------------------------------------------------------------------------------

    @property
    def installed(self) -> bool:
        """False before the installation and after `remove`."""
        return bool(self._parts)

    @property
    def records(self) -> list[StepRecord]:
        """The steps of the last or running call, in the order in which they ran; `ms` is the transformer's forward.

        Steps are kept when the call ends and when the installation is removed, until the next call begins or the
        settings change. On CUDA this waits for the last step to end.
        """
        return self._timeline.records

    def summary(self) -> str:
        """What is installed and what the last call did, as a table of its steps, in plain text."""
        return render(self)

    def remove(self, *, keep_linears: bool = False) -> None:
        """Take everything off again, for every pipeline that has this transformer. A second time does nothing.

        Spread over ranks: to be called on all of them. The memory that keys and values travelled through is given back.

        Args:
            keep_linears: leave FP8 linears as they are, for good; everything else is taken off.

        Raises:
            ValueError: if linears are in FP8 whose original weights were not kept, and are not to stay. Nothing is
                taken off then.
        """
        if "linears" in self._parts:
            if keep_linears:
                self._parts["linears"].pop_all()
            else:
                self._check_linears_removable("remove", "; or call remove(keep_linears=True), which leaves them in FP8")
        self.settings = Settings()
        self._take_off(list(self._parts))

    # --- for `accelerate` and the summary ---------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        """The transformer that this is about."""
        return self._transformer

    @property
    def device(self) -> torch.device:
        """Where the transformer ran last; before that, where its pipe computes."""
        return self._device or self._execution_device

    @property
    def processors(self) -> int:
        """How many attention modules have this installation's processor now."""
        return sum(self._is_ours(processor) for processor in attn_processors(self._transformer).values())

    @property
    def linears(self) -> QuantisedLinears | None:
        """The linears that are in FP8; None where none are."""
        return self._linears

    @property
    def spread(self) -> Spread | None:
        """How forwards are spread over ranks; None where they are not."""
        return self._spread

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks, in the order in which they run."""
        return transformer_blocks(self._transformer, self.family)

    def configure(self, settings: Settings, execution_device: torch.device) -> None:
        """Put on what is missing, take off what is not wanted, re-tune the rest. A failure changes nothing.

        Args:
            execution_device: where the pipe computes, wherever its weights are.

        Raises:
            ValueError: if the cache is wanted and another cache is enabled, or there are too few blocks to skip any, or
                what the policy looks at is missing; if compiled blocks are wanted and the blocks cannot be compiled; or
                if linears are to change whose original weights were not kept.
        """
        others = settings.linears != self.settings.linears
        if others and "linears" in self._parts:
            self._check_linears_removable("linears", "; load the pipe anew")
        if settings.cache is not None:
            check_cacheable(self._transformer, self.family, settings.cache, installed=self._cache is not None)
        if settings.compile is not None:
            check_compilable(self.blocks, settings.compile, installed=self._compiled is not None)
        if others and "linears" in self._parts:
            self._take_off(["linears"])
        self._execution_device = execution_device
        wanted = {
            "listeners": True,
            "attention": settings.attention != STOCK,
            "compile": settings.compile is not None,
            "parallel": settings.parallel is not None,
            "cache": settings.cache is not None,
            "linears": settings.linears is not None,  # last: what a failure would undo may be gone
        }
        self._put_on([part for part, is_wanted in wanted.items() if is_wanted and part not in self._parts], settings)
        self._take_off([part for part, is_wanted in wanted.items() if not is_wanted and part in self._parts])
        self._lengths.attend = ATTEND.get(settings.attention, attend_here)
        if self._cache is not None and settings.cache is not None:
            self._cache.retune(settings.cache)
            self._cache.spread = self._spread
        if self._compiled is not None and settings.compile is not None:
            self._compiled.retune(settings.compile)
        if self._spread is not None and settings.parallel is not None:
            self._spread.retune(settings.parallel)
        if settings != self.settings:
            self._timeline.clear()
        self.settings = settings

    def watch(self, pipe: Any) -> None:
        """Learn from `pipe`'s scheduler when a call of it begins; spread over ranks, give it the same noise on all;
        with linears in FP8, quantise those of its text encoders too."""
        if all(known() is not pipe for known in self._pipes):
            self._pipes.append(weakref.ref(pipe))
        if self._linears is not None:
            self._linears.add_text_encoders(pipe, self._execution_device)
        if (parallel := self._parts.get("parallel")) is not None:
            self._share(parallel, pipe)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _put_on(self, parts: list[str], settings: Settings) -> None:
        add = {
            "listeners": self._add_listeners,
            "attention": self._add_attention,
            "compile": self._add_compiled,
            "parallel": self._add_parallel,
            "cache": self._add_cache,
            "linears": self._add_linears,
        }
        added: dict[str, ExitStack] = {}
        with ExitStack() as failed:
            failed.callback(forget_child_registries, self._transformer)
            for part in parts:
                added[part] = failed.enter_context(ExitStack())
                add[part](added[part], settings)
            failed.pop_all()
        self._parts.update(added)
        forget_child_registries(self._transformer)

    def _take_off(self, parts: list[str]) -> None:
        with ExitStack() as undo:  # the last one first, and all of them even if one fails
            undo.callback(forget_child_registries, self._transformer)
            for part in parts:
                undo.push(self._parts.pop(part))

    def _add_listeners(self, undo: ExitStack, settings: Settings) -> None:
        transformer = self._transformer
        mask = self.family.text_mask
        self._text_mask = None if mask is None else Argument.of(transformer, mask)
        self._latents = Argument.of(transformer, self.family.shards.samples[0])
        passes = self.family.passes
        self._prompts = [Argument.of(transformer, name) for name in passes.prompts] if passes else []
        # The list of blocks is itself never called and nobody else hooks it: a place to listen that stands in no
        # one's way.
        blocks = getattr(transformer, self.family.block_lists[0])
        add_hook(undo, blocks, CallHook(self._branch, self._end_call), "para_kernels.call")
        undo.callback(transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        after = transformer.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)
        undo.callback(after.remove)

    def _add_attention(self, undo: ExitStack, settings: Settings) -> None:
        transformer = self._transformer
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
        now = attn_processors(self._transformer)
        set_attn_processors(
            self._transformer, {name: originals[name] for name, there in now.items() if self._is_ours(there)}
        )

    def _is_ours(self, processor: Any) -> bool:
        return getattr(processor, "lengths", None) is self._lengths

    def _add_compiled(self, undo: ExitStack, settings: Settings) -> None:
        assert settings.compile is not None
        undo.callback(self._forget_compiled)
        self._compiled = CompiledBlocks(self._lengths, self.family.block_arguments, settings.compile)
        self._compiled.add_to(self.blocks, undo)

    def _forget_compiled(self) -> None:
        self._compiled = None

    def _add_parallel(self, undo: ExitStack, settings: Settings) -> None:
        assert settings.parallel is not None
        undo.callback(self._forget_parallel)
        self._spread = Spread(self._transformer, self.family, self._lengths, settings.parallel)
        self._spread.add_hooks(undo)
        for known in self._pipes:
            if (pipe := known()) is not None:
                self._share(undo, pipe)

    def _forget_parallel(self) -> None:
        spread, self._spread = self._spread, None
        self._shared.clear()
        if self._cache is not None:
            self._cache.spread = None
            self._cache.reset()
        if spread is not None:
            spread.close()

    def _share(self, undo: ExitStack, pipe: Any) -> None:
        """Once for each pipe: `pipe` starts from the same noise on all ranks, and shows its progress on one."""
        if any(known() is pipe for known in self._shared):
            return
        assert self._spread is not None
        self._shared.append(weakref.ref(pipe))
        share_noise(undo, pipe, self.family.shards.noise, self._spread.from_first)
        if self._spread.places.everyone.rank() != 0:
            quiet_progress(undo, pipe)

    def _add_cache(self, undo: ExitStack, settings: Settings) -> None:
        assert settings.cache is not None
        undo.callback(self._forget_cache)
        blocks = self.blocks
        self._cache = BlockCache(settings.cache, self.family, self._branch, len(blocks))
        add_cache_hooks(undo, self._cache, blocks)

    def _forget_cache(self) -> None:
        self._cache = None

    def _add_linears(self, undo: ExitStack, settings: Settings) -> None:
        assert settings.linears is not None
        self._linears = QuantisedLinears(settings.linears)
        undo.callback(self._restore_linears)
        self._linears.add_transformer(self._transformer, self.family, self._execution_device)
        for known in self._pipes:
            if (pipe := known()) is not None:
                self._linears.add_text_encoders(pipe, self._execution_device)

    def _restore_linears(self) -> None:
        assert self._linears is not None
        self._linears.restore()
        self._linears = None

    def _check_linears_removable(self, argument: str, otherwise: str) -> None:
        assert self._linears is not None
        self._linears.check_removable(self._transformer, argument, otherwise)

    # --- what the listeners hear ------------------------------------------------------------------------------------

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._notice_new_call()
        other = self._branch.begin(tuple(argument.get(args, kwargs) for argument in self._prompts))
        if other and self._cache is not None:
            self._cache.forget(self._branch.name)
        if self._spread is not None:
            args, kwargs = self._spread.begin(args, kwargs, self._branch.name, str(self.settings.cache))
        text_mask = None if self._text_mask is None else self._text_mask.get(args, kwargs)
        if self._cache is not None:
            self._cache.begin_forward()
        if "attention" in self._parts:
            self._lengths.begin(text_mask)
        device: torch.device = self._latents.get(args, kwargs).device
        self._device = device
        self._timeline.start(device)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._lengths.end()
        decision = None
        if self._cache is not None:
            decision = self._cache.decision
            self._cache.end_forward()
        if self._spread is not None:
            output = self._spread.finish(output)
        if output is not None:  # None: the forward has failed.
            self._timeline.stop(self._branch.name, decision)
        return output

    def _notice_new_call(self) -> None:
        """Each call sets its scheduler's timesteps anew: so a new call shows even if the one before was interrupted."""
        pipes = [pipe for known in self._pipes if (pipe := known()) is not None]
        schedules = tuple(getattr(pipe.scheduler, "timesteps", None) for pipe in pipes)
        same = len(schedules) == len(self._schedules) and all(
            now is before for now, before in zip(schedules, self._schedules, strict=True)
        )
        if self._call_over or not same:
            self._end_call()
            self._timeline.clear()
            if self._compiled is not None:
                check_no_hooks_inside(self.blocks)  # They may have come after the installation.
        self._schedules, self._call_over = schedules, False

    def _end_call(self) -> None:
        self._call_over = True
        self._branch.end_call()
        if self._cache is not None:
            self._cache.reset()
        if self._spread is not None:
            self._spread.end_call()
