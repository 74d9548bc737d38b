"""The shipped pipeline: what settings cost, and the demo."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import Row, decibels, markdown_table


def settings(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        notes = row["notes"]
        errors = (notes["layer_error_median"], notes["layer_error_largest"])
        body.append(
            [
                row["check"].removeprefix("quality, "),
                f"{notes['reused']}/{notes['steps']}",
                decibels(notes["psnr"]),
                decibels(notes["psnr_worst"]),
                "" if notes["floor"] is None else f"{notes['floor']:.0f}",
                f"{notes['ssim']:.4f}",
                *("-" if error is None else f"{error:.1e}" for error in errors),
            ]
        )
    head = ["setting", "reused steps", "PSNR, dB", "worst video, dB", "asked for, dB", "SSIM", "layer error, median"]
    return markdown_table([*head, "largest"], body, rows)


def cache(rows: Sequence[Row]) -> str:
    """A row for each threshold, a column for each rounding."""
    found = {(row["notes"]["threshold"], row["notes"]["rounded"]): row["notes"] for row in rows}
    thresholds, rounded = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    body = [
        [
            f"{threshold:g}",
            *(f"{found[threshold, name]['reused']}/{found[threshold, name]['steps']}" for name in rounded),
        ]
        for threshold in thresholds
    ]
    return markdown_table(["threshold", *rounded], body, rows)


def demo(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        notes = row["notes"]
        body.append(
            [
                row["kernel"],
                f"{row['median_ms'] / 1e3:.1f}",
                f"{row['ratio']:.2f}x",
                f"{notes['speed_up_over_exact']:.2f}x",
                f"{notes['hits']}/{row['shape']['steps']}",
                decibels(notes["psnr"]),
                decibels(notes["psnr_worst"]),
                f"{notes['ssim']:.4f}",
                f"{notes['max_abs_diff']:.1e}",
            ]
        )
    head = [
        "setting",
        "seconds",
        "to stock",
        "to exact",
        "reused steps",
        "PSNR, dB",
        "worst video, dB",
        "SSIM",
        "largest difference",
    ]
    return markdown_table(head, body, rows)
