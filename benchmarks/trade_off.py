"""What a curve of speed against quality says at one quality: the arithmetic behind ``docs/policies.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

UNCACHED = "no cache"
BASELINE = "First Block Cache"
QUALITY = 30.0  # dB of PSNR, at which policies are compared
BAR = 0.15  # of the baseline's time: what another policy is asked to save

Point = tuple[float, float]
"""(quality, value): the quality of a setting, and its speed-up or whatever else is asked for there."""


def at_quality(curve: Sequence[Point], quality: float) -> float | None:
    """The value at `quality`, by straight lines between the points that follow each other; None if no line reaches it.

    Nothing is extrapolated. A curve that crosses the quality several times has several values; the highest counts, for
    that is the setting one would choose.

    Args:
        curve: in the order of its thresholds.
        quality: for example 30 dB.
    """
    found = [value for point, value in curve if point == quality]
    for (a, value_a), (b, value_b) in pairwise(curve):
        if min(a, b) < quality < max(a, b):
            found.append(value_a + (value_b - value_a) * (quality - a) / (b - a))
    return max(found, default=None)


@dataclass(frozen=True)
class Comparison:
    """One policy at the common quality.

    Attributes:
        name: the policy.
        speed_up: over no cache, interpolated; None where its curve does not reach the quality.
        less_time: than the baseline takes, as a share of it; negative where it takes more.
    """

    name: str
    speed_up: float | None
    less_time: float | None


def compared(
    curves: Mapping[str, Sequence[Point]], baseline: str = BASELINE, quality: float = QUALITY
) -> list[Comparison]:
    """Every curve of speed-ups at `quality`, the fastest first, those that do not reach it last.

    Raises:
        ValueError: if there is no such baseline.
    """
    if baseline not in curves:
        raise ValueError(f"baseline: got {baseline!r}, allowed is one of {', '.join(curves)}")
    reference = at_quality(curves[baseline], quality)
    found = []
    for name, curve in curves.items():
        speed_up = at_quality(curve, quality)
        less_time = None if speed_up is None or reference is None else 1.0 - reference / speed_up
        found.append(Comparison(name, speed_up, less_time))
    return sorted(found, key=lambda entry: -(entry.speed_up or 0.0))


def verdict(
    found: Sequence[Comparison],
    clock: str = "wall time",
    baseline: str = BASELINE,
    quality: float = QUALITY,
    bar: float = BAR,
) -> str:
    """What `compared` has found in speed-ups by `clock`, in a sentence or two."""
    reference = next(entry for entry in found if entry.name == baseline)
    best = found[0]
    if reference.speed_up is None or best.less_time is None:
        return f"{baseline} has no setting on either side of {quality:g} dB: nothing can be said."
    if best.name == baseline:
        return f"By {clock}, at {quality:g} dB no policy is faster than {baseline} ({reference.speed_up:.2f}x)."
    reached = "reached" if best.less_time >= bar else "not reached"
    return (
        f"By {clock}, at {quality:g} dB {best.name} is the fastest: {best.speed_up:.2f}x against"
        f" {reference.speed_up:.2f}x of {baseline}, {best.less_time:.1%} less time. The {bar:.0%} that a policy is"
        f" asked to save are {reached}."
    )
