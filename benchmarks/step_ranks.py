"""Denoising steps of FLUX.1-dev or CogVideoX-5b on all GPUs of torchrun's world, against one GPU and against diffusers'
own context parallelism where that has a plan for the model (FLUX).

    torchrun --nproc-per-node 2 -m benchmarks.step_ranks flux --out benchmarks/results
    torchrun --nproc-per-node 2 -m benchmarks.step_ranks cogvideox --out benchmarks/results
    torchrun --nproc-per-node 2 -m benchmarks.step_ranks flux --graphs --text-cost 1 1.08 1.16 1.24 --out /tmp/steps
    torchrun --nproc-per-node 2 -m benchmarks.step_ranks flux --small --out /tmp/steps     a tiny model, over gloo

Every way runs the same steps in rounds, after two to warm up; of each round the slowest rank counts, of the rounds the
median. A round of FLUX is as long as an image: GPUs at their power limit change their clocks within seconds, so that
rounds of 4 steps differ by 5 %, rounds of 28 by less than 1 %. Python collects no garbage meanwhile: once in a while
that takes as long as two steps of FLUX, in one process and not in the other. Each rank compares its output with its own
on one GPU. With --compile also with compiled blocks, with --graphs also as CUDA graphs, on one GPU and on all; with
both also with both. diffusers' ways use cuDNN's attention, the fastest that its context parallelism takes. A way that
fails is reported and does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from para_kernels import ContextParallel
from para_kernels.integrations.diffusers import accelerate, register_family
from para_kernels.integrations.diffusers.families import family_of
from para_kernels.integrations.diffusers.processes import is_first, joined, own_device
from para_kernels.parallel.agreement import exchange

from . import step_profile
from .record import Record, write_records
from .reference import relative_error
from .step_settings import MODELS, Model, add_side, forward

ALONE, STOCK_ALONE = "one GPU", "diffusers on one GPU"
AUTO = "auto"
WARM_UP = 2
STEPS = {"flux": 28, "cogvideox": 4}
CUDNN_BACKEND = "_native_cudnn"


@dataclass
class Measured:
    """Seconds of a step, of the slowest rank, in each round; the last output on the host; where the work was."""

    rounds: list[float]
    output: Tensor
    place: str

    @property
    def seconds(self) -> float:
        return median(self.rounds)


def main() -> int:
    options = _options()
    device = own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with joined(device, ContextParallel()), torch.no_grad():
        model = MODELS[options.model](options, device, dtype)
        _say(f"{options.model}: {model.shape}, {len(model.steps)} steps, {dist.get_world_size()} ranks")
        measured: dict[str, Measured] = {}
        chosen = _chosen(ways(model, options.compile, options.graphs, options.text_cost), options.only)
        failed = [
            name for name, way in chosen.items() if not _measured(model, name, way, measured, device, options.rounds)
        ]
        found = _records(model, measured, dtype)
        if is_first():
            write_records(f"{model.op}_ranks", found, options.out)
        if options.profile:
            _profile(model, dtype, device, options.out)
        _say(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


Entered = AbstractContextManager[tuple[Any, Callable[[], str]]]
Way = Callable[[], Entered]
"""Gives, while it is entered, the transformer to call and what tells afterwards where the work was."""


def ways(model: Model, compiled: bool, graphs: bool, text_costs: Sequence[float]) -> dict[str, Way]:
    world = dist.get_world_size()
    ours = {
        ALONE: None,
        AUTO: ContextParallel("auto"),
        "ring": ContextParallel(ring=world),
        "ulysses": ContextParallel(ulysses=world),
    }
    found: dict[str, Way] = {name: _ours(model, parallel) for name, parallel in ours.items()}
    for how in _hows(compiled, graphs):
        for name in (ALONE, AUTO):
            found[", ".join([name, *how])] = _ours(model, ours[name], how)
    for cost in text_costs:
        for how in ((), *_hows(compiled, graphs)):
            found[", ".join([f"{AUTO} (text {cost:g})", *how])] = _ours(model, ours[AUTO], how, cost)
    found[STOCK_ALONE] = _stock(model, None)
    if getattr(model.transformer, "_cp_plan", None) and next(model.transformer.parameters()).is_cuda:
        found["diffusers ring"] = _stock(model, {"ring_degree": world})
        found["diffusers ulysses"] = _stock(model, {"ulysses_degree": world})
    return found


def _chosen(found: dict[str, Way], only: list[str] | None) -> dict[str, Way]:
    if unknown := set(only or ()) - set(found):
        raise ValueError(f"--only: got {sorted(unknown)}, allowed are {list(found)}")
    return {name: way for name, way in found.items() if only is None or name in only}


_COMPILED, _GRAPHS = "compiled", "graphs"


def _hows(compiled: bool, graphs: bool) -> list[tuple[str, ...]]:
    """What is asked for, each alone and both together."""
    hows = [(_COMPILED,)] * compiled + [(_GRAPHS,)] * graphs
    return [*hows, (_COMPILED, _GRAPHS)] if compiled and graphs else hows


def _ours(
    model: Model, parallel: ContextParallel | None, how: Sequence[str] = (), text_cost: float | None = None
) -> Way:
    @contextmanager
    def entered() -> Iterator[tuple[Any, Callable[[], str]]]:
        settings = {"compile": _COMPILED in how, "graphs": _GRAPHS in how}
        with _text_at(text_cost, model):
            handle = accelerate(model.pipe, cache=None, parallel=parallel, **settings)
        try:
            yield model.transformer, lambda: "" if handle.spread is None else str(handle.spread.last_place)
        finally:
            handle.remove()

    return entered


@contextmanager
def _text_at(cost: float | None, model: Model) -> Iterator[None]:
    """Inside, a row of the text costs so much; None: what the table says."""
    if cost is None:
        yield
        return
    family = family_of(model.pipe)
    forget = register_family(replace(family, shards=replace(family.shards, text_cost=cost)), instead_of=family)
    try:
        yield
    finally:
        forget()


def _stock(model: Model, degrees: dict[str, Any] | None) -> Way:
    """A twin of the transformer, with the same weights: diffusers' parallelism cannot be taken off again."""

    def entered() -> Entered:
        from diffusers import ContextParallelConfig

        with torch.device("meta"):
            twin = type(model.transformer)(**model.transformer.config).eval()
        twin.load_state_dict(model.transformer.state_dict(), assign=True)
        if next(twin.parameters()).is_cuda:
            twin.set_attention_backend(CUDNN_BACKEND)
        if degrees is not None:
            twin.enable_parallelism(config=ContextParallelConfig(**degrees))
        return nullcontext((twin, lambda: ""))

    return entered


def _measured(
    model: Model, name: str, way: Way, measured: dict[str, Measured], device: torch.device, rounds: int
) -> bool:
    try:
        with way() as (transformer, place), _no_garbage_collected():
            for _ in range(WARM_UP):
                forward(transformer, model.steps[0])
            times = [_round(transformer, model, device) for _ in range(rounds)]
            everyone = exchange(_world(), [seconds for seconds, _ in times], "seconds")
            of_rounds = [max(of_ranks) for of_ranks in zip(*everyone, strict=True)]
            measured[name] = Measured(of_rounds, times[-1][1].float().cpu(), place())
    except Exception as error:  # one way that fails, on all ranks alike, must not cost the others their results
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
        return False
    base, seconds = _base(name, measured), measured[name].seconds
    against = f"{measured[base].seconds / seconds:5.2f}x" if base is not None else ""
    _say(f"{name:<22} {seconds * 1e3:9.1f} ms a step  {against}  {measured[name].place}")
    return True


def _round(transformer: Any, model: Model, device: torch.device) -> tuple[float, Tensor]:
    """Seconds per step on this rank, of steps that all ranks begin together; the last output."""
    exchange(_world(), None, "arrival")
    start = time.perf_counter()
    outputs = [forward(transformer, inputs) for inputs in model.steps]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / len(model.steps), outputs[-1]


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _base(name: str, measured: dict[str, Measured]) -> str | None:
    """The way that a way is compared with; None where that has failed."""
    way, comma, how = name.partition(", ")
    base = ALONE + comma + how if way.startswith(AUTO) else ALONE
    return base if base in measured else None


def _profile(model: Model, dtype: torch.dtype, device: torch.device, out: Path) -> None:
    """A step of the way "auto" under the profiler, on every rank alike; the first rank's is written and printed."""
    with _ours(model, ContextParallel("auto"))() as (transformer, _):
        for _ in range(WARM_UP):
            forward(transformer, model.steps[0])
        exchange(_world(), None, "arrival")
        found = step_profile.profiled(transformer, lambda: forward(transformer, model.steps[0]), device)
    if is_first():
        shape = model.shape | {"ranks": dist.get_world_size()}
        rows = step_profile.records(found, shape, str(dtype).removeprefix("torch."), "auto")
        write_records(f"{model.op}_ranks_profile", rows, out)
        print(step_profile.table(found, rows), flush=True)


def _records(model: Model, measured: dict[str, Measured], dtype: torch.dtype) -> list[Record]:
    """One for each way, against one GPU of this package. Collective."""
    alone, made = measured.get(ALONE), []
    for name, entry in measured.items():
        off = None if alone is None else relative_error(entry.output, alone.output)
        off = max((theirs for theirs in exchange(_world(), off, "differences") if theirs is not None), default=None)
        base = _base(name, measured)
        shape = model.shape | {"steps": len(model.steps), "ranks": dist.get_world_size()}
        rounds_ms = [round(seconds * 1e3, 2) for seconds in entry.rounds]
        notes = {"difference": off, "place": entry.place, "rounds_ms": rounds_ms}
        kind, ms = str(dtype).removeprefix("torch."), entry.seconds * 1e3
        base_ms = None if base is None else measured[base].seconds * 1e3
        made.append(Record(model.op, shape, kind, name, ms, base, base_ms, notes=notes))
    return made


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _say(line: str) -> None:
    if is_first():
        print(line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--small", action="store_true", help="a tiny model and picture")
    usual = ", ".join(f"{steps} for {model}" for model, steps in STEPS.items())
    add_side(parser)
    parser.add_argument("--steps", type=int, metavar="N", help=f"timed together (default: {usual})")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of these steps (default: 3)")
    parser.add_argument("--compile", action="store_true", help="with compiled blocks too")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these instead of all")
    parser.add_argument("--graphs", action="store_true", help="as CUDA graphs too")
    help_of_cost = "also with pieces for which a row of the text costs as much as C of the video"
    parser.add_argument("--text-cost", nargs="+", type=float, default=[], metavar="C", help=help_of_cost)
    parser.add_argument("--profile", action="store_true", help="then where the time of a step on all GPUs goes")
    options = parser.parse_args()
    options.steps = STEPS[options.model] if options.steps is None else options.steps
    if options.steps < 1 or options.rounds < 1:
        parser.error("steps and rounds must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
