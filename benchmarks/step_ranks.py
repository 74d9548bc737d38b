"""Denoising steps of FLUX.1-dev or CogVideoX-5b on all GPUs of torchrun's world, against one GPU and against diffusers'
own context parallelism where that has a plan for the model (FLUX).

    torchrun --nproc-per-node 2 -m benchmarks.step_ranks flux --out benchmarks/results
    torchrun --nproc-per-node 2 -m benchmarks.step_ranks cogvideox --out benchmarks/results
    torchrun --nproc-per-node 2 -m benchmarks.step_ranks flux --small --out /tmp/steps     a tiny model, over gloo

Every way runs the same steps, warmed up by one of them; what counts is the slowest rank. Each rank compares its output
with its own on one GPU. diffusers' ways use cuDNN's attention, the fastest that its context parallelism takes. A way
that fails is reported and does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from para_kernels import ContextParallel
from para_kernels.integrations.diffusers import accelerate
from para_kernels.integrations.diffusers.processes import is_first, joined, own_device
from para_kernels.parallel.failure import exchange

from .record import Record, write_records
from .reference import relative_error
from .step_settings import MODELS, Model, forward

ALONE, STOCK_ALONE = "one GPU", "diffusers on one GPU"
CUDNN_BACKEND = "_native_cudnn"


@dataclass
class Measured:
    """Seconds of a step, of the slowest rank; the last output on the host; where the work was."""

    seconds: float
    output: Tensor
    place: str


def main() -> int:
    options = _options()
    device = own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with joined(device, ContextParallel()), torch.no_grad():
        model = MODELS[options.model](options, device, dtype)
        _say(f"{options.model}: {model.shape}, {len(model.steps)} steps, {dist.get_world_size()} ranks")
        measured: dict[str, Measured] = {}
        failed = [name for name, way in ways(model).items() if not _measured(model, name, way, measured, device)]
        found = _records(model, measured, dtype)
        if is_first():
            write_records(f"{model.op}_ranks", found, options.out)
        _say(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


Entered = AbstractContextManager[tuple[Any, Callable[[], str]]]
Way = Callable[[], Entered]
"""Gives, while it is entered, the transformer to call and what tells afterwards where the work was."""


def ways(model: Model) -> dict[str, Way]:
    world = dist.get_world_size()
    ours = {
        ALONE: None,
        "auto": ContextParallel("auto"),
        "ring": ContextParallel(ring=world),
        "ulysses": ContextParallel(ulysses=world),
    }
    found: dict[str, Way] = {name: _ours(model, parallel) for name, parallel in ours.items()}
    found[STOCK_ALONE] = _stock(model, None)
    if getattr(model.transformer, "_cp_plan", None) and next(model.transformer.parameters()).is_cuda:
        found["diffusers ring"] = _stock(model, {"ring_degree": world})
        found["diffusers ulysses"] = _stock(model, {"ulysses_degree": world})
    return found


def _ours(model: Model, parallel: ContextParallel | None) -> Way:
    @contextmanager
    def entered() -> Iterator[tuple[Any, Callable[[], str]]]:
        handle = accelerate(model.pipe, cache=None, parallel=parallel)
        try:
            yield model.transformer, lambda: "" if handle.spread is None else str(handle.spread.last_place)
        finally:
            handle.remove()

    return entered


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


def _measured(model: Model, name: str, way: Way, measured: dict[str, Measured], device: torch.device) -> bool:
    try:
        with way() as (transformer, place):
            forward(transformer, model.steps[0])
            exchange(_world(), None, "arrival")
            start = time.perf_counter()
            outputs = [forward(transformer, inputs) for inputs in model.steps]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = max(exchange(_world(), (time.perf_counter() - start) / len(model.steps), "seconds"))
            measured[name] = Measured(seconds, outputs[-1].float().cpu(), place())
    except Exception as error:  # one way that fails, on all ranks alike, must not cost the others their results
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
        return False
    against = f"{measured[ALONE].seconds / seconds:5.2f}x" if ALONE in measured else ""
    _say(f"{name:<22} {seconds * 1e3:9.1f} ms a step  {against}  {measured[name].place}")
    return True


def _records(model: Model, measured: dict[str, Measured], dtype: torch.dtype) -> list[Record]:
    """One for each way, against one GPU of this package. Collective."""
    alone = measured[ALONE]
    made = []
    for name, entry in measured.items():
        difference = max(exchange(_world(), relative_error(entry.output, alone.output), "differences"))
        shape = model.shape | {"steps": len(model.steps), "ranks": dist.get_world_size()}
        notes = {"difference": difference, "place": entry.place}
        kind, ms = str(dtype).removeprefix("torch."), entry.seconds * 1e3
        made.append(Record(model.op, shape, kind, name, ms, ALONE, alone.seconds * 1e3, notes=notes))
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
    parser.add_argument("model", choices=[name for name in MODELS if name != "hunyuan"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument("--small", action="store_true", help="a tiny model and picture")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="timed together (default: 4)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("steps must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
