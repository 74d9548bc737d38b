"""Several GPUs, measured and predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .markdown import Row, grouped, markdown_table


def ring(rows: Sequence[Row]) -> str:
    """One row for each length and way; what was only checked stands elsewhere."""
    rows = [row for row in rows if "op" in row]
    body = []
    for group in grouped(rows, "shape"):
        shape = group[0]["shape"]
        tokens = f"{shape['S']:,}"
        body.append([group[0]["peer"], tokens, f"{group[0]['peer_ms']:.2f}", "1.00x"])
        body += [
            [row["kernel"], tokens, f"{row['median_ms']:.2f}", f"{row['ratio']:.2f}x"]
            for row in group
            if row["kernel"] != row["peer"] and "portable" not in row["kernel"]
        ]
    ranks = rows[0]["shape"]["ranks"]
    return markdown_table([f"way, {ranks} GPUs", "tokens in all", "ms per layer", "against one GPU"], body, rows)


def step_parallel(rows: Sequence[Row]) -> str:
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
    return markdown_table(head, body, rows)


def ranks_of_steps(rows: Sequence[Row]) -> str:
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
    return markdown_table([f"way, {ranks} GPUs", "ms per step", "against one GPU", "split"], body, rows)


def attention_of_steps(rows: Sequence[Row]) -> str:
    """Attention within steps, by how it is cut and what travels in one copy."""
    body = [
        [
            f"{row['shape']['ranks']} GPU{'s' if row['shape']['ranks'] > 1 else ''}, {row['kernel']}",
            " and ".join(f"{us:.0f}" for us in row["notes"]["attention_us"]),
            f"{row['notes']['shortest_us']:.0f}",
            "-" if row["notes"]["merging_us"] is None else f"{row['notes']['merging_us']:.0f}",
            f"{row['median_ms']:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(
        ["steps as graphs", "attention, us, on the two GPUs", "shortest", "merging, us", "ms per step"], body, rows
    )


def variants(rows: Sequence[Row]) -> str:
    """What was tried in a step, run by run."""
    body = [[row["notes"]["run"], row["kernel"], f"{row['median_ms']:.1f}"] for row in rows]
    return markdown_table(["GPUs", "variant", "ms per step"], body, rows)


def ring_kernel(rows: Sequence[Row]) -> str:
    """The ring's kernel when nothing has to be waited for, beside the plain one on the same keys."""
    body = [
        [
            row["op"].removeprefix("attention over "),
            f"{row['shape']['S']:,} x {row['shape']['keys']:,}",
            row["kernel"],
            f"{row['median_ms'] * 1e3:.1f}",
            f"{row['peer_ms'] * 1e3:.1f}",
            f"{row['ratio']:.2f}x",
        ]
        for row in rows
    ]
    head = ["keys in", "queries x keys", "the ring's kernel", "us", "plain, us", "plain / ring's"]
    return markdown_table(head, body, rows)


def where(rows: Sequence[Row]) -> str:
    """Where the time of a step goes, on each of two GPUs: alone, and together with rows cut in two ways."""
    parts = ("one_gpu_ms", "equal_ms", "unequal_ms")
    body = [[row["kernel"], *(f"{ms:.1f}" for part in parts for ms in row["notes"][part])] for row in rows]
    ways = ("alone", "equal pieces", "pieces of equal cost")
    head = [f"{way}, {rank} GPU" for way in ways for rank in ("first", "second")]
    return markdown_table(["work, ms", *head], body, rows)


def products(rows: Sequence[Row]) -> str:
    """How long linears take, by the number of rows, and with which tiles."""
    kinds = list(dict.fromkeys((row["shape"]["in"], row["shape"]["out"]) for row in rows))
    body = []
    for count in sorted({row["shape"]["rows"] for row in rows}):
        found = {(row["shape"]["in"], row["shape"]["out"]): row for row in rows if row["shape"]["rows"] == count}
        cells = [f"{found[kind]['median_ms'] * 1e3:.0f} ({found[kind]['kernel'].split()[-1]})" for kind in kinds]
        body.append([f"{count:,}", *cells])
    return markdown_table(["rows", *(f"{k:,} to {n:,} channels, us" for k, n in kinds)], body, rows)


def vae(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        shape, notes = row["shape"], row["notes"]
        what = f"{row['op'].removeprefix('vae_')} {shape['height']} x {shape['width']} x {shape['frames']}"
        one, several = f"{row['peer_ms'] / 1e3:.2f}", f"{row['median_ms'] / 1e3:.2f}"
        bits = "all" if notes["equal"] else f"no: {notes['difference']:.1e}"
        body.append([what, f"{notes['tiles']}", f"{shape['ranks']}", one, several, f"{row['ratio']:.2f}x", bits])
    header = ["video", "tiles", "GPUs", "s, diffusers' tiling on one", "s on all", "speed-up", "bits equal"]
    return markdown_table(header, body, rows)


def predicted(rows: Sequence[Row]) -> str:
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


def model_error(rows: Sequence[Row]) -> str:
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
    """Like `markdown_table`, but under it stands that nothing ran, in place of where it ran."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    version = f"commit {rows[0]['commit']}, " if rows[0]["commit"] else ""
    return f"\n{table}\n\n*Predicted by a model, not measured; {version}{rows[0]['date']}; `{rows[0]['command']}`*\n"
