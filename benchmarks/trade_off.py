"""What a curve of speed against quality says at one quality: the arithmetic behind ``docs/policies.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    for (a, value_a), (b, value_b) in zip(curve, curve[1:], strict=False):
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


def compared(curves: Mapping[str, Sequence[Point]], baseline: str, quality: float) -> list[Comparison]:
    """Every curve at `quality`, the fastest first, those that do not reach it last.

    Raises:
        ValueError: if there is no such baseline.
    """
    if baseline not in curves:
        raise ValueError(f"baseline: got {baseline!r}, allowed is one of {', '.join(curves)}")
    reference = at_quality(curves[baseline], quality)
    found = []
    for name, curve in curves.items():
        speed_up = at_quality(curve, quality)
        both = speed_up is not None and reference is not None
        found.append(Comparison(name, speed_up, 1.0 - reference / speed_up if both else None))
    return sorted(found, key=lambda entry: -(entry.speed_up or 0.0))
