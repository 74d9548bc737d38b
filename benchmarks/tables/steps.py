"""Steps of a transformer on one GPU."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import Row, markdown_table


def step(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        shape, notes = row["shape"], row["notes"]
        size = f"{shape['height']} x {shape['width']} x {shape['frames']} ({shape['S']:,} tokens)"
        body.append([size, row["peer"], f"{row['peer_ms'] / 1e3:.2f}", "1.00x", f"{notes['peer_peak_gib']:.1f}", ""])
        body.append(
            [
                size,
                row["kernel"],
                f"{row['median_ms'] / 1e3:.2f}",
                f"{row['ratio']:.2f}x",
                f"{notes['peak_gib']:.1f}",
                f"{notes['difference']:.1e}",
            ]
        )
    return markdown_table(
        ["video", "attention", "s per step", "speed-up", "peak GiB", "relative difference"], body, rows
    )


def settings(rows: Sequence[Row]) -> str:
    """A step, or the steps of a picture, under every setting."""
    steps = rows[0]["shape"]["steps"]
    body = [
        [
            row["kernel"],
            f"{row['median_ms'] / 1e3:.2f}",
            f"{row['ratio']:.2f}x",
            f"{row['notes']['peak_gib']:.1f}",
            "" if row["notes"]["reused"] is None else f"{row['notes']['reused']} of {steps}",
            "" if row["kernel"] == row["peer"] else f"{row['notes']['difference']:.1e}",
        ]
        for row in rows
    ]
    seconds = "s per step" if steps == 1 else f"s per {steps} steps"
    head = ["setting", seconds, "speed-up", "peak GiB", "steps reused", "difference of the last output"]
    return markdown_table(head, body, rows)


def where(rows: Sequence[Row]) -> str:
    """Where the time of a step goes."""
    categories = [row for row in rows if row["op"] == "step_category"]
    in_seconds = sum(row["median_ms"] for row in categories) >= 1e3
    body = [
        [
            row["notes"]["name"],
            f"{row['median_ms'] / 1e3:.2f}" if in_seconds else f"{row['median_ms']:.1f}",
            f"{row['notes']['share']:.1%}",
            f"{row['notes']['launches']:,}",
        ]
        for row in categories
    ]
    return markdown_table(["work", "s" if in_seconds else "ms", "share", "kernels"], body, rows)


def kernels(rows: Sequence[Row]) -> str:
    """The kernels of a step that take the most time."""
    body = [
        [
            f"`{row['notes']['name'][:100].replace('|', ' ')}`",
            row["notes"]["category"],
            row["notes"]["module"],
            f"{row['median_ms']:,.1f}",
            f"{row['notes']['share']:.1%}",
            f"{row['notes']['launches']:,}",
        ]
        for row in rows
        if row["op"] == "step_kernel"
    ]
    return markdown_table(["kernel", "work", "launched in", "ms", "share", "launches"], body, rows)
