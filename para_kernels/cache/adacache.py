"""AdaCache: how fast the cached residual changes says how many steps may reuse it.

Kahatapitiya et al., "Adaptive Caching for Faster Video Generation with Diffusion Transformers", arXiv 2411.02397,
section 4.2: after a computed step, the L1 distance of its residual from that of the computed step before, divided by
the number of steps between them (equation 4), is looked up in a codebook of caching rates. The next steps are reused
until the rate has passed (equation 6). The distance is relative to the earlier residual, which equation 4 leaves out
and the authors' code has: the thresholds of their codebook are made for it. Motion regularisation (section 4.3) is not
part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from para_kernels.cache.policy import CacheState, Policy, Seen, check_count, is_finite_number
from para_kernels.residual import residual_diff

CODEBOOK = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2))
"""The authors' fast schedule for 30 steps (github.com/AdaCache-DiT/AdaCache)."""


@dataclass(frozen=True, kw_only=True)
class AdaCache(Policy):
    """AdaCache.

    After a computed step every entry (distance, rate) of the codebook is tried in turn: if the residual changed by less
    than threshold * distance per step, the next step to be computed is `rate` steps away. Beyond the last entry it is
    the next one. The first two steps are always computed. The paper measures the residual of one block, or the mean
    over all of them; here one residual is kept for all blocks, and that is what is measured. A reused step runs no
    block at all, and reads nothing from the device beyond the measurement of the last computed step. The authors' code
    also computes the last two steps, which here nobody knows to be the last.

    Args:
        threshold: factor on the distances of the codebook: 1 is the authors'. At 0 no step reuses.
        the others of `Policy`.
        codebook: (distance, rate) with distances > 0 that grow and rates >= 1.

    Memory, beside that of `Policy`: while a step is computed, one video stream for each branch.

    Raises:
        ValueError: if an argument has another type or lies outside its range.
    """

    title: ClassVar[str] = "AdaCache"

    codebook: tuple[tuple[float, int], ...] = CODEBOOK

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "codebook", _checked_codebook(self.codebook))

    def rate(self, change: float) -> int:
        """Steps from the computed one, which changed by `change` per step, to the next that is computed."""
        for distance, rate in self.codebook:
            if change < self.threshold * distance:
                return rate
        return 1  # also for NaN

    def new_state(self, branch: str = "default") -> CacheState:
        return _AdaCacheState(self, branch)


class _AdaCacheState(CacheState):
    policy: AdaCache

    def reset(self) -> None:
        super().reset()
        self._last: tuple[int, Tensor] | None = None
        self._measured: tuple[int, Tensor] | None = None
        self._per_step: float | None = None

    def _change(self, seen: Seen, comparable: bool) -> float | None:
        if comparable and self._measured is not None:
            steps, sums = self._measured
            self._measured, self._per_step = None, seen.change(sums) / steps
        return self._per_step if comparable else None

    def _is_close(self, diff: float) -> bool:
        return self.consecutive_hits + 1 < self.policy.rate(diff)

    def _decided(self, reused: bool) -> None:
        if not reused:
            self._per_step = None

    def _video_tail(self, before: Tensor, after: Tensor) -> Tensor:
        """Measured in the pass that makes it, read at the next step: the device need not be waited for."""
        step = self.step - 1
        last_step, last = self._last or (None, None)
        tail, sums = residual_diff(before, after, last)
        self._measured = None if last_step is None else (step - last_step, sums)
        self._last = (step, tail)
        return tail


def _checked_codebook(codebook: object) -> tuple[tuple[float, int], ...]:
    allowed = "allowed are one or more pairs (distance > 0, rate), distances in ascending order"
    if not isinstance(codebook, Sequence) or not codebook:
        raise ValueError(f"codebook: got {codebook!r}, {allowed}")
    previous = 0.0
    for entry in codebook:
        if not isinstance(entry, Sequence) or len(entry) != 2 or not is_finite_number(entry[0]) or entry[0] <= previous:
            raise ValueError(f"codebook: got {codebook!r}, {allowed}")
        check_count("codebook: rate", entry[1], least=1)
        previous = entry[0]
    return tuple((distance, rate) for distance, rate in codebook)
