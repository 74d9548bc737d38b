"""TeaCache: the timestep-modulated input tells whether the blocks may be skipped, all of them.

Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108. Section 3.2: the
relative L1 distance (equation 4) between the noisy inputs of two consecutive steps, modulated by the timestep
embedding, follows that of the outputs. Section 3.3: a polynomial rescales the one to the other (equation 6), and steps
are reused until the sum of the rescaled distances passes the threshold (equation 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from para_kernels.cache.policy import CacheState, Policy, Seen, check_count, is_finite_number
from para_kernels.residual import residual_diff

IDENTITY = (1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class TeaCache(Policy):
    """TeaCache.

    A step reuses if `diff < threshold`, where `diff` is the sum, over the steps since the last computed one and this
    step, of max(0, polynomial(mean|previous - current| / mean|previous|)) of the modulated input; `previous` is the
    step before, computed or not. A reused step runs no block at all. The authors' code also computes the last step,
    which here nobody knows to be the last.

    Args:
        threshold and the others of `Policy`.
        rescale: coefficients of the polynomial, the highest power first; None for those published for the pipeline's
            family. They hold for one model: `fit_rescale`, or `para-kernels tune`, finds those of another.
        downsample_factor: compare every n-th token only, >= 1.

    Memory, beside that of `Policy`: one video stream (an n-th of it), for each branch.

    Raises:
        ValueError: if an argument has another type or lies outside its range.
    """

    title: ClassVar[str] = "TeaCache"
    uses_modulation: ClassVar[bool] = True

    rescale: tuple[float, ...] | None = None
    downsample_factor: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale is not None:
            if (
                not isinstance(self.rescale, Sequence)
                or not self.rescale
                or not all(map(is_finite_number, self.rescale))
            ):
                raise ValueError(f"rescale: got {self.rescale!r}, allowed is None or one or more finite coefficients")
            object.__setattr__(self, "rescale", tuple(self.rescale))  # a list would not be hashable
        check_count("downsample_factor", self.downsample_factor, least=1)

    def new_state(self, branch: str = "default") -> CacheState:
        return _TeaCacheState(self, branch)


class _TeaCacheState(CacheState):
    policy: TeaCache

    def reset(self) -> None:
        super().reset()
        self._previous: Tensor | None = None

    def _change(self, seen: Seen, comparable: bool) -> float | None:
        assert seen.modulated is not None, "TeaCache needs the modulated input"
        current = seen.modulated[:, seen.every(self.policy.downsample_factor)]
        self._previous, sums = _copy_and_diff(current, self._previous if comparable else None)
        if not comparable:
            return None
        return max(0.0, _polynomial(self.policy.rescale or IDENTITY, seen.change(sums)))

    def _compared(self, change: float) -> float:
        return self.accumulated + change


def _copy_and_diff(current: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """A copy of `current`, and the sums of its distance from `previous`: its residual over nothing, in one pass."""
    nothing = current.new_zeros(current.shape[-1:]).expand_as(current)
    return residual_diff(nothing, current, previous)


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


# --- calibration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Calibration(Policy):
    """Never reuses; notes in `pairs`, for every two consecutive steps, how much TeaCache's indicator and what the
    blocks added have changed: what `fit_rescale` takes. For one process."""

    title: ClassVar[str] = "TeaCache's calibration"
    uses_modulation: ClassVar[bool] = True

    threshold: float = field(default=1.0, kw_only=False)
    pairs: list[tuple[float, float]] = field(default_factory=list, repr=False, compare=False)

    def new_state(self, branch: str = "default") -> CacheState:
        return _CalibrationState(self, branch)


class _CalibrationState(CacheState):
    policy: Calibration

    def reset(self) -> None:
        super().reset()
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._input_change: float | None = None

    def _change(self, seen: Seen, comparable: bool) -> float | None:
        assert seen.modulated is not None, "TeaCache needs the modulated input"
        self._input, sums = _copy_and_diff(seen.modulated, self._input if comparable else None)
        self._input_change = seen.change(sums) if comparable else None
        return self._input_change

    def _is_close(self, diff: float) -> bool:
        return False

    def _video_tail(self, before: Tensor, after: Tensor) -> Tensor:
        self._output, sums = residual_diff(before, after, self._output)
        if self._input_change is not None:
            change, size = sums.tolist()
            if size > 0:
                self.policy.pairs.append((self._input_change, change / size))
        return self._output


def fit_rescale(pairs: Sequence[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """The polynomial of `degree` that turns changes of the indicator into changes of what the blocks add, by least
    squares (arXiv 2411.19108, section 3.3; the paper fits the model's output, here it is what a reused step reuses).

    Args:
        pairs: (change of the indicator, change of what the blocks added), as `Calibration` notes them.
        degree: 4, at which the paper's gain saturates (section 4.3, table 3).

    Returns:
        `degree` + 1 coefficients, the highest power first, as `TeaCache` takes them.

    Raises:
        ValueError: if there are fewer pairs that are finite than coefficients.
    """
    check_count("degree", degree, least=0)
    finite = [pair for pair in pairs if all(map(is_finite_number, pair))]
    if len(finite) <= degree:
        raise ValueError(f"pairs: got {len(finite)} that are finite, allowed are {degree + 1} or more")
    x, y = torch.tensor(finite, dtype=torch.float64).unbind(dim=1)
    largest = float(x.abs().max()) or 1.0  # powers of numbers up to 1: the system is far better conditioned
    powers = torch.arange(degree, -1, -1, dtype=torch.float64)
    system = (x / largest)[:, None] ** powers
    solution = torch.linalg.lstsq(system, y[:, None], driver="gelsd").solution[:, 0]
    return tuple((solution / largest**powers).tolist())
