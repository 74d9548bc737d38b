"""A picture of what a GPU does in two layers of the ring: its kernels, and the copies beside them.

    torchrun --nproc-per-node 2 -m benchmarks.ring_report --out /tmp/ring --only trace
    python -m benchmarks.ring_timeline /tmp/ring/trace-peer-32768.json /tmp/ring/trace-host-32768.json --out ring.png

Reads the Chrome traces that torch.profiler wrote, one panel for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS = 2
KERNELS = {"ring_attention": ("attention", "#4c72b0"), "_pack": ("packing", "#8c8c8c")}
COPIES = {
    "PtoP": ("copies from the peer", "#55a868"),
    "DtoH": ("copies out", "#dd8452"),
    "HtoD": ("copies in", "#55a868"),
}
Bar = tuple[str, float, float, str]
"""(row, start, duration, colour), in microseconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="written by ring_report's section trace")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    options = parser.parse_args()
    panels = {
        path.stem.removeprefix("trace-"): bars(json.loads(path.read_text())["traceEvents"]) for path in options.traces
    }
    draw(panels, options.out)
    return 0


def bars(events: Sequence[dict[str, Any]]) -> list[Bar]:
    """The kernels and copies of the last LAYERS layers, from the start of the first one's packing."""
    found = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy"):
            kinds = KERNELS if event["cat"] == "kernel" else COPIES
            kind = next((kind for part, kind in kinds.items() if part in event["name"]), None)
            if kind is not None:
                found.append((kind[0], float(event["ts"]), float(event["dur"]), kind[1]))
    packings = sorted(start for row, start, _, _ in found if row == "packing")
    if len(packings) < LAYERS:
        raise ValueError(f"a trace of {len(packings)} layers, needs at least {LAYERS}")
    first = packings[-LAYERS]
    return [(row, start - first, duration, colour) for row, start, duration, colour in found if start >= first]


def draw(panels: dict[str, list[Bar]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 1.9 * len(panels)), squeeze=False)
    for axis, (name, found) in zip(axes[:, 0], panels.items(), strict=True):
        rows = list(
            dict.fromkeys(row for row, *_ in sorted(found, key=lambda bar: bar[0] not in ("packing", "attention")))
        )
        for row, start, duration, colour in found:
            axis.barh(rows.index(row), duration / 1e3, left=start / 1e3, height=0.7, color=colour, linewidth=0)
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.set_title(name.replace("-", ", ") + " tokens in all", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    axes[-1, 0].set_xlabel("milliseconds")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
