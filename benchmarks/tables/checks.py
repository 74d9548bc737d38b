"""What holds, and on how many problems."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import Row, markdown_table


def what_holds(rows: Sequence[Row]) -> str:
    body = [
        [
            row["check"] + (f", {row['dtype']}" if row["dtype"] else ""),
            f"{row['cases']:,}",
            f"{row['failures']:,}",
            *("" if value is None else f"{value:.2g}" for value in (row["worst"], row["allowed"])),
        ]
        for row in rows
    ]
    return markdown_table(["check", "cases", "failures", "worst", "allowed"], body, rows)
