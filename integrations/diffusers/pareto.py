"""The picture of a trade-off: speed-up against quality, a colour per policy, and the front that nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .figures import PSNR_CEILING

Point = tuple[float, float]
"""(quality, speed-up), both the higher the better."""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in both, by ascending quality."""
    front: list[Point] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def pareto_plot(
    path: Path,
    series: Mapping[str, Sequence[Point]],
    *,
    metric: str,
    floor: float,
    title: str,
    chosen: Point | None = None,
) -> None:
    """Write a PNG.

    Args:
        path: PNG to write, in a folder that exists.
        series: points by the policy's name, at least one each; an infinite PSNR is drawn at the ceiling.
        metric: ``psnr`` or ``ssim``.
        floor: the quality that is asked for.
        title: what was measured.
        chosen: the point to mark.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not series or not all(series.values()):
        raise ValueError(f"series: got {dict(series)}, allowed are one or more, each of one or more points")
    # The object interface: no global figure, no display, no change to the user's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    ceiling = PSNR_CEILING if metric == "psnr" else 1.0
    drawn = {
        name: sorted((min(quality, ceiling), speed_up) for quality, speed_up in points)
        for name, points in series.items()
    }
    front = pareto_front([point for points in drawn.values() for point in points])
    axes.plot(*zip(*front, strict=True), color="black", linewidth=6, alpha=0.12, solid_capstyle="round", label="front")
    for (name, points), marker in zip(drawn.items(), _markers(len(drawn)), strict=True):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=5, linewidth=1.1, alpha=0.85, label=name)
    shown = min(floor, ceiling)
    axes.axvline(shown, color="grey", linewidth=0.9, linestyle=":")
    axes.annotate(
        f"{metric.upper()} {floor:g}", (shown, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -12),
        textcoords="offset points", fontsize=9, color="grey",
    )  # fmt: skip
    if chosen is not None:
        axes.plot([min(chosen[0], ceiling)], [chosen[1]], "*", color="black", markersize=15, label="chosen", zorder=5)
    axes.set_xlabel("PSNR to the uncached videos, dB" if metric == "psnr" else "SSIM to the uncached videos")
    axes.set_ylabel("speed-up over no cache, wall time")
    axes.set_ylim(bottom=min(1.0, *(speed_up for points in drawn.values() for _, speed_up in points)) * 0.95)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path)


def _markers(count: int) -> list[str]:
    return [("o", "s", "^", "v", "D", "P", "X", "<", ">")[i % 9] for i in range(count)]
