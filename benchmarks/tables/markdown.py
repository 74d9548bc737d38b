"""What all tables are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]], rows: Sequence[Row]) -> str:
    """A table whose first column is text and whose others are numbers, and under it where they come from."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines), "", origin(rows), ""])


def origin(rows: Sequence[Row]) -> str:
    """One line per distinct environment, such as two scripts that were run on different days."""
    lines = []
    for row in rows:
        gpu = f"{row['gpu']}, driver {row['driver']}" if row["gpu"] else row["cpu"]
        software = f"torch {row['torch']}" + (f", Triton {row['triton']}" if row["gpu"] else "")
        version = f"commit {row['commit']}, " if row["commit"] else ""
        line = f"*{gpu}; {software}; {version}{row['date']}; `{row['command']}`*"
        if line not in lines:
            lines.append(line)
    return "  \n".join(lines)


def grouped(rows: Sequence[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in all of `keys` together, in the order of the records."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str([row[key] for key in keys]), []).append(row)
    return list(groups.values())


def ratio_cells(group: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """One cell per peer: how many times as fast this package is, empty where the peer did not run."""
    ratios = {row["peer"]: f"{row['ratio']:.2f}x" for row in group}
    return [ratios.get(peer, "") for peer in peers]


def peers_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["peer"] for row in rows if row["peer"]))


def exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def rounded(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"
