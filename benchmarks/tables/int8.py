"""Attention in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import Row, exponent, grouped, markdown_table, peers_of, ratio_cells, rounded


def speed(rows: Sequence[Row]) -> str:
    """Every 8-bit kernel at every length; what was timed alone stands elsewhere."""
    compared = [row for row in rows if row["peer"]]
    peers = peers_of(compared)
    body = [
        [
            group[0]["kernel"],
            f"{group[0]['shape']['S']:,}",
            f"{group[0]['median_ms']:.3f}",
            rounded(group[0]["tflops"], 0),
            *ratio_cells(group, peers),
        ]
        for group in grouped(compared, "shape", "kernel")
    ]
    return markdown_table(["kernel", "tokens", "ms", "TFLOP/s", *(f"against {peer}" for peer in peers)], body, rows)


def power(rows: Sequence[Row]) -> str:
    body = [
        [
            row["kernel"],
            f"{row['median_ms']:.1f}",
            rounded(row["notes"]["clock_mhz"], 0),
            rounded(row["notes"]["power_w"], 0),
        ]
        for row in rows
        if not row["peer"]
    ]
    return markdown_table(["kernel, without pause", "ms per call", "MHz", "W"], body, rows)


def slots(rows: Sequence[Row]) -> str:
    """The attention kernel alone, one call behind the other."""
    body = [
        [
            row["kernel"],
            f"{row['shape']['S']:,}",
            " and ".join(f"{ms:.2f}" for ms in row["notes"]["runs_ms"]),
            rounded(row["notes"]["clock_mhz"], 0),
            rounded(row["notes"]["power_w"], 0),
        ]
        for row in rows
    ]
    return markdown_table(["kernel, without pause", "tokens", "ms per call", "MHz", "W"], body, rows)


def largest(rows: Sequence[Row]) -> str:
    """With the largest keys and without, and other orders of the work."""
    body = [
        [
            row["kernel"],
            f"{row['median_ms']:.1f}",
            rounded(row["notes"]["clock_mhz"], 0),
            exponent(row["notes"]["heavy_tails"]),
            exponent(row["notes"]["two_kinds"]),
        ]
        for row in rows
    ]
    return markdown_table(
        ["kernel, without pause", "ms per call", "MHz", "error, heavy tails", "error, keys of two kinds"], body, rows
    )


def issue(rows: Sequence[Row]) -> str:
    """Where ptxas issues the next scores, and what it makes of the time."""
    body = [
        [
            row["kernel"],
            f"{row['median_ms']:.1f}",
            rounded(row["notes"]["clock_mhz"], 0),
            " and ".join(map(str, row["notes"].get("scores_at", ["-"]))),
            str(row["notes"].get("instructions", "-")),
        ]
        for row in rows
    ]
    return markdown_table(
        ["kernel, without pause", "ms per call", "MHz", "next scores at instruction", "of"], body, rows
    )


def quantisation(rows: Sequence[Row]) -> str:
    """By kernel."""
    names = list(rows[-1]["notes"]["us"])
    body = [
        [
            row["kernel"],
            f"{row['shape']['S']:,}",
            *(str(row["notes"]["us"].get(name, "-")) for name in names),
            f"{row['median_ms']:.2f} ms",
        ]
        for row in rows
    ]
    return markdown_table(["second pass", "tokens", *(f"{name}, us" for name in names), "together"], body, rows)


def clocks(rows: Sequence[Row]) -> str:
    """By Nsight Compute."""
    body = [
        [
            row["kernel"],
            f"{row['notes']['clocks_per_block']:,}",
            rounded(row["notes"]["issue_busy_percent"], 0),
        ]
        for row in rows
    ]
    return markdown_table(["variant", "clocks per block of 128 x 128 scores", "% of issue slots"], body, rows)


def checks(rows: Sequence[Row]) -> str:
    body = [
        [
            row["notes"]["kernel"],
            row["check"].removeprefix("8-bit attention, "),
            row["dtype"],
            exponent(row["worst"]),
            exponent(row["notes"]["lse"]),
            "" if row["allowed"] is None else "yes" if row["passed"] else "**no**",
        ]
        for row in rows
    ]
    return markdown_table(
        ["kernel", "values", "dtype", "relative error", "error of the lse", "within bounds"], body, rows
    )
