"""Cache policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..trade_off import QUALITY, UNCACHED, Point, at_quality, compared, verdict
from .markdown import Row, decibels, grouped, markdown_table


def settings(rows: Sequence[Row]) -> str:
    """Every policy at every threshold, no cache first."""
    body = []
    for row in rows:
        notes = row["notes"]
        body.append(
            [
                row["kernel"],
                "" if notes["value"] is None else f"{notes['value']:g}",
                f"{row['ratio']:.2f}x",
                f"{notes['speed_up_low']:.2f} to {notes['speed_up_high']:.2f}",
                f"{notes['speed_up_cpu']:.2f}x",
                f"{notes['computed_blocks']:.1%}",
                decibels(notes["psnr"]),
                decibels(notes["psnr_worst"]),
                f"{notes['ssim']:.4f}",
                f"{notes['digit']:.1%}",
            ]
        )
    head = [
        "policy",
        "threshold",
        "speed-up",
        "quartiles",
        "by processor time",
        "computed blocks",
        "PSNR, dB",
        "worst video, dB",
        "SSIM",
        "digits right",
    ]
    shape, notes = rows[0]["shape"], rows[0]["notes"]
    took = (
        f"{shape['prompts']} prompts in batches of {shape['batch']}, {shape['steps']} steps, {rows[0]['dtype']}:"
        f" {notes['run_cpu_s'] / 60:.0f} minutes of one core for the whole command,"
        f" {notes['run_s'] / 60:.0f} minutes by the clock."
    )
    return f"\n{took}\n{markdown_table(head, body, rows)}"


def compared_policies(rows: Sequence[Row]) -> str:
    """All policies at one quality, and what follows from it."""
    wall = _curves(rows, lambda row: row["ratio"])
    processor = _curves(rows, lambda row: row["notes"]["speed_up_cpu"])
    computed = _curves(rows, lambda row: -row["notes"]["computed_blocks"])  # of several crossings the lowest share
    found = compared(wall)
    said = f"{verdict(found)} {verdict(compared(processor), 'processor time')}"
    body = []
    for entry in found:
        share = at_quality(computed[entry.name], QUALITY)
        body.append(
            [
                entry.name,
                "not reached" if entry.speed_up is None else f"{entry.speed_up:.2f}x",
                "" if entry.less_time is None else f"{entry.less_time:+.1%}",
                _times(at_quality(processor[entry.name], QUALITY)),
                "" if share is None else f"{-share:.1%}",
            ]
        )
    head = [f"policy, at {QUALITY:g} dB", "speed-up", "time saved", "by processor time", "computed blocks"]
    return f"\n{said}\n{markdown_table(head, body, rows)}"


def _curves(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[str, list[Point]]:
    """(PSNR, value) of every setting whose videos are not the uncached ones, by policy."""
    cached = [row for row in rows if row["kernel"] != UNCACHED]
    return {
        group[0]["kernel"]: [(row["notes"]["psnr"], value(row)) for row in group if row["notes"]["psnr"] is not None]
        for group in grouped(cached, "kernel")
    }


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
