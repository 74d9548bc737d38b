"""Write the tables of README.md and docs/*.md from the records in ``benchmarks/results/``.

    python -m benchmarks.render_tables            rewrite the tables
    python -m benchmarks.render_tables --check    exit 1 if a table is not what the records say

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- /table -->``; NAME is one of TABLES below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .record import REPOSITORY, RESULTS, read_records

Row = dict[str, Any]

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    options = parser.parse_args()
    try:
        stale = update(documents(REPOSITORY), RESULTS, write=not options.check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path.relative_to(REPOSITORY)}: {'out of date' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


def documents(repository: Path) -> list[Path]:
    """The files that may hold tables."""
    return [path for path in [repository / "README.md", *sorted((repository / "docs").glob("*.md"))] if path.is_file()]


def update(paths: Iterable[Path], results: Path, write: bool) -> list[Path]:
    """Render every table in `paths`; returns the files whose text was not what the records say.

    Raises:
        ValueError: a table that is not in TABLES, or whose record is missing.
    """
    stale = []
    for path in paths:
        before = path.read_text()
        after = render(before, results)
        if after != before:
            stale.append(path)
            if write:
                path.write_text(after)
    return stale


def render(text: str, results: Path) -> str:
    """`text` with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"table {name!r} is unknown; there are: {', '.join(TABLES)}")
        files, make = TABLES[name]
        return f"{match[1]}{make(_rows(name, files, results))}\n{match[3]}"

    return MARKED.sub(table, text)


def _rows(name: str, files: Sequence[str], results: Path) -> list[Row]:
    missing = [file for file in files if not (results / f"{file}.json").is_file()]
    if missing:
        raise ValueError(f"table {name!r} needs {', '.join(f'benchmarks/results/{file}.json' for file in missing)}")
    return [row for file in files for row in read_records(file, results)]


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]], rows: Sequence[Row]) -> str:
    """A table whose first column is text and whose others are numbers, and under it where they come from."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines), "", _origin(rows), ""])


def _origin(rows: Sequence[Row]) -> str:
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


def _by_shape(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one shape together, in the order of the records."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["shape"]), []).append(row)
    return list(groups.values())


def _attention(rows: Sequence[Row]) -> str:
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    body = []
    for group in _by_shape(rows):
        ratios = {row["peer"]: f"{row['ratio']:.2f}x" for row in group}
        speeds = f"{group[0]['tflops']:.0f}"
        body.append([f"{group[0]['shape']['S']:,}", speeds, *(ratios.get(peer, "") for peer in peers)])
    return _markdown(["tokens", "TFLOP/s", *(f"against {peer}" for peer in peers)], body, rows)


def _masked(rows: Sequence[Row]) -> str:
    body = [
        [
            f"{row['shape']['S']:,}",
            f"{row['shape']['valid']:,}",
            f"{row['tflops']:.0f}",
            f"{row['median_ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['ratio']:.2f}x",
        ]
        for row in rows
    ]
    return _markdown(["tokens", "valid keys", "TFLOP/s", "ms", "SDPA with mask, ms", "speed-up"], body, rows)


def _varlen(rows: Sequence[Row]) -> str:
    names = {
        "varlen_padded": "four lengths, padded",
        "varlen_packed": "four lengths, packed",
        "varlen_one": "one length",
    }
    body = [
        [
            names[row["op"]],
            f"{row['shape'].get('T', row['shape'].get('valid')):,}",
            f"{row['median_ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['median_ms'] / row['peer_ms'] - 1:+.1%}",
        ]
        for row in rows
    ]
    return _markdown(["call", "tokens", "ms", "dense calls of the same work, ms", "cost"], body, rows)


def _memory_bound(rows: Sequence[Row]) -> str:
    body = [
        [
            f"`{row['op']}`",
            " x ".join(f"{size:,}" for size in row["shape"].values()),
            f"{row['gbps']:.0f}",
            f"{row['notes']['of_copy']:.0%}",
            f"{row['ratio']:.2f}x {row['peer']}",
        ]
        for row in rows
    ]
    return _markdown(["operation", "shape", "GB/s", "of a copy's", "speed-up"], body, rows)


def _step(rows: Sequence[Row]) -> str:
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
    return _markdown(["video", "attention", "s per step", "speed-up", "peak GiB", "relative difference"], body, rows)


def _demo(rows: Sequence[Row]) -> str:
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
                _decibels(notes["psnr"]),
                _decibels(notes["psnr_worst"]),
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
    return _markdown(head, body, rows)


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _micro(rows: Sequence[Row]) -> str:
    body = [
        [
            f"`{row['op']}`",
            ", ".join(f"{letter} {size:,}" for letter, size in row["shape"].items()),
            row["dtype"],
            f"{row['median_ms']:.2f}",
            f"{row['ratio']:.2f}x {row['peer']}" if row["peer"] else "",
        ]
        for row in rows
    ]
    return _markdown(["operation", "shape", "dtype", "ms", "speed-up"], body, rows)


# name of the table: (records that it is made from, how)
TABLES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Row]], str]]] = {
    "attention": (("gpu-attention",), _attention),
    "masked": (("gpu-masked",), _masked),
    "varlen": (("gpu-varlen",), _varlen),
    "memory-bound": (("gpu-residual_diff", "gpu-merge_states"), _memory_bound),
    "step": (("hunyuan_step",), _step),
    "demo": (("toy_demo",), _demo),
    "cpu": (
        (
            "flash_attention_kv_lens-cpu",
            "flash_attention_varlen-cpu",
            "residual_diff-cpu",
            "residual_diff_first-cpu",
            "merge_states-cpu",
        ),
        _micro,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
