"""Write the tables of README.md and docs/*.md from the records in ``benchmarks/results/``.

    python -m benchmarks.render_tables            rewrite the tables
    python -m benchmarks.render_tables --check    exit 1 if a table is not what the records say

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- /table -->``; NAME is one of TABLES below.
Where a record is missing, it says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .record import REPOSITORY, RESULTS, read_records
from .trade_off import QUALITY, UNCACHED, Point, at_quality, compared, verdict

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
    return [path for path in [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))] if path.is_file()]


def update(paths: Iterable[Path], results: Path, write: bool) -> list[Path]:
    """Render every table in `paths`; returns the files whose text was not what the records say.

    Raises:
        ValueError: a table that is not in TABLES.
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
        missing = [file for file in files if not (results / f"{file}.json").is_file()]
        rows = [row for file in files if file not in missing for row in read_records(file, results)]
        body = f"{make(rows)}\n" if rows else "\n"
        return f"{match[1]}{body}{_no_record(missing)}{match[3]}"

    return MARKED.sub(table, text)


def _no_record(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return f"*No record yet: {', '.join(f'`benchmarks/results/{file}.json`' for file in missing)}.*\n\n"


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


def _by(rows: Sequence[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in all of `keys` together, in the order of the records."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str([row[key] for key in keys]), []).append(row)
    return list(groups.values())


def _ratios(group: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """One cell per peer: how many times as fast this package is, empty where the peer did not run."""
    ratios = {row["peer"]: f"{row['ratio']:.2f}x" for row in group}
    return [ratios.get(peer, "") for peer in peers]


def _peers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["peer"] for row in rows if row["peer"]))


def _attention(rows: Sequence[Row]) -> str:
    """HunyuanVideo's heads and dtype: those of the first record."""
    usual = [row for row in rows if (row["dtype"], row["shape"]["D"]) == (rows[0]["dtype"], rows[0]["shape"]["D"])]
    peers = _peers(usual)
    body = [
        [f"{group[0]['shape']['S']:,}", f"{group[0]['tflops']:.0f}", *_ratios(group, peers)]
        for group in _by(usual, "shape")
    ]
    return _markdown(["tokens", "TFLOP/s", *(f"against {peer}" for peer in peers)], body, rows)


def _attention_all(rows: Sequence[Row]) -> str:
    peers = _peers(rows)
    body = [
        [
            f"{group[0]['dtype']}, D = {group[0]['shape']['D']}",
            f"{group[0]['shape']['S']:,}",
            f"{group[0]['median_ms']:.3f}",
            f"{group[0]['tflops']:.0f}",
            *_ratios(group, peers),
            f"{group[0]['notes']['difference']:.1e}",
        ]
        for group in _by(rows, "dtype", "shape")
    ]
    head = ["heads", "tokens", "ms", "TFLOP/s", *(f"against {peer}" for peer in peers), "relative difference"]
    return _markdown(head, body, rows)


def _power(rows: Sequence[Row]) -> str:
    """This package and its peers, each run without pause at the longest size."""
    measured = [row for row in rows if row["notes"].get("sustained_ms")]
    if not measured:
        return _markdown(["kernel", "ms per call", "MHz", "W"], [], rows)
    first = measured[0]
    lines = [(first["kernel"], first["notes"], "")]
    lines += [(row["peer"], row["notes"], "peer_") for row in measured]
    body = [
        [
            name,
            *(_rounded(notes[prefix + key], digits) for key, digits in (("sustained_ms", 1), ("clock_mhz", 0))),
            _rounded(notes[prefix + "power_w"], 0),
        ]
        for name, notes, prefix in lines
    ]
    return _markdown(["kernel", "ms per call", "MHz", "W"], body, measured)


def _int8(rows: Sequence[Row]) -> str:
    """Every 8-bit kernel at every length; what was timed alone stands elsewhere."""
    compared = [row for row in rows if row["peer"]]
    peers = _peers(compared)
    body = [
        [
            group[0]["kernel"],
            f"{group[0]['shape']['S']:,}",
            f"{group[0]['median_ms']:.3f}",
            _rounded(group[0]["tflops"], 0),
            *_ratios(group, peers),
        ]
        for group in _by(compared, "shape", "kernel")
    ]
    return _markdown(["kernel", "tokens", "ms", "TFLOP/s", *(f"against {peer}" for peer in peers)], body, rows)


def _int8_power(rows: Sequence[Row]) -> str:
    body = [
        [
            row["kernel"],
            f"{row['median_ms']:.1f}",
            _rounded(row["notes"]["clock_mhz"], 0),
            _rounded(row["notes"]["power_w"], 0),
        ]
        for row in rows
        if not row["peer"]
    ]
    return _markdown(["kernel, without pause", "ms per call", "MHz", "W"], body, rows)


def _int8_clocks(rows: Sequence[Row]) -> str:
    """By Nsight Compute."""
    body = [
        [
            row["kernel"],
            f"{row['notes']['clocks_per_block']:,}",
            _rounded(row["notes"]["issue_busy_percent"], 0),
        ]
        for row in rows
    ]
    return _markdown(["variant", "clocks per block of 128 x 128 scores", "% of issue slots"], body, rows)


def _int8_checks(rows: Sequence[Row]) -> str:
    body = [
        [
            row["notes"]["kernel"],
            row["check"].removeprefix("8-bit attention, "),
            row["dtype"],
            _exponent(row["worst"]),
            _exponent(row["notes"]["lse"]),
            "" if row["allowed"] is None else "yes" if row["passed"] else "**no**",
        ]
        for row in rows
    ]
    return _markdown(["kernel", "values", "dtype", "relative error", "error of the lse", "within bounds"], body, rows)


def _exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _rounded(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


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
    peers = [peer for peer in _peers(rows) if "dense" not in peer]
    body = [
        [
            names[group[0]["op"]],
            f"{group[0]['shape'].get('T', group[0]['shape'].get('valid')):,}",
            f"{group[0]['median_ms']:.2f}",
            f"{_of_dense(group):.3f}",
            *_ratios(group, peers),
        ]
        for group in _by(rows, "op", "shape")
    ]
    head = ["call", "valid tokens", "ms", "rate, of the dense one's", *(f"against {peer}" for peer in peers)]
    return _markdown(head, body, rows)


def _of_dense(group: Sequence[Row]) -> float:
    """The rate as a share of a dense call's; without a note of it, against dense calls of the same work."""
    return group[0]["notes"].get("of_dense_rate") or next(row["ratio"] for row in group if "dense" in row["peer"])


def _hard_values(rows: Sequence[Row]) -> str:
    peers = _peers(rows)
    body = [
        [str(group[0]["notes"]["values"]), f"{group[0]['tflops']:.0f}", *_ratios(group, peers)]
        for group in _by(rows, "shape", "notes")
    ]
    return _markdown(["values", "TFLOP/s", *(f"against {peer}" for peer in peers)], body, rows)


def _small(rows: Sequence[Row]) -> str:
    peers = _peers(rows)
    body = [
        [
            ", ".join(f"{letter} {group[0]['shape'][letter]:,}" for letter in ("B", "S", "Sk")),
            f"{group[0]['median_ms'] * 1e3:.1f}",
            *_ratios(group, peers),
        ]
        for group in _by(rows, "shape")
    ]
    return _markdown(["shape", "us", *(f"against {peer}" for peer in peers)], body, rows)


def _host(rows: Sequence[Row]) -> str:
    body = [
        [
            f"`{row['op'].removeprefix('host_')}`",
            f"{row['shape']['S']:,}",
            f"{row['median_ms'] * 1e3:.1f}",
            f"{row['peer_ms'] * 1e3:.1f} ({row['peer']})",
        ]
        for row in rows
    ]
    return _markdown(["call", "tokens", "us of the host", "the peer's"], body, rows)


def _checks(rows: Sequence[Row]) -> str:
    body = [
        [
            row["check"] + (f", {row['dtype']}" if row["dtype"] else ""),
            f"{row['cases']:,}",
            f"{row['failures']:,}",
            *("" if value is None else f"{value:.2g}" for value in (row["worst"], row["allowed"])),
        ]
        for row in rows
    ]
    return _markdown(["check", "cases", "failures", "worst", "allowed"], body, rows)


def _prepare_checks(rows: Sequence[Row]) -> str:
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
    return _markdown(["form", "worst", "allowed", "unfused", "equal to unfused"], body, rows)


def _prepare_speed(rows: Sequence[Row]) -> str:
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
    return _markdown(head, body, rows)


def _compiled(row: Row) -> str:
    """Time and ratio of what torch.compile made of the unfused expressions; empty where it did not run."""
    compiled = row["notes"].get("compiled_ms")
    return "" if compiled is None else f"{compiled:.3f} ({compiled / row['median_ms']:.1f}x)"


def _first_calls(rows: Sequence[Row]) -> str:
    body = [
        [
            f"{row['dtype']}, {row['check'].removeprefix('first call, ')}",
            f"{row['worst']:.1f}",
            f"{row['notes']['seconds_warm']:.1f}" if "seconds_warm" in row["notes"] else "",
            str(row["notes"].get("compiled_by_new_lengths", "")),
        ]
        for row in rows
    ]
    return _markdown(["heads", "first call, s", "with a warm cache, s", "compiled by 50 new lengths"], body, rows)


def _where(rows: Sequence[Row]) -> str:
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
    return _markdown(["work", "s" if in_seconds else "ms", "share", "kernels"], body, rows)


def _kernels(rows: Sequence[Row]) -> str:
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
    return _markdown(["kernel", "work", "launched in", "ms", "share", "launches"], body, rows)


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


def _settings(rows: Sequence[Row]) -> str:
    """A step, or the steps of a picture, under every setting."""
    steps = rows[0]["shape"]["steps"]
    body = [
        [
            row["kernel"],
            f"{row['median_ms'] / 1e3:.2f}",
            f"{row['ratio']:.2f}x",
            f"{row['notes']['peak_gib']:.1f}",
            f"{row['notes']['reused']} of {steps}",
            "" if row["kernel"] == row["peer"] else f"{row['notes']['difference']:.1e}",
        ]
        for row in rows
    ]
    seconds = "s per step" if steps == 1 else f"s per {steps} steps"
    head = ["setting", seconds, "speed-up", "peak GiB", "steps reused", "difference of the last output"]
    return _markdown(head, body, rows)


def _vae(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        shape, notes = row["shape"], row["notes"]
        what = f"{row['op'].removeprefix('vae_')} {shape['height']} x {shape['width']} x {shape['frames']}"
        one, several = f"{row['peer_ms'] / 1e3:.2f}", f"{row['median_ms'] / 1e3:.2f}"
        bits = "all" if notes["equal"] else f"no: {notes['difference']:.1e}"
        body.append([what, f"{notes['tiles']}", f"{shape['ranks']}", one, several, f"{row['ratio']:.2f}x", bits])
    header = ["video", "tiles", "GPUs", "s, diffusers' tiling on one", "s on all", "speed-up", "bits equal"]
    return _markdown(header, body, rows)


def _ranks_of_steps(rows: Sequence[Row]) -> str:
    body = [
        [
            row["kernel"],
            f"{row['median_ms']:.1f}",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}x{' (compiled)' if 'compiled' in row['peer'] else ''}",
            row["notes"]["place"] or "-",
        ]
        for row in rows
    ]
    ranks = rows[0]["shape"]["ranks"]
    return _markdown([f"way, {ranks} GPUs", "ms per step", "against one GPU", "split"], body, rows)


def _ring(rows: Sequence[Row]) -> str:
    """One row for each length and way; what was only checked stands elsewhere."""
    rows = [row for row in rows if "op" in row]
    body = []
    for group in _by(rows, "shape"):
        shape = group[0]["shape"]
        tokens = f"{shape['S']:,}"
        body.append([group[0]["peer"], tokens, f"{group[0]['peer_ms']:.2f}", "1.00x"])
        body += [
            [row["kernel"], tokens, f"{row['median_ms']:.2f}", f"{row['ratio']:.2f}x"]
            for row in group
            if row["kernel"] != row["peer"] and "portable" not in row["kernel"]
        ]
    ranks = rows[0]["shape"]["ranks"]
    return _markdown([f"way, {ranks} GPUs", "tokens in all", "ms per layer", "against one GPU"], body, rows)


def _step_parallel(rows: Sequence[Row]) -> str:
    first = rows[0]
    body = [["one GPU", f"{first['peer_ms'] / 1e3:.2f}", "1.00x", f"{first['notes']['peer_peak_gib']:.1f}", "", ""]]
    for row in rows:
        notes = row["notes"]
        same = {1: "the same", 0: "others"}.get(notes.get("same_decisions", -1), "")
        cells = [
            f"{row['kernel']}, {row['shape']['ranks']} GPUs",
            f"{row['median_ms'] / 1e3:.2f}",
            f"{row['ratio']:.2f}x",
        ]
        body.append([*cells, f"{notes['peak_gib']:.1f}", f"{notes['difference']:.1e}", same])
    head = ["way", "s per step", "speed-up", "peak GiB per GPU", "relative difference", "the cache's decisions"]
    return _markdown(head, body, rows)


def _predicted(rows: Sequence[Row]) -> str:
    """What `scaling_model` says of numbers of GPUs that no record of a measurement has."""
    body = [
        [
            row["notes"]["machine"],
            str(row["shape"]["ranks"]),
            row["kernel"],
            f"{row['median_ms'] / 1e3:.2f}",
            f"{row['notes']['video_s']:.0f}",
            f"{row['notes']['speed_up_with_cache']:.2f}x",
        ]
        for row in rows
        if row["shape"]["ranks"] != 2
    ]
    steps, reused = (rows[0]["notes"][key] for key in ("steps", "reused"))
    with_cache = f"predicted s, {steps} steps, {reused} reused"
    head = ["machine", "GPUs", "split", "predicted s per step", with_cache, "predicted speed-up, with the cache"]
    return _table_of_model(head, body, rows)


def _model_error(rows: Sequence[Row]) -> str:
    body = [
        [
            row["kernel"],
            f"{row['shape']['S']:,}",
            f"{row['median_ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['notes']['error']:+.1%}",
            row["peer"],
        ]
        for row in rows
    ]
    return _table_of_model(["way", "tokens", "predicted ms", "measured ms", "error", "row"], body, rows)


def _table_of_model(head: Sequence[str], body: Iterable[Sequence[str]], rows: Sequence[Row]) -> str:
    """Like `_markdown`, but under it stands that nothing ran, in place of where it ran."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    version = f"commit {rows[0]['commit']}, " if rows[0]["commit"] else ""
    return f"\n{table}\n\n*Predicted by a model, not measured; {version}{rows[0]['date']}; `{rows[0]['command']}`*\n"


def _quality(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        notes = row["notes"]
        errors = (notes["layer_error_median"], notes["layer_error_largest"])
        body.append(
            [
                row["check"].removeprefix("quality, "),
                f"{notes['reused']}/{notes['steps']}",
                _decibels(notes["psnr"]),
                _decibels(notes["psnr_worst"]),
                "" if notes["floor"] is None else f"{notes['floor']:.0f}",
                f"{notes['ssim']:.4f}",
                *("-" if error is None else f"{error:.1e}" for error in errors),
            ]
        )
    head = ["setting", "reused steps", "PSNR, dB", "worst video, dB", "asked for, dB", "SSIM", "layer error, median"]
    return _markdown([*head, "largest"], body, rows)


def _quality_cache(rows: Sequence[Row]) -> str:
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
    return _markdown(["threshold", *rounded], body, rows)


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


def _policies(rows: Sequence[Row]) -> str:
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
                _decibels(notes["psnr"]),
                _decibels(notes["psnr_worst"]),
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
    return f"\n{took}\n{_markdown(head, body, rows)}"


def _policies_compared(rows: Sequence[Row]) -> str:
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
    return f"\n{said}\n{_markdown(head, body, rows)}"


def _curves(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[str, list[Point]]:
    """(PSNR, value) of every setting whose videos are not the uncached ones, by policy."""
    cached = [row for row in rows if row["kernel"] != UNCACHED]
    return {
        group[0]["kernel"]: [(row["notes"]["psnr"], value(row)) for row in group if row["notes"]["psnr"] is not None]
        for group in _by(cached, "kernel")
    }


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


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
    "attention-all": (("gpu-attention",), _attention_all),
    "power": (("gpu-attention",), _power),
    "hard-values": (("gpu-hard_values",), _hard_values),
    "masked": (("gpu-masked",), _masked),
    "varlen": (("gpu-varlen",), _varlen),
    "small": (("gpu-small",), _small),
    "host": (("gpu-host_overhead",), _host),
    "first-calls": (("gpu-compile",), _first_calls),
    "checks": (
        (
            "gpu-correctness",
            "gpu-random_shapes",
            "gpu-repeatable",
            "gpu-no_sync",
            "gpu-compile_count",
            "gpu-cuda_graph",
            "gpu-sanitize",
        ),
        _checks,
    ),
    "step-profile": (("hunyuan_step_profile",), _where),
    "step-kernels": (("hunyuan_step_profile",), _kernels),
    "prepare-checks": (("prepare-checks",), _prepare_checks),
    "prepare-speed": (("prepare-speed",), _prepare_speed),
    "memory-bound": (("gpu-residual_diff", "gpu-merge_states"), _memory_bound),
    "step": (("hunyuan_step",), _step),
    "step-settings": (("hunyuan_step_settings",), _settings),
    "flux-settings": (("flux_step_settings",), _settings),
    "flux-ranks-profile": (("flux_step_ranks_profile",), _where),
    "flux-ranks": (("flux_step_ranks",), _ranks_of_steps),
    "cogvideox-ranks": (("cogvideox_step_ranks",), _ranks_of_steps),
    "vae": (("vae_parallel",), _vae),
    "ring": (("ring-speed",), _ring),
    "ring-int8": (("ring-int8",), _ring),
    "ring-without-p2p": (("ring-without_p2p",), _ring),
    "ring-checks": (("ring-correctness", "ring-stress"), _checks),
    "step-parallel": (("hunyuan_step_parallel",), _step_parallel),
    "scaling-predicted": (("scaling-predicted",), _predicted),
    "scaling-validation": (("scaling-validation",), _model_error),
    "toy-ranks": (("toy-ranks-cpu",), _checks),
    "demo": (("toy_demo",), _demo),
    "quality": (("toy_quality-cpu",), _quality),
    "quality-cache": (("toy_quality_cache-cpu",), _quality_cache),
    "int8-checks": (("int8-checks",), _int8_checks),
    "int8-speed": (("int8-speed",), _int8),
    "int8-first": (("int8-speed-first",), _int8),
    "int8-turns": (("int8-speed-turns",), _int8),
    "int8-clocks": (("int8-clocks",), _int8_clocks),
    "int8-power": (("int8-speed",), _int8_power),
    "policies": (("policies-cpu",), _policies),
    "policies-compared": (("policies-cpu",), _policies_compared),
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
