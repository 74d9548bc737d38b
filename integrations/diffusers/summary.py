"""A handle's report in plain text: it reads the same on a terminal, in a log and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from para_kernels.attention import selected_kernel
from para_kernels.attention8 import int8_faster_from, selected_kernel_int8
from para_kernels.cache import StepRecord
from para_kernels.graphs import Recorded

from .compiled import kinds
from .linears import QuantisedLinears, Taken
from .processor_swap import attn_processors

if TYPE_CHECKING:
    from .handle import Handle
    from .parallel import Spread


def render(handle: Handle) -> str:
    """What is installed, then a table of the last call's steps for each branch, then totals."""
    records = handle.records
    lines = [
        f"para-kernels on {handle.family.name}",
        f"attention   {_attention(handle)}",
        f"cache       {_cache(handle)}",
        *_compiled(handle),
        *_graphs(handle),
        *_linears(handle.linears),
        *_parallel(handle.spread),
    ]
    if not records:
        return "\n".join([*lines, "steps       none has run yet"])
    for branch in dict.fromkeys(record.branch for record in records):
        lines += ["", *_table(branch, [record for record in records if record.branch == branch])]
    return "\n".join([*lines, "", *_totals(records)])


def estimated_speedup(records: Sequence[StepRecord]) -> float:
    """Time of the steps had none been reused, over the time they took: a reused step counts as the median computed one.

    The median, because the first computed step of a process may hold compilation, which no reused step would repeat.
    """
    usual = median(_ms(record) for record in records if not record.reused)
    taken = sum(_ms(record) for record in records)
    return sum(usual if record.reused else _ms(record) for record in records) / taken


def _ms(record: StepRecord) -> float:
    assert record.ms is not None, "records of a handle are timed"
    return record.ms


def _attention(handle: Handle) -> str:
    if not handle.installed:
        return "diffusers' own (the installation was removed)"
    if handle.settings.attention == "stock":
        return "diffusers' own"
    there = sum(len(attn_processors(transformer)) for transformer in handle.transformers)
    modules = f"{handle.processors} of {there} processors swapped"
    return f"{handle.settings.attention}, {modules}; kernel: {_kernel(handle)}"


def _kernel(handle: Handle) -> str:
    device, dtype = handle.device, handle.transformer.dtype
    head_dim = getattr(handle.transformer.config, handle.family.head_dim)
    in_8_bits = handle.settings.attention == "int8"
    selected = selected_kernel_int8 if in_8_bits else selected_kernel
    faster_from = int8_faster_from(device, dtype, head_dim) if in_8_bits else None
    pays = "" if faster_from is None else f"; faster than exact from about {faster_from:,} keys on"
    return f"{selected(device, dtype, head_dim)} ({device}, {dtype}, head dim {head_dim}){pays}"


def _cache(handle: Handle) -> str:
    return "none" if handle.settings.cache is None else handle.settings.cache.description()


def _compiled(handle: Handle) -> list[str]:
    """What is compiled, and by what: nothing where nothing is."""
    backend = handle.settings.compile
    return [] if backend is None else [f"compile     {kinds(handle.blocks)}; no graph breaks; {backend}"]


def _graphs(handle: Handle) -> list[str]:
    """What is recorded: nothing where nothing is to be."""
    if not handle.settings.graphs:
        return []
    recorded = [forward.recorded for known in handle.graphs for forward in known.forwards.values()]
    obstacles = [f"graphs      none now: {known.obstacle}" for known in handle.graphs if known.obstacle]
    if not recorded:
        return obstacles or ["graphs      none yet: a forward on a GPU is recorded when its shapes come a second time"]
    counts = ", ".join(_graphs_of(one) for one in recorded)
    return [f"graphs      {len(recorded)} forward(s) recorded: {counts}", *obstacles]


def _graphs_of(recorded: Recorded) -> str:
    left_out = ""
    if recorded.parts:
        left_out = f" and a part that the cache {'may leave' if recorded.has_parts else 'has left'} out"
    return f"{recorded.graphs} graphs and {recorded.calls} calls between{left_out}"


def _linears(linears: QuantisedLinears | None) -> list[str]:
    """What is quantised, how, and what it takes: nothing where nothing is."""
    if linears is None:
        return []
    how = "weights alone" if linears.settings.weight_only else "activations x weights, per row"
    lines = [f"linears     fp8 (e4m3, {how}): {_taken(linears.transformers, 'the blocks')}"]
    if linears.text_encoders.count:
        lines.append(f"            fp8 (e4m3, weights alone): {_taken(linears.text_encoders, 'the text encoders')}")
    kept = "kept on the CPU" if linears.settings.keep_originals else "dropped: remove() cannot bring them back"
    return [*lines, f"            original weights {kept}"]


def _taken(taken: Taken, where: str) -> str:
    return f"{taken.count} in {where}, {taken.now / 2**20:.1f} MiB instead of {taken.before / 2**20:.1f}"


def _parallel(spread: Spread | None) -> list[str]:
    """How the work is spread, over which transport, and why: nothing on one rank."""
    if spread is None:
        return []
    everyone = spread.places.everyone
    place = spread.last_place or spread.places.fixed
    if place is None:
        return [f"parallel    {everyone.size()} ranks, the split is chosen when the shapes are known"]
    lines = [f"parallel    {everyone.size()} ranks: {place}; {place.why}"]
    return lines if place.pieces == 1 else [*lines, f"transport   {spread.transport}", *_modulations(spread)]


def _modulations(spread: Spread) -> list[str]:
    """Who makes what the timestep alone decides: nothing where it is not worth a line."""
    if spread.can_share is None:
        return []
    return [f"modulations {'each rank makes a part' if spread.shares else 'each rank makes all of them'}"]


def _table(branch: str, records: Sequence[StepRecord]) -> list[str]:
    head = f"{'step':>6}  {'diff':>8}  {'result':<8}  {'ms':>10}   [{branch}]"
    return [head, *(_row(record) for record in records)]


def _row(record: StepRecord) -> str:
    diff = "-" if record.diff is None else f"{record.diff:.4f}"
    return f"{record.step:>6}  {diff:>8}  {'reused' if record.reused else 'computed':<8}  {_ms(record):>10.1f}"


def _totals(records: Sequence[StepRecord]) -> list[str]:
    reused = sum(record.reused for record in records)
    total = sum(_ms(record) for record in records)
    return [
        f"steps       {len(records)}: {len(records) - reused} computed, {reused} reused ({reused / len(records):.0%})",
        f"time        {total / 1e3:.2f} s in the transformer, {total / len(records):.1f} ms per step",
        f"speed-up    {estimated_speedup(records):.2f}x, an estimate from the transformer's own time:"
        " a reused step counts as the median computed one",
    ]
