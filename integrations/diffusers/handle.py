"""What `accelerate` and its like return: the installation on all of a pipeline's transformers, and what it reports."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from para_kernels.cache import StepRecord
from para_kernels.parallel.failure import deadline

from .agreement import from_first, quiet_progress, share_noise
from .cache import check_cacheable
from .calls import Calls
from .compiled import check_compilable, check_no_hooks_inside
from .graphs import ForwardGraphs, check_recordable
from .installation import STOCK, Installation, Settings
from .linears import QuantisedLinears
from .models import Family
from .parallel import Spread
from .summary import render
from .timeline import Timeline


class Handle:
    """The installation on a pipeline's transformers, made by `accelerate`, `apply_cache_on_pipe` and
    `parallelize_pipe`; pipelines that share a transformer share it.

    Attributes:
        linears: those that are in FP8; None where none are.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.settings = Settings()
        self.calls = Calls()
        self.timeline = Timeline()
        self.linears: QuantisedLinears | None = None
        self._execution_device = torch.device("cpu")
        self._installations: list[Installation] = []
        self._shared: list[weakref.ref[Any]] = []
        self._sharing = ExitStack()

    @staticmethod
    def on(transformer: Any) -> Handle | None:
        """The handle of what is installed on `transformer`; None if there is nothing."""
        installation = Installation.on(transformer)
        return None if installation is None else installation.handle

    # --- for the user -----------------------------------------------------------------------------------------------

    @property
    def installed(self) -> bool:
        """False before the installation and after `remove`."""
        return any(Handle.on(transformer) is self for transformer in self.transformers)

    @property
    def records(self) -> list[StepRecord]:
        """The steps of the last or running call, in the order in which they ran; `ms` is the transformer's forward.

        Steps are kept when the call ends and when the installation is removed, until the next call begins or the
        settings change. On CUDA this waits for the last step to end.
        """
        return self.timeline.records

    def summary(self) -> str:
        """What is installed and what the last call did, as a table of its steps, in plain text."""
        return render(self)

    def remove(self, *, keep_linears: bool = False) -> None:
        """Take everything off again, for every pipeline that has these transformers. A second time does nothing.

        Spread over ranks: to be called on all of them. The memory that keys and values travelled through is given back.

        Args:
            keep_linears: leave FP8 linears as they are, for good; everything else is taken off.

        Raises:
            ValueError: if linears are in FP8 whose original weights were not kept, and are not to stay. Nothing is
                taken off then.
        """
        if self.linears is not None and not keep_linears:
            otherwise = "; or call remove(keep_linears=True), which leaves them in FP8"
            self.linears.check_removable("remove", otherwise)
            self._restore_linears()
        self.linears = None
        self.settings = Settings()
        with ExitStack() as undo:  # all of them even if one fails
            undo.callback(self._stop_sharing)
            for installation in self._installations:
                undo.callback(installation.take_off)

    # --- for `accelerate` and the summary ---------------------------------------------------------------------------

    @property
    def transformers(self) -> list[Any]:
        """The transformers that this is about, in the order in which the row names them."""
        return [installation.transformer for installation in self._installations]

    @property
    def transformer(self) -> Any:
        """The first of them, in most families the only one."""
        return self.transformers[0]

    @property
    def device(self) -> torch.device:
        """Where the transformers ran last; before that, where their pipe computes."""
        return next(filter(None, (known.device for known in self._installations)), self._execution_device)

    @property
    def processors(self) -> int:
        """How many attention modules have this installation's processor now."""
        return sum(installation.processors for installation in self._installations)

    @property
    def spread(self) -> Spread | None:
        """How forwards are spread over ranks, of the first transformer that has run; None where they are not."""
        spreads = [installation.spread for installation in self._installations if installation.spread is not None]
        return next((spread for spread in spreads if spread.last_place is not None), next(iter(spreads), None))

    @property
    def graphs(self) -> list[ForwardGraphs]:
        """Those of all transformers, where forwards are recorded."""
        return [known.graphs for known in self._installations if known.graphs is not None]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all transformers, in the order in which they run."""
        return [block for installation in self._installations for block in installation.blocks]

    def configure(self, transformers: Mapping[str, Any], settings: Settings, execution_device: torch.device) -> None:
        """Put on what is missing, take off what is not wanted, re-tune the rest. A failure changes nothing.

        Args:
            transformers: of a pipeline, by their components' names. Those that this handle has beside them are
                configured too.
            execution_device: where the pipe computes, wherever its weights are.

        Raises:
            ValueError: if the cache is wanted and another cache is enabled, or there are too few blocks to skip any, or
                what the policy looks at is missing; if compiled blocks are wanted and the blocks cannot be compiled; or
                if linears are to change whose original weights were not kept.
        """
        others = settings.linears != self.settings.linears
        if others and self.linears is not None:
            self.linears.check_removable("linears", "; load the pipe anew")
        installations = [*self._installations, *self._new(transformers)]
        for installation in installations:
            _check(installation, settings)
        if others and self.linears is not None:
            self._restore_linears()
        self._execution_device = execution_device
        wanted = _wanted_parts(settings)
        with ExitStack() as failed:
            for installation in installations:
                installation.put_on(failed, wanted, settings)
            self._add_linears(failed, installations, settings)  # last: what a failure would undo may be gone
            failed.pop_all()
        self._installations = installations
        for installation in installations:
            installation.take_off(wanted)
            installation.retune(settings)
        if settings.parallel is None:
            self._stop_sharing()
        if settings != self.settings:
            self.timeline.clear()
        self.settings = settings

    def watch(self, pipe: Any) -> None:
        """Learn from `pipe`'s scheduler when a call of it begins; spread over ranks, give it the same noise on all;
        with linears in FP8, quantise those of its text encoders too.
        """
        self.calls.watch(pipe)
        if self.linears is not None:
            self.linears.add_text_encoders(pipe, self._execution_device)
        if self.settings.parallel is not None:
            for known in self.calls.pipes:
                self._share(known)

    def _new(self, transformers: Mapping[str, Any]) -> list[Installation]:
        """For the transformers that have none yet. All but the row's first component show their names."""
        first = self.family.components[0]
        return [
            Installation(self, transformer, "" if name == first else name)
            for name, transformer in transformers.items()
            if all(transformer is not known for known in self.transformers)
        ]

    def _add_linears(self, undo: ExitStack, installations: Sequence[Installation], settings: Settings) -> None:
        if settings.linears is None:
            return
        if self.linears is None:
            self.linears = QuantisedLinears(settings.linears)
            undo.callback(self._restore_linears)
        for installation in installations:
            self.linears.add_transformer(installation.transformer, self.family, self._execution_device)
        for pipe in self.calls.pipes:
            self.linears.add_text_encoders(pipe, self._execution_device)

    def _restore_linears(self) -> None:
        assert self.linears is not None
        self.linears.restore()
        self.linears = None

    # --- for the installations --------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """A forward of one of the transformers begins, perhaps the first of a call."""
        if self.calls.begin_forward():
            self._reset()
            self.timeline.clear()
            if self.settings.compile is not None:
                check_no_hooks_inside(self.blocks)  # They may have come after the installation.

    def end_call(self) -> None:
        """The pipeline ends a call."""
        self.calls.end()
        self._reset()

    def _reset(self) -> None:
        for installation in self._installations:
            installation.end_call()

    # --- the same noise on all ranks --------------------------------------------------------------------------------

    def _share(self, pipe: Any) -> None:
        """Once for each pipe: `pipe` starts from the same noise on all ranks, and shows its progress on one."""
        if any(known() is pipe for known in self._shared):
            return
        assert self.settings.parallel is not None
        self._shared.append(weakref.ref(pipe))
        share_noise(self._sharing, pipe, self.family.shards.noise, self._from_first)
        if self.settings.parallel.everyone.rank() != 0:
            quiet_progress(self._sharing, pipe)

    def _stop_sharing(self) -> None:
        self._sharing.close()
        self._shared.clear()

    def _from_first(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor as rank 0 has it: see `agreement.from_first`."""
        places = self.settings.parallel
        assert places is not None
        with deadline(places.wanted.timeout):
            return from_first(tensor, name, places.everyone)


def _check(installation: Installation, settings: Settings) -> None:
    if settings.graphs:
        check_recordable(installation.transformer, installed=installation.graphs is not None)
    if settings.cache is not None:
        has_cache = installation.cache is not None
        check_cacheable(installation.transformer, installation.family, settings.cache, installed=has_cache)
    if settings.compile is not None:
        check_compilable(installation.blocks, settings.compile, installed=installation.compiled is not None)


def _wanted_parts(settings: Settings) -> list[str]:
    """In the order in which they are put on."""
    wanted = {
        "listeners": True,
        "attention": settings.attention != STOCK,
        "compile": settings.compile is not None,
        "graphs": settings.graphs,
        "parallel": settings.parallel is not None,
        "conditioning": settings.parallel is not None and settings.cache is None,
        "cache": settings.cache is not None,
    }
    return [part for part, is_wanted in wanted.items() if is_wanted]
