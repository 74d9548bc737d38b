"""What all cache policies share: the settings, the record of a step, and the state of one branch of one call.

Between the blocks that are always computed, `first_blocks` at the start and `last_blocks` at the end (the idea of the
dual block cache of cache-dit, https://github.com/vipshop/cache-dit), a reused step adds what an earlier one added:

    after = before + (last_after - last_before)

A policy says when: it measures how much has changed, and a step is reused while that stays below the threshold.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from para_kernels.cache.taylor import MAX_ORDER, Trajectory

Reduce = Callable[[Tensor], Tensor]
"""Takes the float32[2] sums of one rank and returns those of all ranks, still on the device."""


@dataclass(frozen=True)
class StepRecord:
    """What happened in one denoising step of one branch.

    Attributes:
        step: index of the step within the call, from 0.
        branch: the denoising call within the step, for example `"cond"` or `"uncond"`.
        diff: the relative change that the policy compared, see there; None where nothing was compared.
        reused: True if blocks were skipped.
        ms: time of the transformer's forward in milliseconds, None where nothing was measured.
    """

    step: int
    branch: str
    diff: float | None
    reused: bool
    ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """The settings of a cache. Immutable; `new_state` makes what changes from step to step.

    Args:
        threshold: change below which a step reuses, finite and >= 0. At 0 no step ever does.
        warmup_steps: the first so many steps of each branch are always computed.
        max_consecutive_hits: after so many reused steps in a row one is computed whatever has changed, >= 1; None sets
            no limit.
        max_accumulated_error: a step is computed once the changes of the reused steps in a row, its own among them, sum
            up to more than this, finite and > 0; None sets no bound.
        first_blocks: so many blocks at the start are always computed.
        last_blocks: so many blocks at the end are always computed, on what was reused. With one or more of them the
            text stream is reused too, and kept.
        taylor_order: 0 adds what the last computed step added; 1 and 2 extrapolate it from the last two and three
            (see `taylor.py`).

    Memory, for each branch: (`taylor_order` + 1) tensors of the size of each reused stream (video; with `last_blocks`
    text too), and what the policy measures with.

    Raises:
        ValueError: if an argument has another type or lies outside its range.
    """

    title: ClassVar[str]
    uses_modulation: ClassVar[bool] = False
    """Whether it looks at the first block's modulated input instead of at the streams."""

    threshold: float = field(kw_only=False)
    warmup_steps: int = 0
    max_consecutive_hits: int | None = None
    max_accumulated_error: float | None = None
    first_blocks: int = 0
    last_blocks: int = 0
    taylor_order: int = 0

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        check_count("warmup_steps", self.warmup_steps, least=0)
        if self.max_consecutive_hits is not None:
            check_count("max_consecutive_hits", self.max_consecutive_hits, least=1, otherwise="None or ")
        bound = self.max_accumulated_error
        if bound is not None and not (is_finite_number(bound) and bound > 0):
            raise ValueError(f"max_accumulated_error: got {bound!r}, allowed is None or a finite number > 0")
        check_count("first_blocks", self.first_blocks, least=0)
        check_count("last_blocks", self.last_blocks, least=0)
        if self.taylor_order not in range(MAX_ORDER + 1) or isinstance(self.taylor_order, bool):
            raise ValueError(f"taylor_order: got {self.taylor_order!r}, allowed is an integer from 0 to {MAX_ORDER}")

    @abstractmethod
    def new_state(self, branch: str = "default") -> CacheState:
        """The empty state of one branch at the start of a call."""

    def description(self) -> str:
        """Name, threshold and whatever is not at its default, for people."""
        changed = [
            f"{item.name} {getattr(self, item.name)}"
            for item in fields(self)
            if item.repr and item.name != "threshold" and getattr(self, item.name) != item.default
        ]
        return ", ".join([f"{self.title}, threshold {self.threshold:g}", *changed])


@dataclass(frozen=True)
class Seen:
    """What a policy may look at when it decides.

    Attributes:
        hidden_in: (B, S, C), the video stream before the first block.
        hidden_out: (B, S, C), the video stream after `first_blocks` blocks; `hidden_in` itself if they are 0.
        modulated: (B, S, C), the first block's normalised input, scaled and shifted by the timestep embedding; None for
            a policy that does not use it.
        reduce: combines the sums of several ranks that each hold a shard of the sequence.
        first_token: where the shard begins in the whole sequence.
    """

    hidden_in: Tensor
    hidden_out: Tensor
    modulated: Tensor | None
    reduce: Reduce | None
    first_token: int

    def change(self, sums: Tensor) -> float:
        """sum|previous - current| / sum|previous| over all ranks by one read of the device; NaN or inf where `previous`
        is all zero."""
        change, size = (sums if self.reduce is None else self.reduce(sums)).tolist()
        if size == 0.0:
            return math.nan if change == 0.0 else math.inf
        return change / size

    def every(self, count: int) -> slice:
        """Every `count`-th token of the whole sequence, as far as it is here."""
        return slice(-self.first_token % count, None, count)


class CacheState(ABC):
    """What a policy knows about one branch of one call.

    Per step: `decide`, then `reuse` on a hit or `remember` on a miss. Tensors are kept without their autograd graph.
    """

    def __init__(self, policy: Policy, branch: str = "default") -> None:
        self.policy = policy
        self.branch = branch
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next step is step 0."""
        self.step = 0
        self.consecutive_hits = 0
        self.accumulated = 0.0
        self._layout: tuple[Hashable, torch.dtype, torch.device] | None = None
        self._trajectory = Trajectory(self.policy.taylor_order)
        self._ready = False

    def decide(
        self,
        hidden_in: Tensor,
        hidden_out: Tensor,
        *,
        modulated: Tensor | None = None,
        reduce: Reduce | None = None,
        first_token: int = 0,
        whole: Hashable | None = None,
    ) -> StepRecord:
        """Decide whether this step reuses, from what `Seen` describes.

        Reads the device once at most, and not at all on a warm-up step or when there is nothing to compare with. A
        tensor of another shape, dtype or device than before belongs to another call: the state is reset first. A change
        that is NaN or infinite is a miss.

        Args:
            reduce: with it all ranks decide alike: every rank must call `decide`, with the same policy.
            first_token: so that `downsample_factor` picks the same tokens as on one rank.
            whole: with `reduce`, what stands for the shape: equal on all ranks, and another one whenever the shape of
                any rank's shard is. Ranks that reset alone would wait for each other for ever.
        """
        layout = (hidden_out.shape if whole is None else whole, hidden_out.dtype, hidden_out.device)
        if self._layout not in (None, layout):
            self.reset()
        self._layout = layout

        step, self.step = self.step, self.step + 1
        comparable = self._ready and step >= self.policy.warmup_steps
        with torch.no_grad():
            change = self._change(Seen(hidden_in, hidden_out, modulated, reduce, first_token), comparable)
        diff = None if change is None else self._compared(change)
        reused = False
        if change is not None and diff is not None:
            reused = self._is_close(diff) and not self._exhausted() and self._bounded(change)
            self.accumulated += change
        if reused:
            self.consecutive_hits += 1
        else:
            self.consecutive_hits, self.accumulated = 0, 0.0
            # What was added belongs to the step that was measured then. Until `remember` brings what this one adds
            # nothing can be reused, also if this step is cut short.
            self._ready = False
            self._trajectory.make_room()
        self._decided(reused)
        return StepRecord(step, self.branch, diff, reused)

    def remember(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """After a miss: keep what the blocks between `before` and `after` added to each stream, the video stream
        first."""
        with torch.no_grad():
            first = self._video_tail(before[0], after[0])
            others = (last - start for start, last in zip(before[1:], after[1:], strict=True))
            self._trajectory.add(self.step - 1, (first, *others))
        self._ready = True

    def reuse(self, before: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """After a hit: each stream as the skipped blocks would have left it."""
        assert self._ready, "reuse() belongs after a decide() that returned reused=True"
        return self._trajectory.applied(before, self.step - 1)

    # --- what a policy says -----------------------------------------------------------------------------------------

    @abstractmethod
    def _change(self, seen: Seen, comparable: bool) -> float | None:
        """How much this step has changed; None, without a read of the device, where it is not `comparable`."""

    def _compared(self, change: float) -> float:
        """What is compared with the threshold, and recorded."""
        return change

    def _is_close(self, diff: float) -> bool:
        return diff < self.policy.threshold

    def _decided(self, reused: bool) -> None:  # noqa: B027  # not every policy has anything to do
        """Keep what the next step needs, let go of the rest."""

    def _video_tail(self, before: Tensor, after: Tensor) -> Tensor:
        return after - before

    # --- limits -----------------------------------------------------------------------------------------------------

    def _exhausted(self) -> bool:
        limit = self.policy.max_consecutive_hits
        return limit is not None and self.consecutive_hits >= limit

    def _bounded(self, change: float) -> bool:
        bound = self.policy.max_accumulated_error
        return bound is None or self.accumulated + change <= bound


def is_finite_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_threshold(name: str, value: object) -> None:
    """Raise a ValueError that names the argument `name` unless `value` may be a threshold."""
    if not is_finite_number(value) or value < 0:  # type: ignore[operator]  # it is a number here
        raise ValueError(f"{name}: got {value!r}, allowed is a finite number >= 0")


def check_count(name: str, value: object, *, least: int, otherwise: str = "") -> None:
    """Raise a ValueError that names the argument `name` unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, allowed is {otherwise}an integer >= {least}")
