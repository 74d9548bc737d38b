"""The preparation kernel."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import Row, markdown_table


def checks(rows: Sequence[Row]) -> str:
    """The forms of the preparation, with the errors of the unfused expressions beside."""
    body = [
        [
            f"{row['check'].removeprefix('preparation, ')}, {row['dtype']}",
            f"{row['worst']:.2g}",
            f"{row['allowed']:.2g}",
            f"{row['notes']['unfused']:.2g}",
            f"{row['notes']['equal']:.2%}",
        ]
        for row in rows
    ]
    return markdown_table(["form", "worst", "allowed", "unfused", "equal to unfused"], body, rows)


def speed(rows: Sequence[Row]) -> str:
    body = [
        [
            f"{row['notes']['block']}, {row['shape']['S']:,} tokens",
            f"{row['median_ms']:.3f}",
            f"{row['gbps']:,.0f}",
            f"{row['notes']['of_copy']:.0%}",
            f"{row['peer_ms']:.3f} ({row['ratio']:.1f}x)",
            _compiled(row),
            f"{row['notes']['host_us']:.0f}",
        ]
        for row in rows
    ]
    head = ["block", "ms", "GB/s", "of a copy's", "unfused, eager, ms", "unfused, compiled, ms", "us of the host"]
    return markdown_table(head, body, rows)


def _compiled(row: Row) -> str:
    """Time and ratio of what torch.compile made of the unfused expressions; empty where it did not run."""
    compiled = row["notes"].get("compiled_ms")
    return "" if compiled is None else f"{compiled:.3f} ({compiled / row['median_ms']:.1f}x)"
