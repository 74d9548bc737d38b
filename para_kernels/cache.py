"""First Block Cache as a policy: when may a denoising step reuse what an earlier one computed?

The idea is ParaAttention's First Block Cache (https://github.com/chengzeyi/ParaAttention), a simplification of
TeaCache (Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108,
section 3): how much the first transformer block changes its input tells how much the whole stack will. The first
block always runs. When its residual is close to the one of the last computed step, the other blocks are skipped and
what they added then is added again:

    final = first_block_out + (last_final - last_first_block_out)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from para_kernels.residual import residual_diff

Reduce = Callable[[Tensor], Tensor]
"""Takes the float32[2] sums of one rank and returns those of all ranks, still on the device."""


@dataclass(frozen=True)
class StepRecord:
    """What happened in one denoising step of one branch.

    Attributes:
        step: index of the step within the call, from 0.
        branch: the denoising call within the step, for example `"cond"` or `"uncond"`.
        diff: mean|previous - current| / mean|previous| of the first block's residual; None where nothing was compared.
        reused: True if the blocks after the first one were skipped.
        ms: time of the transformer's forward in milliseconds, None where nothing was measured.
    """

    step: int
    branch: str
    diff: float | None
    reused: bool
    ms: float | None = None


@dataclass(frozen=True)
class FirstBlockCache:
    """The settings of First Block Cache. Immutable; `new_state` makes what changes from step to step.

    A step reuses if `diff < threshold`, where `diff` = mean|previous - current| / mean|previous| over the first
    block's residual of the video stream. `previous` is the residual of the last *computed* step: it is refreshed on a
    miss only. Were it refreshed on every step, many small changes in a row would each pass the threshold and their
    sum would never be noticed; measured against the last computed step, the drift of a run of reused steps is bounded
    by the threshold.

    Args:
        threshold: relative change below which a step reuses, finite and >= 0. At 0 no step ever does.
        warmup_steps: the first so many steps of each branch are always computed.
        max_consecutive_hits: after so many reused steps in a row one is computed whatever its diff, >= 1; None sets
            no limit.
        downsample_factor: compare every n-th token only, >= 1.

    Raises:
        ValueError: if an argument has another type or lies outside its range.
    """

    threshold: float
    warmup_steps: int = 0
    max_consecutive_hits: int | None = None
    downsample_factor: int = 1

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)
        _check_count("warmup_steps", self.warmup_steps, least=0)
        if self.max_consecutive_hits is not None:
            _check_count("max_consecutive_hits", self.max_consecutive_hits, least=1, otherwise="None or ")
        _check_count("downsample_factor", self.downsample_factor, least=1)

    def new_state(self, branch: str = "default") -> CacheState:
        """The empty state of one branch at the start of a call."""
        return CacheState(self, branch)


class CacheState:
    """What First Block Cache knows about one branch of one call.

    Per step: `decide`, then `reuse` on a hit or `remember` on a miss. Tensors are kept without their autograd graph.
    """

    def __init__(self, policy: FirstBlockCache, branch: str = "default") -> None:
        self.policy = policy
        self.branch = branch
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next step is step 0."""
        self.step = 0
        self.consecutive_hits = 0
        self._layout: tuple[Hashable, torch.dtype, torch.device] | None = None
        self._reference: Tensor | None = None
        self._tails: tuple[Tensor, ...] | None = None

    def decide(
        self,
        hidden_in: Tensor,
        hidden_out: Tensor,
        *,
        reduce: Reduce | None = None,
        first_token: int = 0,
        whole: Hashable | None = None,
    ) -> StepRecord:
        """Decide whether this step reuses, from the first block's input and output (B, S, C) of the video stream.

        Reads the device once, and not at all on a warm-up step or when there is nothing to compare with. A tensor of
        another shape, dtype or device than before belongs to another call: the state is reset first. A diff that is
        NaN or infinite is a miss.

        Args:
            reduce: combines the sums of several ranks that each hold a shard of the sequence, so that all of them
                decide alike.
            first_token: where the shard begins in the whole sequence, so that `downsample_factor` picks the same
                tokens as on one rank.
            whole: with `reduce`, what stands for the shape: equal on all ranks, and another one whenever the shape of
                any rank's shard is. Ranks that reset alone would wait for each other for ever.
        """
        layout = (hidden_out.shape if whole is None else whole, hidden_out.dtype, hidden_out.device)
        if self._layout not in (None, layout):
            self.reset()
        self._layout = layout

        step, self.step = self.step, self.step + 1
        comparable = self._tails is not None and step >= self.policy.warmup_steps
        tokens = slice(-first_token % self.policy.downsample_factor, None, self.policy.downsample_factor)
        with torch.no_grad():
            residual, sums = residual_diff(
                hidden_in[:, tokens], hidden_out[:, tokens], self._reference if comparable else None
            )
            diff = _ratio(sums if reduce is None else reduce(sums)) if comparable else None

        reused = diff is not None and diff < self.policy.threshold and not self._exhausted()
        if reused:
            self.consecutive_hits += 1
        else:
            self.consecutive_hits = 0
            # The tails belong to the old reference. Until `remember` brings new ones nothing can be reused, also if
            # this step is cut short.
            self._reference, self._tails = residual, None
        return StepRecord(step, self.branch, diff, reused)

    def remember(self, first_block_out: Sequence[Tensor], final: Sequence[Tensor]) -> None:
        """After a miss: keep what the blocks after the first one added to each stream."""
        with torch.no_grad():
            self._tails = tuple(last - first for first, last in zip(first_block_out, final, strict=True))

    def reuse(self, first_block_out: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """After a hit: each stream as the last block would have left it."""
        assert self._tails is not None, "reuse() belongs after a decide() that returned reused=True"
        return tuple(first + tail for first, tail in zip(first_block_out, self._tails, strict=True))

    def _exhausted(self) -> bool:
        limit = self.policy.max_consecutive_hits
        return limit is not None and self.consecutive_hits >= limit


def _ratio(sums: Tensor) -> float:
    """sum|previous - current| / sum|previous| by one read of the device; NaN or inf where `previous` is all zero."""
    change, size = sums.tolist()
    if size == 0.0:
        return math.nan if change == 0.0 else math.inf
    return change / size


def check_threshold(name: str, value: object) -> None:
    """Raise a ValueError that names the argument `name` unless `value` may be a threshold."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: got {value!r}, allowed is a finite number >= 0")


def _check_count(name: str, value: object, *, least: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, allowed is {otherwise}an integer >= {least}")
