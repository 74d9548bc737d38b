"""Predicts a HunyuanVideo step on 4 and 8 GPUs from what was measured on one and two. Nothing it writes is measured.

    python -m benchmarks.scaling_model --out benchmarks/results --plot docs/images/scaling.png

Per layer, heads of the other ranks' keys arrive one after the other while attention computes; what arrives too late
is waited for. A step is that for all blocks, the rest of the model shared by the ranks, the host's gaps, which are not,
and the gather of the output. Start-up costs come from the 8,192-token rows of ``scaling-ring.json``, costs per byte
from its 32,768-token rows; every other measured row, and each whole step, is compared with what the model says of it.

That file and ``scaling-step_profile.json`` are of the state of the kernels that the whole step on two GPUs was measured
with (``hunyuan_step_parallel.json``): rates of a later kernel would not explain that step.

Left out: memory (24 GB do not hold the model in bfloat16), contention of ranks for PCIe switches and host memory, the
multiprocessors that NCCL takes, attention's higher rate in shorter launches, the text encoders and the VAE.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .inputs import attention_flops
from .record import RESULTS, Record, read_records, write_records

Row = dict[str, Any]

STEPS, REUSED = 30, 12
"""The same cache hits in every row. An assumption: 12 of 30 reused is what ParaAttention's published 3675.7 s without
and 2271 s with First Block Cache (threshold 0.06, L20) come to."""
ALLOWED = 0.05
RANKS = (1, 2, 4, 8)
START_TOKENS, BYTES_TOKENS = 8192, 32768  # the rows that calibrate
WITHOUT_P2P = "NCCL without P2P, collective"
BYTES = 2  # of a bfloat16

# What no record in benchmarks/results holds. "Measured" are single readings on two H200 with NVLink, pieces of 731 MB.
INPUTS: dict[str, tuple[float, str]] = {
    "NVLink, copy engine, B/s": (373e9, "measured"),
    "NVLink, NCCL, B/s": (354e9, "measured"),
    "H200 pinned host memory, each way, B/s": (55e9, "measured, both GPUs at once"),
    "H100 memory, B/s": (3350e9, "data sheet"),
    "H200 memory, B/s": (4800e9, "data sheet"),
    "L20 memory, B/s": (864e9, "data sheet"),
    "RTX 4090 memory, B/s": (1008e9, "data sheet"),
    "L20 bfloat16, FLOP/s": (119.5e12, "data sheet, dense"),
    "RTX 4090 bfloat16, FLOP/s": (165.2e12, "data sheet, dense, fp32 accumulation"),
    "share of the peak on sm89": (0.93, "published attention on L20; assumed for linears and for the RTX 4090 too"),
    "PCIe 4 P2P, B/s": (20e9, "usual range 20 to 25 GB/s; its lower end"),
    "PCIe 4 through the host, B/s": (8e9, "usual range 8 to 10 GB/s; its lower end"),
    "L20 step by ParaAttention, s": (3675.7 / 30, "published, 30 steps without cache, all of the pipeline"),
}


def given(name: str) -> float:
    return INPUTS[name][0]


# --- one layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Attention of the model: `blocks` times `tokens` rows of `heads` x `head_dim`; one sample."""

    tokens: int
    heads: int = 24
    head_dim: int = 128
    blocks: int = 60
    out_channels: int = 64

    @property
    def flops(self) -> float:
        return attention_flops([self.tokens], [self.tokens], self.heads, self.head_dim)

    def row_bytes(self, tensors: int) -> float:
        """Bytes of one row of so many tensors like q."""
        return tensors * self.heads * self.head_dim * BYTES


@dataclass(frozen=True)
class Link:
    """What a rank receives over, and what that costs beside the wire.

    Attributes:
        transport: "peer", "host" or "collective".
        wire: bytes per second into a rank, and out of it at the same time.
        start: seconds per layer and remote piece that nothing hides.
        per_byte: of `collective`, seconds per byte of a remote piece: what is not hidden, and the merge.
        exchange_wire: bytes per second of ulysses' all-to-all.
        exchange_passes: seconds per byte of a rank's q, k, v and output to pack and unpack them.
    """

    transport: str
    wire: float
    start: float = 0.0
    per_byte: float = 0.0
    exchange_wire: float = 0.0
    exchange_passes: float = 0.0


def ring_seconds(attention: float, heads: int, pieces: int, piece_bytes: float, link: Link) -> float:
    """One layer of a ring of `pieces` ranks.

    Args:
        attention: seconds of this rank's share, with all keys at hand.
        piece_bytes: keys and values of one rank.
    """
    if pieces == 1:
        return attention
    if link.transport == "collective":
        return attention + (pieces - 1) * piece_bytes * link.per_byte
    compute, transfer = attention / (heads * pieces), piece_bytes / heads / link.wire
    now = arrived = 0.0
    for head in range(heads):
        # Through the host, the owners first write the head out; all do so at the same time.
        written = (head + 1) * transfer if link.transport == "host" else 0.0
        now += compute
        for _ in range(pieces - 1):
            arrived = max(arrived, written) + transfer
            now = max(now, arrived) + compute
    return now + (pieces - 1) * link.start


def exchange_seconds(work: Work, ring: int, ulysses: int, link: Link) -> float:
    """Heads for rows and back: q, k, v and the output."""
    if ulysses == 1:
        return 0.0
    held = work.tokens / (ring * ulysses) * work.row_bytes(4)
    return held * ((ulysses - 1) / ulysses / link.exchange_wire + link.exchange_passes)


def layer_seconds(work: Work, alone: float, ring: int, ulysses: int, link: Link) -> float:
    """One layer on its busiest rank; `alone` is the layer's time on one GPU."""
    heads = -(-work.heads // ulysses)
    attention = alone / ring * heads / work.heads
    piece_bytes = work.tokens / ring * work.row_bytes(2) * heads / work.heads
    return ring_seconds(attention, heads, ring, piece_bytes, link) + exchange_seconds(work, ring, ulysses, link)


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """One GPU, in seconds: attention of a layer, the rest of a step, the gaps of a step, the cache's comparison."""

    name: str
    layer: float
    rest: float
    gaps: float
    compare: float

    def step(self, work: Work) -> float:
        return work.blocks * self.layer + self.rest + self.gaps


@dataclass(frozen=True)
class Step:
    """A predicted step: computed in full, and with the blocks after the first reused."""

    full: float
    cached: float

    @property
    def video(self) -> float:
        """Seconds of all steps of a video with the cache."""
        return (STEPS - REUSED) * self.full + REUSED * self.cached


def step(work: Work, card: Card, ring: int, ulysses: int, link: Link) -> Step:
    ranks = ring * ulysses
    layer = layer_seconds(work, card.layer, ring, ulysses, link)
    blocks = work.blocks * layer + card.rest / ranks + card.gaps
    gather = work.tokens * work.out_channels * BYTES * (ranks - 1) / ranks / link.wire
    return Step(blocks + gather, blocks / work.blocks + card.compare / ranks + gather)


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The records, in seconds. `layers` is by (way, tokens): together, and on one GPU in the same run."""

    layers: dict[tuple[str, int], tuple[float, float]]
    steps: dict[str, tuple[float, float]]
    work: Work
    gaps: float
    elementwise: float
    compare: float

    @staticmethod
    def read(folder: Path = RESULTS) -> Measured:
        rows = read_records("scaling-ring", folder) + read_records("ring-without_p2p", folder)
        steps = read_records("hunyuan_step_parallel", folder)
        profile = {
            row["notes"]["name"]: row["median_ms"] / 1e3
            for row in read_records("scaling-step_profile", folder)
            if row["op"] == "step_category"
        }
        gaps = profile.pop("gaps between kernels")
        shape = steps[0]["shape"]
        return Measured(
            layers={(row["kernel"], row["shape"]["S"]): _pair(row) for row in rows},
            steps={row["kernel"]: _pair(row) for row in steps},
            work=Work(shape["S"], shape["H"], shape["D"], shape["blocks"]),
            gaps=gaps,
            elementwise=sum(profile.values()) - profile["attention"] - profile["linear"],
            compare=read_records("gpu-residual_diff", folder)[0]["median_ms"] / 1e3,
        )

    def links(self) -> dict[str, Link]:
        """Of two H200, by transport, with the costs that the short rows show."""
        nvlink, nccl = given("NVLink, copy engine, B/s"), given("NVLink, NCCL, B/s")
        work = Work(BYTES_TOKENS, self.work.heads, self.work.head_dim)
        held = work.tokens / 2 * work.row_bytes(4)
        passes = self._beyond("ulysses", BYTES_TOKENS, Link("peer", nvlink, exchange_wire=nccl)) / held
        wires = {"peer": nvlink, "host": given("H200 pinned host memory, each way, B/s")}
        links = {name: Link(name, wire, 0.0, 0.0, nccl, passes) for name, wire in wires.items()}
        links = {
            name: Link(name, link.wire, self._beyond(name, START_TOKENS, link), 0.0, nccl, passes)
            for name, link in links.items()
        }
        piece = work.tokens / 2 * work.row_bytes(2)
        for way in ("collective", WITHOUT_P2P):
            per_byte = self._beyond(way, BYTES_TOKENS, Link("collective", nccl)) / piece
            links[way] = Link("collective", nccl, 0.0, per_byte, nccl, passes)
        return links

    def _beyond(self, way: str, tokens: int, link: Link) -> float:
        """Seconds of a measured layer that a link without the cost in question does not explain."""
        return self.layers[way, tokens][0] - self.layer(way, tokens, link)

    def layer(self, way: str, tokens: int, link: Link) -> float:
        """What the model says of a measured layer on two GPUs."""
        work = Work(tokens, self.work.heads, self.work.head_dim)
        ring, ulysses = (1, 2) if way == "ulysses" else (2, 1)
        return layer_seconds(work, self.layers[way, tokens][1], ring, ulysses, link)

    def h200(self) -> Card:
        layer, alone = self.layers["peer", self.work.tokens][1], self.steps["ring"][1]
        return Card("H200", layer, alone - self.work.blocks * layer - self.gaps, self.gaps, self.compare)

    def card(self, name: str) -> Card:
        """A card that was not measured: FLOPs at a share of its peak, the rest at the speed of its memory."""
        work, flops = self.work, given(f"{name} bfloat16, FLOP/s") * given("share of the peak on sm89")
        slower = given("H100 memory, B/s") / given(f"{name} memory, B/s")
        linears = work.blocks * 24 * (work.heads * work.head_dim) ** 2 * work.tokens
        rest = linears / flops + self.elementwise * slower
        return Card(name, work.flops / flops, rest, self.gaps, self.compare * slower)


def _pair(row: Row) -> tuple[float, float]:
    return row["median_ms"] / 1e3, row["peer_ms"] / 1e3


# --- how far it is off ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Seconds that the model gives, and those that were measured. A row that calibrates proves nothing."""

    way: str
    tokens: int
    predicted: float
    measured: float
    role: str = "compared"

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def validate(measured: Measured) -> list[Comparison]:
    """Every measured row of this package on two GPUs, and a published step of the L20."""
    links, found = measured.links(), []
    for (way, tokens), (seconds, _) in measured.layers.items():
        if way not in (*links, "ulysses"):
            continue
        predicted = measured.layer(way, tokens, links.get(way, links["peer"]))
        calibrates = tokens == (START_TOKENS if way in ("peer", "host") else BYTES_TOKENS)
        found.append(Comparison(way, tokens, predicted, seconds, "calibrates" if calibrates else "compared"))
    for way, (seconds, _) in measured.steps.items():
        split = (2, 1) if way == "ring" else (1, 2)
        predicted = step(measured.work, measured.h200(), *split, links["peer"]).full
        found.append(Comparison(f"step, {way}", measured.work.tokens, predicted, seconds))
    published = given("L20 step by ParaAttention, s")
    alone = measured.card("L20").step(measured.work)
    found.append(Comparison("step, one L20", measured.work.tokens, alone, published, "published"))
    return found


# --- what it predicts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    machine: str
    card: Card
    ring: int
    ulysses: int
    step: Step
    alone: Step

    @property
    def split(self) -> str:
        if self.ring * self.ulysses == 1:
            return "one GPU"
        parts = [f"{name} {size}" for name, size in (("ring", self.ring), ("ulysses", self.ulysses)) if size > 1]
        return " x ".join(parts)


def machines(measured: Measured) -> dict[str, tuple[Card, Link]]:
    links = measured.links()
    h200, l20, rtx = measured.h200(), measured.card("L20"), measured.card("RTX 4090")
    return {
        "H200, NVLink, peer": (h200, links["peer"]),
        "H200, NVLink, host forced": (h200, links["host"]),
        "H200, NVLink, collective": (h200, links["collective"]),
        "L20, PCIe 4 P2P, peer": (l20, _pcie("L20", "peer", "PCIe 4 P2P, B/s", links)),
        "RTX 4090, PCIe 4, host": (rtx, _pcie("RTX 4090", "host", "PCIe 4 through the host, B/s", links)),
    }


def _pcie(card: str, transport: str, wire: str, links: dict[str, Link]) -> Link:
    slower = given("H200 memory, B/s") / given(f"{card} memory, B/s")
    like = links[transport]
    return Link(transport, given(wire), like.start, 0.0, given(wire), like.exchange_passes * slower)


def predict(measured: Measured) -> list[Prediction]:
    """Every machine with every number of ranks, and every way to split them."""
    found = []
    for machine, (card, link) in machines(measured).items():
        alone = step(measured.work, card, 1, 1, link)
        for ranks in RANKS:
            for ulysses in (size for size in RANKS if ranks % size == 0):
                ring = ranks // ulysses
                if ranks > 1 and ring == 1 and link.transport != "peer" and card.name == "H200":
                    continue  # ulysses alone does not use the ring's transport: it stands under peer
                split = step(measured.work, card, ring, ulysses, link)
                found.append(Prediction(machine, card, ring, ulysses, split, alone))
    return found


# --- what is written --------------------------------------------------------------------------------------------------


def records(measured: Measured) -> tuple[list[Record], list[Record]]:
    """(predictions, comparisons); the former carry notes["predicted"] = 1."""
    shape = {"S": measured.work.tokens, "H": measured.work.heads, "D": measured.work.head_dim}
    predictions = [
        Record(
            "predicted_step",
            {**shape, "blocks": measured.work.blocks, "ranks": one.ring * one.ulysses},
            "bfloat16",
            one.split,
            one.step.full * 1e3,
            "one GPU",
            one.alone.full * 1e3,
            notes={
                "predicted": 1,
                "machine": one.machine,
                "cached_step_ms": one.step.cached * 1e3,
                "video_s": one.step.video,
                "speed_up_with_cache": one.alone.video / one.step.video,
                "steps": STEPS,
                "reused": REUSED,
            },
        )
        for one in predict(measured)
    ]
    comparisons = [
        Record(
            "model_error",
            {**shape, "S": one.tokens},
            "bfloat16",
            one.way,
            one.predicted * 1e3,
            one.role,
            one.measured * 1e3,
            notes={"predicted": 1, "error": one.error},
        )
        for one in validate(measured)
    ]
    return predictions, comparisons


def draw(measured: Measured, out: Path) -> None:
    """Speed-up with the cache per GPU, of each machine's best split; the steps measured on two GPUs stand apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.6))
    predictions = predict(measured)
    for marker, machine in zip("osv^D", machines(measured), strict=True):
        shares = [_best_share(predictions, machine, ranks) for ranks in RANKS]
        axis.plot(RANKS, shares, marker=marker, markerfacecolor="white", linestyle="--", label=f"{machine} (predicted)")
    for marker, (way, (together, alone)) in zip("*P", measured.steps.items(), strict=True):
        label = f"2 H200, {way}, a full step (measured)"
        axis.plot([2], [alone / together / 2], f"k{marker}", markersize=10, linestyle="none", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
    axis.set_xlabel("GPUs, the best split of each")
    axis.set_ylabel("speed-up over one GPU, per GPU")
    axis.yaxis.set_major_formatter("{x:.2f}")
    title = f"Predicted: {measured.work.tokens:,} tokens, {STEPS} steps, {REUSED} of them reused"
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _best_share(predictions: Sequence[Prediction], machine: str, ranks: int) -> float:
    own = [one for one in predictions if one.machine == machine and one.ring * one.ulysses == ranks]
    return max(one.alone.video / one.step.video for one in own) / ranks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw a picture")
    options = parser.parse_args(arguments)
    measured = Measured.read()
    predictions, comparisons = records(measured)
    for row in comparisons:
        print(f"{row.kernel:30} {row.shape['S']:>8,} {row.median_ms:10.2f} {row.peer_ms:10.2f} "
              f"{row.notes['error']:+7.1%}  {row.peer}")  # fmt: skip
    for row in predictions:
        print(f"{row.notes['machine']:28} {row.shape['ranks']} {row.kernel:20} {row.median_ms / 1e3:7.2f} s "
              f"{row.ratio:5.2f}x, with the cache {row.notes['speed_up_with_cache']:5.2f}x  predicted")  # fmt: skip
    write_records("scaling-predicted", predictions, options.out)
    write_records("scaling-validation", comparisons, options.out)
    if options.plot:
        draw(measured, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
