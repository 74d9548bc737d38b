"""Pictures: a contact sheet of videos, threshold against speed and quality, settings against quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .video import enlarge, to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL_PIXELS = 128  # about the width of one frame on the sheet
GAP = 4
PROMPT_GAP = 16
LABEL_WIDTH = 180
TITLE_HEIGHT = 34
FONT_SIZE = 17
PSNR_CEILING = 60.0  # dB: beyond it nobody sees a difference, and it would flatten the curve


def contact_sheet(
    path: Path, labels: Sequence[str], prompts: Sequence[str], videos: Sequence[np.ndarray], frames_per_video: int = 3
) -> None:
    """Write a PNG with one row per setting and one column of a few frames per prompt.

    Args:
        path: PNG to write, in a folder that exists.
        labels: one per row; a line break is allowed.
        prompts: one per column.
        videos: per row, (prompts, frames, height, width, 3) in [0, 1].
        frames_per_video: frames shown of each video, evenly spread from the first to the last.
    """
    cells = [[_strip(video, frames_per_video) for video in row] for row in videos]
    cell_height, cell_width = cells[0][0].shape[:2]
    width = LABEL_WIDTH + len(prompts) * (cell_width + PROMPT_GAP)
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + len(labels) * (cell_height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for column, prompt in enumerate(prompts):
        left = LABEL_WIDTH + column * (cell_width + PROMPT_GAP)
        draw.text((left, 6), _shortened(prompt, font, cell_width), fill="black", font=font)
    for row, label in enumerate(labels):
        top = TITLE_HEIGHT + row * (cell_height + GAP)
        draw.multiline_text((8, top + cell_height // 2), label, fill="black", font=font, anchor="lm")
        for column, cell in enumerate(cells[row]):
            sheet.paste(Image.fromarray(cell), (LABEL_WIDTH + column * (cell_width + PROMPT_GAP), top))
    sheet.save(path, optimize=True)


def _strip(video: np.ndarray, count: int) -> np.ndarray:
    """A few frames of one video side by side, uint8 (height, width, 3)."""
    chosen = np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)
    frames = _fit(to_uint8(video[chosen]))
    gap = np.full((frames.shape[1], GAP, 3), 255, dtype=np.uint8)
    pieces = [piece for frame in frames for piece in (frame, gap)]
    return np.concatenate(pieces[:-1], axis=1)


def _fit(frames: np.ndarray) -> np.ndarray:
    """Frames at about CELL_PIXELS wide: small ones by whole factors, so that pixels stay square and sharp."""
    height, width = frames.shape[1:3]
    if width <= CELL_PIXELS:
        return enlarge(frames, CELL_PIXELS // width)
    size = (CELL_PIXELS, round(height * CELL_PIXELS / width))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def threshold_plot(
    path: Path,
    thresholds: Sequence[float],
    speed_ups: Sequence[float],
    psnr: Sequence[float],
    ssim: Sequence[float],
    title: str,
) -> None:
    """Write a PNG: speed-up over the uncached run above, PSNR and SSIM against it below, both over the threshold.

    Args:
        path: PNG to write, in a folder that exists.
        thresholds: First Block Cache thresholds, ascending.
        speed_ups: seconds without cache over seconds with it.
        psnr: dB, infinite for equal videos.
        ssim: mean structural similarity.
        title: what was measured.
    """
    # The object interface: no global figure, no display, no change to the user's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, fontsize=11)

    top.plot(thresholds, speed_ups, "o-", color="tab:blue")
    top.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    for threshold, speed_up in zip(thresholds, speed_ups, strict=True):
        point = (threshold, speed_up)
        top.annotate(f"{speed_up:.2f}x", point, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
    top.set_ylabel("speed-up over no cache")
    top.set_ylim(bottom=0.95 * min(1.0, *speed_ups), top=1.15 * max(1.0, *speed_ups))

    bottom.plot(thresholds, [min(value, PSNR_CEILING) for value in psnr], "s-", color="tab:red")
    bottom.axhline(30.0, color="tab:red", linewidth=0.8, linestyle=":")
    bottom.set_ylim(top=PSNR_CEILING + 2)
    bottom.set_ylabel(f"PSNR (dB, at most {PSNR_CEILING:.0f} drawn)", color="tab:red")
    bottom.tick_params(axis="y", labelcolor="tab:red")
    bottom.set_xlabel("First Block Cache threshold")
    right = bottom.twinx()
    right.plot(thresholds, ssim, "^--", color="tab:green")
    right.set_ylim(bottom=min(0.9, min(ssim) - 0.01), top=1.005)
    right.set_ylabel("SSIM", color="tab:green")
    right.tick_params(axis="y", labelcolor="tab:green")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def settings_plot(
    path: Path,
    settings: Sequence[str],
    psnr: Sequence[float],
    ssim: Sequence[float],
    layers: Mapping[str, Sequence[float]],
    title: str,
) -> None:
    """Write a PNG: PSNR and SSIM of every setting above, the error of every attention layer below.

    Args:
        path: PNG to write, in a folder that exists.
        settings: names.
        psnr: dB against the exact videos, infinite for equal ones, by setting.
        ssim: by setting.
        layers: relative errors against float64 in the order of the layers, by setting's name.
        title: what was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2 + 0.32 * len(settings)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[0.32 * len(settings) + 0.6, 3.2])
    figure.suptitle(title, fontsize=9)
    left = figure.add_subplot(grid[0, 0])
    _points(left, settings, [min(value, PSNR_CEILING) for value in psnr], [_decibels(value) for value in psnr], 20.0)
    left.set_xlabel(f"PSNR to exact (dB, at most {PSNR_CEILING:.0f} drawn)")
    right = figure.add_subplot(grid[0, 1], sharey=left)
    _points(right, settings, ssim, [f"{value:.4f}" for value in ssim], 0.9)
    right.set_xlabel("SSIM to exact")
    right.tick_params(labelleft=False)
    below = figure.add_subplot(grid[1, :])
    for name, errors in layers.items():
        below.semilogy(range(1, len(errors) + 1), errors, "o-", markersize=3, linewidth=1.1, label=name)
    below.set_xlabel("attention layer, in the order in which they run")
    below.set_ylabel("error against float64")
    below.grid(alpha=0.3)
    if layers:
        below.legend(fontsize=8)
    figure.savefig(path)


def _points(axes: Axes, names: Sequence[str], values: Sequence[float], labels: Sequence[str], low: float) -> None:
    """A point on a line of its own for each name, the first on top; the axis begins at `low` or at the lowest value."""
    places = range(len(names))
    axes.plot(values, places, "o", color="tab:blue")
    for place, value, label in zip(places, values, labels, strict=True):
        axes.annotate(label, (value, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    low, high = min(low, *values), max(values)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.25 * (high - low))
    axes.grid(alpha=0.3)


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal"
