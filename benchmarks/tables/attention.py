"""Attention in 16 bits, and the small operations, on one GPU or a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import Row, grouped, markdown_table, peers_of, ratio_cells, rounded


def fastest(rows: Sequence[Row]) -> str:
    """HunyuanVideo's heads and dtype: those of the first record."""
    usual = [row for row in rows if (row["dtype"], row["shape"]["D"]) == (rows[0]["dtype"], rows[0]["shape"]["D"])]
    peers = peers_of(usual)
    body = [
        [f"{group[0]['shape']['S']:,}", f"{group[0]['tflops']:.0f}", *ratio_cells(group, peers)]
        for group in grouped(usual, "shape")
    ]
    return markdown_table(["tokens", "TFLOP/s", *(f"against {peer}" for peer in peers)], body, rows)


def all_lengths(rows: Sequence[Row]) -> str:
    peers = peers_of(rows)
    body = [
        [
            f"{group[0]['dtype']}, D = {group[0]['shape']['D']}",
            f"{group[0]['shape']['S']:,}",
            f"{group[0]['median_ms']:.3f}",
            f"{group[0]['tflops']:.0f}",
            *ratio_cells(group, peers),
            f"{group[0]['notes']['difference']:.1e}",
        ]
        for group in grouped(rows, "dtype", "shape")
    ]
    head = ["heads", "tokens", "ms", "TFLOP/s", *(f"against {peer}" for peer in peers), "relative difference"]
    return markdown_table(head, body, rows)


def power(rows: Sequence[Row]) -> str:
    """This package and its peers, each run without pause at the longest size."""
    measured = [row for row in rows if row["notes"].get("sustained_ms")]
    if not measured:
        return markdown_table(["kernel", "ms per call", "MHz", "W"], [], rows)
    first = measured[0]
    lines = [(first["kernel"], first["notes"], "")]
    lines += [(row["peer"], row["notes"], "peer_") for row in measured]
    body = [
        [
            name,
            *(rounded(notes[prefix + key], digits) for key, digits in (("sustained_ms", 1), ("clock_mhz", 0))),
            rounded(notes[prefix + "power_w"], 0),
        ]
        for name, notes, prefix in lines
    ]
    return markdown_table(["kernel", "ms per call", "MHz", "W"], body, measured)


def masked(rows: Sequence[Row]) -> str:
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
    return markdown_table(["tokens", "valid keys", "TFLOP/s", "ms", "SDPA with mask, ms", "speed-up"], body, rows)


def varlen(rows: Sequence[Row]) -> str:
    names = {
        "varlen_padded": "four lengths, padded",
        "varlen_packed": "four lengths, packed",
        "varlen_one": "one length",
    }
    peers = [peer for peer in peers_of(rows) if "dense" not in peer]
    body = [
        [
            names[group[0]["op"]],
            f"{group[0]['shape'].get('T', group[0]['shape'].get('valid')):,}",
            f"{group[0]['median_ms']:.2f}",
            f"{_of_dense(group):.3f}",
            *ratio_cells(group, peers),
        ]
        for group in grouped(rows, "op", "shape")
    ]
    head = ["call", "valid tokens", "ms", "rate, of the dense one's", *(f"against {peer}" for peer in peers)]
    return markdown_table(head, body, rows)


def _of_dense(group: Sequence[Row]) -> float:
    """The rate as a share of a dense call's; without a note of it, against dense calls of the same work."""
    return group[0]["notes"].get("of_dense_rate") or next(row["ratio"] for row in group if "dense" in row["peer"])


def hard_values(rows: Sequence[Row]) -> str:
    peers = peers_of(rows)
    body = [
        [str(group[0]["notes"]["values"]), f"{group[0]['tflops']:.0f}", *ratio_cells(group, peers)]
        for group in grouped(rows, "shape", "notes")
    ]
    return markdown_table(["values", "TFLOP/s", *(f"against {peer}" for peer in peers)], body, rows)


def small(rows: Sequence[Row]) -> str:
    peers = peers_of(rows)
    body = [
        [
            ", ".join(f"{letter} {group[0]['shape'][letter]:,}" for letter in ("B", "S", "Sk")),
            f"{group[0]['median_ms'] * 1e3:.1f}",
            *ratio_cells(group, peers),
        ]
        for group in grouped(rows, "shape")
    ]
    return markdown_table(["shape", "us", *(f"against {peer}" for peer in peers)], body, rows)


def host(rows: Sequence[Row]) -> str:
    body = [
        [
            f"`{row['op'].removeprefix('host_')}`",
            f"{row['shape']['S']:,}",
            f"{row['median_ms'] * 1e3:.1f}",
            f"{row['peer_ms'] * 1e3:.1f} ({row['peer']})",
        ]
        for row in rows
    ]
    return markdown_table(["call", "tokens", "us of the host", "the peer's"], body, rows)


def first_calls(rows: Sequence[Row]) -> str:
    body = [
        [
            f"{row['dtype']}, {row['check'].removeprefix('first call, ')}",
            f"{row['worst']:.1f}",
            f"{row['notes']['seconds_warm']:.1f}" if "seconds_warm" in row["notes"] else "",
            str(row["notes"].get("compiled_by_new_lengths", "")),
        ]
        for row in rows
    ]
    return markdown_table(["heads", "first call, s", "with a warm cache, s", "compiled by 50 new lengths"], body, rows)


def memory_bound(rows: Sequence[Row]) -> str:
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
    return markdown_table(["operation", "shape", "GB/s", "of a copy's", "speed-up"], body, rows)


def micro(rows: Sequence[Row]) -> str:
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
    return markdown_table(["operation", "shape", "dtype", "ms", "speed-up"], body, rows)


def tail(rows: Sequence[Row]) -> str:
    """Tiles of 192 and 128 rows, whole, and with the last round cut, by the number of parts."""
    body = []
    for row in rows:
        shape, us = row["shape"], row["notes"]["microseconds"]
        cut = {name: time for name, time in us.items() if not name.endswith("/1")}
        best = min(cut, key=cut.__getitem__) if cut else None
        body.append(
            [
                f"{shape['B']} x {shape['Sq']:,} x {shape['Sk']:,}",
                *(f"{us[name]:.0f}" for name in ("192/1", "128/1")),
                "-" if best is None else f"{cut[best]:.0f} ({best})",
                f"{row['median_ms'] * 1e3:.0f} ({row['notes']['chosen']})",
            ]
        )
    head = ["samples x queries x keys", "192 rows, whole, us", "128 rows, whole", "best cut (rows/parts)", "chosen"]
    return markdown_table(head, body, rows)
